"""`unlearn`, `evaluate` and checkpoints over processes: as one process does it (gloo, on the CPU)."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import Pairs, blobs, mlp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from nabla_tau import NonFiniteLossError, Unlearner, unlearn
from nabla_tau.auditing import audit
from nabla_tau.evaluation import evaluate
from nabla_tau.recipes import ASCENT, PAPER

RECIPES = {
    "ascent": dataclasses.replace(ASCENT, name="short", batch_size=16, retain_passes=1.0, min_steps=1),
    "paper": dataclasses.replace(PAPER, name="short paper", batch_size=13, retain_passes=1.0),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return mlp(width=16).double().eval()


def make_parts() -> dict[str, Any]:
    x, y = blobs(330)
    x = x.double()
    return {"forget": (x[:41], y[:41]), "retain": (x[41:200], y[41:200]), "held_out": (x[200:], y[200:])}


def as_given(parts: dict[str, Any], given: str) -> dict[str, Any]:
    if given == "datasets":
        return {name: Pairs(part) for name, part in parts.items()}
    if given == "loaders":
        return {name: DataLoader(TensorDataset(*part), batch_size=13, shuffle=True) for name, part in parts.items()}
    return parts


def prepared(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    model = make_model()
    if kind == "ddp":
        return DistributedDataParallel(model), {}
    if kind == "fsdp":
        for layer in (model[0], model[2]):
            fully_shard(layer)
        return fully_shard(model), {"inplace": True}
    return model, {"process_group": dist.group.WORLD} if kind == "plain" else {}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    model = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: v.full_tensor() if hasattr(v, "full_tensor") else v for name, v in model.state_dict().items()}


def run(kind: str, given: str, recipe: str, **settings: Any) -> dict[str, Any]:
    model, more = prepared(kind)
    before = state_of(model)
    logged: list[int] = []
    settings = more | {"log": lambda values, step: logged.append(step)} | settings
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = unlearn(model, **as_given(make_parts(), given), recipe=RECIPES[recipe], **settings)
    return {
        "weights": state_of(result.model),
        "unchanged": all(torch.equal(before[n], v) for n, v in state_of(model).items()),
        "history": {name: v for name, v in result.history.items() if name != "samples_per_second"},
        "settings": result.settings,
        "counts": result.counts,
        "logged": len(logged),
        "warned": [str(w.message) for w in warned if issubclass(w.category, UserWarning)],
        "kind": result.settings["forget_kind"],
        "fingerprints": result.fingerprints,
    }


def same_run(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, value in wanted["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-10, atol=1e-10)
    for name, column in wanted["history"].items():
        np.testing.assert_allclose(found["history"][name], column, rtol=1e-9, atol=1e-10, err_msg=name)
    assert found["fingerprints"] == wanted["fingerprints"]
    for name in ("steps", "tau_before", "tau_after", "forget_loss_before", "forget_loss_after", "learning_rate"):
        assert found["settings"][name] == pytest.approx(wanted["settings"][name], rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "given", "recipe", "size"),
    [
        ("ddp", "tensors", "ascent", 3),
        ("ddp", "datasets", "paper", 2),
        ("ddp", "loaders", "ascent", 2),
        ("fsdp", "tensors", "ascent", 2),
        ("fsdp", "datasets", "paper", 3),
        ("plain", "tensors", "ascent", 2),
    ],
)
def test_a_run_is_that_of_one_process(processes, kind, given, recipe, size):
    wanted = run("alone", given, recipe)
    found = processes.run(run, size, kind, given, recipe)
    for rank, of_rank in enumerate(found):
        same_run(of_rank, wanted)
        assert of_rank["history"] == found[0]["history"], "every rank has the same tau and the same losses"
        assert of_rank["unchanged"] == (kind != "fsdp")
        assert (of_rank["logged"] > 0) == (rank == 0)
        assert of_rank["warned"] == (wanted["warned"] if rank == 0 else [])
    assert found[0]["settings"]["processes"] == size


class Interrupted(Exception):
    pass


def cut_run(kind: str, path: str, stop: int | None, resume: bool) -> dict[str, Any] | None:
    """A run that is cut off in step `stop`; micro-batches too, whose size may be another every time."""
    steps = 0

    def forward(model, batch):
        nonlocal steps
        if torch.is_grad_enabled():
            steps += 1
            if stop is not None and steps > 2 * stop:
                raise Interrupted
        return model(batch[0]), batch[1]

    try:
        return run(kind, "tensors", "ascent", forward=forward, checkpoint=path, checkpoint_every=2, resume=resume)
    except Interrupted:
        return None


@pytest.mark.parametrize("kinds", [("ddp", "alone", "ddp"), ("fsdp", "fsdp", "fsdp"), ("fsdp", "alone", "ddp")])
def test_a_run_goes_on_with_another_number_of_processes(processes, tmp_path, kinds):
    wanted = run("alone", "tensors", "ascent")
    path = str(tmp_path / "run.ckpt")
    assert processes.run(cut_run, 2, kinds[0], path, 3, False) == [None, None]
    if kinds[1] == "alone":
        assert cut_run("alone", path, 3, True) is None
    else:
        assert processes.run(cut_run, 1, kinds[1], path, 3, True) == [None]
    found = processes.run(cut_run, 3, kinds[2], path, None, True)
    for of_rank in found:
        same_run(of_rank, wanted)
    assert Path(path).is_dir() == (kinds[0] == "fsdp")
    if Path(path).is_dir():
        assert len(list(Path(path).glob("step-*"))) == 1, "what an older checkpoint left is removed"


def damaged(path: str) -> str:
    try:
        cut_run("fsdp", path, None, True)
    except ValueError as error:
        return str(error)
    return "nothing was said"


def test_a_damaged_folder_is_refused(processes, tmp_path):
    path = tmp_path / "run.ckpt"
    processes.run(cut_run, 2, "fsdp", str(path), 3, False)
    part = next(path.glob("step-*/*.distcp"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    for said in processes.run(damaged, 2, str(path)):
        assert "is damaged" in said
        assert part.name in said


def sharded_run(kind: str, loaders: bool) -> dict[str, Any]:
    """Ranks with samples of their own: rank 0 has more of them."""
    model, more = prepared(kind)
    parts = {}
    for name, (x, y) in make_parts().items():
        if loaders:
            data = TensorDataset(x, y)
            sampler = DistributedSampler(data, shuffle=False, drop_last=True)
            parts[name] = DataLoader(data, batch_size=8, sampler=sampler)
        else:
            cut = 2 * len(x) // 3
            mine = slice(0, cut) if dist.get_rank() == 0 else slice(cut, None)
            parts[name] = (x[mine], y[mine])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = unlearn(model, **parts, recipe=RECIPES["ascent"], data_is_sharded=True, **more)
    return {"weights": state_of(result.model), "history": result.history, "counts": result.counts} | result.settings


@pytest.mark.parametrize(("kind", "loaders"), [("ddp", False), ("fsdp", False), ("ddp", True)])
def test_ranks_with_samples_of_their_own(processes, kind, loaders):
    first, second = processes.run(sharded_run, 2, kind, loaders)
    counts = {"forget": 41, "retain": 159, "held_out": 130}
    if loaders:
        counts = {name: count - count % 2 for name, count in counts.items()}
    assert first["counts"] == second["counts"] == counts
    for name in ("tau", "forget_loss", "retain_loss"):
        assert first["history"][name] == second["history"][name]
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name])
    whole = run("alone", "tensors", "ascent")["settings"]
    if not loaders:
        assert first["tau_before"] == pytest.approx(whole["tau_before"], rel=1e-9), "the held-out losses of both ranks"
        assert first["forget_loss_before"] == pytest.approx(whole["forget_loss_before"], rel=1e-9)
        assert first["steps"] == -(-106 // 8), "as many as the rank with the most batches needs"


def signals(kind: str) -> list[Any]:
    model, more = prepared(kind)
    more.pop("inplace", None)
    found = []
    for given in ("tensors", "datasets", "loaders"):
        data = as_given(make_parts(), given)["held_out"]
        data = DataLoader(data.dataset, batch_size=7) if given == "loaders" else data
        found.append(evaluate(model, data, batch_size=7, **more))
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "plain"])
def test_signals_of_all_samples_in_the_order_of_one_process(processes, kind):
    wanted = evaluate(make_model(), make_parts()["held_out"])
    for of_rank in processes.run(signals, 3, kind):
        for found in of_rank:
            assert found.task == wanted.task
            np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-12)
            assert np.array_equal(found.target, wanted.target)
            np.testing.assert_allclose(found.margin, wanted.margin, rtol=1e-12)


def audited(kind: str) -> Any:
    model, parts = prepared(kind)[0], make_parts()
    return audit(model, forget=parts["forget"], unseen=parts["held_out"], bootstrap=100).models["unlearned"]


def test_audit_of_a_wrapped_model(processes):
    wanted = audited("alone")
    for found in processes.run(audited, 2, "ddp") + processes.run(audited, 2, "fsdp"):
        assert found.forget_loss == pytest.approx(wanted.forget_loss, rel=1e-9)
        assert found.auc_loss == wanted.auc_loss


def refusals() -> list[str]:
    """What is said to each of two ranks."""
    said: list[str] = []

    def caught(work) -> None:
        try:
            work()
        except ValueError as error:
            said.append(str(error))

    rank, parts = dist.get_rank(), make_parts()
    caught(lambda: Unlearner(make_model(), alpha=0.5))
    caught(lambda: unlearn(make_model(), **parts))
    x, y = parts["forget"]
    other = {"forget": (x[rank:], y[rank:])}
    caught(lambda: unlearn(make_model(), **(parts | other), process_group=dist.group.WORLD))
    different = make_model()
    with torch.no_grad():
        different[0].weight += rank
    caught(lambda: unlearn(different, **parts, process_group=dist.group.WORLD))
    caught(lambda: unlearn(prepared("fsdp")[0], **parts))
    some = DistributedDataParallel(make_model(), process_group=dist.new_group([0, 1]))
    caught(lambda: unlearn(some, **parts))
    half = make_model()
    fully_shard(half[0])
    caught(lambda: Unlearner(half, alpha=0.5))
    return said


def test_what_cannot_be_right_is_refused_on_every_rank(processes):
    texts = (
        "each would step on its own gate",
        "each would step on its own gate",
        "forget differs between the ranks",
        "model differs between the ranks",
        "cannot be copied: pass inplace=True",
        "cannot be copied: pass inplace=True",
        "parameter 2.weight is not sharded",
    )
    for said in processes.run(refusals, 2):
        assert len(said) == len(texts)
        for text, found in zip(texts, said, strict=True):
            assert text in found


def alone_in_a_group() -> float:
    """Each process for itself: rank 1 has other data."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(6, 8).double()
    unlearner = Unlearner(make_model(), alpha=0.5, tau=3.0, process_group=None)
    return unlearner.step((x, torch.arange(6) % 4), (x, torch.arange(6) % 4)).forget_loss.item()


def broken_run(kind: str) -> tuple[int, bool]:
    """A loss that becomes nan in the samples of rank 1 only."""
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += torch.is_grad_enabled()
        return model(batch[0]) * (float("nan") if calls > 6 and dist.get_rank() == 1 else 1.0), batch[1]

    model, more = prepared(kind)
    try:
        unlearn(model, **make_parts(), recipe=RECIPES["ascent"], forward=forward, performance="off", **more)
    except NonFiniteLossError as error:
        return error.step, all(bool(v.isfinite().all()) for v in state_of(error.result.model).values())
    return -1, False


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(processes):
    for kind in ("ddp", "fsdp"):
        assert processes.run(broken_run, 2, kind) == [(3, True), (3, True)]


def test_processes_that_are_alone(processes):
    first, second = processes.run(alone_in_a_group, 2)
    assert first != second
