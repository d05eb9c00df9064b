import bz2
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from pipelines.images import BadImage, decode_image
from ressl.batch import DataError
from tools.image_sets.torchvision_sets import KNOWN, open_torchvision


def encoded(seed, kind="JPEG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


def idx_bytes(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def lines(*texts):
    return "".join(f"{text}\n" for text in texts).encode()


def mat(**content):
    file = io.BytesIO()
    savemat(file, content)
    return file.getvalue()


def annotations(*pairs):
    return np.array([list(pairs)], dtype=[("fname", object), ("class", object)])


# Each entry: the files of a data set except its images, its images with their labels by split (in the order of their
# paths), and its classes.
FILES = {
    "EuroSAT": (
        {},
        {"train": {"eurosat/2750/Forest/1.jpg": 0, "eurosat/2750/Forest/2.jpg": 0, "eurosat/2750/River/1.jpg": 1}},
        ("Forest", "River"),
    ),
    "Imagenette-160px": (
        {},
        {
            "train": {"imagenette2-160/train/n01440764/a.JPEG": 0, "imagenette2-160/train/n03028079/b.JPEG": 1},
            "val": {"imagenette2-160/val/n01440764/c.JPEG": 0, "imagenette2-160/val/n03028079/d.JPEG": 1},
        },
        ("tench", "church"),
    ),
    "DTD": (
        {
            f"dtd/dtd/labels/{name}1.txt": lines(f"banded/{name}.jpg", f"zigzagged/{name}.jpg")
            for name in ("train", "val", "test")
        },
        {
            name: {f"dtd/dtd/images/banded/{name}.jpg": 0, f"dtd/dtd/images/zigzagged/{name}.jpg": 1}
            for name in ("train", "val", "test")
        },
        ("banded", "zigzagged"),
    ),
    "Country211": (
        {},
        {
            ours: {f"country211/{theirs}/AD/1.jpg": 0, f"country211/{theirs}/ZW/2.jpg": 1}
            for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test"))
        },
        ("AD", "ZW"),
    ),
    "FGVCAircraft": (
        {"fgvc-aircraft-2013b/data/variants.txt": lines("A380", "Boeing 747")}
        | {
            f"fgvc-aircraft-2013b/data/images_variant_{name}.txt": lines(f"2{i} Boeing 747", f"1{i} A380")
            for i, name in enumerate(("train", "val", "test"))
        },
        {
            name: {f"fgvc-aircraft-2013b/data/images/1{i}.jpg": 0, f"fgvc-aircraft-2013b/data/images/2{i}.jpg": 1}
            for i, name in enumerate(("train", "val", "test"))
        },
        ("A380", "Boeing 747"),
    ),
    "Flowers102": (
        {
            "flowers-102/imagelabels.mat": mat(labels=np.array([[2, 1, 2, 1, 2, 102]])),
            "flowers-102/setid.mat": mat(trnid=np.array([[1, 2]]), valid=np.array([[3, 4]]), tstid=np.array([[6, 5]])),
        },
        {
            "train": {"flowers-102/jpg/image_00001.jpg": 1, "flowers-102/jpg/image_00002.jpg": 0},
            "val": {"flowers-102/jpg/image_00003.jpg": 1, "flowers-102/jpg/image_00004.jpg": 0},
            "test": {"flowers-102/jpg/image_00005.jpg": 1, "flowers-102/jpg/image_00006.jpg": 101},
        },
        tuple(datasets.Flowers102.classes),
    ),
    "Food101": (
        {
            f"food-101/meta/{name}.json": json.dumps({food: [f"{food}/{name}"] for food in foods}).encode()
            for name in ("train", "test")
            for foods in [("waffles", "apple_pie")]
        },
        {
            ours: {f"food-101/images/apple_pie/{theirs}.jpg": 0, f"food-101/images/waffles/{theirs}.jpg": 1}
            for ours, theirs in (("train", "train"), ("val", "test"))
        },
        ("apple_pie", "waffles"),
    ),
    "OxfordIIITPet": (
        {
            f"oxford-iiit-pet/annotations/{name}.txt": lines(f"big_dog_{i} 2 2 1", f"Cat_{i} 1 1 1")
            for i, name in enumerate(("trainval", "test"))
        },
        {
            name: {f"oxford-iiit-pet/images/Cat_{i}.jpg": 0, f"oxford-iiit-pet/images/big_dog_{i}.jpg": 1}
            for i, name in enumerate(("train", "val"))
        },
        ("Cat", "Big Dog"),
    ),
    "Caltech101": (
        {"caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg": b"not a class"},
        {
            "train": {
                f"caltech101/101_ObjectCategories/{name}/image_000{k}.jpg": i
                for i, name in enumerate(("ant", "yin"))
                for k in (1, 2)
            }
        },
        ("ant", "yin"),
    ),
    "Caltech256": (
        {},
        {
            "train": {
                f"caltech256/256_ObjectCategories/{name}/{name[:3]}_000{k}.jpg": i
                for i, name in enumerate(("001.ak47", "002.flag"))
                for k in (1, 2)
            }
        },
        ("001.ak47", "002.flag"),
    ),
    "RenderedSST2": (
        {},
        {
            ours: {f"rendered-sst2/{theirs}/negative/1.png": 0, f"rendered-sst2/{theirs}/positive/1.png": 1}
            for ours, theirs in (("train", "train"), ("val", "valid"), ("test", "test"))
        },
        ("negative", "positive"),
    ),
    "StanfordCars": (
        {
            "stanford_cars/devkit/cars_meta.mat": mat(class_names=np.array([["Acura", "Audi"]], object)),
            "stanford_cars/devkit/cars_train_annos.mat": mat(annotations=annotations(("1.jpg", 2), ("2.jpg", 1))),
            "stanford_cars/cars_test_annos_withlabels.mat": mat(annotations=annotations(("1.jpg", 1), ("2.jpg", 2))),
        },
        {
            "train": {"stanford_cars/cars_train/1.jpg": 1, "stanford_cars/cars_train/2.jpg": 0},
            "val": {"stanford_cars/cars_test/1.jpg": 0, "stanford_cars/cars_test/2.jpg": 1},
        },
        ("Acura", "Audi"),
    ),
    "SUN397": (
        {"SUN397/ClassName.txt": lines("/a/abbey", "/a/apse/indoor", "/z/zoo")},
        {"train": {"SUN397/a/abbey/sun_c.jpg": 0, "SUN397/a/apse/indoor/sun_b.jpg": 1, "SUN397/z/zoo/sun_a.jpg": 2}},
        ("abbey", "apse/indoor", "zoo"),
    ),
    "CLEVRClassification": (
        {
            f"clevr/CLEVR_v1.0/scenes/CLEVR_{name}_scenes.json": json.dumps(
                {"scenes": [{"image_filename": f"{name}_{k}.png", "objects": [{}] * k} for k in (1, 2)]}
            ).encode()
            for name in ("train", "val")
        },
        {
            name: {f"clevr/CLEVR_v1.0/images/{name}/{name}_{k}.png": -1 if name == "test" else k for k in (1, 2)}
            for name in ("train", "val", "test")
        },
        tuple("012"),
    ),
    "INaturalist": (
        {},
        {
            ours: {f"{theirs}/0000{i}_Animalia_P_C_O_F_G_s{i}/{k}.jpg": i for i in (0, 1) for k in (1, 2)}
            for ours, theirs in (("train", "2021_train"), ("val", "2021_valid"))
        },
        ("00000_Animalia_P_C_O_F_G_s0", "00001_Animalia_P_C_O_F_G_s1"),
    ),
    "Places365-small": (
        {
            "categories_places365.txt": lines("/a/airfield 0", "/z/zen_garden 1"),
            "places365_train_standard.txt": lines("/z/zen_garden/1.jpg 1", "/a/airfield/2.jpg 0"),
            "places365_val.txt": lines("v1.jpg 1"),
            "places365_test.txt": lines("t1.jpg"),
        },
        {
            "train": {"data_256_standard/a/airfield/2.jpg": 0, "data_256_standard/z/zen_garden/1.jpg": 1},
            "val": {"val_256/v1.jpg": 1},
            "test": {"test_256/t1.jpg": -1},
        },
        ("/a/airfield", "/z/zen_garden"),
    ),
}  # fmt: skip


def without_checksums(monkeypatch):
    """Lets torchvision take these tiny files for those that it would download."""
    flowers, places = datasets.Flowers102, datasets.Places365
    monkeypatch.setattr(flowers, "_file_dict", {key: (name, None) for key, (name, _) in flowers._file_dict.items()})
    monkeypatch.setattr(places, "_CATEGORIES_META", (places._CATEGORIES_META[0], None))
    lists = {split: (name, None) for split, (name, _) in places._FILE_LIST_META.items()}
    monkeypatch.setattr(places, "_FILE_LIST_META", lists)
    for one in (datasets.CIFAR10, datasets.STL10):
        for attribute in ("train_list", "test_list"):
            monkeypatch.setattr(one, attribute, [(name, None) for name, _ in getattr(one, attribute)])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": None})
    svhn = {split: (url, name, None) for split, (url, name, _) in datasets.SVHN.split_list.items()}
    monkeypatch.setattr(datasets.SVHN, "split_list", svhn)


def write_all(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_data_sets_of_image_files_give_their_files(tmp_path, monkeypatch, name):
    without_checksums(monkeypatch)
    others, splits, classes = FILES[name]
    images = sorted({path for split in splits.values() for path in split}, reverse=True)
    content = {path: encoded(i, "PNG" if path.endswith("png") else "JPEG") for i, path in enumerate(images)}
    write_all(tmp_path, others | content)
    origin = open_torchvision(f"torchvision:{name}:{tmp_path}")
    assert origin.description == f"torchvision's {name} in {tmp_path}"
    assert list(origin.sets) == list(splits)
    for split, expected in splits.items():
        found = origin.sets[split]()
        assert {found.name(i): int(label) for i, label in enumerate(found.labels)} == expected
        assert [found.name(i) for i in range(len(expected))] == sorted(expected)
        assert [found.read(i) for i in range(len(expected))] == [content[path] for path in sorted(expected)]
        if name != "CLEVRClassification" or split != "test":
            assert found.classes == classes
        path = tmp_path / found.name(0)
        assert found.stamp(0) == (path.stat().st_size, path.stat().st_mtime_ns)
        path.unlink()
        with pytest.raises(BadImage, match="no such file"):
            found.read(0)


def test_images_of_gtsrb_are_decoded_as_they_are_ppm(tmp_path):
    for name in ("Training/00000/1.ppm", "Training/00001/1.ppm", "Final_Test/Images/7.ppm"):
        write_all(tmp_path / "gtsrb" / "GTSRB", {name: encoded(1, "PPM")})
    write_all(tmp_path / "gtsrb", {"GT-final_test.csv": lines("Filename;Width;ClassId", "7.ppm;8;1")})
    origin = open_torchvision(f"torchvision:GTSRB:{tmp_path}")
    train, val = origin.sets["train"](), origin.sets["val"]()
    assert (train.labels.tolist(), val.labels.tolist(), train.classes) == ([0, 1], [1], ("0", "1"))
    assert np.array_equal(train.read(1), decode_image(encoded(1, "PNG")))
    path = tmp_path / "gtsrb" / "GTSRB" / "Training" / "00001" / "1.ppm"
    for data, reason in ((b"P6\n8 9\n255\nshort", "cannot be decoded"), (b"P6\n99999 9999\n255\n", "over the limit")):
        path.write_bytes(data)
        with pytest.raises(BadImage, match=reason):
            train.read(1)
    assert train.read(0).shape == (9, 8, 3)


def grey_digits(name, root):
    """The files of a data set of the MNIST family: 6 images for training, 3 for testing. Returns the former."""
    draw = np.random.default_rng(3)
    for part, count in (("test", 3), ("train", 6)):
        images, labels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count, dtype=np.uint8)
        t10k = "t10k" if part == "test" else part
        if name.startswith("EMNIST"):
            kind = name.removeprefix("EMNIST-")
            files = {
                f"EMNIST/raw/emnist-{kind}-{part}-images-idx3-ubyte": idx_bytes(images),
                f"EMNIST/raw/emnist-{kind}-{part}-labels-idx1-ubyte": idx_bytes(labels),
            }
        elif name == "QMNIST":
            more = np.stack([labels, labels + 100], axis=1).astype(">i4")
            files = {
                f"QMNIST/raw/qmnist-{part}-images-idx3-ubyte": idx_bytes(images),
                f"QMNIST/raw/qmnist-{part}-labels-idx2-int": idx_bytes(more, kind=12),
            }
        else:
            files = {
                f"{name}/raw/{t10k}-images-idx3-ubyte": idx_bytes(images),
                f"{name}/raw/{t10k}-labels-idx1-ubyte": idx_bytes(labels),
            }
        write_all(root, files)
    return images


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("MNIST", "0 - zero"), ("FashionMNIST", "T-shirt/top"), ("KMNIST", "o"), ("QMNIST", "0 - zero"),
        ("EMNIST-letters", "N/A"), ("EMNIST-byclass", "0"),
    ],
)  # fmt: skip
def test_the_mnist_family_is_read(tmp_path, name, first):
    images = grey_digits(name, tmp_path)
    origin = open_torchvision(f"torchvision:{name}:{tmp_path}")
    train, val = origin.sets["train"](), origin.sets["val"]()
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 1, 2, 3, 4, 5], [0, 1, 2])
    assert train.classes == val.classes
    assert train.classes[0] == first
    assert np.array_equal(train.read(4), np.repeat(images[4][:, :, None], 3, axis=2))
    assert train.name(4) == f"{name}[4]"
    assert train.identity != val.identity
    before = train.stamp(0)
    (tmp_path / "another").touch()
    assert open_torchvision(f"torchvision:{name}:{tmp_path}").sets["train"]().stamp(0) == before


def test_usps_has_numbers_for_names(tmp_path):
    row = " ".join(f"{i + 1}:{value}" for i, value in enumerate(np.linspace(-1, 1, 256)))
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / name).write_bytes(bz2.compress(lines(f"10 {row}", f"1 {row}")))
    train = open_torchvision(f"torchvision:USPS:{tmp_path}").sets["train"]()
    assert (train.labels.tolist(), train.classes) == ([9, 0], tuple("0123456789"))
    assert train.read(0).shape == (16, 16, 3)
    assert train.read(0)[0, 0].tolist() == [0, 0, 0]
    assert train.read(0)[15, 15].tolist() == [255, 255, 255]


def test_svhn_is_read_with_ten_for_zero(tmp_path, monkeypatch):
    without_checksums(monkeypatch)
    images = np.random.default_rng(4).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for name in ("train", "test"):
        content = mat(X=images.transpose(1, 2, 3, 0), y=np.array([[10], [9], [1]], np.uint8))
        (tmp_path / f"{name}_32x32.mat").write_bytes(content)
    val = open_torchvision(f"torchvision:SVHN:{tmp_path}").sets["val"]()
    assert (val.labels.tolist(), val.classes) == ([0, 9, 1], tuple("0123456789"))
    assert np.array_equal(val.read(1), images[1])


def test_cifar_and_stl10_are_read(tmp_path, monkeypatch):
    without_checksums(monkeypatch)
    images = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    batch = pickle.dumps({"data": images.reshape(2, 3072), "labels": [3, 1]}, protocol=2)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    meta = pickle.dumps({"label_names": list("abcdefghij")}, protocol=2)
    write_all(tmp_path / "cifar-10-batches-py", dict.fromkeys(names, batch) | {"batches.meta": meta})
    train = open_torchvision(f"torchvision:CIFAR10:{tmp_path}").sets["train"]()
    assert (train.labels.tolist(), train.classes) == ([3, 1] * 5, tuple("abcdefghij"))
    assert np.array_equal(train.read(9), images[1].transpose(1, 2, 0))
    pixels = bytes(3 * 96 * 96)
    files = {f"{name}_X.bin": pixels * 2 for name in ("train", "test", "unlabeled")}
    files |= {"train_y.bin": b"\1\2", "test_y.bin": b"\3\4", "class_names.txt": lines(*"abcdefghij")}
    write_all(tmp_path / "stl10_binary", files)
    origin = open_torchvision(f"torchvision:STL10:{tmp_path}")
    labels = {split: load().labels.tolist() for split, load in origin.sets.items()}
    assert labels == {"train": [0, 1], "val": [2, 3], "unlabeled": [-1, -1]}


def test_every_known_name_is_a_data_set_of_torchvision():
    for name, known in KNOWN.items():
        assert callable(getattr(datasets, known.maker or name))
        assert list(open_torchvision(f"torchvision:{name}").sets)[: len(known.splits)] == list(known.splits)
        assert list(known.splits)[0] == "train"


def test_what_is_not_known_or_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="torchvision:ImageNet: no such data set; known are CIFAR10, CIFAR100"):
        open_torchvision("torchvision:ImageNet")
    with pytest.raises(DataError, match="give the whole path"):
        open_torchvision("torchvision:CIFAR10:~nobody-of-this-name/x")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="torchvision:CIFAR10: cannot be read from or downloaded to .*file"):
        open_torchvision(f"torchvision:CIFAR10:{tmp_path / 'file'}").sets["train"]()
    with pytest.raises(DataError, match="torchvision:StanfordCars: cannot be read .*: Dataset not found"):
        open_torchvision(f"torchvision:StanfordCars:{tmp_path}").sets["val"]()


def test_damaged_lists_are_refused(tmp_path):
    write_all(tmp_path, FILES["Food101"][0] | {"food-101/meta/train.json": b"{"})
    (tmp_path / "food-101" / "images").mkdir()
    with pytest.raises(DataError, match="torchvision:Food101: cannot be read"):
        open_torchvision(f"torchvision:Food101:{tmp_path}").sets["train"]()
