"""What is to be forgotten of a suite's data: a random share, classes, half a class, wrong labels, outliers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from nabla_tau.arguments import check_fields, check_kind, check_seed, whole
from nabla_tau.evaluation import forward_batches
from nabla_tau.suites.data import Data

Kind = Literal["random", "classes", "half a class", "mislabelled", "outliers"]


@dataclass(frozen=True)
class Scenario:
    """kind and amount: the share of the training samples that is "random"ly drawn or "mislabelled", the number of
    "classes" or of "outliers"; "half a class" has none."""

    kind: Kind
    amount: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.kind in ("random", "mislabelled") and not 0 < self.amount < 1:
            raise ValueError(f"{self.kind}: the share must be in (0, 1), got {self.amount}")
        if self.kind in ("classes", "outliers") and (self.amount < 1 or self.amount != int(self.amount)):
            raise ValueError(f"{self.kind}: the number must be a whole one of at least 1, got {self.amount}")

    def __str__(self) -> str:
        if self.kind in ("random", "mislabelled"):
            return f"{self.amount:.0%} {self.kind}"
        if self.kind == "classes" and self.amount == 1:
            return "1 class"
        return self.kind if self.kind == "half a class" else f"{self.amount:.0f} {self.kind}"


class Parts(NamedTuple):
    """train: forget and retain together. unseen: what the forget set is compared with, samples of the same kind that no
    model has seen. test: all unseen samples, as they are."""

    train: Data
    forget: Data
    retain: Data
    held_out: Data
    unseen: Data
    test: Data


def split(
    data: Data,
    scenario: Scenario,
    *,
    train: int,
    held_out: int,
    seed: int,
    reference: Callable[[Data], torch.nn.Module] | None = None,
) -> Parts:
    """Random parts of a data set, the same for the same seed.

    Mislabelled samples get another label, drawn at random, in the training data and in `unseen`. Outliers are the
    samples of the highest loss by a model that saw neither: `reference` makes it from the held-out samples.
    Raises ValueError for more samples or classes than there are.
    """
    check_kind(scenario, Scenario, "scenario")
    check_seed(seed)
    whole(train, "train", least=1)
    whole(held_out, "held_out", least=1)
    x, y = data
    if len(x) != len(y):
        raise ValueError(f"there must be a label for each of {len(x)} samples, got {len(y)}")
    if train + held_out >= len(x):
        raise ValueError(f"{train} training and {held_out} held-out samples leave none unseen of {len(x)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator).to(x.device)
    own, held, rest = order[:train], order[train : train + held_out], order[train + held_out :]
    y, test = y.clone(), (x[rest], y[rest])
    classes = int(y.max()) + 1
    everything = torch.arange(len(rest), device=x.device)
    if scenario.kind in ("classes", "half a class"):
        count = int(scenario.amount or 1)
        if count >= classes:
            raise ValueError(f"{count} classes are to be forgotten of {classes}")
        removed = torch.randperm(classes, generator=generator)[:count].to(x.device)
        chosen = torch.isin(y[own], removed)
        if scenario.kind == "half a class":
            chosen &= torch.rand(train, generator=generator).to(x.device) < 0.5
        alike = torch.isin(y[rest], removed).nonzero().flatten()
    elif scenario.kind == "outliers":
        count = int(scenario.amount)
        if reference is None or count >= train:
            raise ValueError(f"{count} outliers of {train} samples need a reference model and fewer than all")
        model = reference((x[held], y[held]))
        losses = [_losses(model, (x[index], y[index])) for index in (own, rest)]
        chosen = torch.zeros(train, dtype=torch.bool, device=x.device)
        chosen[losses[0].topk(count).indices] = True
        alike = losses[1].topk(max(1, round(count * len(rest) / train))).indices
    else:
        chosen = torch.arange(train, device=x.device) < round(scenario.amount * train)
        alike = everything
        if scenario.kind == "mislabelled":
            for index in (own[chosen], rest):
                shift = torch.randint(1, classes, (len(index),), generator=generator).to(x.device)
                y[index] = (y[index] + shift) % classes

    count = int(chosen.sum())
    if not 0 < count < train:
        raise ValueError(f"{scenario} of {train} samples are {count}: there must be some to forget, and some to retain")

    def part(index: Tensor) -> Data:
        return x[index], y[index]

    return Parts(part(own), part(own[chosen]), part(own[~chosen]), part(held), part(rest[alike]), test)


def _losses(model: torch.nn.Module, data: Data) -> Tensor:
    batches = zip(*(torch.split(column, 500) for column in data), strict=True)
    return torch.cat([F.cross_entropy(z, y, reduction="none") for z, y in forward_batches(model, batches)])
