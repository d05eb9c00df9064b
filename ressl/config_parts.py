"""What the sections of a config are made of: types of values, the strict model, the way a problem is told."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _expand(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("a path without NUL bytes")
    try:
        return Path(os.path.expandvars(path.expanduser()))
    except RuntimeError:
        raise ValueError("a path whose ~name is a user of this machine") from None


UserPath = Annotated[Path, AfterValidator(_expand)]
Probability = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, le=2**24)]
Range = tuple[float, float]
Workers = Annotated[int, Field(ge=0)]
"""Decoding threads of each rank; 0: the cores that fall to the rank."""
MaxSide = Annotated[int, Field(ge=8)] | None
"""Larger images are resized to this longer side after decoding; null keeps them as they are."""


class Section(BaseModel):
    """Behaviour shared by all sections: frozen, unknown keys refused, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)


def require(condition: bool, key: str, message: str, value: object) -> None:
    """Raises a problem of a section's key, found by comparing fields. The reader puts the section's path before it."""
    if not condition:
        raise ValueError(f"{key}: {message}, got {list(value) if isinstance(value, tuple) else value}")
