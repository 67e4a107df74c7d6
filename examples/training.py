"""What the examples share: their options, a random split, a training loop, and how they judge the recipes asked for."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nabla_tau

Data = tuple[Tensor, Tensor]


def make_parser(description: str | None, *, share_of: str | None = "training rows") -> argparse.ArgumentParser:
    """share_of: what --fraction is a share of; None leaves that option out."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if share_of is not None:
        parser.add_argument("--fraction", type=_share, default=0.15, help=f"share of the {share_of} to forget")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the training and the unlearning")
    parser.add_argument(
        "--recipe",
        nargs="+",
        choices=("default", "paper"),
        default=["default", "paper"],
        help="the first is judged, and a second compared with it; without this option both, as here",
    )
    parser.add_argument("--quick", action="store_true", help="few rows, a few seconds: to see that it runs")
    parser.add_argument("--json", type=_file(".json"), metavar="FILE", help="write the audit's figures here")
    parser.add_argument("--out", type=_file(".html"), default="report.html", metavar="FILE", help="the report")
    return parser


def _share(text: str) -> float:
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return float(text)


def _file(suffix: str) -> Callable[[str], Path]:
    def path(text: str) -> Path:
        # The report is written last: a wrong name should not cost the whole run.
        if Path(text).suffix != suffix:
            raise argparse.ArgumentTypeError(f"must end in {suffix}, got {text}")
        return Path(text)

    return path


def split(data: Data, *, train: int, held_out: int, unseen: int, fraction: float, seed: int) -> dict[str, Data]:
    """Random parts of the data: "train" for the original model, of which "forget" is the share to be forgotten and
    "retain" the rest; "held_out", which `unlearn` measures its target on; "unseen", which only the audit looks at."""
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    trained, forgotten = order[:train], round(fraction * train)
    parts = {
        "train": trained,
        "forget": trained[:forgotten],
        "retain": trained[forgotten:],
        "held_out": order[train : train + held_out],
        "unseen": order[train + held_out :][:unseen],
    }
    return {name: (x[rows], y[rows]) for name, rows in parts.items()}


def fit(
    make_model: Callable[[], nn.Module], data: Data, loss: Callable[[Tensor, Tensor], Tensor], *, epochs: int, seed: int
) -> tuple[nn.Module, float]:
    """A new model, trained with AdamW and nothing that keeps it from memorising its data; and the seconds it took."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=epochs)
    x, y = data
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return model.eval(), time.perf_counter() - started


def judge(
    args: argparse.Namespace,
    parts: Mapping[str, Any],
    original: tuple[nn.Module, float],
    retrained: tuple[nn.Module, float],
    **calls: Any,
) -> tuple[nabla_tau.AuditReport, dict[str, nn.Module]]:
    """Unlearn parts["forget"] by each recipe asked for, and audit the first beside the others, the original and the
    model that was trained without: (model, seconds that its training took). calls: forward and loss, where the model is
    not a plain classifier. The report, whose table is printed, and all models by name."""
    data = {name: parts[name] for name in ("forget", "retain", "held_out")}
    # Nothing is set for this data or this model: the same defaults serve images, text and tables.
    results = [nabla_tau.unlearn(original[0], **data, recipe=recipe, seed=args.seed, **calls) for recipe in args.recipe]
    judged, *others = results
    report = nabla_tau.audit(
        judged.model,
        forget=parts["forget"],
        unseen=parts["unseen"],
        retain=parts["retain"],
        retrained=retrained[0],
        original=original[0],
        compare={result.recipe: result.model for result in others},
        record=judged.to_dict(),
        seconds={"original": original[1], "retrained": retrained[1]}
        | {result.recipe: result.seconds for result in others},
        **calls,
    )
    print(report.table())
    models = {"original": original[0], "retrained": retrained[0]}
    return report, models | {result.recipe: result.model for result in results}


def save(report: nabla_tau.AuditReport, args: argparse.Namespace) -> None:
    for path in filter(None, (args.out, args.json)):
        print("written:", report.save(path))
