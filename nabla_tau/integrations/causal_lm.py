"""Causal language models of Hugging Face transformers: a sample is a sequence, its loss the mean over its tokens.

    result = nabla_tau.unlearn(model, forget=..., retain=..., held_out=..., forward=causal_lm.logits_forward)

    forward, loss = causal_lm.fused(model)                      # the same, but the logits are never stored whole
    result = nabla_tau.unlearn(model, forget=..., retain=..., held_out=..., forward=forward, loss=loss)

A batch is what such a model takes: a mapping of input_ids [B, T], attention_mask [B, T] and labels [B, T], not shifted,
in which -100 marks what has no loss: padding, and the tokens of a prompt (`completion_labels`). Give DataLoaders, whose
batch size is then that of every forward. The methods for language models (`nabla_tau.methods`: NPO, SimNPO, GradDiff,
WGA, SatImp) work on the losses of tokens, and go through the fused head as well.

Nothing here imports transformers: what is asked of a model is `get_output_embeddings`, `base_model` and `config`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nabla_tau.arguments import numbers_checked
from nabla_tau.batch import Batch, Forward, rows_between, sample_count, split_targets
from nabla_tau.checkpoint import check_writable
from nabla_tau.distributed import unwrapped
from nabla_tau.evaluation import device_of, evaluation_mode, forward_batches
from nabla_tau.kernels.reference import IGNORE_INDEX
from nabla_tau.linear import linear_row_losses
from nabla_tau.reference import ReferenceFile
from nabla_tau.sources import as_source

# What makes a model give the hidden vectors of its last layer, and the logits of one position only.
HIDDEN_STATES = {"output_hidden_states": True, "logits_to_keep": 1}
WRITE_EVERY = 60.0  # seconds between two writings of reference losses


def next_tokens(labels: Tensor) -> Tensor:
    """The token that each position predicts, [B, T] from labels [B, T]: the next one; the last predicts none."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def completion_labels(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Labels [B, T] of sequences of which only what follows the prompt counts; padded on either side.

    input_ids and attention_mask [B, T]; prompt_lengths [B], the tokens of each sequence's prompt.
    """
    position = attention_mask.cumsum(1) - 1
    counts = attention_mask.bool() & (position >= prompt_lengths[:, None])
    return input_ids.masked_fill(~counts, IGNORE_INDEX)


def logits_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] and the tokens that they predict [B, T]: `forward=` of `nabla_tau.unlearn` and `audit`."""
    args, inputs, labels = split_targets(batch)
    return model(*args, **inputs, use_cache=False).logits, next_tokens(labels)


def fused(model: nn.Module) -> tuple[Forward, SequenceMean]:
    """`forward=` and `loss=` of `nabla_tau.unlearn`, `Unlearner` and `audit` for a model whose logits are too large to
    be stored: token losses straight from the hidden vectors (`nabla_tau.linear.linear_row_losses`).

    The head is found by itself, tied to the embedding or not. Looks at the logits of two tokens. Raises TypeError for a
    head that is not a plain torch.nn.Linear (an adapter on it, quantised weights), and ValueError for a model whose
    logits are not those of its head on its last hidden vectors (capped or scaled logits, virtual tokens): for
    these there is `logits_forward`.
    """
    head = head_of(model)
    if getattr(_transformer(model).config, "final_logit_softcapping", None):
        raise ValueError("the logits of this model are capped (final_logit_softcapping): use logits_forward")
    inputs = {"input_ids": torch.arange(2, device=device_of(model))[None]}
    with evaluation_mode(model), torch.no_grad():
        own = unwrapped(model)(**inputs, use_cache=False).logits
        by_head = head(hidden_states(unwrapped(model), inputs))
    tolerance = 1e-3 if own.dtype in (torch.float32, torch.float64) else 5e-2
    scale = float(own.abs().max())
    if own.shape != by_head.shape or not torch.allclose(own, by_head, rtol=tolerance, atol=tolerance * scale):
        raise ValueError(
            f"the logits of {type(_transformer(model)).__name__}, {list(own.shape)}, are not those of its head on its "
            "last hidden vectors: use logits_forward"
        )
    return fused_forward, SequenceMean()


def fused_forward(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses of tokens [B, T] and the tokens [B, T], of a model that `fused` has looked at."""
    _, inputs, labels = split_targets(batch)
    return token_losses(model, hidden_states(model, inputs), labels), next_tokens(labels)


def token_losses(model: nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the token that each position predicts, [B, T] from hidden vectors [B, T, D] and labels [B, T]; 0
    where it predicts none."""
    head = head_of(model)
    return linear_row_losses(hidden, head.weight, next_tokens(labels), bias=head.bias)


class SequenceMean:
    """Mean loss of each sequence [B] of token losses [B, T] and the tokens [B, T]; `of_tokens` is what methods that
    work on tokens ask for.

    A sequence without a token that counts is a ValueError on the CPU, and nan on a GPU, where looking would cost time.
    """

    def __call__(self, losses: Tensor, targets: Tensor) -> Tensor:
        losses, counts = self.of_tokens(losses, targets)
        number = counts.sum(1)
        if number.device.type == "cpu" and bool((number == 0).any()):
            row = int((number == 0).nonzero()[0])
            raise ValueError(f"sequence {row} of a batch of {len(number)} has no token with a label other than -100")
        return torch.where(counts, losses, 0.0).sum(1) / number

    def of_tokens(self, losses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The losses [B, T], and which count [B, T]."""
        return losses, targets != IGNORE_INDEX


def head_of(model: nn.Module) -> nn.Linear:
    """The layer that gives the logits. Raises TypeError where it is none, or not a plain torch.nn.Linear."""
    find = getattr(_transformer(model), "get_output_embeddings", None)
    head = None if find is None else find()
    if type(head) is not nn.Linear:
        raise TypeError(
            f"the head of {type(model).__name__} must be a torch.nn.Linear, got {type(head).__module__}."
            f"{type(head).__qualname__}: leave it out of what adapters and quantisation touch, or use logits_forward"
        )
    return head


def hidden_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """Hidden vectors [B, T, D] that go into the head."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        # Its own forward must run, or the gradients are not reduced.
        return last_hidden(model(**inputs, **HIDDEN_STATES, use_cache=False))
    found: Tensor = _transformer(model).base_model(**inputs, use_cache=False).last_hidden_state
    return found


def last_hidden(outputs: Any) -> Tensor:
    """Those of a whole model's outputs, which was called with `HIDDEN_STATES`."""
    found: Tensor = outputs.hidden_states[-1]
    return found


def _transformer(model: nn.Module) -> Any:
    """The model of transformers inside DistributedDataParallel and adapters of peft."""
    inside: Any = unwrapped(model)
    return inside.get_base_model() if hasattr(inside, "get_base_model") else inside


@numbers_checked
def reference_losses(model: nn.Module, data: Any, *, cache: str | Path | None = None, batch_size: int = 16) -> Tensor:
    """-log p of each sequence by the model, [N] float64 on the CPU: the sum over its tokens, which NPO compares with
    (`nabla_tau.methods.npo.NPO(reference=cache)`, `row_objectives.npo`). In eval mode, through the fused head.

    data: as for `nabla_tau.unlearn`, in its order. cache: a file that they are kept in, with fingerprints of the
    weights and of the data, and read from where it exists. It is written every minute, so that a call that was cut off
    goes on where it was.

    Raises what `fused` raises, ValueError for a cache of another model or other data, or one that is damaged, and
    OSError where it cannot be read or written.
    """
    forward, _ = fused(model)
    source = as_source(data, "data")
    losses = torch.empty(0, dtype=torch.float64)
    file = None if cache is None else ReferenceFile(Path(cache), model, source)
    if file is not None:
        if file.path.exists():
            losses = file.read()
            if len(losses) == source.count:
                return losses
        check_writable(file.path)
    written = time.monotonic()
    unknown = _rows_from(len(losses), source.read(batch_size))
    for of_tokens, _ in forward_batches(unwrapped(model), unknown, forward):
        losses = torch.cat([losses, of_tokens.double().sum(1).cpu()])
        if file is not None and time.monotonic() - written > WRITE_EVERY:
            file.write(losses)
            written = time.monotonic()
    if file is not None:
        file.write(losses)
    return losses


def _rows_from(first: int, batches: Iterable[Batch]) -> Iterator[Batch]:
    """What follows the first samples."""
    for batch in batches:
        count = sample_count(batch)
        if first < count:
            yield rows_between(batch, slice(first, None))
        first = max(0, first - count)
