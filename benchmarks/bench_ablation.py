"""ablation: the default (`Restart`) with one of its numbers changed, on five suites, 15 % forgotten, two seeds.

Figures are means over suites and seeds of the distance from the retrained model, and for test accuracy also the worst.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterator

import numpy as np
from record import Record

from nabla_tau import unlearn
from nabla_tau.methods.restart import Restart
from nabla_tau.suites import SUITES, train
from nabla_tau.suites.data import DataNotFoundError
from nabla_tau.suites.measures import answers, compared
from nabla_tau.suites.scenarios import Scenario, split

WHERE = ("digits", "mnist_5k", "diamonds", "clinc150", "goemotions")
ONE = Restart(cycles=1, hopeless=-1e9)  # the same length for all
VARIANTS = {
    "as it is": ONE,
    "a quarter of the rate": dataclasses.replace(ONE, relative_rate=ONE.relative_rate / 4),
    "half the rate": dataclasses.replace(ONE, relative_rate=ONE.relative_rate / 2),
    "twice the rate": dataclasses.replace(ONE, relative_rate=2 * ONE.relative_rate),
    "four times the rate": dataclasses.replace(ONE, relative_rate=4 * ONE.relative_rate),
    "half as long": dataclasses.replace(ONE, passes=ONE.passes / 2, min_steps=ONE.min_steps // 2),
    "twice as long": dataclasses.replace(ONE, passes=2 * ONE.passes, min_steps=2 * ONE.min_steps),
    "half the batch": dataclasses.replace(ONE, batch_size=ONE.batch_size // 2),
    "twice the batch": dataclasses.replace(ONE, batch_size=2 * ONE.batch_size),
    "no warm-up": dataclasses.replace(ONE, warmup=0.0),
    "another cycle where wanted": Restart(hopeless=-1e9),
}
MEASURES = ("gap_auc_loss", "gap_mia_loss", "gap_forget_accuracy", "gap_retain_accuracy", "gap_test_accuracy", "share")


def run(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for where in WHERE[:1] if quickly else WHERE:
        suite = SUITES[where]
        try:
            data = suite.data()
        except DataNotFoundError as error:
            print(f"{where}: left out: {error}")
            continue
        fit = {"epochs": suite.epochs, "batch_size": suite.batch_size, "learning_rate": suite.learning_rate}
        for seed in (0,) if quickly else (0, 1):
            parts = split(data, Scenario("random", 0.15), train=suite.train, held_out=suite.held_out, seed=seed)
            original = train(suite.model, parts.train, **fit, seed=seed)
            started = time.perf_counter()
            retrained = train(suite.model, parts.retain, **fit, seed=seed + 1000)
            seconds, wanted = time.perf_counter() - started, answers(retrained, parts)
            for name, method in VARIANTS.items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    sets = {"forget": parts.forget, "retain": parts.retain, "held_out": parts.held_out}
                    result = unlearn(original, **sets, method=method, seed=seed)
                gaps = compared(answers(result.model, parts), wanted)
                found[name].append(gaps | {"share": result.seconds / seconds})
    for name, rows in found.items():
        for measure in MEASURES:
            values = np.array([row[measure] for row in rows], float)
            record = {"bench": "ablation", "provider": name, "threads": threads, "device": device, "dtype": "float32"}
            size = values if measure == "share" else np.abs(values)
            yield Record(case=f"{measure}: mean size", p50=float(size.mean()), unit="share", **record)
            yield Record(case=f"{measure}: lowest", p50=float(values.min()), unit="share", **record)
