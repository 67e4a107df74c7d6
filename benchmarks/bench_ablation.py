"""ablation: the default (`Restart`) with one of its numbers changed, on five suites, 15 % forgotten, two seeds.

Figures are means over suites and seeds of the distance from the retrained model, and for test accuracy also the worst.

leave_one_out: the rate and the length of the default chosen anew without one suite, and what the choice does on that
one. What is chosen is the least mean of `worse` over the other suites.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from record import Record

from nabla_tau import unlearn
from nabla_tau.methods.restart import Restart
from nabla_tau.suites import SUITES, train
from nabla_tau.suites.data import DataNotFoundError
from nabla_tau.suites.measures import answers, compared
from nabla_tau.suites.scenarios import Scenario, split

WHERE = ("digits", "mnist_5k", "diamonds", "clinc150", "goemotions")
DEFAULT = Restart(hopeless=-1e9)  # judged by what it reaches, not by what it falls back to
ONE = dataclasses.replace(DEFAULT, cycles=1)  # the same length for all


def changed(method: Restart, rate: float = 1, length: float = 1) -> Restart:
    steps = round(length * method.min_steps)
    return dataclasses.replace(
        method, relative_rate=rate * method.relative_rate, passes=length * method.passes, min_steps=steps
    )


VARIANTS = {
    "as it is": ONE,
    "a quarter of the rate": changed(ONE, rate=1 / 4),
    "half the rate": changed(ONE, rate=1 / 2),
    "twice the rate": changed(ONE, rate=2),
    "four times the rate": changed(ONE, rate=4),
    "half as long": changed(ONE, length=1 / 2),
    "twice as long": changed(ONE, length=2),
    "half the batch": dataclasses.replace(ONE, batch_size=ONE.batch_size // 2),
    "twice the batch": dataclasses.replace(ONE, batch_size=2 * ONE.batch_size),
    "no warm-up": dataclasses.replace(ONE, warmup=0.0),
}
GRID = {
    f"{rate:g} of the rate, {length:.2g} of the length": changed(DEFAULT, rate, length)
    for rate in (1 / 4, 1 / 2, 1, 2, 4)
    for length in (1 / 2, 2 / 3, 1)
}
AS_IT_IS = next(name for name, method in GRID.items() if method == DEFAULT)
MEASURES = ("gap_auc_loss", "gap_mia_loss", "gap_forget_accuracy", "gap_retain_accuracy", "gap_test_accuracy", "share")


class Found(NamedTuple):
    variant: str
    where: str
    measures: Mapping[str, float]  # of `compared`, and share: seconds as a share of retraining's


def found_of(variants: Mapping[str, Restart], suites: Sequence[str], seeds: Sequence[int]) -> Iterator[Found]:
    for where in suites:
        suite = SUITES[where]
        try:
            data = suite.data()
        except DataNotFoundError as error:
            print(f"{where}: left out: {error}", file=sys.stderr)
            continue
        fit = {"epochs": suite.epochs, "batch_size": suite.batch_size, "learning_rate": suite.learning_rate}
        for seed in seeds:
            parts = split(data, Scenario("random", 0.15), train=suite.train, held_out=suite.held_out, seed=seed)
            original = train(suite.model, parts.train, **fit, seed=seed)
            started = time.perf_counter()
            retrained = train(suite.model, parts.retain, **fit, seed=seed + 1000)
            seconds, wanted = time.perf_counter() - started, answers(retrained, parts)
            for name, method in variants.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    sets = {"forget": parts.forget, "retain": parts.retain, "held_out": parts.held_out}
                    result = unlearn(original, **sets, method=method, seed=seed)
                measures = compared(answers(result.model, parts), wanted) | {"share": result.seconds / seconds}
                yield Found(name, where, measures)


def run(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    found = [*found_of(VARIANTS, WHERE[:1] if quickly else WHERE, (0,) if quickly else (0, 1))]
    for name in VARIANTS:
        for measure in MEASURES:
            values = np.array([row.measures[measure] for row in found if row.variant == name], float)
            record = {"bench": "ablation", "provider": name, "threads": threads, "device": device, "dtype": "float32"}
            size = values if measure == "share" else np.abs(values)
            yield Record(case=f"{measure}: mean size", p50=float(size.mean()), unit="share", **record)
            yield Record(case=f"{measure}: lowest", p50=float(values.min()), unit="share", **record)


def worse(measures: Mapping[str, float]) -> float:
    """Distance from retraining's AUC, and test accuracy lost to it."""
    return abs(measures["gap_auc_loss"]) + max(0.0, -measures["gap_test_accuracy"])


def leave_one_out(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    suites = ("digits", "breast_cancer") if quickly else ("breast_cancer", *WHERE)
    found = [*found_of(GRID, suites, (0,) if quickly else (0, 1, 2))]
    suites = tuple(dict.fromkeys(row.where for row in found))

    def mean(variant: str, where: str) -> float:
        return float(np.mean([worse(row.measures) for row in found if (row.variant, row.where) == (variant, where)]))

    for where in suites:
        others = [suite for suite in suites if suite != where]
        chosen = min(GRID, key=lambda variant: np.mean([mean(variant, other) for other in others]))
        record = {"bench": "leave_one_out", "threads": threads, "device": device, "dtype": "float32", "unit": "share"}
        for provider, variant in (("chosen without it", chosen), ("default", AS_IT_IS)):
            yield Record(case=f"{where}: worse", provider=provider, p50=mean(variant, where), note=variant, **record)
            for measure in MEASURES:
                rows = [row.measures for row in found if (row.variant, row.where) == (variant, where)]
                p50 = float(np.mean([row[measure] for row in rows]))
                yield Record(case=f"{where}: {measure}", provider=provider, p50=p50, note=variant, **record)
