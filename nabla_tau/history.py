"""What happened in each step, gathered on the device and brought to the host now and then; and what it warns of."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from nabla_tau.recipes import Recipe
from nabla_tau.unlearner import StepMetrics

Log: TypeAlias = Callable[[dict[str, float], int], None]

MEASURED = StepMetrics._fields
COLUMNS = ("step", *MEASURED, "tau", "alpha", "learning_rate", "samples_per_second")


class History:
    """One value a step in each of `COLUMNS`. `record` keeps 0-d tensors as they are; `flush` reads them in one go."""

    def __init__(self, log: Log | None = None) -> None:
        self.columns: dict[str, list[float]] = {name: [] for name in COLUMNS}
        self._log = log
        self._pending: list[tuple[int, torch.Tensor, float, float]] = []
        self._samples = 0
        self._since = time.perf_counter()

    def __len__(self) -> int:
        return len(self.columns["step"])

    def record(
        self, step: int, metrics: StepMetrics, tau: torch.Tensor, *, alpha: float, learning_rate: float, samples: int
    ) -> None:
        self._pending.append((step, torch.stack((*(m.to(tau) for m in metrics), tau)), alpha, learning_rate))
        self._samples += samples

    def flush(self) -> int | None:
        """Bring what was recorded to the host; the first step whose loss was not finite, or None."""
        if not self._pending:
            return None
        values = torch.stack([row[1] for row in self._pending]).cpu().tolist()
        rate = self._samples / max(time.perf_counter() - self._since, 1e-9)
        broken: int | None = None
        for (step, _, alpha, learning_rate), measured in zip(self._pending, values, strict=True):
            row = (step, *measured, alpha, learning_rate, rate)
            for name, value in zip(COLUMNS, row, strict=True):
                self.columns[name].append(value)
            if self._log is not None:
                self._log(dict(zip(COLUMNS[1:], row[1:], strict=True)), step)
            if broken is None and not all(map(math.isfinite, measured)):
                broken = step
        self._pending.clear()
        self.restart_clock()
        return broken

    def restart_clock(self) -> None:
        """Leave what came before (a measurement of tau, a checkpoint) out of the next samples per second."""
        self._samples, self._since = 0, time.perf_counter()

    def drop_after(self, step: int) -> None:
        """Forget the steps from `step` on."""
        keep = sum(1 for done in self.columns["step"] if done < step)
        for values in self.columns.values():
            del values[keep:]

    def last(self, name: str) -> float:
        values = self.columns[name]
        return values[-1] if values else math.nan

    def state_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in self.columns.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        for name in COLUMNS:
            self.columns[name] = list(state[name])


def diagnose(history: History, measured: Mapping[str, float], recipe: Recipe) -> list[str]:
    """Warnings with their likely cause. measured: mean held-out loss (tau) and mean forget loss, before and after."""
    columns = history.columns
    opened, found = columns["gate_open"], list[str]()
    if not opened or max(columns["alpha"]) == 0:
        return found
    tau, forget = measured["tau_before"], measured["forget_loss_before"]
    never_opened = recipe.gate != "two_sided" and max(opened) == 0
    if forget >= 0.9 * tau or (never_opened and recipe.shrink == 1):
        what = "the gate never opened" if never_opened else "there was hardly anything to forget"
        found.append(
            f"{what}: before unlearning the mean forget loss was {forget:.3g} and that of held-out data {tau:.3g}. "
            "Likely causes: the held-out data was part of training, the forget data is augmented while the held-out "
            "data is not, or the model had never memorised the forget set"
        )
    tau, forget = measured["tau_after"], measured["forget_loss_after"]
    tail = opened[-max(1, len(opened) // 4) :]
    if not never_opened and sum(tail) / len(tail) > 0.5 and forget < 0.7 * tau:
        found.append(
            f"the gate never closed: after unlearning the mean forget loss is {forget:.3g}, still well below that of "
            f"held-out data, {tau:.3g}. Likely causes: too few steps, a learning rate or alpha too small for this "
            "model, or held-out data that is harder than the forget data"
        )
    return found
