"""The command line: `nabla-tau demo | unlearn | audit | env`.

Exit codes: 0 done, 2 bad input (one line on standard error says what), 3 a run that stopped on a non-finite loss.
Set NABLA_TAU_DEBUG=1 for the traceback of an error. PyTorch is loaded only once a command runs.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

TASK_HELP = "a Python file or import path that defines model(), data() and, if needed, train(), forward(), loss()"


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="nabla-tau", description="Remove training data from a trained model, and show it.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("nabla_tau"))
    commands = parser.add_subcommands(dest="command")

    def command(name: str, text: str) -> ArgumentParser:
        sub = ArgumentParser(description=text)
        sub.add_argument("--config", action="config", help="YAML file with any of these options")
        sub.add_argument("--json", type=Path | None, default=None, metavar="FILE", help="write the result here too")
        commands.add_subcommand(name, sub, help=text)
        return sub

    demo = command("demo", "Train, unlearn and audit a small CNN on embedded real images (Fashion-MNIST).")
    demo.add_argument("--fraction", type=float, default=0.15, help="share of the training images to forget")
    demo.add_argument("--classes", type=int, default=0, metavar="K", help="forget K whole classes instead")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the training and the unlearning")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder of the report")

    run = command("unlearn", "Unlearn the forget set of a task; writes new weights and a JSON of what was done.")
    run.add_argument("--task", type=str, required=True, help=TASK_HELP)
    run.add_argument("--weights", type=Path, required=True, help="trained weights: .safetensors or .pt of tensors")
    run.add_argument("--out", type=Path, required=True, help="new .safetensors; an existing file is never overwritten")
    run.add_argument("--recipe", type=str, default="default", help="default or paper")
    run.add_argument("--seed", type=int, default=0, help="of the data order and the noise")
    run.add_argument("--checkpoint", type=Path | None, default=None, help="file to go on from after an interruption")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint where there is one")

    check = command("audit", "Attack a model by membership inference and write a report.")
    check.add_argument("--task", type=str, required=True, help=TASK_HELP)
    check.add_argument("--weights", type=Path, required=True, help="weights of the unlearned model")
    check.add_argument("--original", type=Path | None, default=None, help="weights before unlearning")
    check.add_argument("--retrained", type=Path, nargs="*", default=[], help="weights trained without the forget set")
    check.add_argument("--retrain", action="store_true", help="train such a model now, with train() of the task")
    check.add_argument("--record", type=Path | None, default=None, help="JSON that `nabla-tau unlearn` wrote")
    check.add_argument("--out", type=Path, default=Path("report.html"), help="report; its .json is written beside it")

    command("env", "Versions, devices, which kernels serve which device, threads.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    # OpenMP threads that spin while they wait take each other's core on a busy machine: two were five times slower
    # than one. OpenMP reads this when PyTorch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        from nabla_tau.commands import COMMANDS
        from nabla_tau.result import NonFiniteLossError
    except ImportError as error:
        return _fail(error, 2)
    try:
        COMMANDS[args.command](args[args.command])
    except NonFiniteLossError as error:
        return _fail(error, 3)
    except (ValueError, TypeError, OSError, ImportError) as error:
        return _fail(error, 2)
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(error: Exception, code: int) -> int:
    if os.environ.get("NABLA_TAU_DEBUG"):
        raise error
    print(f"nabla-tau: {error}", file=sys.stderr)
    return code
