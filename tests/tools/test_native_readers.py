"""What `convert` writes is read by the libraries whose formats these are: FFCV, DALI, webdataset, safetensors."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.numpy import load_file

from pipelines.images import decode_image
from tools.convert import convert

COUNT, HEIGHT, WIDTH = 12, 48, 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six JPEG files of one size."""
    for i in range(COUNT):
        draw = np.random.default_rng(i)
        image = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        path = tmp_path / "src" / "ab"[i // 6] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=92)
    return tmp_path / "src"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO())


def files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))]


@pytest.mark.parametrize("mode", ["original", "jpg", "raw", "smart"])
def test_stock_ffcv_reads_every_mode(folder, tmp_path, console, mode):
    pytest.importorskip("ffcv")
    threads = torch.get_num_threads()
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    torch.set_num_threads(threads)  # importing ffcv sets it to 1
    options = {} if mode == "raw" else {"quality": 95}
    convert(str(folder), tmp_path / "out", "ffcv", mode=mode, console=console, **options)
    loader = Loader(
        str(tmp_path / "out" / "train.beton"),
        batch_size=4,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={
            "image": [SimpleRGBImageDecoder()],
            **{name: [IntDecoder()] for name in ("label", "index", "height", "width")},
        },
    )
    batches = [[torch.as_tensor(column).numpy().copy() for column in batch] for batch in loader]
    pixels, label, index, height, width = (np.concatenate(column) for column in zip(*batches, strict=True))
    assert label[:, 0].tolist() == [0] * 6 + [1] * 6
    assert index[:, 0].tolist() == list(range(COUNT))
    assert (set(height[:, 0].tolist()), set(width[:, 0].tolist())) == ({HEIGHT}, {WIDTH})
    for image, data in zip(pixels, files(folder), strict=True):
        distance = np.abs(image.astype(int) - decode_image(data)).mean()
        # FFCV's decoder uses a faster inverse transform than Pillow, and `jpg` encodes anew
        assert distance <= {"raw": 0.0, "original": 1.5}.get(mode, 3.0)


def test_a_beton_of_originals_holds_the_bytes_of_the_files(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "ffcv", mode="original", console=console)
    content = (tmp_path / "out" / "train.beton").read_bytes()
    assert all(content.count(data) == 1 for data in files(folder))


def test_dalis_own_reader_reads_the_shards_by_our_index_files(folder, tmp_path, console):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    convert(str(folder), tmp_path / "out", "webdataset", console=console)
    shards = sorted((tmp_path / "out" / "train").glob("*.tar"))

    @pipeline_def(batch_size=COUNT, num_threads=1, device_id=None)
    def graph():
        encoded, label = fn.readers.webdataset(
            paths=list(map(str, shards)),
            index_paths=[str(shard.with_suffix(".idx")) for shard in shards],
            ext=["jpg", "cls"],
        )
        return encoded, fn.decoders.image(encoded, device="cpu", output_type=types.RGB), label

    encoded, images, labels = graph().run()
    for i, data in enumerate(files(folder)):
        assert encoded.at(i).tobytes() == data
        assert np.array_equal(images.at(i), decode_image(data))
        assert int(labels.at(i).tobytes()) == i // 6


def test_the_webdataset_package_reads_the_shards(folder, tmp_path, console):
    webdataset = pytest.importorskip("webdataset")
    convert(str(folder), tmp_path / "out", "webdataset", shard_mb=1, console=console)
    shards = sorted(map(str, (tmp_path / "out" / "train").glob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("rgb8"))
    assert [int(sample["__key__"]) for sample in samples] == list(range(COUNT))
    assert [sample["cls"] for sample in samples] == [0] * 6 + [1] * 6
    for sample, data in zip(samples, files(folder), strict=True):
        assert np.array_equal(sample["jpg"], decode_image(data))


def test_the_safetensors_package_reads_the_tensor_file(folder, tmp_path, console):
    convert(str(folder), tmp_path / "out", "tensor", console=console)
    arrays = load_file(tmp_path / "out" / "train.safetensors")
    for i, data in enumerate(files(folder)):
        start = int(arrays["offset"][i])
        image = arrays["pixels"][start : start + HEIGHT * WIDTH * 3].reshape(HEIGHT, WIDTH, 3)
        assert np.array_equal(image, decode_image(data))
