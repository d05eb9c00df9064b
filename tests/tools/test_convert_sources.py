"""Every layout that can be converted, in small but whole, to all three formats: the right images with the right labels
come out, and `verify --deep` finds nothing wrong."""

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.beton import RAW, open_beton
from pipelines.images import decode_image
from pipelines.manifest import read_manifest
from pipelines.shards import ShardFiles, read_index
from pipelines.tensor_file import read_tensor_file
from tools.convert import convert
from tools.verify import verify

WNIDS = ("n01440764", "n01443537", "n02102040")
Expected = dict[str, list[tuple[str | None, np.ndarray]]]  # split -> class and pixels of each image


def picture(seed: int, height: int = 20, width: int = 24) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def encoded(image: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


def two_splits() -> tuple[dict[str, bytes], Expected]:
    """train/ and val/ of class folders."""
    files, expected = {}, Expected(train=[], val=[])
    for seed, name in enumerate(("train/cat/1", "train/cat/2", "train/dog/1", "val/cat/9", "val/dog/9")):
        split, label, _ = name.split("/")
        files[f"{name}.png"] = encoded(picture(seed))
        expected[split].append((label, picture(seed)))
    return files, expected


# --- the layouts -----------------------------------------------------------------------------------------------------


def class_folders(root: Path) -> tuple[str, Expected]:
    files, expected = two_splits()
    write(root, files)
    return str(root / "train"), {"train": expected["train"]}


def splits(root: Path) -> tuple[str, Expected]:
    files, expected = two_splits()
    write(root, files)
    return str(root), expected


def flat(root: Path) -> tuple[str, Expected]:
    write(root, {f"{i}.png": encoded(picture(i)) for i in range(4)})
    return str(root), {"train": [(None, picture(i)) for i in range(4)]}


def listed(root: Path) -> tuple[str, Expected]:
    """A flat folder and a list of labels."""
    write(root / "images", {f"{i}.png": encoded(picture(i)) for i in range(4)})
    (root / "labels.csv").write_text("path,label\n2.png,owl\n0.png,cat\n3.png,owl\n1.png,dog\n")
    return str(root / "images"), {
        "train": [(label, picture(i)) for i, label in enumerate(("cat", "dog", "owl", "owl"))]
    }


def tar_of_folders(root: Path) -> tuple[str, Expected]:
    files, expected = two_splits()
    write(root, {"images.tar": tar_of({f"./{name}": data for name, data in files.items()})})
    return str(root / "images.tar"), expected


def zip_of_folders(root: Path) -> tuple[str, Expected]:
    files, expected = two_splits()
    write(root, {"images.zip": zip_of({f"everything/{name}": data for name, data in files.items()})})
    return str(root / "images.zip"), expected


def imagenet(root: Path) -> tuple[str, Expected]:
    """The three files as they are downloaded: a tar of tars, a flat tar, the development kit."""
    scipy_io = pytest.importorskip("scipy.io")
    train = {
        wnid: {f"{wnid}_{n}.JPEG": encoded(picture(10 * c + n), "JPEG") for n in (7, 10)}
        for c, wnid in enumerate(WNIDS)
    }
    val = {f"ILSVRC2012_val_{n:08}.JPEG": encoded(picture(100 + n), "JPEG") for n in range(1, 5)}
    numbers = {
        1: WNIDS[2],
        2: WNIDS[0],
        3: WNIDS[1],
        4: "n00001740",
    }  # not in the order of the ids; the last is no leaf
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.array([(k, wnid, f"word {k}", 3 * (k == 4)) for k, wnid in numbers.items()], kinds).reshape(-1, 1)
    meta = io.BytesIO()
    scipy_io.savemat(meta, {"synsets": synsets})
    truth = [2, 3, 1, 2]
    kit = {
        "data/meta.mat": meta.getvalue(),
        "data/ILSVRC2012_validation_ground_truth.txt": "".join(f"{k}\n" for k in truth).encode(),
        "readme.txt": b"",
    }
    archives = {
        "ILSVRC2012_img_train.tar": tar_of({f"{wnid}.tar": tar_of(files) for wnid, files in train.items()}),
        "ILSVRC2012_img_val.tar": tar_of(val),
        "ILSVRC2012_devkit_t12.tar.gz": tar_of({f"ILSVRC2012_devkit_t12/{k}": v for k, v in kit.items()}, "w:gz"),
    }
    write(root, archives)
    trained = [(wnid, decode_image(files[name])) for wnid, files in train.items() for name in sorted(files)]
    tested = [(numbers[k], decode_image(data)) for k, data in zip(truth, val.values(), strict=True)]
    return str(root), {"train": trained, "val": tested}


def webdataset(root: Path) -> tuple[str, Expected]:
    samples = [(i, i % 2, encoded(picture(i))) for i in range(5)]
    for shard in (0, 1):
        files = {}
        for i, label, data in samples[3 * shard : 3 * shard + 3]:
            files |= {f"{i:04}.png": data, f"{i:04}.cls": str(label).encode()}
        write(root, {f"set-{shard}.tar": tar_of(files)})
    return str(root), {"train": [(str(label), picture(i)) for i, label, _ in samples]}


def cifar10(root: Path) -> tuple[str, Expected]:
    """The python version, packed as it is downloaded."""
    images = [picture(i, 32, 32) for i in range(12)]
    names = [f"kind {n}" for n in range(10)]

    def batch(chosen: range) -> bytes:
        rows = np.stack([images[i].transpose(2, 0, 1).reshape(-1) for i in chosen])
        return pickle.dumps({"data": rows, "labels": [i % 10 for i in chosen]}, protocol=2)

    files = {f"data_batch_{n}": batch(range(2 * n - 2, 2 * n)) for n in range(1, 6)} | {
        "test_batch": batch(range(10, 12))
    }
    meta = {"label_names": names, "num_cases_per_batch": 2, "num_vis": 3072}
    files["batches.meta"] = pickle.dumps(meta, protocol=2)
    packed = tar_of({f"cifar-10-batches-py/{name}": data for name, data in files.items()}, "w:gz")
    write(root, {"cifar-10-python.tar.gz": packed})
    pairs = [(names[i % 10], image) for i, image in enumerate(images)]
    return str(root / "cifar-10-python.tar.gz"), {"train": pairs[:10], "val": pairs[10:]}


def cifar100(root: Path) -> tuple[str, Expected]:
    """The binary version, unpacked: coarse label, fine label, pixels."""
    images = [picture(i, 32, 32) for i in range(6)]
    rows = [bytes([0, 5 * i]) + image.transpose(2, 0, 1).tobytes() for i, image in enumerate(images)]
    names = [f"fine{n}" for n in range(100)]
    write(
        root / "cifar-100-binary",
        {
            "train.bin": b"".join(rows[:4]),
            "test.bin": b"".join(rows[4:]),
            "fine_label_names.txt": "\n".join(names).encode(),
            "coarse_label_names.txt": "\n".join(f"coarse{n}" for n in range(20)).encode(),
        },
    )
    pairs = [(names[5 * i], image) for i, image in enumerate(images)]
    return str(root), {"train": pairs[:4], "val": pairs[4:]}


def stl10(root: Path) -> tuple[str, Expected]:
    images = [picture(i, 96, 96) for i in range(6)]
    names = [f"thing{n}" for n in range(10)]

    def pixels(chosen: slice) -> bytes:
        return b"".join(image.transpose(2, 1, 0).tobytes() for image in images[chosen])  # columns before rows

    files = {
        "train_X.bin": pixels(slice(0, 2)),
        "train_y.bin": bytes([3, 1]),  # from 1
        "test_X.bin": pixels(slice(2, 4)),
        "test_y.bin": bytes([10, 2]),
        "unlabeled_X.bin": pixels(slice(4, 6)),
        "class_names.txt": "\n".join(names).encode(),
    }
    write(root / "stl10_binary", files)
    labels = [names[2], names[0], names[9], names[1], None, None]
    pairs = list(zip(labels, images, strict=True))
    return str(root), {"train": pairs[:2], "val": pairs[2:4], "unlabeled": pairs[4:]}


def tiny_imagenet(root: Path) -> tuple[str, Expected]:
    """The zip as it is downloaded: everything below one directory, val with a list, test without labels."""
    files = {"wnids.txt": "\n".join(reversed(WNIDS)).encode(), "words.txt": b""}
    expected = Expected(train=[], val=[], test=[])
    for c, wnid in enumerate(WNIDS):
        files[f"train/{wnid}/{wnid}_boxes.txt"] = b""
        for n in range(2):
            data = encoded(picture(10 * c + n), "JPEG")
            files[f"train/{wnid}/images/{wnid}_{n}.JPEG"] = data
            expected["train"].append((wnid, decode_image(data)))
    lines = []
    for n, wnid in enumerate((WNIDS[2], WNIDS[0])):
        data = encoded(picture(50 + n), "JPEG")
        files[f"val/images/val_{n}.JPEG"] = data
        lines.append(f"val_{n}.JPEG\t{wnid}\t0\t0\t9\t9\n")
        expected["val"].append((wnid, decode_image(data)))
    files["val/val_annotations.txt"] = "".join(lines).encode()
    files["test/images/test_0.JPEG"] = encoded(picture(70), "JPEG")
    expected["test"].append((None, decode_image(files["test/images/test_0.JPEG"])))
    write(root, {"tiny.zip": zip_of({f"tiny-imagenet-200/{name}": data for name, data in files.items()})})
    return str(root / "tiny.zip"), expected


def idx(root: Path) -> tuple[str, Expected]:
    expected = Expected()
    for split, prefix, count in (("train", "train", 5), ("val", "t10k", 3)):
        grey = np.stack([picture(i + count, 28, 28)[:, :, 0] for i in range(count)])
        for name, array in (("images-idx3", grey), ("labels-idx1", np.arange(count, dtype=np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            write(root, {f"{prefix}-{name}-ubyte": header + array.tobytes()})
        expected[split] = [(str(i), np.repeat(image[:, :, None], 3, axis=2)) for i, image in enumerate(grey)]
    return str(root), expected


def parquet(root: Path) -> tuple[str, Expected]:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    expected = Expected()
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    for split, theirs, seeds in (("train", "train", range(5)), ("val", "validation", range(5, 8))):
        cells = [{"bytes": encoded(picture(i)), "path": f"{i}.png"} for i in seeds]
        table = pa.table({"image": cells, "label": pa.array([i % 2 for i in seeds], pa.int64())})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        path = root / "data" / f"{theirs}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=2)
        expected[split] = [(("cat", "dog")[i % 2], picture(i)) for i in seeds]
    return str(root), expected


def torchvision(root: Path) -> tuple[str, Expected]:
    files = {f"eurosat/2750/{name}/{name}_{n}.jpg": picture(n, 64, 64) for n, name in enumerate(("Forest", "River"))}
    write(root, {name: encoded(image, "JPEG") for name, image in files.items()})
    images = [(Path(name).parent.name, decode_image((root / name).read_bytes())) for name in files]
    return f"torchvision:EuroSAT:{root}", {"train": images}


LAYOUTS: list[Callable[[Path], tuple[str, Expected]]] = [
    class_folders, splits, flat, listed, tar_of_folders, zip_of_folders, imagenet, webdataset, cifar10, cifar100, stl10,
    tiny_imagenet, idx, parquet, torchvision,
]  # fmt: skip


# --- the formats -----------------------------------------------------------------------------------------------------


def stored(directory: Path, split: str, to: str) -> list[tuple[int, np.ndarray]]:
    """Label and pixels of each image, in the order of the file."""
    match to:
        case "ffcv":
            beton = open_beton(directory / f"{split}.beton")
            content = beton.path.read_bytes()
            data = [content[start : start + size] for start, size in zip(beton.data_ptr, beton.data_size, strict=True)]
            rows = zip(data, beton.mode.tolist(), beton.size.tolist(), strict=True)
            images = [
                np.frombuffer(one, np.uint8).reshape(*size, 3) if mode == RAW else decode_image(one)
                for one, mode, size in rows
            ]
            return list(zip(beton.label.tolist(), images, strict=True))
        case "tensor":
            file = read_tensor_file(directory / f"{split}.safetensors")
            sizes = file.size.tolist()
            starts = zip(file.offset.tolist(), sizes, strict=True)
            images = [file.pixels[start : start + 3 * h * w].numpy().reshape(h, w, 3) for start, (h, w) in starts]
            return list(zip(file.label.tolist(), images, strict=True))
        case _:
            index = read_index(directory / split)
            files = ShardFiles(index)
            return [(int(label), decode_image(files.read(i))) for i, label in enumerate(index.label)]


@pytest.mark.parametrize("to", ["ffcv", "tensor", "webdataset"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_becomes_every_format(layout, to, tmp_path):
    source, expected = layout(tmp_path / "src")
    labels = tmp_path / "src" / "labels.csv"
    output = io.StringIO()
    console = Console(file=output, width=200)
    options = {"labels": labels if labels.exists() else None, "console": console}
    manifest = convert(source, tmp_path / "out", to, mode="raw" if to == "ffcv" else "auto", workers=2, **options)
    assert output.getvalue().startswith("source: ")
    assert set(manifest.splits) == set(expected)
    assert manifest == read_manifest(tmp_path / "out")
    for split, images in expected.items():
        found = stored(tmp_path / "out", split, to)
        classes = manifest.splits[split].classes
        assert [classes[label] if label >= 0 else None for label, _ in found] == [label for label, _ in images]
        assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(found, images, strict=True))
    assert verify(tmp_path / "out", deep=True, console=console), output.getvalue()
    assert "not compared" not in output.getvalue()
