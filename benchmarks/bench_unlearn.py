"""unlearn: time to forget. How long until a model is as good as one retrained without the forget set, and stays so?

As good means: the AUC of the loss attack, forgotten against unseen samples, within .02 of the retrained model's, and
test accuracy no more than a point below it. "to forget" is the time of the first look from which on every look, to the
end of the run, finds both; empty where the run does not end so. Each model is looked at 12 times on its way with the
clock stopped; "AUC gap at" and "test accuracy gap at" are those looks, with the seconds as their note. What it is like
in the end is said by "at the end": accuracies, and the attacks, forgotten against unseen.

Providers: "retrain", training anew without the forget set, and "retrain, stopped early" at its own time to forget,
which nobody can know without having retrained; "as published", the published recipe in plain PyTorch with two
DataLoaders and two forwards a step (bench_step.as_published); "nabla_tau", `unlearn` as it is by itself, and its
recipes "ascent" and "paper", all of `unlearn` included (fingerprints, every measurement of tau), each after a run that
is not timed and tells how many steps there are. They run one after another for minutes: on the CPU seconds are those of
the processor, in all threads, which at one thread is what the clock on the wall would show of an idle machine; looks
hang on a hook of all optimizers there, with which "nabla_tau" takes the steps of torch.optim, not its own quicker ones,
so that its times are upper bounds. On a GPU they are those of the clock on the wall, and peak_mb is what a run has
allocated beyond the data and the models that were there, without the own memory of CUDA graphs.

With few samples the AUC itself is uncertain: its standard error is .02 to .03 at 3 % of the table (150 samples) and .01
elsewhere, so that whether a run stays within .02 there is partly chance.

On the CPU the demo's CNN and the table of examples/tabular.py. On a GPU the setting of the paper: CIFAR-10 (here a JPEG
copy, from $NABLA_TAU_DATA), ResNet-18 with the stem for larger images, trained from scratch for 50 epochs, SGD .1, .9
and 5e-4, no augmentation; half of the test images are held out, the others unseen; 3, 15 and 30 % and one class. All
that it trains by itself runs as the best plain PyTorch does: batches gathered on the device, channels_last, bfloat16
autocast, fused SGD. paper: the same on the CPU with a tenth of the images, 15 % forgotten; forty minutes.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from bench_step import BATCH, as_published, published_adamw
from record import Record
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset
from workloads import Workload, images, on_cifar10, table

from nabla_tau import unlearn
from nabla_tau.history import Log
from nabla_tau.membership import roc
from nabla_tau.recipes import PAPER, Plan, make_plan
from nabla_tau.suites.measures import answers
from nabla_tau.suites.scenarios import Parts, Scenario

LOOKS = 12
AUC_GAP, ACCURACY_GAP = 0.02, 0.01
ORIGINAL, RETRAIN, EARLY = "original", "retrain", "retrain, stopped early"
RECIPES: dict[str, str | None] = {"nabla_tau, paper": "paper", "nabla_tau, ascent": "ascent", "nabla_tau": None}
AT_THE_END = ("auc_loss", "mia_loss", "mia_entropy")
AT_THE_END += ("forget_accuracy", "retain_accuracy", "test_accuracy", "alike_accuracy")


class Look(NamedTuple):
    seconds: float
    auc: float
    accuracy: float


class Found(NamedTuple):
    """end: of `AT_THE_END`. peak_mb: on a GPU."""

    looks: list[Look]
    end: dict[str, float | None]
    peak_mb: float | None = None


class Watch:
    """A clock that stands still while the model is looked at: after about LOOKS of `steps` steps, and at the end of
    `with`. Steps are those of an optimizer; not `hooked`, of whoever calls `stepped`."""

    def __init__(self, parts: Parts, steps: int, device: str = "cpu", *, hooked: bool = True) -> None:
        self.parts, self.device, self.hooked = parts, device, hooked
        self.marks = {round(steps * k / LOOKS) for k in range(1, LOOKS)}
        self.model: nn.Module | None = None
        self.looks: list[Look] = []
        self.peak_mb: float | None = None
        self.done = 0

    def watching(self, model: nn.Module) -> nn.Module:
        self.model = model
        return model

    def __enter__(self) -> Watch:
        self.aside = 0.0
        if self.hooked:
            self.hook = register_optimizer_step_post_hook(self.stepped)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        self.started = self._now()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.hooked:
            self.hook.remove()
        if exception[0] is None:
            if self.device == "cuda":
                self.peak_mb = (torch.cuda.max_memory_allocated() - self.before) / 1e6
            self._look()

    def stepped(self, *_: object) -> None:
        self.done += 1
        if self.done in self.marks:
            self._look()

    def _now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _look(self) -> None:
        now = self._now()
        assert self.model is not None
        self.looks.append(Look(now - self.started - self.aside, *quality(self.model, self.parts)))
        self.aside += self._now() - now


def quality(model: nn.Module, parts: Parts) -> tuple[float, float]:
    """AUC of the loss attack and test accuracy; the model's mode is left as it was."""
    training = model.training
    model.eval()
    with torch.no_grad():
        forget, unseen, test = (
            torch.cat([model(x) for x in part[0].split(500)]) for part in (parts.forget, parts.unseen, parts.test)
        )
    model.train(training)
    of_parts = (forget, parts.forget[1]), (unseen, parts.unseen[1])
    losses = [F.cross_entropy(*part, reduction="none").cpu().numpy() for part in of_parts]
    member = np.repeat([True, False], [len(of) for of in losses])
    accuracy = (test.argmax(1) == parts.test[1]).double().mean()
    return roc(-np.concatenate(losses), member).auc, float(accuracy)


def time_to_forget(looks: list[Look], auc: float, accuracy: float) -> float | None:
    """Seconds of the first look from which on all are as good as the retrained model; None where the last is not."""
    seconds = None
    for look in reversed(looks):
        if abs(look.auc - auc) > AUC_GAP or look.accuracy < accuracy - ACCURACY_GAP:
            break
        seconds = look.seconds
    return seconds


def published(model: nn.Module, parts: Parts, plan: Plan) -> None:
    """The published recipe as one writes it from the paper, in eval mode as nabla_tau runs it."""
    optimizer, device = published_adamw(model), parts.retain[0].device
    now = {"alpha": 0.0, "tau": 0.0}

    def objective(forget: Tensor, retain: Tensor) -> Tensor:
        return now["alpha"] * F.relu(now["tau"] - forget) ** 2 + (1 - now["alpha"]) * retain

    # Batches of a data set come from the host, as a DataLoader's do.
    forget, retain, held_out = (tuple(t.cpu() for t in part) for part in (parts.forget, parts.retain, parts.held_out))
    step = as_published(model, forget, retain, optimizer, objective)
    for number in range(plan.steps):
        if number % plan.tau_every == 0:
            with torch.no_grad():
                batches = ([t.to(device) for t in batch] for batch in DataLoader(TensorDataset(*held_out), BATCH))
                total = sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y in batches)
            now["tau"] = total / len(held_out[1])
        now["alpha"] = plan.alpha(number)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(number)
        step()


def plan_of_paper(parts: Parts) -> Plan:
    forget, retain = len(parts.forget[1]), len(parts.retain[1])
    return make_plan(
        PAPER,
        forget_batches=-(-forget // PAPER.batch_size),
        retain_batches=-(-retain // PAPER.batch_size),
        forget_count=forget,
        retain_count=retain,
        learning_rate=PAPER.learning_rate or 1.0,
    )


def unlearn_quietly(model: nn.Module, parts: Parts, recipe: str | None, seed: int, log: Log | None = None) -> int:
    """Steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what a recipe fails to do is what is measured
        given = {"forget": parts.forget, "retain": parts.retain, "held_out": parts.held_out}
        result = unlearn(model, **given, recipe=recipe, seed=seed, inplace=True, log=log)
    return len(result.history["step"])


def measure(work: Workload, original: nn.Module, parts: Parts, seed: int) -> dict[str, Found]:
    """What each provider came to, with looks on the way, the first at the original model (a new one for "retrain")."""
    device = parts.train[0].device.type

    def ends(watch: Watch, *before: Look) -> Found:
        assert watch.model is not None
        return Found([*before, *watch.looks], at_the_end(watch.model, parts), watch.peak_mb)

    with Watch(parts, work.steps(len(parts.retain[1])), device) as watch:
        work.train(lambda: watch.watching(work.make()), parts.retain, seed + 1)
    before = Look(0.0, *quality(original, parts))
    found = {ORIGINAL: Found([before], at_the_end(original, parts)), RETRAIN: ends(watch)}
    plan = plan_of_paper(parts)
    with Watch(parts, plan.steps, device) as watch:
        torch.manual_seed(seed)
        published(watch.watching(copy.deepcopy(original)), parts, plan)
    found["as published"] = ends(watch, before)
    for name, recipe in RECIPES.items():
        steps = unlearn_quietly(copy.deepcopy(original), parts, recipe, seed)  # how many, and to warm up
        watch = Watch(parts, steps, device, hooked=device == "cpu")
        model = watch.watching(copy.deepcopy(original))
        with watch:  # a hook would be felt by steps that are captured; what is logged there comes in bursts
            unlearn_quietly(model, parts, recipe, seed, None if watch.hooked else watch.stepped)
        found[name] = ends(watch, before)
    return found


def at_the_end(model: nn.Module, parts: Parts) -> dict[str, float | None]:
    end = answers(model, parts)
    return {name: getattr(end, name) for name in AT_THE_END}


def records_of(found: Mapping[str, Found], case: str, device: str, threads: int) -> Iterator[Record]:
    same = {"bench": "unlearn", "device": device, "dtype": "float32", "threads": threads}
    retrained = found[RETRAIN].looks[-1]
    forgot = {
        name: time_to_forget(of.looks, retrained.auc, retrained.accuracy)
        for name, of in found.items()
        if name != ORIGINAL
    }
    seconds = {RETRAIN: retrained.seconds, EARLY: forgot.pop(RETRAIN)} | forgot
    for name, value in seconds.items():
        of = found[RETRAIN if name == EARLY else name]
        end = of.looks[-1]
        gaps = f"AUC gap {end.auc - retrained.auc:+.4f}, test {100 * (end.accuracy - retrained.accuracy):+.1f} points"
        yield Record(
            case=f"{case}, to forget",
            provider=name,
            p50=value,
            unit="s",
            baseline=RETRAIN if value else "",
            ratio=value and retrained.seconds / value,
            peak_mb=of.peak_mb,
            note=f"whole run {end.seconds:.2f} s, at its end {gaps}",
            **same,
        )
    for name, of in found.items():
        for look in of.looks if name != ORIGINAL else []:
            for what, value, unit in (
                ("AUC gap", look.auc - retrained.auc, "AUC"),
                ("test accuracy gap", look.accuracy - retrained.accuracy, "rate"),
            ):
                note = f"{look.seconds:.3f} s"
                yield Record(case=f"{case}, {what} at", provider=name, p50=value, unit=unit, note=note, **same)
    for name, of in found.items():
        for what, value in of.end.items():
            unit = "AUC" if what.startswith("auc") else "rate"
            yield Record(case=f"{case}, {what} at the end", provider=name, p50=value, unit=unit, **same)


def run(device: str, threads: int, quick: bool) -> Iterator[Record]:
    if device == "cuda":
        every = [on_cifar10(device, epochs=2, every=20) if quick else on_cifar10(device)]
    else:
        every = [table()] if quick else [table(), images()]
    for work in every:
        yield from measured(work, device, threads, quick)


def paper(device: str, threads: int, quick: bool) -> Iterator[Record]:
    work = on_cifar10(device, epochs=2, every=200) if quick else on_cifar10(device, every=10)
    only = work._replace(name="ResNet-18, a tenth of CIFAR-10 (JPEG)", forgotten=(Scenario("random", 0.15),))
    yield from measured(only, device, threads, quick)


def measured(work: Workload, device: str, threads: int, quick: bool) -> Iterator[Record]:
    for seed in work.seeds[: 1 if quick else None]:
        original = None
        for what in work.forgotten[: 1 if quick else None]:
            parts = work.split(what, seed)
            if original is None:
                original = work.train(work.make, parts.train, seed)
            case = f"{work.name}, {name_of(what)}, seed {seed}"
            yield from records_of(measure(work, original, parts, seed), case, device, threads)


def name_of(what: Scenario) -> str:
    return f"{what.amount:.0%}" if what.kind == "random" else "one class"
