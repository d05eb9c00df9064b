"""Data sets that torchvision knows by name, and downloads where their owners let it."""

import inspect
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import PpmImagePlugin

from pipelines.headers import read_regular
from pipelines.images import MAX_PIXELS, BadImage, read_image
from ressl.batch import DataError
from tools.image_sets.array_files import Holder, array_set, checksum
from tools.image_sets.arrays import STL, load_stl
from tools.image_sets.image_set import TORCHVISION_ROOT, ImageSet, Origin
from tools.image_sets.members import stamp_of


@dataclass(frozen=True, slots=True)
class Known:
    """How torchvision's class is asked for each split."""

    splits: dict[str, dict[str, Any]]  # ours -> its arguments
    maker: str = ""  # the class, where our name is another
    downloads: bool = True


FLAGS = Known({"train": {"train": True}, "val": {"train": False}})
TWO = Known({"train": {"split": "train"}, "val": {"split": "test"}})
THREE = Known({name: {"split": name} for name in ("train", "val", "test")})
ALL = Known({"train": {}})
PLACES = {"train": "train-standard", "val": "val", "test": "test"}
KNOWN = {
    "CIFAR10": FLAGS,
    "CIFAR100": FLAGS,
    "MNIST": FLAGS,
    "FashionMNIST": FLAGS,
    "KMNIST": FLAGS,
    "STL10": Known({"train": {}, "val": {}, "unlabeled": {}}),
    "SVHN": TWO,
    "Caltech101": ALL,
    "Caltech256": ALL,
    "CLEVRClassification": THREE,
    "Country211": Known({"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}),
    "DTD": THREE,
    **{
        f"EMNIST-{part}": Known({s: {"split": part, "train": s == "train"} for s in ("train", "val")}, "EMNIST")
        for part in ("balanced", "byclass", "bymerge", "digits", "letters", "mnist")
    },
    "EuroSAT": ALL,
    "FGVCAircraft": THREE,
    "Flowers102": THREE,
    "Food101": TWO,
    "GTSRB": TWO,
    **{
        f"Imagenette{name}": Known({s: {"split": s, "size": size} for s in ("train", "val")}, "Imagenette")
        for name, size in (("", "full"), ("-320px", "320px"), ("-160px", "160px"))
    },
    "INaturalist": Known({"train": {"version": "2021_train"}, "val": {"version": "2021_valid"}}),
    "INaturalist-mini": Known(
        {"train": {"version": "2021_train_mini"}, "val": {"version": "2021_valid"}}, "INaturalist"
    ),
    "OxfordIIITPet": Known({"train": {"split": "trainval"}, "val": {"split": "test"}}),
    "Places365": Known({ours: {"split": theirs} for ours, theirs in PLACES.items()}),
    "Places365-small": Known({s: {"split": theirs, "small": True} for s, theirs in PLACES.items()}, "Places365"),
    "QMNIST": FLAGS,
    "RenderedSST2": THREE,
    "SEMEION": ALL,
    "StanfordCars": Known(TWO.splits, downloads=False),
    "SUN397": ALL,
    "USPS": FLAGS,
}


def open_torchvision(source: str, download: bool = True) -> Origin:
    """`torchvision:NAME[:ROOT]`. `val` is torchvision's val, or its test where it has no other. What is not there is
    downloaded when it is loaded, unless `download` is False. Raises DataError."""
    name, _, given = source.removeprefix("torchvision:").partition(":")
    if name not in KNOWN:
        raise DataError(f"{source}: no such data set; known are {', '.join(KNOWN)}")
    try:
        root = Path(given or TORCHVISION_ROOT).expanduser()
    except RuntimeError as error:
        raise DataError(f"{source}: {error}; give the whole path") from None
    sets = {split: partial(_load, name, root, split, download) for split in KNOWN[name].splits}
    return Origin(f"torchvision's {name} in {root}", dict(sets))


def _load(name: str, root: Path, split: str, may_download: bool) -> ImageSet:
    from torchvision import datasets  # slow to import, and needed by nothing else here

    known = KNOWN[name]
    maker = getattr(datasets, known.maker or name)
    download: dict[str, Any] = {"download": may_download} if known.downloads else {}
    if name == "STL10":
        _ask(name, root, lambda: maker(root, split="test", **download))  # downloads all, and looks at the checksums
        return load_stl(root / STL, split)
    # so that an item is the path of an image
    loader: dict[str, Any] = {"loader": os.fspath} if "loader" in inspect.signature(maker).parameters else {}
    data = _ask(name, root, lambda: maker(root, **known.splits[split], **download, **loader))
    if hasattr(data, "data"):
        return _from_arrays(name, data)
    return _from_files(root, data, _ask(name, root, lambda: _list_files(data)))


def _ask(name: str, root: Path, question: Callable[[], Any]) -> Any:
    """What torchvision answers. Raises DataError."""
    try:
        return question()
    except Exception as error:  # its readers raise whatever they run into, its downloads half a dozen types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"torchvision:{name}: cannot be read from or downloaded to {root}: {reason}") from None


def _from_arrays(name: str, data: Any) -> ImageSet:
    images = np.asarray(data.data)
    if name == "SVHN":
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    labels = np.asarray(data.targets if hasattr(data, "targets") else data.labels)
    labels = (labels[:, 0] if labels.ndim == 2 else labels).astype(np.int64)  # QMNIST tells more of each digit
    holders = [Holder(Path(name), name, len(labels))]
    made = array_set(images, labels, _classes(data, labels), holders, identity=checksum(images, labels))
    # torchvision does not tell the file; whether that is another one, the checksum does
    return replace(made, stamp=lambda i: (images.nbytes, 0))


def _from_files(root: Path, data: Any, files: list[tuple[str, int]]) -> ImageSet:
    labels = np.array([label for _, label in files], np.int64)
    paths = tuple(path for path, _ in files)
    return ImageSet(
        labels=labels,
        classes=_classes(data, labels),
        name=lambda i: os.path.relpath(paths[i], root),
        read=lambda i: _read(Path(paths[i])),
        stamp=lambda i: stamp_of(Path(paths[i])),
    )


def _list_files(data: Any) -> list[tuple[str, int]]:
    """Path and label of each image, sorted by path, as some come in the order of the file system."""
    items: Iterable[tuple[Any, Any]]
    match type(data).__name__:
        case "GTSRB":
            items = data._samples
        case "OxfordIIITPet":
            items = zip(data._images, data._labels, strict=True)
        case "Caltech101" | "Caltech256" as name:
            folder = Path(data.root, "101_ObjectCategories" if name == "Caltech101" else "256_ObjectCategories")
            start = ["image"] * len(data.categories) if name == "Caltech101" else [c[:3] for c in data.categories]
            places = zip(data.y, data.index, strict=True)
            items = ((folder / data.categories[y] / f"{start[y]}_{number:04}.jpg", y) for y, number in places)
        case _:
            items = (data[i] for i in range(len(data)))
    return sorted((os.fspath(path), -1 if label is None else int(label)) for path, label in items)


def _classes(data: Any, labels: np.ndarray) -> tuple[str, ...]:
    """Names, the first where a class has several; numbers where it has none."""
    attributes = (getattr(data, name, ()) for name in ("classes", "categories", "all_categories"))
    names = next(filter(None, attributes), ())
    firsts = [name if isinstance(name, str) else name[0] for name in names]
    numbers = getattr(data, "class_to_idx", {})
    if set(numbers) == set(firsts):
        firsts.sort(key=numbers.__getitem__)
    return (*firsts, *map(str, range(len(firsts), int(labels.max(initial=-1)) + 1)))


def _read(path: Path) -> bytes | np.ndarray:
    """The file, or the pixels of one of a format that is not among ours: GTSRB has PPM. Raises BadImage."""
    data = read_regular(path) or read_image(path)
    if path.suffix.lower() != ".ppm" or isinstance(data, np.ndarray):
        return data
    try:
        with PpmImagePlugin.PpmImageFile(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} is over the limit of 89 Mpx")
            return np.array(image.convert("RGB"))
    except BadImage:
        raise
    except Exception as error:  # damaged data can raise anything
        raise BadImage(f"cannot be decoded: {' '.join(str(error).split())}") from None
