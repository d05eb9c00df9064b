"""No source may take more memory from one epoch to the next, whole epochs, left ones and evaluations mixed."""

import gc
import io
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipelines import build_loaders
from ressl.config import Config
from ressl.config_file import load_config
from tools.convert import convert

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT, SIDE, BATCH = 16, 160, 8
BATCH_BYTES = 3 * BATCH * SIDE * SIDE  # 0.6 MB of decoded pixels
WARM, EPOCHS = 15, 20  # allocators take some epochs until every thread has what it needs

SOURCES = {
    "folder": {"name": "folder", "train": "jpg/train", "val": "jpg/val"},
    "folder resized": {"name": "folder", "train": "jpg/train", "val": "jpg/val", "max_side": 100},
    "ffcv": {"name": "ffcv", "train": "ffcv/train.beton", "val": "ffcv/val.beton"},
    "ffcv paged": {"name": "ffcv", "train": "ffcv/train.beton", "val": "ffcv/val.beton", "cache": "process"},
    "dali": {"name": "dali", "train": "jpg/train", "val": "jpg/val"},
    "dali shards resized": {
        "name": "dali",
        "train": "webdataset/train",
        "val": "webdataset/val",
        "max_side": 100,
    },  # fmt: skip
    "resident": {"name": "resident", "train": "ffcv/train.beton", "val": "ffcv/val.beton"},
    "resident on the host, yuv420": {
        "name": "resident",
        "train": "jpg/train",
        "val": "jpg/val",
        "memory": "host",
        "pixels": "yuv420",
    },  # fmt: skip
    "synthetic": {"name": "synthetic", "images": COUNT, "height": SIDE, "width": SIDE, "classes": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("memory")
    for split in ("train", "val"):
        for number in range(COUNT):
            path = root / "jpg" / split / "ab"[number % 2] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((SIDE, SIDE - number)).save(path)
    for to in ("ffcv", "webdataset"):
        mode = {"mode": "jpg"} if to == "ffcv" else {}
        convert(str(root / "jpg"), root / to, to, console=Console(file=io.StringIO()), **mode)
    return root


def config(data: Path, chosen: dict) -> Config:
    places = {key: data / chosen[key] for key in ("train", "val") if key in chosen}
    return Config.model_validate(
        {
            "data": {"source": chosen | places | ({} if chosen["name"] == "synthetic" else {"workers": 2})},
            "views": {"weak": {"size": 24}, "strong": [{"size": 24}]},
            "encoder": {"name": "resnet_small"},
            "method": {"name": "ressl"},
            "optim": {"name": "sgd", "epochs": 100, "batch_size": BATCH, "lr": 0.1},
            "evaluate": {"size": 24, "batch_size": BATCH},
            "run": {"out_dir": data / "run", "device": "cpu"},
        }
    )


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", SOURCES)
def test_memory_threads_and_files_stay_as_they_are_over_twenty_epochs(data, name):
    chosen = SOURCES[name]
    pytest.importorskip({"ffcv": "ffcv", "dali": "nvidia.dali"}.get(chosen["name"], "torch"))
    loaders = build_loaders(config(data, chosen), device=torch.device("cpu"))

    def epoch(number: int) -> None:
        for _ in loaders.train.epoch(number):
            pass
        left = loaders.train.epoch(number + 1000)
        next(left)
        left.close()
        for _ in loaders.probes.probe("train" if chosen["name"] == "synthetic" else "val"):
            pass

    for number in range(WARM):
        epoch(number)
    gc.collect()  # what earlier tests have left
    before = threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
    grown = []
    # one batch kept of each epoch would be 12 MB, every time; allocators wander by a few, and now and then by more
    while not grown or (grown[-1] >= EPOCHS * BATCH_BYTES * 0.9 and len(grown) < 3):
        memory = resident_bytes()
        for number in range(WARM, WARM + EPOCHS):
            epoch(number)
        grown.append(resident_bytes() - memory)
    assert threading.active_count() <= before[0] and len(list(Path("/proc/self/fd").iterdir())) <= before[1]
    assert grown[-1] < EPOCHS * BATCH_BYTES * 0.9, ", ".join(f"{value / 1e6:.1f} MB" for value in grown)


def test_nothing_grows_over_two_hundred_short_epochs(tiny_config, one_thread):
    """With an epoch that is left and an evaluation between any two."""
    loaders = build_loaders(load_config(tiny_config), device=torch.device("cpu"))

    def state() -> tuple[int, int, int]:
        return resident_bytes(), threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    found = []
    for number in range(205):
        for _ in loaders.train.epoch(number):
            pass
        left = loaders.train.epoch(number + 1000)
        next(left)
        left.close()
        for _ in loaders.probes.probe("val"):
            pass
        if number in (5, 204):
            found.append(state())
    (before, *rest), (after, *others) = found
    assert all(a <= b for a, b in zip(others, rest, strict=True)) and after < 1.05 * before
