"""What all tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tools.convert import convert

REPO = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU, Triton's kernels run in its interpreter. It asks once, when imported: so before any test."""
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout."""
    return REPO


@pytest.fixture(autouse=True)
def _skip_gpu_tests_without_a_gpu(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60))

TINY = """
data:
  source: {{name: resident, train: {data}/train.safetensors, val: {data}/val.safetensors}}
  mean: [0.5, 0.5, 0.5]
  std: [0.25, 0.25, 0.25]
views:
  weak: {{size: 16}}
  strong:
    - {{size: 16, jitter_prob: 0.8, blur_prob: 0.5, blur_sigma: [0.1, 1.0]}}
encoder: {{name: resnet_small, width: 4}}
method: {{name: ressl, hidden_dim: 32, embed_dim: 16, queue_size: 40, teacher_momentum: 0.9}}
optim: {{name: sgd, epochs: 2, batch_size: 16, lr: 0.06, warmup_epochs: 0}}
evaluate: {{size: 16, batch_size: 30, knn: {{k: 5}}, linear: {{epochs: 3, crops: centre}}}}
run: {{out_dir: {out}, device: cpu, log_every: 1}}
"""


def make_image_folder(root: Path, *, images: int = 72, size: int = 16, seed: int = 0) -> Path:
    """`images` PNG files in four classes: flat colours with noise, so that a view's mean colour tells its class."""
    noise = np.random.default_rng(seed).integers(-40, 40, (images, size, size, 3))
    for number in range(images):
        colour = number % len(COLOURS)
        path = root / f"colour{colour}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((noise[number] + np.array(COLOURS[colour])).clip(0, 255).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with folder/{train,val} of 72 and 40 PNG images, and train and val as .safetensors beside it."""
    root = tmp_path_factory.mktemp("tiny")
    make_image_folder(root / "folder" / "train", images=72)
    make_image_folder(root / "folder" / "val", images=40, seed=1)
    convert(str(root / "folder"), root, "tensor", console=Console(quiet=True))
    return root


@pytest.fixture(scope="session")
def write_tiny_config(tiny_data: Path) -> Callable[[Path], Path]:
    """Writes tiny.yaml into a directory: a config that trains in seconds on a CPU. Its run goes to `run` there."""

    def write(directory: Path) -> Path:
        path = directory / "tiny.yaml"
        path.write_text(TINY.format(data=tiny_data, out=directory / "run"))
        return path

    return write


@pytest.fixture
def tiny_config(write_tiny_config: Callable[[Path], Path], tmp_path: Path) -> Path:
    return write_tiny_config(tmp_path)
