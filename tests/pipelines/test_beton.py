import os

import numpy as np
import pytest
import torch

from pipelines.beton import FIELD, FIELDS, HEADER, JPG, RAW, STOCK_FIELDS, field_descriptors, metadata_dtype, open_beton
from ressl.batch import DataError
from tools.beton_writer import EncodedSample, write_beton

COUNT = 20
METADATA = HEADER.itemsize + len(FIELDS) * FIELD.itemsize
ROW = metadata_dtype(FIELDS)


@pytest.fixture
def path(tmp_path):
    draw = np.random.default_rng(0)
    samples = []
    for i in range(COUNT):
        size = (3 + i, 4)
        data = bytes(draw.integers(0, 256, 3 * size[0] * size[1], dtype=np.uint8)) if i % 2 else bytes(50 + i)
        samples.append(EncodedSample(data, RAW if i % 2 else JPG, size, size, i % 3 - 1, i))
    write_beton(tmp_path / "a.beton", samples, COUNT)
    return tmp_path / "a.beton"


def header_of(path):
    return np.fromfile(path, HEADER, 1)[0]


def change(path, offset, data):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def change_header(path, key, value):
    header = header_of(path)
    header[key] = value
    change(path, 0, header.tobytes())


def change_row(path, row, field, value):
    rows = np.fromfile(path, ROW, COUNT, offset=METADATA)
    if field in ROW["image"].names:
        rows["image"][field][row] = value
    else:
        rows[field][row] = value
    change(path, METADATA, rows.tobytes())


def change_table(path, row, field, value):
    start = int(header_of(path)["alloc_table_ptr"])
    column = ("sample_id", "ptr", "size").index(field)
    change(path, start + 24 * row + 8 * column, int(value).to_bytes(8, "little"))


def test_the_layout_is_that_of_ffcv():
    threads = torch.get_num_threads()
    types = pytest.importorskip("ffcv.types")
    torch.set_num_threads(threads)  # importing ffcv sets it to 1
    from ffcv.fields import IntField, RGBImageField

    assert types.HeaderType.itemsize == HEADER.itemsize
    assert [types.HeaderType.fields[name][1] for name in HEADER.names] == [
        HEADER.fields[name][1] for name in HEADER.names
    ]
    assert types.FieldDescType.itemsize == FIELD.itemsize
    for fields in (FIELDS, STOCK_FIELDS):
        theirs = types.get_metadata_type([RGBImageField(), *(IntField() for _ in fields[1:])])
        ours = metadata_dtype(fields)
        assert theirs.itemsize == ours.itemsize
        assert [theirs.fields[f"f{i}"][1] for i in range(len(fields))] == [ours.fields[name][1] for name in fields]


def test_a_stock_file_opens_with_counted_index_and_stored_size(path, tmp_path):
    rows = np.fromfile(path, ROW, COUNT, offset=METADATA)
    content = bytearray(path.read_bytes())
    stock = np.zeros(COUNT, metadata_dtype(STOCK_FIELDS))
    stock["image"], stock["label"] = rows["image"], rows["label"]
    header = header_of(path)
    header["num_fields"] = 2
    start = header.tobytes() + field_descriptors(STOCK_FIELDS).tobytes() + stock.tobytes()
    content[: len(start)] = start
    (tmp_path / "stock.beton").write_bytes(content)
    beton, ours = open_beton(tmp_path / "stock.beton"), open_beton(path)
    assert beton.index.tolist() == list(range(COUNT))
    assert np.array_equal(beton.original, beton.size)
    assert np.array_equal(beton.size, ours.size)
    assert np.array_equal(beton.label, ours.label)


def test_a_file_in_any_order_of_its_table_opens(path):
    start = int(header_of(path)["alloc_table_ptr"])
    table = np.frombuffer(path.read_bytes()[start:], "<u8").reshape(COUNT, 3)
    before = open_beton(path)
    change(path, start, table[::-1].tobytes())
    assert np.array_equal(open_beton(path).data_ptr, before.data_ptr)


def test_a_file_cut_anywhere_is_refused(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.beton"
    header = header_of(path)
    edges = {
        0,
        1,
        HEADER.itemsize,
        METADATA,
        METADATA + ROW.itemsize * COUNT,
        int(header["alloc_table_ptr"]),
        len(whole),
    }
    lengths = {edge + step for edge in edges for step in (-25, -24, -1, 0, 1, 24)} | {10, 2000, 1 << 20, 9 << 20}
    for length in sorted(length for length in lengths if 0 <= length < len(whole)):
        cut.write_bytes(whole)
        os.truncate(cut, length)
        with pytest.raises(DataError, match=r"cut\.beton: .*(truncated|empty|too few|interrupted|not a)"):
            open_beton(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="truncated, extended or damaged"):
        open_beton(cut)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 3, "version 3, expected 2"),
        ("num_fields", 2, "pointer and allocation table differ"),
        ("num_fields", 3, "fields 'image .* expected image, label, index, height, width or image, label"),
        ("num_fields", 900, "truncated|fields"),
        ("num_fields", 0, "header is damaged"),
        ("page_size", 1000, "header is damaged"),
        ("page_size", 1 << 21, None),
        ("num_samples", 0, "holds no images"),
        ("num_samples", COUNT // 2, "allocation table has 20.00 entries for 10 images"),
        ("num_samples", COUNT + 1, "allocation table has 20.00 entries for 21 images"),
        ("num_samples", 2**60, "allocation table"),
        ("alloc_table_ptr", 0, "interrupted"),
        ("alloc_table_ptr", 2**63, "truncated"),
        ("alloc_table_ptr", 100, "allocation table has"),
    ],
)
def test_a_damaged_header_is_refused_with_its_reason(path, key, value, message):
    change_header(path, key, value)
    if message is None:  # smaller pages that no image crosses are as good
        assert open_beton(path).page_size == value
        return
    with pytest.raises(DataError, match=message):
        open_beton(path)


@pytest.mark.parametrize(
    ("row", "field", "value", "message"),
    [
        (3, "mode", 7, "rows 3.: unknown image mode"),
        (2, "width", 0, "rows 2.: impossible height or width"),
        (2, "height", 65535, "original"),
        (3, "width", 5, "raw data"),
        (3, "mode", JPG, None),
        (2, "mode", RAW, "raw data"),
        (5, "data_ptr", 12345, "pointer and allocation table differ"),
        (5, "label", -2, "impossible label"),
        (5, "label", 2**40, "impossible label"),
        (5, "index", -1, "negative index"),
        (5, "index", 6, "index of another image"),
        (5, "height", 0, "impossible original"),
        (5, "width_original", 2**40, "impossible original"),
    ],
)
def test_damaged_metadata_is_refused_with_the_row(path, row, field, value, message):
    if field == "width_original":
        change(path, METADATA + row * ROW.itemsize + ROW.fields["width"][1], value.to_bytes(8, "little"))
    elif field == "height" and value == 0:
        change(path, METADATA + row * ROW.itemsize + ROW.fields["height"][1], bytes(8))
    else:
        change_row(path, row, field, value)
    if message is None:  # only the JPEG decoder can tell
        open_beton(path)
        return
    with pytest.raises(DataError, match=message):
        open_beton(path)


@pytest.mark.parametrize(
    ("row", "field", "value", "message"),
    [
        (4, "sample_id", 5, "list each image once"),
        (4, "sample_id", 2**64 - 1, "list each image once"),
        (4, "ptr", 100, "outside the data region"),
        (4, "ptr", 2**64 - 1, "outside the data region"),
        (4, "size", 0, "outside the data region"),
        (4, "size", 2**64 - 1, "outside the data region"),
        (19, "size", 8 << 20, "outside the data region"),
        (4, "size", 60, "overlaps"),
        (4, "ptr", (8 << 20) + 7, "differ"),
    ],
)
def test_a_damaged_allocation_table_is_refused(path, row, field, value, message):
    change_table(path, row, field, value)
    with pytest.raises(DataError, match=message):
        open_beton(path)


def test_data_across_the_end_of_a_page_is_refused(tmp_path):
    samples = [EncodedSample(bytes(3 << 20), JPG, (4, 4), (4, 4), 0, i) for i in range(2)]
    write_beton(tmp_path / "a.beton", samples, 2)
    change_header(tmp_path / "a.beton", "page_size", 1 << 22)
    with pytest.raises(DataError, match="crosses the end of a page"):
        open_beton(tmp_path / "a.beton")


def test_flipped_bits_in_the_tables_never_crash(path):
    whole = bytearray(path.read_bytes())
    start = int(header_of(path)["alloc_table_ptr"])
    places = [
        *range(HEADER.itemsize),
        *range(HEADER.itemsize, METADATA, 83),
        *range(METADATA, METADATA + COUNT * ROW.itemsize, 3),
    ]
    places += range(start, len(whole), 2)
    refused = 0
    for i, place in enumerate(places):
        change(path, place, bytes([whole[place] ^ (1 << i % 8)]))
        try:
            open_beton(path)
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
        change(path, place, whole[place : place + 1])
    assert refused > len(places) / 2
    open_beton(path)


def test_what_is_no_beton_file_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "text").write_text("this is not a data set\n" * 100)
    (tmp_path / "empty").touch()
    for name, message in [
        ("fifo", "not a regular file"),
        ("text", "not a .beton file"),
        ("empty", "is empty"),
        ("missing", "no such file"),
        (".", "not a regular file"),
    ]:
        with pytest.raises(DataError, match=message):
            open_beton(tmp_path / name)


def test_the_tables_of_many_samples_are_checked_quickly(tmp_path):
    count = 200_000
    sample = EncodedSample(bytes(48), RAW, (4, 4), (4, 4), 0, 0)
    samples = (EncodedSample(sample.data, RAW, (4, 4), (4, 4), 0, i) for i in range(count))
    write_beton(tmp_path / "a.beton", samples, count)
    begin = os.times().user
    assert len(open_beton(tmp_path / "a.beton").label) == count
    assert os.times().user - begin < 2
