import re
from pathlib import Path

import pytest

from ressl.config import FfcvSource, SplitBatchNorm
from ressl.config_file import ConfigError, load_config, save_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_loads_and_its_saved_form_gives_the_same(path: Path, tmp_path: Path) -> None:
    cfg = load_config(path)
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.teacher_temprature=1", "method.teacher_temprature: unknown key; did you mean 'teacher_temperature'?"),
        ("optim.zzz=1", "optim.zzz: unknown key; known keys: name, epochs, batch_size"),
        ("data.source.trian=x", "data.source.trian: unknown key; did you mean 'train'?"),
        ("views.strong.0.sise=3", "views.strong.0.sise: unknown key; did you mean 'size'?"),
        ("method.name=wcl", "method.name: wcl is not one of ressl"),
        ("data.source.name=dalii", "data.source.name: dalii is not one of ffcv, folder, dali, resident, synthetic"),
        ("encoder.batchnorm.name=splt", "encoder.batchnorm.name: splt is not one of local, sync, split, shuffle"),
        ("encoder.batchnorm={name: split}", "encoder.batchnorm.groups: missing"),
        ("optim.epochs=ten", 'optim.epochs: expected a valid integer, got "ten"'),
        ("optim.epochs='10'", 'optim.epochs: expected a valid integer, got "10"'),
        ("optim.batch_size=1.5", "optim.batch_size: expected a valid integer, got 1.5"),
        ("run.seed=true", "run.seed: expected a valid integer, got true"),
        ("optim.nesterov=1", "optim.nesterov: expected a valid boolean, got 1"),
        ("optim.lr=.inf", "optim.lr: expected a finite number, got Infinity"),
        ("optim.lr=.nan", "optim.lr: expected a finite number, got NaN"),
        ("optim.lr=1e400", "optim.lr: expected a finite number"),
        ("optim.lr=0", "optim.lr: expected greater than 0, got 0"),
        ("run.precision=fp8", "run.precision: fp8 is not one of fp32, tf32, bf16 or fp16"),
        ("views.weak.crop_scale=[0.5]", "views.weak.crop_scale"),
        ("views.weak.crop_scale=[0.5, 0.2]", "views.weak.crop_scale: need 0 < low <= high <= 1, got [0.5, 0.2]"),
        ("views.weak.flip_prob=2", "views.weak.flip_prob: expected less than or equal to 1, got 2"),
        ("optim.warmup_epochs=5", "optim.warmup_epochs: must be below epochs=2, got 5.0"),
        ("optim.accumulate=3", "optim.accumulate: must divide batch_size=16, got 3"),
        ("evaluate.resize=8", "evaluate.resize: must not be below size=16, got 8"),
        ("data=null", "data: expected an object, got null"),
        ("optim.epochs.x=1", "optim.epochs.x: 'x' is not a key that can be set"),
        ("optim.epochs", "optim.epochs: an override is written section.key=value"),
        ("optim.epochs=[", "optim.epochs: '[' is not a YAML value"),
    ],
)
def test_a_wrong_value_is_named_with_its_path(override: str, message: str, tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tiny_config}: 1 problem\n  {message}")):
        load_config(tiny_config, [override])


def test_a_knn_evaluation_without_a_validation_set_is_refused(tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("run.knn_every: needs data.source.val to be set, got 1")):
        load_config(tiny_config, ["run.knn_every=1", "data.source.val=null"])


def test_all_problems_are_reported_at_once(tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match="4 problems") as caught:
        load_config(tiny_config, ["optim.epochs=0", "run.precison=bf16", "method.name=moco", "nonsense"])
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected sections such as `data:` and `optim:`, found nothing"),
        ("- a\n- b\n", "expected sections such as `data:` and `optim:`, found a list"),
        ("data: {a: 1\nrun: 2\n", r":2: not valid YAML"),
        ("optim:\n\tlr: 1\n", r":2: not valid YAML"),
        ("optim: {lr: 1, lr: 2}\n", r":1: not valid YAML: key 'lr' stands twice"),
        ("run: !!python/object/apply:os.system ['true']\n", r":1: not valid YAML: could not determine a constructor"),
        ("run: &a [1, 2]\ndata: *a\n", r":2: not valid YAML: alias \*a: write the value out"),
        ("[" * 5000, "nested too deeply|not valid YAML"),
    ],
    ids=["empty", "list", "broken", "tab", "twice", "object", "alias", "deep"],
)
def test_what_is_not_a_config_file_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no.yaml: cannot read the config: No such file"):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not a text file in UTF-8"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", "0.0001", "1.0e-4", "10e-5"])
def test_an_exponent_without_a_dot_is_a_number(text: str, tiny_config: Path) -> None:
    assert load_config(tiny_config, [f"optim.weight_decay={text}"]).optim.weight_decay == pytest.approx(1e-4)


def test_overrides_reach_lists_and_choose_another_member_of_a_union(tiny_config: Path) -> None:
    cfg = load_config(
        tiny_config,
        [
            "views.strong.0.size=8",
            "encoder.batchnorm={name: split, groups: 2}",
            "data.source={name: ffcv, train: ~/a b.beton}",
        ],
    )
    assert cfg.views.strong[0].size == 8
    assert cfg.encoder.batchnorm == SplitBatchNorm(name="split", groups=2)
    assert cfg.data.source == FfcvSource(name="ffcv", train=Path.home() / "a b.beton")


def test_variables_in_paths_are_expanded(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/some/place")
    assert load_config(tiny_config, ["run.out_dir=$WHERE/x"]).run.out_dir == Path("/some/place/x")


def test_the_learning_rate_grows_with_the_batch_only_if_asked(tiny_config: Path) -> None:
    assert load_config(tiny_config, ["optim.lr=0.5"]).optim.peak_lr == 0.5
    assert load_config(tiny_config, ["optim.lr=0.5", "optim.lr_scaling=linear"]).optim.peak_lr == 0.5 * 16 / 256


def test_a_config_cannot_be_changed(tiny_config: Path) -> None:
    cfg = load_config(tiny_config)
    with pytest.raises(ValueError, match="frozen"):
        cfg.optim.lr = 1.0  # type: ignore[misc]


LARS = "{name: lars, epochs: 2, batch_size: 16, lr: 0.1, warmup_epochs: 0}"
ADAMW = "{name: adamw, epochs: 2, batch_size: 16, lr: 0.001, warmup_epochs: 0}"


@pytest.mark.parametrize(
    ("optim", "override", "message"),
    [
        (LARS, "optim.nesterov=true", "optim.nesterov: unknown key"),
        (LARS, "optim.trust_coefficient=0", "optim.trust_coefficient: expected greater than 0, got 0"),
        (LARS, "optim.momentum=1", "optim.momentum: expected less than 1, got 1"),
        (LARS, "optim.warmup_lr=0.2", "optim.warmup_lr: must not be above the highest rate 0.1, got 0.2"),
        (LARS, "optim.accumulate=3", "optim.accumulate: must divide batch_size=16, got 3"),
        (ADAMW, "optim.momentum=0.9", "optim.momentum: unknown key"),
        (ADAMW, "optim.betas=[0.9, 1.0]", "optim.betas.1: expected less than 1, got 1.0"),
        (ADAMW, "optim.eps=0", "optim.eps: expected greater than 0, got 0"),
        (ADAMW, "optim.warmup_epochs=2", "optim.warmup_epochs: must be below epochs=2, got 2.0"),
        (
            "{name: sgd, epochs: 2, batch_size: 16, lr: 0.1, warmup_epochs: 0, lr_scaling: linear}",
            "optim.final_lr=0.1",
            "optim.final_lr: must not be above the highest rate 0.00625, lr scaled to batch_size=16, got 0.1",
        ),
        ("{name: adam}", "optim.epochs=2", "optim.name: adam is not one of sgd, lars, adamw"),
    ],
)
def test_a_wrong_value_of_an_optimizer_is_named(optim: str, override: str, message: str, tiny_config: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{tiny_config}: 1 problem\n  {message}")):
        load_config(tiny_config, [f"optim={optim}", override])


@pytest.mark.parametrize("optim", [LARS, ADAMW])
def test_every_optimizer_can_be_saved_and_read_again(optim: str, tiny_config: Path, tmp_path: Path) -> None:
    cfg = load_config(tiny_config, [f"optim={optim}"])
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg
