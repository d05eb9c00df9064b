import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.images import BadImage, decode_image, describe_ignored, fit_max_side, read_image, scan_folder
from ressl.batch import DataError


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


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encoded(Image.fromarray(picture()), exif=exif)).shape == (48, 64, 3)


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


def test_files_that_are_not_regular_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "directory.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty.jpg").touch()
    expected = {
        "fifo.jpg": "FIFO",
        "directory.jpg": "directory",
        "link.jpg": "dangling link",
        "empty.jpg": "empty file",
        "missing.jpg": "no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(BadImage, match=reason):
            read_image(tmp_path / name)
    with pytest.raises(BadImage, match="device"):
        read_image("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_a_bad_image(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(encoded(Image.fromarray(picture())))
    path.chmod(0)
    with pytest.raises(BadImage, match="permission denied"):
        read_image(path)


@pytest.mark.parametrize(
    ("shape", "expected"), [((48, 64), (24, 32)), ((64, 48), (32, 24)), ((20, 32), (20, 32)), ((1, 500), (1, 32))]
)
def test_the_longer_side_is_fitted_and_small_images_stay(shape, expected):
    image = picture(*shape)
    result = fit_max_side(image, 32)
    assert result.shape == (*expected, 3)
    assert result.dtype == np.uint8
    assert fit_max_side(image, None) is image


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
