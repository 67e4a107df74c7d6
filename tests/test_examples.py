"""The examples as a newcomer runs them, but on few rows. Those whose data is absent are skipped."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nabla_tau import AuditReport
from nabla_tau.cli import main

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
GOEMOTIONS = Path(os.environ.get("NABLA_TAU_DATA", "")) / "goemotions"

needs_goemotions = pytest.mark.skipif(
    not any((GOEMOTIONS / name).is_file() for name in ("train.tsv", "train.tsv.xz")),
    reason="no goemotions/train.tsv or train.tsv.xz in the folder that NABLA_TAU_DATA names",
)
has_plotnine = importlib.util.find_spec("plotnine") is not None
needs_plotnine = pytest.mark.skipif(not has_plotnine, reason="plotnine, which carries the table, is not installed")


def run(folder: Path, name: str, *options: str, data: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run an example in `folder`; `data` is what NABLA_TAU_DATA says, where it is not left as it is."""
    environment = os.environ | ({} if data is None else {"NABLA_TAU_DATA": data})
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def finished(folder: Path, name: str, *options: str) -> str:
    done = run(folder, name, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def audit_of(folder: Path, name: str, *options: str) -> AuditReport:
    done = run(folder, name, "--quick", "--json", "figures.json", *options)
    assert done.returncode == 0, done.stderr
    report = AuditReport.load(folder / "figures.json")
    assert report.table() in done.stdout
    assert "<svg" in (folder / "report.html").read_text()
    return report


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        pytest.param("goemotions.py", 1_500, marks=needs_goemotions),
        pytest.param("tabular.py", 1_000, marks=needs_plotnine),
    ],
)
def test_most_of_what_was_memorised_is_forgotten(tmp_path, name, rows):
    report = audit_of(tmp_path, name, "--fraction", "0.2")
    assert set(report.models) == {"original", "retrained", "unlearned", "paper"}
    assert report.comparison["n_forget"] == rows // 5
    assert report.comparison["n_retain"] == rows - rows // 5
    original, unlearned = report.models["original"], report.models["unlearned"]
    # Without memory there is nothing to show.
    assert original.retain_loss < 0.7 * original.unseen_loss
    assert original.gap["auc_loss"] > 0.06
    assert abs(unlearned.gap["auc_loss"]) < 0.5 * original.gap["auc_loss"]
    assert unlearned.test_accuracy > report.models["retrained"].test_accuracy - 0.05


def test_a_class_is_removed_from_a_vision_model(tmp_path):
    done = run(tmp_path, "vision.py", "--quick", "--json", "figures.json", "--label", "1", "--recipe", "default")
    assert done.returncode == 0, done.stderr
    report = AuditReport.load(tmp_path / "figures.json")
    assert report.comparison["removed_classes"] == [1]
    original, unlearned, retrained = (report.models[name] for name in ("original", "unlearned", "retrained"))
    assert original.forget_accuracy > 0.9
    assert unlearned.forget_accuracy == retrained.forget_accuracy == 0
    assert unlearned.test_accuracy > retrained.test_accuracy - 0.05
    taken_for = {line.split()[0]: line for line in done.stdout.split("taken for\n")[1].splitlines() if "%" in line}
    assert taken_for.keys() == {"original", "retrained", "restart"}
    assert [("trousers" in line) for line in taken_for.values()] == [True, False, False]


def test_a_language_model_forgets_authors(tmp_path):
    options = ("--quick", "--json", "figures.json", "--recipe", "default")
    done = run(tmp_path, "language_model.py", *options, data="")
    assert done.returncode == 0, done.stderr
    report = AuditReport.load(tmp_path / "figures.json")
    original, unlearned, retrained = (report.models[name] for name in ("original", "unlearned", "retrained"))
    assert original.forget_loss < 0.1 < retrained.forget_loss, "it had learned them by heart"
    assert original.gap["auc_loss"] > 0.3
    assert abs(unlearned.gap["auc_loss"]) < original.gap["auc_loss"]
    assert unlearned.forget_loss > 10 * original.forget_loss
    assert unlearned.retain_loss < 0.5 * unlearned.forget_loss
    forgotten, retained = (part.splitlines() for part in done.stdout.split("text      ")[1:])
    assert forgotten[0].strip() == forgotten[1].removeprefix("  original").strip()
    assert forgotten[0].strip() != forgotten[3].removeprefix("  restart").strip()
    assert retained[0].strip() == retained[3].removeprefix("  restart").strip()


@needs_plotnine
def test_the_recipe_asked_for_is_the_one_judged(tmp_path):
    report = audit_of(tmp_path, "tabular.py", "--recipe", "paper")
    assert set(report.models) == {"original", "retrained", "unlearned"}
    assert report.record["recipe"] == "paper"


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert not done.stdout
    return done.stderr


@pytest.mark.parametrize(
    ("data", "text"), [("", "set NABLA_TAU_DATA"), ("nowhere", "no train.tsv or train.tsv.xz in nowhere")]
)
def test_absent_comments_are_said_where_to_come_from(tmp_path, data, text):
    error = refused(run(tmp_path, "goemotions.py", "--quick", data=data))
    assert text in error
    assert "github.com/google-research/google-research/tree/master/goemotions" in error


@pytest.mark.skipif(has_plotnine, reason="plotnine is installed, so nothing is absent")
def test_absent_table_is_said_where_to_come_from(tmp_path):
    assert "pip install --no-deps plotnine" in refused(run(tmp_path, "tabular.py", "--quick"))


def test_wrong_file_name_is_refused_before_any_work(tmp_path):
    assert "must end in .html, got report.txt" in refused(run(tmp_path, "tabular.py", "--out", "report.txt"))


def test_certified_last_layer(tmp_path):
    done = run(tmp_path, "certified_last_layer.py", "--quick", "--json", "figures.json")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert f"{figures['certificate']['sigma']}" in done.stdout
    expected = {"theorem": 9, "eps": 1.0, "delta": 1e-5, "rows": 400, "rows_left": 380, "update": 20}
    assert {name: figures["certificate"][name] for name in expected} == expected
    accuracy = figures["accuracy"]
    assert accuracy["before"] > 0.8  # of five classes
    assert abs(accuracy["deleted"] - accuracy["retrained"]) < 0.05
    assert abs(accuracy["deleted together"] - accuracy["retrained"]) < 0.05


def test_own_task_on_the_command_line(tmp_path, monkeypatch):
    finished(tmp_path, "own_task.py", "--quick")
    monkeypatch.chdir(tmp_path)
    task = ["--task", str(EXAMPLES / "own_task.py")]
    assert main(["unlearn", *task, "--weights", "trained.safetensors", "--out", "unlearned.safetensors"]) == 0
    models = ["--weights", "unlearned.safetensors", "--original", "trained.safetensors", "--retrain"]
    assert main(["audit", *task, *models, "--out", "report.html"]) == 0
    assert (tmp_path / "report.html").is_file()
    audited = AuditReport.load(tmp_path / "report.json").models
    original, retrained, unlearned = (audited[name] for name in ("original", "retrained", "unlearned"))
    assert original.forget_accuracy > retrained.forget_accuracy + 0.05
    gaps = [model.forget_accuracy - retrained.forget_accuracy for model in (original, unlearned)]
    assert abs(gaps[1]) < 0.6 * gaps[0]
    assert abs(unlearned.gap["auc_loss"]) < original.gap["auc_loss"]
    assert unlearned.test_accuracy > retrained.test_accuracy - 0.05


def test_a_stream_of_requests(tmp_path):
    done = run(tmp_path, "continual.py", "--quick", "--json", "figures.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [row["name"].split()[0] for row in rows] == ["learn", "unlearn", "unlearn", "learn"]
    assert all(row["name"] in done.stdout for row in rows)
    learned, thinned, without, again = rows
    for row in rows:  # of the model, and of the one that it should be
        assert row["known"][0] > 0.95
        assert abs(row["unseen"][0] - row["unseen"][1]) < 0.06
    for row in (learned, again):
        assert row["of the request"][0] > 0.9
    assert thinned["kl"] < 0.5, "a tenth of each digit less changes hardly anything"
    assert 0 < thinned["its loss"][0] < 2 * thinned["its loss"][1]
    assert without["of the request"] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--fsdp",)])
def test_two_processes(tmp_path, options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(EXAMPLES / "ddp.py"), "--quick", "--json", "figures.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = AuditReport.load(tmp_path / "figures.json")
    assert done.stdout.count(report.table()) == 1, "rank 0 alone speaks"
    assert f"2 processes ({'fsdp' if options else 'ddp'})" in done.stdout
    original, unlearned = report.models["original"], report.models["unlearned"]
    assert unlearned.auc_loss < original.auc_loss - 0.05


def test_one_process_is_told_how_to_start_two(tmp_path):
    assert "torchrun --nproc-per-node 2" in refused(run(tmp_path, "ddp.py"))


def test_a_plain_loop_brings_the_forget_loss_towards_tau(tmp_path):
    rows = re.findall(r"forget loss (\S+), tau (\S+), retain (\S+)", finished(tmp_path, "plain_loop.py", "--quick"))
    forget, tau, retain = ([float(row[column]) for row in rows] for column in range(3))
    assert sum(forget[-3:]) / 3 > 0.5 * tau[-1] > forget[0]
    assert sum(retain[-3:]) / 3 < 0.5 * tau[-1]


@pytest.mark.slow
def test_an_adapter_is_unlearned_in_the_trainer_of_trl(tmp_path):
    for package in ("trl", "peft", "datasets"):
        pytest.importorskip(package)
    finished(tmp_path, "sft_trainer.py", "--quick")
    report = AuditReport.load(tmp_path / "unlearned" / "audit.json")
    audited = report.models["unlearned"]
    assert audited.forget_loss > 0.8 * audited.unseen_loss


def test_lightning_unlearns(tmp_path):
    pytest.importorskip("lightning")
    said = re.search(r"(\S+) before, (\S+) after, (\S+) held out", finished(tmp_path, "lightning_module.py", "--quick"))
    before, after, tau = said.groups()
    assert float(before) < 0.5 * float(after)
    assert float(after) > 0.5 * float(tau)
