"""How much memory this process can still take: the machine's, or less in a container or a job with a limit."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def free_memory(root: Path = Path("/")) -> tuple[int, str]:
    """Bytes that this process can take without swapping or being killed, and where: on the machine, or in a cgroup of
    the process if less is free there, as in a container or a Slurm job. `root` holds `proc` and `sys`."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    (machine,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    free = min((free for group in _cgroups(root) if (free := _free_in(group)) is not None), default=machine)
    return (machine, "on this machine") if machine <= free else (max(0, free), "in this container or job (cgroup)")


def _cgroups(root: Path) -> Iterator[Path]:
    """Directories of the groups of this process that may limit its memory, with their parents, of either version. In a
    container the names may be those outside: only the parents are there then, and the last is the container's own."""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            number, controllers, name = line.split(":", 2)
            if number == "0" or "memory" in controllers.split(","):
                mount = root / ("sys/fs/cgroup" if number == "0" else "sys/fs/cgroup/memory")
                group = mount / name.lstrip("/")
                yield from (place for place in (group, *group.parents) if place.is_relative_to(mount))


def _free_in(group: Path) -> int | None:
    """Bytes below the limit of a cgroup; None where it has none. Cached files count as used there, but they make room,
    as they do in the machine's MemAvailable."""
    for limit, used, prefix in (
        ("memory.max", "memory.current", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        with suppress(OSError):
            most, spent = (group / limit).read_text().strip(), int((group / used).read_text())
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cached = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            return None if most == "max" else int(most) - spent + cached
    return None
