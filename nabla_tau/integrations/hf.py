"""nabla-tau in the Trainer of Hugging Face transformers, as it is: a data set, a collator, a loss and a callback.

    unlearning = hf.Unlearning(forget=..., retain=..., held_out=..., collate=DataCollatorWithPadding(tokenizer))
    trainer = Trainer(
        model,
        args,
        train_dataset=unlearning.train_dataset,
        data_collator=unlearning.collate,
        compute_loss_func=unlearning.loss,
        callbacks=[unlearning],
    )

A batch is `per_device_train_batch_size` pairs: so many forget samples, and as many retained ones after them. The gate
is not linear in the losses, and must see the forget losses of the whole batch, which a loss function of the Trainer
does not with gradient accumulation, nor on several processes. So

    accumulation   before the first micro-batch the callback takes the forget samples of all of them, which the collator
                   has noted, through the model without gradient. That tells what the gate asks of each sample, and a
                   micro-batch's part is linear in its losses. It costs one more forward of the forget samples, and the
                   collator must run in this process (dataloader_num_workers=0).
    processes      the losses of all are gathered, and the average of DistributedDataParallel is undone.

With both the step is that of `nabla_tau.Unlearner` on the whole batch, for every gate, but for rounding. It is not
where losses are random or samples depend on each other: with dropout, which the Trainer switches on (a warning says so)
and tau is measured without, and with BatchNorm. `balance` and `hold` of nabla-tau's recipes are not done here.
"""

from __future__ import annotations

import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, default_data_collator

from nabla_tau.auditing import AuditReport, audit
from nabla_tau.batch import Batch, default_forward, rows_between, split_targets
from nabla_tau.evaluation import counting_losses, device_of, forward_batches
from nabla_tau.functional import has_loss
from nabla_tau.history import Log
from nabla_tau.integrations import causal_lm
from nabla_tau.integrations.gated_loss import GatedLoss, Outputs
from nabla_tau.integrations.pairs import PairCollator, Pairs, forget_mask, is_pair
from nabla_tau.objective import Gate, alpha_start

STATE = "nabla_tau"  # its entry in the Trainer's checkpoints


class Unlearning(TrainerCallback):  # type: ignore[misc]  # Any where transformers is absent
    """What a Trainer needs to unlearn; one for each run.

    forget, retain, held_out: map-style Datasets, of columns that `collate` and the model take (the Trainer strikes no
    others from pairs); held_out was never trained on, and its loss is what the forget loss is brought to. collate: what
    makes a batch of samples, with "labels"; transformers' default_data_collator where none is given. lm: "logits" for a
    causal language model, which predicts labels [B, T] one position before; "fused" for the same without ever storing
    its logits (`causal_lm.fused`); None for any other model with class labels.

    gate, power: as in `nabla_tau.objective.objective`. alpha: weight of the ascent, None for min(1, 5/3 |D_f| / (|D_f|
    + |D_r|)); it falls linearly to `alpha_end` times that over the run. tau_every: steps between two measurements of
    tau, None for a tenth of the run.

    unseen: where given, the run ends with `nabla_tau.audit` of the forget set against it, in `report` and as audit.json
    in the output folder; audit_with: further arguments of `audit` (original, retrained). log: called as
    log(values, step) after each step on the first process; give it on all of them.

    tau goes with the Trainer's checkpoints: a run that was cut off goes on as it would have. Sharded models (FSDP,
    DeepSpeed) have not been tried. Raises TypeError and ValueError for data and settings that do not fit, some of them
    when the training begins.
    """

    def __init__(
        self,
        *,
        forget: Any,
        retain: Any,
        held_out: Any,
        collate: Callable[[list[Any]], Any] | None = None,
        lm: Literal["logits", "fused"] | None = None,
        gate: Gate = "batch",
        power: int = 2,
        alpha: float | None = None,
        alpha_end: float = 0.0,
        tau_every: int | None = None,
        unseen: Any = None,
        audit_with: dict[str, Any] | None = None,
        log: Log | None = None,
    ) -> None:
        if lm not in ("logits", "fused", None):
            raise ValueError(f'lm must be "logits", "fused" or None, got {lm!r}')
        if tau_every is not None and tau_every < 1:
            raise ValueError(f"tau_every must be at least 1 step, got {tau_every}")
        self.train_dataset = Pairs(forget, retain)
        if alpha is None:
            alpha = alpha_start(len(forget), len(forget) + len(retain))
        self.gated = GatedLoss(gate, power, alpha, alpha_end)
        self.report: AuditReport | None = None
        self._held_out, self._unseen, self._audit_with, self._log = held_out, unseen, audit_with or {}, log
        self._collate, self._tau_every = PairCollator(collate or default_data_collator), tau_every
        self._fused = lm == "fused"
        self._outputs = {
            None: Outputs(default_forward, None),
            "logits": Outputs(causal_lm.logits_forward, None),
            "fused": Outputs(causal_lm.fused_forward, causal_lm.SequenceMean()),
        }[lm]
        self._is_lm = lm is not None
        self._pending: deque[Batch] = deque()  # collated and not yet trained on
        self._weights: Iterator[Tensor] | None = None  # of the micro-batches of this step, where they were looked at
        self._micro_batches = 1
        self._retained: list[tuple[Tensor, Tensor]] = []  # losses of this step, and which count

    def collate(self, samples: Sequence[Any]) -> Batch:
        """A batch: of pairs the forget samples, then the retained ones; of anything else (in an evaluation) what
        `collate` makes of it."""
        batch = self._collate(samples)
        if is_pair(samples[0]):
            self._pending.append(batch)
        return {**batch, **causal_lm.HIDDEN_STATES} if self._fused else batch

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """`compute_loss_func`: a micro-batch's part of the objective; in an evaluation the mean loss."""
        losses, counts = self._sample_losses(outputs, labels)
        if not torch.is_grad_enabled():
            return losses[counts].mean()
        noted = self._pending.popleft() if self._pending else None
        if noted is not None and noted["labels"].shape != labels.shape:
            raise RuntimeError(f"a batch of labels {list(labels.shape)} is not the one that was collated for this step")
        found, forget = losses.detach(), forget_mask(losses)
        if self._weights is None:
            weights, self._terms = self.gated.weigh(found, forget, counts)
        else:
            weights = next(self._weights)
        self._retained.append((found[~forget], counts[~forget]))
        weighted = (weights * losses).sum()
        # What the Trainer logs is the objective; its gradient is that of the weighted losses.
        share = self.gated.alpha * self._terms.forget_term / (self._micro_batches * self.gated.ranks.size)
        value = share + (weights * found)[~forget].sum()
        part: Tensor = weighted + (value - weighted).detach()
        is_multiplied = self._averages_tokens and num_items_in_batch is not None
        return part if is_multiplied else part * self.gated.ranks.size

    def _sample_losses(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        if not self._is_lm:
            return counting_losses(None, outputs.logits, labels)
        found = causal_lm.last_hidden(outputs) if self._fused else outputs.logits
        if self._fused:
            found = causal_lm.token_losses(self._model, found, labels)
        return counting_losses(self._outputs.loss, found, causal_lm.next_tokens(labels))

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any) -> None:
        if args.n_gpu > 1:
            raise ValueError(f"one process with {args.n_gpu} GPUs is not supported: start one for each (torchrun)")
        if self._fused:
            causal_lm.fused(model)
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
            warnings.warn(
                "the model has dropout, which the Trainer switches on and tau is measured without: forget losses are "
                "then larger than what they are compared with. Set it to 0 in the model's config",
                stacklevel=2,
            )
        self._model = model
        self._averages_tokens = args.average_tokens_across_devices
        self._batch_size = args.per_device_eval_batch_size
        self.gated.join(device_of(model))
        self.gated.load_state_dict(state.stateful_callbacks.get(STATE, {}), device_of(model))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._pending.clear()

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any) -> None:
        self._retained.clear()
        self.gated.at(state.global_step, state.max_steps)
        if state.global_step % (self._tau_every or max(1, state.max_steps // 10)) == 0 or self.gated.target is None:
            self.gated.measure(model, self._loader(self._held_out), self._outputs)
            state.stateful_callbacks[STATE] = self.gated.state_dict()
        if args.gradient_accumulation_steps > 1:
            batches = list(itertools.islice(self._pending, args.gradient_accumulation_steps))
            if not batches:
                raise ValueError(
                    "with gradient accumulation the collator must run in this process: dataloader_num_workers=0, and "
                    "accelerator_config without dispatch_batches"
                )
            self._look(model, batches)

    def _look(self, model: nn.Module, batches: list[Batch]) -> None:
        """The weights of each of these micro-batches, from the losses of all their forget samples."""
        losses, masks, counting, sizes = [], [], [], []
        for batch in batches:
            labels = split_targets(batch)[2].to(device_of(model))
            counts = has_loss(causal_lm.next_tokens(labels) if self._is_lm else labels)
            forget = forget_mask(labels)
            few = rows_between(batch, slice(0, len(labels) // 2))
            ((outputs, targets),) = forward_batches(model, [few], self._outputs.forward)
            of_forget, _ = counting_losses(self._outputs.loss, outputs, targets)
            # Their weights do not depend on the retained losses.
            losses.append(torch.cat([of_forget, torch.zeros_like(of_forget)]))
            masks.append(forget)
            counting.append(counts)
            sizes.append(len(labels))
        weights, self._terms = self.gated.weigh(torch.cat(losses), torch.cat(masks), torch.cat(counting))
        self._weights, self._micro_batches = iter(torch.split(weights, sizes)), len(batches)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self._log is None:
            return
        terms, target = self._terms, self.gated.target
        retain_loss = self.gated.mean(self._retained)
        values = {"forget_loss": terms.forget_loss, "retain_loss": retain_loss, "gate_open": terms.gate_open}
        if self.gated.ranks.rank == 0 and target is not None:
            row = {name: float(value) for name, value in values.items()}
            self._log(row | {"tau": float(target.mean), "alpha": self.gated.alpha}, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **others: Any) -> None:
        if self._unseen is None or self.gated.ranks.rank != 0:
            return
        forget, unseen = self._loader(self.train_dataset.forget), self._loader(self._unseen)
        forward, loss = self._outputs
        self.report = audit(model, forget=forget, unseen=unseen, forward=forward, loss=loss, **self._audit_with)
        self.report.save(Path(args.output_dir) / "audit.json")

    def _loader(self, data: Any) -> DataLoader[Any]:
        return DataLoader(data, batch_size=self._batch_size, collate_fn=self._collate)
