"""Many small models trained as one: their weights stacked, one vectorised forward and backward a step for all.

Each model has its own first weights and its own part of the data; what they share is the order of the batches. A step
takes one batch for all of them and weighs each sample, for each model, by whether the model is trained on it:

    loss_k = sum_i m_ki l_ki / max(1, sum_i m_ki)

so that each model's gradient is that of its own members in the batch, and the weights are those of a loop that trains
one model after the other on these members. A batch read once serves every model, and small layers become large ones.
That is worth it where a step is mostly overhead, and not where the arithmetic is, of which half is for samples that do
not count: on one core 128 MLPs 20-64-5 are trained 5.7 times as fast as one by one, 32 of them 3.6 times, 32 MLPs
784-64-10 1.2 times, and 16 small CNNs .6 times (`python benchmarks/run.py shadow`). On several cores, or for larger
models, train them one by one in several processes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from nabla_tau.arguments import check_kind, check_seed, numbers_checked, whole
from nabla_tau.batch import Batch, Forward, default_forward, tensors_of, uses_batch_statistics
from nabla_tau.columns import rows_of
from nabla_tau.evaluation import SampleLoss, checked_losses
from nabla_tau.seeding import RandomState
from nabla_tau.sources import TensorSource, as_source, derive_seed

# Their update of a weight depends on that weight's own gradients alone, so on stacked weights it is each model's own.
ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Rprop")
)
_INSTEAD = "train such models one by one, with train_shadow_models"


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Trained models with their weights stacked: name -> [K, ...]."""

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    template: nn.Module

    def __len__(self) -> int:
        return len(next(iter(self.parameters.values())))

    def model(self, index: int) -> nn.Module:
        """One of the models, by itself, in eval mode."""
        model = copy.deepcopy(self.template)
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():
            for name, stacked in (self.parameters | self.buffers).items():
                own[name].copy_(stacked[index])
        return model.eval()


@numbers_checked
def train_ensemble(
    make_model: Callable[[], nn.Module],
    data: Any,
    membership: NDArray[np.bool_],
    *,
    epochs: int,
    batch_size: int = 128,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    forward: Forward | None = None,
    loss: SampleLoss | None = None,
    seed: int = 0,
    model_seeds: Sequence[int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Ensemble:
    """Train K models on parts of the same data: membership [K, N] says which model is trained on which sample.

    Args:
        make_model: () -> a new model, called once for each with the random states seeded; all must be alike.
        data: tensors (inputs, ..., targets) or a mapping with labels; they say on which device the models are.
        epochs: passes over all N samples, in batches of batch_size samples, members or not.
        optimizer: stacked parameters -> optimizer, one of `ELEMENTWISE`. Default: AdamW with its own defaults.
        schedule: optimizer -> learning-rate schedule, stepped after each step.
        forward, loss: as in `nabla_tau.evaluation.evaluate`.
        seed: of the batches' order and dropout. model_seeds: of each model's first weights; default: from `seed`.
        on_step: called with the number of steps done.

    Dropout draws other numbers for each model, and others than a loop would. Refused, with ValueError, are models in
    which a sample's output depends on others of its batch, or which count batches (BatchNorm): samples that a model is
    not trained on would get into it that way. So are other optimizers, and models that torch.vmap cannot vectorise.
    The order of the batches being common, so is what it does to the weights: where training is chaotic that hardly
    matters, but models so trained may differ a little less than models trained apart.
    """
    source = as_source(data, "data")
    if not isinstance(source, TensorSource):
        raise TypeError(f"an ensemble is trained on tensors, got {type(data).__name__}; {_INSTEAD}")
    check_kind(membership, np.ndarray, "membership")
    if membership.dtype != np.bool_:
        raise TypeError(f"membership must be bool, got {membership.dtype}")
    if membership.ndim != 2 or membership.shape[1] != source.count:
        raise ValueError(f"membership must be [K, {source.count}], got {list(membership.shape)}")
    whole(epochs, "epochs", least=1)
    whole(batch_size, "batch_size", least=1)
    check_seed(seed)
    seeds = [derive_seed(seed, k) for k in range(len(membership))] if model_seeds is None else list(model_seeds)
    if len(seeds) != len(membership):
        raise ValueError(f"{len(seeds)} seeds for {len(membership)} models")
    device = tensors_of(source.tensors)[0].device
    state = RandomState(seed)
    with state:
        models = []
        for own_seed in seeds:
            state.seed(own_seed)
            model = make_model()
            check_kind(model, nn.Module, "what make_model gives")
            models.append(_WithForward(model.to(device), forward or default_forward).train())
        state.seed(seed)
        if (name := uses_batch_statistics(models[0])) is not None:
            raise ValueError(f"{name.removeprefix('model.')} normalises with the statistics of its batch: {_INSTEAD}")
        parameters, buffers = stack_module_state(models)
        run = _Run(models[0], parameters, buffers, loss)
        trained = [p for p in parameters.values() if p.requires_grad]
        step_of = torch.optim.AdamW(trained, fused=True) if optimizer is None else optimizer(trained)
        if type(step_of) not in ELEMENTWISE:
            known = ", ".join(o.__name__ for o in ELEMENTWISE)
            raise ValueError(f"{type(step_of).__name__} is not known to update each weight by itself ({known} do)")
        rate = None if schedule is None else schedule(step_of)
        member = torch.from_numpy(np.ascontiguousarray(membership.T)).to(device)
        steps = 0
        for epoch in range(epochs):
            for index in torch.split(batch_order(source.count, seed, epoch).to(device), batch_size):
                step_of.zero_grad()
                run.objective(rows_of(source.tensors, index), member[index].T).backward()  # type: ignore[no-untyped-call]
                step_of.step()
                if rate is not None:
                    rate.step()
                steps += 1
                if on_step is not None:
                    on_step(steps)
    strip = len("model.")
    return Ensemble(
        {name[strip:]: value.detach() for name, value in parameters.items()},
        {name[strip:]: value.detach() for name, value in buffers.items()},
        models[0].model,
    )


def batch_order(count: int, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch takes the samples, of members of one model and of all."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, epoch)))


class _WithForward(nn.Module):
    """A model called on a batch: what `functional_call` needs to lend it weights for a forward of the caller's."""

    def __init__(self, model: nn.Module, call: Forward) -> None:
        super().__init__()
        self.model, self._call = model, call

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._call(self.model, batch)


class _Run:
    """The vectorised forward, and what its first call must show."""

    def __init__(
        self, template: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any], loss: SampleLoss | None
    ) -> None:
        self._parameters, self._buffers, self._loss = parameters, buffers, loss
        self._before: dict[str, Tensor] | None = {name: value.clone() for name, value in buffers.items()}

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch) -> Any:
            return functional_call(template, (parameters, buffers), (batch,))

        out_dims: Any = (0, None)  # which PyTorch's type does not allow for
        self._all = vmap(one, in_dims=(0, 0, None), out_dims=out_dims, randomness="different")

    def objective(self, batch: Batch, member: Tensor) -> Tensor:
        """Sum of the models' losses, each the mean over its members [K, B] in the batch."""
        first = self._before is not None
        with _explained() if first else contextlib.nullcontext():
            logits, targets = self._all(self._parameters, self._buffers, batch)
        if self._before is not None:
            if any(not torch.equal(value, self._before[name]) for name, value in self._buffers.items()):
                raise ValueError(f"the model's buffers change while it trains: {_INSTEAD}")
            self._before = None
        models = len(member)
        everyone = targets.expand(models, *targets.shape).flatten(0, 1)
        losses = checked_losses(self._loss, logits.flatten(0, 1), everyone).view(models, -1)
        weights = member.to(losses.dtype)
        return (losses * (weights / weights.sum(1, keepdim=True).clamp(min=1))).sum()


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"torch.vmap cannot vectorise this model: {_INSTEAD}. It says: {error}") from error
