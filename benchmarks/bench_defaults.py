"""defaults: `unlearn`'s default, nabla-tau's two recipes and finetuning on every suite and kind of forget set.

Like `quality`, which has all methods on one suite. The suites whose models take longest to train are left out of the
other kinds of forget sets. attacks: by the shadow models of every suite that has some, on one seed: are models that
unlearned told from retrained ones (U-LiRA), and what they unlearned from what they never saw (RULI)? Beside them
retraining itself, cut short: what U-LiRA finds of it is the length of a training alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from bench_quality import OTHERS, SHARES, records_of_cases
from record import Record

from nabla_tau.loop import DEFAULT
from nabla_tau.suites import SUITES, Suite
from nabla_tau.suites.data import DataNotFoundError
from nabla_tau.suites.runs import SHADOWS, quick
from nabla_tau.suites.scenarios import Scenario, split
from nabla_tau.suites.shadows import Shadows

METHODS = (DEFAULT, "nabla-tau", "nabla-tau (paper)", "finetune")
SLOW = ("fashion_mnist", "clinc150_transformer")
CASES = [
    *((name, SHARES[0]) for name in SUITES),
    *((name, scenario) for scenario in [*SHARES[1:], *OTHERS] for name in SUITES if name not in SLOW),
]
QUICK = [("digits", SHARES[0])]
LENGTHS = (0.25, 0.5, 0.75)  # of a retraining


def run(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    yield from records_of_cases(QUICK if quickly else CASES, device, quickly, shadows=[], methods=METHODS)


def attacks(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    cases = QUICK if quickly else [(name, SHARES[0]) for name, suite in SUITES.items() if suite.shadow is not None]
    for record in records_of_cases(cases, device, quickly, shadows=SHARES[:1], methods=METHODS, seeds=(0,)):
        if record.case.endswith((": ulira", ": ruli")):
            yield record
    for name, scenario in cases:
        suite = SUITES[name]
        if (suite.device == "cuda") != (device == "cuda"):
            continue
        try:
            yield from cut_short(quick(suite) if quickly else suite, scenario, device, threads)
        except DataNotFoundError as error:
            print(f"{name}: left out: {error}", file=sys.stderr)


def cut_short(suite: Suite, scenario: Scenario, device: str, threads: int) -> Iterator[Record]:
    parts = split(suite.data(), scenario, train=suite.train, held_out=suite.held_out, seed=0)
    shadows = Shadows(suite, parts, models=SHADOWS, seed=0)
    for share in LENGTHS:
        yield Record(
            bench="quality",
            case=f"{suite.name}, {scenario}: ulira",
            provider=f"retrained, {share:.0%} of the epochs",
            device=device,
            dtype="float32",
            threads=threads,
            p50=shadows.cut_short(share),
            unit="AUC",
            baseline="retrained",
        )
