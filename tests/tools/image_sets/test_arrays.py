import gzip
import os
import tarfile
import tracemalloc

import numpy as np
import pytest

from ressl.batch import DataError
from tools.image_sets.arrays import FASHION_MNIST, find_arrays

STL_CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def write_idx(directory, *, suffix=".gz", dash="-", count=30):
    """Returns the training images."""
    directory.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for prefix, n in (("t10k", count // 3), ("train", count)):
        images, labels = draw.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10
        for name, array in ((f"images{dash}idx3", images), (f"labels{dash}idx1", labels)):
            data = idx_bytes(array)
            (directory / f"{prefix}-{name}-ubyte{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return images


def write_stl(directory, counts=(6, 4, 8)):
    """Returns the training images, (N, 96, 96, 3)."""
    directory.mkdir(parents=True)
    draw = np.random.default_rng(1)
    for name, count in zip(("unlabeled", "test", "train"), reversed(counts), strict=True):
        images = draw.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        # as its authors say: one colour after the other, and each column by column
        (directory / f"{name}_X.bin").write_bytes(images.transpose(0, 3, 2, 1).tobytes())
        if name != "unlabeled":
            (directory / f"{name}_y.bin").write_bytes((np.arange(count, dtype=np.uint8) % 10 + 1).tobytes())
    (directory / "class_names.txt").write_text("\n".join(STL_CLASSES))
    return images


def in_child(check):
    """Whether check() holds in a forked process."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(("suffix", "dash"), [("", "-"), (".gz", "-"), ("", "."), (".gz", ".")])
def test_idx_files_are_read_packed_or_not_and_under_both_spellings(tmp_path, suffix, dash):
    images = write_idx(tmp_path / "raw", suffix=suffix, dash=dash)
    origin = find_arrays(tmp_path)
    assert list(origin.sets) == ["train", "val"]
    assert "train-images" in origin.description
    train = origin.sets["train"]()
    assert train.labels.tolist() == [i % 10 for i in range(30)]
    assert train.classes == tuple("0123456789")
    assert np.array_equal(train.read(7), np.repeat(images[7][:, :, None], 3, axis=2))
    assert train.name(7) == f"train-images{dash}idx3-ubyte{suffix}[7]"
    assert len(origin.sets["val"]().labels) == 10
    assert in_child(lambda: np.array_equal(train.read(8)[:, :, 1], images[8]))


def test_the_directory_tells_fashion_mnist_by_its_name(tmp_path):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    assert find_arrays(tmp_path / "FashionMNIST").sets["val"]().classes[9] == "Ankle boot"
    assert FASHION_MNIST.name == "fashion-mnist"


def test_damaged_idx_files_are_refused(tmp_path):
    write_idx(tmp_path)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    whole, some = images.read_bytes(), labels.read_bytes()
    for data, message in [
        (whole[:-20], "damaged gzip"),
        (b"text", "damaged gzip"),
        (gzip.compress(b"text"), "not an IDX file"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "23,535 bytes, but its header says 23,536"),
        (some, "not an IDX file"),
    ]:
        images.write_bytes(data)
        with pytest.raises(DataError, match=message):
            find_arrays(tmp_path).sets["train"]()
    images.write_bytes(whole)
    labels.write_bytes(gzip.compress(idx_bytes(np.zeros(7, np.uint8))))
    with pytest.raises(DataError, match="7 labels for the 30 images"):
        find_arrays(tmp_path).sets["train"]()
    labels.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        find_arrays(tmp_path).sets["train"]()
    os.mkfifo(labels.with_suffix(""))
    with pytest.raises(DataError, match="not a regular file"):
        find_arrays(tmp_path).sets["train"]()


def test_fashion_labels_beyond_its_classes_are_refused(tmp_path):
    write_idx(tmp_path / "fashion", suffix="")
    (tmp_path / "fashion" / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.full(30, 10, np.uint8)))
    with pytest.raises(DataError, match="label 10, expected labels below 10"):
        find_arrays(tmp_path / "fashion").sets["train"]()


def test_the_identity_follows_images_and_labels_and_the_stamp_the_file(tmp_path):
    write_idx(tmp_path, suffix="")
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    first = find_arrays(tmp_path).sets["train"]()
    assert first.stamp(3) == (images.stat().st_size, images.stat().st_mtime_ns)
    images.touch()
    assert find_arrays(tmp_path).sets["train"]().identity == first.identity
    for path in (images, labels):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert find_arrays(tmp_path).sets["train"]().identity != first.identity
        path.write_bytes(before)
    images.unlink()
    assert first.stamp(3) == (-1, -1)


def test_stl10_is_read_with_its_unlabelled_images(tmp_path):
    images = write_stl(tmp_path / "stl10_binary")
    origin = find_arrays(tmp_path)
    assert list(origin.sets) == ["train", "val", "unlabeled"]
    sets = {split: load() for split, load in origin.sets.items()}
    assert {split: len(found.labels) for split, found in sets.items()} == {"train": 6, "val": 4, "unlabeled": 8}
    assert sets["train"].labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert set(sets["unlabeled"].labels.tolist()) == {-1}
    assert all(found.classes == STL_CLASSES for found in sets.values())
    assert np.array_equal(sets["train"].read(5), images[5])
    assert in_child(lambda: np.array_equal(sets["train"].read(2), images[2]))
    assert sets["train"].notes == ("train_X.bin: 6 images; as published it has 5,000",)
    assert sets["train"].name(5) == "train_X.bin[5]"
    assert 16 <= sets["train"].chunk < 1024
    held = tmp_path / "stl10_binary" / "train_X.bin"
    assert sets["train"].stamp(0) == (held.stat().st_size, held.stat().st_mtime_ns)


def test_stl10_without_some_splits_has_the_others(tmp_path):
    write_stl(tmp_path / "stl10_binary")
    (tmp_path / "stl10_binary" / "unlabeled_X.bin").unlink()
    assert list(find_arrays(tmp_path / "stl10_binary").sets) == ["train", "val"]


def test_the_identity_of_mapped_images_is_that_of_their_file(tmp_path):
    write_stl(tmp_path / "stl10_binary")
    path = tmp_path / "stl10_binary" / "unlabeled_X.bin"
    first = find_arrays(tmp_path).sets["unlabeled"]().identity
    os.utime(path, ns=(1, 1))
    assert find_arrays(tmp_path).sets["unlabeled"]().identity != first


def test_damaged_stl10_files_are_refused(tmp_path):
    root = tmp_path / "stl10_binary"
    write_stl(root)
    for name, change, message in [
        ("train_X.bin", lambda data: data[:-1], "165,887 bytes, expected 138,240,000 "),
        ("train_X.bin", lambda data: b"", "0 bytes, expected 138,240,000"),
        ("train_X.bin", lambda data: data[:-27648], "138,240 bytes, expected 165,888 for 6 labels"),
        ("train_y.bin", lambda data: b"\0" + data[1:], "label -1, expected labels below 10"),
        ("train_y.bin", lambda data: b"\x0b" + data[1:], "label 10, expected labels below 10"),
        ("class_names.txt", lambda data: b"\xff\xfe", "not a text file"),
    ]:
        whole = (root / name).read_bytes()
        (root / name).write_bytes(change(whole))
        with pytest.raises(DataError, match=f"{name}: {message}"):
            find_arrays(tmp_path).sets["train"]()
        (root / name).write_bytes(whole)


def test_the_archive_of_stl10_is_to_be_unpacked_first(tmp_path):
    write_stl(tmp_path / "stl10_binary", counts=(1, 1, 1))
    with tarfile.open(tmp_path / "stl10_binary.tar.gz", "w:gz") as file:
        file.add(tmp_path / "stl10_binary", "stl10_binary")
    with pytest.raises(DataError, match=r"STL-10 packed; unpack it first, as with `tar -xf .*, and give stl10_binary/"):
        find_arrays(tmp_path / "stl10_binary.tar.gz")


def test_a_gzip_file_that_unpacks_to_more_than_the_limit_is_refused(tmp_path, monkeypatch):
    write_idx(tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(bytes(20 << 20)))
    monkeypatch.setattr("tools.image_sets.array_files.MAX_UNPACKED", 1 << 20)
    tracemalloc.start()
    with pytest.raises(DataError, match="GiB unpacked; unpack it first"):
        find_arrays(tmp_path).sets["train"]()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 << 20


def test_two_data_sets_in_one_place_are_not_guessed_between(tmp_path):
    write_stl(tmp_path / "stl10_binary")
    write_idx(tmp_path)
    with pytest.raises(DataError, match="several data sets: IDX files .*; STL-10 in .*stl10_binary; give the place"):
        find_arrays(tmp_path)


def test_other_places_are_left_to_others(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "stl10_binary").mkdir()
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as file:
        file.add(tmp_path / "train", "train")
    (tmp_path / "text.tar.gz").write_text("text")
    (tmp_path / "empty.tar").touch()
    for root in (tmp_path, *tmp_path.iterdir(), tmp_path / "missing", tmp_path / ("x" * 300)):
        assert find_arrays(root) is None
