"""Every number of an audit in a sentence, and what an audit does not show."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """A measure of `ModelAudit`; kind is "rate", "percent", "loss" or "seconds"; no definition means "as above"."""

    measure: str
    label: str
    kind: str
    definition: str


_ATTACKS = (
    Row(
        "auc_loss",
        "AUC, loss",
        "rate",
        "Chance that a random forgotten sample has a lower loss than a random unseen one (ties count half). 0.5: the "
        "attack learns nothing; 1: it is always right; well below 0.5: forgotten samples stand out by a loss that is "
        "too high.",
    ),
    Row("auc_entropy", "AUC, entropy", "rate", "The same for the entropy of the prediction, which needs no label."),
    Row("auc_margin", "AUC, margin", "rate", "The same for the logit margin, log p(y) - log(1 - p(y))."),
    Row(
        "mia_loss",
        "MIA, loss",
        "rate",
        "Accuracy of a logistic regression that guesses membership from the loss, on equally many forgotten and unseen "
        "samples, mean of ten random splits. 0.5 is guessing.",
    ),
    Row("mia_entropy", "MIA, entropy", "rate", "The same from the entropy."),
    Row(
        "balanced_accuracy_loss",
        "Best threshold, loss",
        "rate",
        "Balanced accuracy of the best single threshold, chosen on the very samples it is judged on: above 0.5 even "
        "without any memory, so only differences between models count.",
    ),
    Row("balanced_accuracy_entropy", "Best threshold, entropy", "rate", ""),
    Row("balanced_accuracy_margin", "Best threshold, margin", "rate", ""),
    Row(
        "tpr_at_1_percent_fpr",
        "TPR at 1% FPR",
        "rate",
        "Share of forgotten samples that the loss attack names while accusing at most one unseen sample in a hundred: "
        "what is left for the samples remembered best. 0.01 is guessing.",
    ),
)
_ACCURACY = (
    Row(
        "forget_accuracy",
        "Forget set",
        "percent",
        "Accuracy on the samples to forget. The aim is the retrained model's figure, not zero.",
    ),
    Row("retain_accuracy", "Retain set", "percent", "Accuracy on the training samples that stay."),
    Row(
        "test_accuracy",
        "Test",
        "percent",
        "Accuracy on unseen samples; where whole classes were removed, on those of the other classes.",
    ),
    Row(
        "unseen_removed_accuracy",
        "Removed classes, unseen",
        "percent",
        "Accuracy on unseen samples of the classes that were removed.",
    ),
)
_LOSS = (
    Row("forget_loss", "Forget set", "loss", "Mean loss of the samples to forget."),
    Row("unseen_loss", "Unseen, compared", "loss", "Mean loss of the unseen samples that they are compared with."),
    Row("retain_loss", "Retain set", "loss", "Mean loss of the training samples that stay."),
)
_COST = (Row("seconds", "Wall time", "seconds", "Time to make the model, as told by whoever made it."),)

GROUPS = {"Attacks": _ATTACKS, "Accuracy": _ACCURACY, "Mean loss": _LOSS, "Cost": _COST}

LIMITS = (
    "It is evidence, not a certificate. It says what these attacks find on these samples; a stronger one (with shadow "
    "models, or access to the weights) may find more.",
    "Averages can hide a few samples that are still remembered. The true-positive rate at a low false-positive rate "
    "looks there, as far as the number of unseen samples allows.",
    "The intervals say how much the figures would vary with other samples of the same kind. They do not hold the "
    "chance in training: retraining with another seed gives another model.",
    "Unseen samples must come from where the forgotten ones came from. A difference in source, date or preparation "
    "looks like memory, or hides it.",
    "Nothing is said of copies, backups, caches, or models made from the original one.",
)
