"""What the optimizers with two gradients share: the step, and the state of torch's optimizers (`optim.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from nabla_tau._library_update import Rule, Updates
from nabla_tau._optim_checks import check_group, check_like, check_parameter, check_state, checked_number
from nabla_tau.kernels.update_reference import Noise, Products, Row, Settings

Gradients: TypeAlias = Sequence[Tensor | None]
Given: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]  # forget, retain, mask


class Ball(NamedTuple):
    """All parameters together are to be within `radius` (a number or 0-d tensor) of `centres`, one a parameter."""

    centres: Sequence[Tensor]
    radius: float | Tensor


class Dual(torch.optim.Optimizer):
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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the `.grad` of the parameters, exactly that of torch.optim. Returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._parameters()
        gradients = check_like([p.grad for p in parameters], parameters, "grad")
        nothing: Gradients = [None] * len(parameters)
        self._apply(parameters, nothing, gradients, nothing, 1.0, 1.0, None, None)
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
        scales = (
            checked_number(forget_scale, device, "forget_scale"),
            checked_number(retain_scale, device, "retain_scale"),
        )
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
        forget: Gradients,
        retain: Gradients,
        masks: Gradients,
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
                f, r = forget[number], retain[number]
                if f is not None or r is not None:
                    row, own = self._row(p, number, (f, r, masks[number]), of_group)
                    rows.append(row)
                    settings.append(own)
                number += 1
        self._updates.step(self._rule, rows, settings, forget_scale, retain_scale, products, noise)

    def _settings(self, group: dict[str, Any]) -> Settings:
        raise NotImplementedError

    def _row(self, parameter: Tensor, number: int, given: Given, settings: Settings) -> tuple[Row, Settings]:
        """The parameter with its state, which is made where there is none."""
        raise NotImplementedError
