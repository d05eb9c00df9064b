import gzip
import io
import json
import os
import resource
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import JPG, RAW, open_beton
from pipelines.images import decode_image
from pipelines.manifest import classes_of, read_manifest
from pipelines.tensor_file import read_tensor_file
from ressl.batch import DataError
from tools.convert import DiskFull, convert
from tools.index_file import read_index_file


def picture(seed, size=(20, 24)):
    draw = np.random.default_rng(seed)
    small = Image.fromarray(draw.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return np.asarray(small.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def save(path: Path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes of five PNGs of growing sizes."""
    for i in range(10):
        save(tmp_path / "src" / "ab"[i // 5] / f"{i}.png", picture(i, (16 + 8 * i, 20 + 6 * i)))
    return tmp_path / "src"


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def console(output):
    return Console(file=output, width=200)


def images_of(path):
    beton, content = open_beton(path), path.read_bytes()
    result = []
    for mode, size, start, length in zip(beton.mode, beton.size, beton.data_ptr, beton.data_size, strict=True):
        data = content[start : start + length]
        result.append(np.frombuffer(data, np.uint8).reshape(*size, 3) if mode == RAW else decode_image(data))
    return result


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(directory, packed=True, count=30):
    directory.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for prefix, n in (("train", count), ("t10k", count // 3)):
        images, labels = draw.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            data = idx_bytes(array)
            path = directory / f"{prefix}-{name}-ubyte{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(data) if packed else data)
    return directory


def test_raw_images_come_back_exactly(folder, tmp_path, console, output):
    manifest = convert(str(folder), tmp_path / "out", "ffcv", mode="raw", console=console)
    beton = open_beton(tmp_path / "out" / "train.beton")
    assert beton.label.tolist() == [0] * 5 + [1] * 5
    assert beton.index.tolist() == list(range(10))
    for i, image in enumerate(images_of(tmp_path / "out" / "train.beton")):
        assert np.array_equal(image, picture(i, (16 + 8 * i, 20 + 6 * i)))
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest.splits["train"].classes == classes_of(tmp_path / "out" / "train.beton") == ("a", "b")
    assert "10 images, 2 classes" in output.getvalue()
    names = ["manifest.json", "train.beton", "train.beton.index.npz"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_jpeg_images_come_back_nearly_and_smaller(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "ffcv", mode="jpg", quality=95, max_side=40, console=console)
    beton = open_beton(tmp_path / "out" / "train.beton")
    assert (beton.mode == JPG).all()
    assert beton.size.max(axis=1).tolist() == [20, 26, 32, 40, 40, 40, 40, 40, 40, 40]
    assert beton.original[9].tolist() == [88, 74]
    assert np.abs(images_of(beton.path)[1].astype(int) - picture(1, (24, 26))).mean() < 6


def test_auto_keeps_small_images_raw(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "ffcv", console=console)
    beton = open_beton(tmp_path / "out" / "train.beton")
    assert ((beton.size.prod(axis=1) <= 64 * 64) == (beton.mode == RAW)).all()
    assert set(beton.mode.tolist()) == {JPG, RAW}


def test_tensors_of_ragged_images_come_back_exactly(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "tensor", console=console)
    data = read_tensor_file(tmp_path / "out" / "train.safetensors")
    assert data.classes == ("a", "b")
    assert data.label.tolist() == [0] * 5 + [1] * 5
    for i in range(10):
        image = picture(i, (16 + 8 * i, 20 + 6 * i))
        assert np.array_equal(data.pixels[data.offset[i] :][: image.size].numpy().reshape(image.shape), image)


@pytest.mark.parametrize("to", ["ffcv", "tensor"])
def test_the_bytes_do_not_depend_on_the_number_of_threads(folder, tmp_path, console, to):
    (folder / "a" / "bad.png").write_text("text")
    for workers in (1, 4):
        convert(str(folder), tmp_path / str(workers), to, max_skipped=0.5, workers=workers, console=console)
    one, four = ({p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("1", "4"))
    assert one == four


def test_bad_images_are_named_counted_and_left_out(folder, tmp_path, console, output):
    good = (folder / "a" / "0.png").read_bytes()
    jpeg = io.BytesIO()
    Image.fromarray(picture(3, (200, 200))).save(jpeg, "JPEG")
    bad = {
        "a/00 [bold]corrupt.png": good[:60] + bytes(40) + good[100:],
        "a/text.jpg": b"this is not an image\n" * 9,
        "a/really_a.gif.jpg": b"GIF89a" + bytes(100),
        "b/truncated.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "b/zero.jpeg": b"",
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "b" / "fifo.jpg")
    (folder / "b" / "x.gif").write_bytes(b"GIF89a")
    (folder / "b" / "._1.png").write_bytes(b"finder")
    (folder / "c").mkdir()
    manifest = convert(str(folder), tmp_path / "out", "ffcv", max_skipped=0.5, console=console)
    record, printed = manifest.splits["train"], output.getvalue()
    assert {entry["name"] for entry in record.skipped} == {*bad, "b/fifo.jpg"}
    assert all(f"skipped {entry['name']}: {entry['reason']}" in printed for entry in record.skipped)
    assert "ignored 2 other files (1 (hidden), 1 .gif)" in printed
    assert "classes without images, which keep their numbers: c" in printed
    assert record.count == 10
    beton = open_beton(tmp_path / "out" / "train.beton")
    # the index counts the bad images too, so that it does not change with them
    assert sorted(beton.index.tolist() + [entry["index"] for entry in record.skipped]) == list(range(16))
    assert beton.index[:3].tolist() == [0, 2, 3]


def test_too_many_bad_images_stop_the_conversion_and_leave_nothing(folder, tmp_path, console):
    (folder / "a" / "0.png").write_text("text")
    with pytest.raises(DataError, match=r"1 or more of 10 images .* 1\.00% .* a/0\.png \(not an image.*--max-skipped"):
        convert(str(folder), tmp_path / "out", "ffcv", console=console)
    assert not (tmp_path / "out").exists()
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 10 images can be read: a/0\.png \(empty file\)"):
        convert(str(folder), tmp_path / "out", "tensor", max_skipped=1.0, console=console)
    assert not (tmp_path / "out").exists()


def test_more_than_ten_bad_images_are_listed_in_the_manifest_only(folder, tmp_path, console, output):
    for i in range(15):
        (folder / "a" / f"bad{i}.jpg").touch()
    manifest = convert(str(folder), tmp_path / "out", "ffcv", max_skipped=0.9, console=console)
    assert len(manifest.splits["train"].skipped) == 15
    assert output.getvalue().count("empty file") == 10


def test_a_flat_folder_has_no_labels(tmp_path, console):
    for i in range(3):
        save(tmp_path / "src" / f"{i}.jpg", picture(i))
    manifest = convert(str(tmp_path / "src"), tmp_path / "out", "ffcv", split="val", console=console)
    assert open_beton(tmp_path / "out" / "val.beton").label.tolist() == [-1] * 3
    assert manifest.splits["val"].classes == ()


def test_sources_without_images_are_refused(tmp_path, console):
    with pytest.raises(DataError, match="no such directory"):
        convert(str(tmp_path / "missing"), tmp_path / "out", "ffcv", console=console)
    (tmp_path / "src").mkdir()
    with pytest.raises(DataError, match="no images found"):
        convert(str(tmp_path / "src"), tmp_path / "out", "ffcv", console=console)
    with pytest.raises(DataError, match="no such data set; known are CIFAR10"):
        convert("torchvision:ImageNet", tmp_path / "out", "ffcv", console=console)
    assert not (tmp_path / "out").exists()


def test_train_and_test_folders_share_the_class_numbers_of_train(tmp_path, console, output):
    for name in ("train/cat/1.png", "train/dog/1.png", "train/owl/1.png", "test/owl/1.png", "extra/x.png"):
        save(tmp_path / "src" / name, picture(0))
    manifest = convert(str(tmp_path / "src"), tmp_path / "out", "ffcv", console=console)
    assert open_beton(tmp_path / "out" / "val.beton").label.tolist() == [2]
    assert manifest.splits["val"].classes == manifest.splits["train"].classes == ("cat", "dog", "owl")
    assert "train from train/, val from test/; not used: extra" in output.getvalue()
    save(tmp_path / "src" / "test" / "yak" / "1.png", picture(0))
    with pytest.raises(DataError, match=r"src/test: classes that .*train does not have: yak"):
        convert(str(tmp_path / "src"), tmp_path / "other", "ffcv", console=console)
    assert not (tmp_path / "other").exists()


def test_splits_can_be_converted_one_after_the_other(tmp_path, console):
    for name in ("train/cat/1.png", "val/cat/1.png"):
        save(tmp_path / "src" / name, picture(0))
    for split in ("train", "val"):
        convert(str(tmp_path / "src"), tmp_path / "out", "ffcv", split=split, console=console)
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert set(manifest.splits) == {"train", "val"}
    with pytest.raises(DataError, match="has no split 'test', only train, val"):
        convert(str(tmp_path / "src"), tmp_path / "out", "ffcv", split="test", console=console)
    with pytest.raises(DataError, match=r"its train is train\.beton already"):
        convert(str(tmp_path / "src"), tmp_path / "out", "tensor", console=console)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("name", "classes"), [("mnist", tuple("0123456789")), ("FashionMNIST/raw", "T-shirt/top")])
def test_idx_files_become_two_splits(tmp_path, console, packed, name, classes):
    source = write_idx(tmp_path / name, packed)
    manifest = convert(str(source), tmp_path / "out", "tensor", console=console)
    data = read_tensor_file(tmp_path / "out" / "train.safetensors")
    assert (len(data.label), manifest.splits["val"].count) == (30, 10)
    assert data.label.tolist() == [i % 10 for i in range(30)]
    assert data.classes == classes or data.classes[0] == classes
    raw = (source / f"train-images-idx3-ubyte{'.gz' if packed else ''}").read_bytes()
    grey = np.frombuffer(gzip.decompress(raw) if packed else raw, np.uint8, offset=16).reshape(30, 28, 28)
    pixels = data.pixels[data.offset[7] :][: 28 * 28 * 3].numpy().reshape(28, 28, 3)
    assert np.array_equal(pixels, np.repeat(grey[7][:, :, None], 3, axis=2))


def test_damaged_idx_files_are_refused(tmp_path, console):
    source = write_idx(tmp_path / "mnist")
    images, labels = source / "train-images-idx3-ubyte.gz", source / "train-labels-idx1-ubyte.gz"
    whole = images.read_bytes()
    for data, message in [
        (whole[:-20], "damaged gzip"),
        (b"text", "damaged gzip"),
        (gzip.compress(b"text"), "not an IDX file"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "its header says"),
        (labels.read_bytes(), "not an IDX file"),
    ]:
        images.write_bytes(data)
        with pytest.raises(DataError, match=message):
            convert(str(source), tmp_path / "out", "ffcv", console=console)
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(idx_bytes(np.zeros(7, np.uint8))))
    with pytest.raises(DataError, match="7 labels for the 30 images"):
        convert(str(source), tmp_path / "out", "ffcv", console=console)
    labels.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        convert(str(source), tmp_path / "out", "ffcv", console=console)
    assert not (tmp_path / "out").exists()


def test_torchvision_data_that_is_there_is_used(tmp_path, console):
    write_idx(tmp_path / "FashionMNIST" / "raw", packed=False)
    manifest = convert(f"torchvision:FashionMNIST:{tmp_path}", tmp_path / "out", "ffcv", console=console)
    assert {split: record.count for split, record in manifest.splits.items()} == {"train": 30, "val": 10}
    assert manifest.splits["train"].classes[9] == "Ankle boot"
    assert open_beton(tmp_path / "out" / "train.beton").size.tolist() == [[28, 28]] * 30


def test_torchvision_data_that_cannot_be_stored_is_refused(tmp_path, console):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="torchvision:CIFAR10: cannot be read from or downloaded to .*file"):
        convert(f"torchvision:CIFAR10:{tmp_path / 'file'}", tmp_path / "out", "ffcv", console=console)


def test_existing_output_stays_unless_it_may_be_overwritten(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "ffcv", console=console)
    before = (tmp_path / "out" / "train.beton").read_bytes()
    with pytest.raises(DataError, match=r"train\.beton: exists already.*--overwrite"):
        convert(str(folder), tmp_path / "out", "ffcv", mode="raw", console=console)
    (folder / "a" / "0.png").write_text("text")
    with pytest.raises(DataError, match="cannot be read"):
        convert(str(folder), tmp_path / "out", "ffcv", mode="raw", overwrite=True, console=console)
    assert (tmp_path / "out" / "train.beton").read_bytes() == before
    convert(str(folder), tmp_path / "out", "ffcv", mode="raw", max_skipped=0.2, overwrite=True, console=console)
    assert len(open_beton(tmp_path / "out" / "train.beton").label) == 9


def test_the_manifest_is_sorted_json_with_the_checksum_of_the_index(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "ffcv", mode="jpg", quality=91, console=console)
    text = (tmp_path / "out" / "manifest.json").read_text()
    record = json.loads(text)["splits"]["train"]
    assert text == json.dumps(json.loads(text), indent=1, sort_keys=True) + "\n"
    index = tmp_path / "out" / record["index"]
    digest = subprocess.run(["sha256sum", index], capture_output=True, text=True, check=True)
    assert record["index_sha256"] == digest.stdout.split()[0]
    beton, stored = open_beton(tmp_path / "out" / "train.beton"), read_index_file(index)
    content = beton.path.read_bytes()
    ends = zip(beton.data_ptr.tolist(), beton.data_size.tolist(), strict=True)
    assert stored.crc32.tolist() == [zlib.crc32(content[start : start + size]) for start, size in ends]
    assert [stored.name(i) for i in range(10)] == [f"{'ab'[i // 5]}/{i}.png" for i in range(10)]
    assert (record["options"]["mode"], record["options"]["quality"]) == ("jpg", 91)
    assert record["source"]["place"] == str(folder) and record["source"]["split"] == "train"
    assert record["bytes"] == (tmp_path / "out" / "train.beton").stat().st_size
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest"):
        classes_of(tmp_path / "out" / "train.beton")


def test_file_names_that_are_not_text_do_not_stop_the_conversion(tmp_path, console):
    save(tmp_path / "src" / os.fsdecode(b"caf\xe9") / "1.png", picture(0))
    (tmp_path / "src" / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.jpg")).touch()
    for to in ("ffcv", "tensor"):
        manifest = convert(str(tmp_path / "src"), tmp_path / to, to, max_skipped=0.5, console=console)
        assert manifest.splits["train"].classes == ("caf\ufffd",)
        assert manifest.splits["train"].skipped[0]["name"] == "caf\ufffd/\ufffd.jpg"


@pytest.mark.parametrize("to", ["ffcv", "tensor"])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(folder, tmp_path, console, to):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"out: no space for the output \(.*GB free there\)"):
            convert(str(folder), tmp_path / "out", to, mode="raw" if to == "ffcv" else "auto", console=console)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
