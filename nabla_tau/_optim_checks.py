"""What the optimizers refuse, all of it before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nabla_tau.arguments import as_number

# Of torch's param groups: what would change the result and has no counterpart here.
UNSUPPORTED = {
    "amsgrad": "the maximum of past second moments (amsgrad)",
    "differentiable": "a step that autograd can differentiate (differentiable)",
}


def check_group(group: Mapping[str, Any], kind: str) -> None:
    """Raise ValueError for settings of a param group that are out of range or that `kind` does not have."""
    for option, meaning in UNSUPPORTED.items():
        if group.get(option):
            raise ValueError(f"{kind} does not have {meaning}: {option} must be False")
    for name, least in {"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "momentum": 0.0}.items():
        if name in group and not as_number(group[name], name) >= least:
            raise ValueError(f"{name} must be {least:g} or more, got {group[name]}")
    for beta in group.get("betas", ()):
        if not 0 <= as_number(beta, "betas") < 1:
            raise ValueError(f"betas must be in [0, 1), got {group['betas']}")
    if group.get("nesterov") and (float(group["momentum"]) == 0 or group["dampening"] != 0):
        raise ValueError("nesterov needs a momentum, and dampening 0")
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
        raise ValueError(f"{kind} decays weights apart from the gradient: this is the state of torch.optim.Adam")


def _has_no_memory(tensor: Tensor) -> bool:
    # DTensor and other wrappers, whose addresses say nothing.
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_parameter(parameter: Tensor, number: int) -> None:
    """Raise TypeError unless it is an ordinary tensor of floating point numbers."""
    if not parameter.is_floating_point():
        raise TypeError(f"parameter {number} is {parameter.dtype}: only real floating point numbers can be optimized")
    if parameter.layout != torch.strided or _has_no_memory(parameter):
        raise TypeError(
            f"parameter {number} is a {type(parameter).__name__} of layout {parameter.layout}: "
            "only ordinary dense tensors can be optimized (of a DTensor, pass its local part)"
        )


def check_like(
    tensors: Sequence[Tensor | None] | None,
    parameters: Sequence[Tensor],
    name: str,
    *,
    dtype: torch.dtype | None = None,
    required: bool = False,
) -> Sequence[Tensor | None]:
    """The tensors, one a parameter, None where there is none; all None for None.

    TypeError or ValueError unless each is a dense tensor of its parameter's shape, device and dtype (or of `dtype`).
    """
    if tensors is None:
        return [None] * len(parameters)
    given: Any = tensors
    if isinstance(given, Tensor) or len(tensors) != len(parameters):
        count = "one tensor" if isinstance(given, Tensor) else f"{len(tensors)} entries"
        raise ValueError(f"{name} must have an entry for each of the {len(parameters)} parameters, got {count}")
    for number, (tensor, p) in enumerate(zip(tensors, parameters, strict=True)):
        if (
            type(tensor) is Tensor
            and tensor.shape == p.shape
            and tensor.dtype == (dtype or p.dtype)
            and tensor.device == p.device
            and tensor.layout == torch.strided
        ):
            continue
        if tensor is not None or required:
            _refuse(tensor, p, f"{name}[{number}]", dtype or p.dtype)
    return tensors


def _refuse(tensor: Tensor | None, p: Tensor, name: str, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided or _has_no_memory(tensor):
        raise TypeError(f"{name} must be an ordinary dense tensor, got layout {tensor.layout}, {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != p.shape:
        raise ValueError(f"{name} must have the shape {tuple(p.shape)} of its parameter, got {tuple(tensor.shape)}")
    if tensor.device != p.device:
        raise ValueError(f"{name} must be on {p.device} as its parameter is, got {tensor.device}")


def checked_number(
    value: float | Tensor, device: torch.device, name: str, *, integer: bool = False, negative: bool = True
) -> Any:
    """A number, or a 0-d tensor on the device; ValueError or TypeError for anything else."""
    if not isinstance(value, Tensor):
        number: Any = int(value) if integer else float(value)
        if number != value or (not negative and number < 0):
            # A NaN differs from itself.
            raise ValueError(
                f"{name} must be {'an integer' if integer else 'a number'}"
                f"{'' if negative else ', not negative'}, got {value}"
            )
        return number
    if value.ndim != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if value.dtype != torch.int64 if integer else not value.is_floating_point():
        raise TypeError(f"{name} must be {'int64' if integer else 'floating point'}, got {value.dtype}")
    if value.device != device:
        if value.device.type != "cpu":
            raise ValueError(f"{name} must be on {device} as the parameters are, got {value.device}")
        return value.item()
    return value.detach()


def check_state(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], tensors: Sequence[str]) -> None:
    """Raise ValueError where the state of a parameter does not have its shape."""
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    if len(saved) != len(parameters):
        return  # load_state_dict itself has a message for this
    for number, p in zip(saved, parameters, strict=True):
        for name in tensors:
            value = state_dict["state"].get(number, {}).get(name)
            if value is not None and value.shape != p.shape:
                raise ValueError(
                    f"{name} of parameter {number} must have its shape {tuple(p.shape)}, got {tuple(value.shape)}"
                )
