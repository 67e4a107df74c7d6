"""A model as it was before training: every module initialised anew."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def initialise(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Initialise modules and what is in them anew, in place, by their own `reset_parameters`, as their classes do
    (nn.MultiheadAttention by its `_reset_parameters`).

    Drawn by `generator` (a CPU generator); the global random state stays as it was. Raises ValueError, before anything
    is changed, for a parameter that no `reset_parameters` reaches: only its author knows how it is initialised.
    """
    found = [module for top in modules for module in top.modules()]
    resets = [(module, reset) for module in found if (reset := _reset_of(module)) is not None]
    reached = {id(tensor) for module, _ in resets for tensor in module.parameters()}
    for module in found:
        for name, tensor in module.named_parameters(recurse=False):
            if id(tensor) not in reached:
                raise ValueError(
                    f"parameter {name} of a {type(module).__name__}, shape {tuple(tensor.shape)}, has no "
                    "reset_parameters to initialise it by: give the class one"
                )
    devices = sorted({p.device.index or 0 for module, _ in resets for p in module.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        for _, reset in resets:
            reset()


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    if isinstance(module, nn.MultiheadAttention):
        return module._reset_parameters
    reset = getattr(module, "reset_parameters", None)
    return reset if callable(reset) else None


def layers_of(model: nn.Module) -> list[tuple[nn.Module, list[nn.Parameter]]]:
    """The modules that hold parameters of their own, in the order in which the model names them, with those."""
    return [(module, own) for module in model.modules() if (own := list(module.parameters(recurse=False)))]
