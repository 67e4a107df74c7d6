"""A linear model that additions and deletions keep indistinguishable from one trained anew, with a certificate."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nabla_tau.arguments import check_kind, numbers_checked
from nabla_tau.certified import distributed
from nabla_tau.certified.calibration import THEOREMS, Plan, check_request
from nabla_tau.certified.certificate import Certificate, certify
from nabla_tau.certified.descent import descend
from nabla_tau.certified.noise import Entropy, normal
from nabla_tau.certified.problem import LinearProblem
from nabla_tau.certified.state import State, load, save


class CertifiedLinear:
    """Descent-to-Delete (Neel, Roth, Sharifi-Malvajerdi 2021, arXiv 2007.02923).

        learner = CertifiedLinear(LogisticRegression(feature_norm=1.0, l2=0.01), eps=1.0, delta=1e-5, iterations=100)
        ids = learner.fit(x, y)
        learner.delete(ids[:3])
        weights, certificate = learner.publish()

    theorem: 9 (secret state), 28 (no secret but the rows: goes on from what was published), 10 and 30 (losses without
    l2), 14 (distributed, with xi and beta; see `calibration`). iterations: I, steps of an update; more mean less noise.

    With `path` every training, update and publication is in that file before it counts, written atomically and readable
    by its owner alone: after a crash `load` goes on from the last one that was completed. Without it call `save`. The
    file holds the rows and the un-noised weights: IT IS SECRET, and so is this object. Its old content may linger on
    the disk, deleted rows included. One process at a time may use a file.

    The certificate is for each published model by itself; it says what several of one update give away together.
    Noise comes from the operating system and nothing of it is kept. entropy: for tests alone, another source of bytes.

    Raises ValueError for settings that the theorem does not cover, here or, where they hang on the data, from `fit`.
    """

    @numbers_checked
    def __init__(
        self,
        problem: LinearProblem,
        *,
        eps: float,
        delta: float,
        iterations: int,
        theorem: int = 9,
        xi: float = 1.0,
        beta: float = 1.0,
        path: Path | str | None = None,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        check_kind(problem, LinearProblem, "problem")
        request: dict[str, Any] = {"eps": eps, "delta": delta, "iterations": iterations}
        check_request(theorem, strong_convexity=problem.l2, xi=xi, beta=beta, **request)
        if theorem == 14:
            request |= {"xi": xi, "beta": beta}
        self.problem = problem
        self.path = None if path is None else Path(path)
        self._entropy = entropy
        self._theorem = theorem
        self._request = request
        self._rows = 0
        self._state: State | None = None

    @property
    def plan(self) -> Plan:
        """Steps and noise. Raises ValueError before `fit`."""
        return self._plan(self._rows, self._fitted().x.shape[1])

    @property
    def ids(self) -> Tensor:
        """int64 ids of the rows that are there. Raises ValueError before `fit`."""
        return self._fitted().ids.clone()

    def fit(self, x: Tensor, y: Tensor) -> Tensor:
        """Train on x [N, features] (|x| <= feature_norm) and y; returns the rows' ids, 0 ... N - 1.

        Raises ValueError or TypeError for data that the constants do not hold for, ValueError where there is a state
        already, in this object or in the file; OSError where it cannot be written.
        """
        if self._state is not None:
            raise ValueError("this model is fitted already: make another one")
        if self.path is not None and self.path.exists():
            raise ValueError(f"{self.path} exists already: load it, or choose another path")
        x, y = self.problem.check(x, y)
        plan = self._plan(len(x), x.shape[1])
        ids = torch.arange(len(x), device=x.device)
        state = State(x=x, y=y, ids=ids, next_id=len(x), weights=x.new_zeros(x.shape[1], self.problem.columns))
        if plan.theorem == 14:
            state = distributed.train(self.problem, plan, state, self._entropy)
        else:
            state = self._descended(plan, state, plan.training_steps)
        self._commit(state, rows=len(x))
        return ids.clone()

    def delete(self, ids: Tensor | Iterable[int], *, together: bool = False) -> None:
        """Delete rows, one update each, or all of them `together` in one update of ln k/ln(1/gamma) steps more.

        All of them or, where an error is raised, none: ValueError for ids that are not there or are named twice, and
        where fewer than half of the first N rows would be left; OSError where the state cannot be written.
        """
        state, plan = self._fitted(), self.plan
        try:
            removed = torch.as_tensor(ids if isinstance(ids, Tensor) else list(ids), device=state.ids.device)
        except RuntimeError as error:
            raise TypeError(f"ids must be integers: {error}") from error
        if removed.numel() == 0:
            return
        if removed.dim() != 1 or removed.dtype != torch.int64:
            raise ValueError(f"ids must be [k] integers, got {list(removed.shape)} of {removed.dtype}")
        if len(torch.unique(removed)) < len(removed):
            raise ValueError("ids are named twice")
        absent = removed[~torch.isin(removed, state.ids)]
        if len(absent) > 0:
            raise ValueError(f"no such rows (any more): {absent[:10].tolist()}")
        left = len(state.ids) - len(removed)
        if 2 * left < self._rows:
            raise ValueError(
                f"{left} rows would be left of the {self._rows} that were trained on; the guarantee needs half: "
                "fit a new model"
            )
        for group in [removed] if together else torch.split(removed, 1):
            stays = ~torch.isin(state.ids, group)
            state = replace(state, x=state.x[stays], y=state.y[stays], ids=state.ids[stays])
            replaced = None
            if state.slots is not None:
                slots, replaced = distributed.without(state.slots, group, state.ids, self._entropy)
                state = replace(state, slots=slots)
            state = self._updated(plan, state, len(group), replaced)
        self._commit(state)

    def add(self, x: Tensor, y: Tensor, *, together: bool = False) -> Tensor:
        """Add rows, one update each or `together`; returns their ids. Raises as `fit` and `delete` do."""
        state, plan = self._fitted(), self.plan
        if isinstance(x, Tensor) and x.dim() == 2 and x.shape[1] != state.x.shape[1]:
            raise ValueError(f"x must be [rows, {state.x.shape[1]}], got {list(x.shape)}")
        x, y = self.problem.check(x, y)
        x, y = x.to(state.x.device), y.to(state.y.device)
        ids = torch.arange(state.next_id, state.next_id + len(x), device=state.ids.device)
        for group in [ids] if together else torch.split(ids, 1):
            new = group - ids[0]
            state = replace(
                state,
                x=torch.cat((state.x, x[new])),
                y=torch.cat((state.y, y[new])),
                ids=torch.cat((state.ids, group)),
                next_id=state.next_id + len(group),
            )
            replaced = None
            if state.slots is not None:
                slots, replaced = distributed.with_added(state.slots, group, len(state.ids), self._entropy)
                state = replace(state, slots=slots)
            state = self._updated(plan, state, len(group), replaced)
        self._commit(state)
        return ids

    def publish(self) -> tuple[Tensor, Certificate]:
        """Weights [features, columns] in float64 with fresh noise (theorem 28: those of the last update, always the
        same), and what is certified of them. Counted in the file first. Raises ValueError before `fit`, OSError."""
        state, plan = self._fitted(), self.plan
        if plan.theorem == 28:
            state = replace(state, publications=1)
            weights = state.weights.clone()
        else:
            state = replace(state, publications=state.publications + 1)
            if plan.theorem == 14:
                noise = self._noise(plan, plan.copies, *state.weights.shape[2:]).to(state.weights.device)
                weights = distributed.publish(self.problem, plan, state, noise)
            else:
                weights = state.weights + self._noise(plan, *state.weights.shape).to(state.weights.device)
        self._commit(state)
        certificate = certify(
            plan, rows_left=len(state.ids), update_steps=state.update_steps, publications=state.publications
        )
        return weights, certificate

    def save(self, path: Path | str) -> None:
        """Write the secret state. Raises OSError, and what was there stays as it was."""
        self._write(Path(path), self._fitted(), self._rows)

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        device: torch.device | str = "cpu",
        entropy: Entropy = secrets.token_bytes,
    ) -> CertifiedLinear:
        """Go on from a file, and go on writing to it. Raises OSError, and ValueError where it is damaged or is none."""
        problem, settings, rows, state = load(Path(path), torch.device(device))
        learner = cls(problem, **settings, path=path, entropy=entropy)
        learner._rows, learner._state = rows, state
        return learner

    def _fitted(self) -> State:
        if self._state is None:
            raise ValueError("there is no model yet: call fit, or load one")
        return self._state

    def _plan(self, rows: int, features: int) -> Plan:
        return THEOREMS[self._theorem](self.problem.constants(rows, features), **self._request)

    def _updated(self, plan: Plan, state: State, rows: int, replaced: Tensor | None) -> State:
        steps = plan.update_steps(len(state.update_steps) + 1, rows)
        if replaced is None:
            state = self._descended(plan, state, steps)
        else:
            state, steps = distributed.update(self.problem, plan, state, replaced, steps)
        return replace(state, update_steps=(*state.update_steps, steps), publications=0)

    def _descended(self, plan: Plan, state: State, steps: int) -> State:
        weights = descend(self.problem, plan, state.weights, state.x, state.y, steps)
        if plan.theorem == 28:
            weights = weights + self._noise(plan, *weights.shape).to(weights.device)
        return replace(state, weights=weights)

    def _noise(self, plan: Plan, *shape: int) -> Tensor:
        return plan.sigma * normal(self._entropy, *shape)

    def _commit(self, state: State, rows: int | None = None) -> None:
        """On disk first, then here: where writing fails nothing has happened."""
        rows = self._rows if rows is None else rows
        if self.path is not None:
            self._write(self.path, state, rows)
        self._state, self._rows = state, rows

    def _write(self, path: Path, state: State, rows: int) -> None:
        save(path, self.problem, {"theorem": self._theorem, **self._request}, rows, state)
