import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.images import decode_image
from ressl.batch import DataError
from tools.convert import convert
from tools.image_sets import detect


def write_shard(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            data = data if isinstance(data, bytes) else str(data).encode()
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def samples(*labels, start=0, suffix="jpg"):
    """`000000.jpg` with bytes of its own, and `000000.cls` where the label is not None."""
    files = {}
    for i, label in enumerate(labels, start):
        files[f"{i:06}.{suffix}"] = f"image {i}"
        if label is not None:
            files[f"{i:06}.cls"] = label
    return files


def test_samples_are_read_in_the_order_of_shards_and_positions(tmp_path):
    write_shard(tmp_path / "s-1.tar", samples(1, 0, start=2))
    write_shard(tmp_path / "s-0.tar", dict(reversed(samples(2, None).items())))
    origin = detect(str(tmp_path))
    assert origin.description == f"WebDataset shards in {tmp_path}: train from 2 shards, s-0.tar ... s-1.tar"
    images = origin.sets["train"]()
    assert images.labels.tolist() == [-1, 2, 1, 0]
    assert images.classes == ("0", "1", "2")
    assert [images.name(i) for i in range(4)] == [
        "s-0.tar/000001.jpg", "s-0.tar/000000.jpg", "s-1.tar/000002.jpg", "s-1.tar/000003.jpg",
    ]  # fmt: skip
    assert [images.read(i) for i in range(4)] == [b"image 1", b"image 0", b"image 2", b"image 3"]
    status = (tmp_path / "s-1.tar").stat()
    assert images.stamp(3) == (status.st_size, status.st_mtime_ns)
    assert images.identity.count(";") == 1


def test_one_shard_can_be_given_itself(tmp_path):
    path = write_shard(tmp_path / "any.tar", samples(0, 1))
    origin = detect(str(path))
    assert origin.description == f"WebDataset shards in {path}: train from any.tar"
    assert origin.sets["train"]().labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("data", "label"),
    [
        ('{"label": 3}', 3),
        ('{"cls": 2, "label": 1}', 1),
        ('{"cls": "4"}', 4),
        ("{}", -1),
        ("[1]", -1),
        ('{"label": -1}', -1),
        ('{"label": null}', -1),
    ],
)
def test_labels_are_read_from_json(tmp_path, data, label):
    write_shard(tmp_path / "a.tar", {"x.json": data, "x.PNG": "image", "y.jpeg": "image", "y.cls": " 0\n"})
    assert detect(str(tmp_path)).sets["train"]().labels.tolist() == [label, 0]


def test_keys_end_at_the_first_dot_of_the_last_component(tmp_path):
    files = {
        "v1.0/a.b.jpg": "no image by its part", "v1.0/a.jpg": "image", "v1.0/a.cls": 1, "v1.0/b.webp": "image b",
        "v1.0/b.cls": 0, "v1.0/b.txt": "caption", "v1.0/c.cls": 1, "readme": "",
    }  # fmt: skip
    images = detect(str(write_shard(tmp_path / "a.tar", files))).sets["train"]()
    assert images.labels.tolist() == [1, 0]
    assert [images.read(i) for i in range(2)] == [b"image", b"image b"]
    assert images.notes == ("ignored 4 other files (1 (no suffix), 1 .b.jpg, 1 .cls, 1 .txt)",)


def test_one_key_in_two_shards_is_two_samples(tmp_path):
    for i in range(2):
        write_shard(tmp_path / f"s-{i}.tar", {"x.jpg": f"image {i}", "x.cls": i})
    images = detect(str(tmp_path)).sets["train"]()
    assert images.labels.tolist() == [0, 1]
    assert [images.read(i) for i in range(2)] == [b"image 0", b"image 1"]


def test_splits_are_known_by_the_names_of_shards(tmp_path):
    for name, label in (("in-train-0", 0), ("in-train-1", 2), ("in-validation-0", 1)):
        write_shard(tmp_path / f"{name}.tar", samples(label))
    origin = detect(str(tmp_path))
    assert list(origin.sets) == ["train", "val"]
    assert origin.sets["train"]().labels.tolist() == [0, 2]
    assert origin.sets["val"]().labels.tolist() == [1]


@pytest.fixture
def converted(tmp_path):
    """What `convert --to webdataset` writes of two classes, with images in the second only in val."""
    for name in ("train/cat/1.png", "train/dog/2.png", "val/dog/3.png"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 9, 3), int(path.stem), np.uint8)).save(path)
    convert(str(tmp_path / "folder"), tmp_path / "out", "webdataset", console=Console(quiet=True))
    return tmp_path / "out"


def test_what_convert_wrote_keeps_its_classes(converted):
    origin = detect(str(converted))
    assert ": train from train/" in origin.description
    train, val = (origin.sets[split]() for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog")
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1], [1])
    assert [int(decode_image(train.read(i))[0, 0, 0]) for i in range(2)] == [1, 2]
    for place in (converted / "val", next((converted / "val").glob("*.tar"))):
        alone = detect(str(place)).sets["train"]()
        assert (alone.labels.tolist(), alone.classes) == ([1], ("cat", "dog"))


def test_labels_that_the_manifest_does_not_know_are_refused(converted):
    manifest = json.loads((converted / "manifest.json").read_text())
    manifest["splits"]["train"]["classes"] = ["cat"]
    (converted / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"label 1, but .*manifest\.json names 1 classes"):
        detect(str(converted)).sets["train"]()


def test_another_tools_manifest_is_left_alone(tmp_path):
    write_shard(tmp_path / "set" / "a.tar", samples(0))
    (tmp_path / "manifest.json").write_text("{}")
    assert detect(str(tmp_path / "set")).sets["train"]().classes == ("0",)


def test_numbered_shards_of_images_alone_have_no_labels(tmp_path):
    for i in range(2):
        write_shard(tmp_path / f"s-{i:05}.tar", samples(None, None))
    images = detect(str(tmp_path)).sets["train"]()
    assert (images.labels.tolist(), images.classes) == ([-1] * 4, ())
    assert images.notes == ("no labels in them: if each is a class, unpack each into a directory of its own",)


def test_archives_that_are_named_after_classes_are_no_shards(tmp_path):
    for name in ("0", "1", "n01440764"):
        write_shard(tmp_path / f"{name}.tar", samples(None))
    images = detect(str(tmp_path)).sets["train"]()
    assert (images.labels.tolist(), images.classes) == ([0, 1, 2], ("0", "1", "n01440764"))


def test_captions_in_json_are_no_labels(tmp_path):
    write_shard(tmp_path / "00000.tar", {"0.jpg": "image", "0.json": '{"caption": "a cat"}', "0.txt": "a cat"})
    images = detect(str(tmp_path)).sets["train"]()
    assert (images.labels.tolist(), images.classes) == ([-1], ())


@pytest.mark.parametrize("note", ['{"width": 3}', "not JSON"])
def test_class_directories_with_notes_beside_images_are_class_directories(tmp_path, note):
    files = {"cat/1.jpg": "image", "cat/1.json": note, "dog/2.jpg": "image", "dog/2.json": note}
    images = detect(str(write_shard(tmp_path / "a.tar", files))).sets["train"]()
    assert (images.labels.tolist(), images.classes) == ([0, 1], ("cat", "dog"))


@pytest.mark.parametrize(
    ("part", "data"),
    [
        ("cls", "cat"),
        ("cls", ""),
        ("cls", "1.5"),
        ("cls", "-2"),
        ("cls", "1000000"),
        ("json", '{"label": true}'),
        ("json", "{"),
    ],
)
def test_labels_that_cannot_be_read_are_told_at_once(tmp_path, part, data):
    write_shard(
        tmp_path / "a.tar", {"0.jpg": "", "0.cls": 0} | {f"{i}.{p}": data for i in range(1, 9) for p in ("jpg", part)}
    )
    origin = detect(str(tmp_path))
    with pytest.raises(DataError) as caught:
        origin.sets["train"]()
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}: labels that cannot be read: a.tar/1.{part}: ")
    assert message.endswith("; and 3 more")


def test_a_shard_that_is_cut_off_is_refused(tmp_path):
    for i in range(2):
        write_shard(tmp_path / f"s-{i}.tar", samples(0, 1))
    data = (tmp_path / "s-1.tar").read_bytes()
    (tmp_path / "s-1.tar").write_bytes(data[:1000])
    with pytest.raises(DataError, match=r"s-1\.tar: .*byte 1,000.*get it again"):
        detect(str(tmp_path)).sets["train"]()


def test_shards_without_images_are_refused(tmp_path):
    write_shard(tmp_path / "s-0.tar", {"0.jpg": "image", "0.cls": 0})
    write_shard(tmp_path / "s-1.tar", {"0.jpg": "image", "0.cls": 0})
    origin = detect(str(tmp_path))
    for i in range(2):
        write_shard(tmp_path / f"s-{i}.tar", {"0.txt": "words"})
    with pytest.raises(DataError, match=r"no images found .*: only 2 other files \(2 \.txt\)"):
        origin.sets["train"]()


def test_labels_that_are_not_beside_their_images_are_refused(tmp_path):
    images = {f"{i}.jpg": "image" for i in range(5)}
    write_shard(tmp_path / "s-000.tar", {"x.jpg": "image", "x.cls": 0} | images | {f"{i}.cls": i for i in range(5)})
    with pytest.raises(DataError, match=r"s-000\.tar: [0-4]\.cls is not right beside its image.*sorted by name"):
        detect(str(tmp_path)).sets["train"]()


def test_labels_that_are_hard_links_are_labels(tmp_path):
    path = write_shard(tmp_path / "s-0.tar", {"0.jpg": "image", "0.cls": 3})
    with tarfile.open(path, "a") as file:
        for i in (1, 2):
            for name, target in ((f"{i}.jpg", "0.jpg"), (f"{i}.cls", "0.cls")):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = tarfile.LNKTYPE, target
                file.addfile(member)
    images = detect(str(tmp_path)).sets["train"]()
    assert images.labels.tolist() == [3, 3, 3]
    assert images.read(2) == b"image"


def test_archives_that_may_be_classes_or_shards_are_not_guessed_about(tmp_path):
    for i in (1, 2):
        write_shard(tmp_path / f"class_{i}.tar", samples(None))
    with pytest.raises(
        DataError, match=r"class_1\.tar \.\.\. class_2\.tar .* may be classes or shards.*class_00000\.tar"
    ):
        detect(str(tmp_path))
    assert detect(str(tmp_path / "class_1.tar")).sets["train"]().labels.tolist() == [-1]


def test_shards_of_splits_beside_others_are_refused(tmp_path):
    for name in ("train-0", "val-0", "extra-0"):
        write_shard(tmp_path / f"{name}.tar", samples(0))
    with pytest.raises(DataError, match=r"1 of 3 shards are named after no split, as extra-0\.tar, and others are"):
        detect(str(tmp_path))
