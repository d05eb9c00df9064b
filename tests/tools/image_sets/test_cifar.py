import io
import os
import pickle
import tarfile

import numpy as np
import pytest

from ressl.batch import DataError
from tools.image_sets.arrays import find_arrays

NAMES = [f"class{i}" for i in range(100)]
DIRECTORIES = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-100-python", "cifar-100-binary")


class Python2Pickle:
    """Writes a dictionary as Python 2's cPickle does, whose strings are bytes: so CIFAR is given away."""

    def __init__(self):
        self.out = io.BytesIO(b"")
        self.out.write(b"\x80\x02")

    def text(self, value):
        data = value if isinstance(value, bytes) else value.encode()
        self.out.write(b"T" + len(data).to_bytes(4, "little") + data)

    def number(self, value):
        self.out.write(b"J" + int(value).to_bytes(4, "little", signed=True))

    def array(self, value):
        self.out.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85")
        self.text("b")
        self.out.write(b"\x87R(K\x01")
        self.number(value.shape[0])
        self.number(value.shape[1])
        self.out.write(b"\x86cnumpy\ndtype\n")
        self.text("u1")
        self.out.write(b"K\x00K\x01\x87R(K\x03")
        self.text("|")
        self.out.write(b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89")
        self.text(value.tobytes())
        self.out.write(b"tb")

    def dump(self, content):
        self.out.write(b"}(")
        for key, value in content.items():
            self.text(key)
            if isinstance(value, np.ndarray):
                self.array(value)
            elif isinstance(value, list):
                self.out.write(b"](")
                for item in value:
                    (self.text if isinstance(item, str) else self.number)(item)
                self.out.write(b"e")
            else:
                self.text(value)
        self.out.write(b"u.")
        return self.out.getvalue()


def batches_of(directory):
    ten = {f"data_batch_{i}": 4 for i in range(1, 6)} | {"test_batch": 3}
    names = ten if "-10-" in directory else {"train": 20, "test": 5}
    return {name if "py" in directory else f"{name}.bin": count for name, count in names.items()}


def write_cifar(root, directory, dump=lambda content: Python2Pickle().dump(content)):
    """Returns images (N, 32, 32, 3) and labels of all files, in their order."""
    (root / directory).mkdir(parents=True)
    draw, count = np.random.default_rng(2), 10 if "-10-" in directory else 100
    all_images, all_labels = [], []
    for name, n in batches_of(directory).items():
        images = draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        planes = images.transpose(0, 3, 1, 2).reshape(n, 3072)
        labels = draw.integers(0, count, n).astype(np.uint8)
        coarse = labels // 5
        if "py" in directory:
            keys = {"labels": labels.tolist()} if count == 10 else {
                "coarse_labels": coarse.tolist(), "fine_labels": labels.tolist()
            }  # fmt: skip
            data = dump({"batch_label": "a batch", "data": planes} | keys)
        else:
            data = np.concatenate([*([coarse[:, None]] * (count == 100)), labels[:, None], planes], axis=1).tobytes()
        (root / directory / name).write_bytes(data)
        all_images.append(images)
        all_labels.append(labels)
    meta = {
        "cifar-10-batches-py": ("batches.meta", lambda: dump({"label_names": NAMES[:10]})),
        "cifar-100-python": ("meta", lambda: dump({"fine_label_names": NAMES, "coarse_label_names": NAMES[:20]})),
        "cifar-10-batches-bin": ("batches.meta.txt", lambda: "\n".join([*NAMES[:10], "", ""]).encode()),
        "cifar-100-binary": ("fine_label_names.txt", lambda: "\n".join([*NAMES, ""]).encode()),
    }[directory]
    (root / directory / meta[0]).write_bytes(meta[1]())
    return np.concatenate(all_images), np.concatenate(all_labels)


def pack(root, directory, name=None):
    path = root / (name or f"{directory.replace('-batches-py', '-python').replace('batches-bin', 'binary')}.tar.gz")
    with tarfile.open(path, "w:gz") as file:
        file.add(root / directory, directory)
    return path


@pytest.mark.parametrize("place", ["parent", "itself", "archive"])
@pytest.mark.parametrize("directory", DIRECTORIES)
def test_every_form_of_cifar_is_read(tmp_path, directory, place):
    images, labels = write_cifar(tmp_path, directory)
    root = {"parent": tmp_path, "itself": tmp_path / directory}.get(place) or pack(tmp_path, directory)
    origin = find_arrays(root)
    assert list(origin.sets) == ["train", "val"]
    assert ("CIFAR-100" if "100" in directory else "CIFAR-10 ") in origin.description
    train, val = origin.sets["train"](), origin.sets["val"]()
    assert train.labels.tolist() + val.labels.tolist() == labels.tolist()
    assert train.labels.dtype == np.int64
    assert train.classes == val.classes == tuple(NAMES[: 10 if "-10-" in directory else 100])
    for i in range(20):
        assert np.array_equal(train.read(i), images[i])
    assert np.array_equal(val.read(2), images[22])
    assert train.identity != val.identity
    assert train.chunk == 1024


def test_an_image_is_named_by_its_file_and_its_place_there(tmp_path):
    write_cifar(tmp_path, "cifar-10-batches-py")
    train = find_arrays(tmp_path).sets["train"]()
    assert [train.name(i) for i in (0, 3, 4, 19)] == [
        "data_batch_1[0]", "data_batch_1[3]", "data_batch_2[0]", "data_batch_5[3]",
    ]  # fmt: skip
    os.utime(tmp_path / "cifar-10-batches-py" / "data_batch_2", ns=(5, 5))
    assert [train.stamp(i)[1] == 5 for i in (3, 4, 7, 8)] == [False, True, True, False]
    assert train.notes[0] == "data_batch_1: 4 images; as published it has 10,000"


def test_a_directory_of_another_name_is_known_by_its_files(tmp_path):
    write_cifar(tmp_path, "cifar-100-binary")
    (tmp_path / "cifar-100-binary").rename(tmp_path / "mine")
    assert len(find_arrays(tmp_path / "mine").sets["train"]().labels) == 20


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_python_3_are_read_too(tmp_path, protocol):
    images, _ = write_cifar(tmp_path, "cifar-10-batches-py", dump=lambda content: pickle.dumps(content, protocol))
    assert np.array_equal(find_arrays(tmp_path).sets["train"]().read(6), images[6])


class Runs:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("where", ["data_batch_1", "batches.meta"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path, where, packed):
    write_cifar(tmp_path, "cifar-10-batches-py")
    trace = tmp_path / "trace"
    for thing in (
        Runs(os.system, f"touch {trace}"),
        Runs(eval, f"open({str(trace)!r}, 'w')"),
        Runs(os.mkdir, str(trace)),
    ):
        (tmp_path / "cifar-10-batches-py" / where).write_bytes(pickle.dumps({"data": thing, "label_names": thing}))
        root = pack(tmp_path, "cifar-10-batches-py") if packed else tmp_path
        with pytest.raises(DataError, match=rf"{where}: .* would run (posix\.system|builtins\.eval|posix\.mkdir)"):
            find_arrays(root).sets["train"]()
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((4, 3072), np.float32), "labels": [0] * 4}, "not of bytes"),
        ({"data": np.zeros((4, 3071), np.uint8), "labels": [0] * 4}, "no `data` with 3,072 bytes"),
        ({"data": np.zeros((4, 3072), np.uint8), "labels": [0] * 3}, "3 labels for 4 images"),
        ({"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 10]}, "label 10, expected labels below 10"),
        ({"data": np.zeros((4, 3072), np.uint8), "labels": ["a"] * 4}, "no list of labels named `labels`"),
        ({"data": np.zeros((4, 3072), np.uint8)}, "no list of labels"),
        ([1, 2], "not a file of CIFAR"),
    ],
)
def test_a_batch_that_is_no_batch_is_refused(tmp_path, content, message):
    write_cifar(tmp_path, "cifar-10-batches-py")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=f"data_batch_3: .*{message}"):
        find_arrays(tmp_path).sets["train"]()


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_files_that_are_cut_off_are_refused_with_their_size(tmp_path, directory):
    write_cifar(tmp_path, directory)
    name = next(iter(batches_of(directory)))
    path = tmp_path / directory / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    expected = {
        "cifar-10-batches-bin": ", expected 30,730,000", "cifar-100-binary": ", expected 153,700,000"
    }.get(directory, "")  # fmt: skip
    with pytest.raises(DataError, match=f"{name}: {len(whole) - 100:,} bytes{expected}.*get it again"):
        find_arrays(tmp_path).sets["train"]()
    path.unlink()
    if "-10-" in directory:
        with pytest.raises(DataError, match=f"{name}: cannot be read: No such file"):
            find_arrays(tmp_path).sets["train"]()
    else:
        assert list(find_arrays(tmp_path).sets) == ["val"]


def test_damaged_archives_are_refused(tmp_path):
    write_cifar(tmp_path, "cifar-10-batches-bin")
    archive = pack(tmp_path, "cifar-10-batches-bin")
    whole = archive.read_bytes()
    checksum = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    for data in (whole[: len(whole) // 2], checksum):
        archive.write_bytes(data)
        with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: damaged archive"):
            find_arrays(archive).sets["train"]()
    archive.write_bytes(b"text")
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz: damaged archive"):
        find_arrays(archive)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_4.bin").unlink()
    with pytest.raises(DataError, match=r"no cifar-10-batches-bin/data_batch_4\.bin in it"):
        find_arrays(pack(tmp_path, "cifar-10-batches-bin")).sets["train"]()


def test_an_archive_too_large_for_memory_is_to_be_unpacked(tmp_path, monkeypatch):
    write_cifar(tmp_path, "cifar-10-batches-py")
    archive = pack(tmp_path, "cifar-10-batches-py")
    origin = find_arrays(archive)
    monkeypatch.setattr("tools.image_sets.array_files.MAX_UNPACKED", archive.stat().st_size)
    with pytest.raises(DataError, match="unpack it first and give the directory"):
        origin.sets["train"]()  # it is packed below the limit, and above it unpacked
    monkeypatch.setattr("tools.image_sets.array_files.MAX_UNPACKED", archive.stat().st_size - 1)
    with pytest.raises(DataError, match="unpack it first and give the directory"):
        find_arrays(archive)


def test_reading_an_archive_writes_nothing(tmp_path):
    write_cifar(tmp_path / "made", "cifar-10-batches-py")
    archive = pack(tmp_path / "made", "cifar-10-batches-py").rename(tmp_path / "any name.tgz")
    before = sorted(tmp_path.rglob("*"))
    find_arrays(archive).sets["train"]().read(0)
    assert sorted(tmp_path.rglob("*")) == before
