"""A decoded data set in one safetensors file: what the resident source puts on the device."""

import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipelines.manifest import check_tables
from ressl.batch import DataError

FORMAT = "ressl-tensor-1"
MAX_SIDE = 65535

# dtype and shape after the first dimension; pixels is (bytes,), all others have N rows
LAYOUT: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "pixels": (torch.uint8, ()),
    "offset": (torch.int64, ()),
    "label": (torch.int64, ()),
    "index": (torch.int64, ()),
    "size": (torch.int32, (2,)),
    "original": (torch.int32, (2,)),
}


@dataclass(frozen=True, slots=True)
class TensorFile:
    """N images of any sizes, on the CPU, checked. `pixels` is mapped from the file where the system can."""

    path: Path
    pixels: Tensor  # (bytes,) uint8: RGB images in tight rows, then the slack that Frames asks for
    offset: Tensor  # (N,) int64, the first byte of each image
    size: Tensor  # (N, 2) int32, height and width
    original: Tensor  # (N, 2) int32, height and width before any resizing
    label: Tensor  # (N,) int64, -1 where unknown
    index: Tensor  # (N,) int64, the image's entry in its data set
    classes: tuple[str, ...]  # label i is classes[i]


def read_tensor_file(path: Path, *, sealed: bool = False) -> TensorFile:
    """Reads and checks all but the pixels themselves. `sealed`: where an index lies beside the file, its checksum of
    the tables counts too (see `open_beton`). Raises DataError for anything that is not such a file, whole."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file; give the path of a .safetensors file")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            keys = set(file.keys())
            if metadata.get("format") != FORMAT or keys != set(LAYOUT):
                raise DataError(f"{path}: not a data set in the format {FORMAT}; make one with `convert --to tensor`")
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in LAYOUT}
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; make it with `convert --to tensor`") from None
    except SafetensorError as error:
        raise DataError(f"{path}: damaged or truncated: {error}; convert or copy it again") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: its header is damaged; convert or copy it again") from None
    result = TensorFile(path=path, classes=_classes(path, metadata), **tensors)
    problem = _find_shape_problem(tensors) or _find_problem(result)
    if problem:
        raise DataError(f"{path}: damaged: {problem}; convert or copy it again")
    if sealed:
        check_tables(path, _tables(result))
    return result


def _tables(file: TensorFile) -> Iterator[bytes]:
    """What comes before the pixels, and what behind them, in a file that `convert` wrote: there they come first."""
    last = int((file.offset + 3 * file.size.long().prod(1)).max())
    with file.path.open("rb") as opened:
        first = 8 + int.from_bytes(opened.read(8), "little") + int(file.offset.min())
        opened.seek(0)
        yield opened.read(first)
        opened.seek(first - int(file.offset.min()) + last)
        yield opened.read()


def _classes(path: Path, metadata: dict[str, str]) -> tuple[str, ...]:
    try:
        classes = json.loads(metadata.get("classes", ""))
    except (ValueError, RecursionError):  # a ValueError also of a number with thousands of digits
        classes = None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{path}: damaged: its class names are not a list; convert or copy it again")
    return tuple(classes)


def _find_shape_problem(tensors: dict[str, Tensor]) -> str | None:
    count = len(tensors["label"]) if tensors["label"].dim() else 0
    for key, (dtype, shape) in LAYOUT.items():
        tensor = tensors[key]
        expected = (tensor.numel() if key == "pixels" else count, *shape)
        if tensor.dtype != dtype or tuple(tensor.shape) != expected:
            return f"{key} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected} {dtype}"
    return None if count else "it holds no images"


def _find_problem(file: TensorFile) -> str | None:
    height, width = file.size.long().unbind(1)
    if (file.size < 1).any() or (file.size > MAX_SIDE).any():
        return "impossible height or width"
    if (file.original < file.size).any():
        return "impossible original height or width"
    # The last row of every image can be read as far as the widest image's would go, see Frames. An offset beyond the
    # buffer is refused first, as the sum could overflow.
    if (file.offset < 0).any() or (file.offset >= file.pixels.numel()).any():
        return "an image lies outside the pixels"
    if (file.offset + 3 * width * (height - 1) + 3 * width.max() > file.pixels.numel()).any():
        return "an image lies outside the pixels"
    if (file.label < -1).any() or (file.label >= len(file.classes)).any():
        return f"a label outside the {len(file.classes)} classes"
    if (file.index < 0).any() or len(file.index.unique()) != len(file.index):
        return "negative or repeated index"
    return None
