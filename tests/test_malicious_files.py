"""Files made to run code or to write elsewhere, each through the reader that would meet it: nothing comes of them.

Every payload would make one and the same file. Checkpoints have tests of their own.
"""

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from pipelines.beton import JPG, RAW, open_beton
from pipelines.images import BadImage, decode_image, read_image
from pipelines.manifest import read_manifest
from pipelines.shards import read_index
from pipelines.tensor_file import FORMAT, read_tensor_file
from ressl.batch import DataError
from ressl.config_file import ConfigError, load_config
from tools.beton_writer import EncodedSample, write_beton
from tools.convert import convert
from tools.image_sets import detect
from tools.index_file import read_index_file
from tools.replay_trace import read_trace
from tools.shard_writer import Member, write_shards
from tools.verify import verify

QUIET = Console(quiet=True)
REFUSALS = (DataError, ConfigError, BadImage)
Writer = Callable[[Path, Path], None]  # of files into a directory, whose payload makes the second


class Payload:
    """Whoever unpickles it makes the file `mark`."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What a payload would make, beside `data`, in which all files of a test are."""
    (tmp_path / "data").mkdir()
    return tmp_path / "mark"


def jpeg(grey: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 12), (grey, grey, grey)).save(file, "JPEG")
    return file.getvalue()


def pickled(mark: Path) -> bytes:
    return pickle.dumps(Payload(mark), protocol=2)


def of_torch(mark: Path) -> bytes:
    """A zip file with a pickle in it."""
    file = io.BytesIO()
    torch.save({"pixels": Payload(mark)}, file)
    return file.getvalue()


def objects(mark: Path) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = Payload(mark)
    return array


def of_numpy(mark: Path) -> bytes:
    file = io.BytesIO()
    np.savez(file, format=objects(mark), names=objects(mark), crc32=objects(mark), tables_sha256=objects(mark))
    return file.getvalue()


def of_yaml(mark: Path) -> bytes:
    return f"!!python/object/apply:builtins.open ['{mark}', w]".encode()


def test_the_payloads_are_live(mark: Path) -> None:
    """Or all below would pass for nothing."""
    for run in (
        lambda: pickle.loads(pickled(mark)),
        lambda: torch.load(io.BytesIO(of_torch(mark)), weights_only=False),
        lambda: np.load(io.BytesIO(of_numpy(mark)), allow_pickle=True)["names"],
        lambda: yaml.unsafe_load(of_yaml(mark)),
    ):
        run()
        mark.unlink()


# --- in the place of what training reads -----------------------------------------------------------------------------

CONTENTS = {"a pickle": pickled, "a file of torch": of_torch, "objects of numpy": of_numpy, "a tag of YAML": of_yaml}


def write_data(data: Path) -> None:
    """One of each kind of file that is read, whole."""
    sample = EncodedSample(jpeg(), JPG, (12, 16), (12, 16), 0, 0)
    write_beton(data / "train.beton", [sample], 1, page_size=1 << 21)
    members = [Member(jpeg(i), ".jpg", (12, 16), (12, 16), 0, i, f"{i}.jpg") for i in range(3)]
    (data / "train").mkdir()
    write_shards(data / "train", members, 3)


def everything_of(source: Path | str) -> None:
    """All that `convert` reads of a source."""
    for load in detect(str(source), download=False).sets.values():
        images = load()
        for i in range(len(images.labels)):
            images.read(i)


READERS: dict[str, Callable[[Path], object]] = {
    "train.beton": open_beton,
    "train.beton.index.npz": lambda path: open_beton(path.with_name("train.beton"), sealed=True),
    "other.index.npz": read_index_file,
    "train/index.npz": lambda path: read_index(path.parent),
    "manifest.json": lambda path: read_manifest(path.parent),
    "train.safetensors": read_tensor_file,
    "trace.safetensors": read_trace,
    "image.jpg": read_image,
    "config.yaml": load_config,
    "train.parquet": everything_of,
    "train.tar": everything_of,
    "train.zip": everything_of,
    "cifar-10-python.tar.gz": everything_of,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", READERS)
def test_what_lies_in_the_place_of_another_file_is_refused_and_not_run(name: str, content: str, mark: Path) -> None:
    data = mark.parent / "data"
    write_data(data)
    (data / name).write_bytes(CONTENTS[content](mark))
    with pytest.raises(REFUSALS):
        READERS[name](data / name)
    assert not mark.exists()


@pytest.mark.parametrize("array", ["format", "names", "shards", "shard_bytes", "shard", "size", "crc32"])
def test_an_array_of_objects_in_an_index_is_refused_and_not_run(array: str, mark: Path) -> None:
    data = mark.parent / "data"
    write_data(data)
    with np.load(data / "train" / "index.npz") as file:
        arrays = {name: objects(mark) if name == array else file[name] for name in file.files}
    np.savez(data / "train" / "index.npz", **arrays)
    with pytest.raises(DataError, match=f"index.npz: damaged: {array} cannot be read"):
        read_index(data / "train")
    assert not verify(data / "train", console=QUIET)
    assert not mark.exists()


def entry(start: int, end: int, shape: list[int], dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "length"),
    [
        ({}, 2**63),
        ({}, 10**9),
        ({"pixels": entry(0, 2**40, [2**40])}, None),
        ({"pixels": entry(-64, 0, [64])}, None),
        ({"pixels": entry(0, 64, [64]), "label": entry(0, 8, [1], "I64")}, None),
        ({"pixels": entry(0, 0, [2**33, 2**33])}, None),
        ({"__metadata__": {"format": FORMAT, "classes": "open('MARK', 'w')"}, "pixels": entry(0, 64, [64])}, None),
    ],
    ids=["endless", "long", "outside", "before", "overlapping", "overflowing", "code"],
)
def test_a_header_of_tensors_that_lies_is_refused(header: dict, length: int | None, mark: Path) -> None:
    text, path = json.dumps(header).replace("MARK", str(mark)).encode(), mark.parent / "data" / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(64))
    for read in (read_tensor_file, read_trace):
        with pytest.raises(DataError, match=str(path)):
            read(path)
    assert not mark.exists()


TAGS = (
    "!!python/object/apply:builtins.open [MARK, w]", "!!python/object/apply:os.system ['touch MARK']",
    "!!python/object/new:os.system ['touch MARK']", "!!python/name:os.system", "!!python/module:antigravity",
    "!!python/object:pathlib.Path {}", "!<tag:yaml.org,2002:python/object/apply:builtins.open> [MARK, w]",
)  # fmt: skip


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_of_yaml_is_refused_wherever_it_stands_and_not_run(tag: str, mark: Path, repo: Path) -> None:
    path, tag = mark.parent / "data" / "a.yaml", tag.replace("MARK", str(mark))
    for text in (f"run: {tag}", f"? {tag}\n: 1", f"run:\n  seed: {tag}", f"- {tag}", f"%YAML 1.1\n---\nrun: {tag}"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(path)
    with pytest.raises(ConfigError, match="is not a YAML value"):
        load_config(repo / "configs" / "quickstart.yaml", [f"run.out_dir={tag}"])
    (path.parent / "README.md").write_text(f"---\ndataset_info: {tag}\n---\n")
    write_parquet(path.parent / "train.parquet", jpeg())
    everything_of(path.parent)
    assert not mark.exists()


# --- what is converted -----------------------------------------------------------------------------------------------


def write_cifar(root: Path) -> None:
    root.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        rows = {"data": np.zeros((1, 3072), np.uint8), "labels": [0]}
        (root / name).write_bytes(pickle.dumps(rows, protocol=2))
    (root / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat"]}, protocol=2))
    everything_of(root)


def with_dots(mark: Path) -> bytes:
    """By way of a function that is let in to what Python keeps beside it."""
    module, name = b"numpy.core.multiarray", b"_reconstruct.__globals__"
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name))
    return b"\x80\x04" + texts + b"\x93."


HOSTILE = {
    "a call": pickled,
    "a call in a list": lambda mark: pickle.dumps({"label_names": [Payload(mark)], "data": Payload(mark)}, protocol=2),
    "a name with dots": with_dots,
    "a function's code": lambda _: b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(N}U\x08__code__cos\nsystem\nstb.",
    "a module": lambda mark: b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.",
    "an extension": lambda mark: b"\x80\x02\x82\x01.",
    "another class": lambda mark: b"\x80\x02cpathlib\nPath\nX\x01\x00\x00\x00a\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("place", ["data_batch_2", "batches.meta"])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_code_in_cifars_pickles_is_refused_and_not_run(hostile: str, place: str, mark: Path) -> None:
    root = mark.parent / "data" / "cifar-10-batches-py"
    write_cifar(root)
    (root / place).write_bytes(HOSTILE[hostile](mark))
    packed = root.parent / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as file:
        file.add(root, root.name)
    for source in (root, packed, f"torchvision:CIFAR10:{root.parent}"):
        with pytest.raises(DataError, match=f"{place}: .* no whole file of CIFAR|torchvision:CIFAR10: cannot be read"):
            everything_of(source)
    assert not mark.exists()


def test_a_file_that_torchvision_would_load_with_torch_is_not_run(mark: Path) -> None:
    root = mark.parent / "data" / "MNIST" / "processed"
    root.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        (root / name).write_bytes(of_torch(mark))
    with pytest.raises(DataError, match="torchvision:MNIST: cannot be read"):
        everything_of(f"torchvision:MNIST:{mark.parent / 'data'}")
    assert not mark.exists()


def write_parquet(path: Path, image: bytes | dict[str, str], note: dict[str, object] | None = None) -> Any:
    """A table with one image, its bytes or where they are. `note` goes with its column."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    kind = pyarrow.binary()
    if isinstance(image, dict):
        kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    table = pyarrow.table({"image": [image]}, schema=pyarrow.schema([pyarrow.field("image", kind, metadata=note)]))
    parquet.write_table(table, path)
    return table


def test_a_pickled_type_of_a_column_is_not_run(mark: Path) -> None:
    """pyarrow before 14.0.1 did (CVE-2023-47248)."""
    pyarrow = pytest.importorskip("pyarrow")
    note = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled(mark)}
    data, saved = mark.parent / "data", mark.parent / "saved"
    saved.mkdir()
    table = write_parquet(data / "train.parquet", jpeg(), note)
    with pyarrow.OSFile(str(saved / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (saved / "dataset_info.json").write_text("{}")
    everything_of(data)
    everything_of(saved)
    assert not mark.exists()


@pytest.mark.parametrize("cell", ["pickle", "../secret.jpg", "/secret.jpg", "", "a/../../secret.jpg"])
def test_a_cell_of_a_table_is_an_image_or_refused(cell: str, mark: Path) -> None:
    (mark.parent / "secret.jpg").write_bytes(jpeg())
    path = mark.parent / "data" / "train.parquet"
    outside = f"{mark.parent}{cell}" if cell.startswith("/") else cell
    write_parquet(path, pickled(mark) if cell == "pickle" else {"path": outside})
    images = detect(str(path)).sets["train"]()
    with pytest.raises(BadImage):
        decode_image(images.read(0))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../secret.arrow", "/secret.arrow", "a/../../secret.arrow", ".."])
def test_a_saved_set_that_names_files_elsewhere_is_refused(name: str, mark: Path) -> None:
    data = mark.parent / "data"
    (data / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    (data / "dataset_info.json").write_text("{}")
    with pytest.raises(DataError, match="names no files beside it|no such file"):
        detect(str(data))


def write_archive(path: Path, names: dict[str, bytes], links: dict[str, tuple[bytes, str]]) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in names.items():
                file.writestr(name, content)
            for name, (_, target) in links.items():
                link = zipfile.ZipInfo(name)
                link.create_system, link.external_attr = 3, 0o120777 << 16
                file.writestr(link, target)
        return
    with tarfile.open(path, "w") as file:
        for name, content in names.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
        for name, (kind, target) in links.items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            file.addfile(member)


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
def test_members_that_point_elsewhere_write_and_read_nothing_there(suffix: str, mark: Path, monkeypatch) -> None:
    """Their names are names only, and links are not followed: but a hard link is to a member, or a bad image."""
    data, out, secret = mark.parent / "data", mark.parent / "out", mark.parent / "secret.jpg"
    secret.write_bytes(jpeg(200))
    monkeypatch.chdir(data)
    names = {
        name: jpeg(0) for name in ("a/1.jpg", "../mark.jpg", f"{mark}.jpg", "a/../../mark.jpg", "a\\..\\..\\mark.jpg")
    }
    names |= {"a/payload.pkl": pickled(mark), "a/x.pth": of_torch(mark), "a/x.pyd": pickled(mark)}
    links = {"a/7.jpg": (tarfile.SYMTYPE, str(secret)), "a/8.jpg": (tarfile.SYMTYPE, "../../secret.jpg")}
    links |= {"a/9.jpg": (tarfile.LNKTYPE, str(secret)), "a/0.jpg": (tarfile.CHRTYPE, "")} if suffix == ".tar" else {}
    write_archive(data / f"images{suffix}", names, links)
    before = sorted(mark.parent.rglob("*"))
    manifest = convert(str(data / f"images{suffix}"), out, "ffcv", mode="raw", max_skipped=0.9, console=QUIET)
    written = [path for path in sorted(mark.parent.rglob("*")) if path != out and out not in path.parents]
    assert written == before
    stored = open_beton(out / "train.beton")
    assert (stored.mode == RAW).all() and len(stored.label) == manifest.splits["train"].count > 0
    content = (out / "train.beton").read_bytes()
    for start, size in zip(stored.data_ptr.tolist(), stored.data_size.tolist(), strict=True):
        assert max(content[start : start + size]) < 100  # no pixel of the secret
    assert not mark.exists()


def test_postscript_is_no_image(mark: Path) -> None:
    """Pillow would give it to Ghostscript."""
    path = mark.parent / "data" / "a.jpg"
    path.write_bytes(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({mark}) (w) file".encode())
    with pytest.raises(BadImage, match="not an image"):
        read_image(path)
    assert not mark.exists()
