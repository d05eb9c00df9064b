import io
import json
import os
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.images import BadImage, decode_image
from ressl.batch import DataError
from tools.image_sets.parquet import find_parquet

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
IMAGE = {"_type": "Image"}
ANIMALS = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}


def picture(seed):
    """An image's pixels and its PNG file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def cells(seeds):
    return pa.array([{"bytes": picture(seed)[1], "path": f"{seed}.png"} for seed in seeds], STRUCT)


def table_of(columns, features=None):
    table = pa.table(columns)
    if features is None:
        return table
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write(path, table, rows=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def write_hub(root, train=7, test=4, features=None, **columns):
    """As the hub gives it away: seeds 0, 1, ... in two files of train, 100, 101, ... in one of test."""
    labels = [i % 3 for i in range(train)]
    features = {"image": IMAGE, "label": ANIMALS} if features is None else features
    half = train // 2
    for i, part in enumerate((range(half), range(half, train))):
        table = table_of({"image": cells(part), "label": labels[part.start : part.stop]} | columns, features)
        write(root / "data" / f"train-{i:05}-of-00002.parquet", table)
    seeds = range(100, 100 + test)
    table = table_of({"image": cells(seeds), "label": [2] * test} | columns, features)
    write(root / "data" / "test-00000-of-00001.parquet", table)
    return root


def write_saved(directory, table, files=2, stream=True):
    """As `save_to_disk` writes one split."""
    directory.mkdir(parents=True)
    size = -(-table.num_rows // files)
    names = [f"data-{i:05}-of-{files:05}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        make = pa.ipc.new_stream if stream else pa.ipc.new_file
        with pa.OSFile(str(directory / name), "wb") as sink, make(sink, table.schema) as writer:
            writer.write_table(table.slice(i * size, size), max_chunksize=2)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (directory / "dataset_info.json").write_text(json.dumps({"features": {"image": IMAGE, "label": ANIMALS}}))


def check_images(images, seeds):
    assert len(images.labels) == len(seeds)
    for i, seed in enumerate(seeds):
        assert images.read(i) == picture(seed)[1]
    assert np.array_equal(decode_image(images.read(0)), picture(seeds[0])[0])


def in_child(check):
    """Whether check() holds in a forked process, which has a minute for it."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_data_set_of_the_hub_is_read(tmp_path):
    origin = find_parquet(write_hub(tmp_path))
    assert list(origin.sets) == ["train", "val"]
    assert origin.description == f"Parquet files in {tmp_path}: train from 2 files, val from 1 file"
    train, val = origin.sets["train"](), origin.sets["val"]()
    check_images(train, range(7))
    check_images(val, range(100, 104))
    assert train.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert train.classes == val.classes == ("cat", "dog", "owl")
    assert [train.name(i) for i in (0, 2, 3, 6)] == [
        "data/train-00000-of-00002.parquet[0]", "data/train-00000-of-00002.parquet[2]",
        "data/train-00001-of-00002.parquet[0]", "data/train-00001-of-00002.parquet[3]",
    ]  # fmt: skip
    assert train.in_order


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train/0000.parquet", "validation/0000.parquet"], ["train", "val"]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], ["train", "val"]),
        (["default/partial-train/0000.parquet", "default/test/0000.parquet"], ["train", "val"]),
        (["train.parquet", "valid.parquet", "test.parquet"], ["train", "val", "test"]),
        (["data/train-00000-of-00001-0123456789abcdef.parquet", "data/val-00000-of-00001-f.parquet"], ["train", "val"]),
        (["data/train-00000-of-00001.parquet", "data/unsupervised-00000-of-00001.parquet"], ["train", "unsupervised"]),
        (["0000.parquet", "0001.parquet"], ["train"]),
        (["test.parquet"], ["val"]),
        (["Training.parquet", "DEV.parquet"], ["train", "val"]),
    ],
)
def test_splits_are_told_by_names(tmp_path, files, splits):
    for i, name in enumerate(files):
        write(tmp_path / name, table_of({"image": cells([i])}))
    origin = find_parquet(tmp_path)
    assert list(origin.sets) == splits
    assert sum(len(load().labels) for load in origin.sets.values()) == len(files)


def test_files_of_no_split_beside_splits_are_named_and_left_out(tmp_path):
    for i, name in enumerate(("train.parquet", "other.parquet")):
        write(tmp_path / name, table_of({"image": cells([i])}))
    origin = find_parquet(tmp_path)
    assert list(origin.sets) == ["train"]
    assert origin.description.endswith("; not used: other.parquet")


def test_one_file_is_a_data_set_too(tmp_path):
    write(tmp_path / "all of it.parquet", table_of({"image": cells(range(4))}))
    origin = find_parquet(tmp_path / "all of it.parquet")
    images = origin.sets["train"]()
    check_images(images, range(4))
    assert images.name(3) == "all of it.parquet[3]"
    assert images.labels.tolist() == [-1] * 4
    assert images.classes == ()


def test_of_several_configurations_one_must_be_given(tmp_path):
    for config in ("large", "small"):
        write_hub(tmp_path / config)
    with pytest.raises(DataError, match=rf"several configurations: large, small; give one, as {tmp_path}/small"):
        find_parquet(tmp_path)
    assert list(find_parquet(tmp_path / "small").sets) == ["train", "val"]
    for path in (tmp_path / "large" / "data").iterdir():
        path.unlink()
    check_images(find_parquet(tmp_path).sets["train"](), range(7))


README = """---
license: mit
dataset_info:
{entries}
---
# Animals

---
"""
ENTRY = """
{dash} config_name: {config}
  features:
  - name: photo
    dtype: image
  - name: kind
    dtype:
      class_label:
        names:
          '0': {first}
          '10': kiwi
          '1': dog
"""


@pytest.mark.parametrize("several", [False, True])
def test_class_names_are_found_in_the_readme(tmp_path, several):
    entries = ENTRY.format(dash=" ", config="small", first="cat")
    if several:
        entries = ENTRY.format(dash="-", config="large", first="wrong") + ENTRY.format(
            dash="-", config="small", first="cat"
        )
    (tmp_path / "README.md").write_text(README.format(entries=entries))
    write(tmp_path / "small" / "train.parquet", table_of({"photo": cells([1, 2]), "kind": [1, 2]}))
    images = find_parquet(tmp_path).sets["train"]()
    check_images(images, [1, 2])
    assert (images.labels.tolist(), images.classes) == ([1, 2], ("cat", "dog", "kiwi"))


def test_names_of_labels_in_text_are_sorted_over_all_splits(tmp_path):
    write(tmp_path / "train.parquet", table_of({"image": cells([1, 2, 3]), "label": ["owl", "cat", None]}))
    write(tmp_path / "test.parquet", table_of({"image": cells([4]), "label": ["dog"]}))
    origin = find_parquet(tmp_path)
    train, val = origin.sets["train"](), origin.sets["val"]()
    assert train.classes == val.classes == ("cat", "dog", "owl")
    assert (train.labels.tolist(), val.labels.tolist()) == ([2, 0, -1], [1])


def test_labels_outside_their_classes_are_refused_and_missing_ones_are_not(tmp_path):
    features = {"image": IMAGE, "label": ANIMALS}
    for labels, found in (([0, None, -1], [0, -1, -1]), ([0, 3, 1], "label 3"), ([-2, 0, 0], "label -2")):
        write(tmp_path / "train.parquet", table_of({"image": cells([1, 2, 3]), "label": labels}, features))
        load = find_parquet(tmp_path).sets["train"]
        if isinstance(found, list):
            assert load().labels.tolist() == found
        else:
            with pytest.raises(DataError, match=f"{found} in column 'label', expected numbers below 3"):
                load()
    write(tmp_path / "train.parquet", table_of({"image": cells([1]), "label": [10**12]}))
    with pytest.raises(DataError, match="label 1000000000000"):
        find_parquet(tmp_path).sets["train"]()


def test_images_that_are_missing_or_elsewhere_are_bad_one_by_one(tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "a.png").write_bytes(picture(5)[1])
    (tmp_path / "secret.png").write_bytes(picture(6)[1])
    rows = [
        {"bytes": None, "path": "images/a.png"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "images/b.png"},
        {"bytes": None, "path": "../secret.png"},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "images"},
    ]
    write(tmp_path / "data" / "train.parquet", table_of({"image": pa.array(rows, STRUCT)}), rows=2)
    images = find_parquet(tmp_path).sets["train"]()
    assert images.read(0) == picture(5)[1]
    outside = "not in the data set's directory"
    reasons = ("no image", "no image", "no such file", outside, outside, "not a regular file")
    for i, reason in enumerate(reasons, 1):
        with pytest.raises(BadImage, match=reason):
            images.read(i)


@pytest.mark.parametrize("stream", [True, False])
def test_a_data_set_saved_to_the_disk_is_read(tmp_path, stream):
    write_saved(tmp_path / "train", table_of({"image": cells(range(9)), "label": [0, 1, 2] * 3}), stream=stream)
    write_saved(tmp_path / "test", table_of({"image": cells([50]), "label": [1]}), files=1, stream=stream)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    origin = find_parquet(tmp_path)
    assert origin.description == f"Arrow files in {tmp_path}: train from 2 files, val from 1 file"
    train, val = origin.sets["train"](), origin.sets["val"]()
    check_images(train, range(9))
    check_images(val, [50])
    assert (train.labels.tolist(), train.classes) == ([0, 1, 2] * 3, ("cat", "dog", "owl"))
    assert train.name(8) == "train/data-00001-of-00002.arrow[3]"
    check_images(find_parquet(tmp_path / "train").sets["train"](), range(9))
    assert in_child(lambda: all(train.read(i) == picture(i)[1] for i in (8, 0, 5)))


def test_a_saved_data_set_with_missing_files_is_refused(tmp_path):
    write_saved(tmp_path / "train", table_of({"image": cells(range(4)), "label": [0] * 4}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"test/state\.json: cannot be read: No such file"):
        find_parquet(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (tmp_path / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002\.arrow: no such file, but state\.json names it"):
        find_parquet(tmp_path)
    (tmp_path / "train" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(DataError, match="names no files beside it"):
        find_parquet(tmp_path)
    for text, message in (("{", "not JSON"), ("[]", "names no splits"), ('{"splits": ["../up"]}', r"named '\.\./up'")):
        (tmp_path / "dataset_dict.json").write_text(text)
        with pytest.raises(DataError, match=message):
            find_parquet(tmp_path)


def test_saved_files_that_are_cut_off_are_refused_wherever_that_is(tmp_path):
    write_saved(tmp_path / "saved", table_of({"image": cells(range(4)), "label": [0] * 4}), files=1)
    path = tmp_path / "saved" / "data-00000-of-00001.arrow"
    load, whole = find_parquet(tmp_path / "saved").sets["train"], path.read_bytes()
    for size in range(0, len(whole), 8):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"data-00000-of-00001\.arrow: cannot be read"):
            load()
    path.write_bytes(whole)
    assert len(load().labels) == 4


def test_forked_processes_read_at_once_after_the_parent_has_read(tmp_path):
    write_hub(tmp_path, train=40)
    pq.read_table(tmp_path / "data" / "train-00000-of-00002.parquet", use_threads=True)  # starts pyarrow's own threads
    images = find_parquet(tmp_path).sets["train"]()
    images.read(4)
    children = []
    for first in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                # in and out of order, and within the rows that the parent has kept
                right = all(images.read(i) == picture(i)[1] for i in (4, 5, *range(first, 40, 4), 3))
                os._exit(0 if right else 1)
            finally:
                os._exit(2)
        children.append(pid)
    assert all(images.read(i) == picture(i)[1] for i in range(39, -1, -1))
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4


def test_missing_shards_are_named(tmp_path):
    write_hub(tmp_path)
    (tmp_path / "data" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 2 files are missing, as data/train-00001-of-00002\.parquet"):
        find_parquet(tmp_path)


def test_damaged_files_are_refused(tmp_path):
    write_hub(tmp_path)
    path = tmp_path / "data" / "train-00001-of-00002.parquet"
    load, whole = find_parquet(tmp_path).sets["train"], path.read_bytes()
    for data, message in [
        (whole[:-10], "cannot be read: .*; get it again"),
        (b"", "cannot be read: .*; get it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a pointer of Git LFS.*git lfs pull"),
    ]:
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"train-00001-of-00002\.parquet: {message}"):
            load()
    write(path, table_of({"image": pa.array([b"1"]), "label": [1]}))
    with pytest.raises(DataError, match="its column 'image' is not as in"):
        load()
    write(path, table_of({"image": cells([]), "label": pa.array([], pa.int64())}))
    assert len(load().labels) == 3
    write(tmp_path / "data" / "train-00000-of-00002.parquet", pq.read_table(path))
    with pytest.raises(DataError, match="no rows"):
        load()


def test_damaged_rows_are_bad_images_and_the_others_stay_good(tmp_path):
    write_hub(tmp_path)
    path = tmp_path / "data" / "train-00000-of-00002.parquet"
    images = find_parquet(tmp_path).sets["train"]()
    pages, data = pq.ParquetFile(path).metadata.row_group(0).column(0), bytearray(path.read_bytes())
    start = pages.dictionary_page_offset or pages.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(BadImage, match="its rows of the file cannot be read"):
        images.read(1)
    assert images.read(3) == picture(3)[1]
    path.unlink()
    with pytest.raises(BadImage, match="its rows of the file cannot be read: .*No such file"):
        images.read(1)
    assert images.stamp(1) == (-1, -1)


def test_the_identity_follows_every_file(tmp_path):
    write_hub(tmp_path)
    path = tmp_path / "data" / "train-00001-of-00002.parquet"
    first = find_parquet(tmp_path).sets["train"]()
    assert first.stamp(6) == (path.stat().st_size, path.stat().st_mtime_ns)
    assert find_parquet(tmp_path).sets["train"]().identity == first.identity
    os.utime(path, ns=(1, 1))
    assert find_parquet(tmp_path).sets["train"]().identity != first.identity


@pytest.mark.parametrize(("rows", "size", "chunk"), [(100, 10, 100), (1, 10, 16), (2000, 10, 1000), (64, 1024, 22)])
def test_tasks_are_whole_parts_of_row_groups(tmp_path, monkeypatch, rows, size, chunk):
    monkeypatch.setattr("tools.image_sets.parquet.CHUNK_BYTES", 32 << 10)
    files = pa.array([os.urandom(size) for _ in range(rows)])
    write(tmp_path / "train.parquet", table_of({"image": files}), rows)
    assert find_parquet(tmp_path).sets["train"]().chunk == chunk


def test_without_pyarrow_it_is_said_what_to_install(tmp_path, monkeypatch):
    write_hub(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="pyarrow is needed to read it; install it: pip install pyarrow"):
        find_parquet(tmp_path)


def test_other_places_are_left_to_others(tmp_path):
    assert find_parquet(tmp_path) is None
    for name in ("train/cat", "train/dog", "val/cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "0.png").write_bytes(picture(0)[1])
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write(tmp_path / "train" / "metadata.parquet", table_of({"file_name": ["cat/0.png"], "label": [0]}))
    assert find_parquet(tmp_path) is None
    write(tmp_path / "list.parquet", table_of({"file_name": ["train/cat/0.png"], "label": [0]}))
    assert find_parquet(tmp_path) is None
    assert find_parquet(tmp_path / "train" / "cat" / "0.png") is None
    assert find_parquet(tmp_path / "missing") is None
    assert find_parquet(tmp_path / ("x" * 300)) is None
