"""Whose a run directory is, and what may change when a run goes on."""

import os
from pathlib import Path
from typing import Any, get_args

import pytest

from ressl.config import Config, Section
from ressl.config_file import ConfigError, load_config
from ressl.run_dir import (
    FREE,
    RunDirError,
    append_line,
    check_not_in_use,
    check_run_dir,
    differences,
    keep_metrics_until,
    lines_of,
    lock,
    make_run_dir,
)

# every key of a config, in one of two lists: a new one has to be put into one of them

# of what is computed, or of what it is computed from
FIXED = [
    "data.block", "data.mean", "data.on_corrupt", "data.shuffle", "data.source.classes", "data.source.height",
    "data.source.hw_decoder_load", "data.source.images", "data.source.max_side", "data.source.name",
    "data.source.pixels", "data.source.shards", "data.source.train", "data.source.width", "data.std", "data.window",
    "encoder.batchnorm.groups", "encoder.batchnorm.name", "encoder.blocks", "encoder.name", "encoder.stem",
    "encoder.width", "method.embed_dim", "method.hidden_dim", "method.loss_precision", "method.name",
    "method.queue_dtype", "method.queue_size", "method.student_temperature", "method.teacher_momentum",
    "method.teacher_momentum_end", "method.teacher_temperature", "optim.accumulate", "optim.batch_size",
    "optim.betas", "optim.epochs", "optim.eps", "optim.final_lr", "optim.lr", "optim.lr_scaling", "optim.momentum",
    "optim.name", "optim.nesterov", "optim.no_decay", "optim.trust_coefficient", "optim.warmup_epochs",
    "optim.warmup_lr", "optim.weight_decay", "run.gradient_compression", "run.precision", "run.seed",
    "views.progressive.multiple", "views.progressive.start", "views.progressive.until", "views.strong",
    "views.weak.blur_prob", "views.weak.blur_sigma", "views.weak.crop_ratio", "views.weak.crop_scale",
    "views.weak.flip_prob", "views.weak.grayscale_prob", "views.weak.jitter", "views.weak.jitter_prob",
    "views.weak.randaugment", "views.weak.size", "views.weak.solarize_prob",
]  # fmt: skip

# of how it is computed, shown or kept
MAY_CHANGE = [
    "data.max_bad", "data.placement", "data.prefetch", "data.source.budget_gb", "data.source.cache",
    "data.source.memory", "data.source.val", "data.source.workers", "evaluate.batch_size", "evaluate.knn.k",
    "evaluate.knn.temperature", "evaluate.linear.batch_size", "evaluate.linear.crop_scale", "evaluate.linear.crops",
    "evaluate.linear.epochs", "evaluate.linear.lr", "evaluate.linear.momentum", "evaluate.linear.nesterov",
    "evaluate.linear.schedule", "evaluate.resize", "evaluate.size", "method.loss_impl", "run.checkpoint.epochs",
    "run.checkpoint.keep", "run.checkpoint.minutes", "run.checkpoint.steps", "run.compile", "run.cuda_graphs",
    "run.device", "run.hang_timeout", "run.knn_every", "run.log_every", "run.out_dir", "run.skip_limit",
    "run.tensorboard", "views.impl",
]  # fmt: skip


def sections(kind: Any) -> list[type[Section]]:
    own = [kind] if isinstance(kind, type) and issubclass(kind, Section) else []
    return own + [section for argument in get_args(kind) for section in sections(argument)]


def keys(section: type[Section], prefix: str = "") -> set[str]:
    """Of the config's leaves; a tuple of sections is one."""
    found = set()
    for name, field in section.model_fields.items():
        inner = [] if str(field.annotation).startswith("tuple") else sections(field.annotation)
        found |= {key for kind in inner for key in keys(kind, f"{prefix}{name}.")} or {prefix + name}
    return found


def test_every_key_of_a_config_is_known_to_change_what_is_computed_or_not_to() -> None:
    assert keys(Config) == {*FIXED, *MAY_CHANGE} and not {*FIXED} & {*MAY_CHANGE}
    assert {key for key in keys(Config) if key.startswith(FREE)} == {*MAY_CHANGE}


OTHER: dict[str, Any] = {  # values that differ from those of the tiny config, where the kind alone does not give one
    "optim.lr_scaling": "linear", "method.queue_dtype": "bfloat16", "method.loss_precision": "tf32",
    "method.loss_impl": "chunked", "run.precision": "bf16", "run.gradient_compression": "bf16", "run.device": "auto",
    "data.on_corrupt": "fail", "data.shuffle": "blocks", "data.placement": "none", "data.source.pixels": "yuv420",
    "data.source.memory": "host", "data.source.val": None, "views.impl": "torch", "evaluate.linear.crops": "random",
    "evaluate.linear.schedule": "step", "evaluate.resize": 20, "method.teacher_momentum_end": 1.0,
    "views.weak.randaugment": [1, 5], "optim.nesterov": True, "run.out_dir": "elsewhere", "data.source.max_side": 64,
    "data.source.train": "elsewhere.safetensors", "optim.no_decay": ["bias"], "data.mean": [0.1, 0.5, 0.5],
    "data.std": [0.1, 0.5, 0.5], "views.weak.jitter": [0.1, 0.1, 0.1, 0.1],
}  # fmt: skip


def other(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 0.5 if value else 0.01
        case (a, b):
            return [a * 0.9, b * 0.95]
    raise AssertionError(value)


def test_a_change_of_each_key_is_refused_or_let_pass(tiny_config: Path) -> None:
    base = load_config(tiny_config)
    tried = set()
    for key in keys(Config):
        node: Any = base.model_dump(mode="json")
        *path, leaf = key.split(".")
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or leaf not in node or leaf == "name" or leaf == "strong":
            continue  # of a section that this config does not have
        value = OTHER[key] if key in OTHER else other(node[leaf])
        changed = base.model_dump(mode="json")
        node = changed
        for part in path:
            node = node[part]
        node[leaf] = value
        found = differences(base, Config.model_validate(changed))
        assert [*found] == ([key] if key in FIXED else []), key
        tried.add(key)
    assert len(tried) > 60


def test_another_kind_of_section_is_a_change_too(tiny_config: Path) -> None:
    one = load_config(tiny_config)
    for override in (
        "encoder.batchnorm={name: sync}",
        "views.strong=[{size: 8}]",
        "views.progressive={start: 0.5, until: 1}",
    ):
        assert differences(one, load_config(tiny_config, [override]))


def started(config: Path) -> None:
    make_run_dir(load_config(config)).close()
    (config.parent / "run" / "metrics.jsonl").touch()


def test_what_differs_stands_in_two_columns(tiny_config: Path) -> None:
    started(tiny_config)
    with pytest.raises(RunDirError) as caught:
        check_run_dir(load_config(tiny_config, ["optim.lr=0.5", "run.seed=3"]))
    first, *table = str(caught.value).splitlines()
    assert "holds a run of another configuration" in first and "--allow-change KEY" in first
    assert [line.split() for line in table] == [["there", "here"], ["optim.lr", "0.06", "0.5"], ["run.seed", "0", "3"]]
    assert len({line.rindex(word) for line, word in zip(table, ("here", "0.5", "3"), strict=True)}) == 1


@pytest.mark.parametrize("allowed", [["optim.lr", "run.seed"], ["optim", "run"]])
def test_a_change_that_is_allowed_passes(allowed: list[str], tiny_config: Path) -> None:
    started(tiny_config)
    cfg = load_config(tiny_config, ["optim.lr=0.5", "run.seed=3"])
    assert check_run_dir(cfg, allowed) == {"optim.lr": (0.06, 0.5), "run.seed": (0, 3)}
    with pytest.raises(RunDirError, match="run.seed"):
        check_run_dir(cfg, allowed[:1])
    with pytest.raises(ConfigError, match="--allow-change optim.lrate: no such key"):
        check_run_dir(cfg, ["optim.lrate"])


def test_who_holds_a_directory_is_named(tmp_path: Path) -> None:
    with lock(tmp_path / ".lock"), pytest.raises(RunDirError, match=f"is in use by process {os.getpid()} on "):
        lock(tmp_path / ".lock")
    lock(tmp_path / ".lock").close()


def test_whether_a_directory_is_in_use_is_known_without_taking_it(tmp_path: Path) -> None:
    check_not_in_use(tmp_path / "nowhere")
    check_not_in_use(tmp_path)
    assert not (tmp_path / ".lock").exists()
    with lock(tmp_path / ".lock"), pytest.raises(RunDirError, match=f"is in use by process {os.getpid()} on "):
        check_not_in_use(tmp_path)
    check_not_in_use(tmp_path)


def test_lines_that_are_none_are_passed_over_and_dropped_when_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1, "loss": 2.0})
    append_line(path, {"step": 2})
    with path.open("ab") as file:
        file.write(b'[1]\n{"no": 1}\n\xff\n' + b"[" * 100_000 + b'\n{"step": 3}\n{"step": 1, "lo')
    assert lines_of(path) == [{"step": 1, "loss": 2.0}, {"step": 2}, {"no": 1}, {"step": 3}]
    keep_metrics_until(tmp_path, 2)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n{"step": 2}\n'
    assert lines_of(tmp_path / "nowhere") == []
