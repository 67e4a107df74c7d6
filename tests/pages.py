"""The README and the pages of the documentation as tests see them: blocks of Python that go on from one another, and
commands."""

from __future__ import annotations

import ast
import re
import shlex
import symtable
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ *(nabla-tau (?:.*\\\n)*.*)$", re.MULTILINE)
# What a block may import and a machine need not have.
OPTIONAL = {"lightning", "mlflow", "peft", "tensorboard", "trackio", "transformers", "wandb"}


@dataclass(frozen=True)
class Block:
    line: int
    code: str

    @property
    def packages(self) -> list[str]:
        """Those of the optional packages that it imports."""
        nodes = list(ast.walk(ast.parse(self.code)))
        modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        return sorted(OPTIONAL & {part for module in modules for part in module.split(".")})

    @property
    def bound(self) -> set[str]:
        """Names that it gives to the blocks after it."""
        top = symtable.symtable(self.code, "block", "exec")
        return {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}

    @property
    def read(self) -> set[str]:
        """Names that it, or a function in it, takes from the blocks before it."""
        found, tables = set(), [symtable.symtable(self.code, "block", "exec")]
        for table in tables:
            own = table.get_type() == "module"
            found |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (own or s.is_global())}
            tables += table.get_children()
        return found - self.bound


def blocks_of(page: Path, language: str = "python") -> list[Block]:
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match[2] == language]
    assert not any(match[1] for match in found), f"{page}: a block that is indented is not run"
    return [Block(text[: match.start(3)].count("\n") + 1, match[3]) for match in found]


def commands_of(page: Path) -> Iterator[list[str]]:
    """What follows `nabla-tau`, in fenced and in indented blocks."""
    for match in COMMAND.finditer(page.read_text()):
        yield shlex.split(match[1].replace("\\\n", " "), comments=True)[1:]


@dataclass
class Session:
    """The blocks of a page, run in their order in one namespace, each when it is asked for. absent: names that no block
    could bind, and why."""

    page: Path
    folder: Path
    names: dict[str, Any]
    absent: dict[str, str] = field(default_factory=dict)
    outcomes: list[BaseException | None] = field(default_factory=list)

    def run(self, number: int) -> None:
        """Raise what block `number` raised, after those before it have run."""
        for block in blocks_of(self.page)[len(self.outcomes) : number + 1]:
            self.outcomes.append(self._outcome(block))
        outcome = self.outcomes[number]
        if outcome is not None:
            raise outcome

    def _outcome(self, block: Block) -> BaseException | None:
        try:
            for package in block.packages:
                pytest.importorskip(package)
            for name in sorted(block.read & self.absent.keys()):
                pytest.skip(f"{name}: {self.absent[name]}")
            # Empty lines before it, so that a traceback names the line of the page.
            code = compile("\n" * (block.line - 1) + block.code, str(self.page), "exec")
            exec(code, self.names)
        except pytest.skip.Exception as skipped:
            self.absent |= dict.fromkeys(block.bound, f"of the block at line {block.line}, which was skipped")
            return skipped
        except Exception as error:
            return error
        for name in block.bound:
            self.absent.pop(name, None)
        return None
