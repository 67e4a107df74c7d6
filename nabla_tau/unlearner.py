"""One unlearning step, for use inside one's own loop: `Unlearner`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nabla_tau.batch import (
    Batch,
    Forward,
    concatenate,
    tensors_of,
    to_device,
    uses_batch_statistics,
)
from nabla_tau.evaluation import SampleLoss, checked_losses, device_of
from nabla_tau.functional import has_loss
from nabla_tau.kernels.reference import compute_dtype
from nabla_tau.loss import as_target, check_gate, nabla_tau_terms
from nabla_tau.objective import QUANTILES, Gate, Target, Terms, mean_rank, objective
from nabla_tau.performance import Performance

HOLD_SAMPLES = 64  # forget samples that the running mean rank spans
MIXED = "one mixed forward and backward"


class StepMetrics(NamedTuple):
    """What one step did, 0-d tensors on the model's device: reading them is what makes the host wait, not the step.

    `forget_scale` is the factor on the forget gradient (1 where gradients are not balanced).
    """

    loss: Tensor
    forget_loss: Tensor
    retain_loss: Tensor
    gate_open: Tensor
    forget_scale: Tensor


class Unlearner:
    """nabla-tau steps on a model of one's own, in a loop of one's own.

        unlearner = Unlearner(model, alpha=.25, tau=2.3)
        metrics = unlearner.step((x_forget, y_forget), (x_retain, y_retain))

    model: any module; it is used as it stands (put it in eval mode to freeze norm statistics) and updated in place.
    alpha: weight of the ascent in [0, 1]. tau: mean held-out loss, or the 1-D tensor of held-out losses; may be set
    later with `set_tau`. gate, power: as in `nabla_tau.objective.objective`. balance: None steps on the gradient of
    alpha * gate + (1 - alpha) * retain; a number c keeps the two parts' gradients apart and scales the forget part to
    at most c times the norm of the retain part, g = g_r + min(1, c |g_r| / |g_f|) g_f. hold: leave the forget part out
    while the running mean rank of the forget losses among the held-out losses is 0.5 or more. optimizer: default AdamW
    over the trainable parameters with `learning_rate` and weight decay 0.01. forward: (model, batch) -> (logits,
    targets). loss: (logits, targets) -> per-sample losses [B], instead of the cross-entropies. performance: "auto", or
    "off" to run the model just as it is (`nabla_tau.performance` says what "auto" does).

    Forget and retain samples go through the model as one batch where that is exact. It is not where BatchNorm uses
    batch statistics, where the two batches cannot be concatenated, or where the first batch shows that samples
    influence each other; then there are two forwards, and `forwards` says so and why.

    Raises ValueError for a model without trainable parameters and for settings out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float,
        tau: float | Tensor | None = None,
        gate: Gate = "batch",
        power: int = 2,
        balance: float | None = None,
        hold: bool = False,
        learning_rate: float = 1e-3,
        optimizer: torch.optim.Optimizer | None = None,
        forward: Forward | None = None,
        loss: SampleLoss | None = None,
        performance: str = "auto",
    ) -> None:
        check_gate(gate, power)
        if balance is not None and not balance > 0:
            raise ValueError(f"balance must be positive or None, got {balance}")
        if hold and gate != "quantile":
            raise ValueError(f'hold=True needs gate="quantile", got {gate!r}')
        self.parameters = trainable_parameters(model)
        self.model = model
        self.device = device_of(model)
        self.gate: Gate = gate
        self.power = power
        self.balance = balance
        self.hold = hold
        self.optimizer = optimizer or default_optimizer(self.parameters, learning_rate)
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not known & {id(p) for p in self.parameters}:
            raise ValueError("the optimizer holds no trainable parameter of this model")
        self.forwards = "not chosen yet"
        self._modes: list[bool] = []  # of the modules, when `forwards` was chosen
        self.performance = Performance(model, forward, performance)
        self._forward = self.performance.forward
        self._loss = loss
        dtype = compute_dtype(self.parameters[0])
        self._alpha = torch.zeros((), dtype=dtype, device=self.device)
        self._tau = torch.zeros((), dtype=dtype, device=self.device)
        self._quantiles = torch.zeros(QUANTILES, dtype=dtype, device=self.device)
        self._rank = torch.full((), torch.nan, dtype=dtype, device=self.device)
        self._has_tau = self._has_quantiles = False
        self.set_alpha(alpha)
        if tau is not None:
            self.set_tau(tau)

    def set_alpha(self, alpha: float) -> None:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1], got {alpha}")
        self._alpha.fill_(alpha)

    def set_tau(self, tau: float | Tensor | Target) -> None:
        """Mean held-out loss, the 1-D tensor of held-out losses, or a `Target`."""
        target = as_target(tau, self.gate, like=self._tau)
        self._tau.copy_(target.mean)
        self._has_tau, self._has_quantiles = True, target.quantiles is not None
        if target.quantiles is not None:
            self._quantiles.copy_(target.quantiles)

    @property
    def tau(self) -> Tensor:
        return self._tau

    @property
    def alpha(self) -> Tensor:
        return self._alpha

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def step(self, forget_batch: Batch, retain_batch: Batch) -> StepMetrics:
        """One update. Raises ValueError where tau is not set or a batch does not fit the model's logits."""
        if not self._has_tau:
            raise ValueError("tau is not set: pass tau= or call set_tau with the held-out losses before the first step")
        forget, retain = to_device(forget_batch, self.device), to_device(retain_batch, self.device)
        modes = [module.training for module in self.model.modules()]
        if modes != self._modes:
            self._modes = modes
            self.forwards = self._choose_forwards(forget, retain)
            self.performance.look(retain)
        self.optimizer.zero_grad(set_to_none=True)
        with self.performance.active():
            if self.balance is None:
                terms = self._mixed_terms(forget, retain)
                terms.total.backward()  # type: ignore[no-untyped-call]
                metrics = self._metrics(terms, torch.ones_like(terms.total))
            else:
                metrics = self._balanced_backward(forget, retain, self.balance)
        self.optimizer.step()
        return metrics

    def _target(self, like: Tensor) -> Target:
        return Target(self._tau.to(like), self._quantiles.to(like) if self._has_quantiles else None)

    def _mixed_terms(self, forget: Batch, retain: Batch) -> Terms:
        """The objective of both groups; by the fused loss where one forward serves both and nothing is held."""
        fused = self.forwards == MIXED and self._loss is None and not self.hold
        mixed = concatenate(forget, retain) if fused else None
        if mixed is None:
            return self._terms(*self._losses(forget, retain))
        logits, targets = self._forward(self.model, mixed)
        mask = torch.arange(len(targets), device=targets.device) < len(tensors_of(forget)[0])
        target = self._target(self._tau)
        return nabla_tau_terms(logits, targets, mask, tau=target, alpha=self._alpha, gate=self.gate, power=self.power)[
            0
        ]

    def _terms(self, losses: Tensor, forget_mask: Tensor, counts: Tensor) -> Terms:
        target = self._target(losses)
        weight = self._still_below(losses, forget_mask & counts, target.quantiles) if self.hold else 1.0
        return objective(
            losses,
            forget_mask,
            target,
            self._alpha.to(losses),
            gate=self.gate,
            power=self.power,
            forget_weight=weight,
            counts=counts,
        )

    def _still_below(self, losses: Tensor, forget_mask: Tensor, quantiles: Tensor | None) -> Tensor:
        """1 while the running mean rank of the forget losses is below 0.5, else 0. The mean spans about HOLD_SAMPLES
        samples, whatever the batch size."""
        assert quantiles is not None
        rank = mean_rank(losses, forget_mask, quantiles).to(self._rank)
        keep = (1 - forget_mask.sum() / HOLD_SAMPLES).clamp(min=0.5)
        running = torch.where(self._rank.isnan(), rank, keep * self._rank + (1 - keep) * rank)
        self._rank.copy_(torch.where(forget_mask.any(), running, self._rank))
        return (self._rank < 0.5).to(losses)

    @staticmethod
    def _metrics(terms: Terms, forget_scale: Tensor) -> StepMetrics:
        values = (terms.total, terms.forget_loss, terms.retain_loss, terms.gate_open, forget_scale)
        return StepMetrics(*(value.detach() for value in values))

    def _sample_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses [B] of a batch, and which of them count [B]."""
        logits, targets = self._forward(self.model, batch)
        losses = checked_losses(self._loss, logits, targets)
        counts = has_loss(targets) if self._loss is None else torch.ones_like(losses, dtype=torch.bool)
        return losses, counts

    def _losses(self, forget: Batch, retain: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of both groups, forget first, the forget mask, and which of them count."""
        mixed = concatenate(forget, retain) if self.forwards == MIXED else None
        if mixed is not None:
            losses, counts = self._sample_losses(mixed)
            forget_count = len(tensors_of(forget)[0])
        else:
            parts = self._sample_losses(forget), self._sample_losses(retain)
            losses, counts = (torch.cat(both) for both in zip(*parts, strict=True))
            forget_count = len(parts[0][0])
        return losses, torch.arange(len(losses), device=losses.device) < forget_count, counts

    def _balanced_backward(self, forget: Batch, retain: Batch, cap: float) -> StepMetrics:
        """Gradients of the two parts apart, the forget part scaled down to `cap` times the retain part's norm."""
        parts, gradients = [], []
        for batch, is_forget in ((forget, True), (retain, False)):
            losses, counts = self._sample_losses(batch)
            terms = self._terms(losses, torch.full_like(counts, is_forget), counts)
            gradients.append(self._gradient(terms.total))
            parts.append(terms)
        forget_part, retain_part = parts
        forget_norm, retain_norm = (_norm(part, like=forget_part.total) for part in gradients)
        tiny = torch.finfo(forget_norm.dtype).tiny
        scale = (cap * retain_norm / forget_norm.clamp(min=tiny)).clamp(max=1.0)
        for parameter, of_forget, of_retain in zip(self.parameters, *gradients, strict=True):
            # A parameter that the loss does not reach keeps no gradient, so that weight decay leaves it alone.
            if of_forget is None:
                parameter.grad = of_retain
            else:
                scaled = of_forget * scale.to(of_forget)
                parameter.grad = scaled if of_retain is None else of_retain.add_(scaled)
        terms = Terms(
            forget_part.total + retain_part.total,
            forget_part.forget_term,
            forget_part.forget_loss,
            retain_part.retain_loss,
            forget_part.gate_open,
        )
        return self._metrics(terms, scale)

    def _gradient(self, value: Tensor) -> list[Tensor | None]:
        # Looking at a value is free on the CPU: the backward of a closed or held gate is left out there.
        if value.device.type == "cpu" and value.item() == 0:
            return [None] * len(self.parameters)
        found = torch.autograd.grad(value, self.parameters, allow_unused=True)
        return [None if g is None else _laid_out_as(p, g) for p, g in zip(self.parameters, found, strict=True)]

    def _choose_forwards(self, forget: Batch, retain: Batch) -> str:
        """Whether one mixed forward is exact for this model and data, decided on two batches."""
        if self.balance is not None:
            return "two forwards and backwards: balanced gradients are kept apart"
        if (name := uses_batch_statistics(self.model)) is not None:
            return f"two forwards: {name} normalises with the statistics of its batch"
        mixed = concatenate(forget, retain)
        if mixed is None:
            return "two forwards: forget and retain batch cannot be concatenated"
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            apart = torch.cat((self._sample_losses(forget)[0], self._sample_losses(retain)[0]))
            together = self._sample_losses(mixed)[0]
            for buffer, before in zip(self.model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        # Other batch sizes take other kernels, so rounding differs; influence between samples is far larger.
        tolerance = 1e-3 if self.parameters[0].dtype in (torch.float32, torch.float64) else 5e-2
        if together.shape != apart.shape or not torch.allclose(
            together, apart, rtol=tolerance, atol=tolerance, equal_nan=True
        ):
            return "two forwards: samples influence each other's loss in this model, or it draws random numbers"
        return MIXED

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state, tau and alpha; the model's weights are the model's own state dict."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "alpha": self._alpha.clone(),
            "tau": self._tau.clone(),
            "quantiles": self._quantiles.clone(),
            "rank": self._rank.clone(),
            "has_tau": self._has_tau,
            "has_quantiles": self._has_quantiles,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self._alpha.copy_(state["alpha"])
        self._tau.copy_(state["tau"])
        self._quantiles.copy_(state["quantiles"])
        self._rank.copy_(state["rank"])
        self._has_tau, self._has_quantiles = state["has_tau"], state["has_quantiles"]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with requires_grad; ValueError where there is none."""
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError("the model has no trainable parameter (requires_grad is False everywhere)")
    return found


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the parameter's own strides, as backward() leaves it: fused optimizers walk over memory, and a
    channels_last gradient of a contiguous weight would reach the wrong numbers."""
    same = gradient.stride() == parameter.stride()
    return gradient if same else torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


def _norm(gradient: list[Tensor | None], *, like: Tensor) -> Tensor:
    found = [part for part in gradient if part is not None]
    return torch.stack(torch._foreach_norm(found)).norm().to(like) if found else torch.zeros_like(like)


def default_optimizer(parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW as published (weight decay 0.01), in its fused form where the device has one."""
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(parameters, lr=learning_rate, fused=fused)
