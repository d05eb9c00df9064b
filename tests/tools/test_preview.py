from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import build_loaders
from ressl.batch import DataError
from ressl.config_file import load_config
from tools.preview import GAP, MARGIN, TILE, TITLES, save_views


def test_each_tile_shows_its_image_or_view(tiny_config: Path, tmp_path: Path) -> None:
    stream = build_loaders(load_config(tiny_config), device=torch.device("cpu")).train
    save_views(stream, tmp_path / "views.png", images=5)
    sheet = np.asarray(Image.open(tmp_path / "views.png")).astype(int)
    batch = next(iter(stream.epoch(0)))
    for column in range(5):
        left = MARGIN + TITLES + column * (TILE + GAP) + TILE // 2
        expected = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60)][int(batch.label[column])])
        for row in (0, 1):  # the image, and the weak view, which keeps its colour
            top = MARGIN + row * (TILE + GAP) + TILE // 2
            colour = sheet[top - 40 : top + 40, left - 40 : left + 40].mean(axis=(0, 1))
            assert np.abs(colour - expected).max() < 12


def test_a_picture_that_cannot_be_written_is_named(tiny_config: Path, tmp_path: Path) -> None:
    stream = build_loaders(load_config(tiny_config), device=torch.device("cpu")).train
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"views\.png: cannot write the picture"):
        save_views(stream, tmp_path / "file" / "views.png")
