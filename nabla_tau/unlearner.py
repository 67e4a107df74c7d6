"""One unlearning step, for use inside one's own loop: `Unlearner`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nabla_tau.accumulation import Accumulation, add_terms, cut_in_step
from nabla_tau.arguments import check_kind, numbers_checked, share, whole
from nabla_tau.batch import (
    Batch,
    Forward,
    concatenate,
    default_forward,
    sample_count,
    split_targets,
    to_device,
    uses_batch_statistics,
    without_trace,
)
from nabla_tau.cuda_graph import CudaRecorder
from nabla_tau.distributed import ProcessGroup, ranks_of
from nabla_tau.evaluation import SampleLoss, checked_losses, device_of
from nabla_tau.functional import has_loss
from nabla_tau.kernels.reference import compute_dtype
from nabla_tau.loss import as_target, check_gate, nabla_tau_terms
from nabla_tau.objective import QUANTILES, Gate, Target, Terms, mean_rank, objective
from nabla_tau.optimizer_state import default_optimizer, load_state, own_options, set_learning_rate
from nabla_tau.performance import Performance
from nabla_tau.step_graph import StepGraphs, refusal

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
    targets). loss: (logits, targets) -> per-sample losses [B], instead of the cross-entropies.

    Forget and retain samples go through the model as one batch where that is exact. It is not where BatchNorm uses
    batch statistics, where the two batches cannot be concatenated, or where the first batch shows that samples
    influence each other; then there are two forwards, and `forwards` says so and why.

    micro_batch_size: samples that go through the model at once on this process; the step stays that of the whole
    batches, whatever the gate. It costs nothing but for gate="quantile", and for a `forward` of one's own without a
    `loss` and without `balance`, which tells only afterwards which samples count: there the forget samples go through
    the model once more, without gradient. Batches must then have one entry a sample everywhere.

    performance: "auto" does what is faster and the same but for rounding (`nabla_tau.performance`); "off" runs the
    model as it is. On a GPU steps are captured in CUDA graphs: from some step on `forward`, `loss` and the model's own
    code are not called any more, what they did is replayed (`step_graph` says whether). An optimizer of one's own is
    captured where it is made for it: capturable=True, and as lr a tensor on the device.

    process_group: with a model in DistributedDataParallel, or to which fully_shard was applied, every rank calls `step`
    with its part of both batches (of any size, also none: tensors of 0 rows), and the step is that of the union. With
    a plain model in several processes say torch.distributed.group.WORLD for the same (the gradients are summed over
    the ranks), or None where each process is to work alone. All ranks must give the same settings and tau.

    Raises ValueError for a model without trainable parameters and for settings out of range, and for
    a plain model in several processes of which nothing is said.
    """

    @numbers_checked
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
        micro_batch_size: int | None = None,
        process_group: ProcessGroup | Literal["auto"] | None = "auto",
        performance: str = "auto",
    ) -> None:
        check_gate(gate, power)
        if micro_batch_size is not None:
            whole(micro_batch_size, "micro_batch_size", least=1)
        if balance is not None and not balance > 0:
            raise ValueError(f"balance must be positive or None, got {balance}")
        if hold and gate != "quantile":
            raise ValueError(f'hold=True needs gate="quantile", got {gate!r}')
        self.parameters = trainable_parameters(model)
        self.model = model
        self.ranks = ranks_of(model, process_group)
        self.micro_batch_size = micro_batch_size
        self.device = device_of(model)
        self.gate: Gate = gate
        self.power = power
        self.balance = balance
        self.hold = hold
        refused = refusal(
            self.parameters,
            self.device,
            performance=performance,
            ranks=self.ranks,
            micro_batch_size=micro_batch_size,
        )
        self.optimizer = optimizer or default_optimizer(self.parameters, learning_rate, capturable=refused is None)
        check_kind(self.optimizer, torch.optim.Optimizer, "optimizer")
        known = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not known & {id(p) for p in self.parameters}:
            raise ValueError("the optimizer holds no trainable parameter of this model")
        self.forwards = "not chosen yet"
        self._modes: list[bool] = []  # of the modules, when `forwards` was chosen
        self.performance = Performance(model, forward, performance)
        self._forward = self.performance.forward
        self._is_own_forward = forward not in (None, default_forward)
        self._loss = loss
        dtype = compute_dtype(self.parameters[0])
        self._alpha = torch.zeros((), dtype=dtype, device=self.device)
        self._tau = torch.zeros((), dtype=dtype, device=self.device)
        self._quantiles = torch.zeros(QUANTILES, dtype=dtype, device=self.device)
        self._rank = torch.full((), torch.nan, dtype=dtype, device=self.device)
        self._has_tau = self._has_quantiles = False
        # On the CPU, where looking is free; not where norms learn from every batch, which must see the forget samples.
        self._may_look = False
        self._gate_closed = False  # in the last step, so that this one looks before it computes an ascent
        self.ascents_saved = 0  # steps whose forget samples had no backward, because the gate was closed
        self._graphs = StepGraphs(
            self._update,
            model,
            self.optimizer,
            refused=refused,
            recorder=lambda: CudaRecorder(self.device),
            settings=lambda: (self.gate, self.power, self.balance, self.hold, self.forwards, self._has_quantiles),
        )
        self._own_options = own_options(self.optimizer)
        self.set_alpha(alpha)
        if tau is not None:
            self.set_tau(tau)

    def set_alpha(self, alpha: float) -> None:
        """Weight of the ascent from the next step on; ValueError outside [0, 1]."""
        self._alpha.fill_(share(alpha, "alpha"))

    def set_tau(self, tau: float | Tensor | Target) -> None:
        """Mean held-out loss, the 1-D tensor of held-out losses, or a `Target`."""
        target = as_target(tau, self.gate, like=self._tau)
        self._tau.copy_(target.mean)
        self._has_tau, self._has_quantiles = True, target.quantiles is not None
        if target.quantiles is not None:
            self._quantiles.copy_(target.quantiles)

    @property
    def tau(self) -> Tensor:
        """Mean held-out loss, 0-d on the model's device."""
        return self._tau

    @property
    def alpha(self) -> Tensor:
        """0-d on the model's device."""
        return self._alpha

    @property
    def learning_rate(self) -> float:
        """That of the optimizer's first group."""
        return float(self.optimizer.param_groups[0]["lr"])

    def set_learning_rate(self, learning_rate: float) -> None:
        """Of all groups, from the next step on."""
        for group in self.optimizer.param_groups:
            set_learning_rate(group, learning_rate)

    @property
    def step_graph(self) -> str:
        """Whether steps are replayed from CUDA graphs: "captured", or "eager: " and why (`nabla_tau.step_graph`)."""
        return self._graphs.said

    def step(self, forget_batch: Batch, retain_batch: Batch) -> StepMetrics:
        """One update. Raises ValueError where tau is not set or a batch does not fit the model's logits."""
        if not self._has_tau:
            raise ValueError("tau is not set: pass tau= or call set_tau with the held-out losses before the first step")
        forget, retain = to_device(forget_batch, self.device), to_device(retain_batch, self.device)
        modes = [module.training for module in self.model.modules()]
        if modes != self._modes:
            self._gate_closed = self._gate_closed and not self._modes  # as it was loaded, before the first step
            self._modes = modes
            self._may_look = (
                self.performance.mode == "auto"
                and self.device.type == "cpu"
                and self.ranks.parallel == "alone"
                and uses_batch_statistics(self.model) is None
            )
            self.performance.look(retain)
            self.forwards = self._choose_forwards(forget, retain)
        return StepMetrics(*self._graphs(forget, retain))

    def _update(self, forget: Batch, retain: Batch) -> tuple[Tensor, ...]:
        """The step itself: on a GPU a pure function of tensors, which may be captured and not be called again."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.performance.active():
            terms, forget_scale = self._accumulate(forget, retain)
        self._note_gate(terms.gate_open)
        self.optimizer.step()
        values = (terms.total, terms.forget_loss, terms.retain_loss, terms.gate_open, forget_scale)
        return tuple(value.detach() for value in values)

    def _note_gate(self, gate_open: Tensor) -> None:
        """Count the ascent that a closed gate saved, and say whether the next step looks before it computes one."""
        if not self._may_look:
            return
        closed = gate_open.item() == 0
        self.ascents_saved += closed and self._gate_closed
        self._gate_closed = closed

    def _accumulate(self, forget: Batch, retain: Batch) -> tuple[Terms, Tensor]:
        """The gradient of the step in the parameters' .grad; the objective's terms and the scale of its forget part."""
        whole = torch.ones_like(self._alpha)
        added_up = Accumulation(
            self.model,
            self.parameters,
            self.ranks,
            self._sample_losses,
            self._terms,
            gate=self.gate,
            alpha=self._alpha,
            look_first=self._gate_closed,
        )
        mixed = concatenate(forget, retain) if self.forwards == MIXED else None
        fits = mixed is not None and not (self.micro_batch_size and sample_count(mixed) > self.micro_batch_size)
        if self.forwards == MIXED and self.ranks.all(fits):
            if self.ranks.parallel == "alone" and self._loss is None and not self.hold:
                closed = self._closed_terms(forget) if self._gate_closed else None
                terms = self._fused_terms(*((mixed, sample_count(forget)) if closed is None else (retain, 0)))
                terms.total.backward()  # type: ignore[no-untyped-call]
                return terms if closed is None else add_terms(closed, terms), whole
            if not self._gate_closed:
                return added_up.mixed(mixed, sample_count(forget)), whole
        pieces = cut_in_step(forget, retain, self.micro_batch_size, self.ranks)
        if self.balance is not None:
            return added_up.balanced(*pieces, self.balance)
        return added_up.in_turn(*pieces, lambda: self._counted(retain)), whole

    def _target(self, like: Tensor) -> Target:
        return Target(self._tau.to(like), self._quantiles.to(like) if self._has_quantiles else None)

    def _closed_terms(self, forget: Batch) -> Terms | None:
        """The forget part of the objective where it is 0, so that nothing follows from it; None where it is not."""
        with torch.no_grad():
            losses, counts = self._sample_losses(forget)
            terms = self._terms(losses, torch.ones_like(counts), counts)
        return terms if terms.gate_open.item() == 0 else None

    def _fused_terms(self, mixed: Batch, forget_count: int) -> Terms:
        logits, targets = self._forward(self.model, mixed)
        mask = torch.arange(len(targets), device=targets.device) < forget_count
        target = self._target(self._tau)
        settings: dict[str, Any] = {"alpha": self._alpha, "gate": self.gate, "power": self.power}
        return nabla_tau_terms(logits, targets, mask, tau=target, **settings)[0]

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

    def _sample_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses [B] of a batch, and which of them count [B]."""
        logits, targets = self._forward(self.model, batch)
        losses = checked_losses(self._loss, logits, targets)
        counts = has_loss(targets) if self._loss is None else torch.ones_like(losses, dtype=torch.bool)
        return losses, counts

    def _counted(self, batch: Batch) -> Tensor | None:
        """How many samples of a batch count, 0-d; None where that is known only when its forward has given targets."""
        if self._loss is not None:
            return torch.full_like(self._alpha, sample_count(batch))
        if self._is_own_forward:
            return None
        return has_loss(split_targets(batch)[2]).sum()

    def _choose_forwards(self, forget: Batch, retain: Batch) -> str:
        """Whether one mixed forward is exact for this model and data, decided on two batches; the same on all ranks."""
        mixes = uses_batch_statistics(self.model)
        mixed = concatenate(forget, retain)
        size, ranks = self.micro_batch_size, self.ranks
        cut = not ranks.all(size is None or max(map(sample_count, (forget, retain))) <= size)
        if mixes is not None and (cut or ranks.size > 1):
            warnings.warn(
                f"{mixes} normalises with the statistics of what goes through the model at once, so the step is not "
                "that of one large batch: put the model in eval mode",
                stacklevel=3,
            )
        if self.balance is not None:
            return "two forwards and backwards: balanced gradients are kept apart"
        if cut:
            return f"micro-batches of at most {size} samples"
        if mixes is not None:
            return f"two forwards: {mixes} normalises with the statistics of its batch"
        if not ranks.all(mixed is not None):
            return "two forwards: forget and retain batch cannot be concatenated"
        if not ranks.all(self._can_be_mixed(forget, retain, mixed)):
            return "two forwards: samples influence each other's loss in this model, or it draws random numbers"
        return MIXED

    def _can_be_mixed(self, forget: Batch, retain: Batch, mixed: Batch) -> bool:
        """Whether one forward of both gives the losses of two. Three forwards on every rank, whatever it has."""
        parts = [batch if sample_count(batch) else mixed for batch in (forget, retain)]
        with without_trace(self.model), torch.no_grad():
            losses = [self._sample_losses(batch)[0] for batch in (*parts, mixed)]
        if any(part is mixed for part in parts):
            return True
        apart, together = torch.cat(losses[:2]), losses[2]
        # Other batch sizes take other kernels, so rounding differs; influence between samples is far larger.
        tolerance = 1e-3 if self.parameters[0].dtype in (torch.float32, torch.float64) else 5e-2
        return together.shape == apart.shape and torch.allclose(
            together, apart, rtol=tolerance, atol=tolerance, equal_nan=True
        )

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state, tau and alpha; the model's weights are the model's own state dict."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "alpha": self._alpha.clone(),
            "tau": self._tau.clone(),
            "quantiles": self._quantiles.clone(),
            "rank": self._rank.clone(),
            "has_tau": self._has_tau,
            "gate_closed": self._gate_closed,
            "ascents_saved": self.ascents_saved,
            "has_quantiles": self._has_quantiles,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        load_state(self.optimizer, self._own_options, state["optimizer"])
        self._alpha.copy_(state["alpha"])
        self._tau.copy_(state["tau"])
        self._quantiles.copy_(state["quantiles"])
        self._rank.copy_(state["rank"])
        self._has_tau, self._has_quantiles = state["has_tau"], state["has_quantiles"]
        self._gate_closed, self.ascents_saved = state["gate_closed"], state["ascents_saved"]


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters with requires_grad; ValueError where there is none, TypeError for what is no model."""
    check_kind(model, nn.Module, "model")
    found = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not found:
        raise ValueError("the model has no trainable parameter (requires_grad is False everywhere)")
    return found
