"""Micro-batches of any size give the step of one large batch, written here in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau import Unlearner
from nabla_tau.objective import objective, target_from_losses

ALPHA, CAP = 0.4, 0.5
HELD_OUT = torch.linspace(0.1, 4.0, 50, dtype=torch.float64)
GATES = ("batch", "two_sided", "sample", "quantile")
Losses = tuple[Tensor, Tensor]


class Tokens(nn.Module):
    """Logits of each of T tokens, and a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head, self.unused = nn.Linear(5, 12), nn.Linear(12, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh()).view(len(x), 2, 3)


def labelled(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (rows, 2), generator=generator)


def without_loss(batch: tuple[Tensor, Tensor], *samples: int) -> tuple[Tensor, Tensor]:
    targets = batch[1].clone()
    targets[0, 1] = -100  # a sample with one token
    targets[list(samples)] = -100
    return batch[0], targets


def token_losses(logits: Tensor, targets: Tensor) -> Losses:
    kept = targets != -100
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (nll * kept).sum(1) / kept.sum(1).clamp(min=1), kept.any(1)


def squared(logits: Tensor, targets: Tensor) -> Tensor:
    return (logits[..., 0] - targets.double()).square().mean(1)


def gradients(model, forget, retain, losses_of, gate, balance=None, held=False) -> list[Tensor | None]:
    """Of one large batch, in plain PyTorch."""
    parameters = list(model.parameters())
    target = target_from_losses(HELD_OUT)
    losses, counts = (torch.cat(c) for c in zip(*(losses_of(model, b) for b in (forget, retain)), strict=True))
    mask = torch.arange(len(losses)) < len(forget[0])
    parts = []
    for of_retain in (False, True):
        keep = counts & (mask != of_retain)
        weight = 0.0 if held else 1.0
        terms = objective(losses, mask, target, ALPHA, gate=gate, power=2, forget_weight=weight, counts=keep)
        parts.append(torch.autograd.grad(terms.total, parameters, retain_graph=True, allow_unused=True))
    scale = 1.0
    if balance is not None:
        norms = [torch.stack([g.norm() for g in part if g is not None]).norm() for part in parts]
        scale = min(1.0, (balance * norms[1] / norms[0].clamp(min=1e-300)).item())
    return [None if f is None else scale * f + r for f, r in zip(*parts, strict=True)]


def plain_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Losses:
    return token_losses(model(batch[0]), batch[1])


def own_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Losses:
    losses = squared(model(batch[0]), batch[1])
    return losses, torch.ones_like(losses, dtype=torch.bool)


def own_forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Losses:
    return model(batch[0]), batch[1]


def stepped(model, forget, retain, **settings) -> tuple[Unlearner, list[Tensor | None]]:
    """The gradients that one step used, and the unlearner."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tau = HELD_OUT if settings["gate"] == "quantile" else HELD_OUT.mean()
    unlearner = Unlearner(model, alpha=ALPHA, tau=tau, optimizer=optimizer, **settings)
    unlearner.metrics = unlearner.step(forget, retain)
    return unlearner, [p.grad for p in model.parameters()]


def check(found: list[Tensor | None], wanted: list[Tensor | None]) -> None:
    assert [g is None for g in found] == [g is None for g in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.fixture
def model() -> Tokens:
    torch.manual_seed(0)
    return Tokens().double()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("balance", [None, CAP])
@pytest.mark.parametrize("size", [1, 3, 4, 11, None])
@pytest.mark.parametrize("way", ["plain", "own forward", "own loss"])
def test_micro_batches_give_the_step_of_one_batch(model, gate, balance, size, way):
    # 7 and 11 samples: the last micro-batches are ragged; some whole ones hold no sample that counts.
    forget, retain = without_loss(labelled(7, 1), 3, 4, 5), without_loss(labelled(11, 2), 2, 9)
    settings = {"own forward": {"forward": own_forward}, "own loss": {"loss": squared}}.get(way, {})
    if way == "own loss":
        forget, retain = labelled(7, 1), labelled(11, 2)
    wanted = gradients(model, forget, retain, own_losses if settings.get("loss") else plain_losses, gate, balance)
    unlearner, found = stepped(model, forget, retain, gate=gate, balance=balance, micro_batch_size=size, **settings)
    check(found, wanted)
    whole, _ = stepped(model, forget, retain, gate=gate, balance=balance, **settings)
    for ours, theirs in zip(unlearner.metrics, whole.metrics, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("balance", [None, CAP])
@pytest.mark.parametrize("rows", [(0, 5), (5, 0), (1, 5)])
def test_a_group_without_samples(model, gate, balance, rows):
    forget, retain = labelled(rows[0], 1), labelled(rows[1], 2)
    if rows[0] == 1:
        forget = without_loss(forget, 0)
    _, found = stepped(model, forget, retain, gate=gate, balance=balance, micro_batch_size=2)
    wanted = gradients(model, forget, retain, plain_losses, gate, balance)
    check(found, wanted)


@pytest.mark.parametrize("balance", [None, CAP])
@pytest.mark.parametrize("size", [2, None])
def test_hold_is_by_the_rank_of_all_forget_samples(model, balance, size):
    forget, retain = labelled(6, 1), labelled(5, 2)
    settings = {"gate": "quantile", "balance": balance, "micro_batch_size": size, "hold": True}
    unlearner, found = stepped(model, forget, retain, **settings)
    assert 0 < unlearner._rank < 0.5
    check(found, gradients(model, forget, retain, plain_losses, "quantile", balance))
    with torch.no_grad():
        model.head.weight *= 30  # forget losses far above the held-out ones
    unlearner, found = stepped(model, forget, retain, **settings)
    assert unlearner._rank >= 0.5
    wanted = gradients(model, forget, retain, plain_losses, "quantile", balance, held=True)
    check(found, wanted)
    assert unlearner.metrics.gate_open == 0


class Counting(Tokens):
    """Counts the samples that went forward, with and without gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {True: 0, False: 0}
        self.most = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen[torch.is_grad_enabled()] += len(x)
        self.most = max(self.most, len(x))
        return super().forward(x)


@pytest.mark.parametrize(("gate", "again"), [("batch", 0), ("two_sided", 0), ("sample", 0), ("quantile", 7)])
def test_nothing_is_recomputed_but_the_forget_losses_of_the_quantile_gate(gate, again):
    torch.manual_seed(0)
    model = Counting().double()
    settings = {"gate": gate, "micro_batch_size": 3, "performance": "off"}
    unlearner, _ = stepped(model, labelled(7, 1), labelled(11, 2), **settings)
    assert unlearner.model.seen == {True: 18, False: again}
    assert unlearner.model.most == 3
    assert unlearner.forwards == "micro-batches of at most 3 samples"


def test_closed_gate_leaves_the_step_of_the_retained_samples(model):
    forget, retain = labelled(6, 1), labelled(5, 2)
    with torch.no_grad():
        model.head.weight *= 30
    _, found = stepped(model, forget, retain, gate="batch", micro_batch_size=2)
    check(found, gradients(model, forget, retain, plain_losses, "batch"))


def test_what_is_drawn_in_the_first_look_is_drawn_again():
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.drawn = nn.Linear(5, 6), []

        def forward(self, x: Tensor) -> Tensor:
            self.drawn.append((torch.is_grad_enabled(), torch.rand(3)))
            return self.layer(x).view(len(x), 2, 3)

    unlearner, _ = stepped(Drops().double(), labelled(4, 1), labelled(2, 2), gate="quantile", micro_batch_size=2)
    looks = [draw for with_gradient, draw in unlearner.model.drawn if not with_gradient]
    passes = [draw for with_gradient, draw in unlearner.model.drawn if with_gradient]
    assert len(looks) == 2
    for look, again in zip(looks, passes[-2:], strict=True):
        assert torch.equal(look, again)


def test_batch_statistics_of_micro_batches_are_warned_about():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Unflatten(1, (2, 3))).double()
    with pytest.warns(UserWarning, match="1 normalises with the statistics of what goes through the model at once"):
        stepped(model, labelled(4, 1), labelled(4, 2), gate="batch", micro_batch_size=2)


def test_refusals(model):
    with pytest.raises(ValueError, match="micro_batch_size must be at least 1, got 0"):
        Unlearner(model, alpha=0.5, micro_batch_size=0)
    forward = lambda model, batch: (model(batch[1]), batch[2])  # noqa: E731
    batch = (torch.zeros(9), *labelled(4, 1))
    with pytest.raises(ValueError, match="one entry a sample, got lengths 9 and 4"):
        Unlearner(model, alpha=0.5, tau=1.0, forward=forward, micro_batch_size=2).step(batch, batch)


class Counted(nn.Linear):
    """Counts the samples that go through it, by whether a backward may follow."""

    def __init__(self) -> None:
        super().__init__(5, 3)
        self.seen = {True: 0, False: 0}

    def forward(self, x: Tensor) -> Tensor:
        self.seen[torch.is_grad_enabled()] += len(x)
        return super().forward(x)


@pytest.mark.parametrize("balance", [None, CAP])
@pytest.mark.parametrize("gate", ["batch", "sample", "quantile"])
@pytest.mark.parametrize("size", [None, 4])
def test_a_closed_gate_saves_the_ascent_and_changes_no_step(gate, balance, size):
    (x, y), (u, v) = labelled(6, 3), labelled(9, 4)
    forget, retain = (x, y[:, 0]), (u, v[:, 0])
    found = {}
    for looks in (True, False):
        torch.manual_seed(0)
        model = Counted().double()
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        settings = {"gate": gate, "balance": balance, "micro_batch_size": size}
        settings["performance"] = "auto" if looks else "off"
        unlearner = Unlearner(model, alpha=ALPHA, tau=HELD_OUT - 100, optimizer=sgd, **settings)
        unlearner.step(forget, retain)  # chooses how to go forward, and finds the gate closed
        model.seen = {True: 0, False: 0}
        metrics = [unlearner.step(forget, retain) for _ in range(3)]
        closed = dict(model.seen)
        unlearner.set_tau(HELD_OUT + 100)
        metrics += [unlearner.step(forget, retain) for _ in range(2)]
        found[looks] = [*model.parameters(), *(value for of_step in metrics for value in of_step)]
        if looks:
            assert closed == {True: 3 * 9, False: 3 * 6}
            assert unlearner.ascents_saved == 3
            assert metrics[2].gate_open == 0
            assert metrics[3].gate_open == pytest.approx(1)
    for one, other in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
