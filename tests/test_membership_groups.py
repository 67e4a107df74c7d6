"""Statistics over models, C++ and all, against numpy in float64."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nabla_tau import _C
from nabla_tau.membership.groups import group_stats, two_group_stats

DTYPES = [np.float16, np.float32, np.float64]
# Distance from exact rounding in float64; the values are at most a few thousand.
CLOSE = {"rtol": 1e-12, "atol": 1e-9}


def oracle(scores, group, joint=False, limit=(None, None)):
    """count, mean, m2 and median [2, ...], scatter [2, N, A, A], score by score."""
    cells = scores.astype(np.float64).reshape(*scores.shape[:2], *(scores.shape[2:] or (1,)))
    _, samples, queries = cells.shape
    count, mean, m2, median = (np.zeros((2, samples, queries)) for _ in range(4))
    scatter = np.zeros((2, samples, queries, queries))
    for g in (0, 1):
        for n in range(samples):
            rows = cells[group[:, n] == g, n][: limit[g]]
            if joint:
                rows = rows[np.isfinite(rows).all(1)]
                d = rows - rows.mean(0) if len(rows) else rows
                scatter[g, n] = d.T @ d
            for a in range(queries):
                x = rows[:, a][np.isfinite(rows[:, a])]
                count[g, n, a] = x.size
                mean[g, n, a] = x.mean() if x.size else np.nan
                m2[g, n, a] = ((x - x.mean()) ** 2).sum() if x.size else 0
                median[g, n, a] = np.median(x) if x.size else np.nan
    shape = (2, *scores.shape[1:])
    return *(a.reshape(shape) for a in (count, mean, m2, median)), scatter


def assert_right(stats, scores, group, **options):
    count, mean, m2, median, scatter = oracle(scores, group, **options)
    np.testing.assert_array_equal(stats.count, count)
    np.testing.assert_allclose(stats.mean, mean, **CLOSE)
    np.testing.assert_allclose(stats.m2, m2, **CLOSE)
    if stats.median is not None:
        np.testing.assert_array_equal(stats.median, median)
    if stats.scatter is not None:
        np.testing.assert_allclose(stats.scatter, scatter, **CLOSE)


def sample(shape, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return (3 * rng.normal(size=shape)).astype(dtype), rng.random(shape[:2]) < 0.5


def laid_out(array, layout):
    """The same values under other strides."""
    if layout == "reversed":
        return np.ascontiguousarray(array[::-1, ::-1])[::-1, ::-1]
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "every third":
        wide = np.zeros((array.shape[0], 3 * array.shape[1], *array.shape[2:]), array.dtype)
        wide[:, ::3] = array
        return wide[:, ::3]
    if layout == "unaligned":
        records = np.zeros(array.shape, np.dtype([("pad", "u1"), ("x", array.dtype)]))
        records["x"] = array
        return records["x"]
    return array


LAYOUTS = ["plain", "reversed", "fortran", "every third", "unaligned"]
VALUES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 1.0, -2.5, np.nan, np.inf, -np.inf]), st.integers(-2000, 2000))


@settings(deadline=None, max_examples=150)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), layout=st.sampled_from(LAYOUTS), packed=st.booleans())
def test_equals_the_oracle_for_any_shape_stride_and_value(data, dtype, layout, packed):
    models, samples = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 19))
    queries = data.draw(st.sampled_from([None, 1, 2, 5]))
    shape = (models, samples) if queries is None else (models, samples, queries)
    size = int(np.prod(shape))
    values = data.draw(st.lists(VALUES, min_size=size, max_size=size))
    scores = laid_out(np.array(values, np.float64).reshape(shape).astype(dtype), layout)
    bits = data.draw(st.lists(st.booleans(), min_size=models * samples, max_size=models * samples))
    group = np.array(bits, bool).reshape(models, samples)
    given_group = np.packbits(group, axis=1) if packed else laid_out(group, layout)
    assert_right(group_stats(scores, given_group, center="median"), scores, group)
    if queries is not None:
        assert_right(group_stats(scores, given_group, joint=True), scores, group, joint=True)


# Around a tile of models, a vector of lanes and a block of columns.
@pytest.mark.parametrize("shape", [(63, 17), (64, 1024), (65, 1025), (300, 40), (130, 9, 18), (5, 3, 1500)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_and_tiles_meet_without_a_gap(shape, dtype):
    scores, group = sample(shape, dtype)
    assert_right(group_stats(scores, group, center="median"), scores, group)


def test_every_bit_pattern_of_float16_is_read():
    patterns = np.arange(1 << 16, dtype=np.uint16).view(np.float16)[None]
    stats = group_stats(patterns, np.ones(patterns.shape, bool))
    finite = np.isfinite(patterns[0])
    np.testing.assert_array_equal(stats.count[1], finite)
    np.testing.assert_array_equal(stats.mean[1][finite], patterns[0][finite].astype(np.float64))


@pytest.mark.parametrize("models", [1, 2, 3, 8, 63, 64, 65, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_medians_are_those_of_numpy_over_many_magnitudes_and_ties(models, dtype):
    rng = np.random.default_rng(models)
    scores = (rng.choice([-1, 1], (models, 40)) * 10.0 ** rng.uniform(-4, 4, (models, 40))).astype(dtype)
    scores[:, 20:] = np.round(scores[:, 20:] / 1000)
    group = np.ones(scores.shape, bool)
    found = _C.group_medians(scores, group)
    np.testing.assert_array_equal(found[1], np.median(scores.astype(np.float64), axis=0))
    assert np.isnan(found[0]).all()


def test_an_offset_and_an_outlier_of_the_other_group_cost_no_precision():
    rng = np.random.default_rng(0)
    scores = 1e8 + rng.normal(size=(200, 3))
    group = rng.random(scores.shape) < 0.5
    scores[group] *= 1e100
    stats = group_stats(scores, group)
    for n in range(3):
        np.testing.assert_allclose(stats.m2[0, n] / (stats.count[0, n] - 1), np.var(scores[~group[:, n], n], ddof=1))


@pytest.mark.parametrize("chunk", [1, 7, 64, 100])
def test_streaming_in_chunks_and_merging_equal_one_call(chunk):
    scores, group = sample((200, 30, 4))
    scores[::5, 3, 1] = np.nan
    group[:70, 5] = False
    group[:, 6] = True
    whole = group_stats(scores, group, joint=True)
    streamed = group_stats(scores[:chunk], group[:chunk], joint=True)
    for start in range(chunk, 200, chunk):
        streamed = streamed.update(scores[start : start + chunk], np.packbits(group[start : start + chunk], axis=1))
    rest = group_stats(scores[chunk:], group[chunk:], joint=True)
    merged = group_stats(scores[:chunk], group[:chunk], joint=True).merge(rest)
    for found in (streamed, merged):
        assert found.models == 200
        np.testing.assert_array_equal(found.count, whole.count)
        for name in ("mean", "m2", "scatter"):
            np.testing.assert_allclose(getattr(found, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_results_do_not_depend_on_the_number_of_threads():
    scores, group = sample((100, 3000))
    one = _C.group_moments(scores, group, num_threads=1)
    for threads in (2, 3, 64):
        for a, b in zip(one[:3], _C.group_moments(scores, group, num_threads=threads)[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            _C.group_medians(scores, group), _C.group_medians(scores, group, num_threads=threads)
        )


@pytest.mark.parametrize("level", ["baseline", "x86-64-v3"])
def test_results_are_right_at_every_instruction_set(level, monkeypatch, tmp_path):
    scores, group = sample((70, 50, 3), np.float16)
    np.savez(tmp_path / "in.npz", scores=scores, group=group)
    script = (
        "import torch, numpy as np; from nabla_tau.membership.groups import group_stats; d = np.load('in.npz');"
        "s = group_stats(d['scores'], d['group'], center='median', joint=True);"
        "np.savez('out.npz', count=s.count, mean=s.mean, m2=s.m2, median=s.median, scatter=s.scatter)"
    )
    monkeypatch.setenv("NABLA_TAU_SIMD", level)
    subprocess.run([sys.executable, "-P", "-c", script], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "out.npz")
    here = group_stats(scores, group, center="median", joint=True)
    for name in ("count", "mean", "m2", "median", "scatter"):
        np.testing.assert_allclose(found[name], getattr(here, name), **CLOSE)


def test_a_memory_map_larger_than_the_memory_allowed_is_read(tmp_path):
    """At most 64 MB beyond the results, for moments in chunks and at once, and for medians."""
    shape = (64, 40_000, 16)
    rng = np.random.default_rng(0)
    scores = np.lib.format.open_memmap(tmp_path / "scores.npy", "w+", np.float16, shape)
    for m in range(shape[0]):
        scores[m] = rng.normal(size=shape[1:])
    scores.flush()
    np.save(tmp_path / "group.npy", rng.random(shape[:2]) < 0.5)
    script = """
import resource, numpy as np, torch
from nabla_tau.membership.groups import group_stats
scores, group = np.load("scores.npy", mmap_mode="r"), np.load("group.npy", mmap_mode="r")
def private():
    return int(open("/proc/self/status").read().split("VmData:")[1].split()[0]) << 10
outputs = 2 * scores[0].size * (4 + 8 + 8)
assert scores.nbytes > 64 << 20
# Twice: what `update` makes, and what it starts from.
resource.setrlimit(resource.RLIMIT_DATA, (private() + 2 * outputs + (64 << 20),) * 2)
whole = group_stats(scores, group)
streamed = group_stats(scores[:0], group[:0])
for start in range(0, len(scores), 10):
    streamed = streamed.update(scores[start : start + 10], group[start : start + 10])
for name in ("count", "mean", "m2"):
    np.testing.assert_allclose(getattr(whole, name), getattr(streamed, name), rtol=1e-12, atol=1e-12)
del streamed, whole
assert group_stats(scores, group, center="median").median.shape == (2, 40000, 16)
"""
    subprocess.run([sys.executable, "-P", "-c", script], check=True, cwd=tmp_path)


def test_equal_counts_use_the_first_models_of_each_sample():
    scores, group = sample((20, 6, 2))
    n_in = group.sum(0)
    for given_group in (group, np.packbits(group, axis=1)):
        stats = group_stats(scores, given_group, center="median", equal_counts=True)
        assert stats.limit == (20 - n_in.max(), n_in.min())
        assert_right(stats, scores, group, limit=stats.limit)


def test_separate_arrays_equal_one_with_a_group():
    scores, _ = sample((9, 12, 3))
    group = np.zeros((9, 12), bool)
    group[4:] = True
    apart = two_group_stats(scores[:4], scores[4:], center="median", joint=True)
    together = group_stats(scores, group, center="median", joint=True)
    for name in ("count", "mean", "m2", "median", "scatter"):
        np.testing.assert_array_equal(getattr(apart, name), getattr(together, name))
    assert apart.models == 9


def test_tensors_are_taken_and_counts_reported():
    scores, group = sample((6, 4))
    scores[0, 0] = np.nan
    stats = group_stats(torch.from_numpy(scores).requires_grad_(), torch.from_numpy(group))
    assert_right(stats, scores, group)
    assert stats.n_dropped == 1
    summary = json.loads(json.dumps(stats.to_dict()))
    assert summary["models"] == 6
    assert summary["n_fewer_than_two"] == int((np.minimum(stats.n_in, stats.n_out) < 2).sum())


def test_what_cannot_be_used_is_refused():
    scores, group = sample((6, 4))
    with pytest.raises(TypeError, match="scores must be float16, float32 or float64, got int64"):
        group_stats(np.zeros((2, 2), int), group)
    with pytest.raises(TypeError, match="native byte order"):
        _C.group_moments(scores.astype(">f4"), group)
    with pytest.raises(TypeError, match="bfloat16"):
        group_stats(torch.zeros(2, 2, dtype=torch.bfloat16), group)
    with pytest.raises(ValueError, match=r"scores must be \[M, N\] or \[M, N, A\], got \[4\]"):
        group_stats(scores[0], group)
    with pytest.raises(ValueError, match=r"group must be \[6, 4\], one row a model, got \[6, 3\]"):
        group_stats(scores, group[:, :3])
    with pytest.raises(ValueError, match=r"group must be \[6, 1\], one row a model, got \[6, 4\]"):
        group_stats(scores, group.view(np.uint8))
    with pytest.raises(ValueError, match=r"group must be \[6, 4\].*got \(5, 4\)"):
        _C.group_moments(scores, group[:5])
    with pytest.raises(TypeError, match="group must be bool"):
        group_stats(scores, group.astype(float))
    with pytest.raises(ValueError, match=r"joint statistics need queries"):
        group_stats(scores, group, joint=True)
    with pytest.raises(ValueError, match="medians and equal counts need all models"):
        group_stats(scores, group, center="median").update(scores, group)
    with pytest.raises(ValueError, match=r"scores must be \[M, 4\], got \[6, 3\]"):
        group_stats(scores, group).update(scores[:, :3], group[:, :3])
    with pytest.raises(ValueError, match="num_threads"):
        _C.group_moments(scores, group, num_threads=0)
