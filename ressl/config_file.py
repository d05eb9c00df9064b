"""The strict reader of config files.

A config file holds values, never the names of Python objects. Unknown keys, wrong types and impossible values stop the
run before anything is built; all problems are reported at once, each with its full key path and, for a misspelt key,
the nearest one that exists.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ressl.config import Config, Section

YAML = "tag:yaml.org,2002:"  # how the tags of its own types begin
MAX_BYTES = 1 << 16  # of a config file; what is larger is another file given by mistake
MAX_DEPTH = 32  # of sections and lists in each other
MAX_BITS = 1024  # of a whole number: no float reaches beyond
MAX_LINES = 20  # of a message
MAX_SHOWN = 200  # characters of what is quoted in a line


class ConfigError(ValueError):
    """A config that does not describe a run. The message lists every problem found."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path`, applies `section.key=value` overrides, and returns a checked Config or raises ConfigError."""
    raw = _read_yaml(path)
    problems = [problem for item in overrides if (problem := _override(raw, item))]
    inner: list[ErrorDetails] = []
    try:
        # By way of JSON, because pydantic's strict mode then takes lists for tuples and strings for paths, and nothing
        # else for anything: no "10" for 10, no 1 for true.
        config = Config.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        found = error.errors()
        # a tuple whose only item is wrong is also reported as too short: keep the inner problem alone
        outer = {e["loc"][:length] for e in found for length in range(len(e["loc"]))}
        inner = [e for e in found if e["loc"] not in outer]
    if total := len(problems) + len(inner):
        lines = [*problems, *(_describe(e, raw) for e in inner[:MAX_LINES])][:MAX_LINES]
        lines += [f"and {total - MAX_LINES:,} more"] if total > MAX_LINES else []
        count = "1 problem" if total == 1 else f"{total:,} problems"
        raise ConfigError("\n".join([f"{path}: {count}", *(f"  {line}" for line in lines)]))
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config, every default included, so that `load_config` gives the same again."""
    part = path.with_name(path.name + ".part")
    text = yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    part.write_text(text, encoding="utf-8")
    part.replace(path)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, a date is text, a key that stands twice is an error, and so is an
    alias: aliases of aliases can make a small file grow beyond any memory."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: write the value out", event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, "nested too deeply", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError):  # as from `0x_` and `!!bool 3`
            raise _unfit(node, f"{_shown(repr(node.value))} is no {node.tag.removeprefix(YAML)}") from None
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise _unfit(node, "a number out of any range")
        if isinstance(value, int | float) and OTHER_BASE.match(node.value):
            raise _unfit(node, f"{_shown(node.value)} would be {value}: write that, or put it in quotes if it is text")
        if isinstance(value, str) and not _is_unicode(value):
            raise _unfit(node, "text that is not valid Unicode")
        return value


def _unfit(node: yaml.Node, what: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _mapping_of_words(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _unfit(key_node, f"key {_shown(str(key))} is no word")
        if key in seen:
            raise _unfit(key_node, f"key {_shown(repr(key))} stands twice")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads."""


def _text_node(dumper: _Dumper, text: str) -> yaml.Node:
    # between other quotes than these, odd line breaks become blanks
    return dumper.represent_scalar(YAML + "str", text, style=None if text.isprintable() else '"')


EXPONENT = (YAML + "float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))
OTHER_BASE = re.compile(r"[-+]?(0[\d_]+$|\d.*:)")  # to YAML, 010 is 8 and 1:30 is 90
_Loader.add_implicit_resolver(*EXPONENT)
_Dumper.add_implicit_resolver(*EXPONENT)  # so that text like it is quoted
_Dumper.add_representer(str, _text_node)
_SAFE = yaml.SafeLoader.yaml_constructors
_Loader.yaml_constructors = {  # values only: no sets, no bytes
    **{YAML + kind: _SAFE[YAML + kind] for kind in ("null", "bool", "int", "float", "str", "seq")},
    YAML + "timestamp": _SAFE[YAML + "str"],
    YAML + "map": _mapping_of_words,
    None: _SAFE[None],
}


def _parse(text: str) -> Any:
    """Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except ValueError:  # from the scanner: \\U and a number above Unicode's
        raise yaml.YAMLError("text that is not valid Unicode") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        raw = _parse(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: the character {error.character:#x}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {_shown(str(getattr(error, 'problem', None) or error))}") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path}: expected sections such as `data:` and `optim:`, found {found}")
    return raw


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path}: over {MAX_BYTES:,} bytes, so it is no config; give one like those in configs/")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None


def _override(raw: dict[str, Any], item: str) -> str | None:
    """Puts one `section.key=value` into `raw`; returns what is wrong with it, if anything."""
    key, equals, text = item.partition("=")
    *sections, leaf = key.split(".")
    if not equals or not leaf or not all(sections) or not _is_unicode(key):
        return f"{_shown(item)}: an override is written section.key=value"
    try:
        value = _parse(text)
    except yaml.YAMLError:
        return f"{_shown(key)}: {_shown(repr(text))} is not a YAML value"
    node: Any = raw
    for section in sections:
        if isinstance(node, list) and (at := _place(section, node)) is not None:
            node = node[at]
        elif isinstance(node, dict):
            node = node.setdefault(section, {})
        else:
            return f"{_shown(key)}: {_shown(repr(section))} is not a section of the config"
    if isinstance(node, dict):
        node[leaf] = value
    elif isinstance(node, list) and (at := _place(leaf, node)) is not None:
        node[at] = value
    else:
        return f"{_shown(key)}: {_shown(repr(leaf))} is not a key that can be set"
    return None


def _place(word: str, items: list[Any]) -> int | None:
    return int(word) if re.fullmatch("[0-9]{1,9}", word) and int(word) < len(items) else None


# --- messages --------------------------------------------------------------------------------------------------------


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _shown(text: str) -> str:
    """Fit for a line of a message."""
    text = text if text.isprintable() else json.dumps(text)[1:-1]
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _describe(error: ErrorDetails, raw: dict[str, Any]) -> str:
    """One problem as `section.key: what is wrong`."""
    path, node, known = _key_path(error["loc"], raw)
    where = ".".join(_shown(str(part)) for part in path)
    got = _shown(json.dumps(error["input"], ensure_ascii=False))
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key{_suggest(str(path[-1]), known)}"
        case "missing":
            return f"{where}: missing"
        case "union_tag_invalid" | "union_tag_not_found":
            names = error["ctx"]["expected_tags"] if "expected_tags" in error.get("ctx", {}) else "one of its names"
            chosen = node.get("name") if isinstance(node, dict) else node
            return f"{where}.name: {_shown(repr(chosen))} is not one of {names}".replace("'", "")
        case "value_error" if isinstance(error["input"], str):
            return f"{where}: expected {error['ctx']['error']}, got {got}"
        case "value_error":  # from a model's own check: its message starts with the key
            return (f"{where}." if where else "") + _shown(str(error["ctx"]["error"]))
        case "literal_error":
            return f"{where}: {_shown(repr(error['input']))} is not one of {error['ctx']['expected']}".replace("'", "")
        case _:
            message = error["msg"].removeprefix("Input should be ").replace("Input should ", "")
            return f"{where}: expected {message}, got {got}"


def _key_path(loc: tuple[int | str, ...], raw: Any) -> tuple[list[int | str], Any, list[str]]:
    """pydantic's location without the union tags that it puts between a key and the keys below it; what stands there;
    and the keys that the section knows in which the last one stands."""
    path: list[int | str] = []
    kind: Any = Config
    known: list[str] = []
    for part in loc:
        sections = [o for o in (kind, *get_args(kind)) if isinstance(o, type) and issubclass(o, Section)]
        if len(sections) > 1:  # told apart by name, which is this part
            kind = next(section for section in sections if part in _names(section))
            continue
        path.append(part)
        fields = sections[0].model_fields if sections and isinstance(part, str) else {}
        known = list(fields)
        kind = (
            sections[0] if sections and isinstance(part, int) else fields[part].annotation if part in fields else None
        )
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            raw = None
    return path, raw, known


def _names(section: type[Section]) -> tuple[Any, ...]:
    return get_args(section.model_fields["name"].annotation) if "name" in section.model_fields else ()


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
