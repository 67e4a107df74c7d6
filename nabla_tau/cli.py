"""The command line: `nabla-tau demo | unlearn | audit | compare | shadow | log | env`.

Exit codes are in `EXIT_CODES`; one line on standard error says what was wrong. PyTorch is loaded only once a command
runs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import os
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

TASK_HELP = "a Python file or import path that defines model(), data() and, if needed, train(), forward(), loss()"

KEY_HELP = "file of 16 secret bytes or more: fingerprints of data in the log and the card are keyed (HMAC)"

EXIT_CODES = """exit codes:
  0    done
  1    the work failed: the task's own code or PyTorch raised an error, or memory ran out
  2    wrong usage or input, or a file that cannot be read or written
  3    a loss became non-finite; the last good weights are kept
  130  interrupted
One line on standard error says what was wrong; NABLA_TAU_DEBUG=1 shows the traceback."""


class ConfigFile(ActionConfigFile):
    """A YAML file of options; whatever is wrong with it is said with its name."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        try:
            super().__call__(parser, namespace, value, option)  # type: ignore[no-untyped-call]
        except SystemExit:
            print(f"nabla-tau: the options in {value} are not taken", file=sys.stderr)
            raise
        except Exception as error:
            parser.error(f"--config {value}: {error}")


def make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="nabla-tau",
        description="Remove training data from a trained model, and show it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=importlib.metadata.version("nabla_tau"))
    commands = parser.add_subcommands(dest="command")

    def command(name: str, text: str, parent: Any = commands) -> ArgumentParser:
        sub = ArgumentParser(description=text)
        sub.add_argument("--config", action=ConfigFile, help="YAML file with any of these options")
        sub.add_argument("--json", type=Path | None, default=None, metavar="FILE", help="write the result here too")
        parent.add_subcommand(name, sub, help=text)
        return sub

    def logged(parser: ArgumentParser) -> None:
        parser.add_argument("--log", type=Path | None, default=None, metavar="FILE", help="deletion log to append to")
        parser.add_argument("--key", type=Path | None, default=None, metavar="FILE", help=KEY_HELP)

    demo = command("demo", "Train, unlearn and audit a small CNN on embedded real images (Fashion-MNIST).")
    demo.add_argument("--fraction", type=float, default=0.15, help="share of the training images to forget")
    demo.add_argument("--classes", type=int, default=0, metavar="K", help="forget K whole classes instead")
    demo.add_argument("--seed", type=int, default=0, help="of the split, the training and the unlearning")
    demo.add_argument("--shadow", type=int, default=16, metavar="N", help="shadow models for LiRA and others; 0: none")
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder of the report")

    run = command("unlearn", "Unlearn the forget set of a task; writes new weights and a JSON of what was done.")
    run.add_argument("--task", type=str, required=True, help=TASK_HELP)
    run.add_argument("--weights", type=Path, required=True, help="trained weights: .safetensors or .pt of tensors")
    run.add_argument("--out", type=Path, required=True, help="new .safetensors; an existing file is never overwritten")
    run.add_argument("--method", type=str | None, default=None, help="instead of the default: `nabla-tau env` has them")
    run.add_argument("--recipe", type=str | None, default=None, help="of nabla-tau: ascent, gentle or paper")
    run.add_argument(
        "--performance", type=str, default="auto", choices=["auto", "off"], help="off: run the model just as it is"
    )
    run.add_argument("--seed", type=int, default=0, help="of the data order and the noise")
    run.add_argument("--checkpoint", type=Path | None, default=None, help="file to go on from after an interruption")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint where there is one")
    logged(run)

    check = command("audit", "Attack a model by membership inference and write a report.")
    check.add_argument("--task", type=str, required=True, help=TASK_HELP)
    check.add_argument("--weights", type=Path, required=True, help="weights of the unlearned model")
    check.add_argument("--original", type=Path | None, default=None, help="weights before unlearning")
    check.add_argument("--retrained", type=Path, nargs="*", default=[], help="weights trained without the forget set")
    check.add_argument("--retrain", action="store_true", help="train such a model now, with train() of the task")
    check.add_argument(
        "--shadow", type=Path | None, default=None, metavar="DIR", help="attack by these shadow models too"
    )
    check.add_argument("--record", type=Path | None, default=None, help="JSON that `nabla-tau unlearn` wrote")
    check.add_argument("--out", type=Path, default=Path("report.html"), help="report; its .json is written beside it")
    check.add_argument("--card", type=Path | None, default=None, metavar="FILE.md", help="section for a model card")
    logged(check)

    many = command("compare", "Compare methods with each other and with retraining, on real data.")
    many.add_argument("--data", type=str, default="fashion_mnist", help="a suite's name, or a Python file with a SUITE")
    many.add_argument("--fraction", type=float | None, default=None, help="forget a random share, as by default .15")
    many.add_argument("--classes", type=int | None, default=None, metavar="K", help="forget K whole classes")
    many.add_argument("--half_class", action="store_true", help="forget a random half of a class")
    many.add_argument("--mislabelled", type=float | None, default=None, help="forget a share with wrong labels")
    many.add_argument("--outliers", type=int | None, default=None, metavar="N", help="forget the N hardest samples")
    many.add_argument("--methods", type=str, default="all", help="all, or names separated by commas")
    many.add_argument("--seeds", type=int, default=3, help="how many")
    many.add_argument("--shadow", type=int, default=16, metavar="N", help="shadow models for U-LiRA; 0: none")
    many.add_argument("--quick", action="store_true", help="a quarter of the samples, one seed, no U-LiRA")
    many.add_argument("--out", type=Path, default=Path("comparison.html"), help="page; figures beside it")
    many.add_argument("--cache", type=Path | None, default=None, metavar="DIR", help="where trained models are kept")

    text = "Train shadow models of a task, or score a model's samples by them: for LiRA, U-LiRA and RMIA."
    shadow = ArgumentParser(description=text)
    commands.add_subcommand("shadow", shadow, help=text)
    actions = shadow.add_subcommands(dest="action")

    many = command("train", "Train models on the retain set and a random half of the forget and unseen sets.", actions)
    many.add_argument("--task", type=str, required=True, help=TASK_HELP)
    many.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder; one begun before is gone on with")
    many.add_argument("--models", type=int, default=64, help="16 at least, 64 to 256 for a good attack")
    many.add_argument("--unlearn", type=str | None, default=None, metavar="RECIPE", help="then unlearn, for U-LiRA")
    many.add_argument("--probability", type=float, default=0.5, help="share of the models trained on a sample")
    many.add_argument("--seed", type=int, default=0, help="of the choice of samples and of every model")
    many.add_argument("--dtype", type=str, default="float32", help="of the stored scores: float32 or float16")
    many.add_argument("--n_jobs", type=int | None, default=None, help="processes of one thread each; -1: one a core")
    many.add_argument("--ensemble", action="store_true", help="without train(): AdamW on all models at once")
    many.add_argument("--epochs", type=int, default=20, help="with --ensemble")
    many.add_argument("--batch_size", type=int, default=128, help="with --ensemble")
    many.add_argument("--learning_rate", type=float, default=1e-3, help="with --ensemble")

    one = command("score", "Score a model's forget and unseen samples by shadow models.", actions)
    one.add_argument("--task", type=str, required=True, help=TASK_HELP)
    one.add_argument("--weights", type=Path, required=True, help="weights of the model to attack")
    one.add_argument("--shadow", type=Path, required=True, metavar="DIR", help="folder of `nabla-tau shadow train`")

    text = "The deletion log: an append-only file of requests and results, each line bound to the one before."
    log = ArgumentParser(description=text)
    commands.add_subcommand("log", log, help=text)
    actions = log.add_subcommands(dest="action")
    one = command("request", "Append a request to delete samples: their number and a fingerprint.", actions)
    one.add_argument("file", type=Path, help="the log")
    one.add_argument("--ids", type=Path, required=True, help="identifiers, one a line; only their fingerprint is kept")
    one.add_argument("--note", type=str | None, default=None, help="kept as it is: nothing personal")
    one.add_argument("--key", type=Path | None, default=None, metavar="FILE", help=KEY_HELP)
    one = command("show", "Print the entries of a log.", actions)
    one.add_argument("file", type=Path, help="the log")
    one = command("verify", "Check every line of a log; exit code 2 where one does not fit.", actions)
    one.add_argument("file", type=Path, help="the log")
    one.add_argument("--head", type=str | None, default=None, help="hash kept elsewhere, which must be in the log")
    one.add_argument("--repair", action="store_true", help="first put right a last line that a crash cut off")

    command("env", "Versions, devices, which kernels serve which device, threads.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a letter must not end a command
    try:
        args = make_parser().parse_args(argv)
        # OpenMP threads that spin while they wait take each other's core on a busy machine: two were five times slower
        # than one. OpenMP reads this when PyTorch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        code = _run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("nabla-tau: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Else Python would write to it once more when it exits, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("nabla-tau: standard output was closed", file=sys.stderr)
        return 2


def _run(args: Any) -> int:
    try:
        from nabla_tau.commands import COMMANDS
        from nabla_tau.result import NonFiniteLossError
    except ImportError as error:
        return _fail(error, str(error), 2)
    try:
        COMMANDS[args.command](args[args.command])
    except BrokenPipeError:
        raise
    except NonFiniteLossError as error:
        return _fail(error, str(error), 3)
    # A task that calls sys.exit() must not pass for a command that is done.
    except (Exception, SystemExit) as error:
        place = _place(error)
        if not place and isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            return _fail(error, str(error), 2)
        return _fail(error, f"{place}{type(error).__name__}: {error}", 1)
    return 0


def _place(error: BaseException) -> str:
    """File and line of the code, neither this package's nor a library's, that raised an error; empty where none did."""
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    for frame, line in reversed([*traceback.walk_tb(error.__traceback__)]):
        file = frame.f_code.co_filename
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "nabla_tau":
            return ""
        if not file.startswith((*libraries, "<")):
            return f"{file}, line {line}: "
    return ""


def _fail(error: BaseException, text: str, code: int) -> int:
    if os.environ.get("NABLA_TAU_DEBUG"):
        raise error
    print(f"nabla-tau: {text}", file=sys.stderr)
    return code
