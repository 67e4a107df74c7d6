"""The documentation says what is: blocks run, commands parse, links lead somewhere, the table of methods has the
figures of its CSV, and every public name is in the reference."""

from __future__ import annotations

import copy
import csv
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from pages import PAGES, ROOT, Session, blocks_of, commands_of
from torch import nn

import nabla_tau
from nabla_tau import certified, membership, methods, optim
from nabla_tau.cli import main, make_parser

QUICK_START = ROOT / "docs" / "index.md"
BLOCKS = [(page, number) for page in PAGES for number in range(len(blocks_of(page)))]
COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


def label(value: Any) -> str:
    if isinstance(value, Path):
        return str(value.relative_to(ROOT))
    return " ".join(value[:3]) if isinstance(value, list) else str(value)


@pytest.fixture(scope="module")
def started() -> dict[str, Any]:
    """What the first block of the quick start binds; the blocks of all pages go on from it."""
    names: dict[str, Any] = {"__name__": "docs"}
    exec(blocks_of(QUICK_START)[0].code, names)
    return names


@pytest.fixture(scope="module")
def sessions(started, tmp_path_factory):
    """The session of each page, with models of its own."""
    found = {}
    for page in PAGES:
        own = {name: copy.deepcopy(it) if isinstance(it, nn.Module) else it for name, it in started.items()}
        found[page] = Session(page, tmp_path_factory.mktemp(page.stem), own)
    take_for_granted(found[ROOT / "README.md"])
    return found


def take_for_granted(readme: Session) -> None:
    """What the README's blocks do not make themselves."""
    names = readme.names
    for letter, name in zip("frvt", ("forget", "retain", "held_out", "unseen"), strict=True):
        names[f"x_{letter}"], names[f"y_{letter}"] = names[name]
    names["retrained_model"] = names["train"](*names["retain"])
    names["DistributedDataParallel"] = nn.parallel.DistributedDataParallel
    if importlib.util.find_spec("transformers") is None:
        readme.absent["lm"] = "a model of transformers, which is not installed"
    else:
        from transformers_models import llama, text

        names["lm"], names["texts"] = (
            llama(),
            {name: text(8, seed) for seed, name in enumerate(("forget", "retain", "held_out"))},
        )


@pytest.fixture
def one_process(monkeypatch):
    """A process as torchrun starts it, alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in told.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def trackers_at_home(monkeypatch, tmp_path):
    """Trackers write into the folder of the test and call nobody."""
    told = {
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_TRACKING_URI": (tmp_path / "mlruns").as_uri(),
        "TRACKIO_DIR": str(tmp_path),
        "WANDB_MODE": "offline",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)


@pytest.mark.filterwarnings("ignore::UserWarning")  # what a method says of a model as small as these
@pytest.mark.parametrize(("page", "number"), BLOCKS, ids=label)
def test_every_block_runs(sessions, page, number, one_process, trackers_at_home, monkeypatch):
    session = sessions[page]
    monkeypatch.chdir(session.folder)
    if page.name == "README.md" and "DistributedDataParallel" in blocks_of(page)[number].code:
        dist.init_process_group("gloo")
    session.run(number)


def test_the_quick_start_forgets(sessions, one_process, monkeypatch):
    """As its text says."""
    session = sessions[QUICK_START]
    monkeypatch.chdir(session.folder)
    session.run(len(blocks_of(QUICK_START)) - 1)
    report = session.names["report"]
    assert report.models["original"].gap["auc_loss"] > 0.03
    assert report.verdict == "forgotten"


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=label)
def test_every_command_parses(page, command):
    """Those of examples/own_task.py run in test_examples.py."""
    if "--help" in command:
        with pytest.raises(SystemExit, match="0"):
            make_parser().parse_args(command)
    else:
        make_parser().parse_args(command)


def test_the_commands_of_the_deletion_log_run(tmp_path):
    (tmp_path / "ids.txt").write_text("user 17\nuser 40\n")
    (tmp_path / "secret").write_bytes(bytes(range(16)))
    shown = [command for command in commands_of(ROOT / "docs" / "records.md") if command[0] == "log"]
    shown = [command for command in shown if "requests.jsonl" in command]
    assert [command[1] for command in shown] == ["request", "show", "verify"]
    assert [main(command) for command in shown] == [0, 0, 0]


def test_the_tables_are_those_of_the_committed_results():
    command = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, ""), found.stderr
    places = [page.read_text().count("<!-- table ") for page in (ROOT / "README.md", ROOT / "docs" / "defaults.md")]
    assert places == [5, 8]


def test_the_table_of_methods_is_that_of_the_measurement():
    with (ROOT / "benchmarks" / "results" / "quality_cpu.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    case = "fashion_mnist, 15% random"
    measured = {r["provider"]: f"{float(r['p50']):.1f}" for r in rows if r["case"] == f"{case}: avg_d"}
    measured |= {r["provider"]: r["note"].split(":")[0] for r in rows if r["case"] == case}
    names = {"nabla-tau (paper)": "nabla-tau, paper"}
    expected = {names.get(name, name): value for name, value in measured.items()}
    again, nothing = expected.pop("retrained again"), expected.pop("original")
    page = (ROOT / "docs" / "methods.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    written = {row[0].replace("`", ""): row[-1] for row in cells if row[0].startswith("`")}
    assert written.keys() == {*methods.METHODS, "default", "nabla-tau", "nabla-tau, paper"}
    assert {name: value for name, value in written.items() if value} == expected
    assert f"is\n{again} from retraining, and doing nothing {nothing}." in page


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_between_files_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(out)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    # Elsewhere than in the sources: the reference is that of the installed package.
    return subprocess.run(command, env=quiet, capture_output=True, text=True, cwd=config.parent.parent)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", out)
    assert done.returncode == 0, done.stderr
    return out


def test_broken_links_are_errors(tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "nabla_tau").symlink_to(ROOT / "nabla_tau")
    with (tmp_path / "docs" / "records.md").open("a") as page:
        page.write("\n[file](no-such-page.md) [anchor](methods.md#no-such-part)\n")
    (tmp_path / "docs" / "lost.md").write_text("# In no menu\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    warned = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    for cause in ("no-such-page.md", "no-such-part"):
        assert any(cause in line for line in warned)
    assert any("not included in the" in line for line in warned), "of lost.md"


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(PAGES) / 2
    for page in pages:
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(https?:[^\" >]*)", page.read_text())
        assert not loaded, page


def test_formulas_are_mathml(site):
    page = (site / "how-it-works.html").read_text()
    assert page.count("<math") > 20
    assert not re.search(r"\\[a-z(\[]", re.sub(r"<(pre|script|code).*?</\1>", "", page, flags=re.DOTALL))


def test_every_public_name_is_in_the_reference(site):
    """objects.inv lists what the reference documents, as Sphinx does: four lines of head, then a compressed table."""
    if not (Path(nabla_tau.__file__).parent / "kernels").is_dir():
        pytest.skip("an editable install, of which the reader of the sources does not find nabla_tau.kernels")
    table = zlib.decompress((site / "objects.inv").read_bytes().split(b"\n", 4)[4]).decode()
    found = {line.split()[0] for line in table.splitlines()}
    assert {f"nabla_tau.{name}" for name in nabla_tau.__all__} <= found
    for module in (membership, certified, optim):
        assert {f"{module.__name__}.{name}" for name in module.__all__} <= found
    for method in methods.METHODS.values():
        assert f"nabla_tau.methods.{type(method).__name__}" in found


def test_pictures_are_small():
    """A page is read on a phone, too; the report and the panels of two models are what they are."""
    large = {"demo.png", "time_to_forget_cpu.png"}
    for picture in (ROOT / "docs").glob("*.png"):
        assert picture.name in large or picture.stat().st_size < 100_000, picture
