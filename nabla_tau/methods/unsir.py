"""UNSIR: whole classes are forgotten by noise that is learned as if it were of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nabla_tau.batch import split_targets
from nabla_tau.distributed import unwrapped
from nabla_tau.functional import row_losses
from nabla_tau.methods.mixture import parts_of_batch
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term


@dataclass(frozen=True)
class UNSIR:
    """Whole classes alone, in three parts (Tarun et al. 2023, arXiv 2111.08947): for each class y noise inputs x that
    maximise the error, min over x of -mean l(x, y) + penalty mean |x|^2 on the original model, by Adam; *impair*: min
    mean l over that noise, labelled y, `copies` times, and `per_class` retained samples for each class that stays;
    *repair*: min mean l over as many retained samples. Adam with a learning rate of its own for each, one pass, train
    mode.

    The inputs must be one floating tensor. The noise is learned in eval mode, so that no statistics of it are left in
    normalisation layers; a label of its own class each (the public notebook labels all of it as class 0). The retained
    samples are drawn from all, not class by class. The published learning rates are large for Adam: a model that is no
    small convolutional network may not recover in the one pass of repair.
    """

    noise_samples: int = 256
    noise_steps: int = 40
    noise_learning_rate: float = 0.1
    penalty: float = 0.1
    copies: int = 20
    per_class: int = 1000
    impair_learning_rate: float = 0.02
    repair_learning_rate: float = 0.01
    batch_size: int = 256
    name: str = "unsir"

    def stages(self, setup: Setup) -> list[Stage]:
        setup.refuse(self.name, sharded_model="its noise is learned on the whole of it")
        kind, classes = setup.job.data.kind, setup.classes(self.name)
        if kind.kind != "whole classes":
            raise ValueError(f"{self.name} forgets whole classes, and this forget set is a {kind.kind}")
        noise, labels = self._noise(setup, kind.removed)
        copied, count = self.copies * len(noise), setup.job.data.counts["retain"]
        retained = min(count, self.per_class * (classes - len(kind.removed)))
        share = copied / (copied + retained)
        size = min(self.batch_size, count)
        own, others = parts_of_batch(size, share)
        others = min(others, count)

        def impair(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            rows = torch.randint(len(noise), (own,), generator=setup.generator(1 + step))
            rows = rows[setup.job.ranks.share.of(own)]
            mine = (noise[rows].to(setup.device), labels[rows].to(setup.device))
            return [
                Term("forget_term", mine, weight=share),
                Term("retain_term", retain.batch, weight=1 - share),
            ]

        def repair(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [Term("retain_term", retain.batch)]

        def pass_of(retain_size: int) -> int:
            return max(1, round(setup.batches_per_pass("retain", retain_size) * retained / count))

        rates = self.impair_learning_rate, self.repair_learning_rate
        impairing, repairing = (partial(torch.optim.Adam, lr=rate) for rate in rates)
        return [
            Stage(pass_of(others), impair, impairing, retain=others, training=True),
            Stage(pass_of(size), repair, repairing, retain=size, training=True),
        ]

    def _noise(self, setup: Setup, removed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Inputs [classes * noise_samples, ...] and their labels, on the CPU."""
        batch = next(iter(setup.source("forget").read(1)))
        args, named, _ = split_targets(batch) if setup.job.forward is None else (batch[:-1], {}, None)
        if len(args) != 1 or named or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            raise ValueError(
                f"{self.name} needs inputs of one floating tensor, (inputs, targets), to make noise of them"
            )
        model, generator = unwrapped(setup.model), setup.generator()
        found = []
        for label in removed:
            drawn = torch.randn((self.noise_samples, *args[0].shape[1:]), generator=generator, dtype=args[0].dtype)
            noise = drawn.to(setup.device).requires_grad_()
            labels = torch.full((self.noise_samples,), label, device=setup.device)
            optimizer = torch.optim.Adam([noise], lr=self.noise_learning_rate)
            for _ in range(self.noise_steps):
                logits, _ = setup.forward_alone(model, (noise, labels))
                objective = self.penalty * noise.flatten(1).square().sum(1).mean() - row_losses(logits, labels).mean()
                (noise.grad,) = torch.autograd.grad(objective, [noise])
                optimizer.step()
            found.append(noise.detach().cpu())
        return torch.cat(found), torch.tensor(removed).repeat_interleave(self.noise_samples)
