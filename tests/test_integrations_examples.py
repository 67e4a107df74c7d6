"""The examples of the integrations as a newcomer runs them, and what the adapter to TensorBoard writes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nabla_tau

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(folder: Path, name: str, *options: str) -> str:
    command = [sys.executable, "-P", str(EXAMPLES / name), *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plain_loop_brings_the_forget_loss_towards_tau(tmp_path):
    rows = re.findall(r"forget loss (\S+), tau (\S+), retain (\S+)", run(tmp_path, "plain_loop.py"))
    forget, tau, retain = ([float(row[column]) for row in rows] for column in range(3))
    assert sum(forget[-3:]) / 3 > 0.5 * tau[-1] > forget[0]
    assert sum(retain[-3:]) / 3 < 0.5 * tau[-1]


@pytest.mark.slow
def test_an_adapter_is_unlearned_in_the_trainer_of_trl(tmp_path):
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    run(tmp_path, "sft_trainer.py")
    report = nabla_tau.AuditReport.load(tmp_path / "unlearned" / "audit.json")
    audited = report.models["unlearned"]
    assert audited.forget_loss > 0.8 * audited.unseen_loss


def test_lightning_unlearns(tmp_path):
    pytest.importorskip("lightning")
    said = re.search(r"(\S+) before, (\S+) after, (\S+) held out", run(tmp_path, "lightning_module.py"))
    before, after, tau = said.groups()
    assert float(before) < 0.5 * float(after)
    assert float(after) > 0.5 * float(tau)


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
