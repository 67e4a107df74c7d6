"""Gates, targets and alpha against the formulas, written out once more in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nabla_tau.objective import GATES, QUANTILES, Target, alpha_start, objective, rank_targets, target_from_losses

TAU = 1.1


def expected_gate(forget: np.ndarray, gate: str, power: int, quantiles: np.ndarray) -> float:
    if gate == "batch":
        return max(TAU - forget.mean(), 0.0) ** power
    if gate == "two_sided":
        return abs(TAU - forget.mean()) ** power
    wanted = np.full(len(forget), TAU)
    if gate == "quantile":
        ranks = np.argsort(np.argsort(forget))
        wanted = quantiles[((ranks + 0.5) / len(forget) * len(quantiles)).astype(int)]
    return float(np.mean(np.maximum(wanted - forget, 0.0) ** power))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, Target]:
    generator = torch.Generator().manual_seed(3)
    losses = torch.rand(13, generator=generator, dtype=torch.float64) * 2
    mask = torch.arange(13) % 3 == 0
    quantiles = torch.rand(QUANTILES, generator=generator, dtype=torch.float64).mul(3).sort().values
    return losses, mask, Target(torch.tensor(TAU, dtype=torch.float64), quantiles)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gate", GATES)
def test_objective_is_the_formula(gate, power, batch):
    losses, mask, target = batch
    forget, retain = losses[mask].numpy(), losses[~mask].numpy()
    for alpha in (0.0, 0.25, 1.0):
        terms = objective(losses, mask, target, alpha, gate=gate, power=power)
        wanted = alpha * expected_gate(forget, gate, power, target.quantiles.numpy()) + (1 - alpha) * retain.mean()
        assert terms.total.item() == pytest.approx(wanted, rel=1e-12)
        assert terms.forget_loss.item() == pytest.approx(forget.mean(), rel=1e-12)
        assert terms.retain_loss.item() == pytest.approx(retain.mean(), rel=1e-12)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("shift", [0.0, 5.0], ids=["open", "closed"])
def test_gradcheck(gate, power, shift, batch):
    losses, mask, target = batch
    losses = (losses + shift * mask).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(x, mask, target, 0.3, gate=gate, power=power).total, losses)


@pytest.mark.parametrize("gate", ["batch", "sample", "quantile"])
def test_closed_gate_gives_forget_samples_no_gradient(gate, batch):
    losses, mask, target = batch
    losses = (losses + 100.0 * mask).requires_grad_()
    terms = objective(losses, mask, target, 0.5, gate=gate)
    (gradient,) = torch.autograd.grad(terms.total, losses)
    assert terms.gate_open.item() == 0
    assert gradient[mask].abs().max() == 0
    assert torch.allclose(gradient[~mask], torch.full_like(gradient[~mask], 0.5 / int((~mask).sum())))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", [False, True], ids=["no forget", "no retain"])
def test_empty_group_contributes_zero(gate, value, batch):
    losses, mask, target = batch
    losses = losses.clone().requires_grad_()
    terms = objective(losses, torch.full_like(mask, value), target, 0.5, gate=gate)
    (gradient,) = torch.autograd.grad(terms.total, losses)
    assert gradient.isfinite().all()
    if value:
        assert terms.retain_loss.item() == 0
    else:
        assert terms.forget_term.item() == 0
        assert terms.gate_open.item() == 0
        assert terms.total.item() == pytest.approx(0.5 * losses.mean().item())


@pytest.mark.parametrize("gate", GATES)
def test_infinite_loss_of_one_group_stays_out_of_the_other(gate, batch):
    losses, mask, target = batch
    losses = torch.where(mask, losses, torch.inf)
    terms = objective(losses, mask, target, 0.5, gate=gate)
    assert terms.forget_loss.isfinite()
    assert terms.forget_term.isfinite()


def test_quantile_gate_vanishes_on_the_held_out_distribution():
    held_out = torch.rand(QUANTILES, dtype=torch.float64) * 4
    target = target_from_losses(held_out)
    order = torch.randperm(QUANTILES)
    everything = torch.ones(QUANTILES, dtype=torch.bool)
    same = objective(held_out[order], everything, target, 1.0, gate="quantile")
    assert same.total.item() == pytest.approx(0.0, abs=1e-12)
    # The mean gate cannot tell this collapse of the distribution from unseen data; the quantile gate does.
    collapsed = torch.full_like(held_out, held_out.mean().item())
    assert objective(collapsed, everything, target, 1.0, gate="batch").total.item() < 1e-20
    assert objective(collapsed, everything, target, 1.0, gate="quantile").total.item() > 0.1


def test_rank_targets_follow_row_order():
    losses, mask = torch.rand(9), torch.arange(9) < 5
    quantiles = torch.linspace(0, 1, QUANTILES)
    wanted = rank_targets(losses, mask, quantiles)
    order = torch.randperm(9)
    assert torch.equal(rank_targets(losses[order], mask[order], quantiles)[mask[order]], wanted[order][mask[order]])
    assert torch.equal(losses[mask].argsort(), wanted[mask].argsort())


def test_target_is_mean_and_quantiles_of_the_held_out_losses():
    losses = torch.randn(2001, dtype=torch.float64).exp()
    target = target_from_losses(losses)
    assert target.mean.item() == pytest.approx(losses.mean().item())
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    wanted = np.quantile(losses.numpy(), at, method="hazen")
    np.testing.assert_allclose(target.quantiles.numpy(), wanted, rtol=1e-9)


def test_integer_weights_are_repetitions():
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(200, dtype=torch.float64, generator=generator)
    weights = torch.randint(0, 4, (200,), generator=generator)
    weighted = target_from_losses(losses, weights)
    repeated = target_from_losses(losses.repeat_interleave(weights))
    assert weighted.mean.item() == pytest.approx(repeated.mean.item())
    np.testing.assert_allclose(weighted.quantiles, repeated.quantiles, atol=0.02)


def test_no_held_out_losses():
    with pytest.raises(ValueError, match="at least one held-out loss"):
        target_from_losses(torch.empty(0))


def test_alpha_start_is_five_thirds_of_the_fraction_and_capped():
    assert alpha_start(15, 100) == pytest.approx(0.25)
    assert alpha_start(30, 100) == pytest.approx(0.5)
    assert alpha_start(90, 100) == 1.0
