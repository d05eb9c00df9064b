"""What `convert` reads from arrays of pixels: IDX files (the MNIST family), CIFAR-10, CIFAR-100 and STL-10.

The layouts are those that their authors describe: yann.lecun.com/exdb/mnist, www.cs.toronto.edu/~kriz/cifar.html and
cs.stanford.edu/~acoates/stl10. CIFAR's archives as they are downloaded are read in place; that of STL-10 is too large
to be unpacked in memory.
"""

from functools import partial
from pathlib import Path

import numpy as np

from ressl.batch import DataError
from tools.image_sets.array_files import (
    Holder,
    array_set,
    check_labels,
    check_size,
    checksum,
    directory_in_archive,
    find_files,
    holds_any,
    is_file,
    lines_of,
    not_as_published,
    read_file,
    unpack,
)
from tools.image_sets.cifar import CIFARS, find_cifar
from tools.image_sets.image_set import ImageSet, Origin
from tools.image_sets.members import stamp_of

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
STL_PIXELS = 3 * 96 * 96
STL = "stl10_binary"
STL_SPLITS = {  # images, labels, how many there are
    "train": ("train_X.bin", "train_y.bin", 5_000),
    "val": ("test_X.bin", "test_y.bin", 8_000),
    "unlabeled": ("unlabeled_X.bin", None, 100_000),
}


def find_arrays(root: Path) -> Origin | None:
    """The data set in `root`, in the directory there that has its published name, or in CIFAR's archive `root`.

    None where there is none. Raises DataError for one that is damaged, for several, and for STL-10's archive.
    """
    packed = directory_in_archive(root, [*(cifar.directory for cifar in CIFARS), STL])
    if packed == STL:
        raise DataError(f"{root}: STL-10 packed; unpack it first, as with `tar -xf {root}`, and give {STL}/")
    origins = [_find_idx_files(root), *(find_cifar(root, packed, cifar) for cifar in CIFARS), _find_stl(root)]
    found = [origin for origin in origins if origin is not None]
    if len(found) > 1:
        listed = "; ".join(origin.description for origin in found)
        raise DataError(f"{root}: several data sets: {listed}; give the place of one")
    return found[0] if found else None


# --- IDX files -------------------------------------------------------------------------------------------------------


def _find_idx_files(root: Path) -> Origin | None:
    found = {split: _find_idx(root, prefix) for split, prefix in (("train", "train"), ("val", "t10k"))}
    idx = {split: paths for split, paths in found.items() if paths is not None}
    if not idx:
        return None
    fashion = any("fashion" in part.lower() for part in root.absolute().parts[-2:])
    names = FASHION if fashion else ()
    sets = {split: partial(_load_idx, images, labels, names) for split, (images, labels) in idx.items()}
    return Origin(f"IDX files {', '.join(str(images) for images, _ in idx.values())}", dict(sets))


def _find_idx(root: Path, prefix: str) -> tuple[Path, Path] | None:
    """Paths of the images and the labels of one split, in `root` or its `raw/`."""
    for directory in (root, root / "raw"):
        for dash in ("-", "."):
            for suffix in ("", ".gz"):
                images = directory / f"{prefix}-images{dash}idx3-ubyte{suffix}"
                if is_file(images):
                    labels = directory / f"{prefix}-labels{dash}idx1-ubyte"
                    packed = labels.with_name(labels.name + ".gz")
                    return images, packed if is_file(packed) and not is_file(labels) else labels
    return None


def _load_idx(images_path: Path, labels_path: Path, names: tuple[str, ...]) -> ImageSet:
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels):,} labels for the {len(images):,} images of {images_path}")
    classes = names or tuple(map(str, range(max(10, int(labels.max()) + 1))))
    check_labels(labels, classes, labels_path)
    holders = [Holder(images_path, images_path.name, len(images))]
    return array_set(images, labels, classes, holders, identity=checksum(images, labels))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A uint8 array with `dimensions` dimensions."""
    data = read_file(path)
    if path.suffix == ".gz":
        data = unpack(path, data)
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; get it again")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + int(np.prod(shape, dtype=object))
    if len(data) != expected or 0 in shape:
        raise DataError(f"{path}: {len(data):,} bytes, but its header says {expected:,}; get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# --- STL-10 ----------------------------------------------------------------------------------------------------------


def _find_stl(root: Path) -> Origin | None:
    files = find_files(root, "", STL, "class_names.txt", [images for images, _, _ in STL_SPLITS.values()])
    if files is None:
        return None
    splits = [split for split, (images, _, _) in STL_SPLITS.items() if holds_any(files, [images])]
    return Origin(f"STL-10 in {files.place}", {split: partial(load_stl, files.place, split) for split in splits})


def load_stl(directory: Path, split: str) -> ImageSet:
    """Raises DataError."""
    images_file, labels_file, published = STL_SPLITS[split]
    path, names_path = directory / images_file, directory / "class_names.txt"
    classes = lines_of(read_file(names_path), names_path)
    pixels = _map_file(path)
    check_size(len(pixels), STL_PIXELS, published, path)
    count = len(pixels) // STL_PIXELS
    labels = np.full(count, -1, np.int64)
    if labels_file is not None:
        labels = np.frombuffer(read_file(directory / labels_file), np.uint8).astype(np.int64) - 1
        check_labels(labels, classes, directory / labels_file)
    if len(labels) != count:
        raise DataError(
            f"{path}: {len(pixels):,} bytes, expected {len(labels) * STL_PIXELS:,} for {len(labels):,} labels"
        )
    return array_set(
        pixels.reshape(-1, 3, 96, 96).transpose(0, 3, 2, 1),  # each colour is stored column by column
        labels,
        classes,
        [Holder(path, images_file, count)],
        identity=f"{stamp_of(path)}-{checksum(labels)}",  # a checksum of the pixels would read all that is mapped
        notes=not_as_published(images_file, count, published),
    )


def _map_file(path: Path) -> np.ndarray:
    """The bytes of a file, mapped, so that processes share them."""
    try:
        return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
