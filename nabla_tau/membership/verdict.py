"""From attack figures to words: did the model forget, and how sure can one be?

The rule, for the AUC of three attacks (loss, entropy, margin) and its gap to the reference, which is the retrained
models or, without any, 0.5:

    over-unlearned     on some attack the AUC lies below 1/2 and the gap below -tolerance (forgotten samples stand out)
    forgotten          on every attack the upper end of the gap's interval is at most the tolerance
    partly remembered  on some attack the gap lies above 0
    remembered         the same, and the AUC of that attack is not below the original model's
    inconclusive       anything else: the intervals hold both "no gap" and "a gap that matters"

The tolerance is the one asked for or, where the original model is known and showed little to begin with, a third of its
gap (though never below 0.01, which retraining alone moves): a small gap that has hardly closed is not forgetting.
"Lies above / below" is judged by intervals widened for three attacks (Bonferroni); "forgotten" must hold on all
of them, which needs no widening. A model that an attack does not find to remember, but that lost much of its test
accuracy (more than ten points, significantly), is "damaged".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nabla_tau.membership.bootstrap import AucBootstrap, Reference

# Loss of test accuracy that is worth a warning, and that overrides "forgotten".
NOTICEABLE_LOSS = 0.02
DAMAGE = 0.10
# Gap that two models retrained with different seeds may well show.
SMALLEST_TOLERANCE = 0.01
LEVELS = ("problem", "warning", "good", "note")
CODES = ("forgotten", "partly remembered", "remembered", "over-unlearned", "damaged", "inconclusive")


@dataclass(frozen=True)
class Finding:
    """One observation in words; level is one of `LEVELS`."""

    level: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """`code` is one of `CODES`; `sentence` states it with its figures; `findings` give the rest."""

    code: str
    sentence: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Utility:
    """Accuracy of the model on the "Test" or "Retain" set and that of what it is compared with, and the paired
    interval of the difference."""

    which: str
    accuracy: float
    reference: float
    reference_name: str
    low: float
    high: float


def judge(
    attacks: Mapping[str, AucBootstrap],
    *,
    subject: str,
    retrained: Sequence[str] = (),
    original: str | None = None,
    utility: Utility | None = None,
    retained: Utility | None = None,
    confidence: float = 0.95,
    tolerance: float = 0.03,
) -> Verdict:
    """Judge the model `subject` by its `attacks` (signal -> bootstrap); the rule is in the module's docstring.

    utility: accuracy on the test set, which enters the verdict; retained: on the retain set, which is a finding only.

    tolerance: AUC gap that still counts as forgotten. 0.03 is an advantage (TPR - FPR) of about 0.04 at best, where
    scores are Gaussian.
    """
    reference: Reference = tuple(retrained) if retrained else 0.5
    wide = 1 - (1 - confidence) / len(attacks)
    gap = {name: attack.gap(subject, reference) for name, attack in attacks.items()}
    gap_wide = {name: attack.gap_interval(subject, reference, confidence=wide) for name, attack in attacks.items()}
    gap_plain = {n: a.gap_interval(subject, reference, confidence=confidence) for n, a in attacks.items()}
    over = [
        name
        for name, attack in attacks.items()
        if attack.interval(subject, confidence=wide)[1] < 0.5 and gap_wide[name][1] < 0 and gap[name] < -tolerance
    ]
    allowed = dict.fromkeys(attacks, tolerance)
    if original is not None:
        for name, attack in attacks.items():
            third = attack.gap(original, reference) / 3
            allowed[name] = min(tolerance, max(third, SMALLEST_TOLERANCE))
    above = [name for name in attacks if gap_wide[name][0] > 0]
    beyond = [name for name in attacks if gap_plain[name][1] > allowed[name]]
    worst = max(attacks, key=lambda name: gap_plain[name][1] - allowed[name])
    findings: list[Finding] = []

    def figures(name: str) -> str:
        attack = attacks[name]
        low, high = gap_plain[name]
        against = f"{attack.value(tuple(retrained)):.3f} retrained" if retrained else "0.5 for chance"
        return (
            f"attack AUC on {name} {attack.value(subject):.3f} against {against}, gap {gap[name]:+.3f} "
            f"({confidence:.0%} interval {low:+.3f} to {high:+.3f})"
        )

    if over:
        name = min(over, key=lambda n: gap[n])
        code = "over-unlearned"
        sentence = (
            "Forgotten samples stand out by being handled worse than samples the model never saw (the Streisand "
            f"effect), which gives their membership away again: {figures(name)}."
        )
        if above:
            other = max(above, key=lambda n: gap[n])
            findings.append(Finding("problem", f"Another attack still finds memory: {figures(other)}."))
    elif not beyond:
        code = "forgotten"
        yardstick = "a model retrained without them allows" if retrained else "chance"
        sentence = f"These attacks tell forgotten from unseen samples no better than {yardstick}: {figures(worst)}."
    elif above:
        name = max(above, key=lambda n: gap[n])
        unchanged = original is not None and attacks[name].gap_interval(subject, original, confidence=wide)[1] >= 0
        code = "remembered" if unchanged else "partly remembered"
        tail = ""
        if original is not None:
            before = attacks[name].gap(original, reference)
            closed = 1 - gap[name] / before if before > 0 else math.nan
            tail = f" The original model's gap was {before:+.3f}" + (
                f", so {closed:.0%} of it is closed." if 0 < closed < 1 else "."
            )
        sentence = f"An attack still finds forgotten samples in the model: {figures(name)}.{tail}"
    else:
        code = "inconclusive"
        low, high = gap_plain[worst]
        ratio = (high - low) / allowed[worst]
        advice = f"The gap lies about at the tolerance of {allowed[worst]:.2g}."
        if ratio > 1:
            need = math.ceil(attacks[worst].n_members * ratio**2 / 100) * 100
            advice = (
                f"To judge by a tolerance of {allowed[worst]:.2g} takes more samples: by these intervals about "
                f"{need:,} forgotten ones, and unseen ones in proportion."
            )
        sentence = f"The figures fit a model that forgot and one that did not: {figures(worst)}. {advice}"

    if code in ("forgotten", "inconclusive") and original is not None:
        seen = [n for n, a in attacks.items() if a.gap_interval(original, reference, confidence=wide)[0] > 0]
        if not seen:
            code = "inconclusive"
            sentence = (
                "These attacks find no memory of the forget set even in the original model, so they cannot show that "
                f"anything was removed: {figures(worst)}."
            )
    lower = [n for n in attacks if retrained and gap_wide[n][1] < 0 and gap[n] < -tolerance]
    if lower and not over:
        name = min(lower, key=lambda n: gap[n])
        text = (
            f"More was taken from the forgotten samples than by retraining, if not so much as to show: {figures(name)}."
        )
        findings.append(Finding("warning", text))
    ruined = utility is not None and utility.reference - utility.accuracy > DAMAGE and utility.high < 0
    if utility is not None and ruined and code in ("forgotten", "inconclusive"):
        code = "damaged"
        sentence = (
            f"The model lost much more than the forget set: test accuracy is {utility.accuracy:.1%} against "
            f"{utility.reference:.1%} ({utility.reference_name}). {sentence}"
        )
    if original is not None and "loss" in attacks:
        change = attacks["loss"].gap(subject, original)
        low, high = attacks["loss"].gap_interval(subject, original, confidence=confidence)
        text = (
            f"The AUC on loss changed by {change:+.3f} from the original model "
            f"({confidence:.0%} interval {low:+.3f} to {high:+.3f})."
        )
        findings.append(Finding("note", text))
    if utility is not None and code != "damaged":
        findings.append(_utility_finding(utility, confidence))
    if retained is not None:
        findings.append(_utility_finding(retained, confidence))
    findings += _reference_findings(retrained)
    return Verdict(code, sentence, tuple(findings))


def _utility_finding(utility: Utility, confidence: float) -> Finding:
    difference = utility.accuracy - utility.reference
    text = (
        f"{utility.which} accuracy {utility.accuracy:.1%} against {utility.reference:.1%} ({utility.reference_name}): "
        f"{100 * difference:+.1f} points, {confidence:.0%} interval {100 * utility.low:+.1f} to "
        f"{100 * utility.high:+.1f}."
    )
    if difference > -NOTICEABLE_LOSS:
        return Finding("good", text)
    return Finding("warning" if utility.high < 0 else "note", text)


def _reference_findings(retrained: Sequence[str]) -> list[Finding]:
    if not retrained:
        return [
            Finding(
                "warning",
                "No retrained model was given. The reference is an AUC of 0.5, which a model that never saw the forget "
                "set reaches only if forgotten and unseen samples are equally hard; a retrained model settles that.",
            )
        ]
    if len(retrained) == 1:
        return [
            Finding(
                "note",
                "One retrained model was given. Retraining with another seed moves these figures too, and the "
                "intervals do not hold that part; two or more retrained models would show it.",
            )
        ]
    return []
