"""Nothing that is read is ever run, read off the syntax trees of the house's files: who unpickles, evaluates, unpacks.

Each rule is a function from sources to what breaks it. What malicious files do: see test_malicious_files.py.
"""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ROOMS = ("ressl", "pipelines", "tools")
Sources = dict[str, ast.Module]  # by path from the checkout's root, with forward slashes

RUN_WHAT_THEY_READ = {
    "pickle",
    "_pickle",
    "cPickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "jsonpickle",
}
PICKLE = {  # the only files that import it, and all that they take from it
    "ressl/checkpoint.py": {"UnpicklingError"},  # which torch.load raises
    "tools/image_sets/cifar.py": {"UnpicklingError", "Unpickler"},  # CIFAR is pickled; a subclass lets only arrays in
}
EXTRACT = {"tools/bench_data.py"}  # for a benchmark, with filter="data", which keeps all in its directory
RUN_TEXT = {"eval", "exec", "compile", "__import__"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
UNSAFE_YAML = {"Loader", "CLoader", "FullLoader", "UnsafeLoader", "BaseLoader", "load_all", "full_load", "unsafe_load"}


# --- the rules: each returns what breaks it --------------------------------------------------------------------------


def dotted(node: ast.expr) -> str:
    """`a.b.c` as it is written; `?` in the place of what is no name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id if isinstance(node, ast.Name) else "?", *reversed(parts)])


def calls(tree: ast.Module) -> Iterator[tuple[ast.Call, str, dict[str, object]]]:
    """Each call, the name that is called, and its keywords: those that are no constant with the name of their value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            words = {
                word.arg or "**": word.value.value if isinstance(word.value, ast.Constant) else dotted(word.value)
                for word in node.keywords
            }
            yield node, dotted(node.func), words


def imported(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {f"{item.name} as {item.asname}" if item.asname else item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{item.name}" for item in node.names}
    return found


def imports_of_what_runs_data(sources: Sources) -> list[str]:
    found = []
    for path, tree in sources.items():
        names = {name for name in imported(tree) if name.split()[0].split(".")[0] in RUN_WHAT_THEY_READ}
        found += [f"{path} imports {name}" for name in sorted(names) if name != "pickle" or path not in PICKLE]
        used = {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and dotted(node.value) == "pickle"
        }
        found += [f"{path} uses pickle.{name}" for name in sorted(used - PICKLE.get(path, set()))]
    return found


def unpicklers_that_are_not_subclassed(sources: Sources) -> list[str]:
    return [
        f"{path}:{call.lineno} calls {name}"
        for path, tree in sources.items()
        for call, name, _ in calls(tree)
        if name == "pickle.Unpickler"
    ]


def loads_that_may_run_data(sources: Sources) -> list[str]:
    """torch.load without weights_only=True, or np.load with anything for allow_pickle but False."""
    found = []
    for path, tree in sources.items():
        found += [f"{path} imports {name}" for name in sorted(imported(tree) & {"torch.load", "numpy.load"})]
        for call, name, words in calls(tree):
            torch_wrong = name == "torch.load" and words.get("weights_only") is not True
            numpy_wrong = name in ("np.load", "numpy.load") and words.get("allow_pickle") is not False
            if torch_wrong or numpy_wrong or name.startswith(("torch.hub.", "torch.package.", "torch.jit.load")):
                found.append(f"{path}:{call.lineno} {name}")
    return found


def unsafe_yaml(sources: Sources) -> list[str]:
    """All but the safe functions, and yaml.load with a class that is not derived from SafeLoader in the same file."""
    found = []
    for path, tree in sources.items():
        safe = {
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and [dotted(base) for base in node.bases] == ["yaml.SafeLoader"]
        }
        found += [f"{path} imports {name}" for name in sorted(imported(tree)) if name.startswith("yaml.")]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and dotted(node.value) == "yaml" and node.attr in UNSAFE_YAML:
                found.append(f"{path}:{node.lineno} yaml.{node.attr}")
        for call, name, words in calls(tree):
            given = [dotted(argument) for argument in call.args[1:]] + [str(words.get("Loader", ""))]
            if name == "yaml.load" and not set(given) & (safe | {"yaml.SafeLoader"}):
                found.append(f"{path}:{call.lineno} {ast.unparse(call)}")
    return found


def text_that_is_run(sources: Sources) -> list[str]:
    found = []
    for path, tree in sources.items():
        for call, name, words in calls(tree):
            by_name = name == "importlib.import_module" and not isinstance(call.args[0], ast.Constant)
            if name in RUN_TEXT | SHELLS or by_name or words.get("shell", False) is not False:
                found.append(f"{path}:{call.lineno} {name}")
    return found


def archives_that_are_unpacked(sources: Sources) -> list[str]:
    found = []
    for path, tree in sources.items():
        for call, name, words in calls(tree):
            unpacks = name.split(".")[-1] in ("extract", "extractall", "unpack_archive") and "." in name
            if unpacks and not (path in EXTRACT and words.get("filter") == "data"):
                found.append(f"{path}:{call.lineno} {name}")
    return found


RULES = (
    imports_of_what_runs_data, unpicklers_that_are_not_subclassed, loads_that_may_run_data, unsafe_yaml,
    text_that_is_run, archives_that_are_unpacked,
)  # fmt: skip


@pytest.fixture(scope="module")
def sources() -> Sources:
    files = [REPO / "launch.py", *(path for room in ROOMS for path in sorted((REPO / room).rglob("*.py")))]
    return {path.relative_to(REPO).as_posix(): ast.parse(path.read_text()) for path in files}


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule: Callable[[Sources], list[str]], sources: Sources) -> None:
    assert rule(sources) == []


def test_no_exception_is_left_that_nobody_needs(sources: Sources) -> None:
    assert {path for path, tree in sources.items() if "pickle" in imported(tree)} == set(PICKLE)
    assert {p for p, tree in sources.items() for _, name, _ in calls(tree) if name.endswith(".extract")} == EXTRACT


@pytest.mark.parametrize(
    ("rule", "path", "code"),
    [
        (imports_of_what_runs_data, "tools/x.py", "import pickle"),
        (imports_of_what_runs_data, "tools/x.py", "def f():\n    from marshal import loads"),
        (imports_of_what_runs_data, "tools/x.py", "import shelve as s"),
        (imports_of_what_runs_data, "ressl/checkpoint.py", "import pickle\npickle.loads(b'')"),
        (imports_of_what_runs_data, "tools/image_sets/cifar.py", "from pickle import loads"),
        (imports_of_what_runs_data, "tools/image_sets/cifar.py", "import pickle as p"),
        (unpicklers_that_are_not_subclassed, "tools/image_sets/cifar.py", "pickle.Unpickler(file).load()"),
        (loads_that_may_run_data, "ressl/x.py", "torch.load(f)"),
        (loads_that_may_run_data, "ressl/x.py", "torch.load(f, weights_only=False)"),
        (loads_that_may_run_data, "ressl/x.py", "torch.load(f, weights_only=safe)"),
        (loads_that_may_run_data, "ressl/x.py", "from torch import load"),
        (loads_that_may_run_data, "ressl/x.py", "np.load(f, allow_pickle=True)"),
        (loads_that_may_run_data, "ressl/x.py", "np.load(f)"),
        (loads_that_may_run_data, "ressl/x.py", "torch.hub.load('a', 'b')"),
        (unsafe_yaml, "ressl/x.py", "yaml.load(text, yaml.Loader)"),
        (unsafe_yaml, "ressl/x.py", "yaml.unsafe_load(text)"),
        (unsafe_yaml, "ressl/x.py", "from yaml import load"),
        (unsafe_yaml, "ressl/x.py", "class L(yaml.FullLoader): ..."),
        (unsafe_yaml, "ressl/x.py", "yaml.load(text, L)"),
        (text_that_is_run, "ressl/x.py", "eval(text)"),
        (text_that_is_run, "ressl/x.py", "exec(compile_it)"),
        (text_that_is_run, "ressl/x.py", "subprocess.run(text, shell=True)"),
        (text_that_is_run, "ressl/x.py", "os.system(text)"),
        (text_that_is_run, "ressl/x.py", "importlib.import_module(name)"),
        (archives_that_are_unpacked, "tools/x.py", "archive.extractall(place, filter='data')"),
        (archives_that_are_unpacked, "tools/bench_data.py", "archive.extract(member, place)"),
        (archives_that_are_unpacked, "tools/x.py", "shutil.unpack_archive(file)"),
    ],
)
def test_a_rule_notices_when_it_is_broken(rule: Callable[[Sources], list[str]], path: str, code: str) -> None:
    found = rule({path: ast.parse(code), "ressl/y.py": ast.parse("backbone.eval()\nextract(a)\nyaml.safe_load(text)")})
    assert len(set(found)) >= 1 and all(line.startswith(path) for line in found)
