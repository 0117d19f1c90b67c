"""The networks that the end-to-end tests and the benchmarks compress.

``NETWORKS[name](size=64, seed=0)`` builds one with seeded random weights; :func:`calibrate` gives
its batch norms the statistics of random images. Without them the output of a deep network hardly
depends on its input, and even a mirrored kernel goes unnoticed; :func:`dependence` measures that.
These classifiers are the published ones, with 1000 classes.

``ZOO[name]`` is the wider collection, of many families, each small: ``build()`` gives the network with
its statistics set, ``example()`` an input. ``SMALLEST`` names those that the tests compress.

``pytorchcv`` is a development dependency (``pip install --no-deps pytorchcv``); networks of ``transformers`` and
``diffusers`` come with the extra ``zoo``, and only building one of them imports its package.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import own_networks as own
import torch
from own_networks import DnCNN
from pytorchcv.models.mobilenetv2 import mobilenetv2b_w1
from pytorchcv.models.preresnet import preresnet18
from pytorchcv.models.resnet import resnet18, resnet34, resnet50
from pytorchcv.models.vgg import bn_vgg16b
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "NETWORKS",
    "SMALLEST",
    "ZOO",
    "DnCNN",
    "Entry",
    "Factory",
    "calibrate",
    "dependence",
    "he_weights",
    "image_shape",
    "seed_images",
    "settle",
]

STRIDE = 32
"""Every classifier divides height and width by this before its global pooling or first linear."""


class Factory(Protocol):
    """Builds a network, in eval mode, with the random weights of ``seed``.

    ``size`` is the height and width in pixels of its images, a multiple of 32.
    """

    def __call__(self, size: int = 224, seed: int = 0) -> nn.Module: ...


def _dncnn(size: int) -> nn.Module:  # noqa: ARG001 - fully convolutional: any size fits
    return DnCNN()


def _vgg16_bn(size: int) -> nn.Module:
    model: nn.Module = bn_vgg16b(in_size=(size, size))
    first = model.get_submodule("output.fc1")
    first.fc = nn.Linear(512 * (size // STRIDE) ** 2, 4096)
    return model


def _pooled(build: Callable[..., nn.Module]) -> Callable[[int], nn.Module]:
    """The network of ``build`` with its last pooling, 7x7 as published, fitted to the size."""

    def fitted(size: int) -> nn.Module:
        model = build(in_size=(size, size))
        features = model.get_submodule("features")
        features.final_pool = nn.AvgPool2d(size // STRIDE, stride=1)
        return model

    return fitted


def _seeded(build: Callable[[int], nn.Module]) -> Factory:
    def factory(size: int = 224, seed: int = 0) -> nn.Module:
        if size < STRIDE or size % STRIDE:
            raise ValueError(f"size is {size}, must be a positive multiple of {STRIDE}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(size).eval()

    return factory


NETWORKS: dict[str, Factory] = {
    "vgg16_bn": _seeded(_vgg16_bn),
    "resnet18": _seeded(_pooled(resnet18)),
    "resnet34": _seeded(_pooled(resnet34)),
    "resnet50": _seeded(_pooled(resnet50)),
    "mobilenet_v2": _seeded(_pooled(mobilenetv2b_w1)),
    "preact_resnet": _seeded(_pooled(preresnet18)),
    "dncnn": _seeded(_dncnn),
}


def image_shape(name: str, batch: int, size: int = 224) -> tuple[int, int, int, int]:
    """The input shape [N, C, H, W] of the network called ``name``."""
    return batch, 1 if name == "dncnn" else 3, size, size


def seed_images(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random images of ``shape`` [N, C, H, W]: independent standard normal pixels."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def calibrate(model: nn.Module, shape: tuple[int, ...], passes: int = 12, seed: int = 0) -> nn.Module:
    """Set the batch-norm statistics of ``model``, in place, to those of random images.

    They become the average over ``passes`` train-mode passes, each over fresh images of ``shape``
    [N, C, H, W]. Returns the model in eval mode; momenta and global random state stay as they were.
    """
    settle(model, (seed_images(shape, seed + index) for index in range(passes)), seed)
    return model


@torch.no_grad()
def settle(model: nn.Module, examples: Iterable[Any], seed: int = 0) -> None:
    """Train-mode passes over the examples, their batch statistics averaged; then eval mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average, instead of an exponential one
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for example in examples:
            if isinstance(example, dict):
                model(**example)
            else:
                model(*example if isinstance(example, tuple) else (example,))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def dependence(model: nn.Module, shape: tuple[int, ...], seed: int = 1000) -> float:
    """The share of the output that depends on the input: max |y - mean y| / max |y|.

    The mean is over a batch of random images of ``shape`` [N, C, H, W], N at least two.
    """
    output: Tensor = model(seed_images(shape, seed))
    return float((output - output.mean(0)).abs().max() / output.abs().max())


# --- the zoo ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """A network of the zoo.

    Attributes:
        family: the published design that it is a member of.
        kind: its task, such as ``classification``.
        make: builds it with the weights of torch's current seed.
        inputs: what it takes: a function of a batch size and a generator.
        he: whether its convolutions and linear layers get :func:`he_weights`, because their own let the signal fade.
    """

    family: str
    kind: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    he: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The network in eval mode: random weights, batch-norm statistics of random inputs. Global random state stays."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.make()
            if self.he:
                he_weights(model)
        with torch.no_grad():
            settle(model, (self.example(4, seed + index) for index in range(4)), seed)
        return model

    def example(self, batch: int = 2, seed: int = 1) -> Any:
        """What the network takes: a tensor, a tuple (positional) or a dict (keyword)."""
        return self.inputs(batch, torch.Generator().manual_seed(seed))


def he_weights(model: nn.Module) -> None:
    """Draw every convolution and linear layer anew, in place, so that it keeps the size of a signal (He et al. 2015)."""
    for module in model.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)


def _random(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    return lambda batch, generator: torch.randn((batch, *shape), generator=generator)


def _timed(*shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Images and the step of the diffusion that each is at."""
    return lambda batch, generator: (
        torch.randn((batch, *shape), generator=generator),
        torch.randint(0, 1000, (batch,), generator=generator),
    )


def _pair(*shape: int) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    return lambda batch, generator: (
        torch.randn((batch, *shape), generator=generator),
        torch.randn((batch, *shape), generator=generator),
    )


def _pixels(*shape: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    return lambda batch, generator: {"pixel_values": torch.randn((batch, *shape), generator=generator)}


def _own(family: str, kind: str, make: Callable[[], nn.Module], *shape: int) -> Entry:
    return Entry(family, kind, make, _random(*shape), he=True)


def _cv(
    family: str, path: str, size: int = 64, kind: str = "classification", *, pool: str = "final_pool", **options: Any
) -> Entry:
    """A network of pytorchcv, ``file.name``, on square images; the average pooling called ``pool`` is made to fit."""

    def make() -> nn.Module:
        file, name = path.split(".")
        build = getattr(importlib.import_module(f"pytorchcv.models.{file}"), name)
        model: nn.Module = build(**{"in_size": (size, size), **options})
        for holder in [*model.modules()]:
            if isinstance(getattr(holder, pool, None), nn.AvgPool2d):
                setattr(holder, pool, nn.AdaptiveAvgPool2d(1))
        return model

    return Entry(family, kind, make, _random(3, size, size))


def _vgg11() -> nn.Module:
    models = importlib.import_module("pytorchcv.models.vgg")
    model: nn.Module = models.bn_vgg11b(num_classes=10)
    model.get_submodule("output.fc1").fc = nn.Linear(512, 64)
    model.get_submodule("output.fc2").fc = nn.Linear(64, 64)
    model.get_submodule("output").fc3 = nn.Linear(64, 10)
    return model


def _hf(family: str, model: str, kind: str = "classification", size: int = 64, **config: Any) -> Entry:
    """A network of transformers, called by keyword: ``PoolFormerForImageClassification`` of a ``PoolFormerConfig``."""

    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        made: nn.Module = getattr(library, model)(
            getattr(library, re.split("For(?=[A-Z])", model)[0] + "Config")(**config)
        )
        return made

    return Entry(family, kind, make, _pixels(3, size, size), he=True)


def _diffusers(model: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made: nn.Module = getattr(importlib.import_module("diffusers"), model)(**config)
        return made

    return make


_SEGMENTATION, _DETECTION, _RESTORATION = "segmentation", "detection backbone", "super-resolution"

ZOO: dict[str, Entry] = {
    # classification
    "nin": _cv("NIN", "nin_cifar.nin_cifar10", 32),
    "vgg11_bn": Entry("VGG", "classification", _vgg11, _random(3, 32, 32)),
    "resnet20": _cv("ResNet", "resnet_cifar.resnet20_cifar10", 32),
    "resnet18_wd4": _cv("ResNet", "resnet.resnet18_wd4"),
    "resnetbc14b": _cv("ResNet", "resnet.resnetbc14b"),
    "preresnet20": _cv("PreResNet", "preresnet_cifar.preresnet20_cifar10", 32),
    "wrn10_2": _cv("WRN", "wrn_cifar.get_wrn_cifar", 32, num_classes=10, blocks=10, width_factor=2),
    "resnext14": _cv("ResNeXt", "resnext.resnext14_32x2d"),
    "seresnet20": _cv("SE-ResNet", "seresnet_cifar.seresnet20_cifar10", 32),
    "resnesta14": _cv("ResNeSt", "resnesta.resnestabc14"),
    "resneta10": _cv("ResNet-A", "resneta.resneta10"),
    "ibnresnet50": _cv("IBN-Net", "ibnresnet.ibn_resnet50"),
    "bamresnet18": _cv("BAM-ResNet", "bamresnet.bam_resnet18"),
    "cbamresnet18": _cv("CBAM-ResNet", "cbamresnet.cbam_resnet18"),
    "diaresnet20": _cv("DIA-ResNet", "diaresnet_cifar.diaresnet20_cifar10", 32),
    "pyramidnet20": _cv(
        "PyramidNet", "pyramidnet_cifar.get_pyramidnet_cifar", 32, num_classes=10, blocks=20, alpha=24, bottleneck=False
    ),
    "sknet50": _cv("SKNet", "sknet.sknet50"),
    "octresnet10": _cv("OctResNet", "octresnet.octresnet10_ad2"),
    "diracnet18": _cv("DiracNet", "diracnetv2.diracnet18v2"),
    "regnetx002": _cv("RegNet", "regnet.regnetx002"),
    "regnety002": _cv("RegNet", "regnet.regnety002"),
    "densenet40": _cv("DenseNet", "densenet_cifar.densenet40_k12_bc_cifar10", 32),
    "densenet": _own("DenseNet", "classification", own.DenseNet, 3, 24, 24),
    "condensenet74": _cv("CondenseNet", "condensenet.condensenet74_c8_g8"),
    "peleenet": _cv("PeleeNet", "peleenet.peleenet"),
    "vovnet27s": _cv("VoVNet", "vovnet.vovnet27s"),
    "hardnet39ds": _cv("HarDNet", "hardnet.hardnet39ds"),
    "dpn68": _cv("DPN", "dpn.dpn68", for_training=True),
    "dla46c": _cv("DLA", "dla.dla46c"),
    "fishnet99": _cv("FishNet", "fishnet.fishnet99"),
    "selecsls42b": _cv("SelecSLS", "selecsls.selecsls42b"),
    "hrnet_w18_small": _cv("HRNet", "hrnet.hrnet_w18_small_v1"),
    "darknet_tiny": _cv("DarkNet", "darknet.darknet_tiny"),
    "drnd22": _cv("DRN", "drn.drnd22", 32),
    "bagnet9": _cv("BagNet", "bagnet.bagnet9", 32),
    "bninception": _cv("Inception", "bninception.bninception"),
    "inceptionv3": _cv("Inception", "inceptionv3.inceptionv3", 96),
    "xception": _cv("Xception", "xception.xception", pool="pool"),
    "squeezenet": _cv("SqueezeNet", "squeezenet.squeezenet_v1_1"),
    "squeezenext23": _cv("SqueezeNext", "squeezenext.sqnxt23_w1"),
    "shufflenet_g3": _cv("ShuffleNet", "shufflenet.shufflenet_g3_wd4"),
    "shufflenet": _cv(
        "ShuffleNet",
        "shufflenet.ShuffleNet",
        32,
        channels=[[48, 48], [96, 96]],
        init_block_channels=24,
        groups=3,
        num_classes=10,
    ),
    "shufflenetv2": _cv("ShuffleNetV2", "shufflenetv2.shufflenetv2_wd2"),
    "menet108": _cv("MENet", "menet.menet108_8x1_g3"),
    "mobilenet_wd4": _cv("MobileNet", "mobilenet.mobilenet_wd4"),
    "mobilenetv2_wd4": _cv("MobileNetV2", "mobilenetv2.mobilenetv2b_wd4"),
    "mobilenetv3_small": _cv("MobileNetV3", "mobilenetv3.mobilenetv3_small_w7d20"),
    "igcv3_wd4": _cv("IGCV3", "igcv3.igcv3_wd4"),
    "ghostnet": _cv("GhostNet", "ghostnet.ghostnet"),
    "mnasnet_b1": _cv("MnasNet", "mnasnet.mnasnet_b1"),
    "proxylessnas": _cv("ProxylessNAS", "proxylessnas.proxylessnas_cpu"),
    "fbnet_cb": _cv("FBNet", "fbnet.fbnet_cb"),
    "efficientnet_b0": _cv("EfficientNet", "efficientnet.efficientnet_b0b", in_size=(224, 224)),
    "mixnet_s": _cv("MixNet", "mixnet.mixnet_s"),
    "espnetv2": _cv("ESPNet", "espnetv2.espnetv2_wd2"),
    "repvgg": _own("RepVGG", "classification", own.RepVGG, 3, 32, 32),
    "convmixer": _own("ConvMixer", "classification", own.ConvMixer, 3, 32, 32),
    "embedded": _own("conditioned ResNet", "classification", own.Embedded, 3, 24, 24),
    "siamese": Entry("Siamese", "comparison", own.Siamese, _pair(3, 32, 32), he=True),
    "hf_resnet": _hf(
        "ResNet",
        "ResNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[16, 32, 48],
        depths=[2, 2, 2],
        layer_type="basic",
    ),
    "hf_convnextv2": _hf(
        "ConvNeXt V2", "ConvNextV2ForImageClassification", hidden_sizes=[16, 32, 48], depths=[2, 2, 2], num_stages=3
    ),
    "hf_mobilenet_v2": _hf("MobileNetV2", "MobileNetV2ForImageClassification", depth_multiplier=0.25),
    "hf_mobilevit": _hf(
        "MobileViT",
        "MobileViTForImageClassification",
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64],
        image_size=64,
    ),
    "hf_poolformer": _hf(
        "PoolFormer",
        "PoolFormerForImageClassification",
        hidden_sizes=[16, 32, 48],
        depths=[2, 2, 2],
        num_encoder_blocks=3,
        patch_sizes=[7, 3, 3],
        strides=[4, 2, 2],
        padding=[2, 1, 1],
        layer_scale_init_value=0.5,
    ),
    "hf_hgnetv2": _hf(
        "HGNetV2",
        "HGNetV2ForImageClassification",
        embedding_size=16,
        hidden_sizes=[32, 64, 96, 128],
        stem_channels=[3, 8, 16],
        stage_in_channels=[16, 32, 64, 96],
        stage_mid_channels=[8, 16, 24, 32],
        stage_out_channels=[32, 64, 96, 128],
        stage_num_blocks=[1, 1, 2, 1],
        stage_numb_of_layers=[2, 2, 2, 2],
    ),
    "hf_textnet": _hf("TextNet", "TextNetForImageClassification"),
    # segmentation and dense prediction
    "unet": _cv("U-Net", "unet.unet_cityscapes", 32, _SEGMENTATION),
    "segnet": _cv("SegNet", "segnet.segnet_cityscapes", 32, _SEGMENTATION),
    "linknet": _cv("LinkNet", "linknet.linknet_cityscapes", 64, _SEGMENTATION),
    "enet": _cv("ENet", "enet.enet_cityscapes", 64, _SEGMENTATION),
    "erfnet": _cv("ERFNet", "erfnet.erfnet_cityscapes", 64, _SEGMENTATION),
    "edanet": _cv("EDANet", "edanet.edanet_cityscapes", 64, _SEGMENTATION),
    "dabnet": _cv("DABNet", "dabnet.dabnet_cityscapes", 64, _SEGMENTATION),
    "fastscnn": _cv("Fast-SCNN", "fastscnn.fastscnn_cityscapes", 128, _SEGMENTATION),
    "bisenet": _cv("BiSeNet", "bisenet.bisenet_resnet18_celebamaskhq", 64, _SEGMENTATION),
    "deeplab": _own("DeepLab", _SEGMENTATION, own.DeepLab, 3, 32, 32),
    "fusion": _own("HRNet", _SEGMENTATION, own.Fusion, 3, 32, 32),
    "hf_upernet": _hf(
        "UPerNet",
        "UperNetForSemanticSegmentation",
        _SEGMENTATION,
        hidden_size=32,
        use_auxiliary_head=False,
        num_labels=5,
        backbone_config={
            "model_type": "convnext",
            "hidden_sizes": [16, 32, 48, 64],
            "depths": [1, 1, 1, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
            "layer_scale_init_value": 0.5,
        },
    ),
    "hf_segformer": _hf(
        "SegFormer",
        "SegformerForSemanticSegmentation",
        _SEGMENTATION,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_encoder_blocks=2,
        sr_ratios=[4, 2],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=5,
    ),
    # detection and pose
    "pyramid": _own("RetinaNet", _DETECTION, own.FeaturePyramid, 3, 32, 32),
    "yolo": _own("YOLO", _DETECTION, own.YoloNeck, 3, 64, 64),
    "lffd20": _cv("LFFD", "lffd.lffd20x5s320v2_widerface", 160, _DETECTION),
    "hourglass": _own("Hourglass", "pose", own.Hourglass, 3, 64, 64),
    "lwopenpose": _cv("OpenPose", "lwopenpose_cmupan.lwopenpose2d_mobilenet_cmupan_coco", 64, "pose"),
    # image to image
    "dncnn": _own("DnCNN", "denoising", lambda: DnCNN(depth=9, width=16), 1, 24, 24),
    "edsr": _own("EDSR", _RESTORATION, own.EDSR, 3, 16, 16),
    "fsrcnn": _own("FSRCNN", _RESTORATION, own.FSRCNN, 1, 16, 16),
    "style": _own("style transfer", "image to image", own.StyleTransfer, 3, 32, 32),
    "time_unet": Entry("DDPM U-Net", "diffusion", own.TimeUNet, _timed(3, 16, 16), he=True),
    "diffusers_unet2d": Entry(
        "DDPM U-Net",
        "diffusion",
        _diffusers(
            "UNet2DModel",
            sample_size=16,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=None,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        ),
        _timed(3, 16, 16),
        he=True,
    ),
    "diffusers_vae": Entry(
        "latent-diffusion autoencoder",
        "image to image",
        _diffusers(
            "AutoencoderKL",
            block_out_channels=(16, 32),
            norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        ),
        _random(3, 32, 32),
        he=True,
    ),
    # audio, sequences, video, volumes
    "m5": _own("M5", "1d audio", own.M5, 1, 2048),
    "wavenet": _own("WaveNet", "1d audio", own.WaveNet, 1, 256),
    "tcn": _own("TCN", "1d audio", own.TCN, 8, 128),
    "r3d": _own("R3D", "3d video", own.R3D, 3, 8, 32, 32),
    "r2plus1d": _own("R(2+1)D", "3d video", own.R2Plus1D, 3, 8, 32, 32),
    "unet3d": _own("3D U-Net", "3d volumes", own.UNet3D, 1, 16, 16, 16),
}
"""Every network of the zoo by its name.

Tried and left out: RevNet (its own autograd function, which ``torch.export`` does not trace) and BiT (its convolutions
compute their weights at every call, so there is no convolution of ``torch.nn`` in it).
"""

SMALLEST = (
    "resnet20",
    "densenet",
    "shufflenet",
    "repvgg",
    "embedded",
    "fusion",
    "pyramid",
    "edsr",
    "dncnn",
    "time_unet",
    "wavenet",
    "r2plus1d",
)
"""The networks of the zoo that the tests compress: a dozen small ones, of pytorchcv or defined here."""
