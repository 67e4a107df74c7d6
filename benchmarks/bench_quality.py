"""quality: every method on the same models of images, as far from retraining as it is (`nabla-tau compare`), with the
attacks by shadow models. rank: the same on the other suites without those, which take most of the time, and without the
default, which `defaults` has.

Figures are means over three seeds, from one standard deviation below to one above. What is trained and finished is kept
in the cache of `nabla-tau compare`, so a run that was cut off goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from record import Record

from nabla_tau.loop import DEFAULT
from nabla_tau.suites import SUITES
from nabla_tau.suites.data import DataNotFoundError
from nabla_tau.suites.measures import MEASURES
from nabla_tau.suites.runs import ALL, SHADOWS, compare_methods, quick
from nabla_tau.suites.scenarios import Scenario
from nabla_tau.suites.table import ComparisonTable

SHARES = [Scenario("random", share) for share in (0.15, 0.03, 0.30)]
OTHERS = [
    Scenario("classes", 1),
    Scenario("half a class"),
    Scenario("mislabelled", 0.05),
    Scenario("outliers", 100),
]
CASES = [(name, SHARES[0]) for name in ("fashion_mnist", "cifar10")]
RANKED = [(name, SHARES[0]) for name in SUITES if (name, SHARES[0]) not in CASES]
QUICK = CASES[:1]
UNITS = {
    "seconds": "s",
    "kl_forget": "nats",
    "kl_test": "nats",
    "tow": "share",
    "share": "share",
    "ulira": "AUC",
    "ruli": "AUC",
}


def records_of(table: ComparisonTable) -> Iterator[Record]:
    for summary in table.summaries():
        common = {
            "bench": "quality",
            "provider": summary.method,
            "device": str(table.settings["device"]),
            "dtype": "float32",
            "threads": int(table.settings["threads"]),
            "baseline": "retrained",
        }
        case, said = f"{table.suite}, {table.scenario}", "; ".join(summary.remarks)
        if not summary.seeds:
            yield Record(case=case, unit="", note=said, **common)
        if summary.distance is not None:
            yield Record(case=f"{case}: avg_d", p50=summary.distance, unit="points", note=said, **common)
        for name in MEASURES:
            found = summary.measures[name]
            if found is not None:
                low, high = found[0] - found[1], found[0] + found[1]
                unit = UNITS.get(name, "gap")
                yield Record(case=f"{case}: {name}", p20=low, p50=found[0], p80=high, unit=unit, note=said, **common)


def records_of_cases(
    cases: Sequence[tuple[str, Scenario]], device: str, quickly: bool, *, shadows: Sequence[Scenario], **settings: Any
) -> Iterator[Record]:
    """Suites of the device, in scenarios. shadows: those with the U-LiRA attack. settings: of `compare_methods`."""
    for name, scenario in cases:
        suite = SUITES[name]
        if (suite.device == "cuda") != (device == "cuda"):
            continue
        try:
            yield from records_of(
                compare_methods(
                    quick(suite) if quickly else suite,
                    scenario,
                    shadows=SHADOWS if scenario in shadows else 0,
                    progress=True,
                    **{"seeds": (0,) if quickly else (0, 1, 2)} | settings,
                )
            )
        except DataNotFoundError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)


def run(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    yield from records_of_cases(QUICK if quickly else CASES, device, quickly, shadows=[] if quickly else SHARES[:1])


def rank(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    quick_ones = [case for case in RANKED if case[0] == "digits"]
    methods = [name for name in ALL if name != DEFAULT]
    yield from records_of_cases(quick_ones if quickly else RANKED, device, quickly, shadows=[], methods=methods)
