"""RMIA against its definition, pair by pair."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from nabla_tau.membership.relative_membership import rmia


def data(models=12, samples=40, population=70, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    group = rng.random((models, samples)) < 0.5
    level = rng.normal(1, 2, samples)
    references = level + 1.5 * group + rng.normal(size=(models, samples))
    members = rng.random(samples) < 0.5
    target = level + 1.5 * members + rng.normal(size=samples)
    level_z = rng.normal(1, 2, population)
    z = level_z + rng.normal(size=population)
    z_references = level_z + rng.normal(size=(models, population))
    arrays = [a.astype(dtype) for a in (target, references, z, z_references)]
    return arrays[0], arrays[1], group, arrays[2], arrays[3], members


def oracle(target, references, group, z, z_references, mode, gamma, a):
    """Ratio and score from their definitions, all pairs."""
    p, usual = expit(references.astype(np.float64)), []
    for n in range(target.size):
        out, within = p[~group[:, n], n].mean(), p[group[:, n], n].mean()
        usual.append((out + within) / 2 if mode == "online" else ((1 + a) * out + 1 - a) / 2)
    usual_z = expit(z_references.astype(np.float64)).mean(0)
    if mode == "offline":
        usual_z = ((1 + a) * usual_z + 1 - a) / 2
    ratio = expit(target.astype(np.float64)) / np.array(usual)
    ratio_z = expit(z.astype(np.float64)) / usual_z
    return ratio, (ratio[:, None] / ratio_z[None] >= gamma).mean(1)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(["online", "offline"]),
    gamma=st.sampled_from([0.5, 1.0, 2.0]),
    a=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_equals_its_definition(seed, mode, gamma, a):
    *arrays, _ = data(seed=seed)
    arrays[2][:2] = [[True], [False]]
    result = rmia(*arrays, mode=mode, gamma=gamma, a=a)
    ratio, score = oracle(*arrays, mode, gamma, a)
    np.testing.assert_allclose(result.ratio, ratio, rtol=1e-12)
    np.testing.assert_array_equal(result.score, score)
    assert result.a == (a if mode == "offline" else None)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_margins_of_low_precision_and_probabilities_give_the_same(dtype):
    *arrays, _ = data(dtype=dtype)
    arrays[2][:2] = [[True], [False]]
    ratio, score = oracle(*arrays, "online", 2.0, None)
    result = rmia(*arrays)
    np.testing.assert_allclose(result.ratio, ratio, rtol=1e-6)
    assert np.abs(result.score - score).max() <= 1 / 70
    chances = [expit(a.astype(np.float64)) if a.dtype != bool else a for a in arrays]
    np.testing.assert_allclose(rmia(*chances, signal="probability").ratio, ratio, rtol=1e-12)
    packed = rmia(*arrays[:2], np.packbits(arrays[2], axis=1), *arrays[3:])
    np.testing.assert_array_equal(packed.score, result.score)


def test_a_ratio_of_just_gamma_counts():
    half = np.full((4, 3), 0.5)
    group = np.arange(4)[:, None] % 2 == np.zeros(3, int)
    result = rmia(half[0], half, group, np.array([0.125, 0.25, 0.5]), half, gamma=2.0, signal="probability")
    np.testing.assert_array_equal(result.score, [2 / 3] * 3)


def test_score_is_a_monotone_step_function_of_the_ratio():
    *arrays, _ = data(samples=300)
    result = rmia(*arrays)
    assert (np.diff(result.score[np.argsort(result.ratio)]) >= 0).all()


def test_members_score_higher_and_tuning_takes_the_best_a():
    *arrays, members = data(models=16, samples=2000)
    for mode in ("online", "offline"):
        result = rmia(*arrays, mode=mode, a="tune" if mode == "offline" else 0.3)
        assert result.roc(members).auc > 0.6
    assert sorted(result.tuning) == [step / 10 for step in range(11)]
    assert result.tuning[result.a] == max(result.tuning.values())
    # The best a for a reference in the target's place, by hand.
    _, references, group, _, _ = arrays
    p = expit(references)
    wanted = []
    for m in (0, 5, 10, 15):
        others = np.arange(16) != m
        out = np.where(~group[others], p[others], 0).sum(0) / (~group[others]).sum(0)
        known = np.isfinite(out)
        ratio = (p[m] / ((1.3 * out + 0.7) / 2))[known]
        mine, theirs = ratio[group[m][known]], ratio[~group[m][known]]
        wanted.append((mine[:, None] > theirs).mean())
    assert result.tuning[0.3] == pytest.approx(np.mean(wanted), abs=1e-9)


def test_extreme_and_missing_margins():
    target, references, group, z, z_references, _ = data()
    group[:2] = [[True], [False]]
    group[:, 5] = True  # no out-model
    target[:3] = [np.nan, np.inf, -np.inf]
    references[3, 6] = np.nan
    references[4, 7] = np.inf  # a probability of one counts
    z[0] = np.nan
    result = rmia(target, references, group, z, z_references)
    assert np.flatnonzero(np.isnan(result.score)).tolist() == [0, 5]
    assert result.score[2] == 0
    assert result.n_in[6] + result.n_out[6] == 11
    assert result.n_in[7] + result.n_out[7] == 12
    assert (result.n_population, result.n_population_dropped) == (69, 1)
    assert json.loads(json.dumps(result.to_dict()))["score"][0] is None


def test_wrong_arguments_are_refused():
    target, references, group, z, z_references, _ = data()
    with pytest.raises(ValueError, match=r"must be \[M, 40\] and \[M, 70\], got \[12, 39\] and \[12, 70\]"):
        rmia(target, references[:, :39], group, z, z_references)
    with pytest.raises(ValueError, match="a must be in"):
        rmia(target, references, group, z, z_references, mode="offline", a=2)
    with pytest.raises(ValueError, match="gamma must be positive"):
        rmia(target, references, group, z, z_references, gamma=0)
    with pytest.raises(ValueError, match="mode must be"):
        rmia(target, references, group, z, z_references, mode="other")
    with pytest.raises(ValueError, match="none of the 70 population samples"):
        rmia(target, references, group, np.full_like(z, np.nan), z_references)
    with pytest.raises(ValueError, match="cannot be tuned"):
        rmia(target, references, np.zeros_like(group), z, z_references, mode="offline", a="tune")
