"""Optimizers that take the forget and the retain gradient apart and add them up while they update: one pass over the
parameters. `DualAdamW` and `DualSGD` are torch.optim.AdamW and SGD otherwise, down to their state dicts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from nabla_tau._dual import Ball, Dual, Given
from nabla_tau.arguments import numbers_checked
from nabla_tau.kernels.update_reference import Noise, Products, Row, Settings

__all__ = ["Ball", "DualAdamW", "DualSGD", "Noise", "Products"]


def _rate(group: dict[str, Any]) -> float | Tensor:
    rate = group["lr"]
    if not isinstance(rate, Tensor) or rate.device.type == "cpu":
        return float(rate)
    if rate.dtype != torch.float32:
        raise TypeError(f"a learning rate on the device must be float32, got {rate.dtype}")
    return rate


class DualAdamW(Dual):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) that also takes two gradients, with `step_dual`.

    params: as of torch.optim.AdamW, with groups that may have an lr (also a tensor), betas, eps and weight_decay of
    their own. `step` is that of torch.optim.AdamW, and the state dicts are interchangeable. The state has the
    parameters' dtype; float16 and bfloat16 are computed in float32. Raises ValueError for `amsgrad` and for settings
    out of range, TypeError for complex, integer or distributed parameters.
    """

    _rule = "adamw"
    _state_names = ("exp_avg", "exp_avg_sq")

    @numbers_checked
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": None, "capturable": False, "differentiable": False, "fused": None,
            "decoupled_weight_decay": True,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _adapt(self, group: dict[str, Any]) -> None:
        group["betas"] = tuple(map(float, group["betas"]))
        # torch reads it as the place of the step count: on a GPU that is the device.
        group["capturable"] = all(p.is_cuda for p in group["params"])
        group["decoupled_weight_decay"] = True
        for p in group["params"]:
            state = self.state.get(p)
            if state:
                device = p.device if p.is_cuda else torch.device("cpu")
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)

    def _settings(self, group: dict[str, Any]) -> Settings:
        sign = -1.0 if group["maximize"] else 1.0
        beta1, beta2 = group["betas"]
        return Settings(_rate(group), float(group["weight_decay"]), sign, beta1, beta2, float(group["eps"]))

    def _row(self, parameter: Tensor, number: int, given: Given, settings: Settings) -> tuple[Row, Settings]:
        state = self.state[parameter]
        if not state:
            device = parameter.device if parameter.is_cuda else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in self._state_names:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if not first.dtype == second.dtype == parameter.dtype:
            raise TypeError(f"the state of parameter {number} is {first.dtype}, the parameter {parameter.dtype}")
        return Row(parameter, number, *given, first, second, state["step"]), settings


class DualSGD(Dual):
    """SGD with momentum that also takes two gradients, with `step_dual`; otherwise torch.optim.SGD.

    Arguments as of torch.optim.SGD; state dicts are interchangeable with it. Errors as of `DualAdamW`.
    """

    _rule = "sgd"
    _state_names = ("momentum_buffer",)

    @numbers_checked
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize, "foreach": None, "differentiable": False, "fused": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def _settings(self, group: dict[str, Any]) -> Settings:
        return Settings(
            _rate(group),
            float(group["weight_decay"]),
            -1.0 if group["maximize"] else 1.0,
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=float(group["nesterov"]),
        )

    def _row(self, parameter: Tensor, number: int, given: Given, settings: Settings) -> tuple[Row, Settings]:
        if settings.momentum == 0:
            return Row(parameter, number, *given), settings
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            # The first buffer is the gradient itself.
            state["momentum_buffer"] = buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            settings = settings._replace(dampening=0.0)
        if buffer.dtype != parameter.dtype:
            raise TypeError(f"the state of parameter {number} is {buffer.dtype}, the parameter {parameter.dtype}")
        return Row(parameter, number, *given, buffer), settings
