from collections.abc import Callable
from pathlib import Path

import pytest

from ressl.batch import DataError
from tools.profiling.record import Profile, read_profile


@pytest.mark.parametrize("field", ["images", "world_size", "total_steps"])
def test_a_file_that_holds_nothing_of_what_there_must_be_is_refused(
    field: str, made_profile: Callable[..., Profile], tmp_path: Path
) -> None:
    path = tmp_path / "made by hand.json"
    path.write_text(made_profile().model_copy(update={field: 0}).model_dump_json())
    with pytest.raises(DataError, match=f"by hand.json: not a profile .*: {field}: Input should be greater than"):
        read_profile(path)


def test_a_file_of_before_is_read_without_what_it_does_not_hold(
    made_profile: Callable[..., Profile], tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(made_profile().model_dump_json(exclude={"others"}))
    assert read_profile(path).others is None
