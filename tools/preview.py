"""A picture of what the teacher and the student see: frames, weak views, strong views, side by side."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.frames import Frames
from pipelines.loader import ViewStream
from pipelines.views import canvas
from ressl.batch import DataError

TILE, GAP, MARGIN, HEAD = 112, 6, 12, 26  # pixels


def save_views(stream: ViewStream, path: Path, *, images: int = 8, epoch: int = 0) -> None:
    """Writes a PNG with a row for each of the first images of `epoch`: the frame, the weak view, each strong view."""
    frames_of_epoch = stream.frames(epoch)
    frames = next(iter(frames_of_epoch))
    batch = stream.cut(frames, epoch)
    count = min(images, len(frames.index))
    columns = [("image", _frames(frames, count)), ("weak, teacher", _views(batch.weak[0][:count], stream))]
    for view, cfg in zip(batch.strong, stream.views.strong, strict=True):
        columns.append((f"strong {cfg.size} px, student", _views(view[:count], stream)))
    labels = [_label(stream, int(index), int(label)) for index, label in zip(frames.index, frames.label, strict=True)]
    close = getattr(frames_of_epoch, "close", None)
    if close:
        close()
    _save(_sheet(columns, labels[:count]), path)


def _label(stream: ViewStream, index: int, label: int) -> str:
    classes = stream.source.classes
    return f"{classes[label]}  #{index}" if 0 <= label < len(classes) else f"#{index}"


def _sheet(columns: list[tuple[str, list[Image.Image]]], labels: list[str]) -> Image.Image:
    rows, step = len(labels), TILE + GAP
    sheet = Image.new(
        "RGB", (2 * MARGIN + len(columns) * step - GAP, 2 * MARGIN + HEAD + rows * (step + 16) - GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(12), ImageFont.load_default(11)
    for column, (title, tiles) in enumerate(columns):
        left = MARGIN + column * step
        draw.text((left, MARGIN), title, fill="black", font=font if len(title) < 20 else small)
        for row, tile in enumerate(tiles):
            top = MARGIN + HEAD + row * (step + 16)
            sheet.paste(tile, (left, top))
            if column == 0:
                draw.text((left, top + TILE + 2), labels[row], fill="#555555", font=small)
    return sheet


def _frames(frames: Frames, count: int) -> list[Image.Image]:
    pixels = canvas(frames)[:count].cpu().numpy()
    sizes = frames.size[:count].tolist()
    return [_tile(image[:height, :width]) for image, (height, width) in zip(pixels, sizes, strict=True)]


def _views(views: Tensor, stream: ViewStream) -> list[Image.Image]:
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (stream.data.mean, stream.data.std))
    pixels = (views.float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [_tile(image) for image in pixels.permute(0, 2, 3, 1).numpy()]


def _tile(image: np.ndarray) -> Image.Image:
    """Fitted into a square, its aspect kept; small images keep their pixels visible."""
    height, width = image.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    filter = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (TILE, TILE), "#eeeeee")
    tile.paste(Image.fromarray(image).resize(size, filter), ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return tile


def _save(sheet: Image.Image, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(part, "PNG")
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot write the picture: {error.strerror}") from None
    finally:
        part.unlink(missing_ok=True)
