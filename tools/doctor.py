"""What this machine has and lacks: one table, each row with the line to type where something is amiss.

Nothing heavy is imported here. Each library is tried in a process of its own, so a broken one cannot take the doctor
with it, and FFCV, which sets torch to one thread when imported, leaves this process alone.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

GIB = 2**30
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
COLOURS = {"ok": "green", "warning": "yellow", "missing": "red"}

# Programs for processes of their own; the last line that each prints is JSON.
PROBES = {
    "torch": """
import json, torch
facts = {"cuda": torch.version.cuda, "gpus": [], "problem": ""}
try:
    torch.cuda.init()
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        facts["gpus"].append([found.name, found.total_memory])
        torch.ones(8, device=f"cuda:{i}").sum().item()  # fails where the build has no code for this GPU
except Exception as error:
    facts["problem"] = str(error).strip().split("\\n")[0]
print(json.dumps(facts))
""",
    # the compiled operators are missing where torchvision was built for another torch
    "torchvision": "import torch, torchvision; torch.ops.torchvision.nms; print('{}')",
    # on a GPU it compiles a little C, for which it needs a compiler and Python's headers
    "triton": """
import torch, triton
if torch.cuda.is_available():
    triton.runtime.driver.active.get_current_target()
print("{}")
""",
    "accelerate": "import accelerate; print('{}')",
    "ffcv": "import ffcv; print('{}')",
    "dali": "import nvidia.dali; print('{}')",
}


class Row(NamedTuple):
    what: str
    found: str
    state: Literal["ok", "missing", "warning"] = "ok"
    command: str = ""
    """The line to type; empty where all is well or where no command helps."""
    required: bool = False
    """Without it the quickstart cannot run."""


class Probe(NamedTuple):
    """What a process that tried a library found out."""

    facts: dict[str, Any]
    error: str = ""


def run_doctor(console: Console) -> int:
    """Prints the table. Returns 0 if the quickstart can run here, else 1."""
    with ThreadPoolExecutor(max_workers=len(PROBES)) as pool:
        probes = dict(zip(PROBES, pool.map(run_probe, PROBES.values()), strict=True))
    wheels = _installed_versions()
    torch = probes["torch"]
    rows = [
        python_row(sys.version_info[:2]),
        library_row("torch", wheels, torch, "bash tools/setup.sh", required=True),
        gpu_row(torch, _driver_version()),
        library_row("torchvision", wheels, probes["torchvision"], "bash tools/setup.sh", required=True),
        dali_row(wheels, torch.facts.get("cuda"), probes["dali"]),
        library_row("ffcv", wheels, probes["ffcv"], f"{_pip()} install -e '.[ffcv]'"),
        library_row("triton", wheels, probes["triton"], f"{_pip()} install triton"),
        library_row("accelerate", wheels, probes["accelerate"], "bash tools/setup.sh", required=True),
        *_machine_rows(),
        data_row(FASHION_MNIST),
    ]
    table = Table("what", "found", "state", "what to type")
    for row in rows:
        state = f"[{COLOURS[row.state]}]{row.state}[/]"
        table.add_row(row.what, escape(row.found), state, escape(row.command))
    console.print(table)
    return int(any(row.required and row.state == "missing" for row in rows))


def run_probe(program: str) -> Probe:
    """Runs `program` in a Python of its own; the error is one line, whether it raised, crashed or hung."""
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return Probe({}, "hangs when imported")
    if done.returncode < 0:
        return Probe({}, f"crashes when imported (signal {-done.returncode})")
    if done.returncode > 0:
        return Probe({}, (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return Probe(json.loads(done.stdout.strip().splitlines()[-1]))


# --- libraries -------------------------------------------------------------------------------------------------------


def python_row(version: tuple[int, int]) -> Row:
    found = f"{platform.python_version()} ({sys.executable})"
    command = "PYTHON=python3.12 bash tools/setup.sh"
    if version < (3, 11):
        return Row("Python", found, "missing", command, required=True)
    if version > (3, 12):
        return Row("Python", f"{found}: tried with 3.11 and 3.12 only", "warning", command)
    return Row("Python", found)


def library_row(name: str, wheels: dict[str, str], probe: Probe, command: str, required: bool = False) -> Row:
    """A library is there if it can be imported; its version comes from its wheel, which need not be importable."""
    version = wheels.get(name, "")
    if not probe.error:
        build = f", CUDA {probe.facts['cuda']}" if probe.facts.get("cuda") else ""
        build = ", built without CUDA" if "cuda" in probe.facts and not build else build
        return Row(name, (version or "found") + build)
    return Row(name, f"{version}: {probe.error}" if version else "not installed", "missing", command, required)


def gpu_row(torch: Probe, driver: str) -> Row:
    """A GPU counts once torch has computed on it."""
    facts = torch.facts
    gpus = Counter((name, memory) for name, memory in facts.get("gpus", []))
    found = ", ".join(f"{count} x {name} ({memory / GIB:.0f} GiB)" for (name, memory), count in gpus.items())
    with_driver = f", driver {driver}" if driver else ""
    if found and not facts["problem"]:
        return Row("GPU", found + with_driver)
    if found or driver:
        problem = facts.get("problem") or torch.error or "torch sees none"
        no_cuda = bool(facts) and facts["cuda"] is None
        command = f"{_pip()} install --force-reinstall torch torchvision" if no_cuda else "nvidia-smi"
        return Row("GPU", f"{found or 'not usable'}{with_driver}: {problem}", "warning", command)
    return Row("GPU", "none: runs on the CPU", "warning")


def dali_row(wheels: dict[str, str], cuda: str | None, probe: Probe) -> Row:
    """DALI's wheels carry a CUDA version in their name, which must be torch's; `nvidia-dali` is a placeholder.

    Where torch has no CUDA any of the wheels will do, for DALI's CPU backend.
    """
    installed = {name: version for name, version in wheels.items() if name.startswith("nvidia-dali-cuda")}
    wanted = f"nvidia-dali-cuda{cuda.split('.')[0]}0" if cuda else next(iter(installed), "nvidia-dali-cuda130")
    install = f"{_pip()} install {wanted}"
    if "nvidia-dali" in wheels:
        return Row("DALI", "the package nvidia-dali is only a placeholder", "warning",
                   f"{_pip()} uninstall -y nvidia-dali; {install}")  # fmt: skip
    if not installed:
        return Row("DALI", "not installed", "missing", install)
    found = ", ".join(f"{name} {version}" for name, version in installed.items())
    if others := [name for name in installed if name != wanted]:
        return Row("DALI", f"{found}, but torch has CUDA {cuda}", "warning",
                   f"{_pip()} uninstall -y {' '.join(others)}; {_pip()} install --force-reinstall --no-deps {wanted}"
                   )  # fmt: skip
    if probe.error:
        return Row("DALI", f"{found}: {probe.error}", "missing", f"{_pip()} install --force-reinstall {wanted}")
    return Row("DALI", found)


def _installed_versions() -> dict[str, str]:
    """Name, as pip writes it, and version of every installed distribution."""
    found = {}
    for item in metadata.distributions():
        name = item.metadata["Name"]
        if name:  # a half-deleted distribution has none
            found[name.lower().replace("_", "-").replace(".", "-")] = item.version
    return found


def _driver_version() -> str:
    """The NVIDIA driver's, or nothing."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else ""


# --- the machine -----------------------------------------------------------------------------------------------------


def _machine_rows() -> list[Row]:
    groups = Path("/proc/self/cgroup")
    text = groups.read_text() if groups.exists() else ""
    affinity = len(os.sched_getaffinity(0))
    quota = cpu_quota(text, Path("/sys/fs/cgroup"))
    cores = (
        f"{affinity} of {os.cpu_count()}" if quota is None else f"{min(affinity, quota):g} of {os.cpu_count()} (quota)"
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = memory_limit(text, Path("/sys/fs/cgroup"))
    memory = total if limit is None else min(total, limit)
    limited = " (limit of the cgroup)" if memory < total else ""
    free = shutil.disk_usage(Path.cwd()).free
    shm = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    return [
        Row("cores", cores),
        Row("memory", f"{memory / GIB:.1f} GiB{limited}", "ok" if memory >= 4 * GIB else "warning"),
        Row("disk", f"{free / GIB:.0f} GiB free in {Path.cwd()}", "ok" if free >= 10 * GIB else "warning"),
        # containers give 64 MiB unless told otherwise, too little for the batches that worker processes pass on
        Row("/dev/shm", f"{shm / GIB:.1f} GiB free")
        if shm >= GIB
        else Row("/dev/shm", f"{shm / GIB:.2f} GiB free", "warning", "sudo mount -o remount,size=8G /dev/shm"),
    ]


def cpu_quota(groups: str, root: Path) -> float | None:
    """Cores that the cgroups allow, or None. `groups` is the text of /proc/self/cgroup, `root` is /sys/fs/cgroup."""
    quotas = []
    for folder in cgroup_folders(groups, root, "cpu"):
        if (v2 := folder / "cpu.max").exists():
            quota, period = v2.read_text().split()
        elif (v1 := folder / "cpu.cfs_quota_us").exists():
            quota, period = v1.read_text().strip(), (folder / "cpu.cfs_period_us").read_text().strip()
        else:
            continue
        if quota not in ("max", "-1"):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def memory_limit(groups: str, root: Path) -> int | None:
    """Bytes that the cgroups allow, or None. Version 1 writes a huge number for none; callers take the machine's."""
    limits = []
    for folder in cgroup_folders(groups, root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = (folder / name).read_text().strip() if (folder / name).exists() else "max"
            limits += [] if text == "max" else [int(text)]
    return min(limits, default=None)


def cgroup_folders(groups: str, root: Path, controller: str) -> list[Path]:
    """Where the limits of this process stand: its own group and all those above, each of which binds.

    A line of `groups` reads `4:memory:/a/b` in version 1, which has a tree for each controller, and `0::/a/b` in
    version 2. A container may see only the top of its tree: callers pass over folders that are not there.
    """
    folders = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        own = Path(path.lstrip("/"))
        for tree in (root / controllers, root / controller) if controllers else (root,):
            folders += [tree / group for group in (own, *own.parents)]
    return folders


def data_row(folder: Path) -> Row:
    """The quickstart's images."""
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return Row("fashion-mnist", str(folder))
    command = "sudo apt-get install dataset-fashion-mnist"
    return Row("fashion-mnist", f"not in {folder}: the quickstart downloads it", "missing", command)


def _pip() -> str:
    """pip of the Python that runs this, as one types it from here."""
    python = Path(sys.executable)
    return f"{python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python} -m pip"
