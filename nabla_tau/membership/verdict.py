"""From attack figures to words: did the model forget, and how sure can one be?

The rule, for the AUC of three attacks (loss, entropy, margin) and its gap to the reference, which is the retrained
models or, without any, 0.5:

    over-unlearned     on some attack the AUC lies below 1/2 and the gap below -tolerance (forgotten samples stand out)
    partly remembered  on some attack the gap lies above 0, and it exceeds what is allowed on that attack
    remembered         the same, and less than a quarter of the original model's gap on that attack is closed
    forgotten          neither; where the original is known it has changed, and on every attack that speaks for it the
                       gap is no more than allowed and the upper end of its interval at most the tolerance
    inconclusive       anything else: the samples fit a model that forgot and one that did not

"Allowed" is the tolerance asked for or, where the original model's own gap was found and is below twice that, half of
that gap (though never below 0.01, which retraining alone moves): a small gap that hardly closed is not forgetting. "Has
changed" is asked of the attack that found most in the original: its drop must lie below 0.
An attack speaks for forgetting where it found at least half as much in the original as the best attack did; a weaker
one can accuse but has nothing to vouch for, so that its noise does not decide. Without an original all speak.
"Lies above / below" is judged by intervals widened for three attacks (Bonferroni); "forgotten" must hold on all that
speak, which needs no widening.

Where whole classes were removed the question is whether the model still knows them (`membership.recall`), and the
attacks, which can only tell samples of these classes from one another, accuse but need not vouch. A model that is not
found to remember, but lost much of its test accuracy (more than ten points, significantly), is "damaged".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.bootstrap import AucBootstrap, Reference
from nabla_tau.membership.recall import Recall

# Loss of test accuracy that is worth a warning, and that overrides "forgotten".
NOTICEABLE_LOSS = 0.02
DAMAGE = 0.10
# Gap that two models retrained with different seeds may well show.
SMALLEST_ALLOWANCE = 0.01
# Shares of the original model's gap: closed less than this is "remembered", open more than this is not "forgotten".
HARDLY_CLOSED = 0.25
OPEN = 0.5
# An attack speaks for forgetting that found this share of what the best attack found in the original.
SPEAKS = 0.5
_BY = {"lira": "by LiRA", "ulira": "by U-LiRA", "rmia": "by RMIA"}
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


@numbers_checked
def judge(
    attacks: Mapping[str, AucBootstrap],
    *,
    subject: str,
    retrained: Sequence[str] = (),
    original: str | None = None,
    utility: Utility | None = None,
    retained: Utility | None = None,
    recall: Recall | None = None,
    confidence: float = 0.95,
    tolerance: float = 0.03,
) -> Verdict:
    """Judge the model `subject` by its `attacks` (signal -> bootstrap); the rule is in the module's docstring.

    utility: accuracy on the test set, which enters the verdict; retained: on the retain set, which is a finding only.
    recall: what the model knows of removed classes, where whole classes were removed.

    tolerance: AUC gap that still counts as forgotten. 0.03 is an advantage (TPR - FPR) of about 0.04 at best, where
    scores are Gaussian. For `recall` it is the same gap in accuracy.
    """
    wide = 1 - (1 - confidence) / len(attacks)
    evidence = [
        _weigh(name, attack, subject, tuple(retrained), original, confidence, wide, tolerance)
        for name, attack in attacks.items()
    ]
    yardstick = "a model retrained without them allows" if retrained else "chance"
    code, deciding, reason = _decide(evidence, tolerance, yardstick)
    sentence = f"{reason} {_figures(evidence, deciding)}"
    findings: list[Finding] = []
    if recall is not None:
        code, sentence, findings = _with_recall(code, sentence, recall, evidence)
    if utility is not None and _ruined(utility) and code in ("forgotten", "inconclusive"):
        code = "damaged"
        sentence = (
            f"The model lost much more than the forget set: test accuracy is {utility.accuracy:.1%} against "
            f"{utility.reference:.1%} ({utility.reference_name}). {sentence}"
        )
    findings += _attack_findings(evidence, code, tolerance, bool(retrained))
    if original is not None and "loss" in attacks:
        findings.append(_change_finding(attacks["loss"], subject, original, confidence))
    if utility is not None and code != "damaged":
        findings.append(_utility_finding(utility, confidence))
    if retained is not None:
        findings.append(_utility_finding(retained, confidence))
    findings += _reference_findings(retrained)
    return Verdict(code, sentence, tuple(findings))


@dataclass(frozen=True)
class _Evidence:
    """One attack's figures: the gap with its interval [low, high], and `above` / `below` 0 by the widened one.

    before: the original model's gap, where there is one, `found` if it lies above 0, `changed` if it has dropped.
    """

    attack: str
    text: str
    gap: float
    low: float
    high: float
    above: bool
    below: bool
    stands_out: bool
    before: float | None
    found: bool
    changed: bool
    allowed: float
    n_members: int

    @property
    def closed(self) -> float | None:
        """Share of the original model's gap that is closed; below 0 where it grew, or where there was none."""
        if self.before is None:
            return None
        return 1 - self.gap / self.before if self.before > 0 else -math.inf

    @property
    def accuses(self) -> bool:
        return self.above and self.gap > self.allowed


def _weigh(
    name: str,
    attack: AucBootstrap,
    subject: str,
    retrained: tuple[str, ...],
    original: str | None,
    confidence: float,
    wide: float,
    tolerance: float,
) -> _Evidence:
    reference: Reference = retrained or 0.5
    gap = attack.gap(subject, reference)
    low, high = attack.gap_interval(subject, reference, confidence=confidence)
    low_wide, high_wide = attack.gap_interval(subject, reference, confidence=wide)
    before, found, changed = None, False, False
    if original is not None:
        before = attack.gap(original, reference)
        found = attack.gap_interval(original, reference, confidence=wide)[0] > 0
        changed = attack.gap_interval(subject, original, confidence=wide)[1] < 0
    against = f"{attack.value(retrained):.3f} retrained" if retrained else "0.5 for chance"
    return _Evidence(
        attack=name,
        text=(
            f"attack AUC {_BY.get(name, f'on {name}')} {attack.value(subject):.3f} against {against}, gap {gap:+.3f} "
            f"({confidence:.0%} interval {low:+.3f} to {high:+.3f}){_share_closed(gap, before, found)}"
        ),
        gap=gap,
        low=low,
        high=high,
        above=low_wide > 0,
        below=high_wide < 0,
        stands_out=attack.interval(subject, confidence=wide)[1] < 0.5 and high_wide < 0 and gap < -tolerance,
        before=before,
        found=found,
        changed=changed,
        allowed=min(tolerance, max(OPEN * before, SMALLEST_ALLOWANCE)) if before is not None and found else tolerance,
        n_members=attack.n_members,
    )


def _share_closed(gap: float, before: float | None, found: bool) -> str:
    if before is None:
        return ""
    if not found:
        return f"; the original model's gap, {before:+.3f}, does not lie above 0"
    share = 1 - gap / before
    closed = "all" if share >= 0.995 else "none" if share < 0.005 else f"{share:.0%}"
    return f"; {closed} of the original model's gap of {before:+.3f} is closed"


def _decide(evidence: Sequence[_Evidence], tolerance: float, yardstick: str) -> tuple[str, _Evidence, str]:
    """Code, the attack that decides, and the reason in words."""
    if over := [e for e in evidence if e.stands_out]:
        reason = (
            "Forgotten samples stand out by being handled worse than samples the model never saw (the Streisand "
            "effect), which gives their membership away again."
        )
        return "over-unlearned", min(over, key=lambda e: e.gap), reason
    if accusing := [e for e in evidence if e.accuses]:
        worst = max(accusing, key=lambda e: e.gap)
        hardly = worst.closed is not None and worst.closed < HARDLY_CLOSED
        reason = "An attack still finds forgotten samples in the model."
        return "remembered" if hardly else "partly remembered", worst, reason
    speaking = _speaking(evidence)
    if not speaking:
        reason = (
            "These attacks find no memory of the forget set even in the original model, so they cannot show that "
            "anything was removed."
        )
        return "inconclusive", _headline(evidence), reason
    worst = max(speaking, key=lambda e: e.high)
    if worst.high > tolerance:
        reason = f"The figures fit a model that forgot and one that did not. {_advice(worst, tolerance)}"
        return "inconclusive", worst, reason
    if hardly_closed := [e for e in speaking if e.gap > e.allowed]:
        reason = (
            f"The gap is within the tolerance of {tolerance:.2g}, but the original model's was so small that this "
            "alone is no sign of forgetting, and less than half of it is closed."
        )
        return "inconclusive", max(hardly_closed, key=lambda e: e.gap / e.allowed), reason
    strongest = max(speaking, key=lambda e: e.before or 0.0)
    if strongest.before is not None and not strongest.changed:
        reason = "The attack that finds most in the original model finds no clear change from it."
        return "inconclusive", strongest, reason
    return "forgotten", worst, f"These attacks tell forgotten from unseen samples no better than {yardstick}."


def _speaking(evidence: Sequence[_Evidence]) -> list[_Evidence]:
    """The attacks that can speak for forgetting; none where the original is known and no attack finds it."""
    if any(e.before is None for e in evidence):
        return list(evidence)
    best = max((e.before or 0.0 for e in evidence if e.found), default=0.0)
    return [e for e in evidence if e.found and (e.before or 0.0) >= SPEAKS * best]


def _advice(worst: _Evidence, tolerance: float) -> str:
    ratio = (worst.high - worst.low) / tolerance
    if ratio <= 1:
        return f"The gap lies about at the tolerance of {tolerance:.2g}."
    need = math.ceil(worst.n_members * ratio**2 / 100) * 100
    return (
        f"To judge by a tolerance of {tolerance:.2g} takes more samples: by these intervals about {need:,} forgotten "
        "ones, and unseen ones in proportion."
    )


def _headline(evidence: Sequence[_Evidence]) -> _Evidence:
    return next((e for e in evidence if e.attack == "loss"), evidence[0])


def _figures(evidence: Sequence[_Evidence], deciding: _Evidence) -> str:
    """The figures of the deciding attack, and those of the loss attack, the headline, where that is another."""
    headline = _headline(evidence)
    shown = [deciding] if deciding is headline else [deciding, headline]
    return " ".join(f"{e.text[0].upper()}{e.text[1:]}." for e in shown)


def _with_recall(
    code: str, sentence: str, recall: Recall, evidence: Sequence[_Evidence]
) -> tuple[str, str, list[Finding]]:
    """The verdict on removed classes: what the model knows of them, unless an attack accuses it of more."""
    headline = f"{recall.sentence} {_figures(evidence, _headline(evidence))}"
    if recall.code in ("remembered", "partly remembered"):
        findings = [Finding("problem", sentence)] if code == "over-unlearned" else []
        return "remembered" if code == "remembered" else recall.code, headline, findings
    if code in ("over-unlearned", "remembered", "partly remembered"):
        return code, f"{recall.sentence} {sentence}", []
    if recall.whole and code == "inconclusive":
        return recall.code, headline, [Finding("note", f"Single samples of the removed classes: {sentence}")]
    if code == "forgotten":
        return recall.code, headline, []
    return code, f"{sentence} {recall.sentence}", []


def _ruined(utility: Utility) -> bool:
    return utility.reference - utility.accuracy > DAMAGE and utility.high < 0


def _attack_findings(evidence: Sequence[_Evidence], code: str, tolerance: float, with_retrained: bool) -> list[Finding]:
    """What the other attacks say, where it is not what the verdict says."""
    findings = []
    if code == "over-unlearned" and (above := [e for e in evidence if e.above]):
        other = max(above, key=lambda e: e.gap)
        findings.append(Finding("problem", f"Another attack still finds memory: {other.text}."))
    lower = [e for e in evidence if with_retrained and e.below and e.gap < -tolerance]
    if lower and not any(e.stands_out for e in evidence):
        least = min(lower, key=lambda e: e.gap)
        text = f"More was taken from the forgotten samples than by retraining, if not so much as to show: {least.text}."
        findings.append(Finding("warning", text))
    if code == "forgotten":
        speaking = _speaking(evidence)
        for e in evidence:
            if e not in speaking and e.high > tolerance:
                text = (
                    f"An attack that found little in the original model leaves it open whether all is gone: {e.text}."
                )
                findings.append(Finding("note", text))
    return findings


def _change_finding(loss: AucBootstrap, subject: str, original: str, confidence: float) -> Finding:
    change = loss.gap(subject, original)
    low, high = loss.gap_interval(subject, original, confidence=confidence)
    text = (
        f"The AUC on loss changed by {change:+.3f} from the original model "
        f"({confidence:.0%} interval {low:+.3f} to {high:+.3f})."
    )
    return Finding("note", text)


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
