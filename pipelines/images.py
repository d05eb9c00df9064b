"""Image files to RGB arrays, and the list of the images under a folder. One policy for every source and tool."""

import io
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from ressl.batch import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # of one image: Pillow's own limit against decompression bombs
MAX_BYTES = 1 << 30  # of one file

HIDDEN = "(hidden)"
NO_SUFFIX = "(no suffix)"
NO_CLASS = "(outside the class directories)"
LINK_LOOP = "(link to a directory above)"


class BadImage(ValueError):
    """An image that cannot be read. The message is the reason only; the caller knows the name."""


@dataclass(frozen=True, slots=True)
class FolderIndex:
    """The images under a folder, in the order of their class, then of their path."""

    root: Path
    paths: tuple[str, ...]  # relative to root, with `/`; text, as a million Path objects would take half a GiB
    labels: np.ndarray  # (N,) int64, -1 where unknown
    classes: tuple[str, ...]  # label i is classes[i]; empty for a folder without class directories
    ignored: dict[str, int]  # files left out: lower-case suffix, or one of the words in brackets above -> how many


# --- one image -------------------------------------------------------------------------------------------------------


def read_image(path: Path | str) -> np.ndarray:
    """The file as an (H, W, 3) uint8 RGB array; see `decode_image`.

    Anything but a regular file (FIFO, device, directory, dangling link) is refused before it is opened, so that
    nothing hangs. Raises BadImage.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):
            kind = {stat.S_IFIFO: "FIFO", stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket"}
            raise BadImage(f"not a regular file ({kind.get(stat.S_IFMT(status.st_mode), 'device')})")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{status.st_size / 2**30:.1f} GiB, over the limit of {MAX_BYTES / 2**30:.0f} GiB a file")
        with Path(path).open("rb") as file:
            data = file.read(status.st_size)
    except FileNotFoundError:
        raise BadImage("dangling link" if Path(path).is_symlink() else "no such file") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {(error.strerror or str(error)).lower()}") from None
    return decode_image(data)


def decode_image(data: bytes) -> np.ndarray:
    """A JPEG, PNG, WebP, BMP or TIFF file in memory as an (H, W, 3) uint8 RGB array, whatever its name was.

    Grey, palette and CMYK images become RGB, 16 bits become 8, alpha is dropped, of several frames the first counts.
    A rotation noted in EXIF is not applied: pixels stay as they are stored. Raises BadImage.
    """
    if not data:
        raise BadImage("empty file")
    try:
        with _open(data) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BadImage(f"{width} x {height} is {width * height / 1e6:.0f} Mpx, over the limit of 89 Mpx")
            return _to_rgb(image)
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Exception as error:  # damaged data can raise anything in Pillow's parsers: KeyError, zlib.error, ...
        raise BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _open(data: bytes) -> Image.Image:
    """The header only. By magic number and not with Image.open, which warns about large images."""
    file, head = io.BytesIO(data), data[:12]
    if head.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile(file)
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile(file)
    if head.startswith(b"RIFF") and head[8:] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file)
    if head.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(file)
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return TiffImagePlugin.TiffImageFile(file)
    if head.startswith(b"GIF8"):
        raise BadImage("a GIF; JPEG, PNG, WebP, BMP and TIFF are read")
    raise BadImage("not an image: no JPEG, PNG, WebP, BMP or TIFF header")


def _to_rgb(image: Image.Image) -> np.ndarray:
    image.load()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's conversion would cut all values above 255
        grey = ((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadImage("32-bit pixels, whose range is not defined")
    image.info.pop("transparency", None)  # Pillow would warn about it, then drop it
    return np.array(image.convert("RGB"))


def fit_max_side(image: np.ndarray, max_side: int | None) -> np.ndarray:
    """The (H, W, 3) uint8 image, shrunk with antialiasing to a longer side of `max_side` pixels if it is larger."""
    if max_side is None or max(image.shape[:2]) <= max_side:
        return image
    ((height, width),) = fitted_sizes(np.array([image.shape[:2]]), max_side).tolist()
    # HAMMING shrinks about as sharply as BICUBIC, at half the cost
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.HAMMING))


def fitted_sizes(size: np.ndarray, max_side: int) -> np.ndarray:
    """(N, 2) int32, what `fit_max_side` makes of images of (N, 2) height and width."""
    longer = size.max(axis=1, keepdims=True)
    return np.where(longer > max_side, np.rint(size * max_side / longer).clip(min=1), size).astype(np.int32)


# --- a folder of images ----------------------------------------------------------------------------------------------


def scan_folder(root: Path) -> FolderIndex:
    """Lists the images under `root` by their suffix, without opening or stat-ing any.

    Each first-level directory is a class, numbered by name; an empty one keeps its number. Its images are taken at any
    depth. Links are followed. Images beside class directories have no class and are left out, counted in `ignored`;
    where no directory holds images, those directly under `root` are taken, with label -1. Raises DataError.
    """
    root = Path(root)
    classes = class_directories(root)
    ignored: Counter[str] = Counter()
    try:
        unclassed = sorted(_images_under(root, "", ignored, deep=False))
        by_class = [sorted(_images_under(root, name, ignored), key=_in_parts) for name in classes]
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None
    counts = [len(paths) for paths in by_class]
    if sum(counts) == 0 and not unclassed:
        looked_for = " ".join(IMAGE_SUFFIXES)
        found = f"only {describe_ignored(ignored)}" if ignored else "there are no files at all"
        raise DataError(f"{root}: no images found (looked for {looked_for}): {found}")
    if sum(counts) == 0:
        labels = np.full(len(unclassed), -1, np.int64)
        return FolderIndex(root, tuple(unclassed), labels, (), dict(sorted(ignored.items())))
    if unclassed:
        ignored[NO_CLASS] = len(unclassed)
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
    return FolderIndex(
        root, tuple(p for paths in by_class for p in paths), labels, classes, dict(sorted(ignored.items()))
    )


def class_directories(root: Path) -> tuple[str, ...]:
    """Names of the directories directly under `root`, sorted, hidden ones left out. Raises DataError."""
    if not root.exists():
        raise DataError(f"{root}: no such directory; give the folder that holds the images")
    if not root.is_dir():
        raise DataError(f"{root}: not a directory; give the folder that holds the images")
    try:
        with os.scandir(root) as entries:
            return tuple(sorted(e.name for e in entries if e.name[0] != "." and _is_directory(e)))
    except OSError as error:
        raise DataError(f"{root}: cannot be listed: {error.strerror}") from None


def describe_ignored(ignored: dict[str, int]) -> str:
    """`14 other files (9 .gif, 5 .txt)`, the most frequent first."""
    ranked = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count:,} {suffix}" for suffix, count in ranked[:5]] + ["..."] * (len(ranked) > 5)
    total = sum(ignored.values())
    return f"{total:,} other file{'s' * (total != 1)} ({', '.join(listed)})"


def _images_under(root: Path, directory: str, ignored: Counter[str], deep: bool = True) -> Iterator[str]:
    """Paths relative to root, in no order. Directories are followed unless one is also its own ancestor."""
    todo: list[tuple[str, tuple[tuple[int, int], ...]]] = [(directory, ())]
    while todo:
        relative, ancestors = todo.pop()
        here = root / relative
        status = here.stat()
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            ignored[LINK_LOOP] += 1
            continue
        prefix = f"{relative}/" if relative else ""
        with os.scandir(here) as entries:
            for entry in entries:
                name = entry.name
                dot = name.rfind(".")
                suffix = name[dot:].lower() if dot > 0 else ""
                if _is_directory(entry):
                    if deep and name[0] != ".":
                        todo.append((prefix + name, (*ancestors, identity)))
                elif name[0] == ".":
                    ignored[HIDDEN] += 1
                elif suffix in IMAGE_SUFFIXES:
                    yield prefix + name
                else:
                    ignored[suffix or NO_SUFFIX] += 1


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _in_parts(path: str) -> str:
    """Sorts `a/x` before `a b/x`, as the directories sort."""
    return path.replace("/", "\0")
