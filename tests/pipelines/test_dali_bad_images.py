"""The DALI source and files that cannot be read: stand-ins and words of the folder source, no pipeline left dead."""

import io
import os
import re
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from pipelines.dali_source import DaliSource
from pipelines.folder_source import FolderSource
from pipelines.shards import read_index
from ressl.batch import DataError
from tools.convert import convert

pytest.importorskip("nvidia.dali")
COUNT, BATCH = 20, 6


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


def png_with(name: bytes, change) -> bytes:
    """A PNG file of which `change(data, checksum)` makes the content and checksum of one part anew."""
    whole, at = encode(picture(0, 60, 80), "PNG"), 8
    parts = [whole[:8]]
    while at < len(whole):
        length = int.from_bytes(whole[at : at + 4], "big")
        kind, data, checksum = whole[at + 4 : at + 8], whole[at + 8 : at + 8 + length], whole[at + 8 + length :][:4]
        at += 12 + length
        if kind == name:
            data, checksum = change(data, checksum)
        parts += [struct.pack(">I", len(data)), kind, data, checksum]
    return b"".join(parts)


def with_sum(kind: bytes, data: bytes) -> tuple[bytes, bytes]:
    return data, struct.pack(">I", zlib.crc32(kind + data))


def without_segment(data: bytes, marker: int) -> bytes:
    at = data.find(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def with_size(data: bytes, height: int, width: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(">HH", changed, changed.find(b"\xff\xc0") + 5, height, width)
    return bytes(changed)


GOOD = encode(picture(0, 150, 200), "JPEG", quality=90)
BAD = {
    "no bytes": (b"", "empty file"),
    "text": (b"this is not an image\n" * 50, "not an image"),
    "web page": (b"<html><body>404 not found</body></html>", "not an image"),
    "gif": (encode(picture(0, 60, 80), "GIF"), "a GIF"),
    "half a jpeg": (GOOD[: len(GOOD) // 2], "truncated"),
    "jpeg without its end": (GOOD[:-10], "truncated"),
    "first bytes of a jpeg": (GOOD[:100], "cannot be decoded"),
    "header of a bomb": (with_size(GOOD, 65500, 65500), "4290 Mpx"),
    "no height": (with_size(GOOD, 0, 200), "cannot be decoded"),
    "start and end": (b"\xff\xd8\xff\xd9", "cannot be decoded"),
    "half a png": (encode(picture(0, 60, 80), "PNG")[:-400], "truncated"),
    # these look whole and go to DALI, whose pipeline does not survive them
    "jpeg without tables": (without_segment(GOOD, 0xDB), "cannot be decoded"),
    "png whose sum is wrong": (png_with(b"IDAT", lambda data, _: with_sum(b"IDAT", data[:-2] + b"\0\0")), "broken"),
}  # fmt: skip
PLACES = {"fifo": "FIFO", "directory": "directory", "dangling link": "dangling link"}


def put_bad(path: Path, kind: str) -> str:
    """Puts something that cannot be read at `path`, and returns how it is described."""
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("missing")
    else:
        path.write_bytes(BAD[kind][0])
    return PLACES[kind] if kind in PLACES else BAD[kind][1]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "images")


@pytest.mark.parametrize("kind", [*BAD, *PLACES])
def test_an_unreadable_image_is_replaced_and_reported_as_by_the_folder_source(folder, kind):
    ours, theirs, messages, expected = None, None, [], []
    ours = dali(folder, on_corrupt="replace", report=messages.append)
    theirs = folder_source(folder, on_corrupt="replace", report=expected.append)
    reason = put_bad(folder / "a" / "04.jpg", kind)
    for epoch in range(2):
        a, b = by_index(ours, batches(), salt=epoch), by_index(theirs, batches(), salt=epoch)
        assert a.keys() == b.keys() == set(range(COUNT)) - {4}
        assert all(np.array_equal(a[i], b[i]) for i in a)
    assert messages == expected
    assert len(messages) == 2
    assert all(f"{folder}/a/04.jpg: " in one and reason in one and "; replaced by " in one for one in messages)


@pytest.mark.parametrize("kind", [*BAD, *PLACES])
def test_an_unreadable_image_ends_the_run_with_its_name(folder, kind):
    source = dali(folder, on_corrupt="fail")
    reason = put_bad(folder / "a" / "04.jpg", kind)
    before = set(threading.enumerate())
    for _ in range(2):
        with pytest.raises(DataError, match=rf"a/04\.jpg: .*{reason}.*\(data\.on_corrupt=replace goes on without it\)"):
            list(source.stream(batches(), salt=0))
    assert set(threading.enumerate()) == before
    put_good = folder / "a" / "04.jpg"
    put_good.rmdir() if kind == "directory" else put_good.unlink()
    put_good.write_bytes(GOOD)
    assert len(by_index(source, batches())) == COUNT


def test_several_bad_images_in_one_batch_and_in_others_are_all_replaced(folder):
    paths = sorted(folder.rglob("*.*"))
    for number, kind in zip((1, 2, 3, 9, 15), ("text", "jpeg without tables", "jpeg without tables", "no bytes",
                                               "jpeg without tables"), strict=True):  # fmt: skip
        put_bad(paths[number], kind)
    messages: list[str] = []
    source = dali(folder, on_corrupt="replace", report=messages.append)
    order = [np.arange(COUNT)[i : i + 7] for i in (0, 7, 14)]
    assert by_index(source, order).keys() == set(range(COUNT)) - {1, 2, 3, 9, 15}
    assert {message.split(": ")[0] for message in messages} == {str(paths[i]) for i in (1, 2, 3, 9, 15)}
    assert source.refused == {2, 3, 15}


def test_an_image_that_only_dali_cannot_read_is_decoded_on_the_host(folder):
    """Pillow does not look at this checksum. The first batch meets it after the second one was handed to DALI."""
    (folder / "a" / "04.jpg").write_bytes(png_with(b"IDAT", lambda data, _: (data, bytes(4))))
    messages: list[str] = []
    source = dali(folder, report=messages.append)
    order = [np.arange(COUNT)[i : i + 5] for i in (0, 5, 10, 15)]
    for _ in range(2):
        ours, theirs = by_index(source, order), by_index(folder_source(folder), order)
        assert list(ours) == list(theirs) == list(range(COUNT))
        assert all(np.array_equal(ours[i], theirs[i]) for i in ours)
    assert (messages, source.refused) == ([], {4})


def test_a_pipeline_that_failed_on_its_only_batch_is_not_used_again(folder):
    put_bad(folder / "a" / "04.jpg", "jpeg without tables")
    source = dali(folder)
    for _ in range(2):
        with pytest.raises(DataError, match="04"):
            list(source.stream([np.arange(3, 6)], salt=0))
        source.refused.clear()
        assert source.idle == []
    assert by_index(source, [np.arange(5, 8)]).keys() == {5, 6, 7}


def test_nothing_but_bad_images_is_an_error_with_a_name(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.jpg").write_bytes(without_segment(GOOD, 0xDB))
    message = r"jpg: cannot be decoded.*; and none of 9 others tried in its place can be read"
    with pytest.raises(DataError, match=message):
        list(dali(tmp_path, on_corrupt="replace").stream([np.arange(5)], salt=0))


def test_damage_in_shards_is_reported_with_the_image_s_name(folder, tmp_path):
    convert(str(folder), tmp_path, "webdataset", console=Console(quiet=True))
    messages: list[str] = []
    tar = tmp_path / "train" / "shard-00000.tar"
    with tar.open("r+b") as file:
        file.seek(int(read_index(tmp_path / "train").offset[5]))
        file.write(b"damaged")
    source = dali(tmp_path / "train", on_corrupt="replace", report=messages.append)
    assert by_index(source, batches()).keys() == set(range(COUNT)) - {5}
    os.truncate(tar, int(source.store.index.offset[16]) + 10)
    assert by_index(source, batches()).keys() == set(range(COUNT)) - {5, 16, 17, 18, 19}
    assert messages[0].startswith(f"{tar}: a/05.jpg: not an image")
    assert any(f"{tar}: b/16.jpg: the shard ends after 10 of its" in message for message in messages)
    with pytest.raises(DataError, match=r"shard-00000\.tar: .* bytes, but index\.npz says"):
        dali(tmp_path / "train")


def test_shards_that_are_converted_again_while_they_are_read_end_the_run_without_a_report(folder, tmp_path):
    quiet = Console(quiet=True)
    convert(str(folder), tmp_path, "webdataset", console=quiet)
    before, messages = threading.enumerate(), []
    source = dali(tmp_path / "train", on_corrupt="replace", report=messages.append)
    convert(str(folder), tmp_path, "webdataset", shuffle=True, overwrite=True, console=quiet)
    with pytest.raises(DataError, match=r"shard-00000\.tar: changed since the run began; start it again"):
        list(source.stream(batches(), salt=0))
    assert (messages, threading.enumerate()) == ([], before)


@pytest.mark.parametrize("position", [4, 7])  # a JPEG file for DALI, a BMP file for the host
def test_a_wrong_size_in_the_index_of_shards_makes_it_a_bad_image(folder, tmp_path, position):
    convert(str(folder), tmp_path, "webdataset", console=Console(quiet=True))
    path = tmp_path / "train" / "index.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["size"][position] -= 1
    np.savez(path, **arrays)
    messages: list[str] = []
    source = dali(tmp_path / "train", on_corrupt="replace", report=messages.append)
    list(source.stream(batches(), salt=0))
    assert messages
    for message in messages:
        assert re.search(rf"tar: a/0{position}\.\w+: .* pixels .*, but index\.npz says .*; convert or copy", message)
    with pytest.raises(DataError, match=rf"a/0{position}\.\w+: .*, but index\.npz says"):
        list(dali(tmp_path / "train", on_corrupt="fail").stream(batches(), salt=0))


def test_a_path_beside_the_shards_is_told_the_right_one(folder, tmp_path):
    for split in ("train", "val"):
        convert(str(folder), tmp_path / "out", "webdataset", split=split, console=Console(quiet=True))
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for root in (tmp_path / "out", tmp_path / "link"):
        with pytest.raises(DataError, match=rf"{root}: .*the shards are in {root}/train and {root}/val; give one of"):
            dali(root)
    for split in ("train", "val"):
        (tmp_path / "out" / split / "index.npz").unlink()
    for root in (tmp_path / "out", tmp_path / "out" / "train"):
        with pytest.raises(DataError, match=r"out/train: shards without index\.npz; convert again"):
            dali(root)
    (tmp_path / "out" / "image.jpg").write_bytes(GOOD)
    assert len(dali(tmp_path / "out").labels) == 1


def test_a_directory_without_images_and_a_missing_library_are_refused(folder, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images found"):
        dali(tmp_path / "empty")
    with pytest.raises(DataError, match="no such directory"):
        dali(tmp_path / "missing")
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"data\.source\.name=dali needs DALI; `launch\.py doctor` says"):
        dali(folder)
