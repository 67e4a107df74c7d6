"""Shadow models: balanced membership; a killed run goes on and ends as one that was not; nothing damaged is used."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from conftest import blobs, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data import Subset as DataSubset

from nabla_tau.evaluation import evaluate
from nabla_tau.membership.ensemble import train_ensemble
from nabla_tau.membership.shadow import train_shadow_ensemble, train_shadow_models
from nabla_tau.membership.shadow_samples import balanced_membership
from nabla_tau.membership.shadow_store import ShadowScores, unpack
from nabla_tau.sources import derive_seed

MODELS = 5
CALLS = Path("calls.txt")


def sets():
    x, y = blobs(90)
    return {"forget": (x[:30], y[:30]), "unseen": (x[30:], y[30:])}


def train(indices, seed):
    """Draws from each random state, so that what is not seeded shows."""
    with CALLS.open("a") as calls:
        calls.write(f"{seed}\n")
    x, y = blobs(90)
    model = mlp()
    x = x[indices] + 0.1 * torch.randn(len(indices), 8) + 0.1 * float(np.random.rand())  # noqa: NPY002
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y[indices]).backward()
        optimizer.step()
    return model


def blunt(model, indices, seed):
    """Stands for unlearning: the last layer is halved."""
    with torch.no_grad():
        model[-1].weight *= 0.5
    return model


def run(folder, **options):
    given = {"sets": sets(), "models": MODELS, "train": train, "seed": 3}
    return train_shadow_models(folder, **given | options)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix == ".npy"}


def calls():
    return CALLS.read_text().split() if CALLS.exists() else []


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 40), st.integers(1, 70), st.floats(0.02, 0.98), st.integers(0, 9))
def test_every_sample_is_in_its_share_of_the_models(models, samples, probability, seed):
    packed = balanced_membership(models, samples, probability=probability, seed=seed)
    assert (packed.dtype, packed.shape) == (np.uint8, (models, -(-samples // 8)))
    member = unpack(packed, samples)
    assert np.array_equal(np.packbits(member, axis=1), packed), "numpy's packing, the last byte filled with zeros"
    assert (np.abs(member.sum(0) - probability * models) < 1).all()
    assert np.array_equal(packed, balanced_membership(models, samples, probability=probability, seed=seed))


def test_membership_is_random_within_its_balance():
    member = unpack(balanced_membership(16, 9000, seed=1), 9000)  # more than one block of samples
    assert (member.sum(0) == 8).all()
    assert np.abs(member.mean(1) - 0.5).max() < 5 * 0.5 / np.sqrt(9000)
    together = np.array([(member[0] == member[k]).mean() for k in range(1, 16)])
    assert np.abs(together - 7 / 15).max() < 5 * 0.5 / np.sqrt(9000)  # 7 of the other 15 share its side
    assert not np.array_equal(member, unpack(balanced_membership(16, 9000, seed=2), 9000))
    odd = unpack(balanced_membership(15, 9000, seed=1), 9000).sum(0)
    assert set(odd) == {7, 8}
    assert abs((odd == 8).mean() - 0.5) < 5 * 0.5 / np.sqrt(9000)


def test_scores_are_the_margins_of_the_models_trained_on_these_samples(tmp_path):
    before = torch.get_rng_state()
    found = run(tmp_path / "s", unlearn=blunt)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(found.scores, np.memmap)
    assert found.scores.shape == found.membership.shape == (MODELS, 90)
    x, y = blobs(90)
    for k in range(MODELS):
        indices = np.flatnonzero(found.membership[k])
        torch.manual_seed(derive_seed(3, k))
        np.random.seed(derive_seed(3, k))  # noqa: NPY002
        model = train(indices, 0)
        wanted = evaluate(model, (x, y)).margin
        np.testing.assert_allclose(found.scores[k], wanted, rtol=1e-5)
        np.testing.assert_allclose(found.unlearned[k], evaluate(blunt(model, indices, 0), (x, y)).margin, rtol=1e-5)
    inside, outside = (found.scores[found.membership == side].mean() for side in (True, False))
    assert inside > outside + 0.3, "members must be easier: otherwise the columns are not those of the membership"


def test_the_columns_of_a_set_and_what_the_index_says(tmp_path):
    found = run(tmp_path / "s", settings={"epochs": 30})
    assert (found.columns("forget"), found.columns("unseen")) == (slice(0, 30), slice(30, 90))
    with pytest.raises(ValueError, match="scored the sets forget, unseen, not 'retain'"):
        found.columns("retain")
    index = json.loads((tmp_path / "s" / "index.json").read_text())
    assert index["schema"] == "nabla_tau.shadow/1"
    assert index["plan"]["settings"] == {"epochs": 30}
    assert (found.signal, found.unlearned) == ("margin", None)
    assert found.seconds > 0
    assert not list((tmp_path / "s").glob("*.part"))


def test_one_process_and_two_write_the_same(tmp_path):
    run(tmp_path / "one", unlearn=blunt, n_jobs=1)
    run(tmp_path / "two", unlearn=blunt, n_jobs=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 3


def dask_workers():
    distributed = pytest.importorskip("distributed")
    return distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None)


@contextlib.contextmanager
def ray_workers():
    ray = pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    register_ray()
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    try:
        yield
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "workers"), [("dask", dask_workers), ("ray", ray_workers)])
def test_other_schedulers_write_the_same(backend, workers):
    with workers(), joblib.parallel_config(backend=backend):
        run("there", unlearn=blunt)
    run("here", unlearn=blunt)
    assert contents("there") == contents("here")


def test_half_precision_is_the_single_one_rounded(tmp_path):
    full, half = run(tmp_path / "full"), run(tmp_path / "half", dtype="float16")
    assert half.scores.dtype == np.float16
    np.testing.assert_array_equal(half.scores, full.scores.astype(np.float16))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
import test_shadow
from test_shadow import *

def deadly(indices, seed):
    if len(calls()) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(indices, seed)

test_shadow.run("killed", train=deadly)
"""


def test_a_killed_run_goes_on_and_ends_as_an_uninterrupted_one():
    script = [sys.executable, "-c", KILLED, str(Path(__file__).parent)]
    assert subprocess.run(script, capture_output=True).returncode == -signal.SIGKILL
    assert len(calls()) == 3
    assert len(list(Path("killed").glob("*.part"))) == 3
    with pytest.raises(ValueError, match="holds 3 of 5 shadow models"):
        ShadowScores.load("killed")
    Path("killed/model-00003.part.tmp").write_bytes(b"half a file")
    run("killed")
    assert len(calls()) == MODELS, "only what was missing was trained"
    assert len(set(calls())) == MODELS
    assert not list(Path("killed").glob("*.tmp"))
    run("whole")
    assert contents("killed") == contents("whole")
    run("whole")
    assert len(calls()) == 2 * MODELS, "a finished run is only loaded"


def test_an_interrupted_run_keeps_what_is_finished():
    def impatient(indices, seed):
        if len(calls()) == 2:
            raise KeyboardInterrupt
        return train(indices, seed)

    with pytest.raises(KeyboardInterrupt):
        run("s", train=impatient)
    assert len(list(Path("s").glob("*.part"))) == 2
    assert np.isfinite(run("s").scores).all()
    assert len(calls()) == MODELS


def test_a_join_that_was_cut_off_is_done_again(monkeypatch):
    whole = contents_after(lambda: run("whole"), "whole")
    replace = os.replace

    def fail(source, target):
        if str(target).endswith("scores.npy"):
            raise OSError("disk full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            run("s")
    trained = len(calls())
    assert contents_after(lambda: run("s"), "s") == whole
    assert len(calls()) == trained


def contents_after(action, folder):
    action()
    return contents(folder)


def unfinished(folder):
    """A run of which two models are done."""

    def stop(indices, seed):
        if len(calls()) == 2:
            raise RuntimeError("stop")
        return train(indices, seed)

    with pytest.raises(RuntimeError, match="stop"):
        run(folder, train=stop)
    return Path(folder)


def test_damaged_and_foreign_parts_are_refused_by_name():
    folder = unfinished("s")
    first, second = (folder / f"model-0000{k}.part" for k in (0, 1))
    good = first.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    for bad, text in (
        (good[: len(good) // 2], "model-00000.part is damaged.*remove it"),
        (bytes(flipped), "model-00000.part is damaged"),
        (b"", "model-00000.part is not a nabla_tau checkpoint"),
        (second.read_bytes(), "model-00000.part comes from another run or model"),
    ):
        first.write_bytes(bad)
        with pytest.raises(ValueError, match=text):
            run("s")
    other = unfinished_elsewhere()
    first.write_bytes((other / first.name).read_bytes())
    with pytest.raises(ValueError, match="comes from another run"):
        run("s")
    first.unlink()
    assert np.isfinite(run("s").scores).all()


def unfinished_elsewhere():
    CALLS.unlink()

    def stop(indices, seed):
        if len(calls()) == 1:
            raise RuntimeError("stop")
        return train(indices, seed)

    with pytest.raises(RuntimeError, match="stop"):
        run("other", train=stop, seed=4)
    return Path("other")


@pytest.mark.parametrize("name", ["scores.npy", "membership.npy", "index.json"])
@pytest.mark.parametrize("how", ["cut", "absent"])
def test_a_finished_run_that_was_damaged_is_not_loaded(name, how):
    run("s")
    path = Path("s") / name
    content = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises((ValueError, FileNotFoundError), match=name):
        ShadowScores.load("s")


def test_a_changed_byte_of_the_scores_is_seen():
    run("s")
    content = bytearray(Path("s/scores.npy").read_bytes())
    content[-3] ^= 1
    Path("s/scores.npy").write_bytes(content)
    with pytest.raises(ValueError, match="scores.npy is absent or damaged"):
        ShadowScores.load("s")


def other_sets():
    changed = sets()
    changed["forget"][0][0, 0] += 1
    return changed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": 4}, "seed: 3 there, 4 here"),
        ({"models": 6}, "models: 5 there, 6 here"),
        ({"settings": {"epochs": 3}}, "settings"),
        ({"dtype": "float16"}, "dtype: float32 there, float16 here"),
        ({"unlearn": blunt}, "unlearns"),
        ({"sets": other_sets()}, "fingerprints"),
    ],
)
def test_another_run_does_not_go_on_in_the_folder(options, text):
    run("s")
    before = contents("s")
    with pytest.raises(ValueError, match=f"another run of shadow models .*{text}"):
        run("s", **options)
    assert contents("s") == before


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"models": 1}, ValueError, "at least 2 models"),
        ({"probability": 1.0}, ValueError, "probability"),
        ({"dtype": "float64"}, ValueError, "float16, float32, got float64"),
        ({"sets": {}}, ValueError, "sets is empty"),
        ({"sets": {"forget": DataLoader(TensorDataset(*blobs(9)))}}, TypeError, "not a DataLoader"),
        ({"train": lambda indices, seed: None}, TypeError, "what train gives must be a torch.nn.Module, got NoneType"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        run("s", **options)


def test_a_folder_with_other_files_is_left_alone():
    Path("s").mkdir()
    Path("s/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no shadow models"):
        run("s")
    assert [path.name for path in Path("s").iterdir()] == ["thesis.txt"]


def test_a_loss_of_ones_own_is_scored_by_its_negative():
    x, y = blobs(90)
    found = run("s", loss=lambda logits, targets: (logits**2).mean(1), sets={"all": TensorDataset(x, y)})
    assert found.signal == "loss"
    assert (found.scores < 0).all()


def ensemble_run(folder, **options):
    given = {"sets": sets(), "models": MODELS, "make_model": mlp, "epochs": 5, "train_batch_size": 16, "seed": 3}
    return train_shadow_ensemble(folder, **given | options)


def test_an_ensemble_stores_the_scores_of_its_models():
    data, fixed = blobs(90), blobs(20, seed=1)
    found = ensemble_run("s", always=fixed, unlearn=blunt)
    everyone = np.concatenate((found.membership, np.ones((MODELS, 20), bool)), axis=1)
    seeds = [derive_seed(3, k) for k in range(MODELS)]
    whole = tuple(torch.cat(pair) for pair in zip(data, fixed, strict=True))
    ensemble = train_ensemble(mlp, whole, everyone, epochs=5, batch_size=16, seed=3, model_seeds=seeds)
    for k in range(MODELS):
        model = ensemble.model(k)
        np.testing.assert_allclose(found.scores[k], evaluate(model, data).margin, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found.unlearned[k], evaluate(blunt(model, 0, 0), data).margin, rtol=1e-4, atol=1e-4)


def test_an_ensemble_goes_on_where_it_was_cut_off(monkeypatch):
    ensemble_run("whole", at_once=2)
    groups = []

    def stop(*arguments, **options):
        groups.append(options["model_seeds"])
        if len(groups) == 3:
            raise KeyboardInterrupt
        return train_ensemble(*arguments, **options)

    monkeypatch.setattr("nabla_tau.membership.shadow.train_ensemble", stop)
    with pytest.raises(KeyboardInterrupt):
        ensemble_run("s", at_once=2)
    ensemble_run("s", at_once=2)
    assert [len(group) for group in groups] == [2, 2, 1, 1]
    assert contents("s") == contents("whole")


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sets": {"all": DataSubset(TensorDataset(*blobs(9)), range(9))}}, TypeError, "all: an ensemble is trained"),
        (
            {"always": {"x": torch.zeros(3, 8), "labels": torch.zeros(3, dtype=torch.long)}},
            ValueError,
            "always has not",
        ),
    ],
)
def test_an_ensemble_refuses_what_is_not_tensors_of_one_kind(options, error, text):
    with pytest.raises(error, match=text):
        ensemble_run("s", **options)
