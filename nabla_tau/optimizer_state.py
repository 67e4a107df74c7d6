"""The optimizer of a run: what it has learned may come from a state dict, where and how it computes stays its own.

torch's `load_state_dict` takes both. The learning rate of a run on a GPU lies there, so that a step can be captured:
with its state an optimizer on the CPU would refuse to run, and with that of the CPU one on a GPU cannot be captured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

OWN = ("capturable", "fused", "foreach")


def can_be_fused(parameters: list[nn.Parameter]) -> bool:
    """Whether torch.optim has an AdamW of one kernel for them. It walks over memory, so it would write between the rows
    of a parameter that is a part of a larger tensor."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() and _is_dense(p) for p in parameters)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its entries lie side by side, in whatever order."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or reach + 1 == tensor.numel()


def default_optimizer(
    parameters: list[nn.Parameter], learning_rate: float, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """AdamW as published (weight decay 0.01)."""
    return adamw([(parameters, learning_rate)], capturable=capturable)


def adamw(
    groups: Iterable[tuple[list[nn.Parameter], float]], *, capturable: bool = False, **settings: Any
) -> torch.optim.Optimizer:
    """torch.optim.AdamW with a learning rate for each group, in its fused form where the device has one.

    capturable: with the learning rates on the device, so that a step can be captured. Fused AdamW takes them in
    float32, which would cost a float64 model digits: such a one keeps numbers.
    """
    groups = list(groups)
    parameters = [parameter for own, _ in groups for parameter in own]
    fused = can_be_fused(parameters)
    capturable = capturable and fused and not any(p.dtype == torch.float64 for p in parameters)

    def held(rate: float) -> float | Tensor:
        return torch.tensor(rate, dtype=torch.float32, device=parameters[0].device) if capturable else rate

    return torch.optim.AdamW(
        [{"params": own, "lr": held(rate)} for own, rate in groups], fused=fused, capturable=capturable, **settings
    )


def own_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Of each group where and how it computes, and the tensor that holds its learning rate, if one does."""
    return [
        {name: group[name] for name in OWN if name in group}
        | ({"lr": group["lr"]} if isinstance(group["lr"], Tensor) else {})
        for group in optimizer.param_groups
    ]


def set_learning_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # a graph reads it where it lies
    else:
        group["lr"] = rate


def load_state(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]], state: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict`, after which `own_options` are as they were: own."""
    rates = [float(group["lr"]) for group in state["param_groups"]]
    groups = [
        group | {"lr": rate} | {name: value for name, value in options.items() if name != "lr"}
        for group, rate, options in zip(state["param_groups"], rates, own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, rate, options in zip(optimizer.param_groups, rates, own, strict=True):
        group["lr"] = options.get("lr", rate)
        set_learning_rate(group, rate)
