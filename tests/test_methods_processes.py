"""Methods over processes of every kind: as one process does it, and a sharded run that was cut off goes on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed_runs import make_parts, prepared, state_of

from nabla_tau import unlearn
from nabla_tau.methods.finetune import Finetune
from nabla_tau.methods.l1_sparse import L1Sparse
from nabla_tau.methods.neg_grad import NegGradPlus
from nabla_tau.methods.ng_diff import NGDiff
from nabla_tau.methods.random_label import RandomLabel
from nabla_tau.methods.stages import StagedSteps

# The last batch of 159 retained samples has 3: of three processes each has one. Of 1 two have none, the first of them.
METHODS = [
    Finetune(epochs=2, batch_size=79),
    Finetune(epochs=2, batch_size=13),
    NegGradPlus(epochs=1, batch_size=13),
    RandomLabel(epochs=1, batch_size=26),
    NGDiff(epochs=1, batch_size=13),
    L1Sparse(epochs=2, batch_size=13),
]


def run(kind: str, method: Any, **settings: Any) -> dict[str, torch.Tensor]:
    model, own = prepared(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = unlearn(model, **make_parts(), method=method, **own, **settings)
    losses = {name: torch.tensor(result.history[name]) for name in ("loss", "forget_term", "retain_term")}
    return state_of(result.model) | losses


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "plain"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_processes_are_one(processes, kind, method):
    wanted = run("alone", method)
    for found in processes.run(run, 3, kind, method):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, equal_nan=True, msg=name)


def cut_off(method: Any, path: Path, at: int) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        whole = StagedSteps.step

        def step(self: StagedSteps, number: int) -> Any:
            if number == at:
                raise KeyboardInterrupt
            return whole(self, number)

        patch.setattr(StagedSteps, "step", step)
        with pytest.raises(KeyboardInterrupt):
            run("fsdp", method, checkpoint=path, checkpoint_every=1)
    return run("fsdp", method, checkpoint=path, resume=True)


def test_a_sharded_run_goes_on(processes, tmp_path):
    method = METHODS[0]
    wanted = run("alone", method)
    for found in processes.run(cut_off, 2, method, tmp_path / "run", 5):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, equal_nan=True, msg=name)
