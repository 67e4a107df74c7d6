"""The optimizer of a run: what it has learned may come from a state dict, where and how it computes stays its own.

torch's `load_state_dict` takes both. The learning rate of a run on a GPU lies there, so that a step can be captured:
with its state an optimizer on the CPU would refuse to run, and with that of the CPU one on a GPU cannot be captured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from nabla_tau._library_update import is_dense

OWN = ("capturable", "fused", "foreach")
_STATE = ("exp_avg", "exp_avg_sq", "step")  # of AdamW, of each parameter


def can_be_fused(parameters: list[nn.Parameter]) -> bool:
    """Whether torch.optim has an AdamW of one kernel for them. It walks over memory, so it would write between the rows
    of a parameter that is a part of a larger tensor."""
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() and is_dense(p) for p in parameters)


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


def hooks_of(optimizer: torch.optim.Optimizer) -> tuple[dict[int, Any], ...]:
    """Of its steps: its own, and those of all optimizers."""
    return (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    )


class _Group(NamedTuple):
    """The tensors of a parameter group, one a parameter, as the kernel takes them."""

    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    steps: list[Tensor]


class Stepper:
    """`optimizer.step()`, over and over. Of torch's fused AdamW on the CPU it calls the kernel itself, with the same
    numbers: what torch looks up anew in every step takes longer than to update a small model."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._state: Any = None  # the optimizer's, of which `_groups` are; None where torch takes the steps
        self._groups: list[_Group] = []
        self._steps: list[Tensor] = []  # those of all groups

    def __call__(self) -> None:
        optimizer = self._optimizer
        if optimizer.state is self._state and not any(hooks_of(optimizer)):
            gradients: list[list[Any]] = [[p.grad for p in group.parameters] for group in self._groups]
            if not any(gradient is None for of_group in gradients for gradient in of_group):
                self._update(gradients)
                return
        optimizer.step()
        self._keep()

    @torch.no_grad()
    def _update(self, gradients: list[list[Any]]) -> None:
        torch._foreach_add_(self._steps, 1)
        for group, own, of_group in zip(self._optimizer.param_groups, self._groups, gradients, strict=True):
            torch._fused_adamw_(
                own.parameters,
                of_group,
                own.first,
                own.second,
                [],
                own.steps,
                amsgrad=False,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _keep(self) -> None:
        optimizer, state = self._optimizer, self._optimizer.state
        self._state = None
        if type(optimizer) is not torch.optim.AdamW or not all(map(_is_one_kernel, optimizer.param_groups)):
            return
        if all(parameter in state for group in optimizer.param_groups for parameter in group["params"]):
            self._groups = [
                _Group(group["params"], *([state[p][name] for p in group["params"]] for name in _STATE))
                for group in optimizer.param_groups
            ]
            self._steps = [step for group in self._groups for step in group.steps]
            self._state = state


def _is_one_kernel(group: dict[str, Any]) -> bool:
    """Whether torch's fused AdamW takes the group on the CPU in one call."""
    plain = group["fused"] and not (group["amsgrad"] or group["maximize"] or isinstance(group["lr"], Tensor))
    alike = len({parameter.dtype for parameter in group["params"]}) == 1
    return plain and alike and all(type(p.data) is Tensor and p.device.type == "cpu" for p in group["params"])


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
