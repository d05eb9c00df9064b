"""What can be told of an image file without decoding it."""

import stat
from io import FileIO
from pathlib import Path

from pipelines.images import MAX_BYTES, MAX_PIXELS

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"  # the signature, then the header of 13 bytes
PNG_END = b"\0\0\0\0IEND\xaeB\x60\x82"


def read_regular(path: Path) -> bytes | None:
    """The bytes of a regular file within the limit of `pipelines.images`, or None: `read_image` knows what is wrong."""
    try:
        status = path.stat()  # before opening, as that would wait for whoever writes to a FIFO
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            return None
        with FileIO(path) as file:
            return file.readall()
    except OSError:
        return None


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG or PNG file, from its header, or None where `decode_image` should see to it.

    That is every other format; files that are cut off or go on behind their end; CMYK, RGB, lossless and arithmetically
    coded JPEG; PNG of 16 bits or interlaced; and images above the limit of pixels.
    """
    size = None
    if data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"):
        size = _jpeg_size(data)
    elif data.startswith(PNG_START) and data.endswith(PNG_END) and data[24] <= 8 and data[28] == 0:
        size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    return size if size is not None and 0 < size[0] * size[1] <= MAX_PIXELS else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Walks the segments before the frame header (ITU-T T.81, B.1 and B.2)."""
    at = 2
    while at + 20 < len(data) and data[at] == 0xFF:
        marker, body = data[at + 1], at + 4
        if marker in (0xC0, 0xC1, 0xC2):  # Huffman coded: baseline, extended, progressive
            kinds = data[body + 6 : body + 15 : 3]  # of the components; R, G, B where there is no colour transform
            if data[body] != 8 or data[body + 5] not in (1, 3) or (data[body + 5] == 3 and kinds == b"RGB"):
                return None
            return int.from_bytes(data[body + 1 : body + 3], "big"), int.from_bytes(data[body + 3 : body + 5], "big")
        if marker == 0xEE and data[body : body + 5] == b"Adobe" and data[body + 11] == 0:
            return None
        if marker not in (0xC4, 0xDB, 0xDD, 0xFE) and not 0xE0 <= marker <= 0xEF:
            return None
        at += 2 + int.from_bytes(data[at + 2 : body], "big")
    return None
