"""Do the attacks find what a model remembers, and nothing where there is nothing? On small models, truth known."""

import math

import numpy as np
import pytest
import torch
from conftest import blobs
from scipy import stats as dist

from nabla_tau.membership.groups import group_stats
from nabla_tau.membership.likelihood_ratio import lira, ulira
from nabla_tau.membership.margins import logit_margin
from nabla_tau.membership.relative_membership import rmia

SAMPLES, FEATURES, SHADOWS = 400, 300, 48


def least_squares(x, y, subset):
    """y f(x) for all samples, of a linear model fitted to some: with many features it remembers them."""
    a, b = x[subset], y[subset]
    weights = np.linalg.solve(a.T @ a + 1e-1 * np.eye(x.shape[1]), a.T @ b)
    return y * (x @ weights)


def shadows(rng):
    x, y = rng.normal(size=(SAMPLES, FEATURES)), rng.choice([-1.0, 1.0], SAMPLES)
    group = rng.random((SHADOWS, SAMPLES)) < 0.5
    return x, y, group, np.stack([least_squares(x, y, subset) for subset in group]).astype(np.float32)


def test_lira_finds_the_members_of_a_model_that_remembers_them():
    rng = np.random.default_rng(0)
    x, y, group, scores = shadows(rng)
    statistics = group_stats(scores, group)
    found = []
    for _ in range(5):
        members = rng.random(SAMPLES) < 0.5
        curve = lira(least_squares(x, y, members).astype(np.float32), statistics).roc(members)
        found.append((curve.auc, curve.tpr_at(0.01)))
    auc, tpr = np.mean(found, axis=0)
    assert auc > 0.8
    assert tpr > 0.2  # guessing is .01


def test_lira_finds_nothing_in_a_model_that_never_saw_the_samples():
    """Of 120 intervals of 95 % about nine in ten or more hold one half; rates at 1 % false positives stay there."""
    rng = np.random.default_rng(1)
    x, y, group, scores = shadows(rng)
    statistics = group_stats(scores, group)
    held, tprs = [], []
    for repetition in range(120):
        own, labels = rng.normal(size=(SAMPLES, FEATURES)), rng.choice([-1.0, 1.0], SAMPLES)
        weights = np.linalg.lstsq(own[:200], labels[:200], rcond=None)[0]
        members = rng.permutation(SAMPLES) < SAMPLES // 2
        result = lira((y * (x @ weights)).astype(np.float32), statistics)
        low, high = result.auc_interval(members, replicates=200, random_state=repetition)
        held.append(low <= 0.5 <= high)
        tprs.append(result.roc(members).tpr_at(0.01))
    # Fewer would happen once in ten thousand times if the intervals were right.
    assert sum(held) >= dist.binom.ppf(1e-4, 120, 0.93)
    assert np.mean(tprs) == pytest.approx(0.01, abs=0.005)


def test_ulira_sees_nothing_in_exact_unlearning_and_much_in_none():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(SAMPLES, FEATURES)), rng.choice([-1.0, 1.0], SAMPLES)
    forget = np.arange(SAMPLES) < 60

    def run(unlearned):
        """Scores of the forget set after training on a random half of the rest, and the forget set if not unlearned."""
        kept = (rng.random(SAMPLES) < 0.5) & ~forget
        return least_squares(x, y, kept | (forget & (not unlearned)))[forget].astype(np.float32)

    retrained = np.stack([run(True) for _ in range(40)])
    for exact in (True, False):
        unlearned = np.stack([run(exact) for _ in range(40)])
        # Target models of both kinds, judged together.
        scores = np.concatenate([ulira(run(exact), unlearned, retrained).score for _ in range(20)])
        nulls = np.concatenate([ulira(run(True), unlearned, retrained).score for _ in range(20)])
        auc = (scores[:, None] > nulls).mean()
        assert abs(auc - 0.5) < 0.05 if exact else auc > 0.9


def test_neural_networks_are_judged_from_their_logits():
    """Sixteen MLPs trained at once on random halves of overlapping classes, the last one as the target."""
    x, y = blobs(240, noise=3.0)
    z, y_z = blobs(400, seed=7, noise=3.0)
    generator = torch.Generator().manual_seed(0)
    models = 17
    group = torch.rand(models, 240, generator=generator) < 0.5
    weights = [
        torch.randn(models, 8, 64, generator=generator) / math.sqrt(8),
        torch.randn(models, 64, 4, generator=generator) / 8,
    ]
    for w in weights:
        w.requires_grad_()
    optimizer = torch.optim.Adam(weights, lr=2e-2)

    def logits(inputs):
        return torch.relu(inputs @ weights[0]) @ weights[1]

    for _ in range(150):
        optimizer.zero_grad()
        each = torch.nn.functional.cross_entropy(logits(x).permute(0, 2, 1), y.expand(models, -1), reduction="none")
        (each * group).sum().backward()
        optimizer.step()
    margins = logit_margin(logits(x).half(), y)
    population = logit_margin(logits(z).half(), y_z)
    members = group.numpy()
    result = lira(margins[-1], group_stats(margins[:-1], members[:-1]))
    assert result.variance == "shrink"
    assert result.roc(members[-1]).auc > 0.75
    low, high = result.auc_interval(members[-1], replicates=300)
    assert 0.6 < low < high
    # The population was seen by no model, the target included: nothing to find in any labelling of it.
    robust = rmia(margins[-1], margins[:-1], members[:-1], population[-1], population[:-1])
    assert robust.roc(members[-1]).auc > 0.65
