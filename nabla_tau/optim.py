"""Optimizers that take the forget and the retain gradient apart and add them up while they update: one pass over the
parameters. `DualAdamW` and `DualSGD` are torch.optim.AdamW and SGD otherwise, down to their state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from nabla_tau._library_update import Rule, Updates
from nabla_tau._optim_checks import check_group, check_like, check_parameter, check_state, checked_number
from nabla_tau.kernels.update_reference import Noise, Products, Row, Settings

__all__ = ["Ball", "DualAdamW", "DualSGD", "Noise", "Products"]

Gradients: TypeAlias = Sequence[Tensor | None]


class Ball(NamedTuple):
    """All parameters together are to be within `radius` (a number or 0-d tensor) of `centres`, one a parameter."""

    centres: Sequence[Tensor]
    radius: float | Tensor


class _Dual(torch.optim.Optimizer):
    _rule: ClassVar[Rule]
    _state_names: ClassVar[tuple[str, ...]]

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        check_group(defaults, type(self).__name__)
        self._updates = Updates()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. TypeError for parameters that are not dense real floating point, ValueError for settings."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._adapt(self.param_groups[-1])

    def _check(self, group: dict[str, Any]) -> None:
        check_group(group, type(self).__name__)
        for number, parameter in enumerate(group["params"]):
            check_parameter(parameter, number)

    def _adapt(self, group: dict[str, Any]) -> None:
        """The group, which torch may have made, as it is used here."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._updates = Updates()
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._adapt(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State of this optimizer or of the one of torch that it is named after, and the other way round.

        `foreach`, `fused` and `capturable` choose between implementations of torch; here there is one, which can
        always be captured on a GPU, so they are kept for the way back (`capturable`: whether the parameters are on a
        GPU) and change nothing. `maximize` is honoured. Raises ValueError for `amsgrad`, for `differentiable`, and for
        state of other shapes; nothing is loaded then.
        """
        for group in state_dict["param_groups"]:
            check_group({**self.defaults, **group}, type(self).__name__)
        check_state(state_dict, self.param_groups, self._state_names)
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step on the `.grad` of the parameters, exactly that of torch.optim. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        gradients = check_like([p.grad for p in parameters], parameters, "grad")
        self._apply(parameters, None, gradients, None, 1.0, 1.0, None, None)
        return loss

    @torch.optim.Optimizer.profile_hook_step
    @torch.no_grad()
    def step_dual(
        self,
        forget: Gradients | None,
        retain: Gradients | None,
        forget_scale: float | Tensor = 1.0,
        retain_scale: float | Tensor = 1.0,
        *,
        project: bool = False,
        products: Products | None = None,
        mask: Gradients | None = None,
        noise: Noise | None = None,
        ball: Ball | None = None,
    ) -> Products | None:
        """One step on g = forget_scale * forget + retain_scale * retain, without making g.

        forget, retain: gradients of the parameters, in the order of the param groups, None where the loss does not
        reach one (of either: the parameter is left alone, as by torch), or None for all. The scales are numbers or 0-d
        tensors on the parameters' device, which the host does not read there. `.grad` is not looked at.

        project: where the gradients conflict, <forget, retain> < 0 over all parameters, take the forget gradient's
        part along the retain gradient out of it (PCGrad, Yu et al. 2020, arXiv 2001.06782, for the forget part alone).
        Returns the inner products it took: those of `products()`, which may be given if they are known.

        mask: bool tensors like the parameters, or None where all of one moves. Entries that are False keep value and
        state, and count for no inner product, noise or distance, as if they were frozen.

        noise: Gaussian noise of standard deviation noise.std on each entry of g (scales are applied before), the same
        for the same (seed, step) on any machine and at any number of threads, up to rounding.

        ball: after the step, all parameters p (those without gradient, too) are moved to
        c + (p - c) * min(1, radius / |p - c|), c the centres, with one norm over the whole model.

        Raises TypeError and ValueError for tensors of another shape, dtype or device, for sparse ones and for lists of
        another length; then nothing has been changed.
        """
        parameters = self._parameters()
        if not parameters:
            return None
        device = parameters[0].device
        forget, retain = check_like(forget, parameters, "forget"), check_like(retain, parameters, "retain")
        masks = check_like(mask, parameters, "mask", dtype=torch.bool)
        scales = checked_number(forget_scale, device, "forget_scale"), checked_number(retain_scale, device, "retain_scale")
        if noise is not None:
            noise = Noise(
                checked_number(noise.std, device, "noise.std", negative=False),
                checked_number(noise.seed, device, "noise.seed", integer=True),
                checked_number(noise.step, device, "noise.step", integer=True, negative=False),
            )
        if ball is not None:
            check_like(ball.centres, parameters, "ball.centres", required=True)
            ball = ball._replace(radius=checked_number(ball.radius, device, "ball.radius", negative=False))
        if products is not None and not project:
            raise ValueError("products are for project=True")
        if (project or ball is not None) and any(p.device != device for p in parameters):
            raise ValueError("project and ball need all parameters on one device")
        if project and products is None:
            products = self._products(parameters, forget, retain, masks)
        self._opt_called = True  # what learning rate schedulers look at
        self._apply(parameters, forget, retain, masks, *scales, products, noise)
        if ball is not None:
            rows = [
                Row(p, number, mask=m, centre=c)
                for number, (p, m, c) in enumerate(zip(parameters, masks, ball.centres, strict=True))
            ]
            self._updates.into_ball(rows, ball.radius)
        return products

    def products(
        self, forget: Gradients | None, retain: Gradients | None, *, mask: Gradients | None = None
    ) -> Products:
        """Inner products of two gradients over all parameters, in one pass: their cosine, and `balance`.

        Arguments and errors as of `step_dual`. The same bits at any number of threads.
        """
        parameters = self._parameters()
        if any(p.device != parameters[0].device for p in parameters):
            raise ValueError("products need all parameters on one device")
        return self._products(
            parameters,
            check_like(forget, parameters, "forget"),
            check_like(retain, parameters, "retain"),
            check_like(mask, parameters, "mask", dtype=torch.bool),
        )

    def _products(
        self, parameters: Sequence[Tensor], forget: Gradients, retain: Gradients, masks: Gradients
    ) -> Products:
        parts = zip(parameters, forget, retain, masks, strict=True)
        return self._updates.products([Row(p, number, f, r, m) for number, (p, f, r, m) in enumerate(parts)])

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _apply(
        self,
        parameters: Sequence[Tensor],
        forget: Gradients | None,
        retain: Gradients,
        masks: Gradients | None,
        forget_scale: float | Tensor,
        retain_scale: float | Tensor,
        products: Products | None,
        noise: Noise | None,
    ) -> None:
        rows: list[Row] = []
        settings: list[Settings] = []
        number = 0
        for group in self.param_groups:
            of_group = self._settings(group)
            for p in group["params"]:
                f, r = forget and forget[number], retain[number]
                if f is not None or r is not None:
                    row, own = self._row(p, number, of_group)
                    rows.append(row._replace(forget=f, retain=r, mask=masks and masks[number]))
                    settings.append(own)
                number += 1
        self._updates.step(self._rule, rows, settings, forget_scale, retain_scale, products, noise)

    def _settings(self, group: dict[str, Any]) -> Settings:
        raise NotImplementedError

    def _row(self, parameter: Tensor, number: int, settings: Settings) -> tuple[Row, Settings]:
        """The parameter with its state, which is made where there is none."""
        raise NotImplementedError


def _rate(group: dict[str, Any]) -> float | Tensor:
    rate = group["lr"]
    if not isinstance(rate, Tensor) or rate.device.type == "cpu":
        return float(rate)
    if rate.dtype != torch.float32:
        raise TypeError(f"a learning rate on the device must be float32, got {rate.dtype}")
    return rate


class DualAdamW(_Dual):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) that also takes two gradients, with `step_dual`.

    params: as of torch.optim.AdamW, with groups that may have an lr (also a tensor), betas, eps and weight_decay of
    their own. `step` is that of torch.optim.AdamW, and the state dicts are interchangeable. The state has the
    parameters' dtype; float16 and bfloat16 are computed in float32. Raises ValueError for `amsgrad` and for settings
    out of range, TypeError for complex, integer or distributed parameters.
    """

    _rule = "adamw"
    _state_names = ("exp_avg", "exp_avg_sq")

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
        return Settings(_rate(group), float(group["weight_decay"]), sign, *group["betas"], float(group["eps"]))

    def _row(self, parameter: Tensor, number: int, settings: Settings) -> tuple[Row, Settings]:
        state = self.state[parameter]
        if not state:
            device = parameter.device if parameter.is_cuda else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in self._state_names:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        first, second = state["exp_avg"], state["exp_avg_sq"]
        if not first.dtype == second.dtype == parameter.dtype:
            raise TypeError(f"the state of parameter {number} is {first.dtype}, the parameter {parameter.dtype}")
        return Row(parameter, number, first=first, second=second, step=state["step"]), settings


class DualSGD(_Dual):
    """SGD with momentum that also takes two gradients, with `step_dual`; otherwise torch.optim.SGD.

    Arguments as of torch.optim.SGD; state dicts are interchangeable with it. Errors as of `DualAdamW`.
    """

    _rule = "sgd"
    _state_names = ("momentum_buffer",)

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

    def _row(self, parameter: Tensor, number: int, settings: Settings) -> tuple[Row, Settings]:
        if settings.momentum == 0:
            return Row(parameter, number), settings
        state = self.state[parameter]
        buffer = state.get("momentum_buffer")
        if buffer is None:
            # The first buffer is the gradient itself.
            state["momentum_buffer"] = buffer = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            settings = settings._replace(dampening=0.0)
        if buffer.dtype != parameter.dtype:
            raise TypeError(f"the state of parameter {number} is {buffer.dtype}, the parameter {parameter.dtype}")
        return Row(parameter, number, first=buffer), settings
