"""What a trainer that is not ours needs of nabla-tau: tau, alpha, and the weight that the gate gives to each loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nabla_tau.arguments import share
from nabla_tau.batch import Forward
from nabla_tau.distributed import Ranks
from nabla_tau.evaluation import SampleLoss, counting_losses, over_samples
from nabla_tau.loss import as_target, check_gate
from nabla_tau.objective import Gate, Target, Terms, objective, target_from_losses
from nabla_tau.sources import as_source


class Outputs(NamedTuple):
    """How samples' losses come from a model: `forward` and `loss` as of `nabla_tau.unlearn`."""

    forward: Forward
    loss: SampleLoss | None


class GatedLoss:
    """The objective of a step (`nabla_tau.objective.objective`) as weights on the losses of its samples, those of all
    processes. gate, power: as there. alpha: at the start; it falls linearly to alpha_end times that over the run."""

    def __init__(self, gate: Gate, power: int, alpha: float, alpha_end: float) -> None:
        check_gate(gate, power)
        share(alpha, "alpha")
        share(alpha_end, "alpha_end")
        self.gate: Gate = gate
        self.power, self.alpha_start, self.alpha_end, self.alpha = power, alpha, alpha_end, alpha
        self.target: Target | None = None
        self.ranks = Ranks()

    def join(self, device: torch.device) -> None:
        """Work with all processes of torch.distributed, where it runs: each must call this."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.ranks = Ranks("plain", range(dist.get_world_size()), device)

    def at(self, step: int, steps: int) -> None:
        """Set alpha for a step of 0 .. steps - 1."""
        self.alpha = self.alpha_start * (1 + (self.alpha_end - 1) * step / max(steps, 1))

    def measure(self, model: nn.Module, held_out: Any, outputs: Outputs) -> None:
        """Set tau to the losses of held-out data, of which each process looks at a share."""
        source = as_source(held_out, "held_out")
        losses, counts = over_samples(
            model,
            lambda share: source.read(64, share=share),
            lambda *output: counting_losses(outputs.loss, *output),
            forward=outputs.forward,
            ranks=self.ranks,
        )
        self.target = target_from_losses(losses[counts])

    def weigh(self, losses: Tensor, forget: Tensor, counts: Tensor) -> tuple[Tensor, Terms]:
        """The derivative of the objective of all processes' samples with respect to this one's losses [N], and its
        terms; forget and counts [N] bool. It does not depend on the values of retained losses."""
        columns = torch.stack([losses, forget.to(losses), counts.to(losses)], 1)
        rows, own = self.ranks.gather(columns)
        leaf, is_forget, does_count = (column.contiguous() for column in rows.T)
        leaf.requires_grad_()
        if self.target is None:
            raise ValueError("tau has not been measured: is the callback in the trainer's list?")
        target = as_target(self.target, self.gate, like=losses)
        with torch.enable_grad():
            terms = objective(
                leaf, is_forget > 0, target, self.alpha, gate=self.gate, power=self.power, counts=does_count > 0
            )
            (weights,) = torch.autograd.grad(terms.total, leaf)
        return weights[own], Terms(*(value.detach() for value in terms))

    def mean(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Mean over all processes of losses [n] that count [n]."""
        sums = torch.stack([torch.stack([losses[counts].sum(), counts.sum().to(losses)]) for losses, counts in parts])
        total, number = self.ranks.total(sums.sum(0)).unbind()
        return total / number.clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        """tau as numbers that JSON holds without loss; empty where it has not been measured."""
        if self.target is None:
            return {}
        mean, quantiles = self.target
        assert quantiles is not None
        return {"tau": mean.item(), "quantiles": quantiles.tolist(), "dtype": str(mean.dtype)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        if state:
            like: dict[str, Any] = {"device": device, "dtype": getattr(torch, state["dtype"].removeprefix("torch."))}
            self.target = Target(torch.tensor(state["tau"], **like), torch.tensor(state["quantiles"], **like))
