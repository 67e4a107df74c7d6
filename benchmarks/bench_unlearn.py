"""unlearn: time to forget. How long until a model is as good as one retrained without the forget set, and stays so?

As good means: the AUC of the loss attack, forgotten against unseen samples, within .02 of the retrained model's, and
test accuracy no more than a point below it. "to forget" is the time of the first look from which on every look, to the
end of the run, finds both; empty where the run does not end so. Each model is looked at 12 times on its way with the
clock stopped; "AUC gap at" and "test accuracy gap at" are those looks, with the seconds as their note.

Providers: "retrain", training anew without the forget set, and "retrain, stopped early" at its own time to forget,
which nobody can know without having retrained; "as published", the published recipe in plain PyTorch with two
DataLoaders and two forwards a step (bench_step.as_published); nabla_tau with either recipe, all of `unlearn` included
(fingerprints, every measurement of tau). They run one after another for minutes: seconds are those of the processor,
in all threads, which at one thread is what the clock on the wall would show of an idle machine.

With few samples the AUC itself is uncertain: its standard error is .02 to .03 at 3 % of the table (150 samples) and .01
elsewhere, so that whether a run stays within .02 there is partly chance.
"""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from bench_demo import EXAMPLES
from bench_step import BATCH, Samples, as_published, published_adamw
from record import Record
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from nabla_tau import demo, unlearn
from nabla_tau.membership import roc
from nabla_tau.recipes import ASCENT, PAPER, Plan, Recipe, make_plan
from nabla_tau.suites.data import diamonds

LOOKS = 12
AUC_GAP, ACCURACY_GAP = 0.02, 0.01
RETRAIN, EARLY = "retrain", "retrain, stopped early"
Parts = dict[str, Samples]
Make = Callable[[], nn.Module]
Train = Callable[[Make, Samples, int], nn.Module]


class Look(NamedTuple):
    seconds: float
    auc: float
    accuracy: float


class Watch:
    """A clock of processor time that stands still while the model is looked at: after about LOOKS of `steps` steps of
    an optimizer, and at the end of `with`."""

    def __init__(self, parts: Parts, steps: int) -> None:
        self.parts = parts
        self.marks = {round(steps * k / LOOKS) for k in range(1, LOOKS)}
        self.model: nn.Module | None = None
        self.looks: list[Look] = []
        self.done = 0

    def watching(self, model: nn.Module) -> nn.Module:
        self.model = model
        return model

    def __enter__(self) -> Watch:
        self.aside = 0.0
        self.hook = register_optimizer_step_post_hook(self._stepped)
        self.started = time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.hook.remove()
        if exception[0] is None:
            self._look()

    def _stepped(self, *_: object) -> None:
        self.done += 1
        if self.done in self.marks:
            self._look()

    def _look(self) -> None:
        now = time.process_time()
        assert self.model is not None
        self.looks.append(Look(now - self.started - self.aside, *quality(self.model, self.parts)))
        self.aside += time.process_time() - now


def quality(model: nn.Module, parts: Parts) -> tuple[float, float]:
    """AUC of the loss attack and accuracy on unseen samples; the model's mode is left as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = {name: torch.cat([model(x) for x in parts[name][0].split(500)]) for name in ("forget", "unseen")}
    model.train(training)
    losses = torch.cat([F.cross_entropy(logits[name], parts[name][1], reduction="none") for name in logits])
    member = torch.arange(len(losses)) < len(logits["forget"])
    accuracy = (logits["unseen"].argmax(1) == parts["unseen"][1]).double().mean()
    return roc(-losses.numpy(), member.numpy()).auc, float(accuracy)


def time_to_forget(looks: list[Look], auc: float, accuracy: float) -> float | None:
    """Seconds of the first look from which on all are as good as the retrained model; None where the last is not."""
    seconds = None
    for look in reversed(looks):
        if abs(look.auc - auc) > AUC_GAP or look.accuracy < accuracy - ACCURACY_GAP:
            break
        seconds = look.seconds
    return seconds


def plan_of(recipe: Recipe, parts: Parts) -> Plan:
    forget, retain = len(parts["forget"][1]), len(parts["retain"][1])
    return make_plan(
        recipe,
        forget_batches=math.ceil(forget / recipe.batch_size),
        retain_batches=math.ceil(retain / recipe.batch_size),
        forget_count=forget,
        retain_count=retain,
        learning_rate=recipe.learning_rate or 1.0,
    )


def published(model: nn.Module, parts: Parts) -> None:
    """The published recipe as one writes it from the paper, in eval mode as nabla_tau runs it."""
    plan, optimizer = plan_of(PAPER, parts), published_adamw(model)
    now = {"alpha": 0.0, "tau": 0.0}

    def objective(forget: Tensor, retain: Tensor) -> Tensor:
        return now["alpha"] * F.relu(now["tau"] - forget) ** 2 + (1 - now["alpha"]) * retain

    step = as_published(model, parts["forget"], parts["retain"], optimizer, objective)
    for number in range(plan.steps):
        if number % plan.tau_every == 0:
            with torch.no_grad():
                batches = DataLoader(TensorDataset(*parts["held_out"]), BATCH)
                total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
            now["tau"] = total / len(parts["held_out"][1])
        now["alpha"] = plan.alpha(number)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(number)
        step()


def unlearn_quietly(model: nn.Module, parts: Parts, recipe: str, seed: int) -> None:
    data = {name: parts[name] for name in ("forget", "retain", "held_out")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a recipe fails to do is what is measured
        unlearn(model, **data, recipe=recipe, seed=seed, inplace=True)


class Workload(NamedTuple):
    """steps: of a training on so many samples."""

    name: str
    make: Make
    train: Train
    steps: Callable[[int], int]
    split: Callable[[float, int], Parts]
    seeds: tuple[int, ...]


def images() -> Workload:
    def train(make: Make, data: Samples, seed: int) -> nn.Module:
        with mock.patch.object(demo, "small_cnn", make):
            return demo.train_cnn(data, seed=seed)

    return Workload(
        "CNN, Fashion-MNIST",
        demo.small_cnn,
        train,
        lambda count: demo.EPOCHS * math.ceil(count / demo.BATCH),
        lambda fraction, seed: demo.split(seed, fraction, 0),
        (0,),
    )


def table() -> Workload:
    """examples/tabular.py: 5,000 diamonds, 80 epochs."""
    sys.path.insert(0, str(EXAMPLES))
    import tabular
    import training

    data = diamonds()

    def train(make: Make, samples: Samples, seed: int) -> nn.Module:
        return training.fit(make, samples, F.cross_entropy, epochs=80, seed=seed)[0]

    def split(fraction: float, seed: int) -> Parts:
        parts = training.split(data, train=5_000, held_out=1_250, unseen=2_500, fraction=fraction, seed=seed)
        return {name: part for name, part in parts.items() if name != "train"}

    return Workload(
        "MLP, diamonds", tabular.make_model, train, lambda count: 80 * math.ceil(count / 128), split, (0, 1, 2)
    )


def measure(work: Workload, original: nn.Module, parts: Parts, seed: int) -> dict[str, list[Look]]:
    """Looks of each provider, the first at the original model (a new one for "retrain")."""
    found: dict[str, list[Look]] = {}
    with Watch(parts, work.steps(len(parts["retain"][1]))) as watch:
        work.train(lambda: watch.watching(work.make()), parts["retain"], seed + 1)
    found[RETRAIN] = watch.looks
    before = Look(0.0, *quality(original, parts))
    ways: dict[str, tuple[Recipe, Callable[[nn.Module], None]]] = {
        "as published": (PAPER, lambda model: published(model, parts)),
        "nabla_tau, paper": (PAPER, lambda model: unlearn_quietly(model, parts, "paper", seed)),
        "nabla_tau": (ASCENT, lambda model: unlearn_quietly(model, parts, "ascent", seed)),
    }
    for name, (recipe, way) in ways.items():
        torch.manual_seed(seed)
        watch = Watch(parts, plan_of(recipe, parts).steps)
        model = watch.watching(copy.deepcopy(original))
        with watch:
            way(model)
        found[name] = [before, *watch.looks]
    return found


def records_of(found: dict[str, list[Look]], case: str, device: str, threads: int) -> Iterator[Record]:
    same = {"bench": "unlearn", "device": device, "dtype": "float32", "threads": threads}
    retrained = found[RETRAIN][-1]
    forgot = {name: time_to_forget(looks, retrained.auc, retrained.accuracy) for name, looks in found.items()}
    seconds = {RETRAIN: retrained.seconds, EARLY: forgot.pop(RETRAIN)} | forgot
    for name, value in seconds.items():
        end = found[RETRAIN if name == EARLY else name][-1]
        gaps = f"AUC gap {end.auc - retrained.auc:+.4f}, test {100 * (end.accuracy - retrained.accuracy):+.1f} points"
        yield Record(
            case=f"{case}, to forget",
            provider=name,
            p50=value,
            unit="s",
            baseline=RETRAIN if value else "",
            ratio=value and retrained.seconds / value,
            note=f"whole run {end.seconds:.2f} s, at its end {gaps}",
            **same,
        )
    for name, looks in found.items():
        for look in looks:
            for what, value, unit in (
                ("AUC gap", look.auc - retrained.auc, "AUC"),
                ("test accuracy gap", look.accuracy - retrained.accuracy, "rate"),
            ):
                note = f"{look.seconds:.3f} s"
                yield Record(case=f"{case}, {what} at", provider=name, p50=value, unit=unit, note=note, **same)


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    if device != "cpu":
        raise SystemExit("unlearn: measured on the CPU only, as the demo and the example train there")
    for work in (table(),) if quick else (table(), images()):
        for seed in work.seeds[: 1 if quick else None]:
            original = None
            for fraction in (0.15,) if quick else (0.03, 0.15, 0.30):
                parts = work.split(fraction, seed)
                if original is None:  # the first samples of one order are forgotten: training on all is the same
                    everything = tuple(torch.cat(pair) for pair in zip(parts["forget"], parts["retain"], strict=True))
                    original = work.train(work.make, everything, seed)
                case = f"{work.name}, {fraction:.0%}, seed {seed}"
                yield from records_of(measure(work, original, parts, seed), case, device, threads)
