"""SCRUB and SCRUB+R: a student that leaves its teacher on the forget samples and stays with it on the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nabla_tau.batch import Batch
from nabla_tau.distributed import unwrapped
from nabla_tau.evaluation import counting_losses, over_samples
from nabla_tau.functional import has_loss
from nabla_tau.methods.distillation import divergence, matching, refuse_own_loss
from nabla_tau.methods.setup import Name, Setup
from nabla_tau.methods.stages import Drawn, Stage, Term


@dataclass(frozen=True)
class Scrub:
    """Epochs of max mean_f KL_T, in the first `max_epochs` of all, each followed by one of min mean_r (gamma l + alpha
    KL_T), with KL_T = T^2 KL(teacher || model), both softened by the temperature T, and the original model for a
    teacher (Kurmanji et al. 2023, arXiv 2302.09880). One Adam for both, whose learning rate falls to a tenth after each
    epoch of `lower_after`; train mode.

    The gradient of KL_T is 0 where both models agree, as at the start: where no normalisation layer or dropout parts
    them, weight decay does. With few steps in an epoch nothing is forgotten; with many, nothing bounds the ascent, and
    what is left of the model is for the other epochs to repair.
    """

    alpha: float = 0.5
    gamma: float = 1.0
    temperature: float = 4.0
    epochs: int = 10
    max_epochs: int = 3
    learning_rate: float = 5e-4
    lower_after: tuple[int, ...] = (5, 8, 9)
    decay: float = 5e-4
    forget_batch_size: int = 32
    batch_size: int = 128
    name: str = "scrub"

    def stages(self, setup: Setup) -> list[Stage]:
        refuse_own_loss(setup, self.name)
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        of_forget, of_retain = setup.outputs("forget"), setup.outputs("retain")
        forget_size = setup.batch_size("forget", self.forget_batch_size)
        retain_size = setup.batch_size("retain", self.batch_size)

        def leave(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [
                Term(
                    "forget_term",
                    forget.batch,
                    matching(setup, of_forget(forget.batch, forget.numbers), self.temperature),
                    -1.0,
                ),
            ]

        def stay(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            teacher = of_retain(retain.batch, retain.numbers)

            def values(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
                logits, targets = setup.forward(model, batch)
                losses, counts = counting_losses(None, logits, targets)
                return self.gamma * losses + self.alpha * divergence(teacher, logits, targets, self.temperature), counts

            return [Term("retain_term", retain.batch, values)]

        optimizer = partial(torch.optim.Adam, lr=self.learning_rate, weight_decay=self.decay)

        found: list[Stage] = []
        for epoch in range(self.epochs):
            lowered = 0.1 ** sum(epoch >= after for after in self.lower_after)
            common: dict[str, Any] = {"rate": lambda step, lowered=lowered: lowered, "training": True}
            if epoch < self.max_epochs:
                steps = setup.batches_per_pass("forget", forget_size)
                found.append(Stage(steps, leave, None if found else optimizer, forget=forget_size, **common))
            steps = setup.batches_per_pass("retain", retain_size)
            found.append(Stage(steps, stay, None if found else optimizer, retain=retain_size, **common))
        return found


@dataclass(frozen=True)
class ScrubR(Scrub):
    """SCRUB, and then back to the weights after that epoch whose error on the forget set is nearest to the error of the
    final model on held-out samples like it: of the forget set's classes, in its proportions (Kurmanji et al. 2023,
    arXiv 2302.09880). It is for privacy: an error that is too high tells an attacker as much as one that is too low.

    The weights after all epochs are kept on the host and in the checkpoint.
    """

    name: str = "scrub-r"

    def stages(self, setup: Setup) -> list[Stage]:
        setup.refuse(self.name, sharded_model="its weights are kept after every epoch")
        setup.classes(self.name)
        like_forget = class_shares(setup)
        settings = {field.name: getattr(self, field.name) for field in fields(Scrub)}
        found = Scrub(**settings).stages(setup)
        model, last = unwrapped(setup.model), Stage(0)

        def keep(stage: Stage, epoch: int) -> Callable[[int], None]:
            def after(step: int) -> None:
                if step == stage.steps - 1:
                    last.state[f"{epoch}"] = error(setup, "forget").cpu()
                    for name, tensor in model.state_dict().items():
                        last.state[f"{epoch} {name}"] = tensor.detach().cpu().clone()

            return after

        def rewind() -> None:
            wanted = error(setup, "held_out", like_forget).cpu()
            best = min(range(self.epochs), key=lambda epoch: float((last.state[f"{epoch}"] - wanted).abs()))
            model.load_state_dict({name: last.state[f"{best} {name}"] for name in model.state_dict()})
            setup.say(rewound_to_epoch=best + 1)

        for epoch, stage in enumerate(stage for stage in found if stage.retain):
            stage.after = keep(stage, epoch)
        last.begin = rewind
        return [*found, last]


def class_shares(setup: Setup) -> Tensor | None:
    """The share of each class in the forget set, [classes], where it differs from that in the held-out data, else None.

    Raises ValueError where no held-out sample is of a class of the forget set.
    """
    kind = setup.job.data.kind
    if kind.kind == "random subset" or kind.forget_share is None:
        return None
    shares = torch.as_tensor(kind.forget_share, device=setup.device)
    labels = _over(setup, "held_out", lambda logits, targets: (targets,))[0]
    asked = shares.nonzero().flatten()
    if not torch.isin(labels, asked).any():
        raise ValueError(
            f"scrub-r needs held-out samples of the classes of the forget set, {asked.tolist()[:10]}, and the held-out "
            f"data has classes {sorted(set(labels.tolist()))[:10]}"
        )
    return shares


def error(setup: Setup, name: Name, shares: Tensor | None = None) -> Tensor:
    """Share of the samples of a data set that the model gets wrong, 0-d; shares: with each class weighing as much."""
    wrong, counts, labels = _over(
        setup, name, lambda logits, targets: (logits.argmax(1) != targets, has_loss(targets), targets)
    )
    wrong, labels = wrong[counts].double(), labels[counts].long()
    if shares is None:
        return wrong.mean()
    known = labels < len(shares)
    wrong, labels = wrong[known], labels[known]
    weights = (shares / torch.bincount(labels, minlength=len(shares)).clamp(min=1))[labels]
    return (weights * wrong).sum() / weights.sum()


def _over(setup: Setup, name: Name, compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
    job, source = setup.job, setup.source(name)
    return over_samples(
        setup.model,
        lambda share: source.read(250, share=share),
        compute,
        forward=setup.forward_alone,
        ranks=job.ranks,
        sharded=job.sharded,
    )
