"""What `resume` finds out about a run by itself."""

from pathlib import Path

from ressl import checkpoint
from ressl.checkpoint import CheckpointError, Manifest
from ressl.config_file import ConfigError
from ressl.run_dir import checkpoints_path


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


def newest_manifest(run_dir: Path) -> Manifest:
    """What the newest checkpoint that can be read says of itself. Raises CheckpointError where there is none."""
    reasons = []
    for path in checkpoint.found(checkpoints_path(run_dir)):
        try:
            return checkpoint.about(path)
        except CheckpointError as error:
            reasons.append(str(error))
    raise CheckpointError("\n".join([f"{checkpoints_path(run_dir)}: no checkpoint here to go on from", *reasons]))
