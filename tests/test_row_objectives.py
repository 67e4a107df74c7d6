"""Objectives of other methods: value and gradient are their published formula, written from probabilities."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from nabla_tau import row_objectives
from nabla_tau.functional import row_losses

N, CLASSES = 9, 6
FORGET = torch.tensor([True, False, True, True, False, False, True, False, True])


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(N, CLASSES, generator=generator, dtype=torch.float64)
    reference = 3 * torch.rand(N, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (N,), generator=generator), reference


# name -> (settings, the paper's forget term of the probabilities p_y [N_f] and the reference losses, retain weight)
FORMULAS = {
    "grad_diff": ({"forget_weight": 0.7, "retain_weight": 2.0}, lambda p, ref: 0.7 * p.log().mean(), 2.0),
    "neg_grad_plus": ({}, lambda p, ref: 0.05 * p.log().mean(), 0.95),
    "npo": (
        {"beta": 0.3, "retain_weight": 0.5},
        lambda p, ref: -2 / 0.3 * (1 / (1 + (p / (-ref).exp()) ** 0.3)).log().mean(),
        0.5,
    ),
    "sim_npo": (
        {"beta": 2.5, "delta": 0.4, "forget_weight": 0.125},
        lambda p, ref: -0.125 * 2 / 2.5 * (1 / (1 + (-2.5 * (-p.log() - 0.4)).exp())).log().mean(),
        1.0,
    ),
    "wga": ({"beta": 1.5}, lambda p, ref: (p.detach() ** 1.5 * p.log()).mean(), 1.0),
    "sat_imp": ({}, lambda p, ref: (p.detach() ** 5 * (1 - p.detach()) * p.log()).mean(), 1.0),
    "sfr_on": (
        {"forget_weight": 25.0, "exponent": 0.5},
        lambda p, ref: 25 * ((-p.detach().log()) ** -0.5 / ((-p.detach().log()) ** -0.5).sum() * p.log()).sum(),
        1.0,
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_the_formula(name):
    settings, forget_term, retain_weight = FORMULAS[name]
    logits, targets, reference = batch()
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    extra = (reference,) if name == "npo" else ()
    value = getattr(row_objectives, name)(row_losses(mine, targets), FORGET, *extra, **settings)
    p = theirs.softmax(1)[torch.arange(N), targets]
    expected = forget_term(p[FORGET], reference[FORGET]) - retain_weight * p[~FORGET].log().mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    expected.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", FORMULAS)
def test_what_does_not_count_and_an_empty_group_change_nothing(name):
    logits, targets, reference = batch()
    function = getattr(row_objectives, name)

    def value_of(keep, mask, **options):
        extra = (reference[keep],) if name == "npo" else ()
        losses = row_losses(logits[keep], targets[keep])
        return function(losses, mask[keep], *extra, **options)

    everything, counts = torch.arange(N), torch.arange(N) % 4 != 0
    torch.testing.assert_close(value_of(everything, FORGET, counts=counts), value_of(counts.nonzero()[:, 0], FORGET))
    for mask in (torch.zeros(N, dtype=torch.bool), torch.ones(N, dtype=torch.bool)):
        assert value_of(everything, mask).isfinite()
    assert value_of(everything, FORGET, counts=torch.zeros(N, dtype=torch.bool)) == 0


@pytest.mark.parametrize("name", [name for name in FORMULAS if name != "npo"])
def test_a_memorised_sample_is_still_pushed(name):
    """With p = 1 - 5e-9 a float32 log_softmax gives loss 0 and gradient 0, and ascent would never start."""
    logits = torch.zeros(2, 1000)
    logits[:, 3] = 26.0
    leaf, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    targets, forget = torch.tensor([3, 3]), torch.tensor([True, True])
    function = getattr(row_objectives, name)
    function(row_losses(leaf, targets), forget).backward()
    assert (leaf.grad[:, 3] > 0).all()
    if name in ("grad_diff", "neg_grad_plus", "wga"):
        function(F.cross_entropy(plain, targets, reduction="none"), forget).backward()
        assert not plain.grad[:, 3].any()


def test_npo_starts_as_gradient_ascent_and_fades():
    """At the reference its gradient is that of ascent on the sum of log-likelihoods; far from it, it vanishes."""
    for distance, factor in ((0.0, 1.0), (200.0, 0.0)):
        reference = torch.tensor([2.0, 3.0], dtype=torch.float64)
        losses = (reference + distance).requires_grad_()
        row_objectives.npo(losses, torch.tensor([True, True]), reference).backward()
        torch.testing.assert_close(losses.grad, torch.full((2,), -0.5 * factor, dtype=torch.float64), atol=1e-8, rtol=0)
