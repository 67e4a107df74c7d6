"""defaults: `unlearn`'s default, nabla-tau's two recipes and finetuning on every suite and kind of forget set.

Like `quality`, which has all methods on one suite. The suites whose models take longest to train are left out of the
other kinds of forget sets. attacks: by the shadow models of every suite that has some, on one seed: are models that
unlearned told from retrained ones (U-LiRA), and what they unlearned from what they never saw (RULI)?
"""

from __future__ import annotations

from collections.abc import Iterator

from bench_quality import OTHERS, SHARES, records_of_cases
from record import Record

from nabla_tau.loop import DEFAULT
from nabla_tau.suites import SUITES

METHODS = (DEFAULT, "nabla-tau", "nabla-tau (paper)", "finetune")
SLOW = ("fashion_mnist", "clinc150_transformer")
CASES = [
    *((name, SHARES[0]) for name in SUITES),
    *((name, scenario) for scenario in [*SHARES[1:], *OTHERS] for name in SUITES if name not in SLOW),
]
QUICK = [("digits", SHARES[0])]


def run(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    yield from records_of_cases(QUICK if quickly else CASES, device, quickly, shadows=[], methods=METHODS)


def attacks(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    cases = QUICK if quickly else [(name, SHARES[0]) for name, suite in SUITES.items() if suite.shadow is not None]
    for record in records_of_cases(cases, device, quickly, shadows=SHARES[:1], methods=METHODS, seeds=(0,)):
        if record.case.endswith((": ulira", ": ruli")):
            yield record
