"""A table: forget diamonds that a classifier of their cut was trained on (53,940 rows, 5 cuts).

    pip install --no-deps plotnine                     # only for the table that it carries; it is never imported
    python examples/tabular.py

A network of three layers memorises 5,000 diamonds. A share of them is then forgotten by default and by
the published recipe, and both are audited against a model trained without those diamonds.
"""

from __future__ import annotations

import torch
from torch import nn
from training import fit, judge, make_parser, save, split

from nabla_tau.suites.data import CUTS, DataNotFoundError, diamonds


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(22, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, len(CUTS)),
    )


def main() -> None:
    args = make_parser(__doc__).parse_args()
    # Layers as small as these lose more by waiting for a second thread than it brings them.
    torch.set_num_threads(1)
    try:
        data = diamonds()
    except DataNotFoundError as error:
        raise SystemExit(error) from None
    rows, epochs = (1_000, 60) if args.quick else (5_000, 80)
    parts = split(data, train=rows, held_out=rows // 4, unseen=rows // 2, fraction=args.fraction, seed=args.seed)

    loss = nn.functional.cross_entropy
    original = fit(make_model, parts["train"], loss, epochs=epochs, seed=args.seed)
    retrained = fit(make_model, parts["retain"], loss, epochs=epochs, seed=args.seed + 1)

    report, _ = judge(args, parts, original, retrained)
    save(report, args)


if __name__ == "__main__":
    main()
