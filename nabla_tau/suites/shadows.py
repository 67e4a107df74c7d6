"""Likelihood-ratio attacks on a method, by small models: does it answer as retrained ones do, and is what was
unlearned told from what was never seen?"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nabla_tau.arguments import whole
from nabla_tau.evaluation import evaluate
from nabla_tau.membership.curve import roc
from nabla_tau.membership.ensemble import Ensemble, train_ensemble
from nabla_tau.membership.likelihood_ratio import ulira
from nabla_tau.sources import derive_seed
from nabla_tau.suites import Suite
from nabla_tau.suites.data import Data
from nabla_tau.suites.scenarios import Parts

AT_ONCE = 4  # models of an ensemble: they share the order of their batches, which must not be all that an attack finds
_LARGEST = 1e4  # a margin beyond this is clipped, infinite ones too

Margins = NDArray[np.float64]


class Shadows:
    """Models of a suite's shadow kind, smaller than the suite's own: it is the method that is measured."""

    def __init__(self, suite: Suite, parts: Parts, *, models: int, seed: int) -> None:
        self.suite, self.parts, self.models, self.seed = suite, parts, models, seed

    def ulira(self, unlearn: Callable[[nn.Module, Data, int], nn.Module]) -> float:
        """AUC at which U-LiRA (Hayes et al. 2024, arXiv 2403.01218) tells the answers on the forget samples of models
        that unlearned them from those of retrained models, each attacked by means of all others. 0.5 for exact
        unlearning, but for chance: see `control`. unlearn: (model, which it may change, forget, seed) -> model."""
        return self._against_retrained(self._unlearned(unlearn, self._originals, self.parts.forget, 0))

    def ruli(self, unlearn: Callable[[nn.Module, Data, int], nn.Module]) -> float:
        """AUC at which samples that a model was trained on and unlearned are told from those that it never saw, where
        all models went through `unlearn`: the privacy game of RULI (Naderloui et al. 2025, arXiv 2506.13009), in which
        it does not help to know unlearned from retrained models. Some models are trained on one half of the forget set
        beside what is retained and unlearn it, as many on the other; the mean over the halves. 0.5 if nothing is left.
        """
        halves = self._halves
        models = [self._unlearned(unlearn, self._of_halves[k], half, k + 1) for k, half in enumerate(halves)]
        # Whichever group goes first: the same scores with the other sign, for the other label.
        first, second = (_leave_one_out(*(self._margins(group, half) for group in models)) for half in halves)
        return (first + second) / 2

    def _unlearned(
        self, unlearn: Callable[[nn.Module, Data, int], nn.Module], models: list[nn.Module], forget: Data, what: int
    ) -> list[nn.Module]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            copies = enumerate(map(copy.deepcopy, models))
            return [unlearn(model, forget, derive_seed(self.seed, what, k)) for k, model in copies]

    @functools.cached_property
    def control(self) -> float:
        """The AUC of an exact method: other retrained models in place of the unlearned ones."""
        return self._against_retrained(self._fit(self.parts.retain, 3))

    def cut_short(self, share: float) -> float:
        """The AUC of retraining itself, ended after a share of its epochs: how much of what U-LiRA finds is the length
        of a training, and nothing of the forget set."""
        whole(round(share * self.suite.epochs), "epochs of a training that is cut short", least=1)
        shorter = dataclasses.replace(self.suite, epochs=round(share * self.suite.epochs))
        return self._against_retrained(self._fit(self.parts.retain, 3, shorter))

    def _against_retrained(self, models: list[nn.Module]) -> float:
        return _leave_one_out(self._margins(models, self.parts.forget), self._retrained)

    @functools.cached_property
    def _originals(self) -> list[nn.Module]:
        return self._fit(self.parts.train, 1)

    @functools.cached_property
    def _retrained(self) -> Margins:
        return self._margins(self._fit(self.parts.retain, 2), self.parts.forget)

    @functools.cached_property
    def _halves(self) -> tuple[Data, Data]:
        x, y = self.parts.forget
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(derive_seed(self.seed, 4))).to(y.device)
        first, second = order.tensor_split(2)
        return (x[first], y[first]), (x[second], y[second])

    @functools.cached_property
    def _of_halves(self) -> list[list[nn.Module]]:
        pools = [tuple(map(torch.cat, zip(self.parts.retain, half, strict=True))) for half in self._halves]
        return [self._fit((x, y), 5 + k) for k, (x, y) in enumerate(pools)]

    def _fit(self, data: Data, what: int, suite: Suite | None = None) -> list[nn.Module]:
        suite, found = suite or self.suite, list[nn.Module]()
        assert suite.shadow is not None
        for start in range(0, self.models, AT_ONCE):
            ensemble: Ensemble = train_ensemble(
                suite.shadow,
                data,
                np.ones((min(AT_ONCE, self.models - start), len(data[0])), bool),
                epochs=suite.epochs,
                batch_size=suite.batch_size,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=suite.learning_rate, fused=True),
                seed=derive_seed(self.seed, what, start),
            )
            found += [ensemble.model(k) for k in range(len(ensemble))]
        return found

    def _margins(self, models: list[nn.Module], data: Data) -> Margins:
        """Logit margins, [K, N]."""
        margins = [evaluate(model, data, batch_size=500).margin for model in models]
        stacked = np.stack([margin for margin in margins if margin is not None])
        return np.nan_to_num(stacked, nan=0.0, posinf=_LARGEST, neginf=-_LARGEST)


def _leave_one_out(unlearned: Margins, others: Margins) -> float:
    of_unlearned = [ulira(row, np.delete(unlearned, k, axis=0), others) for k, row in enumerate(unlearned)]
    of_others = [ulira(row, unlearned, np.delete(others, k, axis=0)) for k, row in enumerate(others)]
    scores = np.concatenate([result.score for result in (*of_unlearned, *of_others)])
    labels = np.repeat([True, False], [unlearned.size, others.size])
    return float(roc(np.nan_to_num(scores), labels).auc)
