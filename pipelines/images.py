"""Image files to RGB arrays, and the list of the images under a folder. One policy for every source and tool."""

import io
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from torch.nn import functional

from ressl.batch import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 89_478_485  # of one image: Pillow's own limit against decompression bombs
MAX_BYTES = 1 << 30  # of one file
CHANGES = ("CMYK", "16-bit", "palette", "alpha", "grey", "frames", "rotated")
"""What may have to be done to an image to make it RGB: see `open_image`."""

ORIENTATION = 0x0112  # the tag's number in EXIF and TIFF; 1 and unknown values mean none
ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED_BACK = {  # the others undo themselves
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
}
END_OF_SCAN = re.compile(rb"\xff+[\x01-\xcf\xd8-\xfe]")  # a marker that is no restart
ANY_BITS = bytes(range(1, 255))
MORE = ANY_BITS + b"".join(bytes((0xFF, 0xD0 + n)) + ANY_BITS for n in range(8))  # also behind every restart marker

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
    """The file as an (H, W, 3) uint8 RGB array; see `decode_image`. Raises BadImage."""
    return decode_image(read_file(path))


def read_file(path: Path | str) -> bytes:
    """The bytes of a regular file of up to MAX_BYTES.

    Anything else (FIFO, device, directory, dangling link) is refused before it is opened, so that nothing hangs.
    Raises BadImage.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  # making a Path takes longer than the call
        if not stat.S_ISREG(status.st_mode):
            kind = {stat.S_IFIFO: "FIFO", stat.S_IFDIR: "directory", stat.S_IFSOCK: "socket"}
            raise BadImage(f"not a regular file ({kind.get(stat.S_IFMT(status.st_mode), 'device')})")
        if status.st_size > MAX_BYTES:
            raise BadImage(f"{status.st_size / 2**30:.1f} GiB, over the limit of {MAX_BYTES / 2**30:.0f} GiB a file")
        with io.FileIO(path) as file:
            return file.readall()
    except FileNotFoundError:
        raise BadImage("dangling link" if Path(path).is_symlink() else "no such file") from None
    except OSError as error:
        raise BadImage(f"cannot be read: {(error.strerror or str(error)).lower()}") from None


def decode_image(data: bytes) -> np.ndarray:
    """A JPEG, PNG, WebP, BMP or TIFF file in memory as an (H, W, 3) uint8 RGB array, whatever its name was.

    Grey, palette and CMYK images become RGB, 16 bits become 8, alpha is dropped, of several frames the first counts.
    A rotation noted in the file is not applied: pixels stay as they are stored. What follows the end of an image is
    ignored. Any size from 1 x 1 pixel to MAX_PIXELS is read.

    Refused, with BadImage: what is empty, of another format (GIF too), cut off anywhere, larger than MAX_PIXELS
    according to its header, of 32-bit pixels or 12-bit grey ones, or a JPEG whose data end before its pixels do, as
    where the header tells twice the height. Flipped bits are refused where they break the format; where they give other
    pixels only, no decoder can tell.
    """
    with _errors_as_bad_images():
        image, _ = _load(data, upright=False)
        return np.array(image)


def open_image(data: bytes, upright: bool = False) -> tuple[Image.Image, tuple[str, ...]]:
    """The same as a decoded Pillow image of mode RGB, and which of CHANGES were made to get it, in their order.

    "CMYK": converted without a colour profile; those of a JPEG are inverted, as Adobe writes them. "16-bit": reduced
    to 8, of whatever colours. "palette": looked up. "alpha": dropped and not blended, one transparent colour too.
    "grey": repeated in R, G and B. "frames": the first of several was taken. "rotated": turned or mirrored as the
    file's EXIF orientation says, with `upright` only. Nothing else of the file is in the image: no EXIF, colour profile
    or comment that Pillow would write into another file. Raises BadImage.
    """
    with _errors_as_bad_images():
        return _load(data, upright)


def decoded_size(data: bytes) -> tuple[int, int]:
    """Height and width of what `decode_image` gives, for less work, and BadImage wherever it raises that.

    Of progressive JPEG files with flipped bits it also refuses a few that `decode_image` reads.

    All of a JPEG's entropy coded data is read, in which alone its decoder finds faults, but its brightness is computed
    at an eighth of the size only, and its colours not at all. Other formats are decoded.
    """
    with _errors_as_bad_images():
        image = _open(data)
        width, height = image.size
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            whole, _ = _load(data, upright=False)
            return whole.height, whole.width
        image.draft("L", (1, 1))
        image.load()
        _refuse_early_end(image, data)
        return height, width


@contextmanager
def _errors_as_bad_images() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("not enough memory to decode it") from None
    except Exception as error:  # damaged data can raise anything in Pillow's parsers: KeyError, zlib.error, ...
        raise BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from None


def _open(data: bytes) -> ImageFile.ImageFile:
    """The header only."""
    if not data:
        raise BadImage("empty file")
    image = _by_magic_number(io.BytesIO(data), data[:12])
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width} x {height} is {width * height / 1e6:.0f} Mpx, over the limit of 89 Mpx")
    return image


def _by_magic_number(file: io.BytesIO, head: bytes) -> ImageFile.ImageFile:
    """Not with Image.open, which warns about large images."""
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


def _load(data: bytes, upright: bool) -> tuple[Image.Image, tuple[str, ...]]:
    """What `open_image` does, with the errors of Pillow."""
    file = _open(data)
    packed = str(file.tile[0][3]) if file.tile and file.format != "BMP" else ""  # how pixels are stored; BMP: 5-6-5
    if ";12" in packed:
        raise BadImage("12-bit grey pixels; 8 and 16 bits are read")
    several = getattr(file, "is_animated", False) or "mp" in file.info  # "mp": the index of a JPEG with more behind it
    is_tiff = isinstance(file, TiffImagePlugin.TiffImageFile)
    noted = file.getexif().get(ORIENTATION) if upright or is_tiff else None
    file.load()
    if isinstance(file, JpegImagePlugin.JpegImageFile):
        _refuse_early_end(file, data)
    # Pillow turns TIFF files, and no others, when they are loaded, and then forgets the orientation
    turned = is_tiff and file.getexif().get(ORIENTATION) != noted
    rotation, mode = ROTATIONS.get(noted or 1), file.mode
    made = {
        "CMYK": mode == "CMYK",
        "16-bit": mode.startswith("I;16") or ";16" in packed,
        "palette": mode in ("P", "PA"),
        "alpha": mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in file.info,
        "grey": mode in ("1", "L", "LA", "La", "I") or mode.startswith("I;16"),
        "frames": several,
        "rotated": upright and rotation is not None,
    }
    image = _to_rgb(file)
    if rotation is not None and upright != turned:
        image = image.transpose(rotation if upright else TURNED_BACK.get(rotation, rotation))
    image.info = {}
    return image, tuple(name for name in CHANGES if made[name])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's conversion would cut all values above 255
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage("32-bit pixels, whose range is not defined")
    image.info.pop("transparency", None)  # Pillow would warn about it, then drop it
    return image.convert("RGB")


def _refuse_early_end(image: Image.Image, data: bytes) -> None:
    """Raises BadImage for a JPEG whose data end before its pixels do, of which Pillow does not tell.

    libjpeg fills what is missing with middle grey, the last pixel at least. Where that is grey, bytes are added to the
    data of the first scan: they change the picture only if some were missing.
    """
    last = image.crop((image.width - 1, image.height - 1, image.width, image.height))
    if last.mode != "CMYK" and abs(last.convert("L").tobytes()[0] - 128) > 1:  # chroma blurs in from the block above
        return
    file = io.BytesIO(data)
    JpegImagePlugin.JpegImageFile(file)  # reads up to the first scan
    end = END_OF_SCAN.search(data, file.tell())
    if end and _small(data) != _small(data[: end.start()] + MORE + data[end.start() :]):
        raise BadImage("cannot be decoded: its data end before its pixels do")


def _small(jpeg: bytes) -> bytes:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(jpeg))
    image.draft("L", (1, 1))
    return image.tobytes()


def fit_max_side(image: np.ndarray, max_side: int | None) -> np.ndarray:
    """The (H, W, 3) uint8 image, shrunk to a longer side of `max_side` pixels if it is larger: bicubic, antialiased.

    By torch, in a fifth of Pillow's time for the same pixels, and in the calling thread alone.
    """
    if max_side is None or max(image.shape[:2]) <= max_side:
        return image
    ((height, width),) = fitted_sizes(np.array([image.shape[:2]]), max_side).tolist()
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # in this order: channels last, for its fast path
    small = functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(small[0].permute(1, 2, 0).numpy())


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
        unclassed = sorted(images_under(root, "", ignored, deep=False))
        by_class = [sorted(images_under(root, name, ignored), key=in_parts) for name in classes]
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


def images_under(root: Path, directory: str, ignored: Counter[str], deep: bool = True) -> Iterator[str]:
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


def in_parts(path: str) -> str:
    """Sorts `a/x` before `a b/x`, as the directories sort."""
    return path.replace("/", "\0")
