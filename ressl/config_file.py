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


class ConfigError(ValueError):
    """A config that does not describe a run. The message lists every problem found."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads `path`, applies `section.key=value` overrides, and returns a checked Config or raises ConfigError."""
    raw = _read_yaml(path)
    problems = [problem for item in overrides if (problem := _override(raw, item))]
    try:
        # By way of JSON, because pydantic's strict mode then takes lists for tuples and strings for paths, and nothing
        # else for anything: no "10" for 10, no 1 for true.
        config = Config.model_validate_json(json.dumps(raw, default=str), strict=True)
    except (TypeError, ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):  # from json: keys that are no text
            raise ConfigError(f"{path}: the keys of a config are words: {error}") from None
        found = error.errors()
        # a tuple whose only item is wrong is also reported as too short: keep the inner problem alone
        inner = [e for e in found if not any(o["loc"][: len(e["loc"])] == e["loc"] and o is not e for o in found)]
        problems += [_describe(e, raw) for e in inner]
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError("\n".join([f"{path}: {count}", *(f"  {p}" for p in problems)]))
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved config, every default included, so that `load_config` gives the same again."""
    part = path.with_name(path.name + ".part")
    part.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120, allow_unicode=True))
    part.replace(path)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, a key that stands twice is an error, and so is an alias: aliases of
    aliases can make a small file grow beyond any memory."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.composer.ComposerError(
                None, None, f"alias *{event.anchor}: write the value out", event.start_mark
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, str) and key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
        if isinstance(key, str):
            seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file in UTF-8") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else f"a {type(raw).__name__}"
        raise ConfigError(f"{path}: expected sections such as `data:` and `optim:`, found {found}")
    return raw


def _override(raw: dict[str, Any], item: str) -> str | None:
    """Puts one `section.key=value` into `raw`; returns what is wrong with it, if anything."""
    key, equals, text = item.partition("=")
    if not equals or not key:
        return f"{item}: an override is written section.key=value"
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return f"{key}: {text!r} is not a YAML value"
    *sections, leaf = key.split(".")
    if not leaf or not all(sections):
        return f"{item}: an override is written section.key=value"
    node: Any = raw
    for section in sections:
        if isinstance(node, list) and section.isdigit() and int(section) < len(node):
            node = node[int(section)]
        elif isinstance(node, dict):
            node = node.setdefault(section, {})
        else:
            return f"{key}: {section!r} is not a section of the config"
    if isinstance(node, dict):
        node[leaf] = value
    elif isinstance(node, list) and leaf.isdigit() and int(leaf) < len(node):
        node[int(leaf)] = value
    else:
        return f"{key}: {leaf!r} is not a key that can be set"
    return None


def _describe(error: ErrorDetails, raw: dict[str, Any]) -> str:
    """One problem as `section.key: what is wrong`."""
    path, node = _key_path(error["loc"], raw)
    where = ".".join(map(str, path))
    got = json.dumps(error["input"], default=str, ensure_ascii=False)
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key{_suggest(str(path[-1]), _known_keys(path[:-1], raw))}"
        case "json_invalid":
            return "holds text that is not valid Unicode"
        case "missing":
            return f"{where}: missing"
        case "union_tag_invalid" | "union_tag_not_found":
            names = error["ctx"]["expected_tags"] if "expected_tags" in error.get("ctx", {}) else "one of its names"
            chosen = node.get("name") if isinstance(node, dict) else node
            return f"{where}.name: {chosen!r} is not one of {names}".replace("'", "")
        case "value_error" if isinstance(error["input"], str):
            return f"{where}: expected {error['ctx']['error']}, got {got}"
        case "value_error":  # from a model's own check: its message starts with the key
            return (f"{where}." if where else "") + str(error["ctx"]["error"])
        case "literal_error":
            return f"{where}: {error['input']!r} is not one of {error['ctx']['expected']}".replace("'", "")
        case _:
            message = error["msg"].removeprefix("Input should be ").replace("Input should ", "")
            return f"{where}: expected {message}, got {got}"


def _key_path(loc: tuple[int | str, ...], raw: Any) -> tuple[list[int | str], Any]:
    """pydantic's location without the union tags that it puts between a key and the keys below it."""
    path: list[int | str] = []
    node = raw
    for part in loc:
        if isinstance(node, dict) and part not in node and node.get("name") == part:
            continue
        path.append(part)
        try:
            node = node[part]
        except (KeyError, IndexError, TypeError):
            node = None
    return path, node


def _known_keys(path: Sequence[int | str], raw: Any) -> list[str]:
    """The keys of the section at `path`."""
    kind: Any = Config
    for part in path:
        raw = raw[part]
        if isinstance(part, str):
            kind = kind.model_fields[part].annotation
        options = [o for o in (kind, *get_args(kind)) if isinstance(o, type) and issubclass(o, Section)]
        named = [o for o in options if isinstance(raw, dict) and raw.get("name") in _names(o)]
        kind = (named or options)[0]
    return list(kind.model_fields)


def _names(section: type[Section]) -> tuple[Any, ...]:
    return get_args(section.model_fields["name"].annotation) if "name" in section.model_fields else ()


def _suggest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known keys: {', '.join(known)}"
