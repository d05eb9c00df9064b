"""Which cores of the machine a rank's threads run on: its own share, beside its GPU where that is known.

On a node with two processors, half of the GPUs hang on each. Threads that decode on the wrong one send every byte
through the link between them, and threads of many ranks that may run anywhere keep evicting one another.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

SYS = Path("/sys")


def settle(placement: Literal["auto", "none"], device: torch.device) -> int:
    """Returns the number of cores that fall to this rank. `auto` keeps this thread, and whatever threads it starts from
    now on, to them; so it comes before any loader is built."""
    allowed = sorted(os.sched_getaffinity(0))
    rank, ranks = (int(os.environ.get(name, one)) for name, one in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")))
    if placement == "none":
        return max(1, len(allowed) // ranks)
    nodes = gpu_nodes(ranks) if device.type == "cuda" else [None] * ranks
    cores = share(allowed, nodes, rank)
    os.sched_setaffinity(0, cores)
    return len(cores) if len(allowed) >= ranks else 1


def share(allowed: Sequence[int], nodes: Sequence[int | None], rank: int, root: Path = SYS) -> list[int]:
    """The cores of `rank`, out of those that are `allowed`. `nodes` holds the NUMA node of each rank's GPU, or None.

    Ranks of one node share out its cores; if any node is unknown, or has fewer cores that are allowed than ranks, all
    ranks share out all cores. Two hardware threads of one core stay together. With fewer cores than ranks, all may run
    on all of them.
    """
    of_node = {node: _cpus(root / f"devices/system/node/node{node}/cpulist") & set(allowed) for node in set(nodes)}
    if None not in of_node and all(len(cores) >= list(nodes).count(node) for node, cores in of_node.items()):
        pool, peers = of_node[nodes[rank]], [peer for peer in range(len(nodes)) if nodes[peer] == nodes[rank]]
    else:
        pool, peers = set(allowed), list(range(len(nodes)))
    if len(pool) < len(peers):
        return sorted(pool)
    ordered = sorted(pool, key=lambda cpu: (min(_siblings(cpu, root)), cpu))
    place = peers.index(rank)
    return sorted(ordered[len(pool) * place // len(peers) : len(pool) * (place + 1) // len(peers)])


def gpu_nodes(ranks: int, root: Path = SYS) -> list[int | None]:
    """The NUMA node of each rank's GPU, None where the machine does not tell."""
    nodes: list[int | None] = []
    for number in range(ranks):
        if number >= torch.cuda.device_count():
            nodes.append(None)
            continue
        gpu: Any = torch.cuda.get_device_properties(number)
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
        nodes.append(_node(root / "bus/pci/devices" / address / "numa_node"))
    return nodes


def _node(path: Path) -> int | None:
    try:
        node = int(path.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _siblings(cpu: int, root: Path) -> set[int]:
    return _cpus(root / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or {cpu}


def _cpus(path: Path) -> set[int]:
    """The kernel's lists, such as 0-3,8-11; empty where there is none."""
    try:
        text = path.read_text().strip()
    except OSError:
        return set()
    ranges = [part.split("-") for part in text.split(",") if part]
    return {cpu for ends in ranges for cpu in range(int(ends[0]), int(ends[-1]) + 1)}
