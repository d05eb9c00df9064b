import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from pipelines.beton import ALLOCATION, FIELD, FIELDS, HEADER, JPG, RAW, metadata_dtype, open_beton
from ressl.batch import DataError
from tools.beton_writer import BetonLayout, EncodedSample, finish_beton, write_beton
from tools.rows import PLACE, ROW

MIB = 1 << 20


def jpeg(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def mixed_samples(count=12):
    """Images of odd sizes, every third a JPEG, with gaps in `index`; and the pixels."""
    draw = np.random.default_rng(0)
    samples, images = [], []
    for i in range(count):
        size = (8 + i, 30 - i)
        image = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
        mode = JPG if i % 3 == 0 else RAW
        data = jpeg(image) if mode == JPG else image.tobytes()
        samples.append(EncodedSample(data, mode, size, (size[0] * 2, size[1] * 2), i % 5 - 1, 2 * i + 1))
        images.append(np.asarray(Image.open(io.BytesIO(data))) if mode == JPG else image)
    return samples, images


def blob(length, index):
    """A sample of any length: nothing here decodes it."""
    return EncodedSample(bytes([index % 251]) * length, JPG, (4, 4), (4, 4), 0, index)


def test_what_is_written_is_read_back(tmp_path):
    samples, _ = mixed_samples()
    path = tmp_path / "a.beton"
    assert write_beton(path, samples, len(samples)) == len(samples)
    beton = open_beton(path)
    content = path.read_bytes()
    for i, sample in enumerate(samples):
        assert content[beton.data_ptr[i] :][: beton.data_size[i]] == sample.data
        assert (beton.mode[i], *beton.size[i], *beton.original[i]) == (sample.mode, *sample.size, *sample.original)
        assert (beton.label[i], beton.index[i]) == (sample.label, sample.index)
    assert [path.name for path in tmp_path.iterdir()] == ["a.beton"]


def test_fewer_samples_than_announced_are_fine_and_more_are_not(tmp_path):
    samples, _ = mixed_samples()
    assert write_beton(tmp_path / "a.beton", samples[:5], 100_000) == 5
    assert len(open_beton(tmp_path / "a.beton").label) == 5
    with pytest.raises(ValueError, match="more samples"):
        write_beton(tmp_path / "b.beton", samples, 3)
    with pytest.raises(DataError, match="no image"):
        write_beton(tmp_path / "b.beton", [], 3)
    assert [path.name for path in tmp_path.iterdir()] == ["a.beton"]


def test_no_sample_crosses_a_page_and_large_ones_enlarge_the_page(tmp_path):
    lengths = [MIB, MIB // 2, 2 * MIB, 1, 5 * MIB, MIB, 7 * MIB]
    path = tmp_path / "a.beton"
    write_beton(path, (blob(length, i) for i, length in enumerate(lengths)), len(lengths), page_size=2 * MIB)
    beton = open_beton(path)  # refuses data that crosses a page
    assert beton.page_size == 8 * MIB
    assert beton.data_size.tolist() == lengths


def test_the_digest_of_the_tables_is_that_of_all_but_the_data(tmp_path):
    rows, places, layout = np.zeros(3, ROW), np.zeros(3, PLACE), BetonLayout(10, page_size=2 * MIB)
    rows["index"], rows["length"], rows["size"], rows["original"] = range(3), 100, 4, 4
    for i in range(3):
        places[i] = layout.place(i, 100)
    path = tmp_path / "a.beton"
    with path.open("w+b") as file:
        digest = finish_beton(file, layout, rows, places)
    beton, content = open_beton(path), path.read_bytes()
    head = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + 3 * metadata_dtype(FIELDS).itemsize
    table = content[-3 * ALLOCATION.itemsize :]
    assert digest == hashlib.sha256(content[:head] + table).hexdigest()
    assert not any(content[head : -len(table)])
    assert beton.data_ptr.tolist() == [2 * MIB, 2 * MIB + 100, 2 * MIB + 200]


def test_an_interrupted_writer_leaves_nothing_and_keeps_the_older_file(tmp_path):
    path = tmp_path / "a.beton"
    path.write_text("older")

    def samples():
        yield blob(100, 0)
        assert (tmp_path / "a.beton.part").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beton(path, samples(), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.beton"]
    assert path.read_text() == "older"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    def samples():
        yield blob(100, 0)
        with pytest.raises(DataError, match="another process is writing"):
            write_beton(tmp_path / "a.beton", [blob(50, 0)], 1)

    write_beton(tmp_path / "a.beton", samples(), 1)
    assert open_beton(tmp_path / "a.beton").data_size.tolist() == [100]


def test_the_part_file_of_a_killed_writer_is_replaced(tmp_path):
    (tmp_path / "a.beton.part").write_bytes(b"\xff" * 20_000_000)
    write_beton(tmp_path / "a.beton", [blob(100, 0)], 1)
    write_beton(tmp_path / "b.beton", [blob(100, 0)], 1)
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        write_beton(tmp_path / "missing" / "a.beton", [blob(100, 0)], 1)


def test_ffcv_reads_raw_and_jpeg_images_as_they_were_written(tmp_path):
    pytest.importorskip("ffcv")
    import torch

    threads = torch.get_num_threads()
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.reader import Reader

    torch.set_num_threads(threads)  # importing ffcv sets it to 1
    draw = np.random.default_rng(1)
    images = [np.repeat(draw.integers(0, 256, (1, 1, 3), dtype=np.uint8), 16, 0).repeat(20, 1) for _ in range(6)]
    samples = []
    for i, image in enumerate(images):
        mode = JPG if i % 2 else RAW
        data = jpeg(image) if mode == JPG else image.tobytes()
        samples.append(EncodedSample(data, mode, (16, 20), (16 * i + 16, 20 * i + 20), i - 1, 10 + i))
    path = tmp_path / "a.beton"
    write_beton(path, samples, 8)

    reader = Reader(str(path))
    assert reader.field_names == ["image", "label", "index", "height", "width"]
    assert reader.num_samples == 6
    for column, expected in (("f1", range(-1, 5)), ("f2", range(10, 16)), ("f4", range(20, 140, 20))):
        assert reader.metadata[column].tolist() == list(expected)

    scalars = {name: [IntDecoder()] for name in ("label", "index", "height", "width")}
    for os_cache in (True, False):
        loader = Loader(
            str(path),
            batch_size=3,
            num_workers=1,
            order=OrderOption.SEQUENTIAL,
            os_cache=os_cache,
            drop_last=False,
            pipelines={"image": [SimpleRGBImageDecoder()], **scalars},
        )
        batches = [[torch.as_tensor(column).numpy().copy() for column in batch] for batch in loader]
        pixels, label, index, height, _ = (np.concatenate(column) for column in zip(*batches, strict=True))
        assert label[:, 0].tolist() == list(range(-1, 5))
        assert index[:, 0].tolist() == list(range(10, 16))
        assert height[:, 0].tolist() == list(range(16, 112, 16))
        for i, image in enumerate(images):
            assert np.abs(pixels[i].astype(int) - image).max() <= (3 if i % 2 else 0)
