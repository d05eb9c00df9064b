from time import sleep

import pytest
import torch

from tools.profiling.ceilings import Best, Reached, Work, best_of, look, look_again, products

CPU = torch.device("cpu")


def resting(seconds: float, amount: float = 1.0) -> Work:
    return Work(amount, lambda: lambda: sleep(seconds))


def test_the_fastest_work_is_the_ceiling() -> None:
    slow, fast = resting(0.02), resting(0.004)
    found = best_of([slow, fast, slow], CPU, 1.0)
    assert found.work is fast and 50 < found.rate <= 250


def test_what_would_take_too_long_is_left_out_but_the_first_two_are_not() -> None:
    slow, fast, endless = resting(0.02, 10.0), resting(0.01, 10.0), resting(60.0, 60_000.0)
    assert best_of([slow, fast, endless], CPU, 0.01).work is fast


def test_looked_at_again_a_ceiling_can_only_rise() -> None:
    before = Reached(Best(resting(0.001), 1e9), Best(resting(0.001), 1.0), None)
    after = look_again(before, CPU, "fp32", seconds=0.01)
    assert after.products.rate == 1e9 and 100 < after.copies.rate <= 1000
    assert after.ceilings().matmul_flops == 1e9 and after.ceilings().host_to_device_bytes is None


def test_where_memory_is_gone_a_ceiling_stays_as_it_was() -> None:
    def none_left() -> None:
        raise torch.OutOfMemoryError("none left")

    before = Best(Work(1.0, lambda: none_left), 5.0)
    assert look_again(Reached(before, before, None), CPU, "fp32", seconds=0.01).copies == before


def test_convolutions_are_tried_beside_matrices() -> None:
    amounts = [work.amount for work in products(CPU, "fp32")]
    assert 2.0 * 512**3 in amounts and 2.0 * 9 * 64 * 64 * 64 * 32 * 32 in amounts and amounts == sorted(amounts)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_this_machine_reaches_something(precision: str) -> None:
    found = look(CPU, precision, seconds=0.02).ceilings()
    assert found.matmul_flops > 1e8 and found.copy_bytes > 1e7 and found.host_to_device_bytes is None
