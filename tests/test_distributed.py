"""One step of several processes is that of one process with the union of their batches (gloo, on the CPU)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nabla_tau import Unlearner

ALPHA = 0.4
HELD_OUT = torch.linspace(0.1, 4.0, 50, dtype=torch.float64)
GATES = ("batch", "two_sided", "sample", "quantile")
# Samples of each rank, forget and retain: alike, uneven, a rank without forget samples, a rank with nothing.
ROWS = {
    "alike": [(3, 4), (3, 4)],
    "uneven": [(5, 2), (1, 6), (2, 3)],
    "no forget": [(4, 3), (0, 5), (3, 2)],
    "nothing": [(4, 3), (0, 0)],
}


class Net(nn.Module):
    """Logits of two tokens. `spare` is reached by no loss."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 6)
        self.spare = nn.Linear(2, 2) if spare else None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(x)).tanh()).view(len(x), 2, 3)


def make_model(spare: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return Net(spare).double().eval()


def labelled(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (rows, 2), generator=generator)
    targets[1:2] = -100  # a sample without loss
    return x, targets


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits[..., 0] - targets.double()).square().mean(1)


def own_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch[0]), batch[1]


def parts_of(rows: list[tuple[int, int]], rank: int | None, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Forget and retain batch of a rank, or (None) their unions."""
    found = []
    for group in range(2):
        counts = [row[group] for row in rows]
        whole = labelled(sum(counts), 10 * seed + group)
        start = sum(counts[:rank])
        found.append(whole if rank is None else tuple(t[start : start + counts[rank]] for t in whole))
    return found


def wrapped(model: nn.Module, kind: str) -> tuple[nn.Module, dict[str, Any]]:
    if kind == "ddp":
        return DistributedDataParallel(model), {}
    if kind == "ddp views":
        return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True), {}
    if kind == "fsdp":
        for layer in (model.layer, model.head):
            fully_shard(layer)
        return fully_shard(model), {}
    return model, {"process_group": dist.group.WORLD}


def whole(value: Tensor | None) -> Tensor | None:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def two_steps(kind: str | None, rows: list[tuple[int, int]], settings: dict[str, Any], spare: bool = False):
    """Gradients of the last of two steps, the weights after them, and all metrics."""
    model, more = (make_model(spare), {}) if kind is None else wrapped(make_model(spare), kind)
    rank = None if kind is None else dist.get_rank()
    tau = HELD_OUT if settings["gate"] == "quantile" else HELD_OUT.mean()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    unlearner = Unlearner(model, alpha=ALPHA, tau=tau, optimizer=optimizer, **settings, **more)
    metrics = [torch.stack(unlearner.step(*parts_of(rows, rank, seed))) for seed in range(2)]
    gradients = [whole(p.grad) for p in model.parameters()]
    return gradients, [whole(p.detach()) for p in model.parameters()], torch.stack(metrics), unlearner.forwards


def many(kind: str, cases: list[tuple[Any, ...]]) -> list[Any]:
    return [two_steps(kind, *case) for case in cases]


def check_cases(processes: Processes, kind: str, cases: list[tuple[Any, ...]]) -> None:
    size = len(cases[0][0])
    found = processes.run(many, size, kind, cases)
    for number, case in enumerate(cases):
        gradients, weights, metrics, _ = two_steps(None, *case)
        for rank in range(size):
            ours = found[rank][number]
            for mine, theirs in zip(ours[0] + ours[1], gradients + weights, strict=True):
                assert (mine is None) == (theirs is None), case
                if theirs is not None:
                    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-11, msg=lambda m: f"{case}: {m}")  # noqa: B023
            torch.testing.assert_close(ours[2], metrics, rtol=1e-10, atol=1e-11, equal_nan=True)


KINDS = ("ddp", "ddp views", "fsdp", "plain")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ROWS)
def test_a_step_is_that_of_the_union(processes, kind, rows):
    cases = [
        (ROWS[rows], {"gate": gate, "balance": balance, "micro_batch_size": size})
        for gate in GATES
        for balance, size in ((None, None), (None, 2), (0.5, 2))
    ]
    check_cases(processes, kind, cases)


@pytest.mark.parametrize("kind", KINDS)
def test_hold_a_loss_of_ones_own_and_a_forward_of_ones_own(processes, kind):
    rows = ROWS["no forget"]
    quantile = {"gate": "quantile", "hold": True}
    cases = [
        (rows, quantile),
        (rows, quantile | {"balance": 0.5, "micro_batch_size": 2}),
        (rows, {"gate": "batch", "loss": squared}),
        (rows, {"gate": "sample", "loss": squared, "micro_batch_size": 1}),
        (rows, {"gate": "batch", "forward": own_forward, "micro_batch_size": 2}),
        (rows, {"gate": "two_sided", "forward": own_forward}),
    ]
    check_cases(processes, kind, cases)
