"""Linear models whose losses have known constants: logistic regression and ridge regression.

Weights are [features, columns] in float64, and the loss of a row is a convex function of x^T w. What is penalised (l2)
and how far the weights may be from 0 (half the diameter) belongs to the problem, for the constants hang on them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nabla_tau.arguments import check_fields
from nabla_tau.certified.calibration import Constants


@dataclass(frozen=True, kw_only=True)
class LinearProblem(ABC):
    """feature_norm: the bound R of |x|, which must not be read off the data. l2: weight of (l2/2)|w|^2 in every row's
    loss; 0 for theorems 10 and 30, which choose it. diameter: of the ball around 0 that holds the weights; None with
    l2 > 0: the smallest ball that is sure to hold the optimum of any data."""

    feature_norm: float
    l2: float = 0.0
    diameter: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 < self.feature_norm < math.inf:
            raise ValueError(f"feature_norm must be positive and finite, got {self.feature_norm}")
        if not 0 <= self.l2 < math.inf:
            raise ValueError(f"l2 must be at least 0 and finite, got {self.l2}")
        if self.diameter is None:
            if self.l2 == 0:
                raise ValueError("without l2 the weights are bounded by nothing: give the diameter of their ball")
        elif not 0 < self.diameter < math.inf:
            raise ValueError(f"diameter must be positive and finite, got {self.diameter}")

    @property
    @abstractmethod
    def columns(self) -> int:
        """Of the weights."""

    @property
    def radius(self) -> float:
        """Of the ball of weights."""
        return self._optimum_norm() if self.diameter is None else self.diameter / 2

    def constants(self, rows: int, features: int) -> Constants:
        """Of the loss of a row, its l2 included, over the ball."""
        return Constants(
            lipschitz=self._residual_norm() * self.feature_norm + self.l2 * self.radius,
            smoothness=self._curvature() * self.feature_norm**2 + self.l2,
            strong_convexity=self.l2,
            diameter=2 * self.radius,
            rows=rows,
            dimension=features * self.columns,
        )

    def check(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x: [N, features] and targets as copies that the constants hold for. Raises ValueError or TypeError."""
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            raise TypeError(f"x and y must be tensors, got {type(x).__name__} and {type(y).__name__}")
        if x.dim() != 2 or 0 in x.shape or not x.is_floating_point():
            raise ValueError(f"x must be [rows, features] in floating point, got {list(x.shape)} of {x.dtype}")
        if len(x) != len(y):
            raise ValueError(f"x and y differ in length: {len(x)} and {len(y)}")
        x = x.detach().to(torch.float64, copy=True)
        longest = x.norm(dim=1).max().item()
        if not longest <= self.feature_norm * (1 + 1e-12):
            raise ValueError(f"|x| reaches {longest:.6g}, but feature_norm is {self.feature_norm}: clip the features")
        return x, self._check_targets(y.detach().to(x.device, copy=True))

    def gradient(self, weights: Tensor, x: Tensor, y: Tensor, l2: float) -> Tensor:
        """Of the mean loss. weights: [..., features, columns]; x: [..., N, features]; the leading sizes are models
        apart."""
        return x.mT @ self._residual(x @ weights, y) / x.shape[-2] + l2 * weights

    @abstractmethod
    def loss(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """[N] losses of rows, without l2."""

    @abstractmethod
    def _check_targets(self, y: Tensor) -> Tensor: ...

    @abstractmethod
    def _residual(self, scores: Tensor, y: Tensor) -> Tensor:
        """Derivative of the loss of a row with respect to its scores [..., N, columns]."""

    @abstractmethod
    def _residual_norm(self) -> float:
        """Bound of the residual's norm."""

    @abstractmethod
    def _curvature(self) -> float:
        """Bound of the norm of the Hessian with respect to the scores."""

    @abstractmethod
    def _optimum_norm(self) -> float:
        """Bound of the norm of the optimum, l2 > 0."""


@dataclass(frozen=True, kw_only=True)
class LogisticRegression(LinearProblem):
    """Cross-entropy of class labels [N] in int64. Two classes have one column (the score of class 1), more have one
    each.

    With R = feature_norm: two classes L = R + l2 r, M = R^2/4 + l2; more L = sqrt(2) R + l2 r, M = R^2/2 + l2, because
    |p - onehot(y)| <= sqrt(2) and the eigenvalues of diag(p) - p p^T are at most 1/2. At the optimum the loss is at
    most that of zero weights, ln C, and the gradient is 0: its norm is at most min(sqrt(2 ln C/l2), L_data/l2).
    """

    classes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")

    @property
    def columns(self) -> int:
        return 1 if self.classes == 2 else self.classes

    def loss(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        scores = x @ weights
        if self.columns == 1:
            return torch.nn.functional.softplus(torch.where(y == 1, -1.0, 1.0) * scores[:, 0])
        return torch.nn.functional.cross_entropy(scores, y, reduction="none")

    def _check_targets(self, y: Tensor) -> Tensor:
        if y.dim() != 1 or y.dtype != torch.int64:
            raise ValueError(f"targets must be class labels [N] in int64, got {list(y.shape)} of {y.dtype}")
        if y.min() < 0 or y.max() >= self.classes:
            raise ValueError(f"labels must be in 0 ... {self.classes - 1}, got {y.min().item()} to {y.max().item()}")
        return y

    def _residual(self, scores: Tensor, y: Tensor) -> Tensor:
        if self.columns == 1:
            return scores.sigmoid() - y.unsqueeze(-1)
        return scores.softmax(-1).scatter_add(-1, y.unsqueeze(-1), scores.new_full((*y.shape, 1), -1.0))

    def _residual_norm(self) -> float:
        return 1.0 if self.columns == 1 else math.sqrt(2)

    def _curvature(self) -> float:
        return 1 / 4 if self.columns == 1 else 1 / 2

    def _optimum_norm(self) -> float:
        return min(math.sqrt(2 * math.log(self.classes) / self.l2), self._residual_norm() * self.feature_norm / self.l2)


@dataclass(frozen=True, kw_only=True)
class RidgeRegression(LinearProblem):
    """|x^T w - y|^2 / 2 for targets y [N, outputs] with |y| <= target_norm (a bound not read off the data).

    With R = feature_norm, r = the radius of the ball: L = R (R r + target_norm) + l2 r, M = R^2 + l2. The loss at the
    optimum is at most that of zero weights, so its norm is at most target_norm/sqrt(l2).
    """

    target_norm: float
    outputs: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target_norm < math.inf:
            raise ValueError(f"target_norm must be positive and finite, got {self.target_norm}")
        if self.outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {self.outputs}")

    @property
    def columns(self) -> int:
        return self.outputs

    def loss(self, weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return (x @ weights - y).square().sum(-1) / 2

    def _check_targets(self, y: Tensor) -> Tensor:
        if y.dim() != 2 or y.shape[1] != self.outputs or not y.is_floating_point():
            raise ValueError(f"targets must be [N, {self.outputs}] in floating point, got {list(y.shape)} of {y.dtype}")
        y = y.to(torch.float64)
        largest = y.norm(dim=1).max().item()
        if not largest <= self.target_norm * (1 + 1e-12):
            raise ValueError(f"|y| reaches {largest:.6g}, but target_norm is {self.target_norm}: clip the targets")
        return y

    def _residual(self, scores: Tensor, y: Tensor) -> Tensor:
        return scores - y

    def _residual_norm(self) -> float:
        return self.feature_norm * self.radius + self.target_norm

    def _curvature(self) -> float:
        return 1.0

    def _optimum_norm(self) -> float:
        return self.target_norm / math.sqrt(self.l2)
