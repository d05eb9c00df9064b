"""CIFAR-10 and CIFAR-100, in the Python and the binary version (www.cs.toronto.edu/~kriz/cifar.html)."""

import io
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ressl.batch import DataError
from tools.image_sets.array_files import (
    Files,
    Holder,
    array_set,
    check_labels,
    check_size,
    checksum,
    find_files,
    holds_any,
    lines_of,
    not_as_published,
    read_files,
)
from tools.image_sets.image_set import ImageSet, Origin

CIFAR_PIXELS = 3 * 32 * 32


@dataclass(frozen=True, slots=True)
class Cifar:
    """One of the four forms in which CIFAR is given away."""

    title: str
    directory: str  # that holds the files, in the archive too
    splits: dict[str, dict[str, int]]  # split -> its files, and the images of each as published
    names: str  # file of the class names
    label_bytes: int = 0  # before each image of the binary version, of which the last counts; 0: pickled
    label_key: str = ""  # in the pickles
    names_key: str = ""


TEN = {"train": {f"data_batch_{i}": 10_000 for i in range(1, 6)}, "val": {"test_batch": 10_000}}
HUNDRED = {"train": {"train": 50_000}, "val": {"test": 10_000}}
TEN_BINARY, HUNDRED_BINARY = (
    {split: {f"{file}.bin": count for file, count in files.items()} for split, files in splits.items()}
    for splits in (TEN, HUNDRED)
)
CIFARS = (
    Cifar("CIFAR-10 (Python version)", "cifar-10-batches-py", TEN, "batches.meta", 0, "labels", "label_names"),
    Cifar("CIFAR-10 (binary version)", "cifar-10-batches-bin", TEN_BINARY, "batches.meta.txt", 1),
    Cifar("CIFAR-100 (Python version)", "cifar-100-python", HUNDRED, "meta", 0, "fine_labels", "fine_label_names"),
    Cifar("CIFAR-100 (binary version)", "cifar-100-binary", HUNDRED_BINARY, "fine_label_names.txt", 2),
)


def find_cifar(root: Path, packed: str, cifar: Cifar) -> Origin | None:
    """`packed` is the directory in the archive `root`, empty if that is none. Raises DataError."""
    files = find_files(root, packed, cifar.directory, cifar.names, [f for s in cifar.splits.values() for f in s])
    if files is None:
        return None
    splits = [split for split, names in cifar.splits.items() if holds_any(files, names)]
    return Origin(
        f"{cifar.title} in {files.place}", {split: partial(_load_cifar, files, cifar, split) for split in splits}
    )


def _load_cifar(files: Files, cifar: Cifar, split: str) -> ImageSet:
    published = cifar.splits[split]
    content = read_files(files, [*published, cifar.names])
    batches = {
        name: _unpack_records(content[name], files.path(name), cifar.label_bytes, count)
        if cifar.label_bytes
        else _unpickle_batch(content[name], files.path(name), cifar.label_key)
        for name, count in published.items()
    }
    classes = _class_names(content[cifar.names], files.path(cifar.names), cifar.names_key)
    for name, (_, labels) in batches.items():
        check_labels(labels, classes, files.path(name))
    images = np.concatenate([images for images, _ in batches.values()])
    labels = np.concatenate([labels for _, labels in batches.values()])
    return array_set(
        images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1),
        labels,
        classes,
        [Holder(files.holder(name), name, len(labels)) for name, (_, labels) in batches.items()],
        identity=checksum(images, labels),
        notes=tuple(
            n for name, (_, labels) in batches.items() for n in not_as_published(name, len(labels), published[name])
        ),
    )


def _unpack_records(data: bytes, path: Path, label_bytes: int, published: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3072) pixels and (N,) labels, both uint8."""
    check_size(len(data), label_bytes + CIFAR_PIXELS, published, path)
    records = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + CIFAR_PIXELS)
    return records[:, label_bytes:], records[:, label_bytes - 1]


def _unpickle_batch(data: bytes, path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3072) pixels, uint8, and (N,) labels, int64."""
    batch = _unpickle(data, path)
    images, labels = batch.get("data"), batch.get(label_key)
    if not isinstance(images, PickledArray) or images.pixels.ndim != 2 or images.pixels.shape[1] != CIFAR_PIXELS:
        raise DataError(f"{path}: no `data` with {CIFAR_PIXELS:,} bytes for each image; get it again")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{path}: no list of labels named `{label_key}`; get it again")
    if len(labels) != len(images.pixels) or not labels:
        raise DataError(f"{path}: {len(labels):,} labels for {len(images.pixels):,} images; get it again")
    return images.pixels, np.array(labels, np.int64)


def _class_names(data: bytes, path: Path, key: str) -> tuple[str, ...]:
    """Pickled under `key`, or, without one, each on a line."""
    names = _unpickle(data, path).get(key) if key else list(lines_of(data, path))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: no class names; get it again")
    return tuple(names)


# --- the Python version ----------------------------------------------------------------------------------------------


class PickledArray:
    """Stands for numpy.ndarray in a pickle; only arrays of bytes are accepted. `pixels` is uint8, of any shape."""

    __slots__ = ("pixels",)

    def __init__(self) -> None:
        self.pixels: np.ndarray = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, PickledType) or dtype.name not in ("u1", "|u1", "uint8"):
            raise pickle.UnpicklingError("an array, but not of bytes")
        data = data.encode("latin1") if isinstance(data, str) else data
        self.pixels = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


class PickledType:
    """Stands for numpy.dtype in a pickle."""

    __slots__ = ("name",)

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name

    def __setstate__(self, state: object) -> None:
        """Byte order and padding, which bytes do not have."""


def _array(*_: object) -> PickledArray:
    return PickledArray()


def _array_in_buffer(data: bytes, dtype: object, shape: object, order: str) -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in {encoding}")
    return text.encode("latin1")


# what a pickle may call. None of it is numpy's own: a hostile state never reaches its C code
HARMLESS = {
    "numpy.ndarray": PickledArray,
    "numpy.dtype": PickledType,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
    "numpy.core.numeric._frombuffer": _array_in_buffer,
    "numpy._core.numeric._frombuffer": _array_in_buffer,
    "_codecs.encode": _latin1,
}


class HarmlessUnpickler(pickle.Unpickler):
    """Pickles run what they name, and these come from strangers: so nothing but arrays of bytes is let in."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in HARMLESS:
            raise pickle.UnpicklingError(f"it would run {module}.{name}, which no file of CIFAR needs")
        return HARMLESS[f"{module}.{name}"]


def _unpickle(data: bytes, path: Path) -> dict[object, object]:
    try:
        content = HarmlessUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # damaged pickles raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{path}: {len(data):,} bytes that are no whole file of CIFAR: {reason}; get it again"
        ) from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a file of CIFAR, which holds a dictionary; get it again")
    return content
