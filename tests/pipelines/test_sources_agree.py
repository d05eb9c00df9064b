"""The same photographs from every source, resized and encoded again on the way: the same views but for that."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipelines import build_source, build_stream
from pipelines.loader import ViewStream
from ressl.config import Config
from tools.convert import convert

COUNT, MAX_SIDE = 12, 96
SHAPES = [(120 + 7 * i, 190 - 5 * i) for i in range(COUNT)]  # wide and high ones, all larger than MAX_SIDE

SAME_BYTES = {  # the same JPEG bytes, read by Pillow, DALI, or FFCV's fast decoder: byte steps at most, and on average
    "dali": ({"name": "dali", "train": "jpg", "max_side": None}, 3, 0.5),
    "dali shards": ({"name": "dali", "train": "webdataset/train", "max_side": None}, 3, 0.5),
    "resident": ({"name": "resident", "train": "jpg", "max_side": None}, 0, 0.0),
    "resident yuv420": ({"name": "resident", "train": "jpg", "max_side": None, "pixels": "yuv420"}, 8, 0.8),
    "ffcv raw": ({"name": "ffcv", "train": "ffcv_raw/train.beton"}, 0, 0.0),
    "ffcv jpg": ({"name": "ffcv", "train": "ffcv_jpg/train.beton"}, 16, 2.2),
}
RESIZED = {  # to MAX_SIDE, against Pillow's resizing of the same bytes
    "dali": ({"name": "dali", "train": "jpg", "max_side": MAX_SIDE}, 5, 0.6),
    "dali shards": ({"name": "dali", "train": "webdataset/train", "max_side": MAX_SIDE}, 5, 0.6),
    "dali resized shards": ({"name": "dali", "train": "webdataset_small/train", "max_side": None}, 27, 3.0),
    "resident": ({"name": "resident", "train": "jpg", "max_side": MAX_SIDE}, 0, 0.0),
    "ffcv raw": ({"name": "ffcv", "train": "ffcv_raw_small/train.beton"}, 0, 0.0),
    "ffcv jpg": ({"name": "ffcv", "train": "ffcv_jpg_small/train.beton"}, 27, 3.3),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Pictures with edges, gradients and a little grain, as photographs have, as JPEG files of quality 95."""
    root = tmp_path_factory.mktemp("agree")
    for number, (height, width) in enumerate(SHAPES):
        rng = np.random.default_rng(number)
        patches = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        image = np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(
            0, 4, (height, width, 3)
        )
        path = root / "jpg" / "ab"[number % 2] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=95, subsampling=0)
    quiet = Console(file=io.StringIO())
    for to, mode in (("ffcv", "raw"), ("ffcv", "jpg"), ("webdataset", "auto")):
        name = f"{to}_{mode}" if to == "ffcv" else to
        convert(str(root / "jpg"), root / name, to, mode=mode, console=quiet)
        convert(str(root / "jpg"), root / f"{name}_small", to, mode=mode, max_side=MAX_SIDE, console=quiet)
    return root


def open_stream(data: Path, chosen: dict) -> ViewStream:
    pytest.importorskip({"ffcv": "ffcv", "dali": "nvidia.dali"}.get(chosen["name"], "torch"))
    strong = {"size": 32, "jitter_prob": 0.8, "grayscale_prob": 0.2, "blur_prob": 0.5, "solarize_prob": 0.2}
    cfg = Config.model_validate(
        {
            "data": {"source": chosen | {"train": data / chosen["train"]}, "mean": [0, 0, 0], "std": [1, 1, 1]},
            "views": {"weak": {"size": 40}, "strong": [strong, {"size": 24, "crop_scale": [0.05, 0.2]}]},
            "encoder": {"name": "resnet_small"},
            "method": {"name": "ressl"},
            "optim": {"name": "sgd", "epochs": 9, "batch_size": COUNT, "lr": 0.1},
            "evaluate": {"size": 32},
            "run": {"out_dir": data / "run", "seed": 5},
        }
    )
    cpu = torch.device("cpu")
    source = build_source(cfg.data, "train", cpu)
    assert source is not None
    return build_stream(cfg, source, device=cpu)


def pillow(data: Path, max_side: int | None) -> ViewStream:
    return open_stream(data, {"name": "folder", "train": "jpg", "max_side": max_side})


@pytest.mark.parametrize("name", SAME_BYTES)
@pytest.mark.parametrize("epoch", [0, 7])
def test_whole_images_get_the_same_views_from_every_source_but_for_decoding(data, name, epoch):
    chosen, most, average = SAME_BYTES[name]
    assert_same_views(pillow(data, None), open_stream(data, chosen), epoch, most, average)


@pytest.mark.parametrize("name", RESIZED)
@pytest.mark.parametrize("epoch", [0, 7])
def test_resized_images_get_the_same_views_from_every_source_but_for_resizing(data, name, epoch):
    chosen, most, average = RESIZED[name]
    assert_same_views(pillow(data, MAX_SIDE), open_stream(data, chosen), epoch, most, average)


def test_a_resized_copy_gets_the_crops_of_the_whole_image(data):
    """Boxes are fractions: what a view shows is the same, less sharp."""
    whole, small = pillow(data, None), pillow(data, MAX_SIDE)
    for a, b in zip(whole.frames(3), small.frames(3), strict=True):
        assert torch.equal(a.original, b.original) and not torch.equal(a.size, b.size)
        assert_same_numbers(whole, a, small, b, 3)
        for x, y in zip(views(whole.cut(a, 3)), views(small.cut(b, 3)), strict=True):
            assert (x - y).abs().mean() * 255 < 6


def assert_same_views(ours: ViewStream, theirs: ViewStream, epoch: int, most: float, average: float):
    for a, b in zip(ours.frames(epoch), theirs.frames(epoch), strict=True):
        assert torch.equal(a.size, b.size)
        assert_same_numbers(ours, a, theirs, b, epoch)
        plain = [cfg.jitter_prob == 0 for cfg in ours.configs(epoch)]
        for x, y, exact in zip(views(ours.cut(a, epoch)), views(theirs.cut(b, epoch)), plain, strict=True):
            difference = (x - y).abs() * 255  # byte steps
            assert difference.mean() <= average
            if exact:  # jitter multiplies differences, and the edge of solarize turns a small one into a large one
                assert difference.max() <= most


def assert_same_numbers(ours, a, theirs, b, epoch):
    assert torch.equal(a.index, b.index) and torch.equal(a.label, b.label)
    for x, y in zip(ours.params(a, epoch), theirs.params(b, epoch), strict=True):
        assert all(torch.equal(getattr(x, field), getattr(y, field)) for field in x.__slots__)


def views(batch) -> list[torch.Tensor]:
    return [*batch.weak, *batch.strong]
