"""The rules of the house, read off the syntax trees of its files: who imports whom, what is not written, how long.

Each rule is a function from sources to what breaks it, so that the rules themselves are tested too, at the end.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ROOMS = ("launch", "ressl", "pipelines", "tools", "tests")

# what a room may import of the house; nothing imports tests
MAY_IMPORT = {
    "launch": ("ressl", "pipelines", "tools"),
    "ressl": ("ressl",),
    "pipelines": ("pipelines", "ressl.batch", "ressl.config"),
    "tools": ("tools", "ressl", "pipelines"),
    "tests": ("launch", "ressl", "pipelines", "tools"),
}
# libraries that are met in one place, so that they can be replaced there; tests are free
ONLY_IN = {
    "accelerate": r"ressl/runtime\.py",
    "nvidia.dali": r"pipelines/dali_source\.py|tools/baselines\.py",
    "ffcv": r"pipelines/ffcv_source\.py|tools/baselines\.py",
    "triton": r"(ressl|pipelines)/kernels/.*",
}
Sources = dict[str, ast.Module]  # by path from the checkout's root, with forward slashes


# --- reading ---------------------------------------------------------------------------------------------------------


def read(root: Path) -> Sources:
    files = [path for room in ROOMS for path in (root / f"{room}.py", *sorted((root / room).rglob("*.py")))]
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in files if path.exists()}


def room_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each imported thing: the name it gets in the file, and its full name, `a.b.c` for `from a.b import c`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((item.asname or item.name, item.name) for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((item.asname or item.name, f"{node.module}.{item.name}") for item in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


# --- rules: each returns what breaks it ------------------------------------------------------------------------------


def wrong_imports_between_rooms(sources: Sources) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in sources.items()
        for _, name in imports(tree)
        if name.split(".")[0] in ROOMS and not any(within(name, allowed) for allowed in MAY_IMPORT[room_of(path)])
    ]


def libraries_out_of_place(sources: Sources) -> list[str]:
    return [
        f"{path} imports {name}"
        for path, tree in sources.items()
        for _, name in imports(tree)
        for library, place in ONLY_IN.items()
        if within(name, library) and room_of(path) != "tests" and not re.fullmatch(place, path)
    ]


def banned_statements(sources: Sources) -> list[str]:
    found = []
    for path, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(f"{path}:{node.lineno} relative import")
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                found.append(f"{path}:{node.lineno} star import")
            if isinstance(node, ast.Global):
                found.append(f"{path}:{node.lineno} global")
    return found


def inheritance_between_own_classes(sources: Sources) -> list[str]:
    """A base is ours if it is defined in the same file or imported from a room. The config's Section is the exception:
    it is what makes a pydantic model one of ours."""
    found = []
    for path, tree in sources.items():
        local = {node.name: f"{room_of(path)}.{node.name}" for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        names = dict(imports(tree)) | local
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else []:
                text = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
                known = [name for name in names if within(text, name)]
                full = names[known[0]] + text.removeprefix(known[0]) if known else text
                if full.split(".")[0] in ROOMS and not full.endswith(".Section"):
                    found.append(f"{path}:{node.lineno} {node.name}({text})")
    return found


def import_cycle(sources: Sources) -> list[str]:
    """Imports inside functions count too: a cycle hidden there is one all the same."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        targets = [
            max((m for m in modules if within(name, m)), key=len, default="") for _, name in imports(sources[path])
        ]
        graph[module] = {target for target in targets if target and target != module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def modules_named_like_the_standard_library(sources: Sources) -> list[str]:
    """They break whoever puts a room's folder on the path, as `python tools/x.py` does. ressl/queue.py is named after
    the paper's queue, in a room that is never on the path."""
    return [
        path for path in sources if path != "ressl/queue.py" and Path(path).stem in sys.stdlib_module_names
    ]  # fmt: skip


def functions_over(lines: int, sources: Sources) -> list[str]:
    return [
        f"{path}:{node.lineno} {node.name} has {length} lines"
        for path, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > lines
    ]


def files_over(lines: int, root: Path, pattern: str) -> list[str]:
    lengths = {path: len(path.read_text().splitlines()) for path in sorted(root.glob(pattern))}
    return [f"{path.relative_to(root)} has {length} lines" for path, length in lengths.items() if length > lines]


def files_in_tree(readme: str) -> set[str]:
    """The *.py files that the README's tree names: the fenced block with a line for `launch.py` and one for `ressl/`.

    A line holds names, then words about them. Names further in than a folder's are in that folder, and so are names
    that follow it on its own line. Drawn branches are read as blanks.
    """
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", readme, flags=re.M | re.S)
    blocks = [block for block in blocks if re.search(r"^\W*launch\.py\b", block, re.M) and "ressl/" in block]
    found: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in "".join(blocks[:1]).splitlines():
        text = re.sub(r"[│├└─|`]", " ", line)
        column = len(text) - len(text.lstrip())
        folders = [(at, folder) for at, folder in folders if at < column]
        for name in text.split():
            if not re.fullmatch(r"[\w./-]+(/|\.py)", name):
                break
            path = (folders[-1][1] if folders else "") + name
            if name.endswith("/"):
                folders.append((column, path))
            else:
                found.add(path)
    return found


# --- the house keeps them --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> Sources:
    return read(REPO)


def test_rooms_import_only_what_they_may(sources: Sources):
    assert wrong_imports_between_rooms(sources) == []


def test_each_heavy_library_is_met_in_one_place(sources: Sources):
    assert libraries_out_of_place(sources) == []


def test_no_relative_import_no_star_import_no_global(sources: Sources):
    assert banned_statements(sources) == []


def test_no_class_of_ours_inherits_from_another(sources: Sources):
    assert inheritance_between_own_classes(sources) == []


def test_imports_have_no_cycle(sources: Sources):
    assert import_cycle(sources) == []


def test_no_module_has_a_name_of_the_standard_library(sources: Sources):
    assert modules_named_like_the_standard_library(sources) == []


def test_functions_have_at_most_60_lines(sources: Sources):
    assert functions_over(60, sources) == []


def test_files_have_at_most_400_lines():
    assert [found for room in ROOMS for found in files_over(400, REPO, f"{room}/**/*.py")] == []
    assert files_over(400, REPO, "launch.py") == []


def test_configs_have_at_most_60_lines():
    assert files_over(60, REPO, "configs/**/*.yaml") == []


def test_reading_a_config_does_not_import_torch():
    program = "import sys, ressl.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPO, check=False).returncode == 0


def test_the_tree_in_the_readme_names_every_file_and_no_other(sources: Sources):
    if not (REPO / "README.md").exists():
        pytest.skip("no README.md yet")
    on_disk = {path for path in sources if not (path.endswith("__init__.py") and not sources[path].body)}
    named = files_in_tree((REPO / "README.md").read_text())
    assert (sorted(on_disk - named), sorted(named - on_disk)) == ([], []), "not in the tree, and not on disk"


# --- and each rule can be broken -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "path", "code"),
    [
        (wrong_imports_between_rooms, "ressl/x.py", "from pipelines.frames import Frames"),
        (wrong_imports_between_rooms, "ressl/x.py", "def f():\n    import pipelines"),
        (wrong_imports_between_rooms, "pipelines/x.py", "from ressl import loss"),
        (wrong_imports_between_rooms, "tools/x.py", "import launch"),
        (wrong_imports_between_rooms, "launch.py", "from tests.conftest import REPO"),
        (libraries_out_of_place, "ressl/trainer.py", "from accelerate import Accelerator"),
        (libraries_out_of_place, "pipelines/x.py", "import nvidia.dali.fn as fn"),
        (libraries_out_of_place, "ressl/loss.py", "import triton.language as tl"),
        (banned_statements, "ressl/x.py", "from . import loss"),
        (banned_statements, "ressl/x.py", "from math import *"),
        (banned_statements, "ressl/x.py", "def f():\n    global a"),
        (inheritance_between_own_classes, "ressl/x.py", "class A: ...\nclass B(A): ..."),
        (
            inheritance_between_own_classes,
            "tools/x.py",
            "from ressl import batch as b\nclass C(b.ViewLoader[int]): ...",
        ),
        (import_cycle, "ressl/batch.py", "def f():\n    from ressl.x import a"),
        (modules_named_like_the_standard_library, "tools/profile.py", ""),
    ],
)
def test_a_rule_notices_when_it_is_broken(rule, path: str, code: str):
    house = {"ressl/x.py": ast.parse("import ressl.batch"), path: ast.parse(code)}
    assert len(rule(house)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from ressl.config import Section\nclass A(Section): ...",
        "from torch import nn\nclass ReSSL(nn.Module): ...",
        "from typing import Generic, TypeVar\nclass A(Generic[int]): ...",
        "from torchvision.models import ResNet as Net\nclass ResNet(Net): ...",
    ],
)
def test_bases_from_libraries_and_sections_are_allowed(code: str):
    assert inheritance_between_own_classes({"ressl/x.py": ast.parse(code)}) == []


def test_the_tree_is_read_with_folders_and_several_names_on_a_line():
    readme = """
```bash
make quickstart
```

```
launch.py            the front door, calls tools/report.py
ressl/               the method
  batch.py           CONTRACT
  evals/             knn.py linear.py
  kernels/
    loss.py          twin of ressl/loss.py
  queue.py           after a folder, back in the one above
pipelines/
  __init__.py  frames.py    two names
├── draws.py         a drawn branch
Makefile
```
"""
    assert files_in_tree(readme) == {
        "launch.py", "ressl/batch.py", "ressl/evals/knn.py", "ressl/evals/linear.py", "ressl/kernels/loss.py",
        "ressl/queue.py", "pipelines/__init__.py", "pipelines/frames.py", "pipelines/draws.py",
    }  # fmt: skip
