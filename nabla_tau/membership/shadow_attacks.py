"""Attacks that judge each sample by what other models say of that very sample, as scores for an audit.

The other models are shadow models, of which some were trained on the sample and some not, or models retrained without
the forget set, of which none was. Where a model is one of them it is judged by the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nabla_tau.evaluation import Signals
from nabla_tau.membership.groups import GroupStats, group_stats
from nabla_tau.membership.likelihood_ratio import lira
from nabla_tau.membership.relative_membership import rmia
from nabla_tau.membership.shadow_store import ShadowScores

Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
# Fewer retrained models than this leave, for each of them, fewer than two others to judge it by.
MIN_RETRAINED = 3
MIN_SHADOWS = 4
# With fewer models the likelihoods rest on a handful of scores each.
FEW = 16


@dataclass(frozen=True, eq=False)
class ModelAttacks:
    """Scores of every model: model -> attack -> (forget set [F], unseen set [U]), higher is more likely a member.

    attacks: their names. about: what they rest on, for the report, {} where there is nothing to rest on.
    """

    scores: Mapping[str, Mapping[str, Pair]]
    about: Mapping[str, Any]

    @property
    def attacks(self) -> tuple[str, ...]:
        return tuple(self.about.get("attacks", ()))


def attacks_on(
    signals: Mapping[str, Mapping[str, Signals]], shadow: ShadowScores | None, retrained: Sequence[str]
) -> ModelAttacks:
    """Scores of every model by shadow models where there are any, else by at least three retrained models, else none.

    signals: model -> {"forget", "unseen"} -> Signals. ValueError for shadow models that scored other sets or signals.
    """
    if shadow is not None:
        return _by_shadows(signals, shadow)
    if len(retrained) >= MIN_RETRAINED and all(signals[r]["forget"].margin is not None for r in retrained):
        return _by_retrained(signals, retrained)
    return ModelAttacks({name: {} for name in signals}, {})


def sample_scores(of_model: Mapping[str, Signals], shadow: ShadowScores, *, offline: bool = False) -> dict[str, Pair]:
    """Scores of one model by shadow models: attack -> (forget set, unseen set).

    "lira" and "rmia" are the online attacks, for which shadow models were trained on each sample; "ulira" is there
    where they unlearned it. offline: also "lira_offline" and "rmia_offline", which use only the models without it.
    ValueError for shadow models that scored other sets or signals.
    """
    return _Shadows.of(shadow, [len(of_model[name]) for name in ("forget", "unseen")]).scores(of_model, offline=offline)


@dataclass(frozen=True, eq=False)
class _Shadows:
    """Shadow models' scores of the forget and the unseen samples, and their statistics, taken once for all models."""

    n_forget: int
    signal: str
    scored: NDArray[Any]
    member: NDArray[np.bool_]
    stats: GroupStats
    unlearned: GroupStats | None

    @classmethod
    def of(cls, shadow: ShadowScores, sizes: Sequence[int]) -> _Shadows:
        if shadow.plan.models < MIN_SHADOWS:
            raise ValueError(f"attacks by shadow models need at least {MIN_SHADOWS} of them, got {shadow.plan.models}")
        columns = [shadow.columns("forget"), shadow.columns("unseen")]
        theirs = [of_set.stop - of_set.start for of_set in columns]
        if theirs != list(sizes):
            raise ValueError(
                f"the shadow models scored {theirs[0]} forget and {theirs[1]} unseen samples, the audit has {sizes[0]} "
                f"and {sizes[1]}"
            )
        scored, member = (_columns(array, columns) for array in (shadow.scores, shadow.membership))
        unlearned = None if shadow.unlearned is None else group_stats(_columns(shadow.unlearned, columns), member)
        return cls(sizes[0], shadow.signal, scored, member, group_stats(scored, member), unlearned)

    def scores(self, of_model: Mapping[str, Signals], *, offline: bool = False) -> dict[str, Pair]:
        target = _target(of_model, self.signal)
        found = {"lira": lira(target, self.stats).score}
        if self.unlearned is not None:
            found["ulira"] = lira(target, self.unlearned).score
        if offline:
            found["lira_offline"] = lira(target, self.stats, mode="offline").score
        if self.signal == "margin":
            found["rmia"] = _ratio(target, self.scored, self.member, self.n_forget, mode="online")
            if offline:
                found["rmia_offline"] = _ratio(target, self.scored, self.member, self.n_forget, mode="offline")
        return {attack: (score[: self.n_forget], score[self.n_forget :]) for attack, score in found.items()}


def _by_shadows(signals: Mapping[str, Mapping[str, Signals]], shadow: ShadowScores) -> ModelAttacks:
    first = next(iter(signals.values()))
    shadows = _Shadows.of(shadow, [len(first[name]) for name in ("forget", "unseen")])
    found = {name: shadows.scores(of_model) for name, of_model in signals.items()}
    plan = shadow.plan
    about = {
        "attacks": [*next(iter(found.values()))],
        "by": "shadow models",
        "models": plan.models,
        "signal": shadow.signal,
        "probability": plan.probability,
        "fewest_with": int(shadows.stats.n_in.min()),
        "fewest_without": int(shadows.stats.n_out.min()),
        "n_dropped": shadows.stats.n_dropped,
        "seed": plan.seed,
        "seconds": shadow.seconds,
        "settings": dict(plan.settings),
    }
    return ModelAttacks(found, about)


def _by_retrained(signals: Mapping[str, Mapping[str, Signals]], retrained: Sequence[str]) -> ModelAttacks:
    size = len(signals[retrained[0]]["forget"])
    rows = {name: _target(signals[name], "margin") for name in retrained}
    found = {}
    for name, of_model in signals.items():
        target = _target(of_model, "margin")
        others = np.stack([rows[other] for other in retrained if other != name])
        nobody = np.zeros(others.shape, bool)
        scores = {
            "lira": lira(target, group_stats(others, nobody), mode="offline", variance="shrink").score,
            "rmia": _ratio(target, others, nobody, size, mode="offline"),
        }
        found[name] = {attack: (of_all[:size], of_all[size:]) for attack, of_all in scores.items()}
    about = {"attacks": ["lira", "rmia"], "by": "retrained models", "models": len(retrained), "signal": "margin"}
    return ModelAttacks(found, about)


def _ratio(
    target: NDArray[np.float64],
    references: NDArray[Any],
    member: NDArray[np.bool_],
    n_forget: int,
    *,
    mode: Literal["online", "offline"],
) -> NDArray[np.float64]:
    """RMIA's ratio p(x | target) / p(x): for one model it orders the samples as the score does, without its steps, and
    so whatever the population is; here the unseen samples are."""
    ratio: NDArray[np.float64] = rmia(
        target, references, member, target[n_forget:], references[:, n_forget:], mode=mode
    ).ratio
    return ratio


def _target(of_model: Mapping[str, Signals], signal: str) -> NDArray[np.float64]:
    columns = [getattr(of_model[of_set], signal) for of_set in ("forget", "unseen")]
    if any(column is None for column in columns):
        raise ValueError(f"the shadow models were scored by their {signal}, which this model does not have")
    return np.concatenate(columns) if signal == "margin" else -np.concatenate(columns)


def _columns(array: NDArray[Any], columns: Sequence[slice]) -> NDArray[Any]:
    """The columns of the sets, a view where they stand one after the other as they do unless other sets lie between."""
    first, second = columns
    if first.stop == second.start:
        return array[:, first.start : second.stop]
    return np.concatenate((array[:, first], array[:, second]), axis=1)
