"""What a comparison says of one unlearned model, beside the model retrained without the forget set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau.evaluation import evaluate, forward_batches
from nabla_tau.membership.closeness import tow
from nabla_tau.membership.curve import roc
from nabla_tau.membership.logistic import MIN_SAMPLES, simple_mia
from nabla_tau.suites.data import Data
from nabla_tau.suites.scenarios import Parts

BATCH = 500
UNCHANGED = 0.1  # share of retraining's divergence from the original on the forget set below which nothing was done
COLLAPSED = 0.1  # test accuracy below retrained's

# measure -> (heading, what it is); gap_* are differences from the retrained model of the same seed.
MEASURES = {
    "gap_auc_loss": ("AUC gap", "AUC of the loss attack on forget against unseen samples, minus that of retrained"),
    "gap_auc_entropy": ("entropy", "the same of the entropy"),
    "gap_auc_margin": ("margin", "the same of the logit margin"),
    "gap_mia_loss": ("MIA gap", "accuracy of the logistic attack on the loss, minus that of retrained"),
    "gap_mia_entropy": ("MIA entropy", "the same on the entropy"),
    "ulira": ("U-LiRA", "AUC at which shadow models that unlearned a sample are told from retrained ones"),
    "ruli": ("RULI", "AUC at which samples that shadow models unlearned are told from ones that unlearned others"),
    "gap_forget_accuracy": ("forget", "accuracy on the forget set, minus that of retrained"),
    "gap_retain_accuracy": ("retain", "accuracy on the retain set, minus that of retrained"),
    "gap_test_accuracy": ("test", "accuracy on unseen samples, minus that of retrained"),
    "gap_alike_accuracy": ("unseen alike", "accuracy on unseen samples of the forgotten kind, minus that of retrained"),
    "tow": ("ToW", "tug of war: 1 where all three accuracies are those of retrained"),
    "kl_forget": ("KL forget", "KL divergence of retrained from this model's outputs on the forget set, nats"),
    "kl_test": ("KL test", "the same on unseen samples"),
    "seconds": ("seconds", "wall time of the method"),
    "share": ("of retraining", "wall time as a share of retraining"),
}


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model says of the parts: accuracies, attacks, and log-probabilities [N, C] on forget and test samples."""

    auc_loss: float
    auc_entropy: float
    auc_margin: float
    mia_loss: float | None
    mia_entropy: float | None
    forget_accuracy: float
    retain_accuracy: float
    test_accuracy: float
    alike_accuracy: float
    forget: NDArray[np.float32]
    test: NDArray[np.float32]


def answers(model: nn.Module, parts: Parts) -> Answers:
    """In eval mode."""
    forget, unseen = (evaluate(model, part, batch_size=BATCH) for part in (parts.forget, parts.unseen))
    enough = min(len(forget), len(unseen)) >= MIN_SAMPLES
    labels = np.repeat([True, False], [len(forget), len(unseen)])
    found: dict[str, Any] = {}
    for name, sign in (("loss", -1.0), ("entropy", -1.0), ("margin", 1.0)):
        columns = [np.nan_to_num(getattr(signals, name), nan=np.inf) for signals in (forget, unseen)]
        found[f"auc_{name}"] = float(roc(sign * np.concatenate(columns), labels).auc)
        if name != "margin":
            found[f"mia_{name}"] = simple_mia(*columns).accuracy if enough else None
    test = _log_probabilities(model, parts.test)
    return Answers(
        **found,
        forget_accuracy=_known(forget.accuracy),
        retain_accuracy=_known(evaluate(model, parts.retain, batch_size=BATCH).accuracy),
        test_accuracy=float((test.argmax(1) == parts.test[1].cpu()).float().mean()),
        alike_accuracy=_known(unseen.accuracy),
        forget=_log_probabilities(model, parts.forget).numpy(),
        test=test.numpy(),
    )


def compared(found: Answers, retrained: Answers) -> dict[str, float | None]:
    """`MEASURES` but for times and U-LiRA; None for an attack on too few samples."""
    gaps: dict[str, float | None] = {}
    for name in MEASURES:
        if name.startswith("gap_"):
            own, wanted = (getattr(model, name.removeprefix("gap_")) for model in (found, retrained))
            gaps[name] = None if own is None or wanted is None else own - wanted
    accuracies = {
        name: tuple(getattr(model, f"{name}_accuracy") for model in (found, retrained))
        for name in ("forget", "retain", "test")
    }
    return gaps | {
        "tow": tow(**accuracies),
        "kl_forget": _kl(retrained.forget, found.forget),
        "kl_test": _kl(retrained.test, found.test),
    }


def remarks(found: Answers, original: Answers, retrained: Answers) -> list[str]:
    """What the table says plainly of a model that is broken, or as it was."""
    said = []
    moved, needed = (_kl(original.forget, model.forget) for model in (found, retrained))
    if moved < UNCHANGED * needed:
        said.append("nothing done: on the forget set it answers nearly as the original does")
    if found.test_accuracy < retrained.test_accuracy - COLLAPSED:
        said.append(f"collapsed: more than {100 * COLLAPSED:.0f} points of test accuracy lost")
    return said


def _known(accuracy: float | None) -> float:
    assert accuracy is not None
    return accuracy


def _log_probabilities(model: nn.Module, data: Data) -> Tensor:
    batches = zip(*(torch.split(column, BATCH) for column in data), strict=True)
    return torch.cat([F.log_softmax(z.float(), 1) for z, _ in forward_batches(model, batches)]).cpu()


def _kl(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean over samples of KL(wanted || found)."""
    p = np.asarray(wanted, np.float64)
    return float((np.exp(p) * (p - found)).sum(1).mean())


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds (0 of one); None where nothing is known."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
