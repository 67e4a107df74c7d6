"""Fresh weights, trained on the retained samples alone: `unlearn`'s default."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nabla_tau import fingerprint
from nabla_tau.distributed import unwrapped
from nabla_tau.initialisation import initialise
from nabla_tau.job import CannotServeError
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term
from nabla_tau.outcome import fit, has_learned, usefulness


@dataclass(frozen=True, eq=False)
class Weights:
    """A model's state, told from others by what is in it."""

    state: Mapping[str, Tensor]

    @functools.cached_property
    def digest(self) -> str:
        return fingerprint.of_tensors([self.state[name] for name in sorted(self.state)])

    def __repr__(self) -> str:
        return f"Weights({self.digest})"


BETAS = (0.9, 0.95)  # a second moment of 20 steps: the runs have a few hundred


@dataclass(frozen=True)
class Restart:
    """Every module is initialised anew and trained on the retained samples alone, in train mode, so that nothing of the
    forget set is left but what data and hyperparameters were chosen by. What makes it a fraction of a retraining is its
    schedule: one cycle of AdamW without weight decay, whose learning rate rises and falls linearly (Smith and Topin
    2018, arXiv 1708.07120), its peak for each weight matrix `relative_rate` times the root mean square of its fresh
    weights, as an Adam step moves every weight by about the learning rate (relative steps: You et al. 2020, arXiv
    1904.00962; Bernstein et al. 2020, arXiv 2002.03432); vectors take the median of the matrices.

    passes: of the retain set in a cycle, but at least `min_steps` steps (less with larger batches). Where the last
    three quarters of the first cycle gave more than the share `still_learning` of all the held-out accuracy (loss, of
    anything but a classifier) that it gave, the model had not learned what it can: `cycles` - 1 more follow, each at
    half the peak of the one before (warm restarts: Loshchilov and Hutter 2017, arXiv 1608.03983), but not once the
    share `fitted` of the retained samples is classified as it should be, which leaves little to learn from them. The
    original has no say in that: if its accuracy were what to come back to, the number of cycles would tell of its
    forget set.
    hopeless: where the first quarter has not gone this share of the way from fresh weights to the original's, the run
    ends: such an original knows what the retained samples cannot teach, as large pretrained models do. batch_size: an
    eighth of the samples at most, but 16; four times as many where most weights are embeddings, which are many weights
    and no arithmetic.

    initial: the weights before the training whose traces are to go, where it did not begin with fresh ones: those of
    the pretrained model. They are as far from fresh as their training took them, so the rate is taken from how far the
    original was taken from them, the one thing that is read off its weights: one cycle, in which every tensor, vectors
    too, has the peak rate `distance` times the root mean square of its displacement over the square root of the number
    of steps (a random walk of such steps ends at `distance` / sqrt(3) times the displacement). What the original left
    where it was stays there. ValueError where that is everything.

    Without initial, parameters that are frozen stay as they are, and so do buffers of modules without a
    `reset_parameters`. CannotServeError (a ValueError) for a module that cannot initialise itself, or that is frozen in
    part.
    """

    passes: float = 4
    min_steps: int = 150
    cycles: int = 2
    still_learning: float = 0.4
    fitted: float = 0.98
    relative_rate: float = 0.1875
    distance: float = 2
    warmup: float = 0.15
    hopeless: float = 0.3
    batch_size: int = 64
    initial: Weights | None = None
    name: str = "restart"

    def stages(self, setup: Setup) -> list[Stage]:
        setup.refuse(self.name, sharded_model="its modules cannot be initialised one by one")
        job, model = setup.job, unwrapped(setup.model)
        fresh = copy.deepcopy(model)
        try:
            self._begin_anew(fresh, setup)
        except ValueError as error:
            raise CannotServeError(str(error)) from error
        wanted = usefulness(job, setup.forward_alone)
        untrained = usefulness(dataclasses.replace(job, model=fresh), job.forward)
        judges = has_learned(wanted, untrained)
        setup.say(initial=self.initial and self.initial.digest, **untrained.to_dict("untrained"))
        size = setup.batch_size("retain", self._batch_size(setup))
        least = math.ceil(self.min_steps * min(1, self.batch_size / size))
        steps = max(least, math.ceil(self.passes * setup.batches_per_pass("retain", size)))
        rates = self._rates(setup, dict(fresh.named_parameters()), steps)

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [Term("retain_term", retain.batch)]

        def optimizer(moved: list[nn.Parameter]) -> torch.optim.Optimizer:
            by_rate: dict[float, list[nn.Parameter]] = {}
            for parameter, rate in zip(moved, rates, strict=True):
                by_rate.setdefault(rate, []).append(parameter)
            groups = [(group, rate) for rate, group in by_rate.items()]
            return setup.adamw(groups, betas=BETAS, weight_decay=0.0)

        at_quarter: dict[str, Tensor] = {}

        def is_hopeless() -> bool:
            found = usefulness(job, setup.forward_alone).mean
            at_quarter["usefulness"] = torch.tensor(found, dtype=torch.float64)
            return judges and found - untrained.mean < self.hopeless * (wanted.mean - untrained.mean)

        def has_learned_all() -> bool:
            found = usefulness(job, setup.forward_alone).mean
            gained, late = found - untrained.mean, found - float(at_quarter["usefulness"])
            if not (gained > 0 and late > self.still_learning * gained):
                return True
            retained = fit(job, setup.forward_alone)
            return retained.name == "accuracy" and retained.mean >= self.fitted

        descent = partial(Stage, terms=terms, retain=size, training=True, repeats=True)
        begin = partial(descent, optimizer=optimizer, begin=partial(self._begin_anew, model, setup))
        first = self._cycle(steps)
        if self.initial is not None:
            return [begin(steps, rate=first)]
        quarter = max(1, steps // 4)
        pilot = begin(quarter, rate=first, stop=is_hopeless, state=at_quarter)
        rest = descent(steps - quarter, rate=lambda step: first(quarter + step), stop=has_learned_all)
        again = [descent(steps, rate=self._cycle(steps, 0.5**cycle)) for cycle in range(1, self.cycles)]
        return [pilot, rest, *again]

    def _begin_anew(self, model: nn.Module, setup: Setup) -> None:
        if self.initial is None:
            initialise(_trainable_modules(model), setup.generator())
        else:
            model.load_state_dict(self.initial.state)

    def _cycle(self, steps: int, peak: float = 1.0) -> Callable[[int], float]:
        """Linearly up from nearly nothing to the peak and down again, as factors."""
        top = max(1, round(self.warmup * steps))
        return lambda step: peak * ((step + 1) / (top + 1) if step < top else (steps - step) / (steps - top))

    def _batch_size(self, setup: Setup) -> int:
        inside = {
            id(parameter)
            for module in unwrapped(setup.model).modules()
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            for parameter in module.parameters()
        }
        embedded = sum(p.numel() for p in setup.parameters if id(p) in inside)
        is_embedding = embedded > sum(p.numel() for p in setup.parameters) / 2
        count = setup.job.data.counts["retain"]
        return max(1, min(self.batch_size * (4 if is_embedding else 1), max(16, count // 8)))

    def _rates(self, setup: Setup, fresh: dict[str, nn.Parameter], steps: int) -> list[float]:
        """Peak learning rate of each trainable parameter."""
        names = {id(parameter): name for name, parameter in unwrapped(setup.model).named_parameters()}
        weights = [fresh[names[id(parameter)]].detach() for parameter in setup.parameters]
        if self.initial is not None:
            moved = [root_mean_square(p.detach() - w) for p, w in zip(setup.parameters, weights, strict=True)]
            if not any(moved):
                raise ValueError("initial has the very weights of the model: nothing was learned since")
            return [self.distance * distance / math.sqrt(steps) for distance in moved]
        scales = [root_mean_square(w) if w.ndim > 1 else 0.0 for w in weights]
        known = [scale for scale in scales if scale > 0]
        if not known:
            raise CannotServeError("the learning rate is taken from weight matrices, and the model has none to train")
        usual = statistics.median_low(known)
        return [self.relative_rate * (scale or usual) for scale in scales]


def root_mean_square(weights: Tensor) -> float:
    return float(torch.linalg.vector_norm(weights, dtype=torch.float64)) / math.sqrt(max(weights.numel(), 1))


def _trainable_modules(model: nn.Module) -> list[nn.Module]:
    """The modules with parameters of their own, but for frozen ones, and those with nothing but statistics that they
    can reset; ValueError for one that is frozen in part.

    What is inside a module with a reset of its own may be reset by both, in this order: the outer one first.
    """
    found = []
    for module in model.modules():
        moves = {parameter.requires_grad for parameter in module.parameters(recurse=False)}
        if len(moves) > 1:
            raise ValueError(f"a {type(module).__name__} is frozen in part: it cannot be initialised anew")
        has_statistics = any(True for _ in module.buffers(recurse=False)) and hasattr(module, "reset_parameters")
        if moves == {True} or (not moves and has_statistics):
            found.append(module)
    return found
