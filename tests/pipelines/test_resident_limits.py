"""What a resident set asks of the system, and what it says when it does not get it or was given the wrong file."""

import gc
import io
import re
import resource
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from pipelines.folder_source import FolderSource
from pipelines.frames import Frames, pack
from pipelines.resident_source import ResidentSource
from ressl.batch import DataError
from ressl.config import ResidentSource as Config
from tools.convert import convert

CPU = torch.device("cpu")
SIZES = [(20 + i % 3, 40 - i) for i in range(20)]
BYTES = sum(3 * height * width for height, width in SIZES)
MB = 10**6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for i, (height, width) in enumerate(SIZES):
        path = root / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    return root


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory) -> Callable[..., Path]:
    def make(to: str, name: str, **options) -> Path:
        out = tmp_path_factory.mktemp(to)
        convert(str(folder), out, to, console=Console(file=io.StringIO()), **options)
        return out / name

    return make


def decode(folder: Path) -> FolderSource:
    return FolderSource(folder, workers=2, max_side=None, on_corrupt="fail", report=print)


class Tiles:
    """`count` images of `side` x `side`, made when asked for: their sizes show only then."""

    def __init__(self, count: int, side: int) -> None:
        self.labels, self.index, self.classes = np.zeros(count, np.int64), np.arange(count), ("a",)
        self.tile = np.zeros((side, side, 3), np.uint8)

    def stream(self, batches: Iterable[np.ndarray], *, salt: int) -> Iterator[Frames]:
        for batch in batches:
            original = np.full((len(batch), 2), self.tile.shape[0])
            yield pack([self.tile] * len(batch), original, batch, self.labels[batch])


def write_tiles(path: Path, count: int, side: int) -> Path:
    """A tensor file of `count` times the same image, whose bytes it holds once."""
    tensors = {
        "pixels": torch.zeros(3 * side * side, dtype=torch.uint8),
        "offset": torch.zeros(count, dtype=torch.int64),
        "label": torch.zeros(count, dtype=torch.int64),
        "index": torch.arange(count),
        "size": torch.full((count, 2), side, dtype=torch.int32),
        "original": torch.full((count, 2), side, dtype=torch.int32),
    }
    save_file(tensors, path, metadata={"format": "ressl-tensor-1", "classes": '["a"]'})
    return path


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@contextmanager
def at_most(more: int) -> Generator[None]:
    """As under `ulimit -v`, with `more` bytes above what the process has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- what is asked of the system -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "tensor"])
def test_what_is_reserved_is_what_images_take_and_not_the_budget(folder, converted, kind):
    """Two sets, as for training and validation, under a limit that has no room for either's budget."""
    path = folder if kind == "folder" else converted("tensor", "train.safetensors")
    cfg = Config(name="resident", train=path, memory="host", budget_gb=8.0)
    decoder = partial(decode, folder) if kind == "folder" else None
    ResidentSource(path, cfg, CPU, decoder=decoder)  # so that threads and their heaps are there already
    with at_most(4000 * MB):
        held = [ResidentSource(path, cfg, CPU, decoder=decoder) for _ in ("train", "val")]
    (expected,) = decode(folder).stream([np.arange(20)], salt=0)
    for source in held:
        assert len(source.held.pixels) == BYTES + 3 * (40 + 1)
        assert torch.equal(source.held.pixels[:BYTES], expected.pixels[:BYTES])


def test_a_buffer_grows_with_what_is_decoded_and_ends_at_its_exact_length(tmp_path):
    count, side = 1500, 100
    cfg = Config(name="resident", train=tmp_path, budget_gb=8.0)
    gc.collect()
    before, most = address_space(), []
    source = ResidentSource(
        tmp_path,
        cfg,
        CPU,
        decoder=lambda: Tiles(count, side),
        progress=lambda done, count: most.append(address_space() - before - done * 3 * side**2),
    )
    exact = count * 3 * side**2
    assert len(source.held.pixels) == exact + 3 * (side + 1)
    assert not source.held.pixels.any()
    # an eighth, three batches, and a thread's stack and heap
    assert max(most) < exact / 8 + 3 * 64 * 3 * side**2 + 150 * MB


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
def test_memory_that_the_system_does_not_give_is_told_with_what_would_help(tmp_path, known, pixels):
    count, side = 80, 1500  # 540 MB
    path = write_tiles(tmp_path / "train.safetensors", count, side) if known else tmp_path
    cfg = Config(name="resident", train=path, pixels=pixels, budget_gb=8.0)
    with at_most(300 * MB), pytest.raises(DataError) as refused:
        ResidentSource(path, cfg, CPU, decoder=None if known else lambda: Tiles(count, side))
    message = str(refused.value)
    assert message.startswith(
        f"{path}: the system gives this process too little memory to decode and hold 80 images, "
        "though they may fit into data.source.budget_gb; raise what it gives (see `ulimit -v` and vm.overcommit_memory)"
    )


def test_images_larger_than_the_table_says_are_held_too(folder, converted):
    """As where a larger one stands in for one that is damaged."""
    path = converted("ffcv", "train.beton", mode="raw", max_side=12)
    cfg = Config(name="resident", train=path)
    source = ResidentSource(path, cfg, CPU, decoder=partial(decode, folder))
    (expected,) = decode(folder).stream([np.arange(20)], salt=0)
    assert source.held.size.tolist() == [list(expected.size[i].tolist()) for i in range(20)]
    assert len(source.held.pixels) == BYTES + 3 * (40 + 1)
    assert torch.equal(source.held.pixels[:BYTES], expected.pixels[:BYTES])


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "name", "instead"),
    [
        ("", "", "(data.source.name=folder)"),
        ("tensor", "train.safetensors", "(data.source.name=folder and the images that the file was made from)"),
        ("ffcv", "train.beton", "(data.source.name=ffcv)"),
        ("webdataset", "train", "(data.source.name=dali)"),
    ],
)
def test_one_process_is_not_told_to_share_with_others(folder, converted, to, name, instead):
    path = converted(to, name, **({"mode": "raw"} if to == "ffcv" else {})) if to else folder
    cfg = Config(name="resident", train=path, budget_gb=1e-6)
    with pytest.raises(DataError) as refused:
        ResidentSource(path, cfg, CPU, decoder=None if to == "tensor" else partial(decode, folder))
    message = str(refused.value)
    assert message.endswith(f", or decode images as they are needed {instead}")
    assert "shards" not in message


def test_a_file_of_another_kind_is_not_called_damaged(folder, converted, tmp_path):
    shards = converted("webdataset", "train")
    other = tmp_path / "train.pt"
    torch.save({"a": torch.zeros(3)}, other)
    for path in (shards / "shard-00000.tar", shards / "index.npz", next(folder.rglob("*.png")), other):
        with pytest.raises(
            DataError, match=re.escape(f"{path}: not a file that data.source.name=resident takes")
        ) as no:
            ResidentSource(path, Config(name="resident", train=path), CPU)
        assert "give a .safetensors file (`convert --to tensor`), a .beton file, a folder of images or " in str(
            no.value
        )


def test_a_tensor_file_that_is_damaged_or_missing_is_told_as_before(tmp_path):
    path = tmp_path / "train.safetensors"
    for reason in ("No such file or directory; make it with", "damaged or truncated: "):
        with pytest.raises(DataError, match=re.escape(f"{path}: {reason}")):
            ResidentSource(path, Config(name="resident", train=path), CPU)
        path.write_bytes(b"0123456789" * 10)


def test_a_tensor_file_that_is_written_to_while_it_is_read_is_not_held(converted, tmp_path):
    path = tmp_path / "train.safetensors"
    path.write_bytes(converted("tensor", "train.safetensors").read_bytes())

    def write_again(done: int, count: int) -> None:
        with path.open("r+b") as file:
            file.write(b"other")

    with pytest.raises(DataError, match=re.escape(f"{path}: changed while it was read; start again")):
        ResidentSource(path, Config(name="resident", train=path), CPU, progress=write_again)
