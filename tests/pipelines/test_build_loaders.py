"""The config names a source; what is built from it and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import build_loaders, build_source
from pipelines.folder_source import FolderSource
from pipelines.sampler import Sampler
from ressl.batch import DataError
from ressl.config import Config

CPU = torch.device("cpu")
SHAPES = [(12 + i, 30 - i) for i in range(9)]


@pytest.fixture
def folder(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for i, shape in enumerate(SHAPES):
        path = tmp_path / "images" / "abc"[i // 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def config(source: dict, **data) -> Config:
    return Config.model_validate(
        {
            "data": {"source": source, **data},
            "views": {"weak": {"size": 8}, "strong": [{"size": 8, "jitter_prob": 0.8}]},
            "encoder": {"name": "resnet_small"},
            "method": {"name": "ressl"},
            "optim": {"name": "sgd", "epochs": 10, "batch_size": 4, "accumulate": 2, "lr": 0.1},
            "evaluate": {"size": 8},
            "run": {"out_dir": "unused", "seed": 3},
        }
    )


def test_the_loaders_follow_the_config(folder):
    cfg = config({"name": "folder", "train": folder, "val": folder})
    loaders = build_loaders(cfg, device=CPU, dtype=torch.bfloat16, rank=1, world_size=2)
    batches = list(loaders.train.epoch(5))
    expected = Sampler(9, 4, seed=3, rank=1, world_size=2, accumulate=2).epoch(5)
    assert [batch.index.tolist() for batch in batches] == [positions.tolist() for positions in expected]
    assert loaders.train.steps_per_epoch == 2
    assert {batch.weak[0].dtype for batch in batches} == {torch.bfloat16}
    assert (loaders.probes.count("val"), loaders.probes.num_classes) == (9, 3)


def test_mean_and_std_of_the_config_reach_views_and_probes(folder):
    source = {"name": "folder", "train": folder}
    plain = build_loaders(config(source, mean=[0, 0, 0], std=[1, 1, 1]), device=CPU)
    other = build_loaders(config(source, mean=[0.1, 0.2, 0.3], std=[0.5, 0.25, 0.2]), device=CPU)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.1, 0.2, 0.3], [0.5, 0.25, 0.2]))
    for a, b in zip(plain.train.epoch(0), other.train.epoch(0), strict=True):
        assert torch.allclose((a.strong[0] - mean) / std, b.strong[0], atol=1e-5)
    for (a, _, _), (b, _, _) in zip(plain.probes.probe("train"), other.probes.probe("train"), strict=True):
        assert torch.allclose((a - mean) / std, b, atol=1e-5)


def test_replaced_images_are_reported(folder):
    (folder / "b" / "4.png").write_bytes(b"")
    messages: list[str] = []
    cfg = config({"name": "folder", "train": folder}, on_corrupt="replace")
    for _ in build_loaders(cfg, device=CPU, report=messages.append).probes.probe("train"):
        pass
    assert len(messages) == 1
    assert "4.png: empty file; replaced by" in messages[0]


def test_what_replaces_a_damaged_image_changes_from_epoch_to_epoch(folder):
    (folder / "b" / "4.png").write_bytes(b"")
    messages: list[str] = []
    loader = build_loaders(config({"name": "folder", "train": folder}), device=CPU, report=messages.append).train
    for epoch in range(12):
        assert len(list(loader.epoch(epoch))) == 4
    assert len(messages) > 6  # an epoch of eight images may leave out the damaged one of nine
    assert len({message.split("replaced by")[1] for message in messages}) > 2


def test_splits_of_different_classes_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "val")
    (tmp_path / "val" / "c").rename(tmp_path / "val" / "d")
    with pytest.raises(DataError, match=r"not in both: c, d"):
        build_loaders(config({"name": "folder", "train": folder, "val": tmp_path / "val"}), device=CPU)


def test_a_split_with_more_classes_is_refused(folder):
    extra = folder.parent / "extra"
    shutil.copytree(folder, extra)
    (extra / "d").mkdir()
    with pytest.raises(DataError, match=r"extra has 4 classes, .* 3; not in both: d"):
        build_loaders(config({"name": "folder", "train": folder, "val": extra}), device=CPU)


@pytest.mark.parametrize("name", ["folder", "resident", "ffcv"])
def test_data_that_is_not_there_is_named_when_the_source_is_built(name, tmp_path):
    if name == "ffcv":
        pytest.importorskip("ffcv")
    cfg = config({"name": name, "train": tmp_path / "gone"}).data
    with pytest.raises(DataError, match="gone"):
        build_source(cfg, "train", CPU)


def test_a_folder_can_be_shrunk_while_crops_are_drawn_from_the_original(folder):
    source = FolderSource(folder, workers=2, max_side=16, on_corrupt="fail", report=print)
    (frames,) = source.stream([np.arange(9)], salt=0)
    assert frames.size.amax(dim=1).tolist() == [16] * 9
    assert frames.original.tolist() == [list(shape) for shape in SHAPES]
