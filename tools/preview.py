"""A picture of what the teacher and the student see: images, weak views and strong views, with the numbers of each.

Or of two sources side by side: the same images through both, cut with the same numbers, and how far they are apart.
"""

from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from torch import Tensor

from pipelines import build_source, build_stream
from pipelines.draws import OPERATIONS, ViewParams
from pipelines.frames import Frames, Source
from pipelines.loader import ViewStream, cut
from pipelines.prefetch import prefetch
from pipelines.randaugment import SHARPNESS, SHEAR_X
from pipelines.views import canvas
from ressl.batch import DataError
from ressl.config import Config, ViewConfig
from ressl.runtime import preferred_device
from tools.decoding import shown_decoding

TILE, GAP, MARGIN, TITLES, LINE = 152, 9, 14, 96, 14  # pixels
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#4b2e83")  # of the views, then again from the first
GRAY = "#555555"
AMPLIFIED = 8  # times, differences between two sources
JITTER = ("brightness", "contrast", "saturation", "hue")
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True, slots=True)
class Row:
    """One tile and its caption for each image."""

    titles: tuple[str, ...]  # the first one large
    colour: str
    tiles: list[Image.Image]
    captions: list[list[str]]  # pieces, set one after another into as many lines as they need


@dataclass(frozen=True, slots=True)
class Cut:
    """What one source makes of the images."""

    name: str
    frames: Frames  # where they are: they may share the memory of a whole data set
    views: list[Tensor]  # each (B, 3, h, w), bytes as float32, on the CPU


def draw_views(cfg: Config, out: Path, *, images: int = 8, epoch: int = 0, other: Config | None = None) -> None:
    """`save_views` of the source of `cfg`, or of those of both configs."""
    console, device = Console(markup=False, highlight=False), preferred_device(cfg.run)

    def say(message: str) -> None:
        console.print(message, soft_wrap=True)

    with shown_decoding(console) as progress:
        source, second = (
            build_source(one.data, "train", device, say, progress=progress) if one else None for one in (cfg, other)
        )
    assert source is not None
    size = min(cfg.optim.batch_size, len(source.labels))  # a few images can be shown, if not trained on
    optim = cfg.optim.model_copy(update={"batch_size": size, "accumulate": 1})
    stream = build_stream(cfg.model_copy(update={"optim": optim}), source, device=device)
    names = (f"1 {cfg.data.source.name}", f"2 {other.data.source.name}") if other else ("", "")
    save_views(stream, out, images=images, epoch=epoch, other=second, names=names, report=say)


def save_views(
    stream: ViewStream,
    path: Path,
    *,
    images: int = 8,
    epoch: int = 0,
    other: Source | None = None,
    names: tuple[str, str] = ("", ""),
    report: Callable[[str], None] = print,
) -> None:
    """Writes a PNG with a column for each of the first images of `epoch`: the image with the boxes of its crops, its
    weak view, its strong ones, and below each the numbers that were drawn for it.

    With another source every view is there from both, and their difference. `names` are those of the two sources;
    `report` is told of images that the other one lacks, and how far the views are apart. Raises DataError.
    """
    positions = np.concatenate(list(islice(stream.sampler.epoch(epoch), stream.sampler.accumulate)))[:images]
    frames = _read(stream, stream.source, positions)
    found = positions
    if other is not None:
        index = frames.index.cpu().numpy()
        found = _find(other, index)
        for missing in index[found < 0]:
            report(f"image {missing} is not in {names[1]}: left out")
        if (found < 0).all():
            raise DataError(f"{names[1]}: has none of the {len(index)} images that are first in {names[0]}")
        frames, found = _read(stream, stream.source, positions[found >= 0]), found[found >= 0]

    params = stream.params(frames, epoch)
    cuts = [_cut(stream, names[0], frames, params, epoch)]
    if other is not None:
        again = _read(stream, other, found)
        _check_same_images(frames, again, names)
        cuts.append(_cut(stream, names[1], again, params, epoch))
    params = [ViewParams(*(getattr(view, name).cpu() for name in view.__slots__)) for view in params]
    _save(_sheet(_rows(stream, cuts, params, stream.configs(epoch), report)), path)


# --- images of both sources ------------------------------------------------------------------------------------------


def _read(stream: ViewStream, source: Source, positions: np.ndarray) -> Frames:
    with closing(prefetch(source.stream([positions], salt=stream.sampler.seed), stream.device, depth=1)) as frames:
        return next(frames)


def _find(source: Source, index: np.ndarray) -> np.ndarray:
    """(B,) int64, where `source` has the images of `index`, -1 where it has not."""
    order = np.argsort(source.index, kind="stable")
    place = order[np.searchsorted(source.index, index, sorter=order).clip(max=len(order) - 1)]
    return np.where(source.index[place] == index, place, -1)


def _check_same_images(ours: Frames, theirs: Frames, names: tuple[str, str]) -> None:
    """Raises DataError where shapes differ by more than resizing rounds: an index then means another image there."""
    a, b = ours.original.double().cpu(), theirs.original.double().cpu()
    unlike = (a[:, 0] * b[:, 1] / (a[:, 1] * b[:, 0])).log().abs() > 2 / b.amin(dim=1)
    for row in unlike.nonzero().flatten().tolist():
        one, two = (" x ".join(f"{side:.0f}" for side in sizes[row].tolist()) for sizes in (a, b))
        raise DataError(
            f"image {int(ours.index[row])} is {one} pixels high and wide in {names[0]} and {two} in {names[1]}: "
            "these are not the same data set"
        )


def _cut(stream: ViewStream, name: str, frames: Frames, params: Sequence[ViewParams], epoch: int) -> Cut:
    views = cut(frames, params, stream.configs(epoch), stream.views.impl, stream.data, torch.float32)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (stream.data.mean, stream.data.std))
    return Cut(name, frames, [(view.cpu() * std + mean).clamp(0, 1) * 255 for view in views])


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(
    stream: ViewStream,
    cuts: list[Cut],
    params: list[ViewParams],
    cfgs: list[ViewConfig],
    report: Callable[[str], None],
) -> list[Row]:
    boxes, original = [view.box for view in params], cuts[0].frames.original.cpu()
    rows = [
        Row(("image", one.name or "as stored"), "black", _frames(one.frames, boxes), _labels(stream, one.frames))
        for one in cuts
    ]
    for number, (view, cfg) in enumerate(zip(params, cfgs, strict=True)):
        name = f"strong {number}" if number else "weak"
        titles: tuple[str, ...] = (name, "student" if number else "teacher", f"{cfg.size} x {cfg.size}")
        if cfg.randaugment:
            titles += ("RandAugment", f"{cfg.randaugment[0]}, {cfg.randaugment[1]}")
        numbers = [in_words(view, cfg, i, original[i]) for i in range(len(view.box))]
        nothing: list[list[str]] = [[] for _ in numbers]
        colour = COLOURS[number % len(COLOURS)]
        for one in cuts:
            last = (one.name,) if one.name else ()
            captions = numbers if one is cuts[-1] else nothing
            rows.append(Row((*titles, *last), colour, _tiles(one.views[number]), captions))
        if len(cuts) == 2:
            apart = (cuts[0].views[number] - cuts[1].views[number]).abs()
            stats = [[f"max {one.max():.1f}", f"mean {one.mean():.2f}"] for one in apart]
            title = (f"|1 - 2| x {AMPLIFIED}", name, "of 255 steps")
            rows.append(Row(title, colour, _tiles((apart * AMPLIFIED).clamp(max=255)), stats))
            report(f"{name}: apart by {apart.mean():.2f} on average and {apart.max():.1f} at most, of 255")
    return rows


def _labels(stream: ViewStream, frames: Frames) -> list[list[str]]:
    classes, captions = stream.source.classes, []
    for row in range(len(frames.index)):
        index, label = int(frames.index[row]), int(frames.label[row])
        (height, width), (rows, columns) = frames.original[row].tolist(), frames.size[row].tolist()
        pieces = [classes[label]] if 0 <= label < len(classes) else []
        pieces += [f"#{index}", f"{width} x {height}"]
        captions.append(pieces + ([f"as {columns} x {rows}"] if (rows, columns) != (height, width) else []))
    return captions


def in_words(params: ViewParams, cfg: ViewConfig, i: int, size: Tensor) -> list[str]:
    """What happened to image `i`, in words, in the order in which it happened; the box in pixels of the original."""
    top, left, height, width = (params.box[i] * size.repeat(2)).tolist()
    pieces = [f"{width:.0f} x {height:.0f} at {left:.0f}, {top:.0f}"] + ["flip"] * bool(params.flip[i])
    factors = params.jitter[i].tolist()
    if factors != [1, 1, 1, 0]:
        turns = [op for op in params.order[i].tolist() if cfg.jitter[op] > 0]
        pieces += [f"{JITTER[op]} {factors[op]:{'+.2f' if op == 3 else '.2f'}}" for op in turns]
    pieces += ["gray"] * bool(params.grayscale[i])
    pieces += [f"blur {params.sigma[i]:.2f}"] * bool(params.sigma[i] > 0)
    pieces += ["solarize"] * bool(params.solarize[i])
    for op, reverse in zip(params.operations[i].tolist(), params.reverse[i].tolist(), strict=True):
        ways = ("-" if reverse else "+") if SHEAR_X <= op <= SHARPNESS else ""
        pieces.append(f"{OPERATIONS[op]}{ways}")
    return pieces


# --- drawing ---------------------------------------------------------------------------------------------------------


def _sheet(rows: list[Row]) -> Image.Image:
    large, small = ImageFont.load_default(14), ImageFont.load_default(11)
    captions = [[_lines(pieces, small) for pieces in row.captions] for row in rows]
    heights = [TILE + 3 + LINE * max(map(len, lines)) + GAP for lines in captions]
    width = 2 * MARGIN + TITLES + len(rows[0].tiles) * (TILE + GAP) - GAP
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights) - GAP), "white")
    draw, top = ImageDraw.Draw(sheet), MARGIN
    for row, lines, height in zip(rows, captions, heights, strict=True):
        draw.rectangle((MARGIN, top, MARGIN + 3, top + TILE - 1), fill=row.colour)
        for number, title in enumerate(row.titles):
            font = small if number else large
            place = (MARGIN + 10, top + (6 + LINE * number if number else 0))
            draw.text(place, _shortened(title, font, TITLES - 14), fill=GRAY if number else row.colour, font=font)
        for column, (tile, caption) in enumerate(zip(row.tiles, lines, strict=True)):
            left = MARGIN + TITLES + column * (TILE + GAP)
            sheet.paste(tile, (left, top))
            for number, line in enumerate(caption):
                draw.text((left, top + TILE + 3 + number * LINE), line, fill=GRAY, font=small)
        top += height
    return sheet


def _lines(pieces: list[str], font: Font) -> list[str]:
    """The pieces, with commas between them, in lines that are no wider than a tile."""
    lines: list[str] = []
    for number, piece in enumerate(pieces):
        piece += "," * (number < len(pieces) - 1)
        if lines and font.getlength(f"{lines[-1]} {piece}") <= TILE:
            lines[-1] += f" {piece}"
        else:
            lines.append(_shortened(piece, font, TILE))
    return lines


def _shortened(text: str, font: Font, width: int) -> str:
    while font.getlength(text) > width:
        text = text[:-2] + "\u2026"
    return text


def _frames(frames: Frames, boxes: list[Tensor]) -> list[Image.Image]:
    pixels = canvas(frames, frames.offset, frames.stride).permute(0, 2, 3, 1).cpu().numpy()
    tiles = []
    for row, (height, width) in enumerate(frames.size.tolist()):
        tile = _tile(pixels[row, :height, :width])
        draw, scale = ImageDraw.Draw(tile), TILE / max(height, width)
        corner = ((TILE - scale * width) / 2, (TILE - scale * height) / 2)
        for number, box in enumerate(boxes):
            top, left, high, wide = (box[row] * torch.tensor([height, width, height, width]) * scale).tolist()
            x, y = corner[0] + left, corner[1] + top
            draw.rectangle((x, y, x + wide - 1, y + high - 1), outline=COLOURS[number % len(COLOURS)], width=2)
        tiles.append(tile)
    return tiles


def _tiles(views: Tensor) -> list[Image.Image]:
    return [_tile(view) for view in views.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()]


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
