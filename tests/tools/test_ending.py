"""What the machine lacks ends in one line that says what to change."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ressl import checkpoint
from ressl.run_dir import checkpoints_path
from tools.ending import exit_code

Launch = Callable[..., tuple[int, str, str]]
ADVICE = "lower optim.batch_size or method.queue_size, or raise optim.accumulate"


def test_a_run_that_finds_no_memory_ends_with_advice_and_its_checkpoints_stay(
    ressl: Launch, tiny_config: Path, tmp_path: Path
) -> None:
    assert ressl("pretrain", tiny_config, "optim.epochs=1")[0] == 0
    before = checkpoint.found(checkpoints_path(tmp_path / "run"))
    huge = ["method.queue_size=16777216", "method.embed_dim=8388608", "method.hidden_dim=1"]  # more than has addresses
    code, _, err = ressl("pretrain", tiny_config, "optim.epochs=1", *huge, "--allow-change", "method")
    assert code == 4
    assert (
        err.startswith("ressl: error: ") and err.count("\n") == 1 and "memory" in err and err.rstrip().endswith(ADVICE)
    )
    assert checkpoint.found(checkpoints_path(tmp_path / "run")) == before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words"),
            "CUDA out of memory. Tried",
        ),
        (MemoryError(), "out of memory; "),
    ],
)
def test_whoever_tells_of_it(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def verb() -> None:
        raise error

    assert exit_code(verb) == 4
    err = capsys.readouterr().err
    assert err.startswith(f"ressl: error: {said}") and err.count("\n") == 1 and err.rstrip().endswith(ADVICE)


def test_what_no_one_foresaw_keeps_its_traceback() -> None:
    def verb() -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        exit_code(verb)
