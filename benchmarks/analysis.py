"""How long the analysis takes, from capture to plan without measuring, on networks of 150 to 1000 convolutions.

``python benchmarks/analysis.py`` writes a record to ``benchmarks/results/analysis.json`` after every network, and beside
it the table ``analysis.md``. Networks that are in the file already are not run again (``--again`` does). Every network
has a process of its own with one thread; seconds are those of its processor, not of the clock, so that other work on the
machine counts little. Importance is ``magnitude``, the runtime counts multiply-accumulates.

What torch does, ``torch.export.export`` and the ``module()`` of what it returns, is shown apart: ``plan`` is the rest,
capture, analysis, scores, solution, and one plan at 0.7. ``count`` is what stands for the measuring, which is no part of
``plan``: folding the original and counting its operations.

Counts are whole numbers, and many plans tie. Measured latencies do not, so the solver runs again with a seeded factor for
every latency of the table: with the default bound on its points, and without one for as long as the time limit allows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fxmerge
from fxmerge.passes.profile_latency import LatencyTable
from fxmerge.passes.select_segments import selection_problem
from fxmerge.solver import solve

RESULTS = Path(__file__).with_name("results") / "analysis.json"
SECONDS = 900.0
WIDTHS = (8, 12, 16, 24)
BUDGET = 0.7
MAX_POINTS = 4096
"""The default of :func:`fxmerge.frontier`."""


def conv(i: int, o: int, k: int = 3, *, s: int = 1, g: int = 1) -> list[nn.Module]:
    """A padded convolution without bias and its batch norm."""
    return [nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o)]


class Residual(nn.Module):
    """``body(x)`` plus ``x``, and an activation behind it."""

    def __init__(self, *body: nn.Module, last: nn.Module) -> None:
        super().__init__()
        self.body, self.last = nn.Sequential(*body), last

    def forward(self, x: Tensor) -> Tensor:
        """Images or maps in, maps of the same shape out."""
        out: Tensor = self.last(x + self.body(x))
        return out


def stages(convolutions: int, each: int, block: Callable[[int], nn.Module]) -> nn.Sequential:
    """A stem, then blocks of ``each`` convolutions in four stages with a strided convolution in front of three."""
    blocks = (convolutions - 4) // each
    layers: list[nn.Module] = [nn.Sequential(*conv(3, WIDTHS[0]), nn.ReLU())]
    for stage, width in enumerate(WIDTHS):
        count = blocks * (stage + 1) // 4 - blocks * stage // 4
        down = [*conv(WIDTHS[stage - 1], width, s=2), nn.ReLU()] if stage else []
        layers.append(nn.Sequential(*down, *(block(width) for _ in range(count))))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def residual(convolutions: int) -> nn.Module:
    """Basic blocks, as in ResNet-18."""

    def block(width: int) -> nn.Module:
        return Residual(*conv(width, width), nn.ReLU(), *conv(width, width), last=nn.ReLU())

    return stages(convolutions, 2, block)


def inverted(convolutions: int) -> nn.Module:
    """Inverted residuals with an expansion of four, as in MobileNetV2."""

    def block(width: int) -> nn.Module:
        wide = 4 * width
        expand, depthwise = conv(width, wide, 1), conv(wide, wide, 3, g=wide)
        return Residual(*expand, nn.ReLU6(), *depthwise, nn.ReLU6(), *conv(wide, width, 1), last=nn.Identity())

    return stages(convolutions, 3, block)


class UNet(nn.Module):
    """Basic blocks down and up again over four resolutions, with a long skip that is concatenated at each."""

    def __init__(self, convolutions: int) -> None:
        super().__init__()
        blocks = (convolutions - 9) // 14

        def side(width: int) -> nn.Sequential:
            body = ([*conv(width, width), nn.ReLU(), *conv(width, width)] for _ in range(blocks))
            return nn.Sequential(*(Residual(*each, last=nn.ReLU()) for each in body))

        self.stem = nn.Sequential(*conv(3, WIDTHS[0]), nn.ReLU())
        self.down = nn.ModuleList(side(width) for width in WIDTHS[:-1])
        self.shrink = nn.ModuleList(nn.Sequential(*conv(i, o, s=2), nn.ReLU()) for i, o in itertools.pairwise(WIDTHS))
        self.middle = side(WIDTHS[-1])
        self.fuse = nn.ModuleList(nn.Sequential(*conv(i + o, i), nn.ReLU()) for i, o in itertools.pairwise(WIDTHS))
        self.up = nn.ModuleList(side(width) for width in WIDTHS[:-1])
        self.last = nn.Conv2d(WIDTHS[0], 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images in, four channels of the same size out."""
        y = self.stem(x)
        skips = []
        for down, shrink in zip(self.down, self.shrink, strict=True):
            y = down(y)
            skips.append(y)
            y = shrink(y)
        y = self.middle(y)
        for fuse, up in zip(reversed(self.fuse), reversed(self.up), strict=True):
            y = up(fuse(torch.cat([nn.functional.interpolate(y, scale_factor=2.0), skips.pop()], 1)))
        out: Tensor = self.last(y)
        return out


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"residual": residual, "inverted": inverted, "U-Net": UNet}
RUNS = [("residual", size) for size in (150, 300, 600, 1000)]
RUNS += [(family, size) for family in ("inverted", "U-Net") for size in (150, 1000)]


def main() -> None:
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as residual-150 (default all)")
    parser.add_argument("--again", action="store_true", help="run networks that are in the results already")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit of a network (default %(default)s)")
    parser.add_argument("--record", nargs=2, help=argparse.SUPPRESS)  # the process of one network
    options = parser.parse_args()
    if options.record:
        record(options.record[0], int(options.record[1]))
        return
    done: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for family, size in RUNS:
        name = f"{family}-{size}"
        if name in (options.names or [name]) and (name not in done or options.again):
            done[name] = run(family, size, options.seconds)
            in_order = {known: done[known] for known in (f"{f}-{s}" for f, s in RUNS) if known in done}
            RESULTS.write_text(json.dumps(in_order, indent=1) + "\n")
            RESULTS.with_suffix(".md").write_text(table(in_order) + "\n")
            print(f"{name}: {done[name]}", flush=True)
    print(table(done))


def run(family: str, size: int, seconds: float) -> dict[str, Any]:
    """The record of one network, made in a process of its own; what it printed before the limit counts."""
    command = [sys.executable, __file__, "--record", family, str(size)]
    try:
        output = subprocess.run(command, stdout=subprocess.PIPE, timeout=seconds, check=True).stdout  # noqa: S603
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
    records = output.decode().splitlines()
    found: dict[str, Any] = json.loads(records[-1]) if records else {"problem": f"no result within {seconds:.0f} s"}
    return found


def record(family: str, size: int) -> None:
    """Print the record of one network, and once more with the exact mode."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = NETWORKS[family](size).eval()
    example = torch.randn(2, 3, 32, 32)
    spent = {"export": 0.0, "module": 0.0}
    export, module = torch.export.export, torch.export.ExportedProgram.module
    with (
        mock.patch("time.perf_counter", time.process_time),
        mock.patch("torch.export.export", timed(spent, "export", export)),
        mock.patch("torch.export.ExportedProgram.module", timed(spent, "module", module)),
    ):
        found = fxmerge.frontier(model, example, runtime="macs")
        start = time.process_time()
        found.at(BUDGET)
        spent["at"] = time.process_time() - start
    stage = found._seconds
    spent["capture"] = stage["capture"] - spent["export"] - spent["module"]
    spent |= {"analyse": stage["analyse"], "score": stage["score"], "solve": stage["solve"], "count": stage["measure"]}
    facts: dict[str, Any] = {
        "convolutions": found.convolutions,
        "candidates": len(found.enumeration.sites),
        "points": len(found),
        "seconds": spent,
        "plan": sum(spent[name] for name in ("capture", "analyse", "score", "solve", "at")),
        "machine": f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}",
    }
    for name, most in (("bounded", MAX_POINTS), ("exact", None)):
        print(json.dumps(facts), flush=True)
        problem = selection_problem(
            replace(found.enumeration, sites=found._useful), untied(found._table), found._losses
        )
        start = time.process_time()
        points = solve(problem, max_points=most)
        seconds = time.process_time() - start
        facts[name] = {"points": len(points), "seconds": seconds, "rounded": points.bound / found.original}
    print(json.dumps(facts), flush=True)


def untied(table: LatencyTable) -> LatencyTable:
    """The table with every latency times a factor of its own, about 1.1 or its inverse; equal ones stay equal."""
    rng = random.Random(0)  # noqa: S311 - synthetic data
    values = sorted({*table.kept.values(), *table.merged.values()})
    noisy = {value: value * rng.lognormvariate(0, 0.1) for value in values}
    kept = {name: noisy[value] for name, value in table.kept.items()}
    return replace(table, kept=kept, merged={candidate: noisy[value] for candidate, value in table.merged.items()})


def timed(spent: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its processor time added up."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] += time.process_time() - start

    return call


def table(done: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "Processor seconds, one thread. **plan**: capture to plan beyond torch's own `torch.export.export` and `module()`. "
        "count: what stands for the measuring, no part of it. Bounded and exact: points and seconds of the solver on "
        "latencies without ties, with the default bound on its points and without; rounded: how much a plan of the "
        "bounded one may be slower, as a share of the original.",
        "",
        "| network | convs | candidates | export | module() | capture | analyse | score | solve | **plan** | count "
        "| bounded | rounded | exact |",
        "|---" * 14 + "|",
    ]
    for name, found in done.items():
        if "problem" in found:
            lines.append(f"| {name} | {found['problem']}" + " |" * 13)
            continue
        spent = found["seconds"]
        cells = [name, str(found["convolutions"]), f"{found['candidates']:,}"]
        cells += [f"{spent[stage]:.1f}" for stage in ("export", "module", "capture", "analyse", "score")]
        cells += [f"{spent['solve'] + spent['at']:.1f}", f"**{found['plan']:.1f}**", f"{spent['count']:.1f}"]
        cells += [solved(found.get("bounded")), f"{found.get('bounded', {}).get('rounded', 0):.1e}"]
        lines.append(f"| {' | '.join([*cells, solved(found.get('exact'))])} |")
    return "\n".join(lines)


def solved(found: dict[str, float] | None) -> str:
    """Points and seconds of one run of the solver."""
    return "over the time limit" if found is None else f"{found['points']:,}, {found['seconds']:.1f} s"


if __name__ == "__main__":
    main()
