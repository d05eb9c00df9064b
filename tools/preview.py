"""A picture of what the teacher and the student see: frames, weak views, strong views, side by side."""

from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.frames import Frames
from pipelines.loader import ViewStream
from pipelines.views import canvas
from ressl.batch import DataError

TILE, GAP, MARGIN, TITLES, FOOT = 112, 6, 12, 72, 18  # pixels


def save_views(stream: ViewStream, path: Path, *, images: int = 8, epoch: int = 0) -> None:
    """Writes a PNG with a column for each of the first images of `epoch`: the image, its weak view, its strong ones."""
    with closing(stream.frames(epoch)) as frames_of_epoch:
        frames = next(frames_of_epoch)
    batch = stream.cut(frames, epoch)
    count = min(images, len(frames.index))
    rows = [("image", "as stored", _frames(frames, count))]
    rows.append(("weak", "teacher", _views(batch.weak[0][:count], stream)))
    for view, cfg in zip(batch.strong, stream.views.strong, strict=True):
        rows.append((f"strong {cfg.size}", "student", _views(view[:count], stream)))
    labels = [_label(stream, int(index), int(label)) for index, label in zip(frames.index, frames.label, strict=True)]
    _save(_sheet(rows, labels[:count]), path)


def _label(stream: ViewStream, index: int, label: int) -> str:
    classes = stream.source.classes
    return f"{classes[label]}  #{index}" if 0 <= label < len(classes) else f"#{index}"


def _sheet(rows: list[tuple[str, str, list[Image.Image]]], labels: list[str]) -> Image.Image:
    step = TILE + GAP
    width, height = 2 * MARGIN + TITLES + len(labels) * step - GAP, 2 * MARGIN + len(rows) * step + FOOT
    sheet = Image.new("RGB", (width, height), "white")
    draw, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(13), ImageFont.load_default(11)
    for row, (title, network, tiles) in enumerate(rows):
        top = MARGIN + row * step
        draw.text((MARGIN, top + TILE // 2 - 16), title, fill="black", font=font)
        draw.text((MARGIN, top + TILE // 2 + 2), network, fill="#555555", font=small)
        for column, tile in enumerate(tiles):
            sheet.paste(tile, (MARGIN + TITLES + column * step, top))
    for column, label in enumerate(labels):
        place = (MARGIN + TITLES + column * step, MARGIN + len(rows) * step)
        draw.text(place, _shortened(label, draw, small), fill="#555555", font=small)
    return sheet


def _shortened(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    while draw.textlength(text, font) > TILE:
        text = text[:-2] + "\u2026"
    return text


def _frames(frames: Frames, count: int) -> list[Image.Image]:
    pixels = canvas(frames, frames.offset[:count], frames.stride[:count]).permute(0, 2, 3, 1).cpu().numpy()
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
        with suppress(OSError):
            part.unlink()
