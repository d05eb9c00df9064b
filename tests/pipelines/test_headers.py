"""Sizes read off headers: right where they are given, and given only for what DALI decodes as Pillow does."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipelines.headers import plain_size, read_regular
from pipelines.images import MAX_BYTES


def picture(height: int = 30, width: int = 50) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(depth: int, colour: int, interlaced: int = 0) -> bytes:
    """The header and the end of a PNG file, without pixels."""
    header = struct.pack(">IIBBBBB", 50, 30, depth, colour, 0, 0, interlaced)

    def part(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", b"") + part(b"IEND", b"")


PLAIN = {
    "jpeg": encode(picture(), "JPEG"),
    "grey jpeg": encode(picture().convert("L"), "JPEG"),
    "progressive jpeg": encode(picture(), "JPEG", progressive=True),
    "jpeg with a comment and a thumbnail": encode(picture(), "JPEG", comment=b"\xff\xd8" * 99, exif=b"Exif\0\0" * 99),
    "jpeg with restarts": encode(picture(), "JPEG", restart_marker_rows=1),
    "png": encode(picture(), "PNG"),
    "palette png": encode(picture().convert("P"), "PNG"),
    "png with alpha": encode(picture().convert("RGBA"), "PNG"),
    "png of 8 bits": png(8, 2),
}
OTHERS = {
    "webp": encode(picture(), "WEBP"),
    "tiff": encode(picture(), "TIFF"),
    "bmp": encode(picture(), "BMP"),
    "gif": encode(picture(), "GIF"),
    "cmyk jpeg": encode(picture().convert("CMYK"), "JPEG"),
    "rgb jpeg": encode(picture(), "JPEG", keep_rgb=True),
    "png of 16 bits": png(16, 2),
    "interlaced png": png(8, 2, interlaced=1),
    "nothing": b"",
    "text": b"text" * 100,
    "jpeg cut in the middle": encode(picture(), "JPEG")[:500],
    "jpeg cut in the header": encode(picture(), "JPEG")[:100] + b"\xff\xd9",
    "jpeg without its last byte": encode(picture(), "JPEG")[:-1],
    "jpeg with a tail": encode(picture(), "JPEG") + b"tail",
    "start and end of a jpeg": b"\xff\xd8\xff\xd9",
    "png cut": encode(picture(), "PNG")[:-1],
    "start and end of a png": png(8, 2)[:16] + png(8, 2)[-12:],
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_size_of_plain_files_is_read_off_their_header(name):
    assert plain_size(PLAIN[name]) == (30, 50)


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_and_damaged_files_are_left_to_the_decoder_of_the_host(name):
    assert plain_size(OTHERS[name]) is None


@pytest.mark.parametrize(("height", "width"), [(0, 50), (30, 0), (65500, 65500)])
def test_impossible_sizes_are_left_to_the_decoder_of_the_host(height, width):
    data = bytearray(PLAIN["jpeg"])
    struct.pack_into(">HH", data, data.find(b"\xff\xc0") + 5, height, width)
    assert plain_size(bytes(data)) is None


def test_every_cut_and_every_changed_byte_of_a_header_gives_a_size_or_none():
    for whole in (PLAIN["jpeg"], PLAIN["png"]):
        end = whole[-12:]
        for at in range(min(len(whole), 700)):
            plain_size(whole[:at])
            plain_size(whole[:at] + end)
            assert plain_size(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]) != (0, 0)


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"bytes")
    assert read_regular(tmp_path / "file") == b"bytes"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name in ("fifo", "link", "huge", ".", "missing"):
        assert read_regular(tmp_path / name) is None
