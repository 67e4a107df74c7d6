"""How useful a model is, and whether its forget set stands out: what is measured before and after every run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nabla_tau.batch import Forward
from nabla_tau.evaluation import counting_losses, over_samples
from nabla_tau.job import FORGET, HELD_OUT, RETAIN, Job
from nabla_tau.sources import Source, derive_seed

SAMPLES = 1_000  # of a data set, at most
TOLERATED = 0.01  # loss of held-out accuracy that is none
CAUSES = (
    "Likely causes: the held-out data was part of training, the forget data is augmented while the held-out data is "
    "not, or the model had never memorised the forget set"
)
STANDS_OUT = 0.02  # distance from 0.5 of the AUC of the loss attack that is none


@dataclass(frozen=True)
class Usefulness:
    """On held-out samples. name: "accuracy" of a classifier, without samples of classes that are removed, or "loss",
    which is then negative: more is better. error: standard error of the mean."""

    name: str
    mean: float
    error: float

    def to_dict(self, when: str) -> dict[str, float]:
        """For the record; a loss as what it is."""
        sign = 1 if self.name == "accuracy" else -1
        return {f"held_out_{self.name}_{when}": sign * self.mean, f"held_out_{self.name}_error": self.error}

    def reaches(self, wanted: Usefulness) -> bool:
        """Whether it is as good, but for chance."""
        slack = TOLERATED if self.name == "accuracy" else 0.0
        return not self.mean < wanted.mean - max(slack, wanted.error)


class _Seen(NamedTuple):
    """Of samples that were looked at: losses [N] and which count, scores [M] of what `Usefulness` is the mean of."""

    losses: Tensor
    scores: Tensor


def usefulness(job: Job, forward: Forward | None) -> Usefulness:
    """Of the job's model as it is now, in eval mode; the same on all ranks."""
    return _usefulness(job, _look(job, job.data.held_out, HELD_OUT, forward))


def fit(job: Job, forward: Forward | None) -> Usefulness:
    """As `usefulness`, on retained samples."""
    return _usefulness(job, _look(job, job.data.retain, RETAIN, forward))


def measure(job: Job, forward: Forward | None, when: str) -> dict[str, float]:
    """What the record says of the job's model "before" or "after": mean loss of the forget samples, `Usefulness`, and,
    where forget and held-out samples are of the same kind (`classes.py`), the AUC at which the loss attack tells them
    apart (Yeom et al. 2018, arXiv 1709.01604), with its standard error where there is nothing to tell."""
    forget = _look(job, job.data.forget, FORGET, forward)
    held_out = _look(job, job.data.held_out, HELD_OUT, forward)
    useful = _usefulness(job, held_out)
    found = {
        f"forget_loss_{when}": float(forget.losses.mean()),
        **useful.to_dict(when),
    }
    if job.data.kind.kind == "random subset":
        found[f"attack_auc_{when}"] = _auc(forget.losses, held_out.losses)
        n, m = len(forget.losses), len(held_out.losses)
        found["attack_auc_error"] = math.sqrt((n + m + 1) / (12 * n * m))
    return found


def _look(job: Job, source: Source, role: int, forward: Forward | None) -> _Seen:
    if role not in job.looks:
        job.looks[role] = _looked(job, source, role, forward)
    found: _Seen = job.looks[role]
    return found


def _looked(job: Job, source: Source, role: int, forward: Forward | None) -> _Seen:
    is_classifier = job.data.task == "classification"
    removed = torch.tensor(job.data.kind.removed)

    def values(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        losses, counts = counting_losses(job.loss, logits, targets)
        if not is_classifier:
            return losses.double(), counts, -losses.double(), counts
        scored = counts & ~torch.isin(targets, removed.to(targets))
        return losses.double(), counts, (logits.argmax(1) == targets).double(), scored

    (samples,) = job.batch_sizes(SAMPLES)
    losses, counts, scores, scored = over_samples(
        job.model,
        lambda share: source.sample(samples, 250, derive_seed(job.seed, role), share),
        values,
        forward=forward,
        ranks=job.ranks,
        sharded=job.sharded,
    )
    return _Seen(losses[counts], scores[scored])


def _usefulness(job: Job, seen: _Seen) -> Usefulness:
    name = "accuracy" if job.data.task == "classification" else "loss"
    if not len(seen.scores):  # of removed classes alone
        return Usefulness(name, math.nan, math.nan)
    return Usefulness(name, float(seen.scores.mean()), float(seen.scores.std(correction=0)) / len(seen.scores) ** 0.5)


def _auc(forget: Tensor, held_out: Tensor) -> float:
    """Probability that a forget loss is below a held-out loss, ties a half."""
    ordered = held_out.sort().values
    ranks = torch.searchsorted(ordered, forget) + torch.searchsorted(ordered, forget, right=True)
    return 1 - float(ranks.double().mean()) / (2 * len(ordered))


def missed(measured: Mapping[str, float]) -> str | None:
    """What of the original's usefulness a run has not got back (`Usefulness.reaches`), from its `measure`s."""
    name = "accuracy" if "held_out_accuracy_after" in measured else "loss"
    sign = 1 if name == "accuracy" else -1
    before, after, error = (measured[f"held_out_{name}_{when}"] for when in ("before", "after", "error"))
    if Usefulness(name, sign * after, error).reaches(Usefulness(name, sign * before, error)):
        return None
    return f"held-out {name} is {after:.3f}, and was {before:.3f} (standard error {error:.3f})"


def has_learned(original: Usefulness, untrained: Usefulness) -> bool:
    """Whether the original's usefulness is one to come back to. A held-out loss that training brought down by less than
    half is that of a model that mainly memorises, and grows the surer it is."""
    gained = original.mean - untrained.mean
    return gained > (0 if original.name == "accuracy" else 0.5 * abs(untrained.mean))


def regained(measured: Mapping[str, float]) -> float:
    """Share of the way from untrained weights to the original's usefulness; 1 where there is none (`has_learned`)."""
    name = "accuracy" if "held_out_accuracy_after" in measured else "loss"
    before, after, untrained = (measured[f"held_out_{name}_{when}"] for when in ("before", "after", "untrained"))
    sign = 1 if name == "accuracy" else -1
    if not has_learned(*(Usefulness(name, sign * mean, 0.0) for mean in (before, untrained))):
        return 1.0
    return (after - untrained) / (before - untrained)


def diagnose(measured: Mapping[str, float]) -> list[str]:
    """Warnings of what a run did not reach, from its `measure`s."""
    lost = missed(measured)
    said = [] if lost is None else [lost]
    tau, forget = measured["tau_before"], measured["forget_loss_before"]
    if forget >= 0.9 * tau:
        said.append(
            f"there was hardly anything to forget: before unlearning the mean forget loss was {forget:.3g} and that of "
            f"held-out data {tau:.3g}. {CAUSES}"
        )
    if "attack_auc_after" in measured:
        auc, error = measured["attack_auc_after"], measured["attack_auc_error"]
        if auc > 0.5 + max(STANDS_OUT, 2 * error):
            said.append(
                f"the forget set still stands out: the loss attack tells it from held-out data at an AUC of {auc:.3f} "
                f"(0.5 is chance, standard error {error:.3f}; it was {measured['attack_auc_before']:.3f})"
            )
    return said
