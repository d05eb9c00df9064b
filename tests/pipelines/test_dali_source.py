"""The DALI source on the CPU: the pixels of the folder source, and no bad file that hangs or ends it."""

import gc
import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipelines.dali_source import DaliSource
from pipelines.folder_source import FolderSource
from pipelines.images import fit_max_side, fitted_sizes
from tools.convert import convert

pytest.importorskip("nvidia.dali")
COUNT, BATCH = 20, 6
OTHER_FILTER = 2.0  # mean steps of a byte between DALI's cubic filter and Pillow's Hamming one (measured: 0.5)


def picture(seed: int, height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return patches.resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(root: Path) -> Path:
    """Colour and grey JPEG files and PNG files of different sizes in two classes, every tenth one of another format."""
    for i in range(COUNT):
        image = picture(i, 40 + 3 * i, 90 - 2 * i)
        data = encode(image.convert("L") if i % 5 == 3 else image, "JPEG" if i % 3 else "PNG")
        path = root / "ab"[i >= COUNT // 2] / f"{i:02}.{'jpg' if i % 3 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image, "BMP") if i % 10 == 7 else data)
    return root


def dali(path: Path, *, max_side: int | None = None, on_corrupt: str = "fail", report=print, device: str = "cpu"):
    return DaliSource(
        path,
        device=torch.device(device),
        workers=2,
        max_side=max_side,
        hw_decoder_load=0.65,
        on_corrupt=on_corrupt,
        report=report,
    )


def folder_source(path: Path, *, max_side: int | None = None, on_corrupt: str = "fail", report=print) -> FolderSource:
    return FolderSource(path, workers=2, max_side=max_side, on_corrupt=on_corrupt, report=report)


def batches(count: int = COUNT, size: int = BATCH, seed: int = 0) -> list[np.ndarray]:
    order = np.random.default_rng(seed).permutation(count)
    return [order[i : i + size] for i in range(0, count, size)]


def images_of(frames) -> list[np.ndarray]:
    found = []
    for start, stride, (height, width) in zip(
        frames.offset.tolist(), frames.stride.tolist(), frames.size.tolist(), strict=True
    ):
        rows = frames.pixels.cpu().numpy()[start : start + height * stride].reshape(height, stride)
        found.append(rows[:, : 3 * width].reshape(height, width, 3).astype(int))
    return found


def by_index(source, order, salt: int = 0) -> dict[int, np.ndarray]:
    return {
        int(i): image
        for frames in source.stream(order, salt=salt)
        for i, image in zip(frames.index, images_of(frames), strict=True)
    }


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def settled(few: int) -> int:
    """Native threads once there are as few, or after a second: the system lists a thread for a moment after its end."""
    end = time.monotonic() + 1
    while (found := native_threads()) > few and time.monotonic() < end:
        time.sleep(0.01)
    return found


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    convert(str(folder), out, "webdataset", console=Console(quiet=True))
    return out / "train"


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_side", [None, 80, 40])
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_frames_are_those_of_the_folder_source(folder, shards, kind, max_side):
    path = folder if kind == "folder" else shards
    ours, theirs = dali(path, max_side=max_side), folder_source(folder, max_side=max_side)
    assert (ours.labels.tolist(), ours.classes) == (theirs.labels.tolist(), theirs.classes)
    resized = 0
    for a, b in zip(ours.stream(batches(), salt=0), theirs.stream(batches(), salt=0), strict=True):
        for field in ("size", "original", "index", "label"):
            assert torch.equal(getattr(a, field), getattr(b, field))
            assert getattr(a, field).dtype == getattr(b, field).dtype
        assert a.extent == b.extent
        last_row = a.offset + a.stride.long() * (a.size[:, 0] - 1)
        assert last_row.max() + 3 * a.extent[1] <= a.pixels.numel()
        for x, y, size, original in zip(images_of(a), images_of(b), a.size, a.original, strict=True):
            if torch.equal(size, original):
                assert np.array_equal(x, y)  # the CPU's JPEG decoders are the same library
            else:
                assert np.abs(x - y).mean() <= OTHER_FILTER
                resized += 1
    assert resized == {None: 0, 80: 11, 40: 20}[max_side]


def test_the_size_after_shrinking_is_rounded_as_in_the_folder_source():
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 900), (900, 1), (64, 64), (65, 64), *rng.integers(1, 300, (300, 2)).tolist()]:
        image = np.zeros((height, width, 3), np.uint8)
        longer = max(height, width)
        rounded = tuple(max(1, round(side * 64 / longer)) if longer > 64 else side for side in (height, width))
        assert tuple(fitted_sizes(np.array([(height, width)]), 64)[0]) == rounded == fit_max_side(image, 64).shape[:2]


TURNED = Image.Exif()
TURNED[0x0112] = 6  # to be shown turned by 90 degrees: pixels stay as they are stored
ODD = {
    "grey png": encode(picture(0, 60, 80).convert("L"), "PNG"),
    "black and white png": encode(picture(0, 60, 80).convert("1"), "PNG"),
    "palette png": encode(picture(0, 60, 80).convert("P"), "PNG", transparency=3),
    "png with alpha": encode(picture(0, 60, 80).convert("RGBA"), "PNG"),
    "png of 16 bits": encode(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80) * 13), "PNG"),
    "cmyk jpeg": encode(picture(0, 60, 80).convert("CMYK"), "JPEG"),
    "rgb jpeg": encode(picture(0, 60, 80), "JPEG", keep_rgb=True),
    "grey jpeg": encode(picture(0, 60, 80).convert("L"), "JPEG"),
    "progressive jpeg": encode(picture(0, 60, 80), "JPEG", progressive=True),
    "jpeg with all colour": encode(picture(0, 60, 80), "JPEG", subsampling="4:4:4"),
    "jpeg to be turned": encode(picture(0, 60, 80), "JPEG", exif=TURNED),
    "jpeg with a tail": encode(picture(0, 60, 80), "JPEG") + b"tail",
    "webp": encode(picture(0, 60, 80), "WEBP"),
    "bmp": encode(picture(0, 60, 80), "BMP"),
    "tiff": encode(picture(0, 60, 80), "TIFF"),
    "one pixel": encode(picture(0, 1, 1), "JPEG"),
    "a line": encode(picture(0, 3, 500), "JPEG"),
}


def test_odd_formats_are_decoded_as_by_pillow_whatever_their_suffix(tmp_path):
    for number, data in enumerate(ODD.values()):
        (tmp_path / f"{number:02}.jpg").write_bytes(data)
    order = [np.arange(len(ODD))]
    ours, theirs = by_index(dali(tmp_path), order), by_index(folder_source(tmp_path), order)
    for number, name in enumerate(ODD):
        assert np.array_equal(ours[number], theirs[number]), name


def test_batches_without_any_image_for_dali_and_single_images_are_fine(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.bmp").write_bytes(encode(picture(i, 20, 30), "BMP"))
    (tmp_path / "5.jpg").write_bytes(encode(picture(5, 20, 30), "JPEG"))
    ours = by_index(dali(tmp_path, max_side=16), [np.array([0, 1]), np.array([2, 3]), np.array([5, 4]), np.array([5])])
    assert {i: image.shape for i, image in ours.items()} == dict.fromkeys(range(6), (11, 16, 3))
    assert list(dali(tmp_path).stream([], salt=0)) == []


@pytest.mark.gpu
def test_frames_on_the_gpu_are_nearly_those_of_the_cpu(folder):
    for max_side in (None, 64):
        on_cpu, on_gpu = by_index(dali(folder, max_side=max_side), batches()), {}
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            held = list(dali(folder, max_side=max_side, device="cuda").stream(batches(), salt=0))
        side.synchronize()
        for frames in held:
            assert {tensor.device.type for tensor in frames.tensors()} == {"cuda"}
            on_gpu |= {int(i): image for i, image in zip(frames.index, images_of(frames), strict=True)}
        assert on_gpu.keys() == on_cpu.keys()
        assert max(np.abs(on_gpu[i] - on_cpu[i]).mean() for i in on_cpu) < 2


# --- lifetimes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_frames_stay_as_they_were_when_later_ones_are_made(shards, device):
    source = dali(shards, max_side=64, device=device)
    held = list(source.stream(batches(), salt=0))
    copies = [frames.pixels.clone() for frames in held]
    for _ in range(2):
        list(source.stream(batches(seed=1), salt=0))
    del source
    gc.collect()
    assert all(torch.equal(frames.pixels, copy) for frames, copy in zip(held, copies, strict=True))


def test_leaving_early_frees_all_threads_and_keeps_the_pipeline_for_the_next_stream(folder):
    gc.collect()  # what earlier tests have left
    before, threads = set(threading.enumerate()), native_threads()
    source = dali(folder)
    for number in range(8):
        stream = source.stream(batches(size=4, seed=number), salt=0)
        next(stream)
        stream.close()
        assert set(threading.enumerate()) == before
    assert len(source.idle) == 1
    assert by_index(source, batches(size=4)).keys() == set(range(COUNT))
    with_one = settled(threads)
    for size in (2, 3, 5, 4):
        list(source.stream(batches(size=size), salt=0))
    assert len(source.idle) == 2
    most = threads + 2 * (with_one - threads)
    assert settled(most) <= most
    del source, stream
    gc.collect()
    assert settled(threads) <= threads


def test_two_streams_at_once_and_two_threads_give_what_one_gives(shards):
    source, results = dali(shards, max_side=64), {}
    expected = by_index(source, batches())
    first, second = source.stream(batches(), salt=0), source.stream(batches(size=3), salt=0)
    pairs = [(next(first), next(second)) for _ in range(4)]
    for pair in pairs:
        for frames in pair:
            found = zip(frames.index.tolist(), images_of(frames), strict=True)
            assert all(np.array_equal(image, expected[i]) for i, image in found)
    second.close()

    def read(number: int) -> None:
        results[number] = by_index(source, batches(seed=number))

    readers = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert sorted(results) == [0, 1]
    assert all(np.array_equal(result[i], expected[i]) for result in results.values() for i in range(COUNT))


def test_memory_stays_flat_over_twenty_epochs(shards):
    source = dali(shards, max_side=64)

    def epochs(count: int) -> int:
        for epoch in range(count):
            for _ in source.stream(batches(seed=epoch), salt=epoch):
                pass
        gc.collect()
        return resident_bytes()

    early = epochs(5)
    assert epochs(20) - early < 8 * 2**20
