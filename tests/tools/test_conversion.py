"""Many processes write what one thread would, and what was interrupted is gone on with only where all is as it was."""

import io
import os
import shutil
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import open_beton
from pipelines.manifest import read_manifest
from pipelines.sampler import permutation
from ressl.batch import DataError
from tools import journal
from tools.beton_writer import EncodedSample, write_beton
from tools.convert import convert
from tools.encode import Encoded, Options, encode
from tools.image_sets import detect
from tools.journal import PART, WorkDirectory
from tools.rows import SUFFIXES
from tools.shard_writer import Member, write_shards
from tools.tensor_writer import write_tensors_to

QUIET = Console(quiet=True)


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- many processes and one ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Two splits of images of many sizes and kinds; every ninth is damaged."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(72):
        path = root / ("val" if i % 4 == 3 else "train") / "abc"[i % 3] / f"{i:02}{SUFFIXES[i % 5]}"
        save(path, noise(i, 20 + i, 90 - i))
        if i % 9 == 5:
            path.write_bytes(path.read_bytes()[:200])
    return root


def write_in_one_thread(src: Path, split: str, options: Options, path: Path) -> int:
    """By the definition of each format; how many images were left out."""
    images = detect(str(src)).sets[split]()
    order = permutation(len(images.labels), 0, 0) if options.shuffle else np.arange(len(images.labels))
    found = [encode(images, options, int(i)) for i in order]
    samples, members = [], []
    for one in found:
        if isinstance(one, Encoded):
            row = one.row
            sizes = tuple(row["size"].tolist()), tuple(row["original"].tolist())
            label, index, suffix = int(row["label"]), int(row["index"]), SUFFIXES[row["kind"]]
            samples.append(EncodedSample(one.data, int(row["mode"]), *sizes, label, index))
            members.append(Member(one.data, suffix, *sizes, label, index, images.name(index)))
    match options.to:
        case "ffcv":
            write_beton(path, samples, len(order))
        case "tensor":
            with path.open("xb") as file:
                write_tensors_to(file, samples, len(order), images.classes)
        case "webdataset":
            path.mkdir()
            write_shards(path, members, len(order), shard_bytes=options.shard_mb * 10**6)
    return len(found) - len(samples)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        Options("ffcv", mode="smart", jpg_share=0.4, shuffle=True),
        Options("ffcv", mode="original", max_side=60),
        Options("tensor", max_side=50, exif_rotate=True),
        Options("tensor", shuffle=True),
        Options("webdataset"),
        Options("webdataset", quality=100, max_side=80, shuffle=True, check="header"),
    ],
    ids=lambda options: f"{options.to}{'-shuffled' * options.shuffle}{f'-{options.max_side}' * bool(options.max_side)}",
)
def test_the_bytes_are_those_of_one_thread(mixed, tmp_path, options, workers):
    out = tmp_path / "out"
    manifest = convert(str(mixed), out, **asdict(options), workers=workers, max_skipped=0.5, console=QUIET)
    for split in ("train", "val"):
        name = manifest.splits[split].file
        skipped = write_in_one_thread(mixed, split, options, tmp_path / name)
        assert len(manifest.splits[split].skipped) == skipped > 0
        if options.to == "webdataset":
            assert contents(out / name) == contents(tmp_path / name)
        else:
            assert (out / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_an_image_larger_than_a_page_is_written_as_one_thread_does(tmp_path, workers):
    for i in range(12):
        save(tmp_path / "src" / f"{i:02}.png", noise(i, 30, 40))
    save(tmp_path / "src" / "07.png", np.tile(noise(0, 1700, 1), (1, 1700, 1)))
    options = Options("ffcv", mode="raw")
    convert(str(tmp_path / "src"), tmp_path / "out", "ffcv", mode="raw", workers=workers, console=QUIET)
    write_in_one_thread(tmp_path / "src", "train", options, tmp_path / "one")
    assert (tmp_path / "out" / "train.beton").read_bytes() == (tmp_path / "one").read_bytes()
    assert open_beton(tmp_path / "one").page_size == 1 << 24


def test_shards_are_as_large_as_was_asked_for(tmp_path):
    for i in range(30):
        save(tmp_path / "src" / f"{i:02}.bmp", noise(i, 200, 200))  # 120,054 bytes
    convert(str(tmp_path / "src"), tmp_path / "out", "webdataset", shard_mb=1, workers=3, console=QUIET)
    write_in_one_thread(tmp_path / "src", "train", Options("webdataset", shard_mb=1), tmp_path / "one")
    assert contents(tmp_path / "out" / "train") == contents(tmp_path / "one")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "one").glob("*.tar"))]
    assert sizes == [8 * 121_856 + 1024] * 3 + [6 * 121_856 + 1024]


# --- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """`src`, whose 6th image is damaged, and so many of its last that `out` was given up there."""
    root = tmp_path_factory.mktemp("interrupted")
    for i in range(96):
        save(root / "src" / "ab"[i // 48] / f"{i:02}.png", noise(i, 9, 12))
    for i in (5, 92, 93):
        (root / "src" / "ab"[i // 48] / f"{i:02}.png").write_text("text")
    with pytest.raises(DataError, match="3 or more of 96 images cannot be read.*--max-skipped"):
        go_on(root, root / "out", max_skipped=0.025)
    return root


def go_on(root: Path, out: Path, to: str = "tensor", **options):
    arguments = {"workers": 1, "max_skipped": 1, "console": QUIET} | options
    return convert(str(root / "src"), out, to, **arguments)


@pytest.fixture
def copy(interrupted, tmp_path) -> Path:
    """The same, to be changed: with all times as they were."""
    shutil.copytree(interrupted, tmp_path / "copy")
    return tmp_path / "copy"


def hollow_out(src: Path, last: str) -> None:
    """Whoever reads an image up to `last` gets zeros; by size and time they are as they were."""
    for path in sorted(src.rglob("*.png")):
        if path.name <= last:
            status = path.stat()
            path.write_bytes(bytes(status.st_size))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_was_noted_is_not_done_again(copy):
    go_on(copy, copy / "whole")
    hollow_out(copy / "src", "39.png")
    said = io.StringIO()
    go_on(copy, copy / "out", console=Console(file=said, width=200))
    after = int(said.getvalue().partition("goes on after ")[2].split()[0])
    assert after >= 40
    assert f"expected, from {96 - after} images" in said.getvalue()
    assert [one["index"] for one in read_manifest(copy / "out").splits["train"].skipped] == [5, 92, 93]
    assert contents(copy / "out") == contents(copy / "whole")


def refused(copy: Path, message: str, **options) -> None:
    """The call is refused and harms nothing; with `restart` it begins anew, and gives what it gives elsewhere."""
    before = contents(copy / "out")
    with pytest.raises(DataError, match=message) as raised:
        go_on(copy, copy / "out", **options)
    assert "--restart" in str(raised.value)
    assert contents(copy / "out") == before
    go_on(copy, copy / "out", **options, restart=True)
    go_on(copy, copy / "elsewhere", **options)
    assert contents(copy / "out") == contents(copy / "elsewhere")


CHANGED = {
    "to": "webdataset",
    "mode": "raw",
    "jpg_share": 0.25,
    "quality": 80,
    "max_side": 10,
    "exif_rotate": True,
    "check": "header",
    "shuffle": True,
    "shard_mb": 7,
}


@pytest.mark.parametrize("option", [field.name for field in fields(Options)])
def test_another_option_is_refused_and_named(copy, option):
    was, now = getattr(Options("tensor"), option), CHANGED[option]
    refused(
        copy,
        rf"holds an interrupted conversion of something else: --{option.replace('_', '-')} was {was}, is {now};",
        **{option: now},
    )


def test_all_that_differs_is_named_together(copy):
    (copy / "src" / "a" / "more.png").write_bytes((copy / "src" / "a" / "01.png").read_bytes())
    refused(
        copy,
        r"--mode was auto, is raw; --quality was 90, is 80; train had 96 images, has 97; repeat",
        mode="raw",
        quality=80,
    )


def remove(src: Path) -> None:
    (src / "a" / "07.png").unlink()


def rename(src: Path) -> None:
    (src / "a" / "07.png").rename(src / "a" / "070.png")


def move_to_another_class(src: Path) -> None:
    (src / "b").rename(src / "c")


def add_an_empty_class(src: Path) -> None:
    (src / "aa").mkdir()


def edit(name: str, src: Path) -> None:
    """As many bytes, another time."""
    (src / name).write_bytes(bytes((src / name).stat().st_size))
    os.utime(src / name, ns=(10**18, 10**18))


def replace_by_another_of_that_time(src: Path) -> None:
    status = (src / "a" / "07.png").stat()
    save(src / "a" / "07.png", noise(7, 10, 12))
    os.utime(src / "a" / "07.png", ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove, "train had 96 images, has 95"),
        (rename, "the names, the labels or the archives of the source's train have changed"),
        (move_to_another_class, "the names, the labels or the archives of the source's train have changed"),
        (add_an_empty_class, "the names, the labels or the archives of the source's train have changed"),
        (partial(edit, "a/07.png"), r"train: a/07\.png has changed since the conversion was interrupted"),
        (partial(edit, "a/05.png"), r"train: a/05\.png has changed since the conversion was interrupted"),
        (replace_by_another_of_that_time, r"train: a/07\.png has changed since the conversion was interrupted"),
    ],
    ids=["removed", "renamed", "class", "empty class", "edited", "repaired", "size"],
)
def test_a_source_that_has_changed_is_refused_and_the_difference_is_named(copy, change, message):
    change(copy / "src")
    refused(copy, message)


def test_what_changes_in_images_that_are_still_to_come_is_taken_as_it_is(copy):
    save(copy / "src" / "b" / "92.png", noise(1, 9, 12))
    go_on(copy, copy / "out")
    go_on(copy, copy / "whole")
    assert contents(copy / "out") == contents(copy / "whole")


def test_another_source_is_refused(copy, tmp_path):
    for i in range(96):
        save(tmp_path / "other" / "src" / "ab"[i // 48] / f"{i:02}.png", noise(i + 1, 9, 12))
    with pytest.raises(DataError, match=r"train: a/00\.png has changed since the conversion was interrupted"):
        go_on(tmp_path / "other", copy / "out")


def test_other_labels_are_refused(copy):
    lines = [f"{'ab'[i // 48]}/{i:02}.png {i % 3}\n" for i in range(96)]
    labels = copy / "labels.txt"
    labels.write_text("".join(lines))
    refused(copy, "the names, the labels or the archives of the source's train have changed", labels=labels)


def test_other_software_is_refused(copy, monkeypatch):
    was = PIL.__version__
    monkeypatch.setattr(PIL, "__version__", "0.1")
    refused(copy, f"Pillow was {was}, is 0.1")


@pytest.mark.parametrize("changed", [{"workers": 3}, {"max_skipped": 0.5}, {"overwrite": True}])
def test_what_does_not_decide_the_bytes_may_change(copy, changed):
    go_on(copy, copy / "out", **changed)
    go_on(copy, copy / "whole")
    assert contents(copy / "out") == contents(copy / "whole")


def test_a_second_converter_is_refused_while_the_first_one_works(copy, monkeypatch):
    monkeypatch.setattr(journal, "LOCK_SECONDS", 0.1)
    work = WorkDirectory(copy / "out")
    before = contents(copy / "out")
    for restart in (False, True):
        with pytest.raises(
            DataError, match="out: another process is converting into it; wait for it or choose another"
        ):
            go_on(copy, copy / "out", restart=restart)
    work.close()
    assert contents(copy / "out") == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "photos/1.jpg"])
def test_a_foreign_file_in_the_work_directory_is_kept(copy, name, restart):
    path = copy / "out" / PART / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    go_on(copy, copy / "out", restart=restart)
    go_on(copy, copy / "whole")
    assert contents(copy / "out") == contents(copy / "whole") | {f"{PART}/{name}": b"mine"}
    with pytest.raises(DataError, match=rf"convert\.part: holds '{name.split('/')[0]}'.*move it away"):
        go_on(copy, copy / "out", overwrite=True)


def test_a_foreign_file_among_shards_in_the_work_directory_is_kept(copy):
    with pytest.raises(DataError, match="--max-skipped"):
        go_on(copy, copy / "shards", "webdataset", max_skipped=0.025)
    (copy / "shards" / PART / "train" / "notes.txt").write_text("mine")
    before = contents(copy / "shards")
    with pytest.raises(DataError, match=r"train: holds 'notes\.txt', which `convert` did not write.*move it away"):
        go_on(copy, copy / "shards", "webdataset")
    assert contents(copy / "shards") == before


# --- interrupted amid the renames ------------------------------------------------------------------------------------


@pytest.fixture
def sealed(copy, monkeypatch) -> Path:
    """All is whole, but nothing has its name."""

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            go_on(copy, copy / "out")
    assert [path.name for path in (copy / "out").iterdir()] == [PART]
    return copy


def test_the_same_call_only_finishes_what_is_whole(sealed):
    go_on(sealed, sealed / "whole")
    hollow_out(sealed / "src", "99.png")
    said = io.StringIO()
    manifest = go_on(sealed, sealed / "out", console=Console(file=said, width=200))
    assert said.getvalue().splitlines()[-1] == f"finished what was interrupted in {sealed / 'out'}"
    assert contents(sealed / "out") == contents(sealed / "whole")
    assert manifest == read_manifest(sealed / "whole")


def test_another_call_finishes_what_is_whole_and_goes_its_own_way(sealed):
    manifest = go_on(sealed, sealed / "out", split="more")
    assert list(manifest.splits) == ["train", "more"]
    go_on(sealed, sealed / "whole")
    assert contents(sealed / "out").items() >= {
        (name, data) for name, data in contents(sealed / "whole").items() if name != "manifest.json"
    }
