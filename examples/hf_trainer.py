"""Online Subspace Descent in Hugging Face's Trainer, with a checkpoint to resume from.

    pip install accelerate   # required by Trainer
    python examples/hf_trainer.py --steps 200     # or torchrun --nproc_per_node 2 examples/...

A small LLaMA learns the bytes of a source file of the Python standard library. Trainer clips,
schedules, logs and saves as usual; the script only passes it the optimizer. Trainer saves a
checkpoint halfway; a second run resumes from it and ends, on a CPU, with identical weights.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

import osd_torch

TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
LENGTH = 64
ON_CPU = not torch.cuda.is_available()


def train(
    args: argparse.Namespace, directory: str, resume: str | None = None
) -> tuple[LlamaForCausalLM, list[float]]:
    """Trains from the start or from a checkpoint; returns the model and the logged losses."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(), args.optimizer, args.proj_type, lr=0.01, rank=16
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=directory,
            max_steps=args.steps,
            per_device_train_batch_size=8,
            max_grad_norm=1.0,
            save_steps=args.steps // 2,
            logging_steps=max(1, args.steps // 10),
            report_to="none",
            disable_tqdm=True,
            use_cpu=ON_CPU,
            dataloader_pin_memory=not ON_CPU,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in TEXT.split(LENGTH)[:-1]],
        optimizers=(optimizer, scheduler),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, resumes and compares; returns the `losses` and whether the weights are `equal`."""
    parser = argparse.ArgumentParser(description="Trainer with a subspace optimizer.")
    parser.add_argument("--steps", type=int, default=200, help="training steps, at least 2")
    parser.add_argument("--optimizer", default="galore_adamw", help="name of the optimizer")
    parser.add_argument("--proj_type", default="continuous", help="name of the projection")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps: {args.steps} is too few; expected 2 or more, to save halfway")
    half = args.steps // 2
    state = PartialState(cpu=ON_CPU)  # the processes that torchrun started, if any
    with tempfile.TemporaryDirectory() as own:
        [directory] = broadcast_object_list([own])  # the folder of the first process, for all
        model, losses = train(args, directory)
        resumed, _ = train(args, directory, resume=f"{directory}/checkpoint-{half}")
        state.wait_for_everyone()
    weights = zip(model.parameters(), resumed.parameters(), strict=True)
    equal = all(torch.equal(a, b) for a, b in weights)
    if state.is_main_process:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {args.steps} steps")
        print(
            f"resumed from step {half}: {'the same' if equal else 'different'} weights at the end"
        )
    return {"losses": losses, "equal": equal}


if __name__ == "__main__":
    main()
