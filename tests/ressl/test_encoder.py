import pytest
import torch

from ressl.config import ResNet, SmallResNet
from ressl.encoder import build_backbone, build_encoder


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_small_data_encoder_has_the_published_size() -> None:
    encoder = build_encoder(ResNet(name="resnet18", stem="small"), hidden_dim=2048, embed_dim=128)
    assert parameters(encoder.backbone) == 11_168_832
    assert parameters(encoder.projector) == 1_312_896


@pytest.mark.parametrize(
    ("stem", "pixels", "side"), [("imagenet", 224, 7), ("medium", 64, 4), ("small", 32, 4)], ids=lambda x: str(x)
)
def test_each_stem_leaves_the_last_map_its_size(stem: str, pixels: int, side: int) -> None:
    backbone, width = build_backbone(ResNet(name="resnet18", stem=stem))
    maps = []
    backbone.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output.shape))
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, pixels, pixels)).shape == (1, width) == (1, 512)
    assert maps == [(1, 512, side, side)]


def test_resnet50_gives_2048_features() -> None:
    with torch.device("meta"):
        backbone, width = build_backbone(ResNet(name="resnet50"))
        assert backbone(torch.empty(2, 3, 224, 224)).shape == (2, width) == (2, 2048)


def test_the_small_resnet_takes_any_image_size() -> None:
    backbone, width = build_backbone(SmallResNet(name="resnet_small", width=4, blocks=2))
    assert width == 16
    for pixels in (16, 28, 33):
        assert backbone(torch.zeros(2, 3, pixels, pixels)).shape == (2, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embeddings_are_unit_rows_in_float32_at_least(dtype: torch.dtype) -> None:
    encoder = build_encoder(SmallResNet(name="resnet_small", width=4), hidden_dim=8, embed_dim=6).to(dtype)
    embeddings = encoder(torch.randn(5, 3, 16, 16, dtype=dtype))
    assert embeddings.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(5, dtype=embeddings.dtype))


def test_weights_lie_in_channels_last_order() -> None:
    encoder = build_encoder(ResNet(name="resnet18"), hidden_dim=8, embed_dim=6)
    assert encoder.backbone.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
