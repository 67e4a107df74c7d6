"""Margins, divergence of outputs and tug of war, against formulas in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.spatial.distance import jensenshannon
from scipy.special import logsumexp, softmax

from nabla_tau.membership.closeness import js_divergence, tow
from nabla_tau.membership.margins import logit_margin

TOLERANCE = {np.float16: 2e-6, np.float32: 2e-6, np.float64: 1e-13}


def oracle(logits, labels):
    z = logits.astype(np.float64)
    own = np.take_along_axis(z, labels[..., None], -1)
    others = z.copy()
    np.put_along_axis(others, labels[..., None], -np.inf, -1)
    return own[..., 0] - logsumexp(others, axis=-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2,), (7, 3), (4, 5, 10), (3, 2, 2, 130)])
def test_margin_equals_its_formula(dtype, shape):
    rng = np.random.default_rng(0)
    logits = (20 * rng.normal(size=shape)).astype(dtype)
    labels = rng.integers(shape[-1], size=shape[:-1])
    found = logit_margin(logits, labels)
    assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
    np.testing.assert_allclose(found, oracle(logits, labels), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_margins_of_many_models_share_labels_and_strides_do_not_matter():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(3, 50, 8)).astype(np.float32), rng.integers(8, size=50)
    wanted = oracle(logits, np.broadcast_to(labels, (3, 50)))
    np.testing.assert_allclose(logit_margin(logits, labels), wanted, rtol=1e-5, atol=1e-6)
    other = np.asfortranarray(logits)[:, ::-1]
    np.testing.assert_allclose(logit_margin(other, labels[::-1]), wanted[:, ::-1], rtol=1e-5, atol=1e-6)
    tensor = torch.from_numpy(logits)
    np.testing.assert_array_equal(logit_margin(tensor, torch.from_numpy(labels)), logit_margin(logits, labels))


def test_a_sure_model_keeps_its_margin():
    logits = np.array([[900.0, 0.0, 0.0], [-900.0, 0.0, 0.0]], np.float16)
    np.testing.assert_allclose(logit_margin(logits, np.array([0, 0])), [900 - np.log(2), -900 - np.log(2)], rtol=1e-6)


def test_rows_in_chunks_equal_rows_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(100, 9)), rng.integers(9, size=100)
    whole = logit_margin(logits, labels)
    monkeypatch.setattr("nabla_tau.membership.margins._CHUNK", 63)
    np.testing.assert_array_equal(logit_margin(logits, labels), whole)


def test_margins_refuse_what_they_cannot_be_made_of():
    logits, labels = np.random.default_rng(3).normal(size=(5, 4)), np.zeros(5, int)
    with pytest.raises(ValueError, match="hold probabilities"):
        logit_margin(softmax(logits, axis=1), labels)
    with pytest.raises(ValueError, match="targets"):
        logit_margin(logits, labels - 100)
    with pytest.raises(ValueError, match=r"labels must have shape \[5\], like the logits, got \[4\]"):
        logit_margin(logits, labels[:4])
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        logit_margin(logits, labels.astype(float))
    with pytest.raises(TypeError, match="logits must be float16, float32 or float64, got int64"):
        logit_margin(labels[:, None], labels)
    with pytest.raises(ValueError, match="at least two classes"):
        logit_margin(logits[:, :1], labels)


@given(
    first=arrays.arrays(np.float64, (6, 5), elements=st.floats(-60, 60)),
    second=arrays.arrays(np.float64, (6, 5), elements=st.floats(-60, 60)),
)
def test_js_divergence_equals_scipy_and_is_symmetric(first, second):
    wanted = jensenshannon(softmax(first, axis=1), softmax(second, axis=1), axis=1) ** 2
    found = js_divergence(first, second).divergence
    np.testing.assert_allclose(found, np.nan_to_num(wanted), atol=1e-12)
    np.testing.assert_allclose(js_divergence(second, first).divergence, found, atol=1e-15)
    assert (found <= np.log(2) + 1e-12).all()


def test_js_divergence_of_classes_ruled_out_and_of_nan():
    first = np.array([[0.0, -np.inf], [1.0, 1.0], [np.nan, 0.0]], np.float32)
    second = np.array([[-np.inf, 0.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    result = js_divergence(first, second)
    np.testing.assert_allclose(result.divergence[:2], [np.log(2), 0], atol=1e-15)
    assert result.n_nan == 1
    assert result.mean == pytest.approx(np.log(2) / 2)
    assert result.to_dict()["divergence"][2] is None
    with pytest.raises(ValueError, match=r"other must have shape \[3, 2\]"):
        js_divergence(first, second[:2])


def test_tug_of_war():
    same = {"retain": (0.9, 0.9), "test": (0.8, 0.8)}
    assert tow(forget=(0.7, 0.7), **same) == 1
    assert tow(forget=(1.0, 0.7), **same) == pytest.approx(0.7)
    assert tow(forget=(0.4, 0.7), retain=(0.5, 1.0), test=(1, 0.9)) == pytest.approx(0.7 * 0.5 * 0.9)
    with pytest.raises(ValueError, match="forget must be two accuracies"):
        tow(forget=(70, 70), **same)
