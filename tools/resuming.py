"""What `resume` finds out about a run by itself."""

from pathlib import Path

from ressl import checkpoint
from ressl.checkpoint import CheckpointError, Manifest
from ressl.config_file import ConfigError
from ressl.run_dir import again_command, checkpoints_path, config_path


def processes_of(about: Manifest, run_dir: Path) -> tuple[int, int]:
    """--gpus and --processes of the run: 0, 0 for a single process. Raises ConfigError for one on several machines,
    which has to be started on each."""
    if about.world_size != about.local_ranks:
        raise ConfigError(
            f"{run_dir}: the run had {about.world_size} processes on several machines: type its `pretrain` command on "
            "each again, which goes on by itself; or give --gpus or --processes to go on with on this one"
        )
    if about.world_size == 1:
        return 0, 0
    return (about.world_size, 0) if about.device == "cuda" else (0, about.world_size)


def config_of(run_dir: Path) -> Path:
    """The config file of a run. Raises ConfigError where there is none."""
    path = config_path(run_dir)
    if not path.is_file():
        raise ConfigError(f"{run_dir}: no run here (there is no config.yaml)")
    return path


def last_checkpoint(run_dir: Path) -> str | None:
    """Its name."""
    return next((path.name for path in checkpoint.found(checkpoints_path(run_dir))), None)


def how_to_go_on(run_dir: Path, nodes: int) -> str:
    """For a person whose run has failed."""
    last = last_checkpoint(run_dir)
    if last is None:
        return "nothing was saved"
    return f"the last checkpoint is {last}; to go on: {again_command(run_dir, several_nodes=nodes > 1)}"


def newest_manifest(run_dir: Path) -> Manifest:
    """What the newest checkpoint that can be read says of itself. Raises CheckpointError where there is none."""
    reasons = []
    for path in checkpoint.found(checkpoints_path(run_dir)):
        try:
            return checkpoint.about(path)
        except CheckpointError as error:
            reasons.append(str(error))
    where = checkpoints_path(run_dir)
    if reasons:
        raise CheckpointError("\n".join([f"{where}: none of its checkpoints can be used:", *reasons]))
    raise CheckpointError(
        f"{where}: no checkpoint here to go on from; its `pretrain` command begins the run again (its config: "
        f"{config_path(run_dir)})"
    )
