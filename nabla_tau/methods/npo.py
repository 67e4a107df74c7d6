"""NPO and SimNPO: an ascent that fades out as a sample's likelihood falls, against the original model's or as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from nabla_tau.batch import Batch
from nabla_tau.distributed import unwrapped
from nabla_tau.methods.grad_diff import Beside
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term
from nabla_tau.methods.tokens import losses_of, sample_sums, token_losses
from nabla_tau.reference import ReferenceFile
from nabla_tau.row_objectives import npo_values, sim_npo_values


@dataclass(frozen=True)
class NPO(Beside):
    """Negative preference optimisation (Zhang et al. 2024, arXiv 2404.05868):

        min -(2/beta) mean_f log sigmoid(-beta log(pi / pi_original)) + retain_weight mean_r l

    -log pi is the sum of the losses of a sample's tokens, mean_r that over tokens; in any task but sequences both are
    of the samples' losses. The original model's log pi are computed once, one number a sample, where no DataLoader
    decides what a batch holds; or read from `reference`, a file that `causal_lm.reference_losses` has written for this
    model and these samples, and that serves any number of runs. The sum of a long sample has soon grown by 1/beta,
    where the ascent fades, and that of a short one late; SimNPO is about that."""

    beta: float = 0.1
    reference: str | Path | None = field(default=None, repr=False)
    name: str = "npo"

    def _original(self, setup: Setup) -> Callable[[Batch, Tensor | None], Tensor]:
        """-log pi of the original model for a batch of forget samples and their numbers."""
        if self.reference is None:
            return setup.outputs("forget", lambda logits, targets: sample_sums(*losses_of(setup, logits, targets)))
        why = "the file knows samples by their number"
        setup.refuse("npo with a file of reference losses", loader=why, sharded_data=why)
        source = setup.source("forget")
        kept = ReferenceFile(Path(self.reference), unwrapped(setup.model), source).read()
        if len(kept) != source.count:
            raise ValueError(f"{self.reference} holds the reference losses of {len(kept)} of {source.count} samples")
        setup.say(teacher="outputs read from a file")

        def read(batch: Batch, numbers: Tensor | None) -> Tensor:
            assert numbers is not None
            return kept[numbers.cpu()].to(setup.device)

        return read

    def stages(self, setup: Setup) -> list[Stage]:
        original = self._original(setup)

        def forget_term(forget: Drawn) -> Term:
            def values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
                losses, counts = token_losses(setup, model, batch)
                reference = original(batch, forget.numbers)
                found = npo_values(sample_sums(losses, counts), reference, self.beta)
                return found, counts.any(1)

            return Term("forget_term", forget.batch, values)

        return [self.stage(setup, forget_term)]


@dataclass(frozen=True)
class SimNPO(Beside):
    """NPO without the original model, on losses that do not grow with a sample's length (Fan et al. 2024, arXiv
    2410.07163):

        min -(2/beta) forget_weight mean_f log sigmoid(beta (l - delta)) + retain_weight mean_r l

    l is the mean loss of a sample's tokens, in any task but sequences the sample's loss; mean_r that over tokens. Where
    a loss is above delta + 1/beta its ascent fades out, so at delta = 0 a sample that the model does not know is left
    alone."""

    beta: float = 4.5
    delta: float = 0.0
    forget_weight: float = 0.125
    name: str = "sim-npo"

    def stages(self, setup: Setup) -> list[Stage]:
        def values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            losses, counts = setup.losses(model, batch)
            return sim_npo_values(losses, self.beta, self.delta), counts

        return [self.stage(setup, lambda forget: Term("forget_term", forget.batch, values, self.forget_weight))]
