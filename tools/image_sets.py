"""What `convert` can read: image folders, IDX files (the MNIST family), and data sets that torchvision downloads."""

import gzip
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.images import class_directories, describe_ignored, read_image, scan_folder
from ressl.batch import DataError

TORCHVISION = ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST", "STL10", "SVHN")
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist
VAL_NAMES = ("val", "valid", "test")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


@dataclass(frozen=True, slots=True)
class ImageSet:
    """N images that can be read in any order and from several threads at once."""

    labels: np.ndarray  # (N,) int64, -1 where unknown
    classes: tuple[str, ...]
    read: Callable[[int], np.ndarray]  # (H, W, 3) uint8; raises BadImage
    name: Callable[[int], str]  # of an image, for messages
    notes: tuple[str, ...] = ()  # what the user should know: files left out, empty classes
    chunk: int = 1  # images worth one task of a thread
    file: Callable[[int], Path] | None = None  # that holds the image; None where images have no files of their own


@dataclass(frozen=True, slots=True)
class Origin:
    description: str  # one line
    sets: dict[str, Callable[[], ImageSet]]  # split -> what loads it


def detect(source: str) -> Origin:
    """Finds out what `source` is. Raises DataError."""
    if source.startswith("torchvision:"):
        return _torchvision(source)
    root = Path(source).expanduser()
    directories = class_directories(root)
    idx = {
        split: files for split, prefix in (("train", "train"), ("val", "t10k")) if (files := _find_idx(root, prefix))
    }
    if idx:
        fashion = any("fashion" in part.lower() for part in root.absolute().parts[-2:])
        names = FASHION if fashion else ()
        sets = {split: partial(_load_idx, images, labels, names) for split, (images, labels) in idx.items()}
        return Origin(f"IDX files {', '.join(str(images) for images, _ in idx.values())}", dict(sets))
    val = next((name for name in VAL_NAMES if name in directories), None)
    if "train" not in directories or (val is None and len(directories) > 1):
        return Origin(f"image folder {root}", {"train": partial(_load_folder, root, None)})
    folders = {"train": partial(_load_folder, root / "train", None)}
    if val is not None:
        folders["val"] = partial(_load_folder, root / val, root / "train")
    others = [name for name in directories if name not in ("train", val)]
    unused = f"; not used: {', '.join(others[:5])}" if others else ""
    listed = ", ".join(f"{split} from {path.args[0].name}/" for split, path in folders.items())
    return Origin(f"image folder {root}, {listed}{unused}", dict(folders))


def _load_folder(root: Path, reference: Path | None) -> ImageSet:
    """With `reference`, the folder of the training split, classes are numbered as they are there."""
    folder = scan_folder(root)
    classes, labels = folder.classes, folder.labels
    notes = [f"ignored {describe_ignored(folder.ignored)}"] if folder.ignored else []
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        notes.append(
            f"classes without images, which keep their numbers: {', '.join(empty[:5])}{', ...' * (len(empty) > 5)}"
        )
    if reference is not None and classes:
        known = class_directories(reference)
        unknown = sorted(set(classes) - set(known))
        if unknown:
            listed = ", ".join(unknown[:5]) + ", ..." * (len(unknown) > 5)
            raise DataError(f"{root}: classes that {reference} does not have: {listed}; make the directories match")
        labels = np.array([known.index(name) for name in classes], np.int64)[labels]
        classes = known
    return ImageSet(
        labels=labels,
        classes=classes,
        read=lambda i: read_image(root / folder.paths[i]),
        name=lambda i: folder.paths[i],
        notes=tuple(notes),
        file=lambda i: root / folder.paths[i],
    )


def _array_set(images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> ImageSet:
    """From (N, H, W) grey or (N, H, W, 3) RGB uint8."""

    def read(i: int) -> np.ndarray:
        image = images[i]
        return np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else np.ascontiguousarray(image)

    return ImageSet(labels.astype(np.int64), classes, read, name=lambda i: f"image {i}", chunk=64)


# --- IDX files -------------------------------------------------------------------------------------------------------


def _find_idx(root: Path, prefix: str) -> tuple[Path, Path] | None:
    """Paths of the images and the labels of one split, in `root` or its `raw/`."""
    for directory in (root, root / "raw"):
        for dash in ("-", "."):
            for suffix in ("", ".gz"):
                images = directory / f"{prefix}-images{dash}idx3-ubyte{suffix}"
                if images.is_file():
                    labels = directory / f"{prefix}-labels{dash}idx1-ubyte"
                    packed = labels.with_name(labels.name + ".gz")
                    return images, packed if packed.is_file() and not labels.is_file() else labels
    return None


def _load_idx(images_path: Path, labels_path: Path, names: tuple[str, ...]) -> ImageSet:
    images, labels = _read_idx(images_path, 3), _read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise DataError(f"{labels_path}: {len(labels):,} labels for the {len(images):,} images of {images_path}")
    classes = names or tuple(map(str, range(max(10, int(labels.max()) + 1))))
    if int(labels.max()) >= len(classes):
        raise DataError(f"{labels_path}: label {labels.max()}, expected labels below {len(classes)}")
    return _array_set(images, labels, classes)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """A uint8 array with `dimensions` dimensions."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); get it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes([0, 0, 8, dimensions]):
        raise DataError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; get it again")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4)]
    expected = start + int(np.prod(shape, dtype=object))
    if len(data) != expected or 0 in shape:
        raise DataError(f"{path}: {len(data):,} bytes, but its header says {expected:,}; get it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


# --- torchvision -----------------------------------------------------------------------------------------------------


def _torchvision(source: str) -> Origin:
    name, _, given = source.removeprefix("torchvision:").partition(":")
    if name not in TORCHVISION:
        raise DataError(f"{source}: no such data set; known are {', '.join(TORCHVISION)}")
    root = Path(given or "data/torchvision").expanduser()
    splits = {"train": "train", "val": "test"}
    if name == "STL10":
        splits["unlabeled"] = "train+unlabeled"
    sets = {split: partial(_load_torchvision, name, root, theirs) for split, theirs in splits.items()}
    return Origin(f"torchvision's {name} in {root}", dict(sets))


def _load_torchvision(name: str, root: Path, split: str) -> ImageSet:
    from torchvision import datasets  # slow to import, and needed by nothing else here

    if name == "SVHN" and importlib.util.find_spec("scipy") is None:
        raise DataError("torchvision:SVHN: torchvision needs scipy to read it; install scipy")
    which: dict[str, Any] = {"split": split} if name in ("STL10", "SVHN") else {"train": split == "train"}
    try:
        data = getattr(datasets, name)(root, download=True, **which)
    except Exception as error:  # its readers raise whatever they run into, its downloads half a dozen types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"torchvision:{name}: cannot be read from or downloaded to {root}: {reason}") from None
    images = np.asarray(data.data)
    if name in ("STL10", "SVHN"):
        images = images.transpose(0, 2, 3, 1)
    labels = np.asarray(data.labels if name in ("STL10", "SVHN") else data.targets)
    classes = tuple(map(str, range(10))) if name == "SVHN" else tuple(data.classes)
    return _array_set(images, labels, classes)
