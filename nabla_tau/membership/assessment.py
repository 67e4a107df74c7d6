"""The statistics of an audit, from signals alone: no model is needed, and none is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nabla_tau.arguments import LARGEST_SEED, numbers_checked, positive, whole
from nabla_tau.classes import removed_classes
from nabla_tau.evaluation import Signals
from nabla_tau.membership.audit_report import AuditReport, json_able
from nabla_tau.membership.bootstrap import AucBootstrap, bootstrap_auc
from nabla_tau.membership.comparison import Comparison, choose_comparison
from nabla_tau.membership.fingerprints import mismatches
from nabla_tau.membership.gaps import gap_intervals, gaps, mean_numbers, spread, utility_of
from nabla_tau.membership.logistic import MIN_SAMPLES
from nabla_tau.membership.measures import (
    MEASURES,
    Interval,
    ModelAudit,
    attack_scores,
    histogram,
    loss_bins,
    mean_curve,
    measure,
    thin_curve,
    tpr_name,
)
from nabla_tau.membership.recall import recall_of
from nabla_tau.membership.shadow_attacks import FEW, attacks_on
from nabla_tau.membership.shadow_store import ShadowScores
from nabla_tau.membership.verdict import LEVELS, Finding, judge
from nabla_tau.provenance import hardware

SUBJECT = "unlearned"


@numbers_checked
def audit_signals(
    signals: Mapping[str, Mapping[str, Signals]],
    *,
    retrained: Sequence[str] = (),
    original: str | None = None,
    shadow: ShadowScores | None = None,
    record: Mapping[str, Any] | None = None,
    fingerprints: Mapping[str, Mapping[str, str]] | None = None,
    seconds: Mapping[str, float] | None = None,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    tolerance: float = 0.03,
    random_state: int = 0,
) -> AuditReport:
    """The statistics of `audit`, from signals alone: model name -> {"forget", "unseen", ("retain")} -> Signals.

    "unlearned" must be among the models; `retrained` and `original` name those with these roles, all others are
    compared. Several retrained models are reported each and as their mean, under the name "retrained". fingerprints:
    SHA-256 by name of the "models" and the "sets"; where `record` tells of others the report says so. The other
    arguments and the errors are those of `audit`; `shadow` must hold the scores of these very samples.
    """
    if SUBJECT not in signals:
        raise ValueError(f"signals must hold the model {SUBJECT!r}, got {[*signals]}")
    unknown = ({*retrained} | ({original} if original else set())) - signals.keys()
    if unknown or (len(retrained) > 1 and "retrained" in signals):
        raise ValueError(f"models with a role must be among the signals, as 'retrained' must not; got {[*signals]}")
    check_statistics(bootstrap, confidence, tolerance, random_state)
    _check_same_samples(signals)
    check_record(record)
    record = _thin_history(json_able(record or {}, "record"))
    comparison = _comparison(signals[SUBJECT], record)
    n_members, n_nonmembers = int(comparison.members.sum()), int(comparison.nonmembers.sum())
    check_counts(n_members, n_nonmembers)

    by_models = attacks_on(signals, shadow, retrained)
    scores = {name: attack_scores(of_model, comparison, by_models.scores[name]) for name, of_model in signals.items()}
    attacks = {
        attack: bootstrap_auc(
            {name: of_model[attack][0] for name, of_model in scores.items()},
            {name: of_model[attack][1] for name, of_model in scores.items()},
            fpr=(0.01,),
            replicates=bootstrap,
            random_state=random_state,
        )
        for attack in scores[SUBJECT]
    }
    measured = {
        name: measure(of_model, scores[name], comparison, random_state=random_state)
        for name, of_model in signals.items()
    }
    numbers = {name: of_model[0] for name, of_model in measured.items()}
    losses = {
        name: (s["forget"].loss[comparison.members], s["unseen"].loss[comparison.nonmembers])
        for name, s in signals.items()
    }
    # Compared models do not set the bins: one that diverged would squeeze all the others into a corner.
    own = {SUBJECT, *retrained} | ({original} if original else set())
    bins = loss_bins([values for name in losses if name in own for values in losses[name]])

    # A report's model is one model or, for several retrained ones, also their mean.
    parts_of: dict[str, tuple[str, ...]] = {name: (name,) for name in signals}
    if len(retrained) > 1:
        parts_of["retrained"] = tuple(retrained)
    roles = _roles(signals, retrained, original)
    times = _seconds(seconds or {}, record, parts_of)
    models, verdicts = {}, {}
    for name in sorted(parts_of, key=lambda n: _ROLES.index(roles[n])):
        parts = parts_of[name]
        if roles[name] in (SUBJECT, "compared"):
            utility, retained = (
                utility_of(which, signals, numbers, parts, retrained, original, comparison, confidence)
                for which in ("Test", "Retain")
            )
            verdicts[name] = judge(
                attacks,
                subject=name,
                retrained=retrained,
                original=original,
                utility=utility,
                retained=retained,
                recall=recall_of(
                    signals, name, retrained, original, comparison, confidence=confidence, tolerance=tolerance
                ),
                confidence=confidence,
                tolerance=tolerance,
            )
        curves = {attack: [measured[p][1][attack] for p in parts] for attack in attacks}
        models[name] = ModelAudit(
            role=roles[name],
            runs=len(parts),
            verdict=verdicts[name].code if name in verdicts else None,
            **mean_numbers(numbers, parts) | {"seconds": times.get(name)},
            non_finite=measured[name][2] if len(parts) == 1 else {},
            intervals=_intervals(attacks, parts, confidence),
            gap=gaps(numbers, parts, retrained),
            gap_intervals=gap_intervals(attacks, signals, parts, retrained, comparison, confidence),
            spread=spread(numbers, parts),
            roc={k: thin_curve(c[0]) if len(c) == 1 else mean_curve(c) for k, c in curves.items()},
            histogram={
                which: np.mean([histogram(losses[p][i], bins) for p in parts], axis=0).tolist()
                for i, which in enumerate(("forget", "unseen"))
            },
        )
    subject, verdict = signals[SUBJECT], verdicts[SUBJECT]
    findings = (
        *verdict.findings,
        *_non_finite_findings(models),
        *_few_models_findings(by_models.about),
        *(Finding("note", text) for text in comparison.notes),
        *mismatches(record, fingerprints or {}),
        *(Finding("warning", f"During unlearning: {text}") for text in record.get("warnings") or ()),
    )
    return AuditReport(
        verdict=verdict.code,
        sentence=verdict.sentence,
        findings=tuple(sorted(findings, key=lambda finding: LEVELS.index(finding.level))),
        models=models,
        reference="retrained" if retrained else "chance",
        comparison={
            "n_forget": len(subject["forget"]),
            "n_unseen": len(subject["unseen"]),
            "n_retain": len(subject["retain"]) if "retain" in subject else None,
            "n_members": n_members,
            "n_nonmembers": n_nonmembers,
            "classes": None if comparison.classes is None else list(comparison.classes),
            "removed_classes": list(comparison.removed),
            "task": subject["forget"].task,
        },
        statistics={
            "bootstrap": bootstrap,
            "confidence": confidence,
            "tolerance": tolerance,
            "random_state": random_state,
            "tpr_at_1_percent_fpr": measured[SUBJECT][1]["loss"].resolution(0.01),
            "by_models": by_models.about,
        },
        loss_bins=bins,
        record=record,
        fingerprints=fingerprints or {},
        hardware=hardware(torch.device("cpu")),
    )


_ROLES = ("original", SUBJECT, "retrained", "retrained run", "compared")


def check_counts(forgotten: int, unseen: int) -> None:
    """ValueError for fewer samples than the attacks can be trained and tested on."""
    if min(forgotten, unseen) < MIN_SAMPLES:
        raise ValueError(
            f"an audit needs at least {MIN_SAMPLES} forgotten and {MIN_SAMPLES} unseen samples to compare, got "
            f"{forgotten} and {unseen}"
        )


def check_statistics(bootstrap: int, confidence: float, tolerance: float, random_state: int) -> None:
    """TypeError and ValueError for settings that the statistics cannot have."""
    whole(bootstrap, "bootstrap", least=100, most=1_000_000)
    whole(random_state, "random_state", most=LARGEST_SEED)
    positive(tolerance, "tolerance")
    if not positive(confidence, "confidence") < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")


def check_record(record: object) -> None:
    """TypeError for a record that is no mapping; its entries may be anything JSON-able but for those used here."""
    if record is None:
        return
    if not isinstance(record, Mapping):
        raise TypeError(
            "record must be a mapping, as the JSON object that `nabla_tau unlearn` writes is, got "
            f"{type(record).__name__}"
        )
    seconds = record.get("seconds")
    if seconds is not None and (isinstance(seconds, bool) or not isinstance(seconds, (int, float))):
        raise TypeError(f"record: seconds must be a number, got {seconds!r}")
    for name, kind in (("removed_classes", int), ("warnings", str)):
        entries = record.get(name)
        if entries is not None and not (
            isinstance(entries, (list, tuple)) and all(isinstance(entry, kind) for entry in entries)
        ):
            raise TypeError(f"record: {name} must be a list of {kind.__name__}, got {entries!r}")


def _roles(signals: Mapping[str, object], retrained: Sequence[str], original: str | None) -> dict[str, str]:
    roles = dict.fromkeys(signals, "compared") | {SUBJECT: SUBJECT}
    roles |= dict.fromkeys(retrained, "retrained" if len(retrained) == 1 else "retrained run")
    if len(retrained) > 1:
        roles["retrained"] = "retrained"
    if original is not None:
        roles[original] = "original"
    return roles


def _seconds(
    seconds: Mapping[str, float], record: Mapping[str, Any], names: Mapping[str, object]
) -> dict[str, float | None]:
    unknown = seconds.keys() - names.keys()
    if unknown:
        raise ValueError(f"seconds: no model is named {sorted(unknown)}; the models are {[*names]}")
    times: dict[str, float | None] = {SUBJECT: record["seconds"]} if record.get("seconds") is not None else {}
    return times | {name: float(value) for name, value in seconds.items()}


def _thin_history(record: dict[str, Any], limit: int = 2000) -> dict[str, Any]:
    """At most `limit` evenly spaced steps of each history: more would show in no plot and swell the report."""
    history = record.get("history")
    if not isinstance(history, dict):
        return record
    thinned = {
        name: [column[i] for i in np.linspace(0, len(column) - 1, limit).astype(int)]
        if isinstance(column, list) and len(column) > limit
        else column
        for name, column in history.items()
    }
    return record | {"history": thinned}


def _intervals(attacks: Mapping[str, AucBootstrap], parts: Sequence[str], confidence: float) -> dict[str, Interval]:
    """Of every AUC, and of the TPR at 1 % FPR where that is a measure and can be resolved."""
    found = {f"auc_{name}": attack.interval(parts, confidence=confidence) for name, attack in attacks.items()}
    for name, attack in attacks.items():
        tpr = attack.tpr[0.01]
        if tpr_name(name) in MEASURES and tpr.resolution != "not resolvable":
            found[tpr_name(name)] = tpr.interval(parts, confidence=confidence)
    return found


def _few_models_findings(about: Mapping[str, Any]) -> list[Finding]:
    if not about or about["models"] >= FEW:
        return []
    text = (
        f"LiRA and RMIA rest on {about['models']} {about['by']} here: with so few they find less than they could, so "
        "that what they find counts, and what they do not find says little."
    )
    return [Finding("note", text)]


def _non_finite_findings(models: Mapping[str, ModelAudit]) -> list[Finding]:
    return [
        Finding("problem", f"{name}: {n} non-finite values ({where}). An attack ranks NaN as least like a member.")
        for name, model in models.items()
        for where, n in model.non_finite.items()
    ]


def _check_same_samples(signals: Mapping[str, Mapping[str, Signals]]) -> None:
    """All models must have seen the same samples, and forget and unseen samples in the same order (they are paired)."""
    subject = signals[SUBJECT]
    if missing := {"forget", "unseen"} - subject.keys():
        raise ValueError(f"{SUBJECT}: signals of the sets {sorted(missing)} are missing")
    for name, of_model in signals.items():
        if of_model.keys() != subject.keys():
            raise ValueError(f"{name} has signals of {sorted(of_model)}, {SUBJECT} of {sorted(subject)}")
        for set_name, ours in subject.items():
            theirs = of_model[set_name]
            if len(ours) != len(theirs):
                raise ValueError(f"the {set_name} set has {len(theirs)} samples for {name}, {len(ours)} for {SUBJECT}")
            if set_name == "retain" or ours.target is None or theirs.target is None:
                continue
            if not np.array_equal(ours.target, theirs.target):
                raise ValueError(
                    f"{name} and {SUBJECT} were given the {set_name} set in different orders: "
                    "samples are paired over models, so a DataLoader must not shuffle"
                )


def _comparison(signals: Mapping[str, Signals], record: Mapping[str, Any]) -> Comparison:
    forget, unseen, retain = signals["forget"], signals["unseen"], signals.get("retain")
    removed = record.get("removed_classes")
    if removed is None and forget.target is not None and retain is not None and retain.target is not None:
        removed = removed_classes(forget.target, retain.target)
    return choose_comparison(
        forget.target,
        unseen.target,
        n_forget=len(forget),
        n_unseen=len(unseen),
        removed=removed or (),
    )
