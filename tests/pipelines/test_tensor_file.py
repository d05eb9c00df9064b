import hashlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.beton import RAW
from pipelines.tensor_file import FORMAT, read_tensor_file
from ressl.batch import DataError
from tools.beton_writer import EncodedSample
from tools.output import atomic_output
from tools.rows import PLACE, ROW
from tools.tensor_writer import TensorLayout, finish_tensors, write_tensors_to

SIZES = [(5, 7), (1, 1), (2, 33), (40, 3)]
CLASSES = ("cat", "chêne")


@pytest.fixture
def images():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


@pytest.fixture
def path(tmp_path, images):
    samples = [
        EncodedSample(image.tobytes(), RAW, size, (2 * size[0], 3 * size[1]), i % 3 - 1, 10 * i)
        for i, (image, size) in enumerate(zip(images, SIZES, strict=True))
    ]
    with atomic_output(tmp_path / "a.safetensors") as file:
        assert write_tensors_to(file, samples, 1000, CLASSES) == len(SIZES)
    return tmp_path / "a.safetensors"


def rewritten(path, tensors=None, classes='["cat", "dog"]', file_format=FORMAT):
    tensors = load_file(path) | (tensors or {})
    save_file(tensors, path, metadata={"format": file_format, "classes": classes})
    return path


def test_images_of_any_sizes_are_read_back(path, images):
    data = read_tensor_file(path)
    assert data.classes == CLASSES
    assert data.label.tolist() == [-1, 0, 1, -1]
    assert data.index.tolist() == [0, 10, 20, 30]
    assert data.original.tolist() == [[2 * h, 3 * w] for h, w in SIZES]
    for i, image in enumerate(images):
        start = int(data.offset[i])
        assert np.array_equal(data.pixels[start : start + image.size].numpy().reshape(image.shape), image)


def test_room_for_the_header_of_all_images_is_kept_and_the_digest_is_of_all_but_the_pixels(tmp_path, images):
    rows, places, layout = np.zeros(4, ROW), np.zeros(4, PLACE), TensorLayout(1000, CLASSES)
    rows["index"], rows["size"], rows["original"] = range(4), SIZES, SIZES
    path = tmp_path / "a.safetensors"
    with path.open("w+b") as file:
        for i, image in enumerate(images):
            places[i] = layout.place(i, image.size)
            file.seek(places[i]["offset"])
            file.write(image.tobytes())
        digest = finish_tensors(file, layout, rows, places)
    content, pixels = path.read_bytes(), b"".join(image.tobytes() for image in images)
    start = 8 + int.from_bytes(content[:8], "little")
    assert content[start : start + len(pixels)] == pixels
    assert digest == hashlib.sha256(content[:start] + content[start + len(pixels) :]).hexdigest()
    assert layout.start == start
    assert read_tensor_file(path).size.tolist() == [list(size) for size in SIZES]


def test_every_row_can_be_read_as_wide_as_the_widest_image(path):
    data = read_tensor_file(path)
    last_row = data.offset + 3 * data.size[:, 1] * (data.size[:, 0] - 1)
    assert last_row.max() + 3 * data.size[:, 1].max() <= data.pixels.numel()


def test_tables_lie_at_multiples_of_their_width(path):
    data = read_tensor_file(path)
    assert all(getattr(data, name).data_ptr() % 8 == 0 for name in ("offset", "label", "index", "size", "original"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": torch.tensor([0, 0, 2, 0])}, "a label outside the 2 classes"),
        ({"label": torch.tensor([0, 0, -2, 0])}, "a label outside"),
        ({"index": torch.tensor([0, 1, 1, 2])}, "repeated index"),
        ({"index": torch.tensor([0, 1, -1, 2])}, "negative or repeated index"),
        ({"offset": torch.tensor([0, 1, -1, 2])}, "outside the pixels"),
        ({"offset": torch.tensor([0, 1, 2**62, 2])}, "outside the pixels"),
        ({"offset": torch.tensor([0, 1, 2, 420])}, "outside the pixels"),
        ({"size": torch.tensor([[5, 7], [1, 1], [0, 33], [40, 3]], dtype=torch.int32)}, "impossible height"),
        ({"size": torch.tensor([[5, 7], [1, 1], [2**31 - 1] * 2, [40, 3]], dtype=torch.int32)}, "impossible height"),
        ({"original": torch.ones(4, 2, dtype=torch.int32)}, "impossible original"),
        ({"size": torch.ones(4, 2)}, "size is .* expected"),
        ({"label": torch.zeros(3, dtype=torch.int64)}, "expected"),
        ({"label": torch.tensor(0)}, "expected"),
        ({"pixels": torch.zeros(10, 10, dtype=torch.uint8)}, "pixels is"),
        ({"pixels": torch.zeros(10, dtype=torch.uint8)}, "outside the pixels"),
        ({"extra": torch.zeros(1)}, "not a data set in the format"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(path, change, message):
    with pytest.raises(DataError, match=rf"a\.safetensors: .*{message}"):
        read_tensor_file(rewritten(path, change))


@pytest.mark.parametrize("classes", ["", "{}", "[1]", "["])
def test_class_names_that_are_no_list_are_refused(path, classes):
    with pytest.raises(DataError, match="class names"):
        read_tensor_file(rewritten(path, classes=classes))


def test_other_safetensors_files_are_refused(path):
    with pytest.raises(DataError, match="not a data set in the format ressl-tensor-1"):
        read_tensor_file(rewritten(path, file_format="other"))


def test_a_file_cut_anywhere_is_refused(path):
    whole = path.read_bytes()
    for length in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="convert or copy it again"):
            read_tensor_file(path)


def test_flipped_bytes_in_the_header_never_crash(path):
    whole = path.read_bytes()
    for place in range(0, whole.index(b"}}") + 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            read_tensor_file(path)
        except DataError as error:
            assert "\n" not in str(error)


def test_missing_files_and_directories_are_refused(tmp_path):
    with pytest.raises(DataError, match="convert --to tensor"):
        read_tensor_file(tmp_path / "missing.safetensors")
    with pytest.raises(DataError, match="not a regular file"):
        read_tensor_file(tmp_path)
