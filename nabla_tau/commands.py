"""What each command of the CLI does, once its options are parsed."""

from __future__ import annotations

import itertools
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import nn

from nabla_tau import _C
from nabla_tau._library import CPP_DTYPES, has_triton
from nabla_tau.auditing import AuditReport, audit
from nabla_tau.checkpoint import check_writable, sha256, write_atomic
from nabla_tau.demo import run_demo
from nabla_tau.log_commands import open_log, read_key, run_log
from nabla_tau.loop import unlearn
from nabla_tau.methods import METHODS
from nabla_tau.outputs import check_json, check_outputs, read_json, write_json
from nabla_tau.performance import autocast_dtype
from nabla_tau.provenance import versions
from nabla_tau.recipes import RECIPES
from nabla_tau.result import NonFiniteLossError, UnlearnResult
from nabla_tau.shadow_commands import run_shadow
from nabla_tau.suites.runs import ALL, compare_methods, load_suite, quick
from nabla_tau.suites.scenarios import Kind, Scenario
from nabla_tau.task import Task, load_task
from nabla_tau.weights import check_new_weights, load_weights, save_weights


def demo(args: Namespace) -> None:
    """Writes over what an earlier demo left, and only over that."""
    check_json(args.json)
    for path in filter(None, (args.out / "report.html", args.json)):
        check_writable(path)
    report = run_demo(fraction=args.fraction, classes=args.classes, seed=args.seed, shadows=args.shadow, progress=True)
    args.out.mkdir(parents=True, exist_ok=True)
    _give_report(report, args.out / "report.html", args.json)


def _give_report(report: AuditReport, html: Path, json_file: Path | None) -> None:
    report.save(html.with_suffix(".json"))
    if json_file is not None:
        report.save(json_file)
    report.save(html)
    print(report.table())
    print(f"\nreport: {html}")


def run_unlearn(args: Namespace) -> None:
    check_json(args.json)
    check_new_weights(args.out)
    read = [args.weights, args.checkpoint, Path(args.task), args.log, args.key]
    check_outputs([args.out, _record_path(args.out), args.json], read)
    log = open_log(args.log, args.key)
    task = load_task(args.task)
    model = task.new_model()
    load_weights(model, args.weights)
    sets = task.require("forget", "retain", "held_out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they are in the result, and printed below
            result = unlearn(
                model,
                **sets,
                method=args.method,
                recipe=args.recipe,
                performance=args.performance,
                forward=task.forward,
                loss=task.loss,
                seed=args.seed,
                inplace=True,
                checkpoint=args.checkpoint,
                resume=args.resume,
                progress=True,
            )
    except NonFiniteLossError as error:
        _rescue(error.result.model, args.out.with_suffix(".last-good.safetensors"), "last good weights")
        raise
    try:
        save_weights(result.model, args.out)
    except OSError:
        # The run may have taken hours: its weights go wherever there is room for them.
        _rescue(result.model, args.out, "unlearned weights")
        raise
    record = _record(args, result)
    write_json(record, _record_path(args.out))
    if args.json is not None:
        write_json(record, args.json)
    # First the log, then words: a reader of standard output who has gone away must not cost the entry.
    head = None if log is None else log.result(record)
    _print_result(result, args.out)
    if head is not None:
        print(f"log:     {args.log}, head {head}")


def _rescue(model: nn.Module, wanted: Path, what: str) -> None:
    """Write weights beside the output or, where that fails, in the folder for temporary files, and say where they are.
    Never raises OSError: what led here is what there is to report."""
    failed = OSError()
    for folder in (wanted.parent, Path(tempfile.gettempdir())):
        path = _free_name(folder / wanted.name)
        try:
            save_weights(model, path)
        except OSError as error:
            failed = error
        else:
            print(f"{what}: {path}", file=sys.stderr)
            return
    print(f"{what} are lost: {failed}", file=sys.stderr)


def _free_name(path: Path) -> Path:
    """The path, or the first of path-2, path-3, ... that does not exist: a rescue must not fail on an earlier one."""
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(2))
    return next(name for name in itertools.chain([path], numbered) if not name.exists())


def _record_path(weights: Path) -> Path:
    return weights.with_suffix(".json")


def _record(args: Namespace, result: UnlearnResult) -> dict[str, Any]:
    return result.to_dict() | {
        "task": args.task,
        "input": {"path": str(args.weights), "sha256": sha256(args.weights)},
        "output": {"path": str(args.out), "sha256": sha256(args.out)},
    }


def _print_result(result: UnlearnResult, out: Path) -> None:
    settings = result.settings
    how = f"method {result.method}" if result.method == result.recipe else f"recipe {result.recipe}"
    forwards = f", {settings['forwards']}" if "forwards" in settings else ""
    print(f"{how}: {settings['steps']} steps in {result.seconds:.1f} s{forwards}")
    classes = f" {list(result.removed_classes)}" if result.removed_classes else ""
    print(f"forget set: {result.counts['forget']} samples, {settings['forget_kind']}{classes}")
    for name, key in (("forget loss", "forget_loss"), ("held-out loss", "tau")):
        print(f"mean {name:<13} {settings[key + '_before']:8.4f} -> {settings[key + '_after']:8.4f}")
    for message in result.warnings:
        print(f"warning: {message}")
    print(f"weights: {out}\nrecord:  {_record_path(out)}")


def run_audit(args: Namespace) -> None:
    check_json(args.json)
    if args.out.suffix != ".html":
        raise ValueError(f"--out writes a .html file (and a .json beside it), got {args.out}")
    if args.card is not None and args.card.suffix != ".md":
        raise ValueError(f"--card writes a .md file, got {args.card}")
    read = [args.weights, args.original, *args.retrained, args.record, Path(args.task), args.log, args.key]
    check_outputs([args.out, args.out.with_suffix(".json"), args.json, args.card], read)
    log = open_log(args.log, args.key)
    record = None if args.record is None else read_json(args.record)
    task = load_task(args.task)
    sets = task.require("forget", "unseen") | {"retain": task.data.get("retain")}

    def loaded(path: Path) -> nn.Module:
        model = task.new_model()
        load_weights(model, path)
        return model

    model, retrained = loaded(args.weights), [loaded(path) for path in args.retrained]
    original = None if args.original is None else loaded(args.original)
    if args.retrain:
        retrained.append(_retrain(task))
    report = audit(
        model,
        **sets,
        original=original,
        retrained=retrained or None,
        shadow=args.shadow,
        forward=task.forward,
        loss=task.loss,
        record=record,
        progress=True,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.card is not None:
        write_atomic(args.card, report.model_card(key=read_key(args.key)).encode())
    head = None if log is None else log.audit(report)
    _give_report(report, args.out, args.json)
    if args.card is not None:
        print(f"card:   {args.card}")
    if head is not None:
        print(f"log:    {args.log}, head {head}")


def _retrain(task: Task) -> nn.Module:
    if task.train is None:
        raise ValueError("--retrain needs train(model, data) in the task")
    model = task.new_model()
    trained = task.train(model, task.require("retain")["retain"])
    return trained if isinstance(trained, nn.Module) else model


def _autocasts() -> list[str]:
    """Devices on which float32 models run under autocast."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [f"bfloat16 on {name}" for name in devices if autocast_dtype(nn.Linear(1, 1, device=name)) is not None]


def compare(args: Namespace) -> None:
    """Writes over what an earlier comparison left: its models and finished rows are in the cache."""
    check_json(args.json)
    if args.out.suffix != ".html":
        raise ValueError(f"--out writes a .html file (and others beside it), got {args.out}")
    outputs = [args.out.with_suffix(suffix) for suffix in (".html", ".csv", ".png", ".json")]
    for path in filter(None, (*outputs, args.json)):
        check_writable(path)
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    suite = load_suite(args.data)
    table = compare_methods(
        quick(suite) if args.quick else suite,
        _scenario(args),
        methods=ALL if args.methods == "all" else tuple(args.methods.split(",")),
        seeds=range(1 if args.quick else args.seeds),
        shadows=0 if args.quick else args.shadow,
        cache=args.cache,
        progress=True,
    )
    for path in filter(None, (*outputs, args.json)):
        table.save(path)
    print(table.table())
    print(f"\nreport: {args.out}")


def _scenario(args: Namespace) -> Scenario:
    given: dict[Kind, float | None] = {
        "random": args.fraction,
        "classes": args.classes,
        "half a class": 0 if args.half_class else None,
        "mislabelled": args.mislabelled,
        "outliers": args.outliers,
    }
    found = [Scenario(kind, amount) for kind, amount in given.items() if amount is not None]
    if len(found) > 1:
        raise ValueError(f"one thing is forgotten in a comparison, got {' and '.join(map(str, found))}")
    return found[0] if found else Scenario("random", 0.15)


def _captures() -> str:
    """Where steps are captured in CUDA graphs."""
    count = torch.cuda.device_count()
    return ", ".join(f"cuda:{i}" for i in range(count)) or "nowhere: no GPU"


def env(args: Namespace) -> None:
    check_json(args.json)
    check_outputs([args.json], [])
    devices = ["cpu", *(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count()))]
    cpp = ", ".join(str(dtype).removeprefix("torch.") for dtype in CPP_DTYPES)
    environment = {
        "versions": versions(),
        "devices": devices,
        "kernels": {
            "cpu": f"C++ ({_C.simd_level()}) for {cpp}",
            "cuda": "Triton" if has_triton() else "plain PyTorch: Triton is not installed",
            "other devices": "plain PyTorch (nabla_tau.kernels.reference)",
        },
        "performance": {
            "auto": "frozen BatchNorm folded, pooling before ReLU, channels_last, fused AdamW",
            "step graphs": _captures(),
            "data": "on a GPU where it fits in a quarter of its free memory, else prefetched; mapped files prefetched",
            "autocast": ", ".join(_autocasts()) or "none: no GPU with bfloat16",
        },
        "threads": {"torch": torch.get_num_threads(), "openmp": _C.openmp_max_threads()},
        "recipes": {name: repr(recipe) for name, recipe in RECIPES.items()},
        "methods": {name: repr(method) for name, method in METHODS.items()},
    }
    if args.json is not None:
        write_json(environment, args.json)
    for title, values in environment.items():
        print(title)
        pairs = values.items() if isinstance(values, dict) else ((value, "") for value in values)
        for name, value in pairs:
            print(f"  {name:<16} {value}".rstrip())


COMMANDS = {
    "demo": demo,
    "unlearn": run_unlearn,
    "audit": run_audit,
    "compare": compare,
    "shadow": run_shadow,
    "log": run_log,
    "env": env,
}
