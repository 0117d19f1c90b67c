"""Small networks in float64 with lively batch-norm statistics, and the tools to compare what passes make of them."""

from __future__ import annotations

import functools
import random

import torch
from torch import nn

import fxmerge
from fxmerge.calibration import eval_mode
from fxmerge.candidates import Limits
from fxmerge.checks import outputs_of, relative_error
from fxmerge.evaluate import recorder
from fxmerge.folding import compose
from fxmerge.graph import between, by_id, clone, graph_meta, shared_targets
from fxmerge.passes.enumerate_segments import enumerate_segments
from fxmerge.passes.fold import FoldPass
from fxmerge.passes.relax import RelaxPass


def conv(i, o, k=3, *, s=1, bn=True, act=True, g=1, d=1, p=None):
    padding = d * (k - 1) // 2 if p is None else p
    layers = [nn.Conv2d(i, o, k, s, padding, d, g, bias=not bn)]
    layers += [nn.BatchNorm2d(o)] if bn else []
    layers += [nn.ReLU()] if act else []
    return nn.Sequential(*layers)


class Gate(nn.Module):
    """Squeeze and excite by fully connected layers."""

    def __init__(self, channels):
        super().__init__()
        self.squeeze, self.excite = nn.Linear(channels, 2), nn.Linear(2, channels)

    def forward(self, x):
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]


class Add(nn.Module):
    """The sum of two branches; None is the input itself."""

    def __init__(self, left, right=None):
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x):
        return (x if self.right is None else self.right(x)) + self.left(x)


class Minus(nn.Module):
    """The input less a branch, as denoisers have it."""

    def __init__(self, branch):
        super().__init__()
        self.branch = branch

    def forward(self, x):
        return x - self.branch(x)


class Cat(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


def residual(i, o, s=1):
    skip = None if i == o and s == 1 else conv(i, o, 1, s=s, act=False)
    return nn.Sequential(Add(nn.Sequential(conv(i, o, s=s), conv(o, o, act=False)), skip), nn.ReLU())


def inverted(i, o, s=1, grow=2):
    inner = nn.Sequential(
        conv(i, grow * i, 1), conv(grow * i, grow * i, s=s, g=grow * i), conv(grow * i, o, 1, act=False)
    )
    return Add(inner) if i == o and s == 1 else inner


def head(channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


SMALL = {
    "chain": lambda: nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 6, s=2), conv(6, 6), head(6)),
    "residual": lambda: nn.Sequential(conv(3, 4), residual(4, 4), residual(4, 6, s=2), residual(6, 6), head(6)),
    "inverted": lambda: nn.Sequential(
        conv(3, 4, s=2), inverted(4, 4), inverted(4, 6, s=2), inverted(6, 6), conv(6, 8, 1), head(8)
    ),
    "inception": lambda: nn.Sequential(
        conv(3, 4),
        Cat(conv(4, 2, 1), nn.Sequential(conv(4, 3, 1), conv(3, 3)), nn.Sequential(conv(4, 2), conv(2, 3, d=2))),
        conv(8, 8, g=2),
        Add(conv(8, 8, 5, bn=False), conv(8, 8, 1)),
        head(8),
    ),
}


def lively(model, seed=0):
    """The model in float64 and eval mode, its parameters and statistics drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
            else:
                tensor.copy_(0.5 * noise)
    return model.double().eval()


def images(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def captured(model, x):
    return clone(fxmerge.capture(model, x)).eval()


@functools.cache
def small(name):
    """A network of SMALL, captured once: a copy of the graph, and two images."""
    x = images(2, 3, 12, 12)
    return captured(lively(SMALL[name]()), x), x


def candidates(gm, kind="merge", **limits):
    """Every candidate of a kind, those with most convolutions first."""
    found = [site.candidate for site in enumerate_segments(gm, Limits(**limits)).sites]
    return sorted((c for c in found if c.kind == kind), key=lambda c: -len(c.kept) - len(c.bypassed))


def full_merge(gm, **limits):
    """The merge of most convolutions that removes none of them, nor a branch of a sum."""
    gates = {name for name, node in by_id(gm).items() if node.target == torch.ops.aten.mul.Tensor}
    return next(c for c in candidates(gm, **limits) if not c.bypassed and gates.issuperset(join for join, _ in c.cuts))


def relaxed(gm, *chosen):
    return RelaxPass(chosen)(clone(gm)).graph_module


def folded(gm):
    return FoldPass()(clone(gm).eval()).graph_module


def random_plan(gm, seed, **limits):
    """Disjoint candidates, as many as a random order lets in."""
    nodes = by_id(gm)
    sites = list(enumerate_segments(gm, Limits(**limits)).sites)
    random.Random(seed).shuffle(sites)  # noqa: S311 - a seeded order
    chosen, used = [], set()
    for candidate in (site.candidate for site in sites):
        inside = between(nodes[candidate.entry], nodes[candidate.exit])
        inside |= {nodes[join] for join, _ in candidate.cuts if candidate.kind == "drop"}
        if not inside & used:
            used |= inside
            chosen.append(candidate)
    return chosen


def segment_errors(gm, x):
    """Per merged segment of a relaxed network: the error of its one convolution against what it replaces."""
    nodes, shared = by_id(gm), shared_targets(gm)
    errors = []
    for segment in graph_meta(gm)["segments"]:
        entry, exit_ = nodes[segment["entry"]], nodes[segment["exit"]]
        composed = compose(gm, entry, exit_, between(entry, exit_), shared)
        found = composed.conv_map.apply(value_of(gm, entry, x))
        for value, matrix in composed.sides.items():
            side = value_of(gm, value, x).flatten(1) @ matrix.T
            found = found + side.reshape(*side.shape, *[1] * (found.dim() - 2))
        errors.append(relative_error([found], [value_of(gm, exit_, x)]))
    return errors


def value_of(gm, node, x):
    with eval_mode(gm):
        return recorder(gm, [node])(((x,), {}))[1][node]


def output_error(gm, other, x):
    return relative_error(outputs_of(other, ((x,), {})), outputs_of(gm, ((x,), {})))
