"""What a method makes its stages from: the model, its data, and the outputs and Fisher information of either."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nabla_tau.batch import Batch, to_device
from nabla_tau.distributed import local_tensor, unwrapped
from nabla_tau.evaluation import counting_losses, device_of, evaluation_mode, forward_batches, over_samples
from nabla_tau.job import WEIGHTS, CannotServeError, Job
from nabla_tau.optimizer_state import adamw
from nabla_tau.performance import Performance
from nabla_tau.sample_norms import fisher_diagonal
from nabla_tau.sources import LoaderSource, Source, derive_seed
from nabla_tau.step_graph import refusal
from nabla_tau.unlearner import trainable_parameters

Name = Literal["forget", "retain", "held_out"]

KEPT_BYTES = 2**30  # outputs of the original model beyond this are computed again by a copy of it


class Setup:
    """A job as its methods see it. parameters: the trainable ones. refused: why no step may be captured on a GPU, None
    where it may. warnings: what to tell the user."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.model
        self.parameters = trainable_parameters(job.model)
        self.device = device_of(job.model)
        self.performance = Performance(job.model, job.forward, job.performance)
        self.refused = refusal(
            self.parameters, self.device, performance=job.performance, ranks=job.ranks, micro_batch_size=None
        )
        self.warnings: list[str] = []
        self._said: dict[str, Any] = {}

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits and targets."""
        return self.performance.forward(model, batch)

    def forward_alone(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.performance.forward_alone(model, batch)

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each sample [n], and which count [n]."""
        return counting_losses(self.job.loss, *self.forward(model, batch))

    def source(self, name: Name) -> Source:
        found: Source = getattr(self.job.data, name)
        return found

    def batches_per_pass(self, name: Name, batch_size: int) -> int:
        return self.job.batches_per_pass(self.source(name), *self.job.batch_sizes(batch_size))

    def batch_size(self, name: Name, wanted: int) -> int:
        """At most the samples that there are; more where a pass would end with a single one, of which BatchNorm has no
        statistics."""
        count = self.job.data.counts[name]
        size = min(wanted, count)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules()):
            while size > 1 and count % size == 1:
                size += 1
        return size

    def adamw(self, groups: Iterable[tuple[list[nn.Parameter], float]], **settings: Any) -> torch.optim.Optimizer:
        """torch.optim.AdamW, of parameters with a learning rate each, whose steps can be captured where any can."""
        return adamw(groups, capturable=self.refused is None, **settings)

    def generator(self, what: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(self.job.seed, WEIGHTS, what))

    def classes(self, method: str) -> int:
        """Number of classes; ValueError where the model is no classifier."""
        if self.job.data.task != "classification":
            task = self.job.data.task or "one with a loss function of the caller"
            raise ValueError(f"{method} needs a classification task, and this is {task}")
        batch = next(iter(self.source("forget").read(2)))
        ((logits, _),) = forward_batches(unwrapped(self.model), [batch], self.forward_alone)
        return logits.shape[1]

    def refuse(self, method: str, *, sharded_model: str = "", sharded_data: str = "", loader: str = "") -> None:
        """CannotServeError where the job is of a kind that the method cannot serve; each says why, "" that it can."""
        why = ""
        if sharded_model and self.job.ranks.parallel == "fsdp":
            why = f"on a model to which fully_shard was applied: {sharded_model}"
        elif sharded_data and self.job.sharded:
            why = f"with data_is_sharded=True: {sharded_data}"
        elif loader and any(isinstance(self.source(name), LoaderSource) for name in ("forget", "retain")):
            why = f"with a DataLoader: {loader}. Give tensors or a Dataset"
        if why:
            raise CannotServeError(f"{method} does not work {why}")

    def say(self, **settings: Any) -> None:
        """Put what was chosen into the result's settings."""
        self._said |= settings

    def outputs(
        self,
        name: Name,
        of: Callable[[Tensor, Tensor], Tensor] = lambda logits, targets: logits,
        *,
        teacher: nn.Module | None = None,
    ) -> Callable[[Batch, Tensor | None], Tensor]:
        """Logits of the original model for a batch of a data set and the numbers of its samples, without gradient; or
        what `of` makes of logits and targets, [B, ...]. Of `teacher` where one is given, a model like it.

        Computed once and kept, on the CPU; by a copy of the model instead where a DataLoader decides what a batch
        holds or they would take more than 1 GB, which the result's settings say (teacher).
        """
        source, model = self.source(name), teacher or unwrapped(self.model)
        few = next(iter(source.read(1)))
        ((logits, targets),) = forward_batches(model, [few], self.forward_alone)
        one = of(logits, targets)
        wanted = source.count * one.numel() * one.element_size()
        if isinstance(source, LoaderSource) or wanted > KEPT_BYTES:
            self.refuse("a copy of the original model", sharded_model="give tensors or Datasets of at most 1 GB logits")
            model = copy.deepcopy(model).eval().requires_grad_(False)
            self._said["teacher"] = "a copy of the model"

            def computed(batch: Batch, numbers: Tensor | None) -> Tensor:
                with torch.no_grad():
                    return of(*self.forward(model, batch))

            return computed
        self._said.setdefault("teacher", "outputs computed once")
        (kept,) = over_samples(
            model,
            lambda share: source.read(256, share=share),
            lambda logits, targets: (of(logits, targets),),
            forward=self.forward_alone,
            ranks=None if self.job.sharded else self.job.ranks,
        )
        kept = kept.cpu()

        def looked_up(batch: Batch, numbers: Tensor | None) -> Tensor:
            assert numbers is not None
            return kept[numbers.cpu()].to(self.device)

        return looked_up

    def fisher(self, data: Name | Source, batch_size: int = 128) -> list[Tensor]:
        """Diagonal of the empirical Fisher information of a data set, per sample, for each parameter; eval mode."""
        source = self.source(data) if isinstance(data, str) else data
        why = "its Fisher information is that of single samples"
        self.refuse("this method", sharded_model=why, sharded_data=why)
        model = unwrapped(self.model)
        with evaluation_mode(model):
            found = fisher_diagonal(model, source.read(batch_size), forward=self.job.forward, loss=self.job.loss)
        names = {id(p): key for key, p in model.named_parameters()}
        return [found[names[id(p)]] for p in self.parameters]

    def gradient(self, name: Name, batch_size: int = 256) -> list[Tensor]:
        """Gradient of the mean loss of a data set, for each parameter; eval mode."""
        why = "it needs the gradient of all samples on one process"
        self.refuse("this method", sharded_model=why, sharded_data=why)
        model, count = unwrapped(self.model), 0
        total = [torch.zeros_like(parameter) for parameter in self.parameters]
        with evaluation_mode(model):
            for batch in self.source(name).read(batch_size):
                losses, counts = self.losses(model, to_device(batch, self.device))
                found = torch.autograd.grad(losses[counts].sum(), self.parameters, allow_unused=True)
                for sum_of, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        sum_of += gradient
                count += int(counts.sum())
        return [sum_of / max(count, 1) for sum_of in total]

    def originals(self) -> list[Tensor]:
        """Copies of the parameters as they are now."""
        return [parameter.detach().clone() for parameter in self.parameters]

    def settings(self) -> dict[str, Any]:
        return self.performance.settings() | self._said


def scale_gradients(parameters: list[nn.Parameter], masks: list[Tensor]) -> None:
    """Multiply .grad by masks, entry by entry."""
    for parameter, mask in zip(parameters, masks, strict=True):
        if parameter.grad is not None:
            local_tensor(parameter.grad).mul_(mask)
