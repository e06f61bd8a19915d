"""Online Subspace Descent in a plain PyTorch training loop, with a checkpoint to resume from.

    python examples/bare_loop.py --steps 200

A small LLaMA learns the bytes of a source file of the Python standard library. The script saves a
checkpoint halfway; a second run loads it and reproduces, on a CPU, the losses of the first run.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import osd_torch

TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def batch(step: int, rows: int = 8, length: int = 64) -> Tensor:
    """Random pieces of the text, (rows, length) int64, determined by the step."""
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - length, (rows, 1), generator=generator)
    return TEXT[starts + torch.arange(length)].to(DEVICE)


def train(args: argparse.Namespace, checkpoint: Path, resume: bool = False) -> list[float]:
    """Trains from the start or from the checkpoint; returns the loss of each step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config).to(DEVICE)
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(), args.optimizer, args.proj_type, lr=0.01, rank=16
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    start = 0
    if resume:
        saved = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
        start = saved.pop("step")
        for name, state in saved.items():
            parts[name].load_state_dict(state)

    losses = []
    for step in range(start, args.steps):
        tokens = batch(step)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step + 1 == args.steps // 2 and not resume:
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save({"step": step + 1, **states}, checkpoint)
    return losses


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains, resumes and compares; returns `losses` and `resumed`, those after halfway."""
    parser = argparse.ArgumentParser(description="A plain training loop that resumes.")
    parser.add_argument("--steps", type=int, default=200, help="training steps, at least 2")
    parser.add_argument("--optimizer", default="galore_adamw", help="name of the optimizer")
    parser.add_argument("--proj_type", default="continuous", help="name of the projection")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps: {args.steps} is too few; expected 2 or more, to save halfway")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "checkpoint.pt"
        losses = train(args, checkpoint)
        resumed = train(args, checkpoint, resume=True)
    same = "the same losses" if resumed == losses[-len(resumed) :] else "different losses"
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {args.steps} steps")
    print(f"resumed from step {args.steps // 2}: {same}")
    return {"losses": losses, "resumed": resumed}


if __name__ == "__main__":
    main()
