"""Blocks that train as several branches and deploy as one convolution, with their deploy forms.

Each block is written from its paper. ``deployed()`` gives the weight and the bias of the one convolution that it is, by
the paper's formulas, in float64. Nothing here uses fxmerge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# --- the papers' formulas ---------------------------------------------------------------------------------------------


def fused(conv, norm):
    """A convolution without bias and the batch norm behind it: w * gamma / std, beta - mean * gamma / std."""
    scale, shift = scale_and_shift(norm)
    return conv.weight.double() * scale.view(-1, 1, 1, 1), shift


def scale_and_shift(norm):
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def identity_kernel(channels, groups):
    """The 1x1 kernel that changes nothing: in each group the unit matrix."""
    own = channels // groups
    return torch.eye(own, dtype=torch.float64).repeat(groups, 1)[..., None, None]


def centred(kernel, size):
    """A smaller kernel in the middle of zeros."""
    down, across = ((size - n) // 2 for n in kernel.shape[2:])
    return F.pad(kernel, [across, across, down, down])


def total(parts):
    weights, biases = zip(*parts, strict=True)
    return torch.stack(weights).sum(0), torch.stack(biases).sum(0)


def behind_1x1(point, point_bias, dense, dense_bias, groups):
    """A 1x1 and a kxk convolution as one (Diverse Branch Block, transform III), group by group."""
    weights, biases = [], []
    for one, shift, two in zip(point.chunk(groups), point_bias.chunk(groups), dense.chunk(groups), strict=True):
        weights.append(torch.einsum("omyx,mi->oiyx", two, one[:, :, 0, 0]))
        biases.append(torch.einsum("omyx,m->o", two, shift))
    return torch.cat(weights), torch.cat(biases) + dense_bias


def average_kernel(channels, size, groups):
    """Average pooling as a convolution (Diverse Branch Block, transform V)."""
    return identity_kernel(channels, groups).expand(-1, -1, size, size) / size**2


# --- the blocks -------------------------------------------------------------------------------------------------------


class ConvNorm(nn.Sequential):
    """A convolution without bias and its batch norm."""

    def __init__(self, i, o, kernel, stride=1, padding=0, groups=1):
        super().__init__(nn.Conv2d(i, o, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(o))


class RepVGG(nn.Module):
    """3x3, 1x1 and, where shapes allow, a batch norm alone, added.

    Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", 2021, section 3.3.
    """

    def __init__(self, i, o, stride=1, groups=1):
        super().__init__()
        self.shape = (3, stride, 1, groups)
        self.dense = ConvNorm(i, o, 3, stride, 1, groups)
        self.point = ConvNorm(i, o, 1, stride, 0, groups)
        self.skip = nn.BatchNorm2d(i) if i == o and stride == 1 else None

    def forward(self, x):
        y = self.dense(x) + self.point(x)
        return y if self.skip is None else y + self.skip(x)

    def deployed(self):
        point, shift = fused(*self.point)
        parts = [fused(*self.dense), (centred(point, 3), shift)]
        return total(parts if self.skip is None else [*parts, skip_of(self.skip, 3, self.shape[-1])])


def skip_of(norm, size, groups):
    """A batch norm alone as a convolution: the identity kernel, scaled."""
    scale, shift = scale_and_shift(norm)
    return centred(identity_kernel(len(scale), groups) * scale.view(-1, 1, 1, 1), size), shift


class MobileOne(nn.Module):
    """Several equal kxk branches, a 1x1 branch beside a larger kernel, and a batch norm alone, added.

    Vasu et al., "MobileOne: An Improved One Millisecond Mobile Backbone", 2023, section 3.3. Depthwise blocks have as many
    groups as channels; pointwise ones kernel 1.
    """

    def __init__(self, i, o, kernel=3, stride=1, groups=1, branches=4):
        super().__init__()
        self.shape = (kernel, stride, kernel // 2, groups)
        self.skip = nn.BatchNorm2d(i) if i == o and stride == 1 else None
        self.scale = ConvNorm(i, o, 1, stride, 0, groups) if kernel > 1 else None
        self.branches = nn.ModuleList(ConvNorm(i, o, kernel, stride, kernel // 2, groups) for _ in range(branches))

    def forward(self, x):
        y = 0 if self.scale is None else self.scale(x)
        y = y + (0 if self.skip is None else self.skip(x))
        for branch in self.branches:
            y = y + branch(x)
        return y

    def deployed(self):
        size, groups = self.shape[0], self.shape[-1]
        parts = [fused(*branch) for branch in self.branches]
        if self.scale is not None:
            point, shift = fused(*self.scale)
            parts.append((centred(point, size), shift))
        return total(parts if self.skip is None else [*parts, skip_of(self.skip, size, groups)])


class ACBlock(nn.Module):
    """A square kernel, its middle column and its middle row, each with a batch norm, added.

    Ding et al., "ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks", 2019,
    section 3.2. With less padding than half the kernel the thin ones read less of the input on their short axis: they crop
    it, by negative padding or by slices.
    """

    def __init__(self, i, o, kernel=3, stride=1, padding=None, groups=1, crop="pad"):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.shape = (kernel, stride, padding, groups)
        self.less, self.crop = kernel // 2 - padding, crop
        self.square = ConvNorm(i, o, kernel, stride, padding, groups)
        own = padding if self.less == 0 else 0
        self.column = ConvNorm(i, o, (kernel, 1), stride, (own, 0), groups)
        self.row = ConvNorm(i, o, (1, kernel), stride, (0, own), groups)

    def forward(self, x):
        column, row = (x, x) if self.less == 0 else self.cropped(x)
        return self.square(x) + self.column(column) + self.row(row)

    def cropped(self, x):
        padding, less = self.shape[2], self.less
        if self.crop == "slice":
            assert padding == 0
            return x[:, :, :, less:-less], x[:, :, less:-less, :]
        return F.pad(x, [-less, -less, padding, padding]), F.pad(x, [padding, padding, -less, -less])

    def deployed(self):
        parts = [fused(*self.square)]
        for thin in (self.column, self.row):
            weight, shift = fused(*thin)
            parts.append((centred(weight, self.shape[0]), shift))
        return total(parts)


class PaddedNorm(nn.Module):
    """A batch norm whose border is what it makes of zeros, so that padding in front of it and behind it are one.

    ``constant=False`` pads with zeros instead, which is no deploy form's.
    """

    def __init__(self, channels, padding, constant=True):
        super().__init__()
        self.norm, self.padding, self.constant = nn.BatchNorm2d(channels), padding, constant

    def forward(self, x):
        n, p = self.norm, self.padding
        y = F.pad(n(x), [p] * 4)
        if self.constant:
            value = n.bias.detach() - n.running_mean * n.weight.detach() / torch.sqrt(n.running_var + n.eps)
            value = value.view(1, -1, 1, 1)
            y[:, :, 0:p, :] = value
            y[:, :, -p:, :] = value
            y[:, :, :, 0:p] = value
            y[:, :, :, -p:] = value
        return y


class Point(nn.Module):
    """A 1x1 convolution without bias; as a residual it adds its input."""

    def __init__(self, i, o, groups, residual=False):
        super().__init__()
        self.conv = nn.Conv2d(i, o, 1, groups=groups, bias=False)
        self.residual = residual
        if residual:
            self.register_buffer("unit", identity_kernel(i, groups).float(), persistent=False)

    def forward(self, x):
        if not self.residual:
            return self.conv(x)
        return F.conv2d(x, self.conv.weight + self.unit, None, stride=1, padding=0, groups=self.conv.groups)

    def kernel(self):
        weight = self.conv.weight.double()
        return weight + self.unit.double() if self.residual else weight


class DBB(nn.Module):
    """kxk; 1x1; 1x1 then kxk; 1x1 then average pooling; each with a batch norm behind every step, added.

    Ding et al., "Diverse Branch Block: Building a Convolution as an Inception-like Unit", 2021, section 3. The inner 1x1
    of the third branch has ``inner`` channels; None makes it a residual of as many channels as the input. A depthwise
    block has no 1x1 in front of the pooling, and none alone.
    """

    def __init__(self, i, o, kernel=3, stride=1, groups=1, inner=None, constant=True):
        super().__init__()
        padding = kernel // 2
        self.shape = (kernel, stride, padding, groups)
        self.depthwise = groups == o
        self.dense = ConvNorm(i, o, kernel, stride, padding, groups)
        self.point = None if self.depthwise else ConvNorm(i, o, 1, stride, 0, groups)
        self.inner = Point(i, inner or i, groups, residual=inner is None)
        self.inner_norm = PaddedNorm(inner or i, padding, constant)
        self.outer = ConvNorm(inner or i, o, kernel, stride, 0, groups)
        if not self.depthwise:
            self.mixed, self.mixed_norm = Point(i, o, groups), PaddedNorm(o, padding, constant)
        self.pool = nn.AvgPool2d(kernel, stride, padding if self.depthwise else 0)
        self.pool_norm = nn.BatchNorm2d(o)

    def forward(self, x):
        y = self.dense(x)
        if self.point is not None:
            y = y + self.point(x)
        y = y + self.pool_norm(self.pool(x if self.depthwise else self.mixed_norm(self.mixed(x))))
        return y + self.outer(self.inner_norm(self.inner(x)))

    def deployed(self):
        size, groups = self.shape[0], self.shape[-1]
        parts = [fused(*self.dense)]
        if self.point is not None:
            weight, shift = fused(*self.point)
            parts.append((centred(weight, size), shift))
        scale, shift = scale_and_shift(self.inner_norm.norm)
        point = self.inner.kernel() * scale.view(-1, 1, 1, 1)
        parts.append(behind_1x1(point, shift, *fused(*self.outer), groups))
        scale, shift = scale_and_shift(self.pool_norm)
        pool = average_kernel(len(scale), size, groups) * scale.view(-1, 1, 1, 1)
        if self.depthwise:
            parts.append((pool, shift))
        else:
            mixed_scale, mixed_shift = scale_and_shift(self.mixed_norm.norm)
            point = self.mixed.kernel() * mixed_scale.view(-1, 1, 1, 1)
            parts.append(behind_1x1(point, mixed_shift, pool, shift, groups))
        return total(parts)


# --- networks of them -------------------------------------------------------------------------------------------------

BLOCKS = {
    "repvgg": lambda: RepVGG(4, 4),
    "repvgg without skip": lambda: RepVGG(4, 6),
    "repvgg stride 2": lambda: RepVGG(4, 4, stride=2),
    "repvgg groups": lambda: RepVGG(4, 4, groups=2),
    "repvgg groups, stride 2": lambda: RepVGG(4, 6, stride=2, groups=2),
    "mobileone": lambda: MobileOne(4, 4),
    "mobileone depthwise": lambda: MobileOne(4, 4, groups=4),
    "mobileone depthwise stride 2": lambda: MobileOne(4, 4, stride=2, groups=4),
    "mobileone pointwise": lambda: MobileOne(4, 6, kernel=1),
    "mobileone pointwise with skip": lambda: MobileOne(4, 4, kernel=1, branches=2),
    "mobileone 5x5, one branch": lambda: MobileOne(4, 6, kernel=5, stride=2, branches=1),
    "acnet": lambda: ACBlock(4, 6),
    "acnet stride 2": lambda: ACBlock(4, 4, stride=2),
    "acnet groups": lambda: ACBlock(4, 4, groups=4),
    "acnet 5x5": lambda: ACBlock(4, 4, kernel=5),
    "acnet crops": lambda: ACBlock(4, 6, padding=0),
    "acnet crops, stride 2": lambda: ACBlock(4, 4, padding=0, stride=2),
    "acnet crops some": lambda: ACBlock(4, 4, kernel=5, padding=1),
    "acnet crops by slices": lambda: ACBlock(4, 6, padding=0, crop="slice"),
    "dbb": lambda: DBB(4, 6, inner=5),
    "dbb residual": lambda: DBB(4, 4),
    "dbb stride 2": lambda: DBB(4, 6, stride=2, inner=4),
    "dbb groups": lambda: DBB(4, 6, groups=2, inner=6),
    "dbb groups, residual": lambda: DBB(4, 6, groups=2),
    "dbb depthwise": lambda: DBB(4, 4, groups=4),
    "dbb depthwise stride 2": lambda: DBB(4, 4, groups=4, stride=2, inner=8),
    "dbb 5x5": lambda: DBB(4, 6, kernel=5, inner=4),
}

NETWORKS = {
    "repvgg": [lambda: RepVGG(3, 4, 2), lambda: RepVGG(4, 4), lambda: RepVGG(4, 6, 2), lambda: RepVGG(6, 6, groups=2)],
    "mobileone": [
        lambda: MobileOne(3, 4, stride=2),
        lambda: MobileOne(4, 4, groups=4),
        lambda: MobileOne(4, 6, kernel=1),
        lambda: MobileOne(6, 6, groups=6, stride=2),
        lambda: MobileOne(6, 6, kernel=1),
    ],
    "acnet": [
        lambda: ACBlock(3, 4),
        lambda: ACBlock(4, 6, stride=2),
        lambda: ACBlock(6, 6, padding=0),
        lambda: ACBlock(6, 4),
    ],
    "dbb": [
        lambda: DBB(3, 4, inner=3),
        lambda: DBB(4, 6, stride=2),
        lambda: DBB(6, 6, groups=6),
        lambda: DBB(6, 8, groups=2),
    ],
    "all": [
        lambda: RepVGG(3, 4),
        lambda: DBB(4, 4, stride=2),
        lambda: MobileOne(4, 4, groups=4),
        lambda: ACBlock(4, 6),
    ],
}


def network(name, deploy=False):
    """A network of blocks, an activation behind each, and a classifier; ``deploy`` puts plain convolutions in their place."""
    blocks = [lively(make(), seed) for seed, make in enumerate(NETWORKS[name])]
    channels = len(blocks[-1].deployed()[1])
    blocks = [deployed(block) for block in blocks] if deploy else blocks
    layers = [layer for block in blocks for layer in (block, nn.ReLU())]
    classifier = lively(nn.Linear(channels, 5))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier)


def lively(model, seed=0):
    """The model in float64 and eval mode, its parameters and statistics drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or name.endswith("unit"):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
                tensor.copy_(0.5 + noise.abs())
            elif tensor.ndim > 1:
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
            else:
                tensor.copy_(0.5 * noise)
    return model.double().eval()


@torch.no_grad()
def deployed(block):
    """The block's deploy form, in float64."""
    kernel, stride, padding, groups = block.shape
    weight, bias = block.deployed()
    conv = nn.Conv2d(weight.shape[1] * groups, len(weight), kernel, stride, padding, groups=groups, dtype=torch.float64)
    conv.load_state_dict({"weight": weight, "bias": bias})
    return conv
