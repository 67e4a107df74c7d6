"""Files from people one does not know: whatever is in them, no code from them runs."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import refused
from conftest import blobs, mlp
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save

from nabla_tau import unlearn
from nabla_tau.checkpoint import MAGIC, load_checkpoint, save_checkpoint
from nabla_tau.distributed import Ranks
from nabla_tau.evaluation import device_of
from nabla_tau.membership import ShadowScores, train_shadow_models
from nabla_tau.run_files import _parts, load_parts, load_run
from nabla_tau.weights import load_weights


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch ran",)


def pickled() -> bytes:
    return pickle.dumps(Payload())


def saved(content: object, *, zipped: bool = True) -> bytes:
    found = io.BytesIO()
    torch.save(content, found, _use_new_zipfile_serialization=zipped)
    return found.getvalue()


@pytest.fixture(autouse=True)
def _no_code_runs():
    """In a folder of its own (conftest): nothing but the test's files is there afterwards."""
    assert Payload().__reduce__()[1] == ("touch ran",)
    yield
    assert not Path("ran").exists(), "code from a file was run"


def test_the_payload_would_work():
    pickle.loads(pickled())
    assert Path("ran").exists()
    Path("ran").unlink()


@pytest.mark.parametrize(
    "content",
    [
        pickled(),
        saved(Payload()),
        saved({"weight": Payload()}),
        saved({"weight": Payload()}, zipped=False),
        saved({"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "more": [Payload()]}),
    ],
)
def test_weights(content):
    Path("w.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not loaded, since that would run code"):
        load_weights(nn.Linear(2, 3), Path("w.pt"))
    Path("w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_weights(nn.Linear(2, 3), Path("w.safetensors"))


@pytest.mark.parametrize("payload", [pickled(), saved({"model": Payload()}), saved(Payload())])
def test_checkpoints_whose_sum_is_right(payload):
    """A SHA-256 tells of damage, not of intent: who makes the file makes the sum, too."""
    Path("c").write_bytes(MAGIC + hashlib.sha256(payload).digest() + payload)
    with pytest.raises(ValueError, match="that would run code"):
        load_checkpoint(Path("c"), torch.device("cpu"))
    parts = {name: blobs(40, seed=seed) for seed, name in enumerate(("forget", "retain", "held_out"))}
    model = mlp()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="that would run code"):
        unlearn(model, **parts, checkpoint="c", resume=True, inplace=True)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def sharded(folder: Path, **group: object) -> nn.Module:
    """A checkpoint of a model, as `save_run` writes it of a sharded one; `group` goes into the optimizer's settings."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    parts = _parts(model, optimizer)
    parts["optimizer"]["param_groups"][0] |= group
    save(parts, checkpoint_id=folder / "step-00000001", no_dist=True)
    return model


def sealed(folder: Path) -> dict:
    """The state of `run`, with sums that are those of the files as they are now."""
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "step-00000001").iterdir()}
    save_checkpoint(folder / "run", {"step": 1, "parts": {"folder": "step-00000001", "sha256": files}})
    return load_run(folder, torch.device("cpu"), Ranks())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_the_folder_of_a_sharded_model():
    folder = Path("folder")
    model = sharded(folder)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    other = nn.Linear(3, 2)
    load_parts(folder, sealed(folder), other, torch.optim.AdamW(other.parameters()), Ranks())
    assert all(torch.equal(value, wanted[name]) for name, value in other.state_dict().items())

    index = folder / "step-00000001" / ".metadata"
    for payload in (pickled(), index.read_bytes()[:-1] + pickled()[2:]):
        index.write_bytes(payload)
        with pytest.raises(ValueError, match="index of .* is not read: UnpicklingError it names posix.system"):
            load_parts(folder, sealed(folder), other, torch.optim.AdamW(other.parameters()), Ranks())
    assert device_of(other).type == "cpu"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_numbers_beside_the_tensors_of_a_sharded_model():
    """What is no tensor is stored by torch.save, and PyTorch itself would read it with weights_only=False."""
    folder = Path("folder")
    model = sharded(folder, eps=Payload())
    with pytest.raises(ValueError, match="checkpoint folder is not read"):
        load_parts(folder, sealed(folder), model, torch.optim.AdamW(model.parameters()), Ranks())


def objects() -> bytes:
    found = io.BytesIO()
    np.save(found, np.array([Payload()] * 4, dtype=object), allow_pickle=True)
    return found.getvalue()


@pytest.mark.parametrize("name", ["scores.npy", "membership.npy"])
def test_arrays_of_shadow_models(name):
    sets = {"forget": blobs(8), "unseen": blobs(8, seed=1)}
    train_shadow_models("shadows", sets=sets, models=2, train=lambda indices, seed: mlp())
    path, index = Path("shadows") / name, Path("shadows") / "index.json"
    content = path.read_bytes()
    wrong = {"objects": objects(), "zip": saved(Payload()), "pickle": pickled(), "short": content[:-3], "empty": b""}
    found = io.BytesIO()
    np.save(found, np.zeros((3, 3), np.float64))
    wrong["another shape"] = found.getvalue()
    for damage in wrong.values():
        path.write_bytes(damage)
        plan = json.loads(index.read_text())
        plan["sha256"]["scores.npy"] = hashlib.sha256((Path("shadows") / "scores.npy").read_bytes()).hexdigest()
        index.write_text(json.dumps(plan))
        with pytest.raises(ValueError, match=name):
            ShadowScores.load("shadows")


@pytest.mark.parametrize(
    "change",
    [
        {"models": "x"},
        {"models": 0},
        {"sets": [1]},
        {"sets": {"forget": -1}},
        {"fingerprints": None},
        {"settings": 3},
        {"dtype": "object"},
        {"more": 1},
    ],
)
def test_the_plan_of_shadow_models(change):
    train_shadow_models("shadows", sets={"forget": blobs(8)}, models=2, train=lambda indices, seed: mlp())
    index = Path("shadows/index.json")
    content = json.loads(index.read_text())
    for changed in (content | {"plan": content["plan"] | change}, content | {"signal": 3}, content | {"sha256": []}):
        index.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="damaged index of shadow models"):
            ShadowScores.load("shadows")


def test_a_configuration_makes_no_objects():
    Path("c.yaml").write_text("task: !!python/object/apply:os.system ['touch ran']\n")
    assert "c.yaml" in refused("unlearn", "--config=c.yaml")
