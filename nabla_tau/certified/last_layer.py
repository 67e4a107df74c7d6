"""A certified last layer on frozen features of any model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from nabla_tau.arguments import check_kind
from nabla_tau.certified.certificate import Certificate
from nabla_tau.certified.learner import CertifiedLinear

ONLY_THE_LAST_LAYER = "covers the last layer alone: what the layers before it learned of deleted rows stays in them"


class ClippedLinear(nn.Linear):
    """A linear layer on inputs clipped to a norm: x min(1, norm/|x|)."""

    def __init__(self, in_features: int, out_features: int, bias: bool, norm: float) -> None:
        super().__init__(in_features, out_features, bias)
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(_clip(input, self.norm))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}"


class LastLayer:
    """The last linear layer of a model, trained and updated by a `CertifiedLinear`; all that is before it stays frozen.

        last = LastLayer(model, CertifiedLinear(LogisticRegression(classes=10, feature_norm=1.0, l2=0.01), ...))
        ids = last.fit(inputs, targets)
        last.delete(ids[:20])
        published, certificate = last.publish()

    THE CERTIFICATE COVERS THE LAST LAYER ALONE. The layers before it must not have been trained on data that may have
    to be deleted: what they learned of those rows stays in them (train them on public data, or on rows nobody can
    withdraw).

    What enters the layer is clipped, row by row, so that with the constant for the bias its norm is at most the
    learner's feature_norm R: to R/sqrt(2) beside a constant R/sqrt(2), or to R without a bias. The published model
    clips in the same way (`ClippedLinear`). The model is run in eval mode; the caller's own is never changed.

    layer: name of the last layer; None: the last nn.Linear. A learner that was loaded goes on where it was.
    Raises ValueError where the layer is not an nn.Linear of as many outputs as the problem's classes or outputs (two
    classes: 1 or 2 outputs), or where its output is not what the model returns.
    """

    def __init__(self, model: nn.Module, learner: CertifiedLinear, *, layer: str | None = None) -> None:
        check_kind(model, nn.Module, "model")
        check_kind(learner, CertifiedLinear, "learner")
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linears or (layer is not None and layer not in linears):
            raise ValueError(f"the last layer must be one of the model's nn.Linear, {linears}, got {layer!r}")
        self._name = linears[-1] if layer is None else layer
        self._model = copy.deepcopy(model).eval()
        self.learner = learner
        last = self._layer(self._model)
        columns = learner.problem.columns
        if last.out_features != columns and (last.out_features, columns) != (2, 1):
            raise ValueError(f"{self._name!r} has {last.out_features} outputs, the problem {columns}")
        self._bias = last.bias is not None
        self._norm = learner.problem.feature_norm / (math.sqrt(2) if self._bias else 1)

    @torch.no_grad()
    def features(self, inputs: Tensor, batch_size: int = 256) -> Tensor:
        """What the certified layer is trained on, [N, features (+ 1 for the bias)] in float64, for inputs [N, ...]."""
        seen: list[tuple[Tensor, Tensor]] = []
        hook = self._layer(self._model).register_forward_hook(lambda _, given, result: seen.append((given[0], result)))
        features: list[Tensor] = []
        try:
            for batch in torch.split(inputs, batch_size):
                output = self._model(batch)
                if len(seen) != 1:
                    raise ValueError(f"{self._name!r} must run once in a forward, but ran {len(seen)} times")
                x, scores = seen[0]
                if x.dim() != 2 or len(x) != len(batch):
                    raise ValueError(f"{self._name!r} must get one row a sample, [{len(batch)}, ...]: {list(x.shape)}")
                if not isinstance(output, Tensor) or not torch.equal(output.flatten(), scores.flatten()):
                    raise ValueError(f"the model's output is not that of {self._name!r}: name its last layer")
                features.append(x)
                seen.clear()
        finally:
            hook.remove()
        clipped = _clip(torch.cat(features).double(), self._norm)
        if not self._bias:
            return clipped
        return torch.cat((clipped, clipped.new_full((len(clipped), 1), self._norm)), dim=1)

    def fit(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """As `CertifiedLinear.fit`, for inputs of the model, [N, ...]."""
        return self.learner.fit(self.features(inputs), targets)

    def add(self, inputs: Tensor, targets: Tensor, *, together: bool = False) -> Tensor:
        """As `CertifiedLinear.add`, for inputs of the model, [N, ...]."""
        return self.learner.add(self.features(inputs), targets, together=together)

    def delete(self, ids: Tensor | Iterable[int], *, together: bool = False) -> None:
        """As `CertifiedLinear.delete`."""
        self.learner.delete(ids, together=together)

    def publish(self) -> tuple[nn.Module, Certificate]:
        """A new model in eval mode whose last layer holds published weights, and their certificate."""
        weights, certificate = self.learner.publish()
        certificate = replace(certificate, warnings=(*certificate.warnings, ONLY_THE_LAST_LAYER))
        if weights.shape[1] == 1 and self._layer(self._model).out_features == 2:
            weights = torch.cat((torch.zeros_like(weights), weights), dim=1)
        model = copy.deepcopy(self._model)
        old = self._layer(model)
        new = ClippedLinear(old.in_features, old.out_features, self._bias, self._norm).to(old.weight).eval()
        with torch.no_grad():
            new.weight.copy_(weights[: old.in_features].T)
            if self._bias:
                new.bias.copy_(weights[-1] * self._norm)
        if self._name == "":
            return new, certificate
        parent, _, child = self._name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        return model, certificate

    def _layer(self, model: nn.Module) -> nn.Linear:
        layer = model.get_submodule(self._name)
        assert isinstance(layer, nn.Linear)
        return layer


def _clip(x: Tensor, norm: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * (norm / length).clamp(max=1)
