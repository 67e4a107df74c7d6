"""The commands as a user types them; what they write, refuse and say."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Subset, TensorDataset

from nabla_tau.cli import main
from nabla_tau.deletion_log import DeletionLog
from nabla_tau.digest import of_json
from nabla_tau.shadow_commands import select

TASK = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (600,), generator=generator)
    x = torch.eye(8)[y] + 0.7 * torch.randn(600, 8, generator=generator)
    cut = dict(forget=slice(0, 60), retain=slice(60, 300), held_out=slice(300, 400), unseen=slice(400, 600))
    return {name: (x[part], y[part]) for name, part in cut.items()}

def train(model, data):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
"""


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    scope: dict = {}
    exec(TASK, scope)
    torch.manual_seed(0)
    model, data = scope["model"](), scope["data"]()
    scope["train"](model, tuple(torch.cat((data["forget"][i], data["retain"][i])) for i in (0, 1)))
    save_file(model.state_dict(), "trained.safetensors")
    torch.save(model.state_dict(), "trained.pt")
    return tmp_path


def unlearn(*options: str) -> int:
    return main(
        ["unlearn", "--task", "task.py", "--weights", "trained.safetensors", "--out", "new.safetensors", *options]
    )


def test_unlearn_then_audit(work, capsys):
    before = (work / "trained.safetensors").read_bytes()
    assert unlearn("--json", "copy.json") == 0
    assert (work / "trained.safetensors").read_bytes() == before
    record = json.loads((work / "new.json").read_text())
    assert record == json.loads((work / "copy.json").read_text())
    assert record["method"] == record["recipe"] == "restart"
    assert record["counts"] == {"forget": 60, "retain": 240, "held_out": 100}
    assert record["settings"]["steps"] == len(record["history"]["step"])
    old, new = load_file("trained.safetensors"), load_file("new.safetensors")
    assert old.keys() == new.keys()
    assert not torch.equal(old["0.weight"], new["0.weight"])

    audit = ["audit", "--task", "task.py", "--weights", "new.safetensors", "--original", "trained.safetensors"]
    assert main([*audit, "--retrain", "--record", "new.json", "--out", "out/report.html"]) == 0
    report = json.loads((work / "out" / "report.json").read_text())
    assert set(report["models"]) == {"original", "retrained", "unlearned"}
    printed = capsys.readouterr()
    assert "unlearned" in printed.out
    assert printed.err == "", "no progress where nobody looks at a terminal"
    assert "<svg" in (work / "out" / "report.html").read_text()


def test_a_log_and_a_card(work, capsys):
    (work / "key").write_bytes(b"sixteen secret bytes")
    audit = ["audit", "--task", "task.py", "--weights", "new.safetensors", "--original", "trained.safetensors"]
    audit += ["--record", "new.json", "--out", "report.html", "--card", "card.md"]
    logged = ["--log", "logs/deletions.jsonl", "--key", "key"]
    assert unlearn(*logged) == 0
    assert main([*audit, *logged]) == 0
    printed = capsys.readouterr().out
    log = DeletionLog("logs/deletions.jsonl")
    result, audited = log.entries()
    assert f"head {result['hash']}" in printed
    assert f"head {audited['hash']}" in printed
    assert log.verify().head == audited["hash"]
    # Both files are those that the log names, and what was audited is what was unlearned.
    record, report = (json.loads((work / name).read_text()) for name in ("new.json", "report.json"))
    assert result["content"]["record"] == f"sha256:{of_json(record)}"
    assert audited["content"]["report"] == f"sha256:{of_json(report)}"
    assert not [f for f in report["findings"] if "record" in f["text"]]
    for name in ("forget", "original", "unlearned"):
        assert result["content"]["fingerprints"][name] == audited["content"]["fingerprints"][name]
    card = (work / "card.md").read_text()
    assert result["content"]["fingerprints"]["forget"] in card
    assert record["fingerprints"]["forget"] not in card
    assert "60 of 300 training samples" in card
    for name, content in (("unlearn-record", record), ("audit-report", report)):
        schema = resources.files("nabla_tau") / "schemas" / f"{name}.schema.json"
        jsonschema.validate(content, json.loads(schema.read_text()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--log", "damaged"], "line 1: changed"),
        (["--log", "trained.safetensors"], "line 1"),
        (["--log", "new.safetensors"], "already used"),
        (["--log", "task.py/log"], "task.py"),
        (["--key", "short"], "at least 16 bytes, got 5"),
        (["--key", "none"], "none"),
    ],
)
def test_a_log_that_cannot_be_appended_to_is_refused_before_the_work(work, capsys, options, text):
    (work / "damaged").write_text("{}\n")
    (work / "short").write_text("12345")
    before = {path: path.read_bytes() for path in work.iterdir() if path.is_file()}
    assert text in refused(capsys, unlearn(*options))
    assert {path: path.read_bytes() for path in work.iterdir() if path.is_file()} == before


def test_a_record_of_another_run_is_told(work):
    assert unlearn() == 0
    assert (
        main(["unlearn", "--task", "task.py", "--weights", "trained.safetensors", "--out", "b.safetensors", "--seed=1"])
        == 0
    )
    audit = ["audit", "--task", "task.py", "--weights", "b.safetensors", "--original", "new.safetensors"]
    assert main([*audit, "--record", "new.json"]) == 0
    told = [f["text"] for f in json.loads((work / "report.json").read_text())["findings"] if f["level"] == "warning"]
    assert sum("weights audited are not those" in text for text in told) == 1
    assert sum("given as the original is not" in text for text in told) == 1
    assert not any("forget set audited" in text for text in told)


def test_pt_weights_give_the_same_result(work):
    assert unlearn() == 0
    wanted = load_file("new.safetensors")
    assert main(["unlearn", "--task", "task.py", "--weights", "trained.pt", "--out", "pt.safetensors"]) == 0
    assert all(torch.equal(value, wanted[name]) for name, value in load_file("pt.safetensors").items())


def test_another_method(work, capsys):
    assert unlearn("--method", "finetune") == 0
    record = json.loads((work / "new.json").read_text())
    assert (record["method"], record["settings"]["epochs"]) == ("finetune", 3)
    assert "method finetune: " in capsys.readouterr().out


def test_config_file_and_print_config(work, capsys):
    (work / "run.yaml").write_text(
        "task: task.py\nweights: trained.safetensors\nout: yaml.safetensors\nrecipe: paper\nseed: 4\n"
    )
    assert main(["unlearn", "--config", "run.yaml"]) == 0
    record = json.loads((work / "yaml.json").read_text())
    assert (record["recipe"], record["settings"]["seed"]) == ("paper", 4)
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["unlearn", "--config", "run.yaml", "--print_config"])
    assert done.value.code == 0
    assert "recipe: paper" in capsys.readouterr().out


def refused(capsys, code: int, expected: int = 2) -> str:
    assert code == expected
    error = capsys.readouterr().err.strip()
    assert error.startswith("nabla-tau: ")
    assert "Traceback" not in error
    return error


def test_outputs_are_never_overwritten(work, capsys):
    before = (work / "trained.safetensors").read_bytes()
    options = ["unlearn", "--task", "task.py", "--weights", "trained.safetensors", "--out", "trained.safetensors"]
    assert "exists and is not overwritten" in refused(capsys, main(options))
    assert (work / "trained.safetensors").read_bytes() == before


@pytest.mark.parametrize("json_file", ["trained.json", "new.json", "trained.safetensors", "task.py"])
def test_no_output_replaces_an_input_or_another_output(work, capsys, json_file):
    (work / "trained.json").write_text("{}")
    before = {path: path.read_bytes() for path in work.iterdir() if path.is_file()}
    refused(capsys, unlearn("--json", json_file))
    audit = ["audit", "--task", "task.py", "--weights", "trained.safetensors", "--record", "trained.json"]
    refused(capsys, main([*audit, "--out", "trained.html"]))
    assert {path: path.read_bytes() for path in work.iterdir() if path.is_file()} == before


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_pickle_where_weights_are_expected(work, capsys):
    (work / "trained.safetensors").unlink()
    with open("trained.pt", "wb") as file:
        pickle.dump(Evil(), file)
    torch.save({"weight": Evil()}, "zip.pt")
    for name in ("trained.pt", "zip.pt"):
        code = main(["unlearn", "--task", "task.py", "--weights", name, "--out", "new.safetensors"])
        assert "not loaded, since that would run code" in refused(capsys, code)
    assert not (work / "ran").exists()


@pytest.mark.parametrize("name", ["trained.safetensors", "trained.pt"])
def test_truncated_weights(work, capsys, name):
    content = (work / name).read_bytes()
    (work / name).write_bytes(content[: len(content) // 2])
    code = main(["unlearn", "--task", "task.py", "--weights", name, "--out", "new.safetensors"])
    assert "is not a whole" in refused(capsys, code)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--weights", "absent.safetensors"], "no weights at absent.safetensors"),
        (["--task", "absent.py"], "no task file at absent.py"),
        (["--task", "empty.py"], "must define model"),
        (["--weights", "other.safetensors"], "do not fit the model: missing"),
        (["--recipe", "magic"], "recipe must be one of default, ascent, gentle, paper"),
        (["--method", "magic"], "method must be one of nabla-tau, "),
        (["--method", "finetune", "--recipe", "paper"], "recipe is of nabla-tau, got recipe 'paper'"),
        (["--out", "new.bin"], "written as .safetensors"),
    ],
)
def test_bad_input(work, capsys, options, text):
    (work / "empty.py").write_text("")
    save_file({"x": torch.zeros(2)}, "other.safetensors")
    assert text in refused(capsys, unlearn(*options))
    assert not list(work.glob("new.*"))


def test_non_finite_run_leaves_the_last_good_weights(work, capsys):
    text = TASK + "\ncalls = []\ndef forward(model, batch):\n    calls.append(torch.is_grad_enabled())\n"
    text += "    return model(batch[0]) * (float('nan') if sum(calls) > 9 else 1), batch[1]\n"
    (work / "task.py").write_text(text)
    code = unlearn()
    captured = capsys.readouterr().err
    assert code == 3
    assert "became non-finite in step" in captured
    good = load_file("new.last-good.safetensors")
    assert all(value.isfinite().all() for value in good.values())
    assert not (work / "new.safetensors").exists()
    assert unlearn() == 3, "an earlier rescue must not hide what happens now"
    assert (work / "new.last-good-2.safetensors").exists()


def test_unknown_option_exits_with_2(work, capsys):
    with pytest.raises(SystemExit) as done:
        unlearn("--magic", "1")
    assert done.value.code == 2


def test_env(tmp_path, capsys):
    assert main(["env", "--json", str(tmp_path / "env.json")]) == 0
    environment = json.loads((tmp_path / "env.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert "C++" in environment["kernels"]["cpu"]
    assert "openmp" in capsys.readouterr().out


def test_installed_command_runs():
    command = Path(sys.executable).with_name("nabla-tau")
    process = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert process.returncode == 0
    assert process.stdout.strip()


def shadows(*options: str) -> int:
    return main(["shadow", "train", "--task", "task.py", "--out", "shadows", "--models", "8", *options])


def test_shadow_train_then_score_then_audit(work, capsys):
    assert shadows("--unlearn", "default", "--json", "train.json") == 0
    assert json.loads((work / "train.json").read_text())["trained_on_by_at_least"] == {"forget": 4, "unseen": 4}
    assert capsys.readouterr().err == ""
    before = (work / "shadows" / "scores.npy").stat().st_mtime_ns
    assert shadows("--unlearn", "default") == 0
    assert (work / "shadows" / "scores.npy").stat().st_mtime_ns == before, "a finished run is not done again"

    unlearn()
    scored = {}
    for name in ("trained", "new"):
        command = ["shadow", "score", "--task", "task.py", "--weights", f"{name}.safetensors"]
        assert main([*command, "--shadow", "shadows", "--json", f"{name}-scores.json"]) == 0
        scored[name] = json.loads((work / f"{name}-scores.json").read_text())
    assert "LiRA, offline" in capsys.readouterr().out
    attacks = ["lira", "ulira", "lira_offline", "rmia", "rmia_offline"]
    assert [*scored["new"]["attacks"]] == attacks
    assert [len(scored["new"]["scores"]["lira"][name]) for name in ("forget", "unseen")] == [60, 200]
    found = {name: scored[name]["attacks"]["rmia"]["auc"] for name in scored}
    assert found["trained"] > 0.6, "the trained model remembers"
    assert found["new"] < found["trained"]

    audit = ["audit", "--task", "task.py", "--weights", "new.safetensors", "--original", "trained.safetensors"]
    assert main([*audit, "--retrain", "--shadow", "shadows", "--out", "report.html"]) == 0
    report = json.loads((work / "report.json").read_text())
    assert report["statistics"]["by_models"]["attacks"] == ["lira", "ulira", "rmia"]
    assert report["models"]["unlearned"]["auc_rmia"] == pytest.approx(found["new"])
    assert report["models"]["original"]["auc_lira"] == pytest.approx(scored["trained"]["attacks"]["lira"]["auc"])
    assert "U-LiRA" in capsys.readouterr().out
    assert "U-LiRA" in (work / "report.html").read_text()


def test_shadow_models_as_one_ensemble(work, capsys):
    assert shadows("--ensemble", "--epochs", "40", "--learning_rate", "1e-2", "--dtype", "float16") == 0
    index = json.loads((work / "shadows" / "index.json").read_text())
    assert index["plan"]["settings"]["always_trained_on"] == 240
    assert "8 shadow models" in capsys.readouterr().out
    assert "another run" in refused(capsys, shadows("--ensemble", "--epochs", "41"))


def test_what_shadow_refuses(work, capsys):
    assert shadows() == 0
    score = ["shadow", "score", "--task", "other.py", "--weights", "trained.safetensors", "--shadow"]
    (work / "other.py").write_text(TASK.replace("0.7 *", "0.8 *"))
    capsys.readouterr()
    assert "trained on another forget set" in refused(capsys, main([*score, "shadows"]))
    assert "no shadow models in nowhere" in refused(capsys, main([*score, "nowhere"]))
    audit = ["audit", "--task", "other.py", "--weights", "trained.safetensors", "--shadow", "shadows"]
    assert "trained on another forget set" in refused(capsys, main(audit))
    (work / "task.py").write_text(TASK.replace("range(200)", "range(201)"))
    assert "another run" in refused(capsys, shadows())
    (work / "task.py").write_text(TASK.replace("def train(", "def practise("))
    assert "need train(model, data) in the task, or --ensemble" in refused(capsys, shadows())


def test_samples_are_selected_from_any_kind_of_sets():
    x = torch.arange(12.0).reshape(6, 2)
    y = torch.arange(6)
    index = np.array([4, 0, 3])
    first, second = (x[:2], y[:2]), (x[2:], y[2:])
    for kind in (tuple, lambda pair: {"x": pair[0], "labels": pair[1]}, lambda pair: TensorDataset(*pair)):
        found = select([kind(first), kind(second)], index)
        assert type(found) is type(kind(first))
        columns = found.values() if isinstance(found, dict) else getattr(found, "tensors", found)
        assert [column.tolist() for column in columns] == [x[index].tolist(), y[index].tolist()]
    datasets = [Subset(TensorDataset(*pair), range(len(pair[0]))) for pair in (first, second)]
    assert [int(label) for _, label in select(datasets, index)] == index.tolist()
    with pytest.raises(TypeError, match="not DataLoaders"):
        select([DataLoader(datasets[0])], index)
    with pytest.raises(ValueError, match="differ in their structure"):
        select([first, {"x": x, "labels": y}], index)
