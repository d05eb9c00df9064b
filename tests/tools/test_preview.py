"""The picture of the views: what it shows, what it says, and two sources side by side."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import launch
from pipelines import build_source, build_stream
from pipelines.draws import OPERATIONS, draw_view
from pipelines.folder_source import FolderSource
from pipelines.loader import ViewStream
from pipelines.resident_source import ResidentSource
from ressl.batch import DataError
from ressl.config import ResidentSource as ResidentConfig
from ressl.config import ViewConfig
from ressl.config_file import load_config
from tools.convert import convert
from tools.preview import AMPLIFIED, GAP, MARGIN, TILE, TITLES, in_words, save_views

CPU = torch.device("cpu")


def open_stream(config: Path, *overrides: str) -> ViewStream:
    cfg = load_config(config, list(overrides))
    source = build_source(cfg.data, "train", CPU)
    assert source is not None
    return build_stream(cfg, source, device=CPU)


def open_folder(root: Path) -> FolderSource:
    return FolderSource(root, workers=1, max_side=None, on_corrupt="replace", report=print)


def open_tensors(path: Path) -> ResidentSource:
    return ResidentSource(path, ResidentConfig(name="resident", train=path), CPU)


def read_picture(path: Path) -> tuple[np.ndarray, list[int]]:
    """(H, W, 3) ints, and the top of each row of tiles: beside it is a bar as high as a tile."""
    sheet = np.asarray(Image.open(path)).astype(int)
    bar = (sheet[:, MARGIN + 1] != 255).any(axis=1)
    tops = [y for y in range(len(bar)) if bar[y] and not bar[y - 1]]
    assert all(bar[top : top + TILE].all() and not bar[top + TILE] for top in tops)
    return sheet, tops


def left_of(column: int) -> int:
    return MARGIN + TITLES + column * (TILE + GAP)


def columns_of(sheet: np.ndarray) -> int:
    return (sheet.shape[1] - 2 * MARGIN - TITLES + GAP) // (TILE + GAP)


def test_each_tile_shows_its_image_or_view(tiny_config: Path, tmp_path: Path) -> None:
    stream = open_stream(tiny_config)
    save_views(stream, tmp_path / "views.png", images=5)
    sheet, tops = read_picture(tmp_path / "views.png")
    batch = next(iter(stream.epoch(0)))
    assert (len(tops), columns_of(sheet)) == (3, 5)
    for column in range(5):
        left = left_of(column) + TILE // 2
        expected = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)][int(batch.label[column])])
        view = batch.weak[0][column] * 0.25 + 0.5
        for row in (0, 1):  # the image, and the weak view, which keeps its colour
            top = tops[row] + TILE // 2
            colour = sheet[top - 40 : top + 40, left - 40 : left + 40].mean(axis=(0, 1))
            assert np.abs(colour - expected).max() < 16
        corner = sheet[tops[1] + 3, left_of(column) + 3]
        assert np.abs(corner - view[:, 0, 0].numpy() * 255).max() < 1


def test_the_boxes_of_the_crops_are_drawn_in_the_colours_of_the_views(tiny_config: Path, tmp_path: Path) -> None:
    stream = open_stream(tiny_config)
    save_views(stream, tmp_path / "views.png", images=3)
    sheet, tops = read_picture(tmp_path / "views.png")
    batch = next(iter(stream.epoch(0)))
    original = torch.full((3, 2), 16, dtype=torch.int32)
    strong = draw_view(stream.views.strong[0], original, batch.index[:3], seed=0, epoch=0, view=1)
    colour = sheet[tops[2] + 5, MARGIN + 1]
    for column in range(3):
        tile = sheet[tops[0] : tops[0] + TILE, left_of(column) : left_of(column) + TILE]
        rows, columns = np.nonzero((tile == colour).all(axis=2))
        top, left, height, width = (strong.box[column] * TILE).tolist()
        found = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
        assert np.abs(np.array(found) - [top, left, top + height, left + width]).max() <= 1.5


def test_an_image_takes_part_at_every_number_of_images(tiny_config: Path, tmp_path: Path) -> None:
    stream = open_stream(tiny_config)
    for images, columns in ((1, 1), (16, 16), (64, 16)):  # a batch has 16
        save_views(stream, tmp_path / "views.png", images=images)
        assert columns_of(read_picture(tmp_path / "views.png")[0]) == columns


@pytest.mark.parametrize("strong", [1, 5])
def test_no_text_leaves_its_place(strong: int, tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Everything happens to every view here, and a class has a long name."""
    always = ", ".join(f"{step}_prob: 1" for step in ("flip", "jitter", "grayscale", "blur", "solarize"))
    views = ", ".join([f"{{size: 16, {always}, randaugment: [14, 30]}}"] * strong)
    stream = open_stream(tiny_config, f"views.strong=[{views}]")
    stream.source.classes = ("a class whose name is much too long for the little room there is below", *"bcd")
    save_views(stream, tmp_path / "views.png", images=4)
    sheet, tops = read_picture(tmp_path / "views.png")
    white = (sheet == 255).all(axis=2)
    assert len(tops) == 2 + strong
    for column in range(3):
        right = left_of(column) + TILE
        assert white[:, right + 1 : right + GAP].all()
    assert white[:, -MARGIN + 1 :].all()
    assert white[:, left_of(0) - 2].all()
    for top in tops[1:]:
        assert white[top - GAP + 4 : top].all()
    assert not white[tops[1] - 2 * GAP : tops[1]].all()  # and there is text


def test_the_numbers_of_a_view_are_told_in_the_order_in_which_they_happen() -> None:
    cfg = ViewConfig(
        size=8, jitter_prob=1, grayscale_prob=1, blur_prob=1, solarize_prob=1, flip_prob=1, randaugment=(3, 9)
    )
    size = torch.tensor([[100, 200]])
    params = replace(
        draw_view(cfg, size, torch.tensor([7]), seed=0, epoch=0, view=1),
        box=torch.tensor([[0.1, 0.2, 0.5, 0.25]]),
        jitter=torch.tensor([[1.25, 0.75, 1.1, -0.05]]),
        order=torch.tensor([[2, 3, 0, 1]]),
        sigma=torch.tensor([1.5]),
        operations=torch.tensor([[OPERATIONS.index(name) for name in ("Rotate", "Color", "Equalize")]]),
        reverse=torch.tensor([[True, False, True]]),
    )
    assert in_words(params, cfg, 0, size[0]) == [
        "50 x 50 at 40, 10", "flip", "saturation 1.10", "hue -0.05", "brightness 1.25", "contrast 0.75", "gray",
        "blur 1.50", "solarize", "Rotate-", "Color+", "Equalize",
    ]  # fmt: skip
    plain = draw_view(ViewConfig(size=8, flip_prob=0), size, torch.tensor([7]), seed=0, epoch=0, view=0)
    assert len(in_words(plain, ViewConfig(size=8), 0, size[0])) == 1


def test_a_picture_that_cannot_be_written_is_named(tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"views\.png: cannot write the picture"):
        save_views(open_stream(tiny_config), tmp_path / "file" / "views.png")


# --- two sources -----------------------------------------------------------------------------------------------------


def compared(stream: ViewStream, other: object, path: Path) -> tuple[list[str], int]:
    """What is reported, and how many columns the picture has."""
    said: list[str] = []
    save_views(stream, path, images=6, other=other, names=("1 here", "2 there"), report=said.append)
    return said, columns_of(read_picture(path)[0])


def test_sources_of_the_same_pixels_are_not_apart(tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    said, columns = compared(open_stream(tiny_config), open_folder(tiny_data / "folder" / "train"), tmp_path / "c.png")
    none = "apart by 0.00 on average and 0.0 at most, of 255"
    assert (said, columns) == ([f"weak: {none}", f"strong 1: {none}"], 6)
    sheet, tops = read_picture(tmp_path / "c.png")
    assert len(tops) == 2 + 3 + 3
    for row in (4, 7):  # the differences
        assert sheet[tops[row] : tops[row] + TILE, left_of(0) : left_of(0) + TILE].max() == 0


def test_the_difference_is_measured_and_amplified(tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Every byte of the other source is three larger, and the weak view is the image."""
    for path in (tiny_data / "folder" / "train").rglob("*.png"):
        copy = tmp_path / "brighter" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path)).clip(0, 252) + np.uint8(3)).save(copy)
    stream = open_stream(tiny_config, "views.weak={size: 16, crop_scale: [1, 1], crop_ratio: [1, 1]}")
    said, _ = compared(stream, open_folder(tmp_path / "brighter"), tmp_path / "c.png")
    assert said[0] == "weak: apart by 3.00 on average and 3.0 at most, of 255"
    sheet, tops = read_picture(tmp_path / "c.png")
    tile = sheet[tops[4] : tops[4] + TILE, left_of(0) : left_of(0) + TILE]
    assert tile.min() == tile.max() == 3 * AMPLIFIED


def test_images_are_matched_by_index_though_their_places_differ(tiny_data: Path, tiny_config: Path, tmp_path: Path):
    """The one has its images in another order, the other lacks some."""
    folder, quiet = tiny_data / "folder", Console(file=io.StringIO())
    convert(str(folder), tmp_path / "mixed", "tensor", split="train", shuffle=True, console=quiet)
    mixed = open_stream(tiny_config, f"data.source={{name: resident, train: {tmp_path}/mixed/train.safetensors}}")
    said, columns = compared(mixed, open_folder(folder / "train"), tmp_path / "c.png")
    assert (len(said), columns) == (2, 6) and all("0.0 at most" in line for line in said)

    stream, shown = open_stream(tiny_config), next(iter(open_stream(tiny_config).epoch(0))).index[:6].tolist()
    paths = sorted((folder / "train").rglob("*.png"))
    for number, path in enumerate(paths):
        copy = tmp_path / "some" / path.parent.name / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"damaged" if number in (0, 1, 2, shown[2], 40) else path.read_bytes())
    convert(str(tmp_path / "some"), tmp_path / "out", "tensor", split="train", max_skipped=0.5, console=quiet)
    said, columns = compared(stream, open_tensors(tmp_path / "out" / "train.safetensors"), tmp_path / "c.png")
    missing = [i for i in shown if i in (0, 1, 2, shown[2], 40)]
    assert columns == 6 - len(missing)
    assert said[: len(missing)] == [f"image {i} is not in 2 there: left out" for i in missing]
    assert all("0.0 at most" in line for line in said[len(missing) :])


def test_a_source_with_none_of_the_images_is_refused(tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    stream = open_stream(tiny_config)
    last = int(next(iter(stream.epoch(0))).index[0])
    assert last > 0
    image = tmp_path / "one" / "0.png"
    image.parent.mkdir()
    image.write_bytes(next((tiny_data / "folder" / "train").rglob("*.png")).read_bytes())
    with pytest.raises(DataError, match="2 there: has none of the 1 images"):
        save_views(
            stream, tmp_path / "c.png", images=1, other=open_folder(tmp_path / "one"), names=("1 here", "2 there")
        )
    assert not (tmp_path / "c.png").exists()


def test_another_data_set_is_told_from_another_copy(tiny_config: Path, tiny_data: Path, tmp_path: Path) -> None:
    for number in range(72):
        image = tmp_path / "other" / "a" / f"{number:02}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 16)).save(image)
    with pytest.raises(DataError, match="16 x 16 pixels high and wide in 1 here and 16 x 30 in 2 there"):
        compared(open_stream(tiny_config), open_folder(tmp_path / "other"), tmp_path / "c.png")


def test_the_verb_compares_the_sources_of_two_configs(
    tiny_config: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.yaml"
    source = f"source: {{name: folder, train: {tiny_data}/folder/train}}"
    lines = [f"  {source}" if "source:" in line else line for line in tiny_config.read_text().splitlines()]
    other.write_text("\n".join(lines))
    out = tmp_path / "deep" / "c.png"
    arguments = ["views", tiny_config, "--compare", other, "--images", "2", "--out", out, "optim.batch_size=512"]
    monkeypatch.setattr(sys, "argv", ["launch.py", *map(str, arguments)])
    assert launch.main() == 0  # though the images are fewer than a batch
    assert "strong 1: apart by 0.00 on average" in capsys.readouterr().out
    assert columns_of(read_picture(out)[0]) == 2
    monkeypatch.setattr(sys, "argv", [*map(str, sys.argv[:4]), str(tmp_path / "nowhere.yaml")])
    assert launch.main() == 2
    assert "nowhere.yaml" in capsys.readouterr().err
