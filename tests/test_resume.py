"""A run that is killed with SIGKILL at any moment and resumed ends in the very weights of an uninterrupted one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import blobs, mlp

from nabla_tau import unlearn
from nabla_tau.checkpoint import load_checkpoint, save_checkpoint

HERE = Path(__file__).parent

SCRIPT = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from conftest import blobs, mlp
from torch.utils.data import DataLoader, Dataset
import nabla_tau
from nabla_tau.recipes import RECIPES

class Augmented(Dataset):
    "Draws from the global random state, as image transforms do."
    def __init__(self, data): self.data = data
    def __len__(self): return len(self.data[0])
    def __getitem__(self, i): return self.data[0][i] + 0.1 * torch.randn(8), self.data[1][i]

def forward(model, batch):
    time.sleep({pause})
    return model(batch[0]), batch[1]

torch.manual_seed(0)
model = mlp()
x, y = blobs(600)
parts = dict(forget=(x[:60], y[:60]), retain=(x[60:400], y[60:400]), held_out=(x[400:], y[400:]))
if {loaders}:
    parts = {{k: DataLoader(Augmented(v), batch_size=32, shuffle=True) for k, v in parts.items()}}
result = nabla_tau.unlearn(model, **parts, recipe={recipe!r}, forward=forward, checkpoint={checkpoint!r},
                           checkpoint_every=2, resume=True)
torch.save([result.model.state_dict(), result.history["forget_loss"]], {output!r})
"""


def start(folder: Path, name: str, recipe: str, loaders: bool, pause: float) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(
        tests=str(HERE),
        pause=pause,
        loaders=loaders,
        recipe=recipe,
        checkpoint=str(folder / f"{name}.ckpt"),
        output=str(folder / f"{name}.pt"),
    )
    return subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("recipe", "loaders"), [("default", False), ("paper", True)])
def test_kill_and_resume(tmp_path, recipe, loaders):
    assert start(tmp_path, "whole", recipe, loaders, 0.0).wait() == 0
    moments = random.Random(1)
    kills = 0
    checkpoint = tmp_path / "cut.ckpt"
    while kills < 4:
        process = start(tmp_path, "cut", recipe, loaders, 0.02)
        known = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        # Wait for a checkpoint of this very process, then for any moment after it.
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > known):
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
        if (tmp_path / "cut.pt").exists():
            break
    assert kills >= 2, "the run must have been cut at least twice for this test to say something"
    assert start(tmp_path, "cut", recipe, loaders, 0.0).wait() == 0
    whole, cut = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "cut"))
    assert all(torch.equal(value, cut[0][name]) for name, value in whole[0].items())
    assert whole[1] == cut[1]


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
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load_checkpoint(path, torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {"step": 1})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path, torch.device("cpu")) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["a.ckpt"]
