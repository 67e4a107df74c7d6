"""Likelihood-ratio attacks against scipy's densities, and against what the published script computes."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as dist

from nabla_tau.membership.groups import group_stats
from nabla_tau.membership.likelihood_ratio import lira, ulira
from nabla_tau.membership.variances import fit_variances

MODES = ["online", "offline", "offline_two_sided"]


def data(models=40, samples=60, queries=None, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    shape = (samples,) if queries is None else (samples, queries)
    group = rng.random((models, samples)) < 0.5
    level, gain = rng.normal(size=shape), rng.gamma(2, size=shape)
    member = group if queries is None else group[..., None]
    scores = level + gain * member + rng.gamma(2, size=shape) * rng.normal(size=(models, *shape))
    return scores.astype(dtype), group, (level + rng.normal(size=shape)).astype(dtype)


def parts(scores, group, n):
    x = scores.astype(np.float64)[:, n]
    return x[~group[:, n]], x[group[:, n]]


def combine(mode, target, out, within, scales, densities=(dist.norm, dist.norm)):
    """The three scores from centers and scales (out, in)."""
    if mode == "offline":
        return densities[0].logcdf(target, out, scales[0])
    log_out = densities[0].logpdf(target, out, scales[0])
    return densities[1].logpdf(target, within, scales[1]) - log_out if mode == "online" else -log_out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("center", ["mean", "median"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_one_query_equals_scipy(mode, center, dtype):
    scores, group, target = data(dtype=dtype)
    result = lira(target, group_stats(scores, group, center=center), mode=mode, variance="example")
    middle = np.mean if center == "mean" else np.median
    for n in range(len(target)):
        out, within = parts(scores, group, n)
        scales = [np.std(x, ddof=1) for x in (out, within)]
        wanted = combine(mode, float(target[n]), middle(out), middle(within), scales)
        assert result.score[n] == pytest.approx(wanted, rel=1e-9)
    assert result.n_nan == result.n_too_few == result.n_dropped == 0
    assert not result.floored.any()
    np.testing.assert_array_equal(result.n_in, group.sum(0))


@pytest.mark.parametrize("mode", MODES)
def test_queries_are_averaged(mode):
    scores, group, target = data(queries=3)
    whole = lira(target, group_stats(scores, group), mode=mode, variance="example").score
    single = [
        lira(target[:, a], group_stats(scores[:, :, a], group), mode=mode, variance="example").score for a in range(3)
    ]
    np.testing.assert_allclose(whole, np.mean(single, axis=0), rtol=1e-12)


@pytest.mark.parametrize("variance", ["global", "class"])
def test_pooled_variances_are_those_of_the_residuals(variance):
    scores, group, target = data(samples=30)
    classes = np.arange(30) % 3
    options = {"classes": classes} if variance == "class" else {}
    result = lira(target, group_stats(scores, group), variance=variance, **options)
    for n in range(30):
        chosen = np.flatnonzero(classes == classes[n]) if variance == "class" else np.arange(30)
        scales = []
        for g in (0, 1):
            residuals = [parts(scores, group, k)[g] for k in chosen]
            squares = sum(((x - x.mean()) ** 2).sum() for x in residuals)
            scales.append(np.sqrt(squares / sum(x.size - 1 for x in residuals)))
        out, within = parts(scores, group, n)
        wanted = combine("online", target[n], out.mean(), within.mean(), scales)
        assert result.score[n] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_shrunk_score_is_the_posterior_predictive_student_t(mode):
    scores, group, target = data(models=8, samples=200)
    result = lira(target, group_stats(scores, group), mode=mode)
    assert result.variance == "shrink"  # the default for so few models
    for n in range(0, 200, 7):
        densities, centers = [], []
        for g, x in enumerate(parts(scores, group, n)):
            dof, usual = result.prior[g]
            if x.size < 2:
                break
            scale2 = (dof * usual + ((x - x.mean()) ** 2).sum()) / (dof + x.size - 1) * (1 + 1 / x.size)
            densities.append(dist.t(dof + x.size - 1, x.mean(), np.sqrt(scale2)))
            centers.append(x.mean())
        if len(densities) < 2:
            assert mode != "online" or np.isnan(result.score[n])
            continue
        wanted = {
            "online": densities[1].logpdf(target[n]) - densities[0].logpdf(target[n]),
            "offline": densities[0].logcdf(target[n]),
            "offline_two_sided": -densities[0].logpdf(target[n]),
        }
        assert result.score[n] == pytest.approx(wanted[mode], rel=1e-8)


@pytest.mark.parametrize("dof", [3.0, 8.0, np.inf])
def test_the_prior_of_variances_is_recovered(dof):
    rng = np.random.default_rng(1)
    true = 2.0 * (dof / rng.chisquare(dof, 20_000) if np.isfinite(dof) else np.ones(20_000))
    scores = np.sqrt(true) * rng.normal(size=(9, 20_000))
    prior = fit_variances(group_stats(scores, np.zeros(scores.shape, bool)), "shrink").priors[0]
    assert prior.variance == pytest.approx(2.0, rel=0.03)
    assert 1 / prior.dof == pytest.approx(1 / dof, abs=0.015)


def test_shrinking_helps_with_few_models():
    rng = np.random.default_rng(2)
    n = 4000
    sd = np.sqrt(4 / rng.chisquare(4, n))
    group = np.arange(8)[:, None] % 2 == np.zeros(n, int)
    scores = sd * rng.normal(size=(8, n)) + group
    members = rng.random(n) < 0.5
    target = sd * rng.normal(size=n) + members
    statistics = group_stats(scores, group)
    auc = {v: lira(target, statistics, variance=v).roc(members).auc for v in ("example", "global", "shrink")}
    assert auc["shrink"] > auc["example"] + 0.02
    assert auc["shrink"] > auc["global"]


@pytest.mark.parametrize("mode", ["online", "offline_two_sided"])
@pytest.mark.parametrize("variance", ["example", "global", "class", "shrink"])
def test_joint_queries_equal_scipy(mode, variance):
    scores, group, target = data(models=30, samples=25, queries=3)
    scores += np.random.default_rng(5).normal(size=(30, 25, 1))  # what queries share
    classes = np.arange(25) % 2
    options = {"classes": classes} if variance == "class" else {}
    statistics = group_stats(scores, group, joint=True)
    result = lira(target, statistics, mode=mode, variance=variance, queries="joint", variance_floor=1e-12, **options)
    rows = [[parts(scores, group, k)[g] for k in range(25)] for g in (0, 1)]
    scatters = [[(x - x.mean(0)).T @ (x - x.mean(0)) for x in group_rows] for group_rows in rows]
    for n in range(25):
        logs = []
        for g in (0, 1):
            x, pick = rows[g][n], [k for k in range(25) if variance != "class" or classes[k] == classes[n]]
            pooled = sum(scatters[g][k] for k in pick) / sum(len(rows[g][k]) - 1 for k in pick)
            if variance == "example":
                logs.append(dist.multivariate_normal.logpdf(target[n], x.mean(0), scatters[g][n] / (len(x) - 1)))
            elif variance == "shrink":
                dof, usual = result.prior[g]
                pooled = pooled * usual / np.mean(np.diag(pooled))
                shape = (dof * pooled + scatters[g][n]) / (dof + len(x) - 1) * (1 + 1 / len(x))
                logs.append(dist.multivariate_t.logpdf(target[n], x.mean(0), shape, dof + len(x) - 1))
            else:
                logs.append(dist.multivariate_normal.logpdf(target[n], x.mean(0), pooled))
        wanted = logs[1] - logs[0] if mode == "online" else -logs[0]
        assert result.score[n] == pytest.approx(wanted, rel=1e-6, abs=1e-8)


def script(scores, group, target, fix_variance, offline):
    """What plot.py predicts, from its description: cut to equal counts, medians, population deviations."""
    samples = scores.shape[1]
    sides = [[scores[group[:, n] == bool(g), n] for n in range(samples)] for g in (0, 1)]
    out, within = (np.array([x[: min(map(len, side))] for x in side]) for side in sides)
    logs = []
    for x, wide in ((out, out if offline else within), (within, within)):
        deviation = np.std(wide) if fix_variance else np.std(x, 1)
        logs.append(dist.norm.logpdf(target, np.median(x, 1), deviation + 1e-30))
    return logs[0].mean(1) if offline else (logs[0] - logs[1]).mean(1)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    models=st.integers(12, 40),
    queries=st.sampled_from([1, 2, 18]),
    fixed=st.booleans(),
    offline=st.booleans(),
)
def test_compat_is_minus_the_published_statistic(seed, models, queries, fixed, offline):
    scores, group, target = data(models, 20, queries, seed)
    group[:2] = [[True], [False]]
    statistics = group_stats(scores, group, center="median", equal_counts=True)
    mode = "offline_two_sided" if offline else "online"
    variance = "global" if fixed else "example"
    with np.errstate(all="ignore"):
        wanted = -script(scores, group, target, fixed, offline)
    found = lira(target, statistics, mode=mode, variance=variance, compat="plot.py").score
    known = np.abs(wanted) < 1e6  # two models that agree have a deviation of 0 there
    np.testing.assert_allclose(found[known], wanted[known], rtol=1e-9, atol=1e-9)


def test_two_gaussians_have_the_known_ratio_and_area():
    """With many models the score tends to d (x - d / 2), and its AUC to Phi(d / sqrt 2)."""
    rng = np.random.default_rng(3)
    d, n = 1.5, 4000
    group = np.arange(2000)[:, None] % 2 == np.zeros(n, int)
    scores = (rng.normal(size=(2000, n)) + d * group).astype(np.float32)
    members = rng.random(n) < 0.5
    target = rng.normal(size=n) + d * members
    result = lira(target, group_stats(scores, group))
    assert result.variance == "example"
    typical = np.abs(target) < 2
    assert np.abs(result.score - d * (target - d / 2))[typical].max() < 0.6
    assert result.roc(members).auc == pytest.approx(dist.norm.cdf(d / np.sqrt(2)), abs=0.02)
    low, high = result.auc_interval(members, replicates=200)
    assert low < result.roc(members).auc < high


def test_few_models_constant_scores_and_missing_targets_are_reported():
    scores, group, target = data(models=20, samples=6)
    group[:, 0] = np.arange(20) == 0  # one model trained on it
    group[:, 1] = False
    scores[:, 2] = 1.0  # all models agree
    scores[3:5, 3] = [np.nan, np.inf]
    target[4] = np.nan
    result = lira(target, group_stats(scores, group), variance="example")
    assert np.isnan(result.score).tolist() == [True, True, False, False, True, False]
    assert (result.n_nan, result.n_too_few, result.n_dropped) == (3, 2, 2)
    assert result.floored.tolist() == [False, False, True, False, False, False]
    assert np.isfinite(result.score[2])
    offline = lira(target, group_stats(scores, group), variance="example", mode="offline")
    assert np.isnan(offline.score).tolist() == [False] * 4 + [True, False]
    assert offline.n_too_few == 0
    content = json.loads(json.dumps(result.to_dict()))
    assert content["score"][0] is None
    assert content["n_floored"] == 1
    roc = result.roc([True, False, True, False, True, False])
    assert (roc.n_members, roc.n_nonmembers) == (1, 2)


@pytest.mark.parametrize("variance", ["example", "global", "shrink"])
def test_nothing_known_gives_nan_and_no_error(variance):
    empty = group_stats(np.zeros((0, 3)), np.zeros((0, 3), bool))
    assert np.isnan(lira(np.zeros(3), empty, variance=variance).score).all()
    constant = group_stats(np.ones((6, 3)), np.arange(6)[:, None] % 2 == np.zeros(3, int))
    result = lira(np.ones(3), constant, variance=variance)
    assert np.isfinite(result.score).all()
    assert result.floored.all() or variance == "shrink"


def test_ulira_is_lira_of_two_groups_of_models():
    scores, _, target = data(models=30, queries=2)
    group = np.arange(30)[:, None] < np.full(60, 12)
    found = ulira(target, scores[:12], scores[12:], queries="joint", variance="shrink")
    wanted = lira(target, group_stats(scores, group, joint=True), queries="joint", variance="shrink")
    np.testing.assert_allclose(found.score, wanted.score, rtol=1e-12)
    assert (found.n_in == 12).all()
    assert (found.n_out == 18).all()


def test_tensors_are_taken():
    scores, group, target = data()
    wanted = lira(target, group_stats(scores, group)).score
    found = lira(torch.from_numpy(target), group_stats(torch.from_numpy(scores), torch.from_numpy(group))).score
    np.testing.assert_array_equal(found, wanted)


def test_combinations_without_meaning_are_refused():
    scores, group, target = data(queries=2)
    statistics = group_stats(scores, group)
    for options, message in [
        ({"mode": "both"}, "mode must be"),
        ({"variance": "none"}, "variance must be"),
        ({"queries": "all"}, "queries must be"),
        ({"variance": "class"}, "classes"),
        ({"classes": np.zeros(60, int)}, "classes"),
        ({"variance_floor": 0.0}, "variance_floor must be positive"),
        ({"queries": "joint"}, "joint=True"),
        ({"compat": "plot.py"}, "equal_counts=True"),
    ]:
        with pytest.raises(ValueError, match=message):
            lira(target, statistics, **options)
    with pytest.raises(ValueError, match=r"target must have shape \[60, 2\], like the statistics, got \[60\]"):
        lira(target[:, 0], statistics)
    with pytest.raises(TypeError, match="target must be float16"):
        lira(target.astype(int), statistics)
    joint = group_stats(scores, group, joint=True)
    with pytest.raises(ValueError, match="have no tail"):
        lira(target, joint, mode="offline", queries="joint")
