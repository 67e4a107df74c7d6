"""The Triton kernel of the Gram norms: equal to the gradient's norm in float64, whatever the tiles make of the sizes.

Interpreted where there is no GPU, as in `test_rows_triton.py`.
"""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, load_kernels

from nabla_tau.kernels import reference

launch, gram = load_kernels("launch", "gram")

pytestmark = pytest.mark.usefixtures("interpreter")


def rows(samples, count, p, q, dtype=torch.float32):
    generator = torch.Generator().manual_seed(count * 1009 + p)
    a, g = (torch.randn(samples, count, width, generator=generator).to(dtype).to(DEVICE) for width in (p, q))
    return a, g


def truth(a, g):
    return (g.double().mT @ a.double()).square().sum((1, 2))


def test_the_reference_is_the_norm_of_the_gradient():
    a, g = rows(3, 5, 7, 4, torch.float64)
    torch.testing.assert_close(reference.gram_norms(a, g), truth(a, g), rtol=1e-12, atol=0)


@pytest.mark.parametrize("count", [1, 16, 17, 40])
@pytest.mark.parametrize(("p", "q"), [(32, 32), (33, 7)])
def test_ragged_sizes(count, p, q):
    a, g = rows(2, count, p, q)
    torch.testing.assert_close(gram.gram_norms(a, g).double(), truth(a, g), rtol=1e-5, atol=0)


def test_tiles_below_the_diagonal_count_twice(monkeypatch):
    """Every tile of a sample of 5 x 5 tiles, in whatever order they are numbered."""
    monkeypatch.setattr(launch, "gram", lambda *_: launch.Launch(16, 32, 32))
    a, g = rows(1, 70, 20, 12)
    torch.testing.assert_close(gram.gram_norms(a, g).double(), truth(a, g), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_worse_than_the_reference(dtype):
    a, g = rows(2, 33, 24, 40, dtype)
    exact = truth(a, g)
    ours, theirs = (
        (value.double() - exact).abs() / exact for value in (gram.gram_norms(a, g), reference.gram_norms(a, g))
    )
    assert ours.max() <= theirs.max() + 4 * torch.finfo(torch.float32).eps


def test_strided_rows_and_an_empty_batch():
    a, g = rows(2, 18, 8, 8)
    spaced = torch.stack((a, a), 3)[..., 0]
    assert not spaced.is_contiguous()
    assert torch.equal(gram.gram_norms(spaced, g), gram.gram_norms(a, g))
    assert gram.gram_norms(a[:0], g[:0]).shape == (0,)


def test_opposite_rows_have_no_norm():
    """What cancels in the gradient cancels in the Grams, and rounding does not make a norm negative."""
    a, g = rows(2, 9, 8, 8)
    norms = gram.gram_norms(torch.cat((a, a), 1), torch.cat((g, -g), 1))
    assert (norms >= 0).all()
    assert (norms <= 1e-5 * truth(a, g)).all()


def test_launches_fit_a_tensor_core():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for count in (1, 3, 16, 63, 64, 65, 4096):
            config = launch.gram(count, dtype)
            assert 16 <= config.rows <= 64
            assert config.rows >= min(64, count)
            assert config.classes >= 16
