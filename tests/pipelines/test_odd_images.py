"""One policy for odd images: each has one stated outcome, at once and in little memory."""

import io
import os
import re
import resource
import struct
import time
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


def with_sides(jpeg, height, width=None):
    """The same JPEG under a header that lies."""
    at = re.search(rb"\xff[\xc0\xc2]\0[\x0b\x11\x14]\x08", jpeg).end()
    old = struct.unpack(">HH", jpeg[at : at + 4])
    return jpeg[:at] + struct.pack(">HH", height or old[0], width or old[1]) + jpeg[at + 4 :]


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


def test_every_odd_file_has_one_outcome_at_once_and_in_little_memory(odd_images):
    odd, outcomes = odd_images
    assert {path.name for path in odd.iterdir()} == set(outcomes)
    found, began = {}, time.monotonic()
    with little_memory(mebibytes=64):
        for name in outcomes.keys() - {"unreadable.jpg"}:
            found[name] = outcome(odd / name)
    with as_nobody():
        found["unreadable.jpg"] = outcome(odd / "unreadable.jpg")
    assert time.monotonic() - began < 5
    wrong = {
        name: found[name]
        for name, expected in outcomes.items()
        if not (expected in found[name] if isinstance(expected, str) else found[name] == expected)
    }
    assert wrong == {}


def test_its_size_is_told_or_refused_for_the_same_reason(odd_images):
    odd, outcomes = odd_images
    for name in outcomes.keys() - {"unreadable.jpg"}:
        try:
            found = decoded_size(read_file(odd / name))
        except BadImage as bad:
            found = str(bad)
        assert found == outcome(odd / name), name


def test_other_pixels_are_read_as_they_are(odd_images):
    odd, _ = odd_images
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
