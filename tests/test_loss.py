"""`nabla_tau_loss` and `NablaTauLoss`: the formula on logits of every task, mixed batches, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nabla_tau import NablaTauLoss, nabla_tau_loss
from nabla_tau.functional import sample_losses, sample_signals
from nabla_tau.objective import GATES

FORGET = torch.tensor([True, True, False, False, False])


def plain(losses: torch.Tensor, targets: torch.Tensor, tau: float, alpha: float) -> torch.Tensor:
    # A sequence without any unmasked token is no sample.
    retain = ~FORGET & ~(targets.view(5, -1) == -100).all(1)
    return alpha * F.relu(tau - losses[FORGET].mean()) ** 2 + (1 - alpha) * losses[retain].mean()


def classification() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, targets = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, 6, 6, 2])
    return logits, targets, F.cross_entropy(logits, targets, reduction="none")


def sequence() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, targets = torch.randn(5, 4, 7, dtype=torch.float64), torch.randint(7, (5, 4))
    targets[0, 2:] = -100
    targets[3, :] = -100
    per_sample = []
    for row, target in zip(logits, targets, strict=True):
        kept = target != -100
        per_sample.append(F.cross_entropy(row[kept], target[kept]) if kept.any() else torch.zeros(()).double())
    return logits, targets, torch.stack(per_sample)


def multilabel() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits, targets = torch.randn(5, 7, dtype=torch.float64), torch.randint(2, (5, 7)).double()
    return logits, targets, F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)


TASKS = pytest.mark.parametrize("make", [classification, sequence, multilabel])


@TASKS
def test_loss_and_gradient_are_the_formula(make):
    logits, targets, losses = make()
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = nabla_tau_loss(mine, targets, FORGET, tau=9.0, alpha=0.3)
    assert value.item() == pytest.approx(plain(losses, targets, 9.0, 0.3).item(), rel=1e-12)
    value.backward()
    if make is classification:
        reference = F.cross_entropy(theirs, targets, reduction="none")
    elif make is multilabel:
        reference = F.binary_cross_entropy_with_logits(theirs, targets, reduction="none").mean(1)
    else:
        kept = targets != -100
        tokens = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        reference = tokens.view(5, 4).sum(1) / kept.sum(1).clamp(min=1)
    plain(reference, targets, 9.0, 0.3).backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-14)


@TASKS
def test_gradcheck_on_logits(make):
    logits, targets, _ = make()
    logits.requires_grad_()
    held_out = torch.linspace(2, 9, 50, dtype=torch.float64)
    for gate in GATES:
        assert torch.autograd.gradcheck(
            lambda z, gate=gate: nabla_tau_loss(z, targets, FORGET, tau=held_out, alpha=0.3, gate=gate), logits
        )


@TASKS
def test_row_order_and_micro_batches_do_not_change_sample_losses(make):
    logits, targets, losses = make()
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(sample_losses(logits[order], targets[order]), losses[order], rtol=1e-12, atol=1e-14)
    pieces = torch.cat([sample_losses(z, t) for z, t in zip(logits.split(2), targets.split(2), strict=True)])
    torch.testing.assert_close(pieces, losses, rtol=1e-12, atol=1e-14)


@TASKS
def test_signals_agree_with_losses(make):
    logits, targets, losses = make()
    signals = sample_signals(logits, targets)
    torch.testing.assert_close(signals.loss, losses, rtol=1e-12, atol=1e-14)
    if make is classification:
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(signals.entropy, entropy, rtol=1e-10, atol=1e-14)
        p = logits.softmax(1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(signals.margin, p.log() - (1 - p).log())
        assert torch.equal(signals.correct, logits.argmax(1) == targets)
    if make is multilabel:
        entropy = torch.distributions.Bernoulli(logits=logits).entropy().mean(1)
        torch.testing.assert_close(signals.entropy, entropy, rtol=1e-10, atol=1e-14)
        assert torch.equal(signals.correct, ((logits > 0) == targets.bool()).all(1))
    if make is sequence:
        assert bool(signals.correct[3]), "a sample without tokens has none that is wrong"


def test_module_equals_function_and_keeps_its_state():
    logits, targets, _ = classification()
    module = NablaTauLoss(tau=2.0, alpha=0.25)
    assert module(logits, targets, FORGET) == nabla_tau_loss(logits, targets, FORGET, tau=2.0, alpha=0.25)
    module.set_tau(5.0)
    module.set_alpha(0.5)
    other = NablaTauLoss(tau=0.0, alpha=0.0)
    other.load_state_dict(module.state_dict())
    assert other(logits, targets, FORGET) == nabla_tau_loss(logits, targets, FORGET, tau=5.0, alpha=0.5)


def test_low_precision_logits_are_computed_in_float32():
    logits, targets, _ = classification()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        low = logits.to(dtype).requires_grad_()
        value = nabla_tau_loss(low, targets, FORGET, tau=9.0, alpha=0.3)
        assert value.dtype == torch.float32
        value.backward()
        assert low.grad.dtype == dtype
        wanted = nabla_tau_loss(low.detach().double(), targets, FORGET, tau=9.0, alpha=0.3)
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_non_contiguous_logits():
    logits, targets, _ = classification()
    transposed = logits.T.contiguous().T.requires_grad_()
    assert not transposed.is_contiguous()
    nabla_tau_loss(transposed, targets, FORGET, tau=9.0, alpha=0.3).backward()
    straight = logits.clone().requires_grad_()
    nabla_tau_loss(straight, targets, FORGET, tau=9.0, alpha=0.3).backward()
    torch.testing.assert_close(transposed.grad, straight.grad)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"logits": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, r"floating point, got torch.int64"),
        ({"targets": torch.tensor([0, 7, 1, 1, 1])}, ValueError, "target 7 in row 1, but the logits have 7 classes"),
        ({"targets": torch.tensor([0, 1, 1, 1, -1])}, ValueError, "target -1 in row 4"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, ValueError, r"\[4\]|\(4,\)"),
        ({"targets": torch.zeros(5, 3)}, ValueError, r"\(5, 3\)"),
        ({"forget_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"got \(4,\)"),
        ({"forget_mask": torch.ones(5)}, TypeError, "must be bool, got torch.float32"),
        ({"alpha": 1.5}, ValueError, r"alpha must be in \[0, 1\], got 1.5"),
        ({"gate": "soft"}, ValueError, "got 'soft'"),
        ({"gate": "quantile"}, ValueError, "1-D tensor of held-out losses"),
        ({"tau": torch.zeros(2, 2)}, ValueError, r"\(2, 2\)"),
        ({"power": 3}, ValueError, "got 3"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {
        "logits": torch.zeros(5, 7),
        "targets": torch.zeros(5, dtype=torch.int64),
        "forget_mask": FORGET,
        "tau": 1.0,
        "alpha": 0.5,
    } | change
    with pytest.raises(error, match=text):
        nabla_tau_loss(arguments.pop("logits"), arguments.pop("targets"), arguments.pop("forget_mask"), **arguments)
