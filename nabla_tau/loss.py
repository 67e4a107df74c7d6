"""The loss for one's own training loop: `nabla_tau_loss` and `NablaTauLoss`."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from nabla_tau._library import RowOptions
from nabla_tau.arguments import as_number, check_kind, numbers_checked, share, whole
from nabla_tau.functional import checked_options, differentiable_signals, has_loss, infer_task
from nabla_tau.fused import fused_terms, serves
from nabla_tau.kernels.reference import IGNORE_INDEX, RowSignals
from nabla_tau.objective import GATES, QUANTILES, Gate, Target, Terms, objective, target_from_losses


def check_gate(gate: str, power: int) -> None:
    """Raise ValueError for an unknown gate or a power other than 1 and 2."""
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
    if whole(power, "power") not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power!r}")


def check_mixed(targets: Tensor, forget_mask: Tensor, alpha: float | Tensor, gate: str, power: int) -> None:
    """Raise TypeError or ValueError unless the mask is bool [B], one entry a sample, and the settings are in range."""
    check_gate(gate, power)
    check_kind(targets, Tensor, "targets")
    check_kind(forget_mask, Tensor, "forget_mask")
    if forget_mask.dtype != torch.bool:
        raise TypeError(f"forget_mask must be bool, got {forget_mask.dtype} of shape {tuple(forget_mask.shape)}")
    if forget_mask.shape != targets.shape[:1]:
        raise ValueError(
            f"forget_mask must be [{targets.shape[0] if targets.ndim else 0}], one entry a sample, "
            f"got {tuple(forget_mask.shape)}"
        )
    if not isinstance(alpha, Tensor):
        share(alpha, "alpha")
    elif alpha.ndim:
        raise ValueError(f"alpha must be a number, or a tensor of one without dimensions, got {tuple(alpha.shape)}")


def as_target(tau: float | Tensor | Target, gate: str, *, like: Tensor) -> Target:
    """Target of the gate from what a caller may give as tau; raises for what the gate cannot use."""
    if isinstance(tau, Target):
        quantiles = None if tau.quantiles is None else tau.quantiles.to(like)
        target = Target(tau.mean.to(like), quantiles)
    else:
        # Filled on the device: copying a number there would make the host wait.
        number = like.new_full((), tau) if isinstance(tau, float) and math.isfinite(tau) else None
        tensor = _checked_tau(tau).to(like) if number is None else number
        target = target_from_losses(tensor) if tensor.ndim == 1 else Target(tensor, None)
    if gate == "quantile" and target.quantiles is None:
        raise ValueError('gate="quantile" needs tau as a 1-D tensor of held-out losses, got a single number')
    return target


def as_mean(tau: float | Tensor | Target) -> float | Tensor:
    """tau itself, a number or 0-d, from what a caller may give as tau: all that the other gates need."""
    if isinstance(tau, Target):
        return tau.mean
    if isinstance(tau, float) and math.isfinite(tau):
        return tau
    tensor = _checked_tau(tau)
    return tensor.mean() if tensor.ndim == 1 else tensor


def _checked_tau(tau: float | Tensor) -> Tensor:
    # float64: a number must not lose digits that a float64 model has.
    if isinstance(tau, Tensor):
        tensor = tau.detach()
    else:
        tensor = torch.as_tensor(tau if np.ndim(tau) else as_number(tau, "tau"), dtype=torch.float64)
    if tensor.ndim > 1:
        raise ValueError(f"tau must be a number or the 1-D held-out losses, got shape {tuple(tensor.shape)}")
    if tensor.numel() == 0:
        raise ValueError("tau needs at least one held-out loss, got none")
    # Looking makes the host wait on a GPU, and breaks the graph of a compiler.
    looked_at = tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked_at and not (math.isfinite(tensor) if tensor.ndim == 0 else bool(tensor.isfinite().all())):
        raise ValueError(f"tau must be finite, got {tau}")
    return tensor if tensor.is_floating_point() else tensor.double()


def nabla_tau_loss(
    logits: Tensor,
    targets: Tensor,
    forget_mask: Tensor,
    *,
    tau: float | Tensor | Target,
    alpha: float | Tensor,
    gate: Gate = "batch",
    power: int = 2,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """nabla-tau loss of a mixed batch (Trippa et al. 2024, arXiv 2403.14339), a 0-d tensor to call `.backward()` on.

        alpha * relu(tau - mean_f)^2 + (1 - alpha) * mean_r

    logits and targets: [B, C] with integer [B]; [B, T, V] with integer [B, T] (a sample's loss is the mean over its
    tokens other than `ignore_index`); or multi-label [B, C] with floating [B, C]. forget_mask: [B] bool, True for
    the samples to forget. tau: mean loss of held-out data, measured as the forget samples are (same transforms,
    same norm mode), or the 1-D tensor of held-out losses themselves, which gate="quantile" needs. alpha: weight of
    the ascent in [0, 1]. gate and power: see `nabla_tau.objective.objective`. label_smoothing and class_weights [C]:
    those of torch.nn.functional.cross_entropy with reduction="none", for class labels; means are over samples.
    Differentiable once, in the logits.

    Raises TypeError for logits that are not floating point or a mask that is not bool, ValueError for shapes that do
    not fit, labels out of range, an unknown gate, or alpha outside [0, 1].
    """
    terms, _ = nabla_tau_terms(
        logits,
        targets,
        forget_mask,
        tau=tau,
        alpha=alpha,
        gate=gate,
        power=power,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
    )
    return terms.total


def nabla_tau_terms(
    logits: Tensor,
    targets: Tensor,
    forget_mask: Tensor,
    *,
    tau: float | Tensor | Target,
    alpha: float | Tensor,
    gate: Gate = "batch",
    power: int = 2,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> tuple[Terms, RowSignals]:
    """`nabla_tau_loss` with its parts, and the attack signals of each sample [B] from the same read of the logits.

    `Terms.total` is the loss and carries the gradient. Arguments and errors as in `nabla_tau_loss`.
    """
    check_mixed(targets, forget_mask, alpha, gate, power)
    whole(ignore_index, "ignore_index", least=None)
    task = infer_task(logits, targets)
    if task != "multilabel" and serves(logits, gate):
        options = RowOptions(ignore_index, label_smoothing, checked_options(logits, label_smoothing, class_weights))
        tau = as_mean(tau)
        return fused_terms(logits, targets, forget_mask, tau, alpha, gate=gate, power=power, options=options)
    signals = differentiable_signals(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, class_weights=class_weights
    )
    target = as_target(tau, gate, like=signals.loss)
    counts = has_loss(targets, ignore_index=ignore_index)
    return objective(signals.loss, forget_mask, target, alpha, gate=gate, power=power, counts=counts), signals


class NablaTauLoss(nn.Module):
    """`nabla_tau_loss` as a module: tau (and the held-out quantiles) and alpha are buffers, set by the loop.

        criterion = NablaTauLoss(tau=2.3, alpha=.25); loss = criterion(logits, targets, forget_mask)

    `set_tau` takes a number or the 1-D tensor of held-out losses; class_weights [C] are a buffer too. Arguments and
    errors as in `nabla_tau_loss`.
    """

    tau: Tensor
    quantiles: Tensor
    alpha: Tensor
    class_weights: Tensor | None

    @numbers_checked
    def __init__(
        self,
        *,
        tau: float | Tensor,
        alpha: float,
        gate: Gate = "batch",
        power: int = 2,
        ignore_index: int = IGNORE_INDEX,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        check_gate(gate, power)
        self.gate: Gate = gate
        self.power = power
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", class_weights)
        # float64, so that a float64 model loses nothing; the losses' own dtype decides in the end.
        self.register_buffer("tau", torch.zeros((), dtype=torch.float64))
        self.register_buffer("quantiles", torch.zeros(QUANTILES, dtype=torch.float64))
        self.register_buffer("alpha", torch.zeros((), dtype=torch.float64))
        self.set_tau(tau)
        self.set_alpha(alpha)

    def set_tau(self, tau: float | Tensor) -> None:
        """Mean held-out loss, or the 1-D tensor of held-out losses."""
        target = as_target(tau, self.gate, like=self.tau)
        self.tau.copy_(target.mean)
        if target.quantiles is not None:
            self.quantiles.copy_(target.quantiles)

    def set_alpha(self, alpha: float) -> None:
        """Weight of the ascent; ValueError outside [0, 1]."""
        self.alpha.fill_(share(alpha, "alpha"))

    def forward(self, logits: Tensor, targets: Tensor, forget_mask: Tensor) -> Tensor:
        return nabla_tau_loss(
            logits,
            targets,
            forget_mask,
            tau=Target(self.tau, self.quantiles),
            alpha=self.alpha,
            gate=self.gate,
            power=self.power,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_weights=self.class_weights,
        )

    def extra_repr(self) -> str:
        return f"gate={self.gate!r}, power={self.power}"
