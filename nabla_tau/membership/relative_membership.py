"""Robust membership inference (Zarifzadeh et al. 2024): is a sample likelier than most, for what is usual for it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nabla_tau import _C
from nabla_tau.arguments import numbers_checked
from nabla_tau.membership.attack_scores import AttackScores
from nabla_tau.membership.cells import Array, as_cells, as_group, threads
from nabla_tau.membership.curve import roc
from nabla_tau.membership.groups import Doubles

Signal = Literal["margin", "probability"]

_GRID = tuple(step / 10 for step in range(11))
# Reference models that stand in for the target when `a` is tuned.
_STAND_INS = 4
# A probability below this is as good as none, and its ratio stays finite.
_SMALLEST = 1e-300


@dataclass(frozen=True, eq=False)
class RmiaResult(AttackScores):
    """score [N]: share of population samples that the sample beats. ratio [N]: p(x | target) / p(x), which orders the
    samples in the same way but without the score's steps. a: of the offline mode; tuning: AUC of each a that was tried.
    """

    ratio: Doubles
    mode: Literal["online", "offline"]
    gamma: float
    a: float | None
    tuning: dict[float, float] | None
    n_in: NDArray[np.int32]
    n_out: NDArray[np.int32]
    n_population: int
    n_population_dropped: int


@numbers_checked
def rmia(
    target: object,
    references: object,
    group: object,
    population_target: object,
    population_references: object,
    *,
    mode: Literal["online", "offline"] = "online",
    gamma: float = 2.0,
    a: float | Literal["tune"] = 0.3,
    signal: Signal = "margin",
) -> RmiaResult:
    """score = P_z[ (p(x|target) / p(x)) / (p(z|target) / p(z)) >= gamma ], z from a population nobody trained on.

    target [N] and references [M, N]: logit margins of the samples under the model in question and under M reference
    models (signal="probability": the probabilities of the true class); group [M, N]: which reference was trained on
    which sample; population_target [Z] and population_references [M, Z]: the same signals of the population.
    p(x): online, the middle of the mean probabilities of in- and out-models; offline, from out-models only,
    ((1 + a) p_out + 1 - a) / 2, with a="tune" the best of 0, 0.1 ... 1 in attacks on up to four references. p(z): the
    mean over references, offline corrected in the same way. Samples without the models they need get NaN, and so do
    those whose target signal is NaN. TypeError for another dtype, ValueError for another shape.
    """
    x, z = as_cells(target, "target", "N"), as_cells(population_target, "population_target", "Z")
    cells = as_cells(references, "references", "M, N")
    others = as_cells(population_references, "population_references", "M, Z")
    if cells.shape[1:] != x.shape or others.shape[1:] != z.shape:
        raise ValueError(
            f"references and population_references must be [M, {x.size}] and [M, {z.size}], "
            f"got {list(cells.shape)} and {list(others.shape)}"
        )
    member = as_group(group, *cells.shape)
    if mode not in ("online", "offline"):
        raise ValueError(f'mode must be "online" or "offline", got {mode!r}')
    if signal not in ("margin", "probability"):
        raise ValueError(f'signal must be "margin" or "probability", got {signal!r}')
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    count, mean = _means(cells, member, signal)
    tuning = None
    if a == "tune":
        tuning = _tune(cells, member, count, mean, signal)
        offline_a = max(tuning, key=lambda value: tuning[value])
    else:
        offline_a = float(a)
    if not 0 <= offline_a <= 1:
        raise ValueError(f'a must be in [0, 1] or "tune", got {a}')
    usual_z = _means(others, np.broadcast_to(np.bool_(False), others.shape), signal)[1][0]
    usual_x = (mean[0] + mean[1]) / 2 if mode == "online" else _offline(mean[0], offline_a)
    if mode == "offline":
        usual_z = _offline(usual_z, offline_a)
    ratio = _ratio(x, usual_x, signal)
    ratio_z = _ratio(z, usual_z, signal)
    ratio_z = np.sort(ratio_z[~np.isnan(ratio_z)])
    if not ratio_z.size:
        raise ValueError(f"none of the {z.size} population samples has a signal")
    score = np.searchsorted(ratio_z, ratio / gamma, side="right") / ratio_z.size
    return RmiaResult(
        score=np.where(np.isnan(ratio), np.nan, score),
        ratio=ratio,
        mode=mode,
        gamma=float(gamma),
        a=offline_a if mode == "offline" else None,
        tuning=tuning,
        n_in=count[1],
        n_out=count[0],
        n_population=ratio_z.size,
        n_population_dropped=z.size - ratio_z.size,
    )


def _means(cells: Array, group: Array, signal: Signal) -> tuple[NDArray[np.int32], Doubles]:
    """Models and mean probability of each sample, out and in: [2, N] both."""
    count, mean, _, _ = _C.group_moments(cells, group, sigmoid=signal == "margin", squares=False, num_threads=threads())
    return count, mean


def _offline(out: Doubles, a: float) -> Doubles:
    return ((1 + a) * out + (1 - a)) / 2


def _probability(signals: Array, signal: Signal) -> Doubles:
    values = np.asarray(signals, np.float64)
    if signal == "probability":
        return values
    decay = np.exp(-np.abs(values))
    probability: Doubles = np.where(values > 0, 1.0, decay) / (1 + decay)
    return probability


def _ratio(signals: Array, usual: Doubles, signal: Signal) -> Doubles:
    ratio: Doubles = _probability(signals, signal) / np.maximum(usual, _SMALLEST)
    return ratio


def _tune(cells: Array, group: Array, count: NDArray[np.int32], mean: Doubles, signal: Signal) -> dict[float, float]:
    """Mean AUC of each a, with some references in the target's place, each left out of its own means."""
    aucs: dict[float, list[float]] = {a: [] for a in _GRID}
    for m in np.unique(np.linspace(0, len(cells) - 1, min(_STAND_INS, len(cells))).astype(int)):
        row = group[m]
        member = row if row.dtype == np.bool_ else np.unpackbits(row, count=cells.shape[1]).astype(np.bool_)
        chance = _probability(cells[m], signal)
        mine = ~member & ~np.isnan(chance)
        left = count[0] - mine
        with np.errstate(divide="ignore", invalid="ignore"):
            out = (mean[0] * count[0] - np.where(mine, chance, 0.0)) / left
        known = (left > 0) & ~np.isnan(chance)
        if known.any() and 0 < member[known].sum() < known.sum():
            for a in _GRID:
                ratio = chance[known] / np.maximum(_offline(out[known], a), _SMALLEST)
                aucs[a].append(roc(ratio, member[known]).auc)
    if not aucs[_GRID[0]]:
        raise ValueError("a cannot be tuned: no reference model has both members and others among the samples")
    return {a: float(np.mean(found)) for a, found in aucs.items()}
