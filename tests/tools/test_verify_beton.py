"""Forty-six ways in which a .beton file can be damaged, at most of which FFCV gives wrong pixels, hangs, crashes or
names no file: each is found. And files that FFCV itself wrote."""

import hashlib
import io
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import ALLOCATION, FIELD, FIELDS, HEADER, JPG, RAW, metadata_dtype, open_beton
from pipelines.manifest import Manifest, SplitRecord, manifest_text
from ressl.batch import DataError
from tools.beton_writer import EncodedSample, write_beton
from tools.index_file import write_index_file
from tools.verify import verify

COUNT = 12
SIZES = [(40, 60 - i) for i in range(COUNT)]
PAGE = 2 << 20  # bytes
HEAD = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
ROW = metadata_dtype(FIELDS)


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> bytes:
    """Twelve JPEG images, but the fifth is raw."""
    path = tmp_path_factory.mktemp("whole") / "train.beton"
    samples = []
    for i, size in enumerate(SIZES):
        raw = i == 4
        data = bytes(3 * size[0] * size[1]) if raw else jpeg(i, size)
        samples.append(EncodedSample(data, RAW if raw else JPG, size, size, i % 3, i))
    write_beton(path, samples, COUNT, page_size=PAGE)
    return path.read_bytes()


@pytest.fixture
def root(contents, tmp_path) -> Path:
    """A directory as `convert` leaves it, with the file whole."""
    path = tmp_path / "train.beton"
    path.write_bytes(contents)
    beton = open_beton(path)
    crc = [zlib.crc32(contents[at : at + size]) for at, size in zip(beton.data_ptr, beton.data_size, strict=True)]
    tables = contents[: HEAD + COUNT * ROW.itemsize] + contents[-COUNT * ALLOCATION.itemsize :]
    index = tmp_path / "train.beton.index.npz"
    names = (f"class/{i}.jpg" for i in range(COUNT))
    write_index_file(index, np.array(crc), names, hashlib.sha256(tables).hexdigest())
    sealed = hashlib.sha256(index.read_bytes()).hexdigest()
    source = {"description": "", "place": str(tmp_path / "gone"), "labels": None, "split": "train"}
    record = SplitRecord(
        path.name, COUNT, ("a", "b", "c"), (), {}, len(contents), index.name, sealed, {"to": "ffcv"}, source
    )
    (tmp_path / "manifest.json").write_text(manifest_text(Manifest({"train": record})))
    return tmp_path


def check(path: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=250)
    good = verify(path, deep=True, console=console)
    return good, console.file.getvalue()


# --- each harm: what it makes of the file's bytes --------------------------------------------------------------------

Harm = Callable[[bytearray], bytes | bytearray]


def header(**changes: int) -> Harm:
    def harm(data: bytearray) -> bytearray:
        found = np.frombuffer(data, HEADER, 1).copy()
        for key, value in changes.items():
            found[key] = value
        data[: HEADER.itemsize] = found.tobytes()
        return data

    return harm


def field(number: int, key: str, value: object) -> Harm:
    def harm(data: bytearray) -> bytearray:
        found = np.frombuffer(data, FIELD, len(FIELDS), HEADER.itemsize).copy()
        found[key][number] = value
        data[HEADER.itemsize : HEAD] = found.tobytes()
        return data

    return harm


def row(number: int, **changes: int) -> Harm:
    """`label`, or a part of the image's entry."""

    def harm(data: bytearray) -> bytearray:
        rows = np.frombuffer(data, ROW, COUNT, HEAD).copy()
        for key, value in changes.items():
            (rows if key == "label" else rows["image"])[key][number] = value
        data[HEAD : HEAD + rows.nbytes] = rows.tobytes()
        return data

    return harm


def table(number: int, **changes: int) -> Harm:
    def harm(data: bytearray) -> bytearray:
        start = len(data) - COUNT * ALLOCATION.itemsize
        entries = np.frombuffer(data, ALLOCATION, COUNT, start).copy()
        for key, value in changes.items():
            entries[key][number] = value
        data[start:] = entries.tobytes()
        return data

    return harm


def both(*harms: Harm) -> Harm:
    def harm(data: bytearray) -> bytes | bytearray:
        for one in harms:
            data = bytearray(one(data))
        return data

    return harm


def pointers(change: Callable[[np.ndarray], np.ndarray]) -> Harm:
    """Of the images, in both tables alike."""

    def harm(data: bytearray) -> bytearray:
        start = len(data) - COUNT * ALLOCATION.itemsize
        new = change(np.frombuffer(data, ALLOCATION, COUNT, start)["ptr"].copy())
        for i, pointer in enumerate(new.tolist()):
            data = table(i, ptr=pointer)(row(i, data_ptr=pointer)(data))
        return data

    return harm


def image(number: int, change: Callable[[bytes], bytes]) -> Harm:
    """Of as many bytes as before."""

    def harm(data: bytearray) -> bytearray:
        entry = np.frombuffer(data, ALLOCATION, COUNT, len(data) - COUNT * ALLOCATION.itemsize)[number]
        start, size = int(entry["ptr"]), int(entry["size"])
        data = bytearray(data)
        data[start : start + size] = change(bytes(data[start : start + size]))
        return data

    return harm


def moved(number: int, by: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(pointer: np.ndarray) -> np.ndarray:
        pointer[number] += by
        return pointer

    return change


def swapped(pointer: np.ndarray) -> np.ndarray:
    pointer[[2, 3]] = pointer[[3, 2]]
    return pointer


def flip_a_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


TABLE_BYTES = COUNT * ALLOCATION.itemsize
TABLE, ALONE, SUMS = "by the tables", "without checksums", "by checksums"  # what it takes to find it
CASES: dict[str, tuple[Harm, str]] = {
    "version 1": (header(version=1), TABLE),
    "version 3": (header(version=3), TABLE),
    "a text file": (lambda data: b"not a data set\n" * 1000, TABLE),
    "cut at 50 %": (lambda data: data[: len(data) // 2], TABLE),
    "cut at 90 %": (lambda data: data[: len(data) * 9 // 10], TABLE),
    "empty": (lambda data: b"", TABLE),
    "10 bytes": (lambda data: data[:10], TABLE),
    "unknown type of a field": (field(0, "type_id", 200), TABLE),
    "other type of a field": (field(1, "type_id", 0), TABLE),
    "other name of a field": (field(1, "name", b"lable"), TABLE),
    "no fields": (header(num_fields=0), TABLE),
    "1,000 fields": (header(num_fields=1000), TABLE),
    "one field less": (header(num_fields=4), TABLE),
    "page size 0": (header(page_size=0), TABLE),
    "page size no power of two": (header(page_size=PAGE + 1), TABLE),
    "no images": (header(num_samples=0), TABLE),
    "half of the images": (header(num_samples=COUNT // 2), TABLE),
    "more images than there are": (header(num_samples=COUNT + 1), TABLE),
    "2**40 images": (header(num_samples=2**40), TABLE),
    "pointer to the table 0": (header(alloc_table_ptr=0), TABLE),
    "pointer to the table behind the end": (header(alloc_table_ptr=2**50), TABLE),
    "killed writer": (lambda data: header(alloc_table_ptr=0)(data)[:-TABLE_BYTES], TABLE),
    "table missing": (lambda data: data[:-TABLE_BYTES], TABLE),
    "half of the table missing": (lambda data: data[: -TABLE_BYTES // 2], TABLE),
    "short by one byte": (lambda data: data[:-1], TABLE),
    "long by one byte": (lambda data: data + b"\0", TABLE),
    "image of size 0": (table(3, size=0), TABLE),
    "huge size": (table(3, size=2**60), TABLE),
    "huge number of an image": (table(3, sample_id=2**40), TABLE),
    "number of an image twice": (table(3, sample_id=2), TABLE),
    "pointer behind the end": (pointers(moved(3, 10**9)), TABLE),
    "pointer moved by 7": (pointers(moved(COUNT - 1, 7)), ALONE),
    "pointers of one table moved": (table(3, ptr=PAGE + 5), TABLE),
    "pointers exchanged": (pointers(swapped), TABLE),
    "unknown mode": (row(2, mode=9), TABLE),
    "raw mode on a JPEG": (row(2, mode=RAW), TABLE),
    "JPEG mode on raw pixels": (row(4, mode=JPG), ALONE),
    "raw mode with another size": (both(row(4, mode=RAW), table(4, size=7197)), TABLE),
    "height and width 0": (row(2, width=0, height=0), TABLE),
    "other width": (row(2, width=SIZES[2][1] - 8), ALONE),
    "negative label": (row(2, label=-5), TABLE),
    "another label": (row(2, label=0), SUMS),
    "zeroed image": (image(2, lambda data: bytes(len(data))), ALONE),
    "image of noise": (image(2, lambda data: np.random.default_rng(0).bytes(len(data))), ALONE),
    "half an image": (image(2, lambda data: data[: len(data) // 2].ljust(len(data), b"\0")), ALONE),
    "image with a flipped bit": (image(2, flip_a_bit), SUMS),
}


def test_there_are_46_cases_and_the_tables_alone_tell_of_most():
    assert len(CASES) == 46
    assert [sum(found == kind for _, found in CASES.values()) for kind in (TABLE, ALONE, SUMS)] == [38, 6, 2]


@pytest.mark.parametrize("name", CASES)
def test_each_damage_is_found_without_a_crash(root, contents, name):
    harm, needed = CASES[name]
    path = root / "train.beton"
    path.write_bytes(harm(bytearray(contents)))
    good, text = check(root)
    assert not good
    assert str(path) in text
    try:
        open_beton(path)
        found = ALONE
    except DataError:
        found = TABLE
    (root / "manifest.json").unlink()
    (root / "train.beton.index.npz").unlink()
    if check(path)[0]:
        found = SUMS
    assert found == needed


def test_the_undamaged_file_is_whole(root):
    good, text = check(root)
    assert good
    assert "not checked" in text  # the source, which is gone
    assert "problem" not in text


def test_a_file_that_ffcv_wrote_is_checked_without_checksums(tmp_path):
    pytest.importorskip("ffcv")
    import torch

    threads = torch.get_num_threads()
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    torch.set_num_threads(threads)  # importing ffcv sets it to 1
    images = [np.asarray(Image.open(io.BytesIO(jpeg(i, (48, 40 + i))))) for i in range(5)]
    path = tmp_path / "stock.beton"
    writer = DatasetWriter(
        str(path), {"image": RGBImageField(write_mode="jpg"), "label": IntField()}, num_workers=1, page_size=PAGE
    )
    writer.from_indexed_dataset([(image, i % 2) for i, image in enumerate(images)])
    good, text = check(path)
    assert good
    assert "not checked: no checksums: not made by `convert`" in text
    data = bytearray(path.read_bytes())
    start = int(open_beton(path).data_ptr[3])
    data[start + 700 : start + 1400] = np.random.default_rng(0).bytes(700)
    path.write_bytes(data)
    good, text = check(path)
    assert not good
    assert "image 3: cannot be decoded" in text
