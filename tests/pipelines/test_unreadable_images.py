"""Images that cannot be read while training: another one takes the place and the record says so, or the run stops."""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import JPG, open_beton
from pipelines.folder_source import FolderSource
from ressl.batch import DataError
from tools.convert import convert

COUNT, DAMAGED = 27, (4, 17)
LABELS = [i // 9 for i in range(COUNT)]
ALL = np.arange(COUNT)
OTHER_DECODER = 2  # mean steps of a byte; FFCV's JPEG library enlarges chroma otherwise than Pillow's (measured: 1.13)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    patches = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC))


def write_folder(root: Path) -> list[Path]:
    paths = [root / "abc"[label] / f"{i:02}.png" for i, label in enumerate(LABELS)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i, 20 + 3 * (i % 5), 44 - 4 * (i % 7))).save(path)
    return paths


def open_folder(root: Path, on_corrupt: str = "fail", report=print, max_side: int | None = None) -> FolderSource:
    return FolderSource(root, workers=2, max_side=max_side, on_corrupt=on_corrupt, report=report)


def with_policy(source, on_corrupt: str, messages: list[str]):
    """The same source under another policy, so that FFCV compiles once."""
    other = copy.copy(source)
    other.on_corrupt, other.report = on_corrupt, messages.append
    return other


def images_of(frames) -> list[np.ndarray]:
    shapes = [(int(h), int(w), 3) for h, w in frames.size]
    starts = frames.offset.tolist()
    return [
        frames.pixels[start : start + h * w * c].numpy().reshape(h, w, c)
        for start, (h, w, c) in zip(starts, shapes, strict=True)
    ]


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    paths = write_folder(root)
    for i in DAMAGED:
        paths[i].write_bytes(paths[i].read_bytes()[:200])
    return open_folder(root), [str(paths[i]) for i in DAMAGED]


@pytest.fixture(scope="module")
def damaged_beton(tmp_path_factory):
    """Damaged after it was written and checked, as by a failing disk; the tables are whole."""
    pytest.importorskip("ffcv")
    from pipelines.ffcv_source import FfcvSource

    out = tmp_path_factory.mktemp("damaged_beton")
    write_folder(out / "png")
    convert(str(out / "png"), out, "ffcv", mode="jpg", console=Console(file=io.StringIO()))
    path = out / "train.beton"
    beton = open_beton(path)
    assert (beton.mode == JPG).all()
    with path.open("r+b") as file:
        for i in DAMAGED:
            file.seek(int(beton.data_ptr[i]) + 2)
            file.write(bytes(int(beton.data_size[i]) - 4))
    source = FfcvSource(path, workers=2, on_corrupt="fail", report=print)
    return source, [f"{path}: image {i}:" for i in DAMAGED]


@pytest.fixture(params=["folder", "beton"])
def damaged(request):
    """A source with two unreadable images, and how each is named."""
    return request.getfixturevalue(f"damaged_{request.param}")


def test_it_is_replaced_and_reported_and_always_by_the_same_image(damaged):
    source, names = damaged
    runs = []
    for _ in range(2):
        messages: list[str] = []
        (frames,) = with_policy(source, "replace", messages).stream([ALL], salt=5)
        runs.append((frames.index.tolist(), sorted(messages), [image.tobytes() for image in images_of(frames)]))
    assert runs[0] == runs[1]
    assert len(messages) == 2
    for name in names:
        assert sum(name in message and "replaced by" in message for message in messages) == 1


def test_what_takes_its_place_is_another_image_whole(damaged):
    source, _ = damaged
    (frames,) = with_policy(source, "replace", []).stream([ALL], salt=5)
    index, images = frames.index.tolist(), images_of(frames)
    assert [i for i in range(COUNT) if index[i] != i] == list(DAMAGED)
    assert frames.label.tolist() == [LABELS[i] for i in index]
    for i in DAMAGED:
        own = index[i]
        assert frames.original[i].tolist() == frames.original[own].tolist()
        assert images[i].shape == images[own].shape
        assert np.abs(images[i].astype(int) - images[own]).mean() < OTHER_DECODER


def test_it_is_the_same_image_in_any_batch(damaged):
    source = with_policy(damaged[0], "replace", [])
    (whole,) = source.stream([ALL], salt=5)
    parts = source.stream(np.split(ALL, 9), salt=5)
    assert [int(i) for frames in parts for i in frames.index] == whole.index.tolist()


def test_the_salt_decides_which_one_takes_its_place(damaged):
    source, two = with_policy(damaged[0], "replace", []), np.array(DAMAGED)
    chosen = {int(i) for salt in range(8) for frames in source.stream([two], salt=salt) for i in frames.index}
    assert len(chosen) > 4
    assert chosen.isdisjoint(DAMAGED)


def test_it_stops_the_run_with_its_name_where_that_is_asked_for(damaged):
    source, names = damaged
    with pytest.raises(DataError) as raised:
        list(with_policy(source, "fail", []).stream([ALL], salt=0))
    assert any(name in str(raised.value) for name in names)
    assert "data.on_corrupt=replace" in str(raised.value)


def test_a_source_can_be_read_again_after_it_stopped_a_run(damaged):
    source = damaged[0]
    with pytest.raises(DataError):
        list(with_policy(source, "fail", []).stream([ALL], salt=0))
    assert len(list(with_policy(source, "replace", []).stream([ALL, ALL], salt=0))) == 2


def test_whole_images_of_a_damaged_file_are_read_as_pillow_reads_them(damaged_beton):
    source, _ = damaged_beton
    beton, data = source.beton, source.beton.path.read_bytes()
    whole = [i for i in range(COUNT) if i not in DAMAGED]
    (frames,) = source.stream([np.array(whole)], salt=0)
    for i, ours in zip(whole, images_of(frames), strict=True):
        jpeg = data[beton.data_ptr[i] : beton.data_ptr[i] + beton.data_size[i]]
        theirs = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        assert np.abs(ours.astype(int) - theirs).mean() < OTHER_DECODER


def test_where_no_image_can_be_read_the_run_stops(tmp_path):
    for path in write_folder(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="empty file; and none of 9 others"):
        list(open_folder(tmp_path, "replace").stream([ALL], salt=0))


def test_a_file_that_vanishes_is_named(tmp_path):
    paths = write_folder(tmp_path)
    source = open_folder(tmp_path)
    paths[3].unlink()
    with pytest.raises(DataError, match=r"a/03\.png: no such file"):
        list(source.stream([ALL], salt=0))
