"""What `convert` can read: `detect` finds out what lies at a place."""

import stat
from dataclasses import replace
from pathlib import Path

from pipelines.images import IMAGE_SUFFIXES
from ressl.batch import DataError
from tools.image_sets.arrays import FASHION_MNIST, find_arrays
from tools.image_sets.image_set import TORCHVISION, TORCHVISION_ROOT, ImageSet, Origin
from tools.image_sets.imagenet import find_imagenet, find_kaggle
from tools.image_sets.layouts import lay_out, lay_out_listed
from tools.image_sets.members import Members
from tools.image_sets.tree import Tree, directory_tree, list_archive, member_tree, merge_archives
from tools.image_sets.webdataset import find_webdataset
from tools.image_sets.zip_members import is_zip
from tools.output import expand

__all__ = ["FASHION_MNIST", "TORCHVISION", "TORCHVISION_ROOT", "ImageSet", "Origin", "detect"]

ARCHIVES = (".tar", ".zip")
PACKED = {  # how a file begins -> what it is, and what unpacks it
    b"\x1f\x8b": ("gzip", "gunzip --keep"),
    b"\xfd7zXZ\0": ("xz", "unxz --keep"),
    b"BZh": ("bzip2", "bunzip2 --keep"),
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x"),
    b"Rar!": ("RAR", "unrar x"),
}


def detect(source: str, labels: Path | None = None, *, download: bool = True) -> Origin:
    """Finds out what `source` is, without reading all of it; the images of archives are listed, though.

    A directory or an archive of images, ImageNet's own archives, IDX and other arrays, Parquet files, WebDataset
    shards, or `torchvision:NAME[:ROOT]`. `labels` is a list of labels for image files. Without `download`
    nothing is downloaded. Raises DataError.
    """
    if source.startswith(TORCHVISION):
        from tools.image_sets.torchvision_sets import open_torchvision  # which few need

        if labels is not None:
            raise DataError(f"{source}: has labels of its own; leave out {labels}")
        return open_torchvision(source, download)
    root, labels = expand(Path(source)), None if labels is None else expand(labels)
    try:
        mode = root.stat().st_mode
    except FileNotFoundError:
        raise DataError(f"{root}: no such directory or file; give the folder or the archive with the images") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in it
        raise DataError(f"{root}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise DataError(
            f"{root}: neither a directory nor a regular file; give the folder or the archive with the images"
        )
    found = find_imagenet(root, labels)
    if found is None and labels is None:
        found = find_arrays(root) or _find_parquet(root) or find_webdataset(root)
    if found is not None:
        return found
    tree = _tree(root, is_directory=stat.S_ISDIR(mode))
    return lay_out_listed(tree, labels) if labels is not None else find_kaggle(tree) or lay_out(tree)


def _find_parquet(root: Path) -> Origin | None:
    from tools.image_sets.parquet import find_parquet  # which few need

    return find_parquet(root)


def _tree(root: Path, is_directory: bool) -> Tree:
    if not is_directory:
        members = list_archive(root)
        if members is None:
            raise _not_understood(root)
        return member_tree("zip file" if is_zip(root) else "tar file", root, members)
    tree = directory_tree(root)
    if tree.images_in("").names:
        return tree
    try:
        files = sorted(path for path in root.iterdir() if path.name[0] != "." and path.is_file())
    except OSError as error:
        raise DataError(f"{root}: cannot be listed: {error.strerror}") from None
    archives = [path for path in files if path.suffix.lower() in ARCHIVES]
    if tree.directories(""):
        return replace(tree, kind=f"{tree.kind} (not used: {_first(archives)})") if archives else tree
    packed = [path for path in files if _packed(path) is not None]
    if not archives:
        if packed:
            raise _not_understood(packed[0])
        return tree
    if len(archives) == 1 and not packed:
        return _tree(archives[0], is_directory=False)
    listed: dict[Path, Members] = {}
    for path in archives:
        members = list_archive(path)
        if members is None:
            raise _not_understood(path)
        listed[path] = members
    left = f"; not used: {_first(packed)}" if packed else ""
    kind = f"{len(archives):,} archive{'s' * (len(archives) > 1)} ({_first(archives)}{left}) in"
    return member_tree(kind, root, merge_archives(listed))


def _first(paths: list[Path]) -> str:
    return ", ".join(path.name for path in paths[:3]) + ", ..." * (len(paths) > 3)


def _packed(path: Path) -> tuple[str, str] | None:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    return next((words for start, words in PACKED.items() if head.startswith(start)), None)


def _not_understood(path: Path) -> DataError:
    packed = _packed(path)
    if packed is not None:
        return DataError(
            f"{path}: compressed as a whole ({packed[0]}), so that no image in it can be read by itself; decompress it "
            f"first, as with `{packed[1]} {path}`, and give what comes out: a .tar is read as it is"
        )
    return DataError(
        f"{path}: not understood; looked for a directory of images ({' '.join(IMAGE_SUFFIXES)}), a tar or zip file of "
        "them, ImageNet's archives, WebDataset shards, IDX files, CIFAR's and STL-10's files, and Parquet files"
    )
