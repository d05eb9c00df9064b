"""Every kind of odd image, met while training: it is read as everywhere, or replaced aloud, or ends the run by name.

`convert` and the files that it writes: tests/tools/test_convert_odd_images.py.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.dali_source import DaliSource
from pipelines.folder_source import FolderSource
from pipelines.frames import Frames
from pipelines.images import read_image
from pipelines.resident_source import ResidentSource
from ressl.batch import DataError
from ressl.config import ResidentSource as Config

CPU = torch.device("cpu")
KINDS = ["folder", "dali", "resident"]
BATCH = 7
SECONDS = 10  # none of them may keep a run waiting


class Images:
    """A folder with a good image before and behind each odd one, which `spoil` puts into its place."""

    def __init__(self, root: Path, odd: Path, outcomes: dict[str, tuple[int, int] | str]) -> None:
        if os.geteuid() == 0:  # who may read everything
            outcomes = outcomes | {"unreadable.jpg": (48, 64)}
        self.root, self.odd, self.outcomes, self.names = root, odd, outcomes, sorted(outcomes)
        self.paths: list[Path] = []
        (root / "a").mkdir(parents=True)
        for number, name in enumerate(self.names):
            for here in ("0 before.jpg", f"1 {name}"):
                self.paths.append(root / "a" / f"{number:02}{here}")
                self.paths[-1].symlink_to(odd / "good.jpg")
        self.bad = {2 * i + 1: reason for i, name in enumerate(self.names) if isinstance(reason := outcomes[name], str)}

    def spoil(self, *positions: int) -> None:
        for position in positions:
            self.paths[position].unlink()
            self.paths[position].symlink_to(self.odd / self.names[position // 2])

    def __len__(self) -> int:
        return len(self.paths)


@pytest.fixture
def images(odd_images, tmp_path) -> Images:
    return Images(tmp_path / "images", *odd_images)


def open_source(kind: str, root: Path, on_corrupt: str, report: Callable[[str], None]):
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
        return DaliSource(
            root, device=CPU, workers=2, max_side=None, hw_decoder_load=0, on_corrupt=on_corrupt, report=report
        )
    return FolderSource(root, workers=2, max_side=None, on_corrupt=on_corrupt, report=report)


def read(
    kind: str, images: Images, spoiled: list[int], on_corrupt: str, report=print
) -> Callable[[list], list[Frames]]:
    """The stream of a source that found good images and meets others at the positions `spoiled`."""
    source = open_source("folder" if kind == "resident" else kind, images.root, on_corrupt, report)
    images.spoil(*spoiled)
    if kind == "resident":
        source = ResidentSource(images.root, Config(name="resident", train=images.root), CPU, decoder=lambda: source)
    return lambda batches: list(source.stream(batches, salt=1))


def decoded(frames: list[Frames]) -> list[tuple[int, np.ndarray]]:
    """Index and pixels of each image."""
    found = []
    for one in frames:
        tables = zip(one.index.tolist(), one.offset.tolist(), one.size.tolist(), strict=True)
        for index, start, (height, width) in tables:
            pixels = one.pixels[start : start + 3 * height * width].numpy().reshape(height, width, 3)
            found.append((index, pixels))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_can_be_read_are_read_alike_and_just_the_others_are_replaced_aloud(images, kind):
    said: list[str] = []
    everything = np.arange(len(images))
    batches = [everything[i : i + BATCH] for i in range(0, len(images), BATCH)]
    began = time.monotonic()
    found = decoded(read(kind, images, list(range(1, len(images), 2)), "replace", said.append)(batches))
    assert time.monotonic() - began < SECONDS
    assert [i for i in range(len(images)) if found[i][0] != i] == sorted(images.bad)
    for index, pixels in found:
        assert index not in images.bad and np.array_equal(pixels, read_image(images.paths[index])), images.paths[index]
    names = {f"{images.paths[position]}": reason for position, reason in images.bad.items()}
    assert {one.split(": ")[0] for one in said} == names.keys()  # some more than once: they were to stand in for others
    for one in said:
        assert names[one.split(": ")[0]] in one and f"; replaced by {images.root}" in one and "\n" not in one


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_can_be_read_pass_where_one_that_cannot_would_end_the_run(images, kind):
    good = [position for position in range(len(images)) if position not in images.bad]
    stream = read(kind, images, [position for position in good if position % 2], "fail")
    assert [index for index, _ in decoded(stream([np.array(good)]))] == good


@pytest.mark.parametrize("kind", KINDS)
def test_each_that_cannot_be_read_ends_the_run_in_one_line_with_its_name(images, kind):
    before, good = set(threading.enumerate()), images.paths[0].readlink()
    for position, reason in images.bad.items():
        began = time.monotonic()
        with pytest.raises(DataError) as ended:
            read(kind, images, [position], "fail")([np.arange(position - 1, position + 2) % len(images)])
        assert time.monotonic() - began < SECONDS
        message = str(ended.value)
        assert message.startswith(f"{images.paths[position]}: ") and reason in message and "\n" not in message
        assert message.endswith(" (data.on_corrupt=replace goes on without it)")
        images.paths[position].unlink()
        images.paths[position].symlink_to(good)
    assert set(threading.enumerate()) <= before
