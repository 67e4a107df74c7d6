"""`nabla_tau_loss` on the numbers that unlearning is about: memorised samples, large logits, low precision, masked
samples, any layout of the tensors. Value and gradient against a float64 truth written here."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nabla_tau import nabla_tau_loss
from nabla_tau.functional import sample_losses

IGNORE = -100


def truth_rows(z: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each row in float64, from the margin, so that a loss of 5e-9 keeps all its digits."""
    own = z.gather(1, y.unsqueeze(1)).squeeze(1)
    others = z.masked_fill(F.one_hot(y, z.shape[1]).bool(), -math.inf).logsumexp(1)
    return F.softplus(others - own, threshold=700)


def truth_samples(z: Tensor, y: Tensor) -> Tensor:
    """Loss of each sample that counts: classification, or the mean over the unmasked tokens of a sequence."""
    if y.is_floating_point():
        return (F.softplus(z, threshold=700) - y * z).mean(1)
    if z.ndim == 2:
        return truth_rows(z, y)
    tokens = [(row[label != IGNORE], label[label != IGNORE]) for row, label in zip(z, y, strict=True)]
    return torch.stack([truth_rows(*kept).mean() for kept in tokens])


def truth(z: Tensor, y: Tensor, mask: Tensor, *, tau, alpha: float, gate: str = "batch", power: int = 2) -> Tensor:
    z = z.double()
    y = y.double() if y.is_floating_point() else y.long()
    counts = torch.ones_like(mask) if y.is_floating_point() else (y != IGNORE).reshape(len(y), -1).any(1)
    losses, mask = truth_samples(z[counts], y[counts]), mask[counts]
    forget, retain = losses[mask], losses[~mask]
    zero = z.sum() * 0
    if gate == "batch":
        term = (float(tau) - forget.mean()).relu() ** power if len(forget) else zero
    elif gate == "two_sided":
        term = (float(tau) - forget.mean()).abs() ** power if len(forget) else zero
    elif gate == "sample":
        term = ((float(tau) - forget).relu() ** power).mean() if len(forget) else zero
    else:
        held_out = np.sort(tau.double().numpy())
        at = (np.arange(512) + 0.5) / 512
        table = np.interp(at, (np.arange(len(held_out)) + 0.5) / len(held_out), held_out)
        place = forget.detach().argsort().argsort()
        wanted = torch.as_tensor(table)[((place + 0.5) / max(len(forget), 1) * 512).long()]
        term = ((wanted - forget).relu() ** power).mean() if len(forget) else zero
    return alpha * term + (1 - alpha) * (retain.mean() if len(retain) else zero)


def ours_and_truth(z: Tensor, y: Tensor, mask: Tensor, **settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value and gradient of the public function, and of the truth on the very same (already rounded) logits."""
    leaf, exact = z.detach().clone().requires_grad_(), z.detach().double().requires_grad_()
    value, expected = nabla_tau_loss(leaf, y, mask, **settings), truth(exact, y, mask, **settings)
    value.backward()
    expected.backward()
    assert value.ndim == 0
    assert value.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    assert leaf.grad.dtype == z.dtype
    assert leaf.grad.shape == z.shape
    return value.detach(), leaf.grad, expected.detach(), exact.grad


def assert_close(found: Tensor, expected: Tensor, rel: float, abs_: float = 0.0) -> None:
    worst = (found.double() - expected).abs() - rel * expected.abs() - abs_
    assert bool(found.isfinite().all())
    assert float(worst.max()) <= 0, f"found {found}, expected {expected}"


def check(z: Tensor, y: Tensor, mask: Tensor, rel: float, abs_: float = 0.0, **settings) -> tuple[Tensor, Tensor]:
    value, gradient, expected_value, expected_gradient = ours_and_truth(z, y, mask, **settings)
    assert_close(value, expected_value, max(rel if value.dtype != torch.float32 else min(rel, 2e-6), 1e-12), 1e-30)
    assert_close(gradient, expected_gradient, rel, abs_)
    return value, gradient


# ---------------------------------------------------------------------------------------------------------------------
# Memorised samples
# ---------------------------------------------------------------------------------------------------------------------

MEMORISED = math.log1p(999 * math.exp(-26))  # 5.104e-9, 0 in a float32 log_softmax


def memorised_row(dtype: torch.dtype, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    z = torch.full((1, 1000), offset, dtype=dtype)
    z[0, 321] += 26
    return z, torch.tensor([321])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_memorised_sample_keeps_its_loss_and_gradient(dtype, offset):
    if dtype in (torch.bfloat16, torch.float16):
        offset = math.copysign(1024.0, offset) if offset and dtype == torch.float16 else 0.0
    z, y = memorised_row(dtype, offset)
    assert pytest.approx(5.104e-9, rel=1e-4) == MEMORISED
    assert float(z[0, 321] - z[0, 0]) == 26
    z.requires_grad_()
    loss = nabla_tau_loss(z, y, torch.tensor([False]), tau=2.0, alpha=0.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(MEMORISED, rel=2e-6)
    if dtype == torch.float16:
        return  # 5e-9 is below the smallest float16: the gradient in the dtype of the logits is 0
    rel = 1e-2 if dtype == torch.bfloat16 else 5e-6
    assert float(z.grad[0, 321]) == pytest.approx(math.expm1(-MEMORISED), rel=rel)
    others = torch.cat((z.grad[0, :321], z.grad[0, 322:])).double()
    assert others.tolist() == pytest.approx([math.exp(-26 - MEMORISED)] * 999, rel=rel)


def test_memorised_sample_in_float16_under_a_scaled_loss():
    z, y = memorised_row(torch.float16)
    z.requires_grad_()
    (nabla_tau_loss(z, y, torch.tensor([False]), tau=2.0, alpha=0.0) * 2.0**20).backward()
    assert float(z.grad[0, 321]) == pytest.approx(-MEMORISED * 2**20, rel=1e-3)


@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample", "quantile"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_memorised_forget_sample_is_pushed_up(gate, power, offset):
    """The ascent's gradient is p (tau - l)^(p - 1) times that of the loss: not 0 where the loss is 5e-9."""
    z, y = memorised_row(torch.float32, offset)
    tau = torch.full((40,), 2.5) if gate == "quantile" else 2.5
    _, gradient = check(z, y, torch.tensor([True]), 5e-6, tau=tau, alpha=0.25, gate=gate, power=power)
    factor = -0.25 * (1 if power == 1 else 2 * 2.5)
    assert float(gradient[0, 321]) == pytest.approx(-factor * MEMORISED, rel=1e-5)


def test_memorised_tokens_of_a_sequence():
    z, y = memorised_row(torch.float32)
    z, y = z.expand(3, 5, 1000).contiguous(), y.expand(3, 5).clone()
    y[0, 2:] = IGNORE
    value, gradient = check(z, y, torch.tensor([False] * 3), 5e-6, tau=2.0, alpha=0.0)
    assert float(value) == pytest.approx(MEMORISED, rel=2e-6)
    assert float(gradient[0, 0, 321]) == pytest.approx(-MEMORISED / 3 / 2, rel=1e-5)
    assert float(gradient[1, 0, 321]) == pytest.approx(-MEMORISED / 3 / 5, rel=1e-5)


@pytest.mark.parametrize("margin", [-1e4, -200.0, -100.0, -20.0, -1.0, 0.0, 1.0, 20.0, 60.0, 80.0])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_any_margin(margin, offset):
    z = torch.full((2, 7), offset)
    z[:, 3] += margin
    y = torch.tensor([3, 3])
    mask = torch.tensor([True, False])
    # A margin and a logsumexp both near 1e4 are 5e-4 apart from their neighbours in float32.
    rel = 1e-5 if margin > -1e4 or not offset else 1e-3
    check(z, y, mask, rel, 1e-37, tau=3.0, alpha=0.5, gate="sample", power=1)
    check(z, y, mask, rel, 1e-37, tau=3.0, alpha=0.0)


def test_minus_infinity_among_the_logits_masks_a_class():
    z = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    z[:, 4] = -math.inf
    y, mask = torch.tensor([0, 1, 2, 3, 5, 6]), torch.arange(6) < 3
    value, gradient, expected, _ = ours_and_truth(z, y, mask, tau=4.0, alpha=0.3)
    assert_close(value, expected, 2e-6)
    without = torch.cat((z[:, :4], z[:, 5:]), 1)
    assert_close(gradient[:, :4], ours_and_truth(without, y - (y > 4).long(), mask, tau=4.0, alpha=0.3)[3][:, :4], 1e-5)
    assert bool((gradient[:, 4] == 0).all())


# ---------------------------------------------------------------------------------------------------------------------
# Dtypes and gates on ordinary data
# ---------------------------------------------------------------------------------------------------------------------


def mixed(dtype: torch.dtype, classes: int = 11, scale: float = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    z = (scale * torch.randn(24, classes, generator=generator)).to(dtype)
    return z, torch.randint(classes, (24,), generator=generator), torch.arange(24) % 3 == 0


HELD_OUT = 6.0 + torch.rand(90, generator=torch.Generator().manual_seed(5)) * 8.0
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GATES = [("batch", 7.0), ("two_sided", 7.0), ("two_sided", 0.5), ("sample", 5.0), ("quantile", HELD_OUT)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("gate", "tau"), GATES, ids=[f"{gate}{i}" for i, (gate, _) in enumerate(GATES)])
@pytest.mark.parametrize("power", [1, 2])
def test_dtypes_and_gates(dtype, gate, tau, power):
    """A bfloat16 or float16 gradient is the exact one rounded once: float16 may lose 6e-8 below its normal range."""
    z, y, mask = mixed(dtype)
    tiny = 1e-7 if dtype == torch.float16 else 1e-9 if dtype == torch.float32 else 0.0
    if gate == "quantile":
        tau = tau.to(torch.float64 if dtype == torch.float64 else torch.float32)
    check(z, y, mask, TOLERANCE[dtype], tiny, tau=tau, alpha=0.4, gate=gate, power=power)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_common_offset(dtype, offset):
    """The rounding of z + 1e4 is the caller's; what follows is exact for the rounded logits."""
    z, y, mask = mixed(dtype)
    z = z + offset
    check(z, y, mask, TOLERANCE[dtype], 1e-9, tau=7.0, alpha=0.4)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("forget", [0, 24])
def test_one_group_only(alpha, forget):
    z, y, _ = mixed(torch.float32)
    check(z, y, torch.arange(24) < forget, 1e-5, 1e-9, tau=9.0, alpha=alpha)


def test_one_class_has_no_loss():
    for dtype in TOLERANCE:
        z = torch.tensor([[3.0], [-1e4], [0.0], [88.0]]).to(dtype).requires_grad_()
        mask = torch.tensor([True, False, True, False])
        loss = nabla_tau_loss(z, torch.zeros(4, dtype=torch.long), mask, tau=2.0, alpha=0.5)
        loss.backward()
        assert float(loss.detach()) == 0.5 * 2.0**2
        assert bool((z.grad == 0).all())


def test_closed_gate_has_no_gradient():
    z, y, _ = mixed(torch.float32)
    z.requires_grad_()
    loss = nabla_tau_loss(z, y, torch.ones(24, dtype=torch.bool), tau=0.001, alpha=0.5)
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool((z.grad == 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_multilabel(dtype):
    generator = torch.Generator().manual_seed(8)
    z = (8 * torch.randn(12, 5, generator=generator)).to(dtype)
    z[0] = torch.tensor([90.0, -90.0, 26.0, -26.0, 0.0])
    t = torch.randint(2, (12, 5), generator=generator).double()
    t[0] = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    t[1] = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    mask = torch.arange(12) % 2 == 0
    # Soft labels cancel by their nature: there one unit of 1 is what a gradient keeps.
    check(z, t.to(dtype), mask, TOLERANCE[dtype], 2e-8, tau=9.0, alpha=0.4)


def test_memorised_label_keeps_its_gradient():
    """sigmoid(z) - t, of the usual binary cross-entropy, is 0 in float32 where the truth is 5.1e-12."""
    z = torch.tensor([[26.0, -26.0]], requires_grad=True)
    t = torch.tensor([[1.0, 0.0]])
    nabla_tau_loss(z, t, torch.zeros(1, dtype=torch.bool), tau=0.0, alpha=0.0).backward()
    wanted = math.exp(-26.0) / (1 + math.exp(-26.0)) / 2
    assert z.grad[0].tolist() == pytest.approx([-wanted, wanted], rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Masked rows
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ignored_rows_are_as_if_they_were_not_there(dtype):
    z, y, mask = mixed(dtype)
    y[[1, 3, 6]] = IGNORE  # 3 and 6 are forget samples
    _, gradient = check(z, y, mask, TOLERANCE[dtype], 1e-7, tau=7.0, alpha=0.4)
    assert bool((gradient[[1, 3, 6]] == 0).all())
    z.requires_grad_(False)
    kept = y != IGNORE
    settings = {"tau": 7.0, "alpha": 0.4}
    whole = nabla_tau_loss(z, y, mask, **settings)
    assert float(whole) == pytest.approx(float(nabla_tau_loss(z[kept], y[kept], mask[kept], **settings)), rel=1e-6)


def test_another_ignore_index():
    z, y, mask = mixed(torch.float32)
    with_default, with_own = y.clone(), y.clone()
    with_default[[1, 3]], with_own[[1, 3]] = IGNORE, -7
    settings = {"tau": 7.0, "alpha": 0.4}
    found = nabla_tau_loss(z, with_own, mask, **settings, ignore_index=-7)
    assert torch.equal(found, nabla_tau_loss(z, with_default, mask, **settings))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sequences_with_masked_tokens_and_wholly_masked_samples(dtype):
    generator = torch.Generator().manual_seed(3)
    z = (3 * torch.randn(8, 6, 10, generator=generator)).to(dtype)
    y = torch.randint(10, (8, 6), generator=generator)
    y[0, 3:], y[3, :5], y[2], y[5] = IGNORE, IGNORE, IGNORE, IGNORE
    mask = torch.arange(8) < 4  # sample 2 is to forget, 5 to retain
    _, gradient = check(z, y, mask, TOLERANCE[dtype], 1e-7, tau=7.0, alpha=0.4)
    assert bool((gradient[y == IGNORE] == 0).all())
    assert bool((gradient[y != IGNORE].abs().sum(1) > 0).all())


@pytest.mark.parametrize("shape", [(4,), (4, 3)])
@pytest.mark.parametrize("gate", ["batch", "two_sided", "sample"])
def test_everything_masked(shape, gate):
    z = torch.randn(*shape, 5, requires_grad=True)
    y = torch.full(shape, IGNORE)
    loss = nabla_tau_loss(z, y, torch.arange(4) < 2, tau=2.0, alpha=0.5, gate=gate)
    loss.backward()
    assert float(loss.detach()) == 0
    assert bool((z.grad == 0).all())
    assert sample_losses(z, y).tolist() == [0.0] * 4


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


def reference_run(z: Tensor, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    leaf = z.detach().contiguous().clone().requires_grad_()
    loss = nabla_tau_loss(leaf, y.contiguous().long(), mask, tau=7.0, alpha=0.4)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_integer_dtypes_of_the_labels(kind, dtype):
    z, y, mask = mixed(dtype, classes=120, scale=3.0)
    check(z, y.to(kind), mask, TOLERANCE[dtype], 1e-7, tau=9.0, alpha=0.4)


def test_unsigned_labels_are_not_taken_for_the_ignore_index():
    """156 as uint8 has the bits of -100."""
    z, y, mask = mixed(torch.float32, classes=200)
    y[:6] = 156
    check(z, y.to(torch.uint8), mask, 1e-5, 1e-9, tau=12.0, alpha=0.4)
    pairs = z.view(12, 2, 200), y.to(torch.uint8).view(12, 2)
    check(*pairs, mask[:12], 1e-5, 1e-9, tau=12.0, alpha=0.4)


LABELS = {
    "strided": lambda y: torch.stack((y, y + 99), 1)[:, 0],
    "strided int32": lambda y: torch.stack((y, y + 99), 1).int()[:, 0],
    "offset": lambda y: torch.cat((y, y))[24:],
    "flipped": lambda y: y.flip(0).flip(0),
}


@pytest.mark.parametrize("layout", LABELS)
def test_layout_of_the_labels(layout):
    z, y, mask = mixed(torch.float32)
    expected = reference_run(z, y, mask)
    found = LABELS[layout](y)
    assert torch.equal(found.long(), y)
    leaf = z.clone().requires_grad_()
    loss = nabla_tau_loss(leaf, found, mask, tau=7.0, alpha=0.4)
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])


def test_expanded_labels_and_masks():
    z, _, mask = mixed(torch.float32)
    check(z, torch.tensor([4]).expand(24), mask, 1e-5, 1e-9, tau=7.0, alpha=0.4)
    check(z, torch.tensor([4], dtype=torch.int32).expand(24), mask, 1e-5, 1e-9, tau=7.0, alpha=0.4)
    check(z, torch.tensor([4]).expand(24), torch.tensor([True]).expand(24), 1e-5, 1e-9, tau=20.0, alpha=0.4)
    tokens = z.view(12, 2, 11), torch.tensor([[4, 2]]).expand(12, 2)
    check(*tokens, mask[:12], 1e-5, 1e-9, tau=7.0, alpha=0.4)


LOGITS = {
    "transposed": lambda z: z.t().contiguous().t(),
    "every second column": lambda z: torch.stack((z, z + 3), 2).flatten(1)[:, ::2],
    "every second row": lambda z: torch.stack((z, z + 3), 1).flatten(0, 1)[::2],
    "offset": lambda z: torch.cat((z + 1, z))[24:],
}


@pytest.mark.parametrize("layout", LOGITS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_layout_of_the_logits(layout, dtype):
    z, y, mask = mixed(dtype)
    expected = reference_run(z, y, mask)
    leaf = z.clone().requires_grad_()
    view = LOGITS[layout](leaf)
    assert torch.equal(view, z)
    loss = nabla_tau_loss(view, y, mask, tau=7.0, alpha=0.4)
    loss.backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])


def test_expanded_logits():
    row = torch.randn(1, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
    _, y, mask = mixed(torch.float32)
    nabla_tau_loss(row.expand(24, 11), y, mask, tau=7.0, alpha=0.4).backward()
    exact = row.detach().double().requires_grad_()
    truth(exact.expand(24, 11), y, mask, tau=7.0, alpha=0.4).backward()
    assert_close(row.grad, exact.grad, 1e-5, 1e-6)


def test_sequences_in_the_layout_of_a_convolution():
    generator = torch.Generator().manual_seed(2)
    channels_first = torch.randn(6, 9, 4, generator=generator).requires_grad_()
    y, mask = torch.randint(9, (6, 4), generator=generator), torch.arange(6) < 2
    loss = nabla_tau_loss(channels_first.transpose(1, 2), y, mask, tau=7.0, alpha=0.4)
    loss.backward()
    value, gradient = reference_run(channels_first.transpose(1, 2), y, mask)
    assert torch.equal(loss.detach(), value)
    assert torch.equal(channels_first.grad, gradient.transpose(1, 2))
