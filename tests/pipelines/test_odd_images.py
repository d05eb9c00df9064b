"""One policy for odd images: each has one stated outcome, at once and in little memory."""

import io
import os
import re
import resource
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.images import BadImage, decode_image, decoded_size, read_file, read_image

NOBODY = 65534


def picture(height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)


def encoded(image, file_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def png(colour_type, bits, pixels, sides=(64, 48)):
    """`pixels` are the rows as they are stored. Pillow writes no 16-bit colours, and would need 400 MB for 400 Mpx."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", *sides, bits, colour_type, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def with_sides(jpeg, height, width=None):
    """The same JPEG under a header that lies."""
    at = re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", jpeg).end()
    old = struct.unpack(">HH", jpeg[at : at + 4])
    return jpeg[:at] + struct.pack(">HH", height or old[0], width or old[1]) + jpeg[at + 4 :]


def flipped(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


OUTCOMES = {  # the image's height and width, or the reason against it
    "good.jpg": (48, 64), "png named.jpg": (48, 64), "bmp named.jpg": (48, 64), "webp.webp": (48, 64),
    "tiff.tif": (48, 64), "progressive.jpg": (48, 64), "grey.jpg": (48, 64), "cmyk.jpg": (48, 64),
    "rgba.png": (48, 64), "palette.png": (48, 64), "16-bit grey.png": (48, 64), "16-bit rgb.png": (48, 64),
    "rotated.jpg": (48, 64), "one pixel.jpg": (1, 1), "thin.jpg": (3, 500), "garbage behind.jpg": (48, 64),
    "sp ace \u00fcn\u00efc\u00f8d\u00e9 \u6f22\u5b57.jpg": (48, 64), "other pixels.jpg": (48, 64),
    "broken.jpg": "broken data stream", "half.jpg": "truncated", "tail.jpg": "truncated",
    "head.jpg": "cannot be decoded", "no image.jpg": "cannot be decoded", "empty.jpg": "empty file",
    "gif named.jpg": "a GIF", "text.jpg": "not an image", "html.jpg": "not an image", "random.jpg": "not an image",
    "20000x20000.png": "20000 x 20000 is 400 Mpx, over the limit of 89 Mpx",
    "65500x65500.jpg": "65500 x 65500 is 4290 Mpx, over the limit", "doubled.jpg": "its data end before its pixels do",
    "unreadable.jpg": "permission denied", "directory.jpg": "directory", "dangling.jpg": "dangling link",
    "fifo.jpg": "FIFO",
}  # fmt: skip


def write_odd_files(root):
    image = Image.fromarray(picture())
    turned = Image.Exif()
    turned[0x0112] = 6
    good, draw = encoded(image), np.random.default_rng(1)
    table, huffman, scan = (good.find(b"\xff" + marker) for marker in (b"\xdb", b"\xc4", b"\xda"))
    files = {
        "good.jpg": good, "sp ace \u00fcn\u00efc\u00f8d\u00e9 \u6f22\u5b57.jpg": good, "unreadable.jpg": good,
        "half.jpg": good[: (scan + len(good)) // 2], "tail.jpg": good[:-10], "head.jpg": good[:100], "empty.jpg": b"",
        "no image.jpg": b"\xff\xd8\xff\xd9", "garbage behind.jpg": good + draw.bytes(4096),
        "other pixels.jpg": flipped(good, table + 5), "broken.jpg": flipped(good, huffman + 5),
        "png named.jpg": encoded(image, "PNG"), "bmp named.jpg": encoded(image, "BMP"),
        "gif named.jpg": encoded(image, "GIF"), "webp.webp": encoded(image, "WEBP"), "tiff.tif": encoded(image, "TIFF"),
        "progressive.jpg": encoded(image, progressive=True), "grey.jpg": encoded(image.convert("L")),
        "cmyk.jpg": encoded(image.convert("CMYK")), "rgba.png": encoded(image.convert("RGBA"), "PNG"),
        "palette.png": encoded(image.convert("P"), "PNG"), "16-bit grey.png": png(0, 16, bytes(48 * (1 + 128))),
        "16-bit rgb.png": png(2, 16, bytes(48 * (1 + 384))), "rotated.jpg": encoded(image, exif=turned),
        "one pixel.jpg": encoded(Image.new("RGB", (1, 1))), "thin.jpg": encoded(image.resize((500, 3))),
        "20000x20000.png": png(0, 1, bytes(20_000 * 2501), sides=(20_000, 20_000)),
        "65500x65500.jpg": with_sides(good, 65500, 65500), "doubled.jpg": with_sides(good, 96),
        "text.jpg": b"this is not an image\n" * 50, "html.jpg": b"<html><body>404 not found</body></html>",
        "random.jpg": draw.bytes(5000),
    }  # fmt: skip
    for name, data in files.items():
        (root / name).write_bytes(data)
    (root / "unreadable.jpg").chmod(0)
    (root / "directory.jpg").mkdir()
    (root / "dangling.jpg").symlink_to(root / "nowhere")
    os.mkfifo(root / "fifo.jpg")


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A directory with a file of every kind in OUTCOMES."""
    root = tmp_path_factory.mktemp("odd")
    write_odd_files(root)
    return root


@contextmanager
def little_memory(mebibytes) -> Iterator[None]:
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + mebibytes * 2**20, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def outcome(path):
    try:
        return read_image(path).shape[:2]
    except BadImage as bad:
        return str(bad)


def test_every_odd_file_has_one_outcome_at_once_and_in_little_memory(odd):
    assert {path.name for path in odd.iterdir()} == set(OUTCOMES)
    found, began = {}, time.monotonic()
    with little_memory(mebibytes=64):
        for name in OUTCOMES.keys() - {"unreadable.jpg"}:
            found[name] = outcome(odd / name)
    with as_nobody():
        found["unreadable.jpg"] = outcome(odd / "unreadable.jpg")
    assert time.monotonic() - began < 5
    wrong = {
        name: found[name]
        for name, expected in OUTCOMES.items()
        if not (expected in found[name] if isinstance(expected, str) else found[name] == expected)
    }
    assert wrong == {}


@pytest.mark.parametrize("name", [name for name, expected in OUTCOMES.items() if name != "unreadable.jpg"])
def test_its_size_is_told_or_refused_for_the_same_reason(odd, name):
    try:
        found = decoded_size(read_file(odd / name))
    except BadImage as bad:
        found = str(bad)
    assert found == outcome(odd / name)


def test_other_pixels_are_read_as_they_are(odd):
    assert not np.array_equal(read_image(odd / "other pixels.jpg"), read_image(odd / "good.jpg"))


def test_what_is_no_file_is_refused():
    with pytest.raises(BadImage, match="device"):
        read_file("/dev/zero")
    with pytest.raises(BadImage, match="no such file"):
        read_file("/nowhere/missing.jpg")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("restart", [0, 2])
def test_a_jpeg_whose_data_end_early_is_refused(progressive, subsampling, mode, restart):
    image = Image.fromarray(picture()).convert(mode)
    options = {"progressive": progressive, "subsampling": subsampling, "restart_marker_blocks": restart}
    data = encoded(image, **options)
    for lie in (96, 72, 65):
        with pytest.raises(BadImage, match="end before its pixels"):
            decode_image(with_sides(data, lie))
        with pytest.raises(BadImage, match="end before its pixels"):
            decoded_size(with_sides(data, lie))


@pytest.mark.parametrize("sides", [(1, 1), (8, 8), (17, 33), (48, 64)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_whole_jpeg_that_ends_in_middle_grey_is_read(sides, progressive, mode):
    grey = Image.new(mode, sides, {"RGB": (128, 128, 128), "L": 128, "CMYK": (127, 127, 127, 127)}[mode])
    data = encoded(grey, progressive=progressive) + b"\xff\xff\xd9 and more"
    assert decode_image(data).shape[:2] == decoded_size(data) == sides[::-1]


def test_a_cut_jpeg_that_was_given_an_end_is_refused():
    data = encoded(Image.fromarray(picture()))
    with pytest.raises(BadImage, match="end before its pixels"):
        decode_image(data[: 3 * len(data) // 4] + b"\xff\xd9")


def test_twelve_bits_are_refused_as_they_would_be_nearly_black():
    data = bytearray(encoded(Image.fromarray(picture()[:, :, 0].astype(np.uint16)), "TIFF"))
    bits = data.find(struct.pack("<HHI", 258, 3, 1)) + 8
    assert data[bits] == 16
    data[bits] = 12
    with pytest.raises(BadImage, match="12-bit"):
        decode_image(bytes(data))
