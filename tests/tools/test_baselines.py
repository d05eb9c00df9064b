from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.beton import JPG, open_beton
from ressl.config import ViewConfig
from tools.baselines import PilFiles, PilViews, ffcv_write, torchvision_pil

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STRONG = ViewConfig(size=24, jitter_prob=0.8, grayscale_prob=1.0, blur_prob=0.5)


def write_images(root: Path, count: int) -> Path:
    for number in range(count):
        Image.fromarray(np.full((40, 50, 3), 20 * number, np.uint8)).save(root / f"{number}.png")
    return root


def test_an_image_gets_all_views_of_their_sizes(tmp_path: Path) -> None:
    files = [str(write_images(tmp_path, 1) / "0.png")]
    views = PilViews(files, [ViewConfig(size=32), STRONG], MEAN, STD)[0]
    assert [(view.shape, view.dtype) for view in views] == [
        ((3, 32, 32), torch.float32), ((3, 24, 24), torch.float32),
    ]  # fmt: skip


def test_views_of_a_black_image_are_black_and_normalised(tmp_path: Path) -> None:
    files = [str(write_images(tmp_path, 1) / "0.png")]
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    for view in PilViews(files, [ViewConfig(size=32), STRONG], MEAN, STD)[0]:
        torch.testing.assert_close(view, black.view(3, 1, 1).expand_as(view))


def test_a_strong_view_is_augmented(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    view = PilViews([str(tmp_path / "noise.png")], [STRONG], (0, 0, 0), (1, 1, 1))[0][0]
    torch.testing.assert_close(view[0], view[1])  # gray
    assert view.std() > 0


def test_an_epoch_leaves_out_the_last_partial_batch(tmp_path: Path) -> None:
    run = torchvision_pil(write_images(tmp_path, 7), [STRONG], mean=MEAN, std=STD, batch=3, workers=1)
    assert run(0) == 6 and run(1) == 6


def test_a_file_is_read_with_its_label_and_as_rgb(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 77).save(tmp_path / "grey.png")
    image, label = PilFiles([str(tmp_path / "grey.png")], [3])[0]
    assert (image.mode, image.size, image.getpixel((0, 0)), label) == ("RGB", (5, 4), (77, 77, 77), 3)


def test_ffcv_writes_all_images_shrunk_and_as_jpeg(tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    for name, count in (("a", 3), ("b", 2)):
        (tmp_path / "files" / name).mkdir(parents=True)
        write_images(tmp_path / "files" / name, count)
    ffcv_write(tmp_path / "files", tmp_path / "stock.beton", max_side=30, quality=90, workers=2)
    beton = open_beton(tmp_path / "stock.beton")
    assert beton.label.tolist() == [0, 0, 0, 1, 1]
    assert beton.size.tolist() == [[24, 30]] * 5 and set(beton.mode.tolist()) == {JPG}
