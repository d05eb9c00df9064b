"""What is stored of one image: as it is where it can be, and else as the options say, with all changes noted."""

import errno
import io
import os
import re
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.beton import JPG, RAW
from pipelines.images import decode_image, read_file
from ressl.batch import DataError
from tools.encode import Encoded, Options, Skipped, changes_of, encode, lossy, prepare, read_options
from tools.image_sets.image_set import ImageSet
from tools.rows import ROW, SUFFIXES

ORIGINAL = Options("ffcv", mode="original")
SHARDS = Options("webdataset")


def pixels(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """Smooth, so that JPEG changes it little."""
    few = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC))


def file_of(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, image: np.ndarray | None = None, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(pixels() if image is None else image, exif=exif.tobytes(), **options)


def image_set(*found: bytes | np.ndarray) -> ImageSet:
    labels = np.arange(len(found), dtype=np.int64) + 5
    return ImageSet(labels, (), lambda i: f"a\udcff/{i}.jpg", lambda i: found[i], lambda i: (len(found[i]), 10 + i))


def encoded(found: bytes | np.ndarray, options: Options) -> Encoded:
    one = encode(image_set(found), options, 0)
    assert isinstance(one, Encoded), one
    return one


def changes(one: Encoded) -> set[str]:
    return set(changes_of(np.array([one.row], ROW)))


# --- files as they are -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize(
    "data",
    [file_of(pixels()), file_of(pixels(), progressive=True), file_of(pixels()[:, :, 0]), turned(1), turned(6)],
    ids=["baseline", "progressive", "grey", "upright", "turned"],
)
def test_jpeg_files_are_untouched(data, check):
    for options in (Options("ffcv", mode="original", check=check), Options("webdataset", check=check)):
        one = encoded(data, options)
        assert one.data == data
        assert (int(one.row["mode"]), SUFFIXES[one.row["kind"]], changes(one)) == (JPG, ".jpg", set())
        assert one.row["size"].tolist() == one.row["original"].tolist() == [60, 80]


KINDS = [("PNG", ".png"), ("WEBP", ".webp"), ("BMP", ".bmp"), ("TIFF", ".tif")]


@pytest.mark.parametrize("check", ["decode", "header"])
@pytest.mark.parametrize(("kind", "suffix"), KINDS)
def test_shards_keep_files_of_every_kind(kind, suffix, check):
    data = file_of(pixels(), kind)
    one = encoded(data, Options("webdataset", check=check))
    assert one.data == data
    assert (SUFFIXES[one.row["kind"]], changes(one)) == (suffix, set())
    assert one.row["size"].tolist() == [60, 80]


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS])
def test_a_beton_gets_files_of_other_kinds_as_jpeg(kind):
    one = encoded(file_of(pixels(), kind), ORIGINAL)
    assert (one.data[:2], int(one.row["mode"]), changes(one)) == (b"\xff\xd8", JPG, {"encoded anew"})
    assert np.abs(decode_image(one.data).astype(int) - pixels()).mean() < 4


def test_what_a_decoder_for_jpeg_may_not_read_is_encoded_anew_in_a_beton_and_kept_in_shards():
    cmyk = file_of(Image.fromarray(pixels()).convert("CMYK"))
    more = file_of(pixels()) + b"what follows the end"
    for data, noted in ((cmyk, {"CMYK", "encoded anew"}), (more, {"encoded anew"})):
        one = encoded(data, ORIGINAL)
        assert one.data != data
        assert changes(one) == noted
        assert Image.open(io.BytesIO(one.data)).mode == "RGB"
        assert encoded(data, SHARDS).data == data


@pytest.mark.parametrize("options", [ORIGINAL, SHARDS], ids=["ffcv", "webdataset"])
def test_what_is_too_large_is_encoded_anew_and_its_size_is_kept(options):
    options = Options(options.to, options.mode, max_side=40)
    one = encoded(file_of(pixels()), options)
    assert decode_image(one.data).shape == (30, 40, 3)
    assert (one.row["size"].tolist(), one.row["original"].tolist()) == ([30, 40], [60, 80])
    assert changes(one) == {"encoded anew"}
    small = file_of(pixels(40, 30))
    assert encoded(small, options).data == small


def test_a_side_that_no_jpeg_can_have_is_left_out_or_shrunk():
    data = file_of(Image.new("L", (65501, 1)), "PNG")
    for options in (ORIGINAL, SHARDS, Options("tensor")):
        one = encode(image_set(data), options, 0)
        assert isinstance(one, Skipped)
        assert one.reason == "65501 x 1: a side over 65500 pixels; --max-side would shrink it"
    assert encoded(data, Options("ffcv", max_side=100)).row["size"].tolist() == [1, 100]


def test_arrays_become_png_files_in_shards_and_jpeg_files_when_they_are_shrunk():
    one = encoded(pixels(), SHARDS)
    assert (one.data[:4], SUFFIXES[one.row["kind"]], changes(one)) == (b"\x89PNG", ".png", set())
    assert np.array_equal(decode_image(one.data), pixels())
    small = encoded(pixels(), Options("webdataset", max_side=40))
    assert (SUFFIXES[small.row["kind"]], small.row["size"].tolist()) == (".jpg", [30, 40])


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_header_is_enough_only_where_that_is_asked_for():
    """A JPEG whose second half is gone, but that ends as it should."""
    whole = file_of(pixels(), quality=95)
    cut = whole[: len(whole) // 2] + b"\xff\xd9"
    for to, mode in (("ffcv", "original"), ("webdataset", "auto")):
        one = encode(image_set(cut), Options(to, mode, check="decode"), 0)
        assert isinstance(one, Skipped)
        assert (one.index, one.name, one.stamp) == (0, "a\ufffd/0.jpg", (len(cut), 10))
        assert "cannot be decoded" in one.reason
        assert encoded(cut, Options(to, mode, check="header")).data == cut
    for options in (Options("ffcv", mode="jpg", check="header"), Options("tensor", check="header")):
        assert isinstance(encode(image_set(cut), options, 0), Skipped)  # it is decoded all the same


@pytest.mark.parametrize("data", [b"", b"text", b"GIF89a" + bytes(99), file_of(pixels())[:300]])
@pytest.mark.parametrize("check", ["decode", "header"])
def test_what_shows_in_the_header_is_left_out_either_way(data, check):
    for to, mode in (("ffcv", "original"), ("ffcv", "auto"), ("tensor", "auto"), ("webdataset", "auto")):
        assert isinstance(encode(image_set(data), Options(to, mode, check=check), 0), Skipped)


# --- raw, JPEG, or some of each --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [Options("tensor"), Options("ffcv", mode="raw")], ids=["tensor", "ffcv"])
def test_raw_images_are_their_pixels(options):
    for found in (pixels(), file_of(pixels(), "PNG")):
        one = encoded(found, options)
        assert (one.data, int(one.row["mode"]), changes(one)) == (pixels().tobytes(), RAW, set())


@pytest.mark.parametrize(("height", "width", "mode"), [(64, 64, RAW), (32, 128, RAW), (64, 65, JPG), (80, 80, JPG)])
def test_auto_keeps_small_images_raw(height, width, mode):
    assert int(encoded(pixels(height, width), Options("ffcv")).row["mode"]) == mode
    assert int(encoded(pixels(8 * height, 8 * width), Options("ffcv", max_side=max(height, width))).row["mode"]) == mode


def test_jpg_encodes_every_image_with_the_quality_that_was_asked_for():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sizes = [len(encoded(noise, Options("ffcv", mode="jpg", quality=quality)).data) for quality in (50, 75, 90, 100)]
    assert sizes == sorted(set(sizes))
    one = encoded(file_of(noise, quality=100), Options("ffcv", mode="jpg", quality=50))
    assert len(one.data) < 1.2 * sizes[0]


def test_smart_stores_a_share_as_jpeg_always_the_same():
    """Sampling error: three standard deviations."""
    images = image_set(*[pixels(8, 8)] * 1000)

    def as_jpeg(share: float) -> set[int]:
        options = Options("ffcv", mode="smart", jpg_share=share)
        return {i for i in range(1000) if int(encode(images, options, i).row["mode"]) == JPG}

    for share in (0.1, 0.5, 0.8):
        assert abs(len(as_jpeg(share)) - 1000 * share) < 3 * (1000 * share * (1 - share)) ** 0.5
    assert as_jpeg(0.5) == as_jpeg(0.5)
    assert as_jpeg(0.1) < as_jpeg(0.5)
    assert (as_jpeg(0), len(as_jpeg(1))) == (set(), 1000)
    half = as_jpeg(0.5)
    runs = np.diff([i in half for i in range(1000)]).sum()
    assert abs(runs - 500) < 50  # spread, not in blocks


# --- turned images ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_noted_rotation_is_applied_where_that_is_asked_for(orientation):
    data = turned(orientation, kind="PNG")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    one = encoded(data, Options("tensor", exif_rotate=True))
    assert one.data == upright.tobytes()
    assert one.row["size"].tolist() == one.row["original"].tolist() == list(upright.shape[:2])
    assert changes(one) == ({"rotated"} if orientation > 1 else set())
    assert encoded(data, Options("tensor")).data == pixels().tobytes()


@pytest.mark.parametrize("options", [ORIGINAL, SHARDS], ids=["ffcv", "webdataset"])
def test_files_that_have_to_be_turned_are_encoded_anew_and_not_turned_twice(options):
    options = Options(options.to, options.mode, exif_rotate=True)
    for orientation in (0, 1, 9):
        assert encoded(turned(orientation), options).data == turned(orientation)
    one = encoded(turned(6), options)
    assert changes(one) == {"rotated", "encoded anew"}
    assert one.row["size"].tolist() == one.row["original"].tolist() == [80, 60]
    with Image.open(io.BytesIO(one.data)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert np.abs(np.asarray(image).astype(int) - np.rot90(pixels(), -1)).mean() < 4


# --- what is noted ---------------------------------------------------------------------------------------------------


def test_the_row_of_an_image_says_what_is_stored():
    images = image_set(pixels(), pixels(20, 30), pixels(50, 40))
    one = encode(images, Options("tensor", max_side=40), 2)
    row = one.row
    assert (int(row["index"]), int(row["label"]), int(row["length"])) == (2, 7, 3 * 40 * 32)
    assert int(row["crc32"]) == zlib.crc32(one.data)
    assert (row["size"].tolist(), row["original"].tolist(), row["stamp"].tolist()) == ([40, 32], [50, 40], [50, 12])


def test_every_change_is_counted():
    odd = [
        (Image.fromarray(pixels()).convert("P"), "PNG", {"palette"}),
        (Image.fromarray(pixels()).convert("RGBA"), "PNG", {"alpha"}),
        (Image.fromarray(pixels()).convert("L"), "PNG", {"grey"}),
        (Image.fromarray(pixels()).convert("LA"), "PNG", {"alpha", "grey"}),
        (Image.fromarray(pixels()[:, :, 0].astype(np.uint16) * 257), "PNG", {"16-bit", "grey"}),
        (Image.fromarray(pixels()).convert("CMYK"), "JPEG", {"CMYK"}),
    ]
    rows = []
    for image, kind, noted in odd:
        one = encoded(file_of(image, kind), Options("ffcv", mode="raw"))
        assert changes(one) == noted
        rows.append(one.row)
    assert changes_of(np.array(rows, ROW)) == {"CMYK": 1, "16-bit": 1, "palette": 1, "alpha": 2, "grey": 3}


def test_only_what_may_encode_with_loss_is_called_lossy():
    assert [lossy(Options("ffcv", mode=mode)) for mode in ("auto", "jpg", "raw", "smart", "original")] == [
        True, True, False, True, True,
    ]  # fmt: skip
    assert (lossy(Options("tensor")), lossy(SHARDS)) == (False, True)


@pytest.mark.parametrize("mode", ["original", "jpg"])
def test_pixels_that_become_files_in_a_beton_count_as_encoded_anew_only_where_files_were_to_be_kept(mode):
    one = encoded(pixels(), Options("ffcv", mode=mode))
    assert one.data[:2] == b"\xff\xd8"
    assert changes(one) == ({"encoded anew"} if mode == "original" else set())


@pytest.mark.parametrize(
    ("options", "read"),
    [
        (Options("tensor"), set()),
        (Options("ffcv"), {"mode", "quality"}),
        (Options("ffcv", mode="raw"), {"mode"}),
        (Options("ffcv", mode="smart"), {"mode", "quality", "jpg_share"}),
        (ORIGINAL, {"mode", "quality", "check"}),
        (SHARDS, {"quality", "check", "shard_mb"}),
    ],
    ids=lambda given: f"{given.to}-{given.mode}" if isinstance(given, Options) else "",
)
def test_only_the_options_that_are_read_decide_the_bytes(options, read):
    """Each of the others may have any value: no byte changes."""
    assert set(read_options(options)) == read | {"to", "max_side", "exif_rotate", "shuffle"}
    images = image_set(file_of(pixels()), pixels(), pixels(200, 200), file_of(pixels(), "PNG"))
    others = {"mode": "raw", "quality": 40, "jpg_share": 0.0, "check": "header", "shard_mb": 3}
    for name in set(others) - read:
        for i in range(4):
            one, other = encode(images, options, i), encode(images, replace(options, **{name: others[name]}), i)
            assert (one.data, one.row.tobytes()) == (other.data, other.row.tobytes()), name


@pytest.mark.parametrize("number", [errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM], ids=errno.errorcode.get)
@pytest.mark.parametrize("options", [ORIGINAL, Options("tensor")], ids=["original", "tensor"])
def test_an_image_whose_source_is_away_is_not_left_out(tmp_path, monkeypatch, options, number):
    """Else a server that is away for a minute takes thousands of images with it."""
    (tmp_path / "1.jpg").write_bytes(file_of(pixels()))

    def away(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    images = replace(image_set(b""), read=lambda _: read_file(tmp_path / "1.jpg"))
    with monkeypatch.context() as patched:
        patched.setattr(io, "FileIO", away)
        message = (
            f"a\ufffd/0.jpg: cannot be read: {os.strerror(number).lower()}; the same command goes on when it can be"
        )
        with pytest.raises(DataError, match=re.escape(message)):
            encode(images, options, 0)
    assert isinstance(encode(images, options, 0), Encoded)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES], ids=errno.errorcode.get)
def test_an_image_that_the_disk_does_not_give_is_left_out(tmp_path, monkeypatch, number):
    (tmp_path / "1.jpg").write_bytes(file_of(pixels()))

    def broken(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(io, "FileIO", broken)
    one = encode(replace(image_set(b""), read=lambda _: read_file(tmp_path / "1.jpg")), ORIGINAL, 0)
    assert isinstance(one, Skipped)
    assert one.reason == f"cannot be read: {os.strerror(number).lower()}"


def test_an_error_that_is_not_of_the_image_comes_through():
    def read(_: int) -> bytes:
        raise DataError("the archive is gone")

    images = ImageSet(np.zeros(1, np.int64), (), str, read, lambda _: (-1, -1))
    with pytest.raises(DataError, match="the archive is gone"):
        encode(images, ORIGINAL, 0)


def test_shrinking_is_antialiased():
    """A fine chessboard becomes grey and not another chessboard."""
    board = np.repeat((np.indices((400, 400)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    image, original, _ = prepare(board, Options("tensor", max_side=70))
    assert (image.size, original) == ((70, 70), (400, 400))
    assert np.abs(np.asarray(image).astype(int) - 127).max() <= 8
