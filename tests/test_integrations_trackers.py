"""What the adapter to TensorBoard of docs/integrations.md writes."""

from __future__ import annotations

import pytest
import torch

import nabla_tau


def test_every_step_is_in_the_event_file_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    torch.manual_seed(0)
    sets = {name: (torch.randn(20, 3), torch.randint(2, (20,))) for name in ("forget", "retain", "held_out")}
    settings = {"recipe": "paper", "log": log}
    result = nabla_tau.unlearn(torch.nn.Linear(3, 2), **sets, **settings)
    writer.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "forget_loss", "retain_loss", "gate_open", "tau", "alpha"):
        found = events.Scalars(name)
        assert [event.step for event in found] == result.history["step"]
        assert [event.value for event in found] == pytest.approx(result.history[name])
