"""What a caller gives, checked where it comes in: the error names the argument and its value."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, TypeVar

LARGEST_SEED = 2**63 - 1  # what a torch.Generator takes

F = TypeVar("F", bound=Callable[..., Any])


def check_kind(value: Any, kind: type, name: str) -> None:
    """TypeError for what is no object of the class."""
    if not isinstance(value, kind):
        home = kind.__module__.removesuffix(".modules.module")
        raise TypeError(f"{name} must be a {home}.{kind.__name__}, got {type(value).__name__}")


def as_number(value: Any, name: str) -> float:
    """The value as a float, NaN among them. TypeError for anything but one number (a bool or a text is none)."""
    found = _alone(value)
    if isinstance(found, bool) or not isinstance(found, Real):
        raise TypeError(f"{name} must be a number, got {_described(value)}")
    return float(found)


def whole(value: Any, name: str, *, least: int | None = 0, most: int | None = None) -> int:
    """The value as an int. TypeError for anything but one integer (bool included), ValueError out of least ... most."""
    found = _alone(value)
    if isinstance(found, bool) or not isinstance(found, Integral):
        raise TypeError(f"{name} must be a whole number, got {_described(value)}")
    found = int(found)
    if (least is not None and found < least) or (most is not None and found > most):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be {limits}, got {found}")
    return found


def positive(value: Any, name: str) -> float:
    """The value as a float. TypeError for what is no number, ValueError unless it is positive and finite."""
    found = as_number(value, name)
    if not 0 < found < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {found}")
    return found


def share(value: Any, name: str) -> float:
    """The value as a float. TypeError for what is no number, ValueError unless it is in [0, 1]."""
    found = as_number(value, name)
    if not 0 <= found <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {found}")
    return found


def check_seed(seed: Any) -> None:
    """TypeError and ValueError for what is no seed."""
    whole(seed, "seed", most=LARGEST_SEED)


_WHOLE, _NUMBER = ("int", "int | None"), ("float", "float | None")


def _check(annotation: Any, value: Any, name: str) -> None:
    if annotation not in _WHOLE + _NUMBER or (value is None and annotation.endswith("None")):
        return
    if annotation in _WHOLE:
        whole(value, name, least=None)
    elif math.isnan(as_number(value, name)):
        raise ValueError(f"{name} must be a number, got nan")


def check_fields(settings: Any) -> None:
    """What `numbers_checked` does, for the fields of a dataclass."""
    for field in dataclasses.fields(settings):
        _check(field.type, getattr(settings, field.name), f"{type(settings).__name__}: {field.name}")


def numbers_checked(function: F) -> F:
    """The function, which first looks at its arguments that are annotated int or float, or one of them or None:
    TypeError for anything but one number (an array, a text or a bool is none), ValueError for NaN. Their ranges are the
    function's own affair."""
    annotations = {name: p.annotation for name, p in inspect.signature(function).parameters.items()}

    @functools.wraps(function)
    def checked(*args: Any, **given: Any) -> Any:
        for name, value in (*zip(annotations, args, strict=False), *given.items()):
            _check(annotations.get(name), value, name)
        return function(*args, **given)

    return checked  # type: ignore[return-value]


def _alone(value: Any) -> Any:
    """The Python number that an array or a tensor without dimensions holds."""
    return value if isinstance(value, (int, float)) or getattr(value, "ndim", None) != 0 else value.item()


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return repr(value) if not shape else f"{type(value).__name__} of shape {tuple(shape)}"
