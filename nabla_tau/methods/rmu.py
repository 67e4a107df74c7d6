"""RMU: the activations of a middle layer steered to noise on what is forgotten, and held where they were elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from nabla_tau.batch import Batch, to_device
from nabla_tau.distributed import unwrapped
from nabla_tau.kernels.reference import IGNORE_INDEX, compute_dtype
from nabla_tau.methods.setup import Setup
from nabla_tau.methods.stages import Drawn, Stage, Term
from nabla_tau.methods.tokens import token_mean

# The output projection of an MLP: Llama, Qwen and Gemma; GPT-2; OPT, Phi and ViT; NeoX and BLOOM; GPT-J; PyTorch's own.
DOWN = ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h", "fc_out", "linear2")
DEPTH = 3  # blocks that are trained: the steered one and those below it


@dataclass(frozen=True)
class RMU:
    """Representation misdirection for unlearning (Li et al. 2024, arXiv 2403.03218). With h the output of a layer,
    means over the tokens of a sample, then over samples:

        min mean_f |h - steering u|^2 + retain_weight mean_r |h - h_original|^2

    u is a vector with entries uniform in [0, 1), of length 1, drawn once. layer: the name of the module; None for the
    block at a quarter of the depth of the longest ModuleList (its 8th of 32, as published). Trained are the MLP's
    output projections of that block and the two below it alone, or where they are not known by name all weights of
    these blocks; AdamW without weight decay, constant learning rate. Tokens whose target is -100 do not count; in any
    task but sequences a sample counts as one token. The settings are those for Zephyr-7B, in eval mode (published: in
    train mode, of models without dropout), `steps` of `batch_size` forget and as many retained samples. How long the
    activations of another model are, `steering` must say: far below that length the forget samples stay as they were.
    ValueError where there is no such layer."""

    layer: str | None = None
    steering: float = 6.5
    retain_weight: float = 1200.0
    steps: int = 150
    learning_rate: float = 5e-5
    batch_size: int = 4
    name: str = "rmu"

    def stages(self, setup: Setup) -> list[Stage]:
        setup.refuse(self.name, sharded_model="it puts the original weights back for a forward now and then")
        model = unwrapped(setup.model)
        name = self.layer or middle_block(model)
        modules = dict(model.named_modules())
        if name not in modules:
            raise ValueError(f"layer must be the name of a module, such as {list(modules)[-1]!r}, got {name!r}")
        layer, trained = modules[name], trained_with(model, name)
        moved = [parameter for parameter in trained.values() if parameter.requires_grad]
        if not moved:
            raise ValueError(f"no weight of {name!r} or the two layers below it is trainable")
        setup.say(layer=name, trained=list(trained))
        originals = [parameter.detach().clone() for parameter in moved]

        def hidden(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            """The layer's output [B, T, d], and which tokens count [B, T]."""
            with output_of(layer) as found:
                logits, targets = setup.forward(model, batch)
            if len(found) != 1:
                raise ValueError(f"layer {name!r} must run once in a forward, and ran {len(found)} times")
            output = found[0].to(compute_dtype(found[0]))
            if setup.job.ranks.parallel == "ddp":  # which waits for the gradients of what comes after the layer too
                output = output + 0 * logits.sum()
            if setup.job.data.task != "sequence":
                return output.flatten(1)[:, None], torch.ones_like(targets[:, None], dtype=torch.bool)
            if output.shape[:-1] != targets.shape:
                raise ValueError(
                    f"layer {name!r} must give a vector for each of the tokens {tuple(targets.shape)}, "
                    f"got shape {tuple(output.shape)}"
                )
            return output, targets.long() != IGNORE_INDEX

        with torch.no_grad():
            some, _ = hidden(model, to_device(next(iter(setup.source("forget").read(1))), setup.device))
        random = torch.rand(some.shape[-1], generator=setup.generator(), dtype=torch.float64)
        noise = (self.steering * random / random.norm()).to(some)

        def steered(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            return distances(*hidden(model, batch), noise)

        def held(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
            with torch.no_grad(), weights_put_back(moved, originals):
                before, _ = hidden(unwrapped(model), batch)
            return distances(*hidden(model, batch), before)

        def terms(step: int, forget: Drawn, retain: Drawn) -> list[Term]:
            return [
                Term("forget_term", forget.batch, steered),
                Term("retain_term", retain.batch, held, self.retain_weight),
            ]

        return [
            Stage(
                self.steps,
                terms,
                partial(torch.optim.AdamW, lr=self.learning_rate, weight_decay=0.0),
                forget=setup.batch_size("forget", self.batch_size),
                retain=setup.batch_size("retain", self.batch_size),
                parameters=moved,
            )
        ]


def distances(hidden: Tensor, counts: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """`values` of a term: squared distances [B, T, d], summed over d, means over the tokens that count."""
    return token_mean((hidden - wanted).square().sum(-1), counts)[0], counts.any(1)


def middle_block(model: nn.Module) -> str:
    """Name of the block at a quarter of the depth of the longest ModuleList that is in no other."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    name = max(lists, key=lambda name: len(lists[name]), default="")
    if not name or not lists[name]:
        raise ValueError("the model has no ModuleList of blocks: give the name of a layer, RMU(layer=...)")
    return f"{name}.{(len(lists[name]) - 1) // 4}"


def trained_with(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What is trained to move the output of a layer: in it and, where it is one of a list, in the two before it."""
    outer, dot, last = name.rpartition(".")
    blocks = [name]
    if last.isdigit():
        blocks = [f"{outer}{dot}{i}" for i in range(max(0, int(last) - DEPTH + 1), int(last) + 1)]
    every = {key: p for key, p in model.named_parameters() if key.startswith(tuple(f"{block}." for block in blocks))}
    down = {key: p for key, p in every.items() if key.endswith(tuple(f"{module}.weight" for module in DOWN))}
    return down or every


@contextlib.contextmanager
def output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a layer's forwards inside; of those that give a tuple the first entry."""
    found: list[Tensor] = []
    handle = layer.register_forward_hook(
        lambda _, inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield found
    finally:
        handle.remove()


@contextlib.contextmanager
def weights_put_back(parameters: list[nn.Parameter], originals: list[Tensor]) -> Iterator[None]:
    now = [parameter.data for parameter in parameters]
    for parameter, original in zip(parameters, originals, strict=True):
        parameter.data = original
    try:
        yield
    finally:
        for parameter, data in zip(parameters, now, strict=True):
            parameter.data = data
