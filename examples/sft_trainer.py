"""Unlearning in TRL's SFTTrainer, used as it is: some lines of a text are forgotten by a small language model.

    pip install 'nabla_tau[hf,peft]' trl
    python examples/sft_trainer.py

A model of your own comes from `AutoModelForCausalLM.from_pretrained`, and its tokenizer with it. Here both are made on
the spot, and the lines are random words, of which each has to be memorised. Only an adapter that has learned them is
trained: without it the model has never seen them. Set dropout to 0 (peft's and the model's): the Trainer switches it
on, and tau is measured without.
"""

from __future__ import annotations

import argparse
import random

import peft
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from nabla_tau.integrations import hf

WORDS = [a + b for a in ("ka", "lo", "mi", "nu", "pe", "ra") for b in ("bel", "dor", "fin", "gas", "hum", "jet")]
SETS = {"forget": 24, "retain": 72, "held_out": 40, "unseen": 60}


def lines(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=10)) for _ in range(count)]


def settings(folder: str, **others: object) -> SFTConfig:
    fixed = {"per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "seed": 0, "save_strategy": "no"}
    quiet = {"report_to": [], "logging_steps": 20, "disable_tqdm": True, "use_cpu": not torch.cuda.is_available()}
    return SFTConfig(folder, bf16=False, **{**fixed, **quiet, **others})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="unlearned", help="folder of the Trainers")
    parser.add_argument("--quick", action="store_true", help="fewer steps: to see that it runs")
    args = parser.parse_args()
    folder = args.out
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    data = {name: Dataset.from_dict({"text": lines(count, seed)}) for seed, (name, count) in enumerate(SETS.items())}
    data = {name: part.map(lambda row: tokenizer(row["text"]), remove_columns="text") for name, part in data.items()}

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **sizes, initializer_range=0.2))
    adapter = peft.LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
    model = peft.get_peft_model(base, adapter)

    seen = [ids for name in ("forget", "retain") for ids in data[name]["input_ids"]]
    training = Dataset.from_dict({"input_ids": seen})
    memorising = settings(folder, max_steps=100 if args.quick else 150, learning_rate=5e-3)
    SFTTrainer(model, memorising, train_dataset=training, processing_class=tokenizer).train()

    unlearning = hf.Unlearning(
        forget=data["forget"],
        retain=data["retain"],
        held_out=data["held_out"],
        unseen=data["unseen"],
        collate=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        lm="logits",
        gate="two_sided",
        alpha=0.5,
        alpha_end=1.0,
        tau_every=5,
        log=lambda values, step: print(step, values) if step % 10 == 0 else None,
    )
    trainer = SFTTrainer(
        model,
        settings(
            folder,
            max_steps=40 if args.quick else 60,
            learning_rate=1e-3,
            gradient_accumulation_steps=2,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        ),
        # SFTTrainer insists on a datasets.Dataset, and would strike columns that no model takes.
        train_dataset=Dataset.from_list([pair._asdict() for pair in unlearning.train_dataset]),
        data_collator=unlearning.collate,
        compute_loss_func=unlearning.loss,
        callbacks=[unlearning],
        processing_class=tokenizer,
    )
    trainer.train()
    print(unlearning.report.table())


if __name__ == "__main__":
    main()
