"""Free memory as a machine, a container and a job show it, each written down in a directory of its own."""

from pathlib import Path

import pytest

from pipelines.free_memory import free_memory

GB = 10**9
MACHINE = 64 * GB
FILES = {
    2: ("memory.max", "memory.current", "", "max"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_", "9223372036854771712"),
}
HERE, LESS = "on this machine", "in this container or job (cgroup)"


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal: 99999999999 kB\nMemFree: 1 kB\nMemAvailable: {MACHINE // 1000 * 1000 // 1024} kB\n"
    (tmp_path / "proc/meminfo").write_text(meminfo)
    return tmp_path


def write_group(root: Path, version: int, name: str, *, limit: int | None, used: int, cached: int = 0) -> None:
    group = root / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/memory") / name
    group.mkdir(parents=True, exist_ok=True)
    most, current, prefix, none = FILES[version]
    (group / most).write_text(f"{none if limit is None else limit}\n")
    (group / current).write_text(f"{used}\n")
    lines = [
        ("anon", used - cached),
        (f"{prefix}active_file", cached // 4),
        (f"{prefix}inactive_file", 3 * cached // 4),
    ]
    (group / "memory.stat").write_text("".join(f"{key} {value}\n" for key, value in lines))


def join(root: Path, version: int, name: str) -> None:
    others = "5:devices:/other\n3:cpu,cpuacct:/other\n"
    (root / "proc/self/cgroup").write_text(f"0::/{name}\n" if version == 2 else f"{others}4:memory:/{name}\n0::/\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_group_is_what_counts_where_it_is_less(root, version):
    write_group(root, version, "slurm/job_7", limit=10 * GB, used=4 * GB)
    join(root, version, "slurm/job_7")
    assert free_memory(root) == (6 * GB, LESS)
    write_group(root, version, "slurm/job_7", limit=900 * GB, used=4 * GB)
    assert free_memory(root)[1] == HERE
    assert free_memory(root)[0] == pytest.approx(MACHINE, rel=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_further_up_holds_too(root, version):
    write_group(root, version, "slurm", limit=None, used=50 * GB)
    write_group(root, version, "slurm/job_7", limit=10 * GB, used=9 * GB)
    write_group(root, version, "slurm/job_7/step_0", limit=8 * GB, used=1 * GB)
    write_group(root, version, "slurm/job_7/step_0/task_0", limit=None, used=1 * GB)
    join(root, version, "slurm/job_7/step_0/task_0")
    assert free_memory(root) == (1 * GB, LESS)


@pytest.mark.parametrize("version", [1, 2])
def test_files_in_the_cache_make_room(root, version):
    write_group(root, version, "job", limit=10 * GB, used=10 * GB, cached=8 * GB)
    join(root, version, "job")
    assert free_memory(root) == (8 * GB, LESS)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["", "docker/0123abc", "../.."])
def test_a_container_finds_its_limit_whatever_name_it_sees(root, version, name):
    """Its own group is the root of what is mounted there, and the name may be the one outside."""
    write_group(root, version, "", limit=2 * GB, used=1 * GB)
    join(root, version, name)
    assert free_memory(root) == (1 * GB, LESS)


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_over_its_limit_has_nothing_left(root, version):
    write_group(root, version, "job", limit=1 * GB, used=2 * GB)
    join(root, version, "job")
    assert free_memory(root) == (0, LESS)


@pytest.mark.parametrize("version", [1, 2])
def test_without_a_limit_the_machine_counts(root, version):
    write_group(root, version, "user", limit=None, used=50 * GB)
    join(root, version, "user")
    assert free_memory(root)[1] == HERE


def test_without_groups_the_machine_counts(root):
    assert free_memory(root)[1] == HERE  # no proc/self/cgroup
    join(root, 2, "gone")
    assert free_memory(root)[1] == HERE


def test_a_limit_on_another_group_does_not_count(root):
    write_group(root, 2, "mine", limit=None, used=0)
    write_group(root, 2, "theirs", limit=1, used=0)
    join(root, 2, "mine")
    assert free_memory(root)[1] == HERE


def test_this_process_has_some():
    free, where = free_memory()
    assert 0 < free < 10**15
    assert where in (HERE, LESS)
