"""Whole sets in memory, from every kind of file, in both places and both forms, whole or in shards."""

import gc
import io
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from pipelines.dali_source import DaliSource
from pipelines.ffcv_source import FfcvSource
from pipelines.folder_source import FolderSource
from pipelines.frames import Frames
from pipelines.prefetch import prefetch
from pipelines.resident_source import SURE, ResidentSource
from pipelines.sampler import Sampler, Shards, shard
from ressl.batch import DataError
from ressl.config import ResidentSource as Config
from tools.convert import convert

CPU = torch.device("cpu")
SHAPES = [(9 + i % 5, 30 - i) for i in range(22)]
COUNT = len(SHAPES)
RGB_BYTES = sum(3 * height * width for height, width in SHAPES)
YUV_BYTES = sum(h * w + 2 * ((h + 1) // 2) * ((w + 1) // 2) for h, w in SHAPES)
FILES = {"tensor": ("tensor", "train.safetensors"), "ffcv": ("ffcv", "train.beton"), "dali": ("webdataset", "train")}
KINDS = ("folder", "tensor", "ffcv", "dali")


def smooth(seed: int, height: int, width: int) -> np.ndarray:
    """Colours of its own for each seed, that change slowly: half their resolution loses next to nothing."""
    y, x = np.mgrid[:height, :width]
    red, green, blue = np.random.default_rng(seed).integers(30, 160, 3)
    return np.stack([red + 2 * x, green + 2 * y, blue + x + y], axis=2).astype(np.uint8)


def write_folder(root: Path, shapes: list[tuple[int, int]]) -> Path:
    for i, shape in enumerate(shapes):
        path = root / "abc"[3 * i // len(shapes)] / f"{i:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth(i, *shape)).save(path)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), SHAPES)


@pytest.fixture(scope="module")
def paths(folder, tmp_path_factory) -> Callable[[str], Path]:
    """The set as a folder, a tensor file, a .beton file or shards, written when first asked for."""
    made = {"folder": folder}

    def get(kind: str) -> Path:
        if kind in ("ffcv", "dali"):
            pytest.importorskip("ffcv" if kind == "ffcv" else "nvidia.dali")
        if kind not in made:
            out, quiet = tmp_path_factory.mktemp(kind), Console(file=io.StringIO())
            to, name = FILES[kind]
            convert(str(folder), out, to, console=quiet, **({"mode": "raw"} if kind == "ffcv" else {}))
            made[kind] = out / name
        return made[kind]

    return get


def decode_folder(path: Path, report=print, on_corrupt="fail", max_side=None) -> FolderSource:
    return FolderSource(path, workers=2, max_side=max_side, on_corrupt=on_corrupt, report=report)


def decoder_of(path: Path):
    """As `build_source` makes it."""
    if path.suffix == ".beton":
        return lambda: FfcvSource(path, workers=1, on_corrupt="fail", report=print)
    if (path / "index.npz").exists():
        return lambda: DaliSource(
            path, device=CPU, workers=1, max_side=None, hw_decoder_load=0, on_corrupt="fail", report=print
        )
    return (lambda: decode_folder(path)) if path.is_dir() else None


def resident(path: Path, *, device=CPU, rank=0, world_size=1, decoder=None, **cfg) -> ResidentSource:
    config = Config(name="resident", train=path, **cfg)
    made_by = decoder or decoder_of(path)
    return ResidentSource(path, config, device, rank=rank, world_size=world_size, decoder=made_by)


def images(frames: Frames) -> list[torch.Tensor]:
    numbers = zip(frames.offset.tolist(), frames.stride.tolist(), frames.size.tolist(), strict=True)
    return [
        torch.stack([frames.pixels[first + line * stride :][: 3 * width] for line in range(height)]).view(
            height, width, 3
        )
        for first, stride, (height, width) in numbers
    ]


def assert_same(ours: Frames, theirs: Frames, steps: int):
    """The same images by another way: tables equal, pixels at most `steps` apart."""
    for field in ("size", "original", "index", "label"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field)), field
    assert ours.extent == theirs.extent
    for a, b in zip(images(ours), images(theirs), strict=True):
        assert (a.int() - b.int()).abs().max() <= steps


def assert_keeps_the_contract(frames: Frames):
    last_row = frames.offset + frames.stride.long() * (frames.size[:, 0] - 1)
    assert last_row.max() + 3 * frames.extent[1] <= frames.pixels.numel()
    assert frames.size.amax(dim=0).tolist() == list(frames.extent)
    dtypes = " ".join(str(tensor.dtype).removeprefix("torch.") for tensor in frames.tensors())
    assert dtypes == "uint8 int64 int32 int32 int32 int64 int64"


# --- the same images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
@pytest.mark.parametrize("memory", ["device", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_what_the_decoder_gives(folder, paths, kind, memory, pixels):
    source = resident(paths(kind), memory=memory, pixels=pixels)
    decoder = decode_folder(folder)
    batches = [np.array([3, 21, 0, 8]), np.array([5, 4, 20, 1]), np.array([7])]
    assert source.labels.tolist() == decoder.labels.tolist()
    assert source.classes == decoder.classes == ("a", "b", "c")
    for ours, theirs in zip(source.stream(batches, salt=0), decoder.stream(batches, salt=0), strict=True):
        assert_same(ours, theirs, steps=0 if pixels == "rgb" else 5)
        assert_keeps_the_contract(ours)


def test_yuv420_takes_half_the_memory(folder):
    rgb, yuv = (resident(folder, pixels=pixels) for pixels in ("rgb", "yuv420"))
    slack = 3 * (30 + 1)
    assert (len(rgb.held.pixels), len(yuv.held.pixels)) == (RGB_BYTES + slack, YUV_BYTES + slack)


def test_batches_from_host_memory_hold_their_own_bytes_alone(folder):
    (frames,) = resident(folder, memory="host").stream([np.array([6, 2])], salt=0)
    wanted = sum(3 * SHAPES[i][0] * SHAPES[i][1] for i in (6, 2))
    assert frames.pixels.numel() == wanted + 3 * (SHAPES[2][1] + 1)


def test_the_original_size_is_that_before_max_side(folder):
    (frames,) = resident(folder, decoder=lambda: decode_folder(folder, max_side=12)).stream([np.array([0])], salt=0)
    assert (frames.size.max().item(), frames.original.tolist()) == (12, [list(SHAPES[0])])


def test_an_image_that_stands_in_for_a_damaged_one_brings_its_own_index_and_label(tmp_path):
    root = write_folder(tmp_path, SHAPES)
    (root / "a" / "0004.png").write_bytes(b"no image")
    reports: list[str] = []
    source = resident(root, decoder=lambda: decode_folder(root, reports.append, "replace"))
    (frames,) = source.stream([np.array([3, 4, 5])], salt=1)
    chosen = int(frames.index[1])
    assert frames.index.tolist() == [3, chosen, 5] != [3, 4, 5]
    assert frames.label[1] == source.labels[chosen]
    assert np.array_equal(images(frames)[1].numpy(), smooth(chosen, *SHAPES[chosen]))
    assert ["0004.png" in report for report in reports] == [True]


def test_a_damaged_image_ends_the_construction_if_it_is_to(tmp_path):
    root = write_folder(tmp_path, SHAPES)
    (root / "a" / "0004.png").write_bytes(b"no image")
    before = set(threading.enumerate())
    with pytest.raises(DataError, match="0004.png"):
        resident(root)
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_held_memory_is_not_the_files(paths, tmp_path):
    """So that a file which is written anew while training runs does no harm."""
    path = tmp_path / "copy.safetensors"
    path.write_bytes(paths("tensor").read_bytes())
    source = resident(path)
    (before,) = source.stream([np.arange(COUNT)], salt=0)
    expected = images(before)
    path.write_bytes(bytes(path.stat().st_size))
    (after,) = source.stream([np.arange(COUNT)], salt=0)
    assert all(torch.equal(a, b) for a, b in zip(images(after), expected, strict=True))


# --- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
@pytest.mark.parametrize("kind", ["folder", "tensor"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_hold_their_part_and_give_the_steps_of_one(folder, paths, kind, pixels, world_size):
    decoder, sources = decode_folder(folder), []
    for rank in range(world_size):
        source = resident(paths(kind), rank=rank, world_size=world_size, shards=4, pixels=pixels)
        assert source.held.index.tolist() == shard(COUNT, rank, world_size).tolist()
        assert len(source.labels) == COUNT
        sources.append(source)
    assert sum(len(s.held.pixels) for s in sources) < (RGB_BYTES if pixels == "rgb" else YUV_BYTES) + world_size * 100
    alone = Sampler(COUNT, 8, seed=5, order=Shards(4)).epoch(2)
    streams = [
        source.stream(Sampler(COUNT, 8, 5, rank, world_size, order=Shards(4)).epoch(2), salt=0)
        for rank, source in enumerate(sources)
    ]
    for step, parts in zip(alone, zip(*streams, strict=True), strict=True):
        assert [int(i) for part in parts for i in part.index] == step.tolist()
        (whole,) = decoder.stream([step], salt=0)
        for ours, theirs in zip(sum(map(images, parts), []), images(whole), strict=True):
            assert (ours.int() - theirs.int()).abs().max() <= (0 if pixels == "rgb" else 5)


def test_without_shards_every_rank_holds_all(folder):
    assert resident(folder, rank=1, world_size=2).held.index.tolist() == list(range(COUNT))


@pytest.mark.parametrize("memory", ["device", "host"])
def test_a_position_that_is_not_held_is_an_error_not_another_image(folder, memory):
    source = resident(folder, rank=1, world_size=2, shards=2, memory=memory)
    for position in (0, 10, COUNT):
        with pytest.raises(IndexError, match=f"position {position} is not among the 11 from 11 on"):
            list(source.stream([np.array([12, position])], salt=0))


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
def test_more_ranks_than_images_leave_some_without_any(tmp_path, pixels):
    root = write_folder(tmp_path, SHAPES[:3])
    held = [resident(root, rank=r, world_size=4, shards=4, pixels=pixels).held.index.tolist() for r in range(4)]
    assert held == [[], [0], [1], [2]]


def test_shards_that_ranks_cannot_share_are_refused_before_decoding(folder):
    with pytest.raises(DataError, match=r"data\.source\.shards=4 must be a multiple of the 3 processes"):
        resident(folder, rank=0, world_size=3, shards=4, decoder=lambda: pytest.fail("was asked to decode"))


# --- what fits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_over_the_budget_is_refused_with_the_arithmetic(paths, kind):
    path = paths(kind)
    with pytest.raises(DataError) as refused:
        resident(path, budget_gb=(RGB_BYTES - 1) / 1e9)
    message = str(refused.value)
    assert message.startswith(
        f"{path}: 22 images x {RGB_BYTES / COUNT:.0f} bytes (RGB) = {RGB_BYTES / 1e3:.1f} KB, over "
    )
    assert " KB, over data.source.budget_gb=1.39" in message
    assert f"data.source.pixels=yuv420 would make it {YUV_BYTES / 1e3:.1f} KB; raise the budget, " in message
    assert ("lower data.source.max_side" in message) == (kind in ("folder", "dali"))
    assert ("convert again with a smaller --max-side" in message) == (kind in ("tensor", "ffcv"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("pixels", "length"), [("rgb", RGB_BYTES), ("yuv420", YUV_BYTES)])
def test_what_just_fits_is_taken_and_a_byte_less_is_not(paths, kind, pixels, length):
    assert resident(paths(kind), pixels=pixels, budget_gb=length / 1e9).count == COUNT
    with pytest.raises(DataError) as refused:
        resident(paths(kind), pixels=pixels, budget_gb=(length - 1) / 1e9)
    assert ("yuv420 would make it" in str(refused.value)) == (pixels == "rgb")


def test_shards_are_refused_by_their_sizes_after_max_side_before_any_is_decoded(paths):
    class Unread:
        labels, index, classes = np.zeros(COUNT, np.int64), np.arange(COUNT), ("a",)

        def stream(self, batches, *, salt):
            raise AssertionError("was asked to decode")

    side = [max(12, *shape) for shape in SHAPES]
    small = sum(
        3 * round(h * 12 / s) * round(w * 12 / s) if s > 12 else 3 * h * w
        for (h, w), s in zip(SHAPES, side, strict=True)
    )
    with pytest.raises(DataError, match=re.escape(f"x {small / COUNT:.0f} bytes (RGB) = {small / 1e3:.1f} KB, over")):
        resident(paths("dali"), decoder=Unread, max_side=12, budget_gb=(small - 1) / 1e9)
    with pytest.raises(AssertionError, match="was asked to decode"):
        resident(paths("dali"), decoder=Unread, max_side=12, budget_gb=small / 1e9)


@pytest.mark.parametrize("kind", ["folder", "tensor"])
def test_shards_are_what_the_budget_is_for(paths, kind):
    budget = 0.7 * RGB_BYTES / 1e9
    with pytest.raises(DataError, match=re.escape("share the images out over the processes (data.source.shards=2)")):
        resident(paths(kind), rank=0, world_size=2, budget_gb=budget)
    assert resident(paths(kind), rank=0, world_size=2, shards=2, budget_gb=budget).count == 11
    with pytest.raises(DataError, match=re.escape("22 images / 2 ranks = 11 x")) as refused:
        resident(paths(kind), rank=0, world_size=2, shards=2, budget_gb=0.2 * RGB_BYTES / 1e9)
    assert " a rank, over data.source.budget_gb=" in str(refused.value)
    assert str(refused.value).endswith("or share the images out over more processes (data.source.shards)")


def test_a_folder_that_will_not_fit_is_refused_before_the_budget_is_full(tmp_path):
    """Sizes show on decoding: the first images speak for the rest when they leave no doubt."""
    count = 3 * SURE
    root = write_folder(tmp_path, [(8, 8)] * count)
    with pytest.raises(DataError) as refused:
        resident(root, budget_gb=count * 192 / 2 / 1e9)
    assert f"{count} images x 192 bytes (RGB, the mean of the first {SURE}) = {count * 192 / 1e3:.1f} KB" in str(
        refused.value
    )


def test_a_folder_whose_first_images_are_its_largest_is_not_refused(tmp_path):
    """By the first of them alone it would take a third more than there is."""
    count = 3 * SURE
    root = write_folder(tmp_path, [(10, 10)] * SURE + [(8, 8)] * (count - SURE))
    length = 3 * (SURE * 100 + (count - SURE) * 64)
    assert resident(root, budget_gb=length / 1e9).count == count


def test_what_the_machine_has_no_memory_for_is_refused_before_anything_is_read(tmp_path):
    """A hundred thousand times the same image, so that the file is small and the set is not."""
    count, side = 100_000, 6000
    path = tmp_path / "large.safetensors"
    tensors = {
        "pixels": torch.zeros(3 * side * side, dtype=torch.uint8),
        "offset": torch.zeros(count, dtype=torch.int64),
        "label": torch.zeros(count, dtype=torch.int64),
        "index": torch.arange(count),
        "size": torch.full((count, 2), side, dtype=torch.int32),
        "original": torch.full((count, 2), side, dtype=torch.int32),
    }
    save_file(tensors, path, metadata={"format": "ressl-tensor-1", "classes": '["a"]'})
    with pytest.raises(DataError) as refused:
        resident(path, budget_gb=1e6)
    message = str(refused.value)
    assert "100,000 images x 108.0 MB (RGB) = 10.8 TB, over the " in message
    assert re.search(r" GB of memory that are free (on this machine|in this container or job \(cgroup\)); ", message)
    assert "yuv420 would make it 5.4 TB; free some memory, " in message


def test_the_memory_of_the_machine_is_shared_by_its_ranks(paths, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10**9))
    with pytest.raises(
        DataError, match=r"of memory that are free (on|in) this .* for each of its 1000000000 processes; "
    ):
        resident(paths("tensor"))


def test_a_large_budget_takes_no_memory_by_itself(folder):
    before = resident_memory()
    assert resident(folder, budget_gb=4.0).count == COUNT
    assert resident_memory() - before < 300e6


@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
def test_memory_is_flat_over_twenty_epochs(tmp_path, pixels):
    root = write_folder(tmp_path, [(120, 160)] * 24)
    source, after = resident(root, memory="host", pixels=pixels), []
    for epoch in range(20):
        for frames in source.stream(Sampler(24, 8, seed=1).epoch(epoch), salt=0):
            assert len(frames.index) == 8
        after.append(resident_memory())
    assert max(after[5:]) - after[4] < 4 * 24 * 120 * 160 * 3  # fifteen epochs have nearly four times as much


def resident_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", ["rgb", "yuv420"])
@pytest.mark.parametrize("memory", ["device", "host"])
def test_a_gpu_gets_the_images_of_the_cpu(folder, memory, pixels):
    gpu = torch.device("cuda")
    before = torch.cuda.memory_allocated()
    on_gpu = resident(folder, device=gpu, memory=memory, pixels=pixels)
    length = RGB_BYTES if pixels == "rgb" else YUV_BYTES
    assert (torch.cuda.memory_allocated() - before >= length) == (memory == "device")
    batches = list(Sampler(COUNT, 4, seed=0).epoch(0))
    on_cpu = resident(folder, memory=memory, pixels=pixels).stream(batches, salt=0)
    for ours, theirs in zip(prefetch(on_gpu.stream(batches, salt=0), gpu, depth=2), on_cpu, strict=True):
        assert all(tensor.is_cuda for tensor in ours.tensors())
        assert_keeps_the_contract(ours.to(CPU))
        assert_same(ours.to(CPU), theirs, steps=0 if pixels == "rgb" else 2)


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["device", "host"])
def test_a_batch_on_a_gpu_does_not_wait_for_it(folder, memory):
    gpu = torch.device("cuda")
    source = resident(folder, device=gpu, memory=memory, pixels="yuv420")
    list(source.stream([np.arange(4)], salt=0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(source.stream([np.arange(4)], salt=0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
