"""The doctor's table, and the rules behind its rows."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tools import doctor
from tools.doctor import Probe

CGROUP_V1 = "5:devices:/\n4:memory:/jobs/7\n2:cpu,cpuacct:/jobs/7\n0::/\n"
CGROUP_V2 = "0::/jobs/7\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- the table -------------------------------------------------------------------------------------------------------


def test_it_runs_here_and_has_a_row_for_everything():
    out = io.StringIO()
    code = doctor.run_doctor(Console(file=out, width=200))
    for word in ("Python", "torch", "GPU", "torchvision", "DALI", "ffcv", "triton", "accelerate", "cores", "memory",
                 "disk", "/dev/shm", "fashion-mnist", "what to type"):  # fmt: skip
        assert word in out.getvalue()
    assert code in (0, 1)


def test_it_works_where_nothing_can_be_imported_and_then_says_that_the_quickstart_cannot_run(monkeypatch):
    monkeypatch.setattr(doctor, "run_probe", lambda program: Probe({}, "ImportError: libc[6] is away"))
    out = io.StringIO()
    assert doctor.run_doctor(Console(file=out, width=200)) == 1
    assert "libc[6] is away" in out.getvalue()
    assert "install -e '.[ffcv]'" in out.getvalue()


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("print('noise'); print('{}')", ""),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os; os.abort()", "crashes when imported (signal 6)"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_a_probe_gives_one_line_whatever_happens(program: str, error: str):
    assert doctor.run_probe(program).error == error


# --- libraries -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wheels", "cuda", "state", "typed"),
    [
        ({"nvidia-dali-cuda130": "2.1"}, "13.0", "ok", ""),
        ({"nvidia-dali-cuda130": "2.1"}, "13.2", "ok", ""),
        ({"nvidia-dali-cuda120": "2.1"}, "12.8", "ok", ""),
        ({"nvidia-dali-cuda120": "2.1"}, None, "ok", ""),
        ({"nvidia-dali-cuda130": "2.1"}, "12.8", "warning", "nvidia-dali-cuda120"),
        ({"nvidia-dali-cuda120": "2.1"}, "13.0", "warning", "nvidia-dali-cuda130"),
        ({"nvidia-dali-cuda120": "2.1", "nvidia-dali-cuda130": "2.1"}, "13.0", "warning", "nvidia-dali-cuda130"),
        ({"nvidia-dali": "0.1", "nvidia-dali-cuda130": "2.1"}, "13.0", "warning", "uninstall -y nvidia-dali;"),
        ({}, "13.0", "missing", "nvidia-dali-cuda130"),
        ({}, None, "missing", "nvidia-dali-cuda130"),
    ],
)
def test_dali_is_the_wheel_for_the_cuda_version_of_torch(wheels, cuda, state: str, typed: str):
    row = doctor.dali_row(wheels, cuda, Probe({}))
    assert row.state == state
    assert typed in row.command if typed else row.command == ""


def test_a_dali_that_cannot_be_imported_is_missing():
    row = doctor.dali_row({"nvidia-dali-cuda130": "2.1"}, "13.0", Probe({}, "ImportError: no libcuda"))
    assert (row.state, row.required) == ("missing", False)


def test_a_gpu_counts_once_torch_has_computed_on_it():
    gpus = [["NVIDIA H200", 140 * 2**30]] * 2
    row = doctor.gpu_row(Probe({"cuda": "13.0", "gpus": gpus, "problem": ""}), "580.65")
    assert (row.found, row.state) == ("2 x NVIDIA H200 (140 GiB), driver 580.65", "ok")
    row = doctor.gpu_row(Probe({"cuda": "13.0", "gpus": gpus, "problem": "no kernel image"}), "580.65")
    assert row.state == "warning" and row.found.endswith("no kernel image")


def test_a_driver_without_a_gpu_for_torch_is_a_warning_with_a_line_to_type():
    built_without = doctor.gpu_row(Probe({"cuda": None, "gpus": [], "problem": "not compiled with CUDA"}), "580.65")
    assert "--force-reinstall torch" in built_without.command
    assert (
        doctor.gpu_row(Probe({"cuda": "13.0", "gpus": [], "problem": "driver too old"}), "535.1").command
        == "nvidia-smi"
    )
    assert doctor.gpu_row(Probe({}, "ImportError"), "580.65").state == "warning"


def test_without_driver_and_gpu_the_cpu_is_used():
    row = doctor.gpu_row(Probe({"cuda": "13.0", "gpus": [], "problem": "no driver"}), "")
    assert row == doctor.Row("GPU", "none: runs on the CPU", "warning")


@pytest.mark.parametrize(
    ("version", "state"), [((3, 10), "missing"), ((3, 11), "ok"), ((3, 12), "ok"), ((3, 14), "warning")]
)
def test_python_is_3_11_or_3_12(version: tuple[int, int], state: str):
    assert doctor.python_row(version).state == state


def test_a_library_that_imports_shows_version_and_cuda_build():
    assert doctor.library_row("torch", {"torch": "2.11"}, Probe({"cuda": "13.0"}), "x").found == "2.11, CUDA 13.0"
    assert (
        doctor.library_row("torch", {"torch": "2.11"}, Probe({"cuda": None}), "x").found == "2.11, built without CUDA"
    )
    assert doctor.library_row("triton", {}, Probe({}, "ModuleNotFoundError"), "x").found == "not installed"


# --- the machine -----------------------------------------------------------------------------------------------------


def test_cgroup_v2_quota_and_limit_are_the_tightest_of_the_group_and_its_parents(tmp_path: Path):
    write(tmp_path / "jobs/7/cpu.max", "max 100000\n")
    write(tmp_path / "jobs/cpu.max", "150000 100000\n")
    write(tmp_path / "jobs/7/memory.max", "4294967296\n")
    write(tmp_path / "jobs/memory.max", "max\n")
    assert doctor.cpu_quota(CGROUP_V2, tmp_path) == 1.5
    assert doctor.memory_limit(CGROUP_V2, tmp_path) == 4 * 2**30


def test_cgroup_v1_quota_and_limit_are_found_in_the_tree_of_their_controller(tmp_path: Path):
    write(tmp_path / "cpu,cpuacct/jobs/7/cpu.cfs_quota_us", "400000\n")
    write(tmp_path / "cpu,cpuacct/jobs/7/cpu.cfs_period_us", "100000\n")
    write(tmp_path / "memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(tmp_path / "memory/jobs/7/memory.limit_in_bytes", "1073741824\n")
    assert doctor.cpu_quota(CGROUP_V1, tmp_path) == 4
    assert doctor.memory_limit(CGROUP_V1, tmp_path) == 2**30


def test_in_a_container_the_limit_at_the_top_of_the_tree_is_read(tmp_path: Path):
    write(tmp_path / "cpu.max", "200000 100000\n")
    assert doctor.cpu_quota(CGROUP_V2, tmp_path) == 2


def test_without_limits_nothing_is_reported(tmp_path: Path):
    write(tmp_path / "cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "cpu/cpu.cfs_period_us", "100000\n")
    assert doctor.cpu_quota("2:cpu:/\n", tmp_path) is None
    assert doctor.memory_limit("", tmp_path) is None


def test_a_missing_data_set_names_its_package_and_is_not_required(tmp_path: Path):
    row = doctor.data_row(tmp_path)
    assert (row.state, row.required, row.command) == ("missing", False, "sudo apt-get install dataset-fashion-mnist")
    write(tmp_path / "train-images-idx3-ubyte.gz", "")
    assert doctor.data_row(tmp_path).state == "ok"


def test_lines_to_type_use_this_python():
    assert Path(sys.executable).name in doctor.dali_row({}, None, Probe({})).command


def test_the_verb_works_where_torch_does_not_import(tmp_path: Path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so: cannot open shared object file')")
    launch = Path(__file__).resolve().parents[2] / "launch.py"
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, launch, "doctor"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 1 and "libcudart.so" in done.stdout and "Traceback" not in done.stderr
