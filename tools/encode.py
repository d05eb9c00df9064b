"""One image of a source to what is stored of it. All that decides the bytes of an output is here and in `Options`."""

import errno
import hashlib
import io
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from pipelines.beton import JPG, RAW
from pipelines.headers import plain_size
from pipelines.images import CHANGES, BadImage, decoded_size, fit_max_side, open_image
from ressl.batch import DataError
from tools.image_sets.image_set import ImageSet
from tools.rows import ROW, SUFFIXES

Format = Literal["ffcv", "tensor", "webdataset"]
Mode = Literal["auto", "jpg", "raw", "smart", "original"]
Check = Literal["decode", "header"]
UNAVAILABLE = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
RAW_PIXELS = 64 * 64  # `auto` keeps images of up to this many pixels raw
MAX_SIDE = 65500  # pixels; libjpeg's limit, and just under that of .beton
ANEW = "encoded anew"
RULES = (*CHANGES, ANEW)  # what may be done to an image that cannot be stored as it is; a bit of ROW's `changes` each
KINDS = {b"\xff\xd8": 0, b"\x89P": 1, b"RI": 2, b"BM": 3, b"II": 4, b"MM": 4}  # first bytes -> entry of SUFFIXES


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes of the output, besides the source."""

    to: Format
    mode: Mode = "auto"
    jpg_share: float = 0.5  # of the images, in mode `smart`
    quality: int = 90
    max_side: int | None = None
    exif_rotate: bool = False
    check: Check = "decode"
    shuffle: bool = False
    shard_mb: int = 1000


def read_options(options: Options) -> dict[str, object]:
    """Those that its format and mode read, by name; the others change nothing."""
    names = ["to", "max_side", "exif_rotate", "shuffle"]
    match options.to:
        case "ffcv":
            names += ["mode"]
            names += ["quality"] * (options.mode != "raw")
            names += ["jpg_share"] * (options.mode == "smart")
            names += ["check"] * (options.mode == "original")
        case "webdataset":
            names += ["quality", "check", "shard_mb"]
    return {name: getattr(options, name) for name in names}


@dataclass(frozen=True, slots=True)
class Encoded:
    data: bytes  # an image file, or height x width x 3 bytes
    row: np.void  # ROW


@dataclass(frozen=True, slots=True)
class Skipped:
    index: int
    name: str
    reason: str
    stamp: tuple[int, int]  # of the source, see ImageSet.stamp


def encode(images: ImageSet, options: Options, i: int) -> Encoded | Skipped:
    """What is stored of the data set's entry `i`, or why it is left out."""
    try:
        found = images.read(i)
        kept = _keep(found, options) if isinstance(found, bytes) and _passes(options) else None
        if kept is not None:
            return _encoded(images, i, found, JPG, (), kept, kept)  # type: ignore[arg-type]
        image, original, changes = prepare(found, options)
        data, mode = _store(image, found, options, i)
        if _passes(options) and (isinstance(found, bytes) or options.to == "ffcv"):
            changes = (*changes, ANEW)
        return _encoded(images, i, data, mode, changes, (image.height, image.width), original)
    except BadImage as error:
        cause = error.__context__
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno in UNAVAILABLE):
            raise DataError(f"{printable(images.name(i))}: {error}; the same command goes on when it can be") from None
        return Skipped(i, printable(images.name(i)), str(error), images.stamp(i))


def prepare(found: bytes | np.ndarray, options: Options) -> tuple[Image.Image, tuple[int, int], tuple[str, ...]]:
    """The RGB image as it is to be stored, turned and resized; height and width before resizing; the rules that were
    applied. Raises BadImage."""
    if isinstance(found, bytes):
        image, changes = open_image(found, options.exif_rotate)
    else:
        image, changes = Image.fromarray(found), ()
    original = (image.height, image.width)
    if options.max_side is not None and max(image.size) > options.max_side:
        image = Image.fromarray(fit_max_side(np.array(image), options.max_side))
    if max(image.size) > MAX_SIDE:
        raise BadImage(f"{image.width} x {image.height}: a side over {MAX_SIDE} pixels; --max-side would shrink it")
    return image, original, changes


def lossy(options: Options) -> bool:
    """Whether images may be encoded with loss."""
    return options.to == "webdataset" or (options.to == "ffcv" and options.mode != "raw")


def printable(text: str) -> str:
    """File names are bytes: those that are not UTF-8 cannot be printed or stored as text."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _passes(options: Options) -> bool:
    """Whether files are stored as they are where they can be."""
    return options.to == "webdataset" or (options.to == "ffcv" and options.mode == "original")


def _keep(data: bytes, options: Options) -> tuple[int, int] | None:
    """Height and width of a file that is stored as it is; None where it has to be encoded anew. Raises BadImage."""
    size = plain_size(data)
    plain = size is not None and (options.to == "webdataset" or KINDS.get(data[:2]) == 0)
    if options.exif_rotate:
        image, changes = open_image(data, upright=True)
        if "rotated" in changes:
            return None
        size = (image.height, image.width)
    elif size is None or options.check == "decode":
        size = decoded_size(data)
    if (options.to == "ffcv" and not plain) or max(size) > min(MAX_SIDE, options.max_side or MAX_SIDE):
        return None
    return size


def _store(image: Image.Image, found: bytes | np.ndarray, options: Options, i: int) -> tuple[bytes, int]:
    """The image's data and its mode, JPG or RAW."""
    match options.to:
        case "tensor":
            raw = True
        case "webdataset":
            if isinstance(found, np.ndarray) and found.shape[:2] == (image.height, image.width):
                return _to_file(image, "PNG"), JPG
            raw = False
        case "ffcv":
            raw = options.mode == "raw"
            raw |= options.mode == "auto" and image.height * image.width <= RAW_PIXELS
            raw |= options.mode == "smart" and _share_of(i) >= options.jpg_share
    return (image.tobytes(), RAW) if raw else (to_jpeg(image, options.quality), JPG)


def to_jpeg(image: Image.Image, quality: int) -> bytes:
    """Baseline JPEG with halved chroma (4:2:0)."""
    return _to_file(image, "JPEG", quality=quality, subsampling="4:2:0")


def _to_file(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _share_of(i: int) -> float:
    """A number from 0 to 1 that looks random, always the same for the same image."""
    return int.from_bytes(hashlib.blake2b(i.to_bytes(8, "little"), digest_size=4).digest(), "little") / 2**32


def _encoded(
    images: ImageSet,
    i: int,
    data: bytes,
    mode: int,
    changes: tuple[str, ...],
    size: tuple[int, int],
    original: tuple[int, int],
) -> Encoded:
    kind = KINDS.get(data[:2], 0) if mode == JPG else 0
    bits = sum(1 << RULES.index(change) for change in changes)
    facts = (i, int(images.labels[i]), len(data), zlib.crc32(data), mode, kind, bits, size, original, images.stamp(i))
    return Encoded(data, np.array([facts], ROW)[0])


def changes_of(rows: np.ndarray) -> dict[str, int]:
    """Rule -> how many of the (N,) ROW it was applied to; rules that none needed are left out."""
    counts = {rule: int(np.count_nonzero(rows["changes"] >> bit & 1)) for bit, rule in enumerate(RULES)}
    return {rule: count for rule, count in counts.items() if count}


assert len(SUFFIXES) == 5 and len(RULES) <= 16  # a byte and 16 bits in ROW
