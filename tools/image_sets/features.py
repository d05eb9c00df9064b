"""Which columns of a table hold the images and their labels: by the features noted with the data, or by their names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ressl.batch import DataError
from tools.image_sets.words import LABELS

IMAGE_NAMES = ("image", "img", "jpg")
MAX_NOTE = 1 << 20  # bytes of a file that describes the data

Features = dict[str, tuple[str, ...] | None]  # column -> None: images; otherwise labels, and the names of the classes


@dataclass(frozen=True, slots=True)
class Columns:
    image: str
    label: str | None
    names: tuple[str, ...] = ()  # of the classes; empty where they are not noted
    note: str = ""  # what the user should know


def noted_features(schema: Any, places: tuple[Path, ...], config: str) -> Features:
    """From the table's own schema (a pyarrow.Schema), `dataset_info.json` or `README.md` in `places`, in this order.

    What cannot be read says nothing. `config` is the configuration of which README.md may have several.
    """
    features: Features = {}
    for place in places:
        features = _in_readme(_text(place / "README.md"), config) | features
    for place in places:
        features |= _in_json(_json(_text(place / "dataset_info.json")).get("features"))
    info = _json((schema.metadata or {}).get(b"huggingface", b"")).get("info")
    return features | (_in_json(info.get("features")) if isinstance(info, dict) else {})


def choose_columns(schema: Any, features: Features, path: Path) -> Columns:
    """Of a pyarrow.Schema. Raises DataError that names the columns where none can be chosen, and where one that is
    named like labels holds something else."""
    types = {field.name: field.type for field in schema}
    chosen = image_column(schema, features)
    if not chosen:
        listed = ", ".join(f"{name} ({kind})" for name, kind in types.items())
        raise DataError(
            f"{path}: no telling which column holds the images: {listed}; "
            f"name it {IMAGE_NAMES[0]}, and let it hold the bytes of image files"
        )
    holders = [name for name, kind in types.items() if _holds_labels(kind)]
    classes = {name: names for name in holders if (names := features.get(name)) is not None}
    by_word = {name.lower(): name for name in reversed(classes or types) if name != chosen}
    label = next((by_word[word] for word in LABELS if word in by_word), None)
    if label is not None and label not in holders:
        raise DataError(
            f"{path}: its column {label!r} holds {types[label]}, and no numbers or names of classes; convert it to "
            "those, or give it another name to leave the images without labels"
        )
    if label is None and len(classes) == 1:
        (label,) = classes
    note = ""
    if label is None:
        several = f"there are several: {', '.join(classes)}"
        none = f"no column is named {', '.join(LABELS)}"
        note = f"no labels taken: {several if classes else none}"
    return Columns(chosen, label, classes.get(label, ()) if label else (), note)


def image_column(schema: Any, features: Features) -> str:
    """The one that is noted or named as such; empty where there is none."""
    images = byte_columns(schema)
    noted = [name for name in images if name in features and features[name] is None]
    named = [name for name in IMAGE_NAMES if name in (noted or images)]
    return named[0] if named else noted[0] if len(noted) == 1 else ""


def byte_columns(schema: Any) -> list[str]:
    """Those of a pyarrow.Schema that hold bytes, alone or in a struct of bytes and path."""
    return [field.name for field in schema if _holds_bytes(field.type)]


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return types.is_binary(kind) or types.is_large_binary(kind)


def _holds_labels(kind: Any) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    numbers = (types.is_integer, types.is_floating, types.is_boolean)
    return any(holds(kind) for holds in (*numbers, types.is_string, types.is_large_string, types.is_string_view))


def _in_json(features: object) -> Features:
    found: Features = {}
    for name, feature in features.items() if isinstance(features, dict) else ():
        match feature:
            case {"_type": "Image"}:
                found[name] = None
            case {"_type": "ClassLabel", "names": [*names]}:
                found[name] = tuple(map(str, names))
    return found


def _in_readme(text: bytes, config: str) -> Features:
    """README.md begins with YAML between two lines of three dashes."""
    found: Features = {}
    try:
        head = text.split(b"\n---", 1)[0] if text.startswith(b"---") else b""
        # aliases of aliases can make a small text grow beyond any memory
        front = None if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(head)) else yaml.safe_load(head)
        infos = front.get("dataset_info") if isinstance(front, dict) else None
        infos = infos if isinstance(infos, list) else [infos]
        wanted = [info for info in infos if len(infos) == 1 or info["config_name"] == (config or "default")]
        for feature in (wanted[0] or {}).get("features", ()) if wanted else ():
            match feature:
                case {"name": str(name), "dtype": "image"}:
                    found[name] = None
                case {"name": str(name), "dtype": {"class_label": {"names": dict(names)}}}:
                    found[name] = tuple(str(names[number]) for number in sorted(names, key=int))
                case {"name": str(name), "dtype": {"class_label": {"names": [*listed]}}}:
                    found[name] = tuple(map(str, listed))
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError, RecursionError):
        return {}
    return found


def _text(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.is_file() and path.stat().st_size <= MAX_NOTE else b""
    except OSError:
        return b""


def _json(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
