import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.images import (
    CHANGES,
    BadImage,
    decode_image,
    decoded_size,
    describe_ignored,
    fit_max_side,
    open_image,
    read_image,
    scan_folder,
)
from ressl.batch import DataError

BLACK, WHITE = Image.new("RGB", (64, 48)), Image.new("RGB", (64, 48), (255, 255, 255))


def picture(height=48, width=64):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], axis=2).astype(np.uint8)


def encoded(image, file_format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def fill(root: Path, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def png(colour_type, bits, pixels):
    """`pixels` are the rows as they are stored. Pillow writes no 16-bit colours."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 64, 48, bits, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels, 1)) + chunk(b"IEND", b"")
    )


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


# --- one image -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_give_the_pixels_back_whatever_the_name(tmp_path, file_format):
    path = tmp_path / "named.jpg"
    path.write_bytes(encoded(Image.fromarray(picture()), file_format))
    assert np.array_equal(read_image(path), picture())


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_lossy_formats_give_nearly_the_pixels_back(file_format):
    result = decode_image(encoded(Image.fromarray(picture()), file_format, quality=95))
    assert result.dtype == np.uint8
    assert result.flags.writeable
    assert np.abs(result.astype(int) - picture()).mean() < 4


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_every_colour_mode_becomes_rgb(mode):
    image = Image.fromarray(picture()).convert(mode)
    result = decode_image(encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"))
    assert result.shape == (48, 64, 3)
    assert np.abs(result.astype(int) - np.asarray(image.convert("RGB"))).max() <= 1


def test_alpha_is_dropped_and_not_blended():
    rgba = np.dstack([picture(), np.zeros((48, 64), np.uint8)])
    assert np.array_equal(decode_image(encoded(Image.fromarray(rgba), "PNG")), picture())


def test_a_palette_with_transparency_gives_no_warning():
    image = Image.fromarray(picture()).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_image(encoded(image, "PNG", transparency=bytes([0, 128, 255]))).shape == (48, 64, 3)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_cut(file_format):
    grey = picture()[:, :, 0]
    result = decode_image(encoded(Image.fromarray(grey.astype(np.uint16) * 257), file_format))
    assert np.array_equal(result, np.repeat(grey[:, :, None], 3, axis=2))


def test_a_float_image_is_refused():
    with pytest.raises(BadImage, match="32-bit"):
        decode_image(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


# what Pillow's viewers do with the values of the EXIF orientation
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF", "TIFF, compressed"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_rotation_is_applied_only_where_asked_for(orientation, file_format):
    options = {"exif": oriented(orientation)}
    if file_format == "WEBP":
        options["lossless"] = True
    if file_format == "TIFF, compressed":
        options["compression"] = "tiff_lzw"
    data = encoded(Image.fromarray(picture()), file_format.split(",")[0], **options)
    stored, made = open_image(data)
    assert np.array_equal(stored, picture()) and made == ()
    assert np.array_equal(decode_image(data), picture()) and decoded_size(data) == (48, 64)
    turned, made = open_image(data, upright=True)
    assert np.array_equal(turned, UPRIGHT[orientation](picture()))
    assert made == (("rotated",) if orientation > 1 else ())


def test_a_jpeg_is_turned_and_an_unknown_orientation_is_none():
    image = Image.fromarray(picture())
    turned, made = open_image(encoded(image, exif=oriented(6)), upright=True)
    assert turned.size == (48, 64) and made == ("rotated",)
    kept, made = open_image(encoded(image, exif=oriented(9)), upright=True)
    assert kept.size == (64, 48) and made == ()


@pytest.mark.parametrize(
    ("data", "made"),
    [
        (encoded(Image.fromarray(picture())), ()),
        (encoded(Image.fromarray(picture()).convert("YCbCr"), "TIFF"), ()),
        (encoded(Image.fromarray(picture()).convert("L")), ("grey",)),
        (encoded(Image.fromarray(picture()).convert("1"), "PNG"), ("grey",)),
        (encoded(Image.fromarray(picture()).convert("LA"), "PNG"), ("alpha", "grey")),
        (encoded(Image.new("RGBA", (64, 48), (9, 9, 9, 9)), "WEBP"), ("alpha",)),
        (encoded(Image.fromarray(picture()), "PNG", transparency=(0, 0, 0)), ("alpha",)),
        (encoded(Image.fromarray(picture()).convert("P"), "PNG", transparency=3), ("palette", "alpha")),
        (encoded(Image.fromarray(picture()).convert("PA"), "TIFF"), ("palette", "alpha")),
        (encoded(Image.fromarray(picture()).convert("CMYK")), ("CMYK",)),
        (png(0, 16, bytes(48 * (1 + 128))), ("16-bit", "grey")),
        (png(6, 16, bytes(48 * (1 + 512))), ("16-bit", "alpha")),
        *(
            (encoded(BLACK, kind, save_all=True, append_images=[WHITE]), ("frames",))
            for kind in ("PNG", "WEBP", "TIFF", "MPO")
        ),
    ],
)  # fmt: skip
def test_what_was_done_to_an_image_is_told_in_the_order_of_changes(data, made):
    image, found = open_image(data)
    assert found == made and sorted(found, key=CHANGES.index) == list(found)
    assert image.mode == "RGB" and np.array_equal(image, decode_image(data))
    assert decoded_size(data) == (48, 64)


def test_what_else_a_file_says_does_not_get_into_another():
    words = {"exif": oriented(6), "icc_profile": b"a profile of some colours", "comment": b"a comment"}
    for upright in (False, True):
        image, _ = open_image(encoded(Image.fromarray(picture()), **words), upright)
        assert image.info == {}
        again = encoded(image, quality=90)
        assert not any(word in again for word in (b"Exif", b"a profile", b"a comment"))


def test_cmyk_is_inverted_in_a_jpeg_as_adobe_writes_it_and_not_in_a_tiff():
    flat = Image.new("CMYK", (16, 16), (10, 200, 100, 0))
    for file_format in ("JPEG", "TIFF"):
        assert np.abs(decode_image(encoded(flat, file_format)).astype(int) - (245, 55, 155)).max() <= 3
    assert flat.tobytes()[:4] in encoded(flat, "TIFF")


def test_sixteen_bit_colours_are_reduced_and_not_cut():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in picture().astype(np.uint16) * 257)
    assert np.array_equal(decode_image(png(2, 16, rows)), picture())


def test_the_first_of_several_frames_counts():
    others = [Image.new("RGB", (64, 48))] * 2
    data = encoded(Image.fromarray(picture()), "TIFF", save_all=True, append_images=others)
    assert np.array_equal(decode_image(data), picture())


def test_a_header_that_promises_too_many_pixels_is_refused_without_decoding_or_warning():
    data = bytearray(encoded(Image.fromarray(picture())))
    start = data.find(b"\xff\xc0")
    data[start + 5 : start + 9] = (10_000).to_bytes(2, "big") + (9_000).to_bytes(2, "big")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="9000 x 10000 is 90 Mpx, over the limit"):
            decode_image(bytes(data))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about odd TIFF tags
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is not an image\n" * 50, "not an image"),
        (b"GIF89a" + bytes(50), "a GIF"),
        (b"\xff\xd8\xff\xd9", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        (b"BM" + bytes(60), "cannot be decoded"),
        (b"II*\0" + b"\xff" * 60, "cannot be decoded"),
        (b"RIFF\xff\0\0\0WEBP" + bytes(40), "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow warns about odd TIFF tags
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_file_cut_or_damaged_anywhere_is_an_image_or_a_bad_image(file_format):
    data = encoded(Image.fromarray(picture()), file_format)
    draw = np.random.default_rng(0)
    for length in (20, len(data) // 2, *([len(data) - 10] if file_format == "JPEG" else [])):
        with pytest.raises(BadImage):
            decode_image(data[:length])
    for _ in range(300):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[draw.integers(4, len(data), 8)] = draw.integers(0, 256, 8)
        try:
            assert decode_image(damaged.tobytes()).ndim == 3
        except BadImage as bad:
            assert "\n" not in str(bad)


# --- sizes and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "expected"), [((48, 64), (24, 32)), ((64, 48), (32, 24)), ((20, 32), (20, 32)), ((1, 500), (1, 32))]
)
def test_the_longer_side_is_fitted_and_small_images_stay(shape, expected):
    image = picture(*shape)
    result = fit_max_side(image, 32)
    assert result.shape == (*expected, 3)
    assert result.dtype == np.uint8
    assert fit_max_side(image, None) is image


def test_shrinking_is_what_pillow_calls_bicubic():
    theirs = Image.fromarray(picture(300, 401)).resize((200, 150), Image.Resampling.BICUBIC)
    assert np.abs(fit_max_side(picture(300, 401), 200).astype(int) - np.asarray(theirs)).max() <= 1


def test_shrinking_averages_instead_of_picking_pixels():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit_max_side(stripes, 16).astype(int) - 127).max() < 16


def test_classes_are_the_first_level_and_files_below_are_taken_in_order(tmp_path):
    names = ["b/2.jpg", "b/1.PNG", "a/deep/er/x.JPEG", "a/z.jpg", "a b/q.jpg", "a/deep.jpg", "empty/readme.txt"]
    folder = scan_folder(fill(tmp_path, names))
    assert folder.classes == ("a", "a b", "b", "empty")
    assert folder.paths == ("a/deep/er/x.JPEG", "a/deep.jpg", "a/z.jpg", "a b/q.jpg", "b/1.PNG", "b/2.jpg")
    assert folder.labels.tolist() == [0, 0, 0, 1, 2, 2]
    assert folder.labels.dtype == np.int64
    assert folder.ignored == {".txt": 1}


def test_other_files_are_ignored_and_counted(tmp_path):
    folder = scan_folder(
        fill(tmp_path, ["a/1.jpg", "a/._1.jpg", "a/x.gif", "a/y.GIF", "a/none", "top.jpg", ".git/x.jpg"])
    )
    assert folder.paths == ("a/1.jpg",)
    assert folder.ignored == {"(hidden)": 1, ".gif": 2, "(no suffix)": 1, "(outside the class directories)": 1}
    assert describe_ignored(folder.ignored) == (
        "5 other files (2 .gif, 1 (hidden), 1 (no suffix), 1 (outside the class directories))"
    )


def test_a_flat_folder_has_no_labels(tmp_path):
    folder = scan_folder(fill(tmp_path, ["b.jpg", "a.png", "notes/readme.txt"]))
    assert folder.paths == ("a.png", "b.jpg")
    assert folder.labels.tolist() == [-1, -1]
    assert folder.classes == ()


def test_linked_directories_are_followed_but_not_in_circles(tmp_path):
    fill(tmp_path, ["real/a/1.jpg", "set/b/2.jpg"])
    (tmp_path / "set" / "a").symlink_to(tmp_path / "real" / "a")
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set" / "b")
    (tmp_path / "set" / "b" / "self.jpg").symlink_to("self.jpg")
    folder = scan_folder(tmp_path / "set")
    assert folder.paths == ("a/1.jpg", "b/2.jpg", "b/self.jpg")
    assert folder.ignored == {"(link to a directory above)": 1}


def test_folders_without_images_are_refused_with_what_was_there(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        scan_folder(tmp_path / "missing")
    with pytest.raises(DataError, match="there are no files at all"):
        scan_folder(tmp_path)
    fill(tmp_path, ["a/1.gif", "a/2.gif", "b/3.txt"])
    with pytest.raises(DataError, match=r"looked for \.jpg .* only 3 other files \(2 \.gif, 1 \.txt\)"):
        scan_folder(tmp_path)
    with pytest.raises(DataError, match="not a directory"):
        scan_folder(tmp_path / "a" / "1.gif")
