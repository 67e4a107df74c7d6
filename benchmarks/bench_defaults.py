"""defaults: `unlearn`'s default, nabla-tau's two recipes and finetuning on every suite and kind of forget set.

Like `quality`, which has all methods on one suite; with the U-LiRA attack on random shares of 15 % alone. The suites
whose models take longest to train are left out of the other kinds of forget sets.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench_quality import OTHERS, SHARES, records_of
from record import Record

from nabla_tau.loop import DEFAULT
from nabla_tau.suites import SUITES
from nabla_tau.suites.data import DataNotFoundError
from nabla_tau.suites.runs import SHADOWS, compare_methods, quick

METHODS = (DEFAULT, "nabla-tau", "nabla-tau (paper)", "finetune")
SLOW = ("fashion_mnist", "clinc150_transformer")
CASES = [
    *((name, SHARES[0]) for name in SUITES),
    *((name, scenario) for scenario in [*SHARES[1:], *OTHERS] for name in SUITES if name not in SLOW),
]
QUICK = [("digits", SHARES[0])]


def run(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    for name, scenario in QUICK if quickly else CASES:
        suite = SUITES[name]
        if (suite.device == "cuda") != (device == "cuda"):
            continue
        try:
            table = compare_methods(
                quick(suite) if quickly else suite,
                scenario,
                methods=METHODS,
                seeds=(0,) if quickly else (0, 1, 2),
                shadows=SHADOWS if scenario == SHARES[0] and not quickly else 0,
                progress=True,
            )
        except DataNotFoundError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
        except ValueError as error:  # a suite may have fewer outliers or classes than a scenario takes
            print(f"{name}, {scenario}: left out: {error}", file=sys.stderr)
        else:
            yield from records_of(table)
