import os
from pathlib import Path
from time import sleep

import pytest
import torch

from tools.profiling.clock import between, covered, forget_peak, mark, peak_memory, stored_reads, wait

CPU = torch.device("cpu")


def test_time_passes_between_marks() -> None:
    start = mark(CPU)
    sleep(0.02)
    wait(CPU)
    assert 0.02 <= between(start, mark(CPU)) < 2


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="a peak cannot be forgotten here")
def test_a_peak_is_that_of_the_time_since_it_was_forgotten() -> None:
    forget_peak(CPU)
    before = peak_memory(CPU)
    large = torch.ones(50_000_000)  # 200 MB
    assert peak_memory(CPU) > before + 150e6
    del large
    forget_peak(CPU)
    assert peak_memory(CPU) < before + 100e6


def test_what_passes_at_once_is_covered_once() -> None:
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1.5, 1.7)]) == pytest.approx(4)


def test_only_what_storage_gives_counts_as_read_from_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))  # which the system keeps in memory
    before = stored_reads()
    assert len((tmp_path / "file").read_bytes()) == 1 << 20
    assert 0 <= stored_reads() - before < 1 << 19


@pytest.mark.gpu
def test_on_a_gpu_marks_tell_when_the_work_was_done() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    wait(device)
    forget_peak(device)
    start = mark(device)
    for _ in range(20):
        matrix = (matrix @ matrix).clamp(-1, 1)
    end = mark(device)
    wait(device)
    assert between(start, end) > 20 * 2 * 4096**3 / 1e15 and peak_memory(device) >= 2 * matrix.nbytes
