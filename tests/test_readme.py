"""What the README says is true: its commands, options and files exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import launch

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()
COMMANDS = [line.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines()]  # fmt: skip
VERBS = [shlex.split(command) for command in COMMANDS if "launch.py" in command]
OWN_MAKE = re.findall(r"`make (\w+)`", README) + [c.split()[1] for c in COMMANDS if c.startswith("make ")]


def test_there_are_commands_to_check() -> None:
    assert len(VERBS) >= 6 and {"quickstart", "test"} <= set(OWN_MAKE)


@pytest.mark.parametrize("command", VERBS, ids=" ".join)
def test_each_verb_and_each_option_exists(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["launch.py", command[2], "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    assert launch.main() == 0
    text = capsys.readouterr().out
    assert all(word in text for word in command if word.startswith("--"))
    for word in command:
        if word.startswith("configs/"):
            assert (REPO / word).is_file(), word


@pytest.mark.parametrize("target", OWN_MAKE)
def test_each_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (REPO / "Makefile").read_text(), re.M)


def test_each_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:ressl|pipelines|tools|tests|configs|docs)/[\w./-]+)`", README))
    named |= set(re.findall(r"\]\((docs/[^)]+)\)", README))
    assert len(named) > 10
    assert {name for name in named if not (REPO / name).exists()} == set()


def test_each_config_is_described() -> None:
    assert {path.name for path in (REPO / "configs").glob("*.yaml")} == set(
        re.findall(r"^\| `(\w+\.yaml)`", README, re.M)
    )
