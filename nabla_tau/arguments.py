"""What a caller gives, checked where it comes in: the error names the argument and its value."""

from __future__ import annotations

import math
import operator
from typing import Any

LARGEST_SEED = 2**63 - 1  # what a torch.Generator takes


def check_kind(value: Any, kind: type, name: str) -> None:
    """TypeError for what is no object of the class."""
    if not isinstance(value, kind):
        home = kind.__module__.removesuffix(".modules.module")
        raise TypeError(f"{name} must be a {home}.{kind.__name__}, got {type(value).__name__}")


def whole(value: Any, name: str, *, least: int = 0, most: int | None = None) -> int:
    """The value as an int. TypeError for anything but an integer (bool included), ValueError out of least ... most."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value}")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be a whole number, got {value!r}") from None
    if number < least or (most is not None and number > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {limits}, got {number}")
    return number


def positive(value: Any, name: str) -> float:
    """The value as a float. TypeError for what is no number, ValueError unless it is positive and finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {number}")
    return number


def check_seed(seed: Any) -> None:
    """TypeError and ValueError for what is no seed."""
    whole(seed, "seed", most=LARGEST_SEED)
