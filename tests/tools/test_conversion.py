"""Many processes write what one thread would, however often they are interrupted."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import open_beton
from pipelines.manifest import read_manifest
from pipelines.sampler import permutation
from ressl.batch import DataError
from tools import conversion
from tools import convert as convert_module
from tools.beton_writer import EncodedSample, write_beton
from tools.conversion import SplitWork, open_split, place_chunk
from tools.convert import convert
from tools.crew import Crew, Encode, News, Task, Written
from tools.encode import Encoded, Options, encode
from tools.image_sets import detect
from tools.journal import PART, Chunk, WorkDirectory
from tools.rows import ROW, SUFFIXES
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


# --- memory ----------------------------------------------------------------------------------------------------------


def test_no_more_workers_are_started_than_there_is_work_for(interrupted, tmp_path, monkeypatch):
    forks, fork = [], os.fork

    def counted() -> int:
        forks.append(fork())
        return forks[-1]

    monkeypatch.setattr(os, "fork", counted)
    convert(str(interrupted / "src"), tmp_path / "out", "tensor", workers=1000, max_skipped=1, console=QUIET)
    assert len(forks) == 24  # of four images each


@pytest.mark.parametrize("to", ["tensor", "webdataset"])
def test_a_worker_holds_little_data_however_large_the_images_are(tmp_path, monkeypatch, to):
    """A hundredth of what it may hold: 320 images of 60 kB, of which it would have got 5 at a time."""
    monkeypatch.setattr(convert_module, "CHUNK_BYTES", 1 << 17)
    for i in range(320):
        save(tmp_path / "src" / f"{i:03}.bmp", np.full((100, 200 + i % 2, 3), i % 256, np.uint8))
    assert detect(str(tmp_path / "src")).sets["train"]().chunk >= 5
    sent, received, held = Crew.send, Crew.receive, list[int]()
    chunks: dict[int, list[tuple[int, int]]] = {}  # worker -> those that it has before it or encoded: images each

    def send(crew: Crew, worker: int, task: Task) -> None:
        if isinstance(task, Encode):
            chunks.setdefault(worker, []).append((task.chunk, len(task.indices)))
            held.append(sum(images for _, images in chunks[worker]))
        sent(crew, worker, task)

    def receive(crew: Crew, timeout: float) -> list[tuple[int, News]]:
        news = received(crew, timeout)
        for worker, one in news:
            if isinstance(one, Written):
                chunks[worker] = [known for known in chunks[worker] if known[0] != one.chunk]
        return news

    monkeypatch.setattr(Crew, "send", send)
    monkeypatch.setattr(Crew, "receive", receive)
    convert(str(tmp_path / "src"), tmp_path / "out", to, workers=2, console=QUIET)
    assert 0 < max(held) * 60_000 <= 3 << 17
    assert len(held) >= 160  # of two images each


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


# --- interrupted amid its notes --------------------------------------------------------------------------------------


@contextmanager
def interrupted_at(line: int) -> Iterator[None]:
    """Ctrl-C before the n-th line, from 0, that this thread runs of what notes chunks."""
    codes = (conversion._commit.__code__, WorkDirectory.commit.__code__, WorkDirectory.settle.__code__)
    lines = count()

    def trace(frame: FrameType, event: str, _: object) -> Callable | None:
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return trace if frame.f_code in codes else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def note(splits: list[SplitWork], work: WorkDirectory, line: int) -> bool:
    """Whether it was interrupted."""
    try:
        with interrupted_at(line):
            conversion._commit(splits, work)
    except KeyboardInterrupt:
        return True
    return False


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_note_that_is_interrupted_between_any_two_lines_is_made_again_without_a_gap(interrupted, tmp_path, times):
    """As often as that happens, and whatever is written meanwhile."""
    images = detect(str(interrupted / "src")).sets["train"]()
    for line in count():
        out = tmp_path / str(line)
        with closing(WorkDirectory(out)) as work:
            work.begin({})
            splits = [open_split(name, images, work.path / f"{name}.beton", Options("ffcv")) for name in "ab"]
            happened = []
            for written in (1, 2, 4):
                for split in splits:
                    split.output.touch()
                    for number in range(len(split.chunks), written):
                        rows = np.zeros(len(split.indices(number)), ROW)
                        rows["index"] = split.indices(number)
                        place_chunk(split, Chunk(rows, ()))
                        split.written.add(number)
                if written == 2:
                    happened = [note(splits, work, line) for _ in range(times)]
                else:
                    conversion._commit(splits, work)
            work.settle()
            past = work.read()
        for name in "ab":
            indices = [index for chunk in past.chunks[name] for index in chunk.rows["index"].tolist()]
            assert indices == list(range(16)), line
        if not any(happened):
            break
    assert line > 20


def test_a_conversion_that_is_interrupted_amid_a_note_goes_on_to_the_same_bytes(copy, monkeypatch):
    monkeypatch.setattr(conversion, "COMMIT_SECONDS", 0)
    go_on(copy, copy / "whole")
    expected, went_on = contents(copy / "whole"), 0
    for line in range(3, 160, 13):
        with interrupted_at(line), suppress(KeyboardInterrupt):
            go_on(copy, copy / "new", overwrite=True)
        said = io.StringIO()
        go_on(copy, copy / "new", overwrite=True, console=Console(file=said, width=200))
        assert contents(copy / "new") == expected, line
        went_on += "goes on after" in said.getvalue()
        shutil.rmtree(copy / "new")
    assert went_on > 3


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
