import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ressl.batch import DataError
from tools.image_sets import detect
from tools.image_sets.parquet import find_parquet


def load(tmp_path, labels, name="label"):
    images = pa.array([b"image"] * len(labels))
    pq.write_table(pa.table({"image": images, name: labels}), tmp_path / "train.parquet")
    images = find_parquet(tmp_path).sets["train"]()
    return images.labels.tolist(), images.classes


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        (pa.array([1.0, None, 0.0]), [1, -1, 0], ("0", "1")),
        (pa.array([1.0, math.nan, 0.0], pa.float32()), [1, -1, 0], ("0", "1")),
        (pa.array(["owl", None, "cat"]).dictionary_encode(), [1, -1, 0], ("cat", "owl")),
        (pa.array([5, 3, 5], pa.int16()).dictionary_encode(), [5, 3, 5], tuple("012345")),
        (pa.array([True, False, None]), [1, 0, -1], ("0", "1")),
        (pa.array(["owl", "cat", None], pa.string_view()), [1, 0, -1], ("cat", "owl")),
    ],
)
def test_labels_of_every_type_count(tmp_path, labels, expected, classes):
    assert load(tmp_path, labels) == (expected, classes)
    assert load(tmp_path, labels, "category") == (expected, classes)


@pytest.mark.parametrize("wrong", [0.5, math.inf])
def test_numbers_with_a_fraction_are_no_labels(tmp_path, wrong):
    with pytest.raises(DataError, match=rf"label {wrong} in column 'label', expected numbers"):
        load(tmp_path, pa.array([1.0, wrong]))


def test_a_table_of_other_bytes_beside_an_image_folder_is_left_alone(tmp_path):
    (tmp_path / "cat").mkdir()
    pq.write_table(pa.table({"embedding": [b"1"]}), tmp_path / "features.parquet")
    with pytest.raises(DataError, match="no telling which column holds the images: embedding"):
        find_parquet(tmp_path).sets["train"]()
    (tmp_path / "cat" / "0.jpg").write_bytes(b"image")
    assert detect(str(tmp_path)).sets["train"]().classes == ("cat",)


def test_directories_that_were_not_looked_into_are_told(tmp_path):
    for i in range(34):
        (tmp_path / f"config{i:02}").mkdir()
        pq.write_table(pa.table({"image": [b"1"]}), tmp_path / f"config{i:02}" / "train.parquet")
    with pytest.raises(
        DataError, match=r"config09, \.\.\., 2 further directories, which were not looked into; give one"
    ):
        find_parquet(tmp_path)
    for i in range(1, 32):
        (tmp_path / f"config{i:02}" / "train.parquet").unlink()
    assert find_parquet(tmp_path).description.endswith("not used: 2 further directories, which were not looked into")
