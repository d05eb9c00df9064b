import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from ressl.batch import DataError
from tools.image_sets.features import Columns, byte_columns, choose_columns, noted_features

FILE = Path("train.parquet")
BYTES, NUMBER = pa.binary(), pa.int64()
STRUCT = pa.struct([("bytes", BYTES), ("path", pa.string())])
IMAGE, ANIMALS = {"_type": "Image"}, {"_type": "ClassLabel", "names": ["cat", "dog"]}


def schema_of(features=None, **columns):
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    return pa.schema(list(columns.items()), metadata=metadata)


def choose(schema, *places):
    return choose_columns(schema, noted_features(schema, places, ""), FILE)


def test_columns_are_chosen_by_the_noted_features():
    features = {"id": {"_type": "Value"}, "picture": IMAGE, "kind": ANIMALS}
    schema = schema_of(features, id=BYTES, picture=STRUCT, kind=NUMBER, year=NUMBER)
    assert choose(schema) == Columns("picture", "kind", ("cat", "dog"))


def test_of_several_noted_columns_the_usual_names_are_taken():
    features = {"mask": IMAGE, "img": IMAGE, "coarse_label": ANIMALS, "fine_label": ANIMALS}
    schema = schema_of(features, mask=STRUCT, img=STRUCT, coarse_label=NUMBER, fine_label=NUMBER)
    assert choose(schema) == Columns("img", "fine_label", ("cat", "dog"))


@pytest.mark.parametrize("image", ["image", "img", "jpg"])
@pytest.mark.parametrize("label", ["label", "Labels", "fine_label", "cls", "category", "target"])
@pytest.mark.parametrize("kind", [STRUCT, BYTES, pa.large_binary()])
@pytest.mark.parametrize(
    "number",
    [
        NUMBER,
        pa.uint8(),
        pa.float64(),
        pa.bool_(),
        pa.string(),
        pa.string_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ],
)
def test_columns_are_chosen_by_their_names_where_nothing_is_noted(image, label, kind, number):
    schema = schema_of(**{"id": BYTES, image: kind, "coarse_label": NUMBER, label: number})
    assert choose(schema) == Columns(image, label)


def test_columns_of_other_types_are_not_taken_for_images():
    schema = schema_of(image=pa.string(), jpg=BYTES, cls=NUMBER)
    assert byte_columns(schema) == ["jpg"]
    assert choose(schema) == Columns("jpg", "cls")


@pytest.mark.parametrize("kind", [pa.list_(NUMBER), pa.timestamp("s"), pa.dictionary(pa.int8(), BYTES), STRUCT])
def test_a_label_column_of_another_type_is_refused_by_name_and_type(kind):
    with pytest.raises(DataError, match=rf"its column 'Label' holds {re.escape(str(kind))}, and no numbers or names"):
        choose(schema_of(image=BYTES, Label=kind, cls=NUMBER))


def test_without_a_label_column_its_names_are_told():
    chosen = choose(schema_of(jpg=BYTES, kind=NUMBER))
    assert (chosen.image, chosen.label) == ("jpg", None)
    assert chosen.note.startswith("no labels taken: no column is named label, labels, ")


def test_columns_that_cannot_be_chosen_are_listed():
    with pytest.raises(DataError, match=r"^train.*: one \(struct.*two \(binary\), n \(int64\); name it image"):
        choose(schema_of(one=STRUCT, two=BYTES, n=NUMBER))


def test_several_label_columns_of_other_names_are_not_guessed_between():
    features = {"image": IMAGE, "artist": ANIMALS, "style": ANIMALS}
    chosen = choose(schema_of(features, image=STRUCT, artist=NUMBER, style=NUMBER))
    assert chosen == Columns("image", None, (), "no labels taken: there are several: artist, style")


def test_the_schema_counts_before_the_file_and_the_file_before_the_readme(tmp_path):
    entry = "{name: label, dtype: {class_label: {names: {'0': readme}}}}"
    schema, noted = schema_of(label=NUMBER), {"_type": "ClassLabel", "names": ["file"]}
    (tmp_path / "README.md").write_text(f"---\ndataset_info: {{features: [{entry}]}}\n---\n")
    assert noted_features(schema, (tmp_path,), "") == {"label": ("readme",)}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"features": {"label": noted}}))
    assert noted_features(schema, (tmp_path,), "") == {"label": ("file",)}
    assert noted_features(schema_of({"label": ANIMALS}, label=NUMBER), (tmp_path,), "") == {"label": ("cat", "dog")}


def test_notes_that_cannot_be_read_say_nothing(tmp_path):
    texts = ["---\n: [\n---", "---\ndataset_info: 3\n---", "---\ndataset_info: [1, 2]\n---", "\0", "---", "[]", "{"]
    texts += ["---\ndataset_info: {features: [{name: label, dtype: {class_label: {names: {x: y}}}}]}\n---", "[" * 9999]
    names = "&a [" + ", ".join("lol" for _ in range(40)) + "]"  # aliases of aliases: 40 ** 5 names in 500 bytes
    for name, before in zip("bcde", "abcd", strict=True):
        names += f", &{name} [" + ", ".join(f"*{before}" for _ in range(40)) + "]"
    texts += [f"---\ndataset_info: {{features: [{{name: label, dtype: {{class_label: {{names: [{names}]}}}}}}]}}\n---"]
    for text in texts:
        (tmp_path / "README.md").write_text(text)
        (tmp_path / "dataset_info.json").write_text(text)
        assert noted_features(schema_of(image=STRUCT), (tmp_path,), "") == {}
