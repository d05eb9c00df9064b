import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from pipelines import build_source
from pipelines.beton import open_beton
from ressl.config import DaliSource, DataConfig, FfcvSource, FolderSource, ResidentSource, Source
from tools.convert import convert
from tools.profiling.stored import reads_files, stored_bytes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def formats(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny images as .beton files and in shards."""
    root = tmp_path_factory.mktemp("formats")
    for form in ("ffcv", "webdataset"):
        convert(str(tiny_data / "folder"), root / form, form, console=Console(quiet=True), workers=1)
    return root


def count(source: Source, positions: np.ndarray) -> int:
    built = build_source(DataConfig(source=source), "train", CPU)
    assert built is not None and reads_files(built)
    with stored_bytes(built) as (read, _):
        return read(positions)


def test_of_a_folder_it_reads_the_files(tiny_data: Path) -> None:
    folder = tiny_data / "folder" / "train"
    sizes = [path.stat().st_size for path in sorted(folder.rglob("*.png"))]
    source = FolderSource(name="folder", train=folder, workers=2)
    assert count(source, np.arange(72)) == sum(sizes) and count(source, np.array([3, 70])) == sizes[3] + sizes[70]


def test_of_a_beton_file_it_reads_the_images(formats: Path) -> None:
    pytest.importorskip("ffcv")
    path = formats / "ffcv" / "train.beton"
    sizes = open_beton(path).data_size
    source = FfcvSource(name="ffcv", train=path, workers=2)
    assert count(source, np.arange(72)) == sizes.sum() and count(source, np.array([5, 6])) == sizes[5] + sizes[6]


@pytest.mark.parametrize("place", ["folder", "shards"])
def test_for_dali_it_reads_files_or_parts_of_shards(place: str, tiny_data: Path, formats: Path) -> None:
    pytest.importorskip("nvidia.dali")
    folder = tiny_data / "folder" / "train"
    train = folder if place == "folder" else formats / "webdataset" / "train"
    sizes = [path.stat().st_size for path in folder.rglob("*.png")]
    assert count(DaliSource(name="dali", train=train, workers=1), np.arange(72)) == sum(sizes)


def test_calls_that_read_nothing_are_as_many(tiny_data: Path) -> None:
    source = FolderSource(name="folder", train=tiny_data / "folder" / "train", workers=2)
    built = build_source(DataConfig(source=source), "train", CPU)
    assert built is not None and reads_files(built)
    with stored_bytes(built) as (_, call):
        assert call(np.arange(72)) == 0


def test_what_is_in_memory_is_not_read(tiny_data: Path) -> None:
    source = ResidentSource(name="resident", train=tiny_data / "train.safetensors")
    assert not reads_files(build_source(DataConfig(source=source), "train", CPU))


def test_a_file_that_is_gone_counts_as_nothing(tiny_data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_data / "folder" / "train", tmp_path / "train"))
    built = build_source(DataConfig(source=FolderSource(name="folder", train=folder, workers=1)), "train", CPU)
    next(folder.rglob("*.png")).unlink()
    assert built is not None and reads_files(built)
    with stored_bytes(built) as (read, _):
        assert read(np.arange(72)) == sum(path.stat().st_size for path in folder.rglob("*.png"))
