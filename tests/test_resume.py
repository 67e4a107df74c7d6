"""A run that is killed with SIGKILL at any moment and resumed ends in the very weights of an uninterrupted one."""

from __future__ import annotations

import os
import random
import time
import warnings
from pathlib import Path

import killing
import pytest
import torch
from conftest import blobs, mlp
from torch.utils.data import DataLoader, Dataset

from nabla_tau import unlearn
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint

KILLS = 8  # of each case: 24 in all


class Augmented(Dataset):
    """Draws from the global random state, as image transforms do."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, index):
        return self.data[0][index] + 0.1 * torch.randn(8), self.data[1][index]


def run(recipe: str, loaders: bool, checkpoint: Path, output: Path, pause: float, every: int) -> None:
    """What the processes do. `pause` makes a step last long enough to be cut in the middle."""

    def forward(model, batch):
        time.sleep(pause)
        return model(batch[0]), batch[1]

    torch.manual_seed(0)
    model = mlp()
    x, y = blobs(600)
    parts = {"forget": (x[:60], y[:60]), "retain": (x[60:400], y[60:400]), "held_out": (x[400:], y[400:])}
    if loaders:
        parts = {k: DataLoader(Augmented(v), batch_size=32, shuffle=True) for k, v in parts.items()}
    settings = {"checkpoint": checkpoint, "checkpoint_every": every, "resume": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untrained model has nothing to forget
        result = unlearn(model, **parts, recipe=recipe, forward=forward, **settings)
    partial = output.with_suffix(".part")
    torch.save([result.model.state_dict(), result.history["forget_loss"]], partial)
    partial.replace(output)


@pytest.mark.parametrize(
    ("recipe", "loaders", "every"), [("ascent", False, 2), ("ascent", True, 7), ("paper", True, 2)]
)
def test_kill_and_resume(tmp_path, recipe, loaders, every):
    """At any moment: while the data is looked at, within a step, while a checkpoint is written, after the last step."""
    whole, cut, checkpoint = (tmp_path / name for name in ("whole.pt", "cut.pt", "cut.ckpt"))
    killing.finish(killing.start(run, recipe, loaders, tmp_path / "whole.ckpt", whole, 0.0, every))
    wanted = torch.load(whole)
    moments, steps = random.Random(1), list[int]()
    for _ in range(20):  # a fast machine comes to the end before it is killed often enough
        arguments = recipe, loaders, checkpoint, cut, 0.01, every
        for _ in killing.kills(run, arguments, cut, moments=moments, within=1.0):
            there = checkpoint.exists()
            steps.append(load_checkpoint(checkpoint, torch.device("cpu"))["step"] if there else 0)
        weights, losses = torch.load(cut)
        assert all(torch.equal(value, weights[name]) for name, value in wanted[0].items())
        assert losses == wanted[1]
        cut.unlink()
        checkpoint.unlink()
        if len(steps) >= KILLS and len(set(steps)) > 3:
            break
    assert len(steps) >= KILLS
    assert len(set(steps)) > 3, "the run must have been cut at several steps for this test to say something"


def small_run(checkpoint: Path, model=None, **settings):
    torch.manual_seed(0)
    x, y = blobs(300)
    parts = {"forget": (x[:40], y[:40]), "retain": (x[40:200], y[40:200]), "held_out": (x[200:], y[200:])}
    return unlearn(model or mlp(), **parts, checkpoint=checkpoint, **settings)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    small_run(path)
    with pytest.raises(ValueError, match="exists: pass resume=True"):
        small_run(path)
    with pytest.raises(ValueError, match="of another run.*seed: 0 there, 5 here"):
        small_run(path, resume=True, seed=5)


def test_checkpoint_of_other_data_or_weights_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    small_run(path)
    torch.manual_seed(0)
    x, y = blobs(300, seed=1)
    other = {"forget": (x[:40], y[:40]), "retain": (x[40:200], y[40:200]), "held_out": (x[200:], y[200:])}
    with pytest.raises(ValueError, match="of another run.*forget: .* there"):
        unlearn(mlp(), **other, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="of another run .model: "):
        small_run(path, resume=True, model=mlp())


@pytest.mark.parametrize("damage", ["truncate", "flip", "foreign", "pickle"])
def test_damaged_checkpoint_is_refused_and_kept(tmp_path, damage):
    path = tmp_path / "a.ckpt"
    small_run(path)
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "foreign":
        content = bytearray(b"hello")
    else:
        torch.save({"model": 1}, path)
        content = bytearray(path.read_bytes())
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged|not a nabla_tau checkpoint"):
        small_run(path, resume=True)
    assert path.read_bytes() == content


def test_checkpoint_never_runs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {"evil": Evil()})
    with pytest.raises(ValueError, match="a.ckpt holds more than tensors"):
        load_checkpoint(path, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()
