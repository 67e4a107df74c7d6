"""Whatever is wrong with what a command is given: a documented exit code, a message that names it, nothing changed."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import TASK, refused, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from nabla_tau.cli import make_parser
from nabla_tau.deletion_log import DeletionLog
from nabla_tau.weights import load_weights

HUGE = 10**30
NO_INTEGERS = ["", "x", "nan", "inf", "1.5", "1e30"]
NO_FLOATS = ["", "x", "nan", "inf", "-inf"]
SEEDS = [*NO_INTEGERS, -1, HUGE]
FOLDER_OR_ABSENT = ["folder", "absent", "task.py/below"]
JSON_FILES = ["folder.json", "task.py/x.json", "x.txt", "x"]
HTML_FILES = ["folder.html", "task.py/x.html", "x.pdf"]
WEIGHTS = [*FOLDER_OR_ABSENT, "", "binary", "empty", "task.py", "x" * 300, "short.safetensors", "short.pt"]
TASKS = ["", "absent.py", "folder.py", "a b", "..", ".x", "/", "no.such.module", "json", "binary", "nothing.py"]
CONFIGS = [*FOLDER_OR_ABSENT, "binary", "empty", "broken.yaml", "list.yaml", "tag.yaml", "unknown.yaml"]
LOGS = ["folder", "binary", "list.json", "torn.log", "task.py/below"]
KEYS = ["folder", "absent", "empty", "short.key"]
IDS = ["folder", "absent", "empty", "binary", "twice.txt"]
RECORDS = ["folder", "absent", "binary", "empty", "list.json", "number.json", "broken.json", "deep.json", "odd.json"]

COMMON = {"config": CONFIGS, "json": JSON_FILES}
LOGGED = {"log": LOGS, "key": KEYS}

# Command -> arguments that are right, and what is wrong for each of its options. Flags cannot be wrong.
COMMANDS = {
    "demo": (
        [],
        COMMON
        | {
            "fraction": [*NO_FLOATS, 0, 1, -1, 1e-12],
            "classes": [*NO_INTEGERS, -1, 10, HUGE],
            "seed": SEEDS,
            "shadow": [*NO_INTEGERS, -1, 1],
            "out": ["binary", "task.py/below"],
        },
    ),
    "unlearn": (
        ["--task=task.py", "--weights=w.safetensors", "--out=n.safetensors"],
        COMMON
        | LOGGED
        | {
            "task": TASKS,
            "weights": WEIGHTS,
            "out": ["", "folder.safetensors", "n.bin", "task.py/n.safetensors", "w.safetensors", "a\0.safetensors"],
            "method": ["", "magic"],
            "recipe": ["", "magic"],
            "performance": ["", "fast"],
            "seed": SEEDS,
            "checkpoint": ["folder", "binary", "empty", "w.safetensors", "task.py/below"],
        },
    ),
    "audit": (
        ["--task=task.py", "--weights=w.safetensors"],
        COMMON
        | LOGGED
        | {
            "task": TASKS,
            "weights": WEIGHTS,
            "original": FOLDER_OR_ABSENT,
            "retrained": FOLDER_OR_ABSENT,
            "shadow": FOLDER_OR_ABSENT,
            "record": RECORDS,
            "out": HTML_FILES,
            "card": ["folder.md", "task.py/x.md", "x.txt"],
        },
    ),
    "compare": (
        ["--data=digits", "--quick", "--methods=finetune", "--cache=cache"],
        COMMON
        | {
            "data": ["", "magic", "absent.py", "folder.py", "nothing.py"],
            "fraction": [*NO_FLOATS, 0, 1, -1, 1e-12],
            "classes": [*NO_INTEGERS, 0, -1, 99, HUGE],
            "mislabelled": [*NO_FLOATS, 0, 1],
            "outliers": [*NO_INTEGERS, 0, -1, HUGE],
            "methods": ["", ",", "magic", "all,all"],
            "seeds": [*NO_INTEGERS, 0, -1],
            "shadow": NO_INTEGERS,
            "out": HTML_FILES,
            "cache": ["binary", "task.py/below"],
        },
    ),
    "shadow train": (
        ["--task=task.py", "--out=shadows", "--models=4"],
        COMMON
        | {
            "task": TASKS,
            "out": ["binary", "task.py/below", "."],
            "models": [*NO_INTEGERS, 0, 1, -1],
            "unlearn": ["", "magic"],
            "probability": [*NO_FLOATS, 0, 1, -1],
            "seed": SEEDS,
            "dtype": ["", "float64", "int8"],
            "n_jobs": [*NO_INTEGERS, 0],
            "epochs": NO_INTEGERS,
            "batch_size": NO_INTEGERS,
            "learning_rate": [*NO_FLOATS, 0, -1],
        },
    ),
    "shadow score": (
        ["--task=task.py", "--weights=w.safetensors", "--shadow=shadows"],
        COMMON | {"task": TASKS, "weights": WEIGHTS, "shadow": FOLDER_OR_ABSENT},
    ),
    "log request": (
        ["whole.log", "--ids=ids.txt"],
        COMMON | {"ids": IDS, "key": KEYS, "note": ["", "x" * 1001]},
    ),
    "log show": (["whole.log"], COMMON),
    "log verify": (["whole.log"], COMMON | {"head": ["", "x", "1" * 64, "F" * 64]}),
    "env": ([], COMMON),
}
TOLD_OTHERWISE = {
    ("fraction", 1e-12),  # 0% of 250 samples are 0
    ("methods", "all,all"),  # 'all'
    ("task", "no.such.module"),  # No module named 'no'
    ("out", "a\0.safetensors"),  # embedded null byte
    ("out", "."),  # by its whole path
    ("key", "empty"),
    ("key", "short.key"),
    ("ids", "empty"),
    ("ids", "twice.txt"),
    ("note", "x" * 1001),
    ("record", "list.json"),
    ("record", "number.json"),
    ("record", "odd.json"),
    ("config", "unknown.yaml"),  # the option in it
}
FLAGS = {"help", "print_config", "resume", "retrain", "half_class", "quick", "ensemble", "repair"}


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(TASK, scope)
    torch.manual_seed(0)
    state = scope["model"]().state_dict()
    save_file(state, "w.safetensors")
    torch.save(state, "short.pt")
    for suffix in ("", ".json", ".html", ".md", ".py", ".safetensors"):
        (tmp_path / f"folder{suffix}").mkdir()
    odd = {"seconds": "long", "removed_classes": 3, "warnings": 7}
    contents: dict[str, str | bytes] = {
        "task.py": TASK,
        "nothing.py": "",
        "empty": "",
        "binary": bytes(range(256)) * 4,
        "short.safetensors": (tmp_path / "w.safetensors").read_bytes()[:-9],
        "short.pt": (tmp_path / "short.pt").read_bytes()[:-99],
        "broken.yaml": "a: [1, 2\nb: }{",
        "list.yaml": "[1, 2]",
        "tag.yaml": "task: !!python/object/apply:os.system ['touch ran']\n",
        "unknown.yaml": "magic: 1\n",
        "list.json": "[]\n",
        "number.json": "3",
        "broken.json": '{"a": [1',
        "deep.json": "[" * 100_000,
        "odd.json": json.dumps(odd),
        "short.key": "12345",
        "ids.txt": "a\nb\n",
        "twice.txt": "a\na\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    DeletionLog("whole.log").note("a beginning")
    (tmp_path / "torn.log").write_bytes((tmp_path / "whole.log").read_bytes()[:-20])
    return tmp_path


def parser_of(command: str):
    parser = make_parser()
    for name in command.split():
        actions = [action for action in parser._actions if hasattr(action, "_name_parser_map")]
        parser = actions[0]._name_parser_map[name]
    return parser


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_refuses_what_makes_no_sense(work, command):
    right, wrong = COMMANDS[command]
    if command == "shadow score":
        assert run("shadow", "train", *COMMANDS["shadow train"][0])[0] == 0
    options = {a.dest for a in parser_of(command)._actions if a.option_strings}
    assert options - FLAGS == wrong.keys(), "an option without wrong values here"
    for option, values in wrong.items():
        for value in values:
            said = refused(*command.split(), *right, f"--{option}={value}")
            # Of what is in a file the text is about that; a number is shown as Python reads it.
            named = str(value)[-60:].replace("1e30", "1e+30")
            assert named in said or (option, value) in TOLD_OTHERWISE, f"{command} --{option}={value!r}: {said}"


@pytest.mark.parametrize("command", ["", "magic", "log", "log magic", "shadow", "shadow magic", "env --magic=1"])
def test_wrong_commands(work, command):
    if command:
        refused(*command.split())
    assert run("--help")[0] == 0


def test_the_help_lists_every_exit_code(capsys):
    with pytest.raises(SystemExit):
        make_parser().parse_args(["--help"])
    text = capsys.readouterr().out
    codes = text.split("exit codes:")[1]
    for line in ("0    done", "1    the work failed", "2    wrong usage", "3    a loss became", "130  interrupted"):
        assert line in codes


def test_a_result_never_replaces_the_log_it_is_about(work):
    (work / "log.json").write_bytes((work / "whole.log").read_bytes())
    for command in ("show", "verify", "request"):
        ids = ["--ids=ids.txt"] * (command == "request")
        assert "already used" in refused("log", command, "log.json", *ids, "--json=log.json")
    assert "already used" in refused("log", "request", "whole.log", "--ids=trunc.json", "--json=trunc.json")
    # An entry is not appended where its result could not be told.
    refused("log", "request", "whole.log", "--ids=ids.txt", "--json=folder.json")


# What a task's own code does -> exit code, and what is said.
TASK_ERRORS = {
    "1 / 0": (1, "task.py, line 18: ZeroDivisionError: division by zero"),
    "def ((": (1, "SyntaxError"),
    "import sys; sys.exit(0)": (1, "task.py, line 18: SystemExit: 0"),
    "import no_such_module": (1, "task.py, line 18: ModuleNotFoundError"),
    "def data():\n    return {}['x']": (1, "task.py, line 19: KeyError: 'x'"),
    "def data():\n    raise MemoryError": (1, "MemoryError"),
    "def data():\n    raise KeyboardInterrupt": (130, "interrupted"),
    "def data():\n    return 3": (2, "must give a dict of data sets, got int"),
    "def model():\n    raise ValueError('mine')": (1, "task.py, line 19: ValueError: mine"),
    "def model():\n    return None": (2, "model() of the task must be a torch.nn.Module, got NoneType"),
    "def forward(model, batch):\n    return 3": (2, "forward must give two tensors, (logits, targets), got int"),
    "def forward(model, batch):\n    raise IndexError('mine')": (1, "task.py, line 19: IndexError: mine"),
    "def loss(logits, targets):\n    return 'x'": (2, "must give a tensor of losses, [B], got str"),
    "def loss(logits, targets):\n    return logits.mean()": (2, "must give one loss a sample, [B], got shape ()"),
}
# The forget set (x, y) of the task -> what is said.
DATA_ERRORS = {
    "x[:0], y[:0]": "the forget set is empty",
    "x[:3], y": "same number of samples, got shapes [(3, 4), (20,)]",
    "x[:, :3], y": "cannot take a batch of (2, 3) torch.float32",
    "x.double(), y": "cannot take a batch of (2, 4) torch.float64",
    "x, y.float()": "targets (2,) torch.float32",
    "x, y * 0 + 77": "forget: label out of range: target 77",
    "x, y * 0 - 5": "forget: label out of range: target -5",
    "'hello'": "forget must be tensors or arrays",
    "x.numpy().astype(object), y": "must be Tensor",
    "[[1, 2], [3]]": "cannot be put into one batch",
}


@pytest.mark.parametrize("command", ["unlearn", "audit"])
@pytest.mark.parametrize("code", TASK_ERRORS)
def test_errors_of_the_tasks_own_code(work, command, code):
    (work / "task.py").write_text(TASK + "\n" + code + "\n")
    expected, text = TASK_ERRORS[code]
    assert text in refused(command, *COMMANDS[command][0], code=expected)


@pytest.mark.parametrize("forget", DATA_ERRORS)
def test_data_that_does_not_fit(work, forget):
    code = "first = data\ndef data():\n    sets = first(); x, y = sets['forget']\n"
    code += f"    return sets | {{'forget': ({forget})}}\n"
    (work / "task.py").write_text(TASK + code)
    assert DATA_ERRORS[forget] in refused("unlearn", *COMMANDS["unlearn"][0])


def test_inputs_that_are_not_finite_end_with_3_and_the_last_good_weights(work):
    code = "first = data\ndef data():\n    sets = first(); sets['forget'][0][3] = float('nan')\n    return sets\n"
    (work / "task.py").write_text(TASK + code)
    # By itself it would never look at the forget set.
    found, said = run("unlearn", *COMMANDS["unlearn"][0], "--recipe", "paper")
    assert (found, "Traceback" in said) == (3, False)
    assert "became non-finite in step 0" in said
    assert (work / "n.last-good.safetensors").exists()
    assert not (work / "n.safetensors").exists()


SUITE = """
import torch
from torch import nn
from nabla_tau.suites import Suite
x, y = torch.randn(200, 4), torch.randint(3, (200,))
def net(): return nn.Linear(4, 3)
"""
SUITES = {
    "SUITE = 3": "must define SUITE, a nabla_tau.suites.Suite, got 3",
    "SUITE = Suite('a/../b', lambda: (x, y), net, None, 100, 40, 2)": "the name of a suite must be of letters",
    "SUITE = Suite('s', 3, net, None, 100, 40, 2)": "data of a suite must be a function, got 3",
    "SUITE = Suite('s', lambda: (x, y), net, None, -5, 40, 2)": "train of a suite must be at least 1, got -5",
    "SUITE = Suite('s', lambda: (x, y), net, None, 'a', 40, 2)": "train of a suite must be a whole number, got 'a'",
    "SUITE = Suite('s', lambda: (x, y), net, None, 100, 40, 0)": "epochs of a suite must be at least 1, got 0",
    "SUITE = Suite('s', lambda: (x, y), net, None, 100, 40, 2, learning_rate=float('nan'))": "positive and finite",
    "SUITE = Suite('s', lambda: (x, y), net, None, 100, 40, 2, device='moon')": "device of a suite",
    "SUITE = Suite('s', lambda: 3, net, None, 100, 40, 2)": "must give two tensors, inputs and labels, got int",
    "SUITE = Suite('s', lambda: (x, y[:9]), net, None, 100, 40, 2)": "got [200, 4] torch.float32 and [9] torch.int64",
    "SUITE = Suite('s', lambda: (x, y.float()), net, None, 100, 40, 2)": "int64 labels [N] from 0",
    "SUITE = Suite('s', lambda: (x / 0, y), net, None, 100, 40, 2)": "inputs that are not finite",
    "SUITE = Suite('s', lambda: (x, y), lambda: 3, None, 100, 40, 2)": "must be a torch.nn.Module, got int",
    "SUITE = Suite('s', lambda: (x, y), lambda: nn.Linear(4, 2), None, 100, 40, 2)": "of more than 2 classes",
    "SUITE = Suite('s', lambda: (x, y), lambda: nn.Linear(7, 3), None, 100, 40, 2)": "cannot take a batch of (2, 4)",
}


@pytest.mark.parametrize("code", SUITES)
def test_suites_that_make_no_sense(work, code):
    (work / "mine.py").write_text(SUITE + code)
    assert SUITES[code] in refused("compare", "--data=mine.py", "--quick", "--methods=finetune", "--cache=cache")


quickly = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(quickly, max_examples=80)
@given(content=st.binary(max_size=60) | st.text("abc:[]{}&*!|>-'\"% \n\t#0.", max_size=40).map(str.encode))
def test_no_configuration_is_a_traceback(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "any.yaml"
    path.write_bytes(content)
    code, said = run("unlearn", f"--config={path}")
    assert code == 2
    assert said
    assert "Traceback" not in said


def stored(kind: str) -> bytes:
    torch.manual_seed(0)
    state = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).state_dict()
    if kind == "safetensors":
        from safetensors.torch import save

        return save(state)
    found = io.BytesIO()
    torch.save(state, found, _use_new_zipfile_serialization=kind == "zip")
    return found.getvalue()


KINDS = {kind: stored(kind) for kind in ("safetensors", "zip", "legacy")}


@settings(quickly, max_examples=300)
@given(data=st.data(), kind=st.sampled_from(sorted(KINDS)))
def test_damaged_weights_are_refused_and_the_model_is_as_it_was(tmp_path_factory, data, kind):
    content = bytearray(KINDS[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        length = data.draw(st.sampled_from([0, 1, 2, 9, 10_000]))
        content[start : start + length] = data.draw(st.binary(max_size=4))
    path = tmp_path_factory.mktemp("weights") / ("w.safetensors" if kind == "safetensors" else "w.pt")
    path.write_bytes(content)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = ""
    try:
        load_weights(model, path)
    except ValueError as error:
        said = str(error)
    if said:
        assert str(path) in said
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(3, 2, dtype=torch.int64), "(3, 2) int64 in the file, (3, 2) float32 in the model"),
        (torch.zeros(3, 2, dtype=torch.complex64), "complex64 in the file"),
        (torch.zeros(2, 3), "(2, 3) float32 in the file"),
        (torch.zeros(3, 2).to_sparse(), "in the file"),
        (torch.zeros(3, 2, device="meta"), "in the file"),
        ({"a": 1}, "holds a dict as 'weight'"),
    ],
)
def test_tensors_of_another_kind_are_no_weights(tmp_path, value, text):
    torch.save({"weight": value, "bias": torch.zeros(3)}, tmp_path / "w.pt")
    model = nn.Linear(2, 3)
    before = model.weight.clone()
    with pytest.raises(ValueError) as error:
        load_weights(model, tmp_path / "w.pt")
    assert text in str(error.value)
    assert torch.equal(model.weight, before)


def started(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "nabla_tau", *arguments]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where these tests run in the background SIGINT is ignored, and what they start would ignore it too.
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, preexec_fn=default, **streams | options)


def test_an_interrupted_command_says_so(work):
    code = "\ndef data():\n    import time; open('begun', 'w').close(); time.sleep(600)\n"
    (work / "task.py").write_text(TASK + code)
    process = started("unlearn", *COMMANDS["unlearn"][0])
    while not (work / "begun").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (130, "nabla-tau: interrupted")


def test_a_reader_that_goes_away_is_no_traceback(work):
    reading, writing = os.pipe()
    os.close(reading)
    process = started("log", "show", "whole.log", stdout=writing)
    os.close(writing)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.strip()) == (2, "nabla-tau: standard output was closed")


def test_letters_that_a_terminal_lacks_are_no_traceback(work):
    DeletionLog("whole.log").note("Größe ≤ 3")
    process = started("log", "show", "whole.log", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert "Gr\\xf6\\xdfe \\u2264 3" in out


def test_where_the_command_line_was_not_installed_it_says_so(tmp_path):
    (tmp_path / "jsonargparse.py").write_text("raise ModuleNotFoundError('as if it were absent', name=__name__)")
    process = started("env", cwd=tmp_path)  # -m looks there first
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert said == "nabla-tau: the command line needs jsonargparse: pip install 'nabla_tau[cli]'\n"
