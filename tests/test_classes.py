"""The kind of a forget set, and what its losses are to become."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import blobs, mlp, train

from nabla_tau import unlearn
from nabla_tau.classes import forget_kind, measure_target, removed_classes
from nabla_tau.evaluation import evaluate
from nabla_tau.recipes import ASCENT
from nabla_tau.sources import as_source


def test_removed_classes():
    forget, retain = np.array([3] * 95 + [0] * 5), np.array([3] * 5 + [0] * 50 + [1] * 50)
    assert removed_classes(forget, retain) == (3,)
    assert removed_classes(forget, np.append(retain, 3)) == ()
    assert removed_classes(forget, retain, threshold=0.05) == (3,), "5 of 55 is what chance gives"


def test_rare_classes_of_a_random_subset_are_not_removed_ones():
    generator = np.random.default_rng(0)
    for _ in range(50):
        labels = np.minimum(generator.zipf(1.3, 5000), 1000)
        order = generator.permutation(5000)
        parts = torch.tensor(labels[order[:750]]), torch.tensor(labels[order[750:]])
        assert forget_kind(*parts).kind == "random subset"


def test_kinds():
    labels = torch.randint(10, (5000,), generator=torch.Generator().manual_seed(0))
    assert forget_kind(labels[:750], labels[750:]).kind == "random subset"
    whole = forget_kind(labels[labels == 4], labels[labels != 4])
    assert (whole.kind, whole.removed) == ("whole classes", (4,))
    half = torch.nonzero(labels == 4)[:200, 0]
    rest = torch.ones(5000, dtype=torch.bool)
    rest[half] = False
    assert forget_kind(labels[half], labels[rest]).kind == "class-skewed subset"
    assert forget_kind(torch.rand(20, 5), torch.rand(30, 5)).kind == "random subset"
    assert forget_kind(labels[:5] * 0 - 1, labels).kind == "random subset"


def test_random_subset_is_rarely_called_skewed():
    generator = torch.Generator().manual_seed(1)
    skewed = 0
    for _ in range(300):
        labels = torch.randint(10, (2000,), generator=generator)
        skewed += forget_kind(labels[:300], labels[300:]).kind != "random subset"
    assert skewed <= 3


@pytest.fixture(scope="module")
def model_and_held_out():
    torch.manual_seed(0)
    x, y = blobs(900)
    return train(mlp(), (x[:400], y[:400])), (x[400:], y[400:])


def test_target_of_a_random_subset_is_the_plain_mean(model_and_held_out):
    model, held_out = model_and_held_out
    source = as_source(held_out, "held_out")
    kind = forget_kind(held_out[1][:100], held_out[1])
    target = measure_target(model, source, kind, batch_size=64)
    assert target.mean.item() == pytest.approx(evaluate(model, held_out).loss.mean(), rel=1e-6)
    some = measure_target(model, source, kind, batch_size=50, samples=100, seed=1)
    other = measure_target(model, source, kind, batch_size=50, samples=100, seed=2)
    assert some.mean != other.mean, "another seed must look at other samples"


def test_target_of_a_skewed_subset_is_that_of_its_classes(model_and_held_out):
    model, held_out = model_and_held_out
    signals = evaluate(model, held_out)
    forget = torch.tensor([1] * 300 + [2] * 100)
    retain = torch.arange(4).repeat(400)
    kind = forget_kind(forget, retain)
    target = measure_target(model, as_source(held_out, "held_out"), kind, batch_size=64)
    by_class = [signals.loss[signals.target == c].mean() for c in range(4)]
    assert target.mean.item() == pytest.approx(0.75 * by_class[1] + 0.25 * by_class[2], rel=1e-5)


def test_target_of_a_removed_class_is_its_label_on_other_data(model_and_held_out):
    model, (x, y) = model_and_held_out
    kind = forget_kind(torch.full((100,), 2), torch.tensor([0, 1, 3]).repeat(100))
    target = measure_target(model, as_source((x, y), "held_out"), kind, batch_size=64)
    with torch.no_grad():
        surprise = -model(x[y != 2]).log_softmax(1)[:, 2]
    assert target.mean.item() == pytest.approx(surprise.mean().item(), rel=1e-5)
    assert target.mean.item() > 2 * evaluate(model, (x, y)).loss.mean()
    with pytest.raises(ValueError, match="holds only classes"):
        measure_target(model, as_source((x[y == 2], y[y == 2]), "held_out"), kind, batch_size=64)


def test_target_of_several_removed_classes_is_in_their_shares(model_and_held_out):
    model, (x, y) = model_and_held_out
    forget = torch.tensor([1] * 300 + [2] * 100 + [0] * 5)
    kind = forget_kind(forget, torch.tensor([0, 3]).repeat(300))
    assert kind.removed == (1, 2)
    target = measure_target(model, as_source((x, y), "held_out"), kind, batch_size=64, absent_limit=6.0)
    with torch.no_grad():
        surprise = (-model(x).log_softmax(1)).clamp(max=6.0)[(y != 1) & (y != 2)].mean(0)
    ordinary = evaluate(model, (x[y == 0], y[y == 0])).loss.mean()
    wanted = (300 * surprise[1] + 100 * surprise[2] + 5 * ordinary) / 405
    assert target.mean.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_held_out_data_without_the_forgotten_classes_is_refused(model_and_held_out):
    model, (x, y) = model_and_held_out
    skewed = forget_kind(torch.full((100,), 2), torch.arange(4).repeat(100))
    assert skewed.kind == "class-skewed subset"
    with pytest.raises(ValueError, match=r"holds only classes \[0, 1, 3\].*classes \[2\]"):
        measure_target(model, as_source((x[y != 2], y[y != 2]), "held_out"), skewed, batch_size=64)


def test_class_removal_removes_the_class(memorised):
    model, parts = memorised
    x, y = (torch.cat((a, b)) for a, b in zip(parts["forget"], parts["retain"], strict=True))
    result = unlearn(
        model,
        forget=(x[y == 1], y[y == 1]),
        retain=(x[y != 1], y[y != 1]),
        held_out=parts["held_out"],
        recipe=ASCENT,
    )
    assert result.removed_classes == (1,)
    assert result.settings["forget_kind"] == "whole classes"
    before, after = evaluate(model, parts["unseen"]), evaluate(result.model, parts["unseen"])
    assert before.correct[before.target == 1].mean() > 0.4
    assert after.correct[after.target == 1].mean() < 0.1
    assert after.correct[after.target != 1].mean() > before.correct[before.target != 1].mean() - 0.1
