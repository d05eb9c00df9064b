"""What is foretold of a conversion comes about, and what cannot fit is refused."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import open_beton
from pipelines.images import BadImage
from tools.beton_writer import PAGE_SIZE, BetonLayout
from tools.convert import DiskFull, convert
from tools.encode import Options
from tools.estimate import (
    MARGIN,
    TABLES,
    Estimate,
    Sample,
    estimate,
    fits,
    free_bytes,
    sample_image,
    show_estimates,
    size_text,
    spread,
    time_text,
)
from tools.image_sets.image_set import ImageSet
from tools.quality import psnr, ssim
from tools.shard_writer import ShardLayout
from tools.tensor_writer import TensorLayout


def pixels(seed: int, height: int = 64, width: int = 80) -> np.ndarray:
    few = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC))


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.getvalue()


def image_set(*found: bytes | np.ndarray) -> ImageSet:
    def read(i: int) -> bytes | np.ndarray:
        if isinstance(found[i], bytes) and found[i] == b"gone":
            raise BadImage("no such file")
        return found[i]

    return ImageSet(np.zeros(len(found), np.int64), ("a",), str, read, lambda _: (1, 1))


def forecast(**changes) -> Estimate:
    plain = {"images": 100, "stored": 5e9, "error": 0.02, "seconds": 60.0, "tried": 50, "unreadable": 0, "mean": 5e7}
    return Estimate(**{**plain, "psnr": None, "ssim": None, **changes})


def tensors(count: int = 1) -> TensorLayout:
    return TensorLayout(count, ("a",))


def head(count: int = 1) -> int:
    """Bytes before the pixels."""
    return tensors(count).start


# --- one image -------------------------------------------------------------------------------------------------------


def test_an_image_that_is_encoded_is_compared_with_what_it_was():
    for options in (Options("ffcv", mode="jpg", quality=80), Options("ffcv", mode="jpg", quality=80, max_side=40)):
        sample = sample_image(image_set(pixels(0)), options, 0)
        small = options.max_side is not None
        before = pixels(0)
        assert 300 < sample.stored < before.nbytes
        noise, likeness = sample.loss
        assert 25 < noise < 45
        assert 0.8 < likeness < 1
        assert (
            sample.stored < sample_image(image_set(before), Options("ffcv", mode="jpg", quality=95), 0).stored or small
        )
    better = sample_image(image_set(pixels(0)), Options("ffcv", mode="jpg", quality=98), 0)
    assert better.loss > sample_image(image_set(pixels(0)), Options("ffcv", mode="jpg", quality=80), 0).loss


def test_the_loss_is_that_of_the_stored_file():
    data = jpeg(pixels(0))
    sample = sample_image(image_set(data), Options("ffcv", mode="jpg", quality=60), 0)
    before = np.asarray(Image.open(io.BytesIO(data)))
    again = io.BytesIO()
    Image.fromarray(before).save(again, "JPEG", quality=60, subsampling="4:2:0")
    after = np.asarray(Image.open(again))
    assert sample.stored == len(again.getvalue())
    assert sample.loss == (psnr(before, after), ssim(before, after))


@pytest.mark.parametrize(
    "options",
    [
        Options("tensor"),
        Options("ffcv", mode="raw"),
        Options("ffcv", mode="auto", max_side=32),
        Options("ffcv", mode="original"),
        Options("webdataset"),
    ],
    ids=["tensor", "raw", "auto", "original", "webdataset"],
)
def test_what_is_stored_as_it_is_or_raw_has_no_loss(options):
    sample = sample_image(image_set(jpeg(pixels(0))), options, 0)
    assert sample.loss is None
    assert sample.stored > 0


def test_an_image_that_cannot_be_read_is_counted_and_takes_no_room():
    images = image_set(b"gone", b"text", pixels(0), jpeg(pixels(1))[:500])
    samples = [sample_image(images, Options("tensor"), i) for i in range(4)]
    assert [sample.stored for sample in samples] == [0, 0, pixels(0).nbytes, 0]
    found = estimate(samples, 400, 0, tensors(400), 1)
    assert (found.tried, found.unreadable, found.mean) == (4, 3, pixels(0).nbytes / 4)
    assert found.stored == head(400) + 100 * (pixels(0).nbytes + TABLES)


@pytest.mark.parametrize("layout", [BetonLayout(9), tensors(9), ShardLayout()], ids=["ffcv", "tensor", "webdataset"])
def test_where_no_image_can_be_read_nothing_but_the_head_is_foretold(layout):
    fixed = sum(layout.ends())
    found = estimate([Sample(0, 0.1, None)] * 3, 9, 0, layout, 1)
    assert (found.stored, found.unreadable, found.mean) == (fixed, 3, 0)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_the_images_that_are_tried_are_spread_over_all_and_none_twice():
    order = np.random.default_rng(0).permutation(10_000)
    tried = spread(order)
    assert len(set(tried)) == len(tried) == 200
    places = np.flatnonzero(np.isin(order, tried))
    assert (places[0], places[-1]) == (0, 9_999)
    assert np.diff(places).max() <= 51
    assert spread(np.arange(7)) == list(range(7))
    assert spread(np.arange(1)) == [0]


def test_neighbours_are_tried_together_where_that_is_asked_for():
    tried = spread(np.arange(10_000), 200, run=8)
    assert len(set(tried)) == len(tried) == 200
    assert (np.diff(np.reshape(tried, (25, 8))) == 1).all()
    assert (tried[0], tried[-1]) == (0, 9_999)
    assert spread(np.arange(5), run=8) == list(range(5))


def test_a_forecast_is_the_mean_times_the_number():
    samples = [Sample(1000, 0.1, (30.0, 0.9)), Sample(3000, 0.3, (40.0, 0.7)), Sample(2000, 0.2, None)]
    found = estimate(samples, 3000, 0, tensors(3000), 4)
    assert found.stored == pytest.approx(head(3000) + (2000 + TABLES) * 3000)
    assert found.seconds == pytest.approx(0.2 * 3000 / 4)
    assert found.error == pytest.approx(1000 / 3**0.5 / 2000)
    assert (found.psnr, found.ssim) == (35.0, pytest.approx(0.8))
    assert (found.images, found.tried, found.unreadable, found.mean) == (3000, 3, 0, 2000)


def test_what_is_done_is_not_foretold_again():
    samples = [Sample(1000, 0.1, None), Sample(3000, 0.3, None)]
    whole, half = (estimate(samples, 400, begun, tensors(400), 2) for begun in (0, 300))
    assert (half.images, half.error, half.mean) == (100, whole.error, whole.mean)
    assert half.stored == pytest.approx(whole.stored / 4)
    assert half.seconds == pytest.approx(whole.seconds / 4)


@pytest.mark.parametrize("length", [700, 120_000, 5_000_000, PAGE_SIZE, PAGE_SIZE + 1])
@pytest.mark.parametrize("images", [3, 500])
@pytest.mark.parametrize("to", ["ffcv", "tensor", "webdataset"])
def test_what_a_format_adds_to_the_images_is_foretold(to, images, length):
    """The rest of a page into which no other image fits, the headers and blocks of a tar file."""
    made = {"ffcv": BetonLayout, "tensor": tensors, "webdataset": lambda _: ShardLayout(10**9)}[to]
    layout = made(images)
    for i in range(images):
        layout.place(i, length)
    found = estimate([Sample(length, 0.1, None)] * min(images, 100), images, 0, made(images), 1)
    assert found.stored == pytest.approx(sum(layout.ends()) + TABLES * images, rel=0.02)


def test_images_that_come_out_equal_do_not_make_the_mean_infinite():
    found = estimate([Sample(1, 0, (float("inf"), 1.0)), Sample(1, 0, (30.0, 0.5))], 2, 0, tensors(2), 1)
    assert (found.psnr, found.ssim) == (30.0, 0.75)
    found = estimate([Sample(1, 0, (float("inf"), 1.0))], 1, 0, tensors(), 1)
    assert (found.psnr, found.ssim, found.error) == (None, 1.0, 0.0)


def test_a_little_more_than_what_is_needed_must_be_free():
    two = [forecast(stored=1e9), forecast(stored=2e9)]
    assert fits(two, int(3e9 * MARGIN) + 1)
    assert not fits(two, int(3e9 * MARGIN) - 1)


def test_what_is_free_is_asked_where_the_directory_will_be(tmp_path, monkeypatch):
    assert free_bytes(tmp_path / "not" / "yet") == pytest.approx(free_bytes(tmp_path), rel=0.01)
    monkeypatch.chdir(tmp_path)
    assert free_bytes(Path("not/yet")) > 0


# --- and it comes about ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def varied(tmp_path_factory) -> Path:
    """600 images from 2 kB to 30 kB raw; some cannot be read."""
    root = tmp_path_factory.mktemp("varied")
    rng = np.random.default_rng(0)
    for i in range(600):
        path = root / "ab"[i % 2] / f"{i:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        height, width = rng.integers(25, 100, 2)
        path.write_bytes(b"text" if i % 29 == 7 else jpeg(pixels(i, height, width), int(rng.integers(70, 99))))
    return root


def foretold_and_found(src: Path, out: Path, to: str, **options) -> tuple[str, float, float]:
    """What is said; bytes that are foretold, and those of the files that are there then."""
    said = io.StringIO()
    convert(str(src), out, to, console=Console(file=said, width=250), **options)
    row = next(line for line in said.getvalue().splitlines() if line.startswith("│ train"))
    number, unit = row.split("│")[3].split()[:2]
    found = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.name != "manifest.json")
    return said.getvalue(), float(number) * {"kB": 1e3, "MB": 1e6}[unit], found


@pytest.mark.parametrize(
    ("to", "options"),
    [
        ("ffcv", {"mode": "smart"}),
        ("ffcv", {"mode": "original", "max_side": 60}),
        ("tensor", {}),
        ("tensor", {"max_side": 50, "shuffle": True}),
        ("webdataset", {}),
    ],
    ids=["smart", "original", "tensor", "small tensor", "webdataset"],
)
def test_the_size_that_is_foretold_is_within_a_tenth(varied, tmp_path, to, options):
    said, foretold, found = foretold_and_found(varied, tmp_path / "out", to, max_skipped=0.1, **options)
    assert re.search(r"│ train +│ +600 │ +[\d.]+ [kM]B \+- \d % │", said)
    if to == "ffcv":  # a page more or less is only a page that is not full
        foretold -= PAGE_SIZE
        beton = open_beton(tmp_path / "out" / "train.beton")
        found = int(beton.data_size.sum()) + TABLES * len(beton.label)
    assert foretold == pytest.approx(found, rel=0.1)
    bad = re.search(r"train: (\d+) of the 200 images that were tried cannot be read", said)
    assert bad
    assert 2 <= int(bad[1]) <= 15  # 21 of 600


@pytest.mark.parametrize(
    ("to", "options"), [("ffcv", {"mode": "raw"}), ("tensor", {})], ids=lambda given: given if given else ""
)
def test_the_size_of_large_images_is_foretold_within_a_tenth(tmp_path, to, options):
    """5 MB each, of which a page holds one: more than a third of it is left empty."""
    large = Image.new("RGB", (1290, 1290), (1, 2, 3))
    (tmp_path / "src").mkdir()
    for i in range(10):
        large.save(tmp_path / "src" / f"{i}.png", compress_level=1)
    _, foretold, found = foretold_and_found(tmp_path / "src", tmp_path / "out", to, **options)
    assert foretold == pytest.approx(found, rel=0.1)
    assert found > 10 * (PAGE_SIZE if to == "ffcv" else 1290 * 1290 * 3)


def test_the_size_of_small_files_in_shards_is_foretold_with_what_a_tar_file_adds(tmp_path):
    """Headers, labels and blocks are most of it."""
    (tmp_path / "src" / "a").mkdir(parents=True)
    for i in range(300):
        (tmp_path / "src" / "a" / f"{i:03}.jpg").write_bytes(jpeg(pixels(i, 8, 8)))
    _, foretold, found = foretold_and_found(tmp_path / "src", tmp_path / "out", "webdataset")
    assert foretold == pytest.approx(found, rel=0.1)
    assert found > 300 * 2.5 * 700


def test_what_cannot_fit_is_refused_with_both_sizes_and_leaves_nothing(varied, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 12_345})())
    expected = r"out: the output needs about \d\.\d MB, 12\.3 kB are free there; free some space, or store less"
    with pytest.raises(DiskFull, match=expected):
        convert(str(varied), tmp_path / "out", "tensor", max_skipped=0.1, console=Console(quiet=True))
    assert not (tmp_path / "out").exists()


# --- what a person sees ----------------------------------------------------------------------------------------------


def shown(estimates: dict[str, Estimate]) -> str:
    console = Console(file=io.StringIO(), width=250)
    show_estimates(estimates, 123 * 10**9, 3, console)
    return console.file.getvalue()


def test_one_table_shows_each_split_and_all_together():
    train, val = forecast(psnr=41.23, ssim=0.98765, unreadable=2), forecast(images=20, stored=1e9, error=0.1)
    text = shown({"train": train, "val": val})
    assert "expected, from 100 images" in text and "time, 3 cores" in text
    lines = [next(line for line in text.splitlines() if word in line) for word in ("│ train", "│ val", "│ together")]
    for line, words in zip(
        lines,
        (
            ("100", "5.0 GB +- 2 %", "60 s", "PSNR 41.2 dB, SSIM 0.988"),
            ("20", "1.0 GB +- 10 %", "none"),
            ("120", "6.0 GB", "2 min"),
        ),
        strict=True,
    ):
        assert [word for word in words if word not in line] == []
    assert "train: 2 of the 50 images that were tried cannot be read" in text
    assert "val: " not in text
    assert "free there: 123.0 GB" in text


def test_one_split_has_no_sum_and_equal_images_have_no_loss():
    text = shown({"train": forecast(ssim=1.0)})
    assert "together" not in text
    assert "│ none " in text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (2.5e6, "2.5 MB"),
        (1.5e9, "1.5 GB"),
        (1.2e13, "12,000.0 GB"),
    ],
)
def test_sizes_are_told_in_units_that_fit(number, text):
    assert size_text(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "under 1 s"), (1, "1 s"), (89, "89 s"), (90, "2 min"), (5000, "83 min"), (7200, "2.0 h")],
)
def test_times_are_told_in_units_that_fit(seconds, text):
    assert time_text(seconds) == text
