"""The encoder: a residual network without its classifier, a projector, and embeddings of unit length."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ressl.config import Encoder as EncoderConfig
from ressl.config import ResNet, SmallResNet


class Encoder(nn.Module):
    """Images -> features (backbone) -> embeddings (projector). Evaluations use the backbone, the loss the embeddings.

    NOTE: the projector has no batch norm, unlike most methods': Linear, ReLU, Linear with biases (authors' code).
    """

    def __init__(self, backbone: nn.Module, *, feature_dim: int, hidden_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = nn.Sequential(
            nn.Linear(feature_dim, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, embed_dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, D), rows of unit length, float32 at least."""
        return unit_rows(self.projector(self.backbone(images)))


def unit_rows(embeddings: Tensor) -> Tensor:
    """(B, D) of any type -> (B, D) of unit length, float32 at least."""
    return F.normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=1)


def build_encoder(cfg: EncoderConfig, *, hidden_dim: int, embed_dim: int) -> Encoder:
    backbone, feature_dim = build_backbone(cfg)
    encoder = Encoder(backbone, feature_dim=feature_dim, hidden_dim=hidden_dim, embed_dim=embed_dim)
    return encoder.to(memory_format=torch.channels_last)


def build_backbone(cfg: EncoderConfig) -> tuple[nn.Module, int]:
    """A network (B, 3, h, w) -> (B, F), and F."""
    match cfg:
        case ResNet():
            import torchvision  # takes seconds, as it brings torch's compiler with it: most verbs do without

            resnet = torchvision.models.get_model(cfg.name, weights=None)
            feature_dim = resnet.fc.in_features
            resnet.fc = nn.Identity()
            if cfg.stem != "imagenet":
                resnet.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
                nn.init.kaiming_normal_(resnet.conv1.weight, mode="fan_out", nonlinearity="relu")
            if cfg.stem == "small":
                resnet.maxpool = nn.Identity()
            return resnet, feature_dim
        case SmallResNet():
            return _small_resnet(cfg.width, cfg.blocks), 4 * cfg.width


def _small_resnet(width: int, blocks: int) -> nn.Module:
    """Three stages, as He et al. 2015 (https://arxiv.org/abs/1512.03385), section 4.2, use for CIFAR-10."""
    stem = nn.Sequential(
        nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )
    stages: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    channels = width
    for stage, out in enumerate((width, 2 * width, 4 * width)):
        stages[f"stage{stage + 1}"] = nn.Sequential(
            _block(channels, out, stride=1 if stage == 0 else 2),
            *(_block(out, out, stride=1) for _ in range(blocks - 1)),
        )
        channels = out
    model = nn.Sequential(OrderedDict(**stages, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten()))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _block(channels: int, out: int, *, stride: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock

    downsample = None
    if stride != 1 or channels != out:
        downsample = nn.Sequential(
            nn.Conv2d(channels, out, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out)
        )
    return BasicBlock(channels, out, stride, downsample)
