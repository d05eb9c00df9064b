"""1,000 configs that nobody would write, and those that somebody did: each is read and can be saved, or is refused."""

import copy
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ressl.config import Config, Section
from ressl.config_file import ConfigError, load_config, save_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEXTS = [path.read_bytes() for path in CONFIGS]
TREES = [load_config(path).model_dump(mode="json", exclude_unset=True) for path in CONFIGS]
QUICKSTART = next(path for path in CONFIGS if path.stem == "quickstart")


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The same examples in every run: what it finds is a bug that was there yesterday too."""
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


class Token(str):
    """Stands in the file as it is, without quotes."""


ODD = (  # as they are written in a file
    ".nan", ".inf", "-.inf", "-0.0", "-0", "1e400", "-1e400", "1e-400", "1e-3", "1E5", "1_000", "9" * 25, "9" * 400,
    "9" * 5000, "0x" + "f" * 5000, "0b_", "0x_", "010", "1:30", "1.", ".5", "+1", "no", "yes", "on", "off", "true",
    "null", "~", "", "''", "' '", "2001-01-01", "2001-99-99", "2001-12-14 21:59:43.10 -05:00", "[]", "{}", "[[]]",
    "[1, [2, [3]]]", "[0.5, 0.2]", "[.nan, .inf]", "{a: 1}", "{name: ffcv}", "{name: [1]}", "{1: 2}", "{[1]: 2}",
    "{2001-01-01: 1}", "{a: 1, a: 2}", "{<<: {a: 1}}", "=", "<<", "*a", "&a [*a]", "&a [1, &b [2, &c 3]]", "[" * 40,
    "[" * 30 + "]" * 30, "{a: " * 300 + "1" + "}" * 300, '"\\0"', '"\\ud800"', '"\\U00110000"', '"\\x85"', '"1e5"',
    '"no"', '"a\\nb"', '"\\ufeff"', '"\\u2028"', '"\\U0001f600"', "'x: y # z'", "été", "漢字", "\x85", "\x1b", "\x00",
    "\t", "~/x", "~nobody-of-this-name/x", "$HOME/${NOT_SET}/$", "!!int x", "!!int ''", "!!bool x", "!!float x",
    "!!timestamp x", "!!binary x", "!!set {a}", "!!omap [a: 1]", "!!str 1", "!!null x", "!a 1", "!!python/name:os.path",
    "!!python/object/apply:os.system ['true']", "- a", "? a", "a: b", "| a", "> a", "%", "@", "`", "'", '"', "x" * 3000,
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(ODD).map(Token),
    st.sampled_from(ODD).map(Token),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    st.recursive(st.integers(-2, 300) | st.text(max_size=5), lambda x: st.lists(x, max_size=4), max_leaves=8),
    st.sampled_from((0, 1, 2, 3, 5, 16, 32, 0.1, 0.5, 1.0, True, "sgd", "lars", "ffcv", "folder", "local", "resnet18")),
)


def keys_of(kind: Any, before: str = "") -> dict[str, None]:
    """Every key of the config, of all kinds of each section, as an override names it."""
    found: dict[str, None] = {}
    for section in (o for o in (kind, *get_args(kind)) if isinstance(o, type) and issubclass(o, Section)):
        for name, field in section.model_fields.items():
            item = f"{name}.0" if "tuple" in str(field.annotation) else name
            found |= {before + name: None, before + item: None} | keys_of(field.annotation, f"{before}{item}.")
    return found


def written(node: Any) -> str:
    """YAML on one line, which can hold what no tree of Python can: a key twice, text without its quotes."""
    match node:
        case Token():
            return str(node)
        case dict() | tuple():
            pairs = node.items() if isinstance(node, dict) else node
            return "{" + ", ".join(f"{written(key)}: {written(value)}" for key, value in pairs) + "}"
        case list():
            return "[" + ", ".join(map(written, node)) + "]"
        case _:
            return json.dumps(node)


def settings_of(node: Any, before: str = "") -> list[str]:
    """Each value of a config as an override."""
    if not isinstance(node, dict):
        return [f"{before[:-1]}={written(node)}"]
    return [item for key, child in node.items() for item in settings_of(child, f"{before}{key}.")]


KEYS = list(keys_of(Config))
WORDS = st.sampled_from(sorted({word for key in KEYS for word in key.split(".")}))


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    pairs = list(node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ())
    return [place for key, child in pairs for place in [(node, key), *places(child)]]


CHANGES = ("value", "value", "borrow", "borrow", "borrow", "delete", "misspell", "add", "swap", "wrap", "twice")
VALUES_OF: dict[Any, list[Any]] = {}
for node, key in (place for tree in TREES for place in places(tree)):
    VALUES_OF.setdefault(key, []).append(node[key])


@st.composite
def changed_trees(draw: st.DrawFn) -> bytes:
    """A config of ours after one to three changes."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        all_places = places(tree)
        if not all_places:
            break
        node, key = draw(st.sampled_from(all_places))
        match draw(st.sampled_from(CHANGES)):
            case "value":
                node[key] = draw(VALUES)
            case "borrow":
                node[key] = copy.deepcopy(draw(st.sampled_from(VALUES_OF.get(key, [0, 1]))))
            case "delete":
                del node[key]
            case "misspell" if isinstance(key, str):
                at = draw(st.integers(0, len(key) - 1))
                node[key[:at] + draw(st.sampled_from(("", "x", key[at] * 2, "\n", "é"))) + key[at + 1 :]] = node.pop(
                    key
                )
            case "add" if isinstance(node, dict):
                node[draw(WORDS | st.text(max_size=8) | st.sampled_from(ODD).map(Token))] = draw(VALUES)
            case "swap":
                other, name = draw(st.sampled_from(all_places))
                node[key], other[name] = copy.deepcopy([other[name], node[key]])
            case "wrap":
                node[key] = draw(st.sampled_from(([node[key]], {"name": node[key]}, [[node[key]]], {key: node[key]})))
            case "twice" if isinstance(node[key], dict):
                pairs = list(node[key].items())
                node[key] = (*pairs, *pairs[:1])
    return written(tree).encode("utf-8", "surrogatepass")


@st.composite
def changed_bytes(draw: st.DrawFn) -> bytes:
    """The file of a config of ours after up to four changes to its bytes."""
    data = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from((0, 1, 1, 2, 10, 100)))
        new = draw(
            st.sampled_from(
                (b"", b"\t", b"\0", b"\xff", b"\r", b"\n", b" ", b"  ", b":", b"{", b"]", b"*", b"&a ", b"9")
            )
            | st.sampled_from(
                (b"\n---\n", b"# ", b"- ", b"'", b'"', b"!", b"\xc2\x85", b"\xef\xbb\xbf", b"\xe2\x80\xa8")
            )
            | st.just(data[end : end + 60])
            | st.sampled_from(ODD).map(str.encode)
        )
        data = data[:at] + new + data[end:]
    return data


overrides = st.lists(
    st.one_of(
        st.sampled_from([item for tree in TREES for item in settings_of(tree)]),
        st.tuples(st.sampled_from(KEYS), VALUES.map(written)).map("=".join),
        st.tuples(st.sampled_from(KEYS), st.just("."), WORDS | st.sampled_from(ODD), st.just("=1")).map("".join),
        st.text(max_size=30),
        st.tuples(st.sampled_from(KEYS), st.text(alphabet=" .=:[]{}x0\t\n\udcff²", max_size=6)).map("".join),
    ),
    min_size=1,
    max_size=3,
)
bombs = st.integers(2, 400).map(
    lambda n: ("a: &a0 [1]\n" + "".join(f"b{i}: &a{i + 1} [{'*a' + str(i) + ', ' * 9}]\n" for i in range(n))).encode()
)
noise = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.text(alphabet="ab:-?[]{},&*!|>'\"%@` \n\t#0.~<=", max_size=80).map(str.encode),
    st.sampled_from(("[", "{", "- ", "? ", "{a: ", "!", "&a ", "'", "%", "\n")).flatmap(
        lambda part: st.integers(1, 3000).map(lambda n: (part * n).encode())
    ),
    bombs,
)


def accepted(path: Path, items: list[str]) -> bool:
    """Whether it was read, and then is the same once more; else the message is fit to be read."""
    try:
        config = load_config(path, items)
    except ConfigError as error:
        first, *others = str(error).split("\n")
        assert first.startswith((f"{path}:", f"{path} "))
        assert all(line.isprintable() for line in (first, *others))
        assert all(line.startswith("  ") and len(line) < 2500 for line in others)
        assert len(others) <= 21
        return False
    saved = path.with_name("saved.yaml")
    save_config(config, saved)
    assert load_config(saved) == config
    return True


def test_a_changed_config_is_accepted_or_refused_in_words(tmp_path: Path) -> None:
    seen = Counter[bool]()

    @fuzz(350)
    @given(changed_trees())
    def try_one(data: bytes) -> None:
        (tmp_path / "a.yaml").write_bytes(data)
        seen[accepted(tmp_path / "a.yaml", [])] += 1

    try_one()
    assert min(seen[True], seen[False]) > 20  # or the changes were too wild, or too mild


def test_changed_bytes_are_accepted_or_refused_in_words(tmp_path: Path) -> None:
    seen = Counter[bool]()

    @fuzz(200)
    @given(changed_bytes())
    def try_one(data: bytes) -> None:
        (tmp_path / "a.yaml").write_bytes(data)
        seen[accepted(tmp_path / "a.yaml", [])] += 1

    try_one()
    assert min(seen[True], seen[False]) > 20


def test_overrides_are_accepted_or_refused_in_words(tmp_path: Path) -> None:
    seen = Counter[bool]()
    (tmp_path / "a.yaml").write_bytes(QUICKSTART.read_bytes())

    @fuzz(250)
    @given(overrides)
    def try_one(items: list[str]) -> None:
        seen[accepted(tmp_path / "a.yaml", items)] += 1

    try_one()
    assert min(seen[True], seen[False]) > 10


def test_what_is_no_config_at_all_is_refused_in_words(tmp_path: Path) -> None:
    @fuzz(200)
    @given(noise)
    def try_one(data: bytes) -> None:
        (tmp_path / "a.yaml").write_bytes(data)
        assert not accepted(tmp_path / "a.yaml", [])

    try_one()


# --- what it has found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: {seed: 0x_}", ":1: not valid YAML: '0x_' is no int"),
        ("run: {seed: !!int ''}", ":1: not valid YAML: '' is no int"),
        ("run: {seed: !!bool maybe}", ":1: not valid YAML: 'maybe' is no bool"),
        ("run:\n  seed: " + "9" * 5000, ":2: not valid YAML: '9999"),
        ("run:\n  seed: 0x" + "f" * 5000, ":2: not valid YAML: a number out of any range"),
        ("run: {seed: 010}", ":1: not valid YAML: 010 would be 8: write that, or put it in quotes if it is text"),
        ("optim: {epochs: 1:30}", ":1: not valid YAML: 1:30 would be 90: write that, or put it in quotes"),
        ("run: {out_dir: !!set {a}}", ":1: not valid YAML: could not determine a constructor for the tag"),
        ("run: {out_dir: !!binary YQ==}", ":1: not valid YAML: could not determine a constructor for the tag"),
        ("run: {on: 1}", ":1: not valid YAML: key True is no word"),
        ("run: {2001-01-01: 1}", ": 8 problems"),
        ('run: {out_dir: "\\ud800"}', ":1: not valid YAML: text that is not valid Unicode"),
        ('run: {out_dir: "\\U00110000"}', ": not valid YAML: text that is not valid Unicode"),
        ("run: 1\n\nviews: \x1b", ":3: not valid YAML: the character 0x1b"),
        ("run: " + "[" * 40 + "]" * 40, ":1: not valid YAML: nested too deeply"),
        ("#" * 70_000, ": over 65,536 bytes, so it is no config"),
        ("\n".join(f"k{i}: 1" for i in range(2000)), ": 2,007 problems"),
    ],
)
def test_what_once_ended_in_a_traceback_or_was_misread_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert len(str(caught.value).split("\n")) <= 22


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=2001-99-99", 'optim.lr: expected a valid number, got "2001-99-99"'),
        ("optim.lr=" + "[" * 600, "optim.lr: '[[["),
        ("views.strong.\u00b2=1", "views.strong.\u00b2: '\u00b2' is not a key that can be set"),
        ("views.strong." + "9" * 5000 + "=1", "views.strong.999"),
        ("data.source.ffcv=1", "data.source.ffcv: unknown key; known keys: name, train, val, workers, cache"),
        ("encoder.resnet_small.x=1", "encoder.resnet_small: unknown key; known keys: name, width"),
        ("run.out_dir=~nobody-of-this-name/x", "run.out_dir: expected a path whose ~name is a user of this machine"),
        ("optim.\udcff=1", "optim.\\udcff=1: an override is written section.key=value"),
        ("run.a\nb=1", "run.a\\nb: unknown key"),
    ],
)
def test_an_override_is_refused_in_one_line(override: str, message: str) -> None:
    path = QUICKSTART
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    first, second = str(caught.value).split("\n")
    assert first == f"{path}: 1 problem" and second.startswith(f"  {message}")


@pytest.mark.parametrize(
    "text",
    ["1e5", "-1E-3", "no", "null", "2001-01-01", "010", "1:30", "\x85", "\u2028", "a\nb", "=", "\ufeff", "\0", ""],
)
def test_text_that_looks_like_something_else_is_saved_as_text(text: str, tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"optim.no_decay=[{json.dumps(text)}, x]"])
    assert config.optim.no_decay == (text, "x")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_a_date_is_text_as_it_was_written(tmp_path: Path) -> None:
    assert load_config(QUICKSTART, ["run.out_dir=2026-1-2"]).run.out_dir == Path("2026-1-2")
