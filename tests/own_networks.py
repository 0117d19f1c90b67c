"""Networks for the tests and the zoo that no package has in a small form, each after a published design.

Widths are small and constructors take no size: every network but the 1d and 3d ones takes images whose height and
width are multiples of 8. Weights are torch's own; :func:`zoo.he_weights` makes them carry a signal through.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "EDSR",
    "FSRCNN",
    "M5",
    "R3D",
    "TCN",
    "ConvMixer",
    "DeepLab",
    "DenseNet",
    "DnCNN",
    "Embedded",
    "FeaturePyramid",
    "Fusion",
    "Hourglass",
    "R2Plus1D",
    "RepVGG",
    "Siamese",
    "StyleTransfer",
    "TimeUNet",
    "UNet3D",
    "WaveNet",
    "YoloNeck",
]


def conv_bn(i: int, o: int, k: int = 3, *, s: int = 1, d: int = 1, g: int = 1) -> nn.Sequential:
    """A padded convolution without bias and its batch norm."""
    return nn.Sequential(nn.Conv2d(i, o, k, s, d * (k - 1) // 2, d, g, bias=False), nn.BatchNorm2d(o))


def conv_act(i: int, o: int, k: int = 3, *, s: int = 1, d: int = 1, g: int = 1) -> nn.Sequential:
    """:func:`conv_bn` and a ReLU."""
    return nn.Sequential(*conv_bn(i, o, k, s=s, d=d, g=g), nn.ReLU(inplace=True))


class Basic(nn.Module):
    """The residual block of ResNet-18 (He et al. 2016)."""

    def __init__(self, i: int, o: int, s: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(conv_act(i, o, s=s), conv_bn(o, o))
        self.skip = nn.Identity() if i == o and s == 1 else conv_bn(i, o, 1, s=s)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def classifier(channels: int, classes: int = 10) -> nn.Sequential:
    """Global average pooling and one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class DnCNN(nn.Module):
    """The grayscale denoiser DnCNN: predicts the noise in ``x`` [N, 1, H, W] and subtracts it.

    Conv-ReLU, ``depth - 2`` times conv-BN-ReLU, conv; all 3x3 (Zhang et al., "Beyond a Gaussian
    Denoiser", 2017, section III).
    """

    def __init__(self, depth: int = 17, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        noise: Tensor = self.noise(x)
        return x - noise


class EDSR(nn.Module):
    """Super-resolution by residual blocks without norms and sub-pixel shuffling (Lim et al. 2017): ``scale`` times larger."""

    def __init__(self, width: int = 16, blocks: int = 4, scale: int = 2, residual: float = 0.3) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.residual = residual
        self.tail = nn.Sequential(
            nn.Conv2d(width, width * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.Conv2d(width, 3, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        head = y = self.head(x)
        for block in self.blocks:
            y = y + block(y) * self.residual
        out: Tensor = self.tail(head + self.last(y))
        return out


class FSRCNN(nn.Module):
    """Super-resolution: shrink, map, expand, and one transposed convolution at the end (Dong et al. 2016)."""

    def __init__(self, width: int = 32, narrow: int = 8, maps: int = 4, scale: int = 2) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 5, padding=2), nn.PReLU(width)]
        layers += [nn.Conv2d(width, narrow, 1), nn.PReLU(narrow)]
        for _ in range(maps):
            layers += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.PReLU(narrow)]
        layers += [nn.Conv2d(narrow, width, 1), nn.PReLU(width)]
        self.body = nn.Sequential(*layers)
        self.up = nn.ConvTranspose2d(width, 1, 9, scale, padding=4, output_padding=scale - 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.body(x))
        return out


class StyleTransfer(nn.Module):
    """Image to image with reflecting padding, instance norm and nearest upsampling (Johnson et al. 2016)."""

    def __init__(self, width: int = 8, blocks: int = 3) -> None:
        super().__init__()

        def layer(i: int, o: int, k: int, s: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.ReflectionPad2d(k // 2), nn.Conv2d(i, o, k, s), nn.InstanceNorm2d(o, affine=True), nn.ReLU()
            )

        deep = 4 * width
        self.down = nn.Sequential(layer(3, width, 9), layer(width, 2 * width, 3, 2), layer(2 * width, deep, 3, 2))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(deep, deep, 3, padding=1, padding_mode="reflect"),
                nn.InstanceNorm2d(deep, affine=True),
                nn.ReLU(),
                nn.Conv2d(deep, deep, 3, padding=1),
                nn.InstanceNorm2d(deep, affine=True),
            )
            for _ in range(blocks)
        )
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2),
            layer(deep, 2 * width, 3),
            nn.Upsample(scale_factor=2),
            layer(2 * width, width, 3),
        )
        self.last = nn.Sequential(nn.ReflectionPad2d(4), nn.Conv2d(width, 3, 9), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(x)
        for block in self.blocks:
            y = y + block(y)
        out: Tensor = self.last(self.up(y))
        return out


class TimeBlock(nn.Module):
    """The residual block of DDPM (Ho et al. 2020): norm, SiLU, conv; plus the projected time; norm, SiLU, dropout, conv."""

    def __init__(self, i: int, o: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, i), nn.Conv2d(i, o, 3, padding=1)
        self.project = nn.Linear(time, o)
        self.norm2, self.conv2 = nn.GroupNorm(4, o), nn.Conv2d(o, o, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.skip = nn.Identity() if i == o else nn.Conv2d(i, o, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.project(F.silu(time))[:, :, None, None]
        out: Tensor = self.skip(x) + self.conv2(self.drop(F.silu(self.norm2(h))))
        return out


class SelfAttention(nn.Module):
    """Attention over the pixels of a map, one head, as DDPM has it at low resolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, 3)  # [N, 1 head, pixels, C]
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape)
        out: Tensor = x + self.out(attended)
        return out


class TimeUNet(nn.Module):
    """The U-Net of DDPM in small: takes noisy images [N, 3, H, W] and times [N], returns the noise.

    ``per_level`` blocks on each of two resolutions, every one of them read again on the way up (a long skip).
    """

    def __init__(self, width: int = 8, per_level: int = 1) -> None:
        super().__init__()
        time = 4 * width
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.high = nn.ModuleList(TimeBlock(width, width, time) for _ in range(per_level))
        self.down = nn.Conv2d(width, width, 3, 2, 1)
        self.low = nn.ModuleList(TimeBlock(width if k == 0 else 2 * width, 2 * width, time) for k in range(per_level))
        self.middle, self.attention = TimeBlock(2 * width, 2 * width, time), SelfAttention(2 * width)
        self.low_up = nn.ModuleList(TimeBlock(4 * width, 2 * width, time) for _ in range(per_level))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(2 * width, 2 * width, 3, padding=1))
        self.high_up = nn.ModuleList(
            TimeBlock(2 * width + width if k == 0 else 2 * width, width, time) for k in range(per_level)
        )
        self.last = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        steps = torch.arange(self.width // 2, device=x.device, dtype=x.dtype)
        angles = time[:, None] * torch.exp(-math.log(1e4) / (self.width // 2) * steps)
        embedded = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        y = self.first(x)
        skips = []
        for block in self.high:
            y = block(y, embedded)
            skips.append(y)
        y = self.down(y)
        for block in self.low:
            y = block(y, embedded)
            skips.append(y)
        y = self.attention(self.middle(y, embedded))
        for block in self.low_up:
            y = block(torch.cat([y, skips.pop()], 1), embedded)
        y = self.up(y)
        for block in self.high_up:
            y = block(torch.cat([y, skips.pop()], 1), embedded)
        out: Tensor = self.last(y)
        return out


class Embedded(nn.Module):
    """Residual blocks that all read one embedding computed from the image itself.

    The embedding is global pooling and two linear layers; each block adds its projection behind its first convolution,
    as networks with style or camera conditioning do.
    """

    def __init__(self, width: int = 12, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 16), nn.SiLU()
        )
        self.first = conv_act(3, width)
        self.into = nn.ModuleList(conv_bn(width, width) for _ in range(blocks))
        self.project = nn.ModuleList(nn.Linear(16, width) for _ in range(blocks))
        self.out = nn.ModuleList(conv_bn(width, width) for _ in range(blocks))
        self.head = classifier(width)

    def forward(self, x: Tensor) -> Tensor:
        embedded = self.embed(x)
        y = self.first(x)
        for into, project, out in zip(self.into, self.project, self.out, strict=True):
            y = torch.relu(y + out(torch.relu(into(y) + project(embedded)[:, :, None, None])))
        scores: Tensor = self.head(y)
        return scores


class FeaturePyramid(nn.Module):
    """A detection backbone with a feature pyramid and shared heads: a dict of maps (Lin et al. 2017; RetinaNet)."""

    def __init__(self, width: int = 8, pyramid: int = 16, anchors: int = 3) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.stem = conv_act(3, width, s=2)
        self.stages = nn.ModuleList(
            nn.Sequential(Basic(i, o, s), Basic(o, o))
            for i, o, s in zip([width, *widths[:-1]], widths, (1, 2, 2), strict=True)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(o, pyramid, 1) for o in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(pyramid, pyramid, 3, padding=1) for _ in widths)
        self.boxes = nn.Sequential(
            nn.Conv2d(pyramid, pyramid, 3, padding=1), nn.ReLU(), nn.Conv2d(pyramid, 4 * anchors, 3, padding=1)
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        maps = []
        for stage in self.stages:
            y = stage(y)
            maps.append(y)
        merged = [self.lateral[-1](maps[-1])]
        for lateral, lower in zip(self.lateral[-2::-1], maps[-2::-1], strict=True):
            merged.append(lateral(lower) + F.interpolate(merged[-1], scale_factor=2.0))
        levels = [smooth(each) for smooth, each in zip(self.smooth, merged[::-1], strict=True)]
        found = OrderedDict((f"p{number}", level) for number, level in enumerate(levels, 1))
        return {**found, **{f"boxes{number}": self.boxes(level) for number, level in enumerate(levels, 1)}}


class YoloNeck(nn.Module):
    """A detector in YOLOv5's style: CSP blocks with SiLU, spatial pyramid pooling, a path-aggregating neck, three outputs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def conv(i: int, o: int, k: int = 3, s: int = 1) -> nn.Sequential:
            return nn.Sequential(*conv_bn(i, o, k, s=s), nn.SiLU())

        self.stem = nn.Sequential(conv(3, width, 3, 2), _Csp(width, width))
        self.middle = nn.Sequential(conv(width, 2 * width, 3, 2), _Csp(2 * width, 2 * width))
        self.deep = nn.Sequential(conv(2 * width, 4 * width, 3, 2), _Csp(4 * width, 4 * width))
        self.reduce, self.fuse = conv(4 * width, width, 1), conv(4 * width, 4 * width, 1)
        self.top, self.side = conv(4 * width, 2 * width, 1), _Csp(4 * width, 2 * width)
        self.down, self.last = conv(2 * width, 2 * width, 3, 2), _Csp(4 * width, 4 * width)
        self.heads = nn.ModuleList(nn.Conv2d(c, 18, 1) for c in (2 * width, 4 * width))

    def forward(self, x: Tensor) -> list[Tensor]:
        middle = self.middle(self.stem(x))
        y = self.reduce(self.deep(middle))
        pools = [y]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        top = self.top(self.fuse(torch.cat(pools, 1)))
        fine = self.side(torch.cat([F.interpolate(top, scale_factor=2.0), middle], 1))
        coarse = self.last(torch.cat([self.down(fine), top], 1))
        return [head(each) for head, each in zip(self.heads, (fine, coarse), strict=True)]


class _Csp(nn.Module):
    """A cross-stage partial block: half of the channels through a residual bottleneck, half past it."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        half = o // 2
        self.main, self.past = conv_act(i, half, 1), conv_act(i, half, 1)
        self.inner = nn.Sequential(conv_act(half, half, 1), conv_act(half, half))
        self.out = conv_act(o, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.main(x)
        out: Tensor = self.out(torch.cat([y + self.inner(y), self.past(x)], 1))
        return out


class Fusion(nn.Module):
    """Two resolutions in parallel that exchange their maps, as in HRNet (Wang et al. 2020), for segmentation."""

    def __init__(self, width: int = 8, stages: int = 2, blocks: int = 2, classes: int = 5) -> None:
        super().__init__()
        wide = 2 * width
        self.stem = nn.Sequential(conv_act(3, width, s=2), Basic(width, width))
        self.split = conv_act(width, wide, s=2)
        self.high = nn.ModuleList(nn.Sequential(*(Basic(width, width) for _ in range(blocks))) for _ in range(stages))
        self.low = nn.ModuleList(nn.Sequential(*(Basic(wide, wide) for _ in range(blocks))) for _ in range(stages))
        self.down = nn.ModuleList(conv_bn(width, wide, s=2) for _ in range(stages))
        self.up = nn.ModuleList(conv_bn(wide, width, 1) for _ in range(stages))
        self.head = nn.Sequential(conv_act(width + wide, wide, 1), nn.Conv2d(wide, classes, 1))

    def forward(self, x: Tensor) -> Tensor:
        high = self.stem(x)
        low = self.split(high)
        for to_high, to_low, down, up in zip(self.high, self.low, self.down, self.up, strict=True):
            high, low = to_high(high), to_low(low)
            high, low = (
                torch.relu(high + F.interpolate(up(low), scale_factor=2.0)),
                torch.relu(low + down(high)),
            )
        out: Tensor = self.head(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))
        return out


class DeepLab(nn.Module):
    """Segmentation with an atrous spatial pyramid: parallel dilated convolutions and image pooling (Chen et al. 2017)."""

    def __init__(self, width: int = 8, classes: int = 5, rates: Sequence[int] = (2, 4)) -> None:
        super().__init__()
        deep = 4 * width
        self.backbone = nn.Sequential(
            conv_act(3, width, s=2), Basic(width, 2 * width, 2), Basic(2 * width, deep), Basic(deep, deep)
        )
        self.branches = nn.ModuleList([conv_act(deep, width, 1), *(conv_act(deep, width, d=rate) for rate in rates)])
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(deep, width, 1), nn.ReLU())
        self.project = nn.Sequential(conv_act(width * (len(rates) + 2), deep, 1), nn.Dropout(0.5))
        self.head = nn.Sequential(conv_act(deep, deep), nn.Conv2d(deep, classes, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.backbone(x)
        pooled = F.interpolate(self.pooled(y), size=y.shape[2:], mode="bilinear", align_corners=False)
        y = self.head(self.project(torch.cat([*(branch(y) for branch in self.branches), pooled], 1)))
        return {"out": F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)}


class Hourglass(nn.Module):
    """Pose heat maps from two stacked hourglasses with an output after each (Newell et al. 2016)."""

    def __init__(self, width: int = 16, joints: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_act(3, width, s=2), Basic(width, width))
        self.glasses = nn.ModuleList(_Glass(width, depth) for _ in range(2))
        self.features = nn.ModuleList(conv_act(width, width, 1) for _ in range(2))
        self.maps = nn.ModuleList(nn.Conv2d(width, joints, 1) for _ in range(2))
        self.back = nn.Conv2d(joints, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        y = self.features[0](self.glasses[0](x))
        first = self.maps[0](y)
        second = self.maps[1](self.features[1](self.glasses[1](x + y + self.back(first))))
        return first, second


class _Glass(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.skip, self.down, self.up = Basic(width, width), Basic(width, width), Basic(width, width)
        self.inner = _Glass(width, depth - 1) if depth > 1 else Basic(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.inner(self.down(F.max_pool2d(x, 2))))
        out: Tensor = self.skip(x) + F.interpolate(y, scale_factor=2.0)
        return out


class DenseNet(nn.Module):
    """Layers that each read all earlier ones, concatenated anew every time, in blocks with transitions (Huang et al. 2017)."""

    def __init__(self, growth: int = 8, layers: int = 3, blocks: int = 2) -> None:
        super().__init__()
        channels = 2 * growth
        self.first = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for _ in range(blocks):
            inputs = [channels + number * growth for number in range(layers)]
            self.blocks.append(_DenseBlock(self._layer(i, growth) for i in inputs))
            channels = (channels + layers * growth) // 2
            self.transitions.append(
                nn.Sequential(
                    nn.BatchNorm2d(2 * channels),
                    nn.ReLU(),
                    nn.Conv2d(2 * channels, channels, 1, bias=False),
                    nn.AvgPool2d(2),
                )
            )
        self.head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), *classifier(channels))

    @staticmethod
    def _layer(i: int, growth: int) -> nn.Sequential:
        wide = 2 * growth
        return nn.Sequential(
            *(nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, wide, 1, bias=False)),
            *(nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            y = transition(block(y))
        scores: Tensor = self.head(y)
        return scores


class _DenseBlock(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class RepVGG(nn.Module):
    """RepVGG in its training form: 3x3, 1x1 and identity branches, each with its batch norm, summed (Ding et al. 2021)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        widths = [
            (3, width, 2),
            (width, width, 1),
            (width, 2 * width, 2),
            (2 * width, 2 * width, 1),
            (2 * width, 2 * width, 1),
        ]
        self.blocks = nn.Sequential(*(_RepBlock(i, o, s) for i, o, s in widths))
        self.head = classifier(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x))
        return out


class _RepBlock(nn.Module):
    def __init__(self, i: int, o: int, s: int) -> None:
        super().__init__()
        self.dense, self.point = conv_bn(i, o, s=s), conv_bn(i, o, 1, s=s)
        self.identity = nn.BatchNorm2d(i) if i == o and s == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.dense(x) + self.point(x)
        return torch.relu(y if self.identity is None else y + self.identity(x))


class ConvMixer(nn.Module):
    """Patches, then depthwise convolutions with a skip and 1x1 ones, all padded 'same' (Trockman and Kolter 2022)."""

    def __init__(self, width: int = 24, depth: int = 4, kernel: int = 5, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, width, patch, patch), nn.GELU(), nn.BatchNorm2d(width))
        self.space = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, kernel, groups=width, padding="same"), nn.GELU(), nn.BatchNorm2d(width)
            )
            for _ in range(depth)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)) for _ in range(depth)
        )
        self.head = classifier(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patches(x)
        for space, channels in zip(self.space, self.channels, strict=True):
            y = channels(y + space(y))
        scores: Tensor = self.head(y)
        return scores


class Siamese(nn.Module):
    """One tower called on two images, compared by a small network on the difference of their maps."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tower = nn.Sequential(conv_act(3, width, s=2), Basic(width, 2 * width, 2))
        self.compare = nn.Sequential(
            conv_act(2 * width, 4 * width),
            Basic(4 * width, 4 * width),
            Basic(4 * width, 4 * width),
            classifier(4 * width, 1),
        )

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        out: Tensor = self.compare(self.tower(left) - self.tower(right))
        return out


class M5(nn.Module):
    """Classifier of raw audio [N, 1, T]: strided first layer, then conv-BN-ReLU and max-pooling (Dai et al. 2017)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv1d(1, width, 80, 4, 38), nn.BatchNorm1d(width), nn.ReLU(), nn.MaxPool1d(4)]
        for i, o in ((width, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv1d(i, o, 3, padding=1), nn.BatchNorm1d(o), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.features(x))
        return out


class WaveNet(nn.Module):
    """Causal dilated convolutions with tanh-sigmoid gates, residual and skip outputs (van den Oord et al. 2016)."""

    def __init__(self, width: int = 12, layers: int = 4) -> None:
        super().__init__()
        self.dilations = [2**k for k in range(layers)]
        self.first = nn.Conv1d(1, width, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=d) for d in self.dilations)
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skip = nn.ModuleList(nn.Conv1d(width, 2 * width, 1) for _ in range(layers))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(2 * width, 2 * width, 1), nn.ReLU(), nn.Conv1d(2 * width, 16, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for d, dilated, residual, skip in zip(self.dilations, self.dilated, self.residual, self.skip, strict=True):
            value, gate = dilated(F.pad(y, (d, 0))).chunk(2, 1)
            gated = torch.tanh(value) * torch.sigmoid(gate)
            total = total + skip(gated)
            y = y + residual(gated)
        out: Tensor = self.last(total)
        return out


class TCN(nn.Module):
    """Temporal convolutional network: causal residual blocks whose convolutions overhang and are chomped (Bai et al. 2018)."""

    def __init__(self, width: int = 16, levels: int = 3, kernel: int = 3) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(_Causal(8 if level == 0 else width, width, kernel, 2**level) for level in range(levels))
        )
        self.head = nn.Conv1d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x))
        return out


class _Causal(nn.Module):
    def __init__(self, i: int, o: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.overhang = (kernel - 1) * dilation
        self.one = nn.Conv1d(i, o, kernel, padding=self.overhang, dilation=dilation)
        self.two = nn.Conv1d(o, o, kernel, padding=self.overhang, dilation=dilation)
        self.drop = nn.Dropout(0.1)
        self.skip = nn.Identity() if i == o else nn.Conv1d(i, o, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.relu(self.one(x)[:, :, : -self.overhang]))
        y = self.drop(torch.relu(self.two(y)[:, :, : -self.overhang]))
        return torch.relu(y + self.skip(x))


def conv3d_bn(i: int, o: int, k: tuple[int, int, int], s: tuple[int, int, int] = (1, 1, 1)) -> nn.Sequential:
    """A padded 3d convolution without bias and its batch norm."""
    padding = (k[0] // 2, k[1] // 2, k[2] // 2)
    return nn.Sequential(nn.Conv3d(i, o, k, s, padding, bias=False), nn.BatchNorm3d(o))


class _Video(nn.Module):
    """A residual block over [N, C, T, H, W], its 3x3x3 convolutions whole or split into space and time."""

    def __init__(self, i: int, o: int, s: int, split: bool) -> None:
        super().__init__()

        def conv(a: int, b: int, stride: int) -> list[nn.Module]:
            if not split:
                return [*conv3d_bn(a, b, (3, 3, 3), (stride,) * 3)]
            space = conv3d_bn(a, b, (1, 3, 3), (1, stride, stride))
            return [*space, nn.ReLU(), *conv3d_bn(b, b, (3, 1, 1), (stride, 1, 1))]

        self.body = nn.Sequential(*conv(i, o, s), nn.ReLU(), *conv(o, o, 1))
        self.skip = nn.Identity() if i == o and s == 1 else conv3d_bn(i, o, (1, 1, 1), (s,) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class R3D(nn.Module):
    """Video classifier, a ResNet of 3x3x3 convolutions over [N, 3, T, H, W] (Tran et al. 2018)."""

    def __init__(self, width: int = 8, split: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv3d_bn(3, width, (3, 3, 3), (1, 2, 2)), nn.ReLU())
        self.blocks = nn.Sequential(
            _Video(width, width, 1, split), _Video(width, 2 * width, 2, split), _Video(2 * width, 2 * width, 1, split)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2 * width, 10))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.stem(x)))
        return out


class R2Plus1D(R3D):
    """:class:`R3D` with every convolution split into one over space and one over time."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width, split=True)


class UNet3D(nn.Module):
    """Segmentation of volumes [N, 1, D, H, W]: conv-norm-ReLU twice a level, max-pool down, transposed up (Cicek et al. 2016)."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()

        def twice(i: int, o: int) -> nn.Sequential:
            cube = (3, 3, 3)
            return nn.Sequential(*conv3d_bn(i, o, cube), nn.ReLU(), *conv3d_bn(o, o, cube), nn.ReLU())

        self.one, self.two, self.deep = twice(1, width), twice(width, 2 * width), twice(2 * width, 4 * width)
        self.up_two = nn.ConvTranspose3d(4 * width, 2 * width, 2, 2)
        self.up_one = nn.ConvTranspose3d(2 * width, width, 2, 2)
        self.back_two, self.back_one = twice(4 * width, 2 * width), twice(2 * width, width)
        self.last = nn.Conv3d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        two = self.two(F.max_pool3d(one, 2))
        deep = self.deep(F.max_pool3d(two, 2))
        two = self.back_two(torch.cat([two, self.up_two(deep)], 1))
        out: Tensor = self.last(self.back_one(torch.cat([one, self.up_one(two)], 1)))
        return out
