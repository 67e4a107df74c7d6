"""Batches of any structure, and when two of them are one."""

from __future__ import annotations

import collections

import pytest
import torch

from nabla_tau.batch import concatenate, map_leaves, map_tensors, tensors_of

Pair = collections.namedtuple("Pair", ["x", "y"])


def batch(start: int, count: int) -> dict:
    lines = torch.arange(start, start + count)
    return {"x": lines[:, None] * 1.0, "text": [f"line {i}" for i in lines.tolist()], "mask": None, "labels": lines}


@pytest.mark.parametrize(("ours", "theirs"), [(3, 3), (3, 5), (1, 4)])
def test_lists_of_samples_are_joined_like_tensors(ours, theirs):
    joined = concatenate(batch(0, ours), batch(ours, theirs))
    expected = batch(0, ours + theirs)
    assert joined["text"] == expected["text"]
    assert torch.equal(joined["labels"], expected["labels"])
    assert torch.equal(joined["x"], expected["x"])
    assert joined["mask"] is None


@pytest.mark.parametrize(
    "other",
    [
        batch(3, 4) | {"text": ["one", "two"]},  # not one a sample
        batch(3, 4) | {"text": None},
        batch(3, 4) | {"text": torch.zeros(4)},
        batch(3, 4) | {"mask": "causal"},
        batch(3, 4) | {"mask": object()},
        batch(3, 4) | {"more": None},
        batch(3, 4) | {"x": torch.zeros(4, 2)},
        batch(3, 4) | {"x": torch.zeros(4, 1, dtype=torch.float64)},
        batch(3, 4) | {"labels": torch.tensor(1)},
    ],
)
def test_nothing_of_the_retain_batch_is_dropped(other):
    assert concatenate(batch(0, 3), other) is None
    assert concatenate(other, batch(0, 3)) is None


def test_constants_that_agree_are_kept_and_others_keep_batches_apart():
    one, other = (x | {"scale": 2.0, "mode": "a"} for x in (batch(0, 2), batch(2, 2)))
    assert concatenate(one, other)["mode"] == "a"
    assert concatenate(one, other | {"scale": 3.0}) is None
    assert concatenate(one, other | {"scale": True}) is None


def test_mappings_are_joined_by_key_not_by_order():
    other = batch(2, 3)
    joined = concatenate(batch(0, 2), dict(reversed(other.items())))
    assert torch.equal(joined["labels"], torch.arange(5))


def test_structure_stays():
    nested = Pair([torch.ones(2), {"a": torch.zeros(2)}], "name")
    doubled = map_tensors(lambda tensor: tensor * 2, nested)
    assert isinstance(doubled, Pair)
    assert torch.equal(doubled.x[0], torch.full((2,), 2.0))
    assert doubled.y == "name"
    assert len(tensors_of(nested)) == 2
    with pytest.raises(ValueError, match="number of entries"):
        map_leaves(lambda a, b: a, (torch.ones(1), torch.ones(1)), (torch.ones(1),))
    with pytest.raises(ValueError, match="keys"):
        map_leaves(lambda a, b: a, {"a": torch.ones(1)}, {"b": torch.ones(1)})
