"""Losses whose constants are certified: gradients, and that the constants hold and are not idle."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nabla_tau.certified import LogisticRegression, RidgeRegression
from nabla_tau.certified.calibration import theorem_9
from nabla_tau.certified.descent import descend, project
from nabla_tau.certified.problem import LinearProblem

FEATURES = 5
PROBLEMS: dict[str, LinearProblem] = {
    "binary": LogisticRegression(feature_norm=1.5, l2=0.05),
    "four classes": LogisticRegression(feature_norm=1.5, l2=0.05, classes=4),
    "ridge": RidgeRegression(feature_norm=1.5, l2=0.05, target_norm=2.0),
    "ridge, three outputs": RidgeRegression(feature_norm=1.5, l2=0.05, target_norm=2.0, outputs=3),
}


@pytest.fixture(params=PROBLEMS)
def problem(request) -> LinearProblem:
    return PROBLEMS[request.param]


def data(problem: LinearProblem, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows inside the bounds, some of them on the boundary."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)
    lengths = torch.rand(rows, 1, generator=generator).round(decimals=1) * problem.feature_norm
    x = lengths * x / x.norm(dim=1, keepdim=True)
    if isinstance(problem, LogisticRegression):
        return x, torch.randint(problem.classes, (rows,), generator=generator)
    y = torch.randn(rows, problem.columns, generator=generator, dtype=torch.float64)
    return x, 2 * y / y.norm(dim=1, keepdim=True)


def weights_in_ball(problem: LinearProblem, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = 9 * torch.randn(FEATURES, problem.columns, generator=generator, dtype=torch.float64)
    return project(w * torch.rand((), generator=generator), problem.radius)


def objective(problem: LinearProblem, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return problem.loss(w, x, y).mean() + problem.l2 / 2 * w.square().sum()


def test_gradient_is_that_of_autograd_and_of_differences(problem):
    x, y = data(problem, 20, 0)
    w = weights_in_ball(problem, 1).requires_grad_()
    (expected,) = torch.autograd.grad(objective(problem, w, x, y), w)
    gradient = problem.gradient(w.detach(), x, y, problem.l2)
    torch.testing.assert_close(gradient, expected)
    for i in range(FEATURES):
        for j in range(problem.columns):
            step = torch.zeros_like(gradient)
            step[i, j] = 1e-6
            ends = [objective(problem, w.detach() + s * step, x, y).item() for s in (1, -1)]
            assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(gradient[i, j].item(), abs=1e-7)


def test_models_side_by_side_are_as_each_by_itself(problem):
    pairs = [data(problem, 20, seed) for seed in range(3)]
    w = torch.stack([weights_in_ball(problem, seed) for seed in range(3)])
    together = problem.gradient(w, *map(torch.stack, zip(*pairs, strict=True)), 0.1)
    for k, (x, y) in enumerate(pairs):
        torch.testing.assert_close(together[k], problem.gradient(w[k], x, y, 0.1))


@pytest.mark.parametrize("name", PROBLEMS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_constants_hold(name, seed):
    problem = PROBLEMS[name]
    c = problem.constants(100, FEATURES)
    x, y = data(problem, 6, seed)
    a, b = weights_in_ball(problem, seed + 1), weights_in_ball(problem, seed + 2)
    for row in range(len(x)):
        one = (x[row : row + 1], y[row : row + 1])
        at_a, at_b = (problem.gradient(w, *one, problem.l2) for w in (a, b))
        assert at_a.norm() <= c.lipschitz * (1 + 1e-12)
        assert (at_a - at_b).norm() <= c.smoothness * (a - b).norm() * (1 + 1e-9)
        assert ((at_a - at_b) * (a - b)).sum() >= c.strong_convexity * (a - b).square().sum() * (1 - 1e-9)


def extremes(problem: LinearProblem) -> tuple[float, float, float]:
    """The largest gradient, and the largest and smallest curvature, that are reached at the worst rows."""
    x = torch.zeros(1, FEATURES, dtype=torch.float64)
    x[0, 0] = problem.feature_norm
    w = torch.zeros(FEATURES, problem.columns, dtype=torch.float64)
    if isinstance(problem, LogisticRegression):
        y = torch.zeros(1, dtype=torch.int64)
        wrong = w.clone()
        wrong[0, -1] = problem.radius
        if problem.columns > 1:
            wrong[0, 0] = -problem.radius
    else:
        y = -2 * torch.eye(1, problem.columns, dtype=torch.float64)
        wrong = w.clone()
        wrong[0, 0] = problem.radius
    steepest = problem.gradient(project(wrong, problem.radius), x, y, problem.l2).norm().item()
    if problem.columns > 2 and isinstance(problem, LogisticRegression):
        w[0, 2:] = -100 / problem.feature_norm  # two classes share the probability: the eigenvalue 1/2

    def flat(v: Tensor) -> Tensor:
        return objective(problem, v.reshape(w.shape), x, y)

    curvatures = torch.linalg.eigvalsh(torch.autograd.functional.hessian(flat, w.flatten()))
    return steepest, curvatures[-1].item(), curvatures[0].item()


def test_constants_are_not_idle(problem):
    """A smaller L or M, or a larger m, would be wrong: each is reached, L of the logistic loss within a fifth."""
    c = problem.constants(100, FEATURES)
    steepest, most, least = extremes(problem)
    assert 0.8 * c.lipschitz < steepest <= c.lipschitz * (1 + 1e-12)
    assert most == pytest.approx(c.smoothness, rel=1e-6)
    assert least == pytest.approx(c.strong_convexity, rel=1e-6)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(sorted(PROBLEMS)), seed=st.integers(0, 10**6), worst=st.booleans())
def test_the_ball_holds_the_optimum(name, seed, worst):
    problem = PROBLEMS[name]
    x, y = data(problem, 12, seed)
    if worst:  # rows that all pull the same way
        x, y = x[:1].expand(12, -1), y[:1].expand(12, *y.shape[1:])
    wide = type(problem)(**{**vars(problem), "diameter": 1e3})
    plan = theorem_9(wide.constants(12, FEATURES), eps=1, delta=1e-2, iterations=1)
    optimum = descend(wide, plan, torch.zeros(FEATURES, problem.columns, dtype=torch.float64), x, y, 3000)
    assert wide.gradient(optimum, x, y, problem.l2).norm() < 1e-9
    assert optimum.norm() <= problem.radius


def test_projection_is_the_nearest_point_of_the_ball():
    w = torch.tensor([[[3.0], [4.0]], [[0.3], [0.4]], [[0.0], [0.0]]], dtype=torch.float64)
    torch.testing.assert_close(project(w, 2.0)[:, :, 0], torch.tensor([[1.2, 1.6], [0.3, 0.4], [0, 0]]).double())


def test_a_step_contracts_by_gamma(problem):
    """The rate that all the theorems count on, and no better one: along the flattest direction it is exactly that."""
    plan = theorem_9(problem.constants(20, FEATURES), eps=1, delta=1e-2, iterations=1)
    x, y = data(problem, 20, 3)
    x[:, 0] = 0  # along this feature there is only l2
    optimum = descend(problem, plan, torch.zeros(FEATURES, problem.columns, dtype=torch.float64), x, y, 4000)
    a = weights_in_ball(problem, 5)
    stepped = descend(problem, plan, a, x, y, 1)
    assert (stepped - optimum).norm() <= plan.gamma * (a - optimum).norm() * (1 + 1e-9)
    a = optimum.clone()
    a[0] += 1e-3
    stepped = descend(problem, plan, a, x, y, 1)
    assert (stepped - optimum).norm().item() == pytest.approx(plan.gamma * (a - optimum).norm().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LogisticRegression(feature_norm=math.inf, l2=1), "feature_norm must be positive and finite, got inf"),
        (lambda: LogisticRegression(feature_norm=1, l2=-1), "l2 must be at least 0"),
        (lambda: LogisticRegression(feature_norm=1), "give the diameter"),
        (lambda: RidgeRegression(feature_norm=1, target_norm=1, diameter=0.0), "diameter must be positive"),
        (lambda: RidgeRegression(feature_norm=1, l2=1, target_norm=math.inf), "target_norm must be positive"),
        (lambda: LogisticRegression(feature_norm=1, l2=1, classes=1), "classes must be at least 2"),
    ],
)
def test_problems_without_bounds(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_rows_outside_the_bounds():
    logistic, ridge = PROBLEMS["four classes"], PROBLEMS["ridge"]
    x, y = data(logistic, 6, 0)
    with pytest.raises(ValueError, match=r"\|x\| reaches 3, but feature_norm is 1.5"):
        logistic.check(torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"\|x\| reaches nan"):
        logistic.check(x * math.nan, y)
    with pytest.raises(ValueError, match="labels must be in 0 ... 3, got"):
        logistic.check(x, y + 4)
    with pytest.raises(ValueError, match="differ in length: 6 and 5"):
        logistic.check(x, y[:5])
    with pytest.raises(ValueError, match="class labels"):
        logistic.check(x, y.double())
    with pytest.raises(ValueError, match=r"\|y\| reaches 5, but target_norm is 2"):
        ridge.check(x, torch.full((6, 1), 5.0))
    with pytest.raises(ValueError, match=r"targets must be \[N, 1\]"):
        ridge.check(x, torch.zeros(6))
    with pytest.raises(TypeError, match="list"):
        ridge.check([[1.0]], torch.zeros(1, 1))
