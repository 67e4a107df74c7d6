"""Commands as a user types them, in this process: what they return and say, and that a refusal changes no file."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from nabla_tau.cli import main

TASK = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def data():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (120,), generator=generator)
    x = torch.eye(4)[y] + 0.7 * torch.randn(120, 4, generator=generator)
    cut = dict(forget=slice(0, 20), retain=slice(20, 60), held_out=slice(60, 80), unseen=slice(80, 120))
    return {name: (x[part], y[part]) for name, part in cut.items()}

def train(model, data):
    pass
"""


def files(folder: Path) -> dict[Path, bytes | None]:
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.read_bytes() if path.is_file() else None for path in found}


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and standard error."""
    said = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            code: object = main([*map(str, arguments)])
        except SystemExit as error:  # as argparse ends a command
            code = error.code
    assert isinstance(code, int)
    return code, said.getvalue().strip()


def refused(*arguments: object, code: int = 2) -> str:
    """What is said of arguments that cannot be served: the last line, without a traceback, every file as it was."""
    before = files(Path.cwd())
    found, said = run(*arguments)
    assert found == code, f"{arguments}: exit code {found}, {said}"
    assert said, f"{arguments}: nothing is said"
    assert "Traceback" not in said
    assert files(Path.cwd()) == before, f"{arguments}: files were changed"
    return said
