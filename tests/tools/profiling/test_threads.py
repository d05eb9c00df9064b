import pytest

from tools.profiling.threads import counts


@pytest.mark.parametrize(
    ("cores", "present", "expected"),
    [(1, 1, [1]), (8, 8, [8, 1, 2, 4]), (8, 3, [8, 3, 1, 2, 4]), (6, 12, [6, 12, 1, 2, 4]), (4, 0, [4, 1, 2])],
)
def test_all_cores_come_first_then_the_runs_own_threads(cores: int, present: int, expected: list[int]) -> None:
    assert counts(cores, present) == expected
