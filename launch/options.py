"""Every flag of a training run, in one frozen dataclass that both trainers share.

Names, meanings and defaults are those of the published commands; what this project adds is
`update_proj_every` and what stands in the groups "data", "paper", "run", "memory and devices",
"jax" and "pytorch". Importing this module is cheap, so that a mistake is reported before anything
heavy is loaded:

    options = Options.parse(sys.argv[1:]).check()

A bad value raises `UsageError`, which `run_cli` turns into one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, get_args, get_type_hints

from osd_names import (
    FIRST_MOMENTS,
    MOMENTUM,
    MUON_SCALES,
    OPTIONS,
    PROJ_TYPES,
    RESIDUALS,
    SECOND_MOMENTS,
    SUBSPACE_OPTIMIZERS,
    check_moments,
    check_muon,
    check_residual,
)
from osd_names import FULL_RANK_OPTIMIZERS as FULL_RANK

PER_LAYER = tuple(f"{name}_per_layer" for name in SUBSPACE_OPTIMIZERS)
Scheduler = Literal["linear", "cosine", "cosine_restarts"]
LionSign = Literal["lifted", "subspace"]
MoveProjector = Literal["after", "before"]
ProjectorInit = Literal["svd", "qr"]

# A run goes on only with these unchanged: they fix the state's shapes, what its counts mean or the
# order of the data.
FIXED = (
    "optimizer", "proj_type", "rank", "basis_dtype", "update_proj_every", "dataset",
    "text_column", "tokenizer", "max_length", "pack", "seed", "total_batch_size", "no_decay",
    "residual", "growth_limiter", "second_moment", "first_moment", "stochastic_rounding",
)  # fmt: skip

GROUPS = {
    "model": "",
    "data": "",
    "optimizer": "",
    "subspace": "How gradients are projected: used by the galore_* optimizers and osd_muon only.",
    "paper": "Where paper and published code differ. The defaults are the published code's.",
    "run": "",
    "memory and devices": "JAX trains on all devices that it finds, PyTorch on one a process.",
    "jax": "PyTorch refuses these with the reason; torchrun brings its processes together. Under "
    "SLURM (srun), Open MPI and on a TPU pod JAX finds its processes by itself.",
    "pytorch": "JAX refuses these with the reason.",
}


class UsageError(ValueError):
    """A mistake in what the user asked for: the value, what was expected and what to do."""


def count(text: str) -> int:
    """Reads a whole number that may end in K, M or B: "100M" is 100,000,000.

    Raises:
        argparse.ArgumentTypeError: `text` is no such number.
    """
    digits, unit = text.strip().replace("_", "").replace(",", ""), 1
    if digits[-1:].upper() in ("K", "M", "B"):
        unit = {"K": 10**3, "M": 10**6, "B": 10**9}[digits[-1].upper()]
        digits = digits[:-1]
    try:
        number = float(digits) * unit if unit > 1 else int(digits)
        if number != int(number):
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number; write 1000000 or 1M (K, M and B are understood)"
        ) from None
    return int(number)


def _dtype(text: str) -> str:
    name = text.lower()
    return {"bf16": "bfloat16", "fp32": "float32"}.get(name, name)


def _flag(group: str, default: Any = dataclasses.MISSING, *, help: str, **metadata: Any) -> Any:
    """A field of `Options`: what `--help` says and what `Options.check` demands.

    Metadata: `choices` (names), `low` and `high` (inclusive bounds), `above` (exclusive bound),
    `type` (reads the text), `metavar`.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **metadata})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """All that describes a run. Build it with `Options.parse` or by keyword, then call `check`.

    `check` returns a copy in which everything derived is filled in: `gradient_accumulation`,
    `total_batch_size`, `num_training_steps` (from `max_train_tokens`), `cycle_length`,
    `restart_warmup_steps`, `per_layer` and `tokenizer` (of a model to
    continue from).
    """

    model_config: str = _flag(
        "model",
        metavar="FILE",
        help="LLaMA shape: a JSON file in Hugging Face's config format, such as "
        "configs/llama_60m.json",
    )
    continue_from: str | None = _flag(
        "model",
        None,
        metavar="DIR",
        help="continue from here: a run, or one of its checkpoints, with everything (weights, "
        "optimizer, schedule, place in the data); a Hugging Face directory, with the weights "
        "only",
    )
    dtype: str | None = _flag(
        "model",
        None,
        choices=("bfloat16", "float32"),
        type=_dtype,
        help="dtype of weights and activations (default: bfloat16 on an accelerator, float32 on a "
        "CPU)",
    )
    activation_checkpointing: bool = _flag(
        "model",
        False,
        help="keep one activation a layer and compute the rest again in the backward pass",
    )

    dataset: str = _flag(
        "data",
        "c4",
        metavar="NAME",
        help="builtin (the State of the Union addresses), c4, tfds:NAME, text:GLOB (a file, a "
        "folder or a pattern; .txt, .json, .jsonl, these as .gz or .zst, and .parquet), "
        "tokens:PATH or hf:NAME",
    )
    text_column: str = _flag(
        "data",
        "text",
        help="text: alone: the key or column with the text in .json, .jsonl and .parquet files",
    )
    data_dir: str | None = _flag(
        "data",
        None,
        metavar="DIR",
        help="where TensorFlow Datasets finds prepared data, or for c4 the folder that holds en/ "
        "with C4's own files, c4-train.*.json.gz and c4-validation.*.json.gz",
    )
    cache_dir: str | None = _flag(
        "data",
        None,
        metavar="DIR",
        help="where prepared data and trained tokenizers are kept (default: $OSD_CACHE, else "
        "~/.cache/online_subspace_descent)",
    )
    tokenizer: str | None = _flag(
        "data",
        None,
        metavar="NAME",
        help="a Hugging Face tokenizer's directory or name, or byte (default: that of "
        "continue_from's model, else LLaMA's 32,000 pieces where the model has room for them, else "
        "one trained on the data)",
    )
    max_length: int = _flag("data", 256, low=2, help="tokens in a row")
    pack: bool | None = _flag(
        "data",
        None,
        help="join the documents and cut them into full rows, or keep one document a row, cut or "
        "padded (default: --pack for builtin, text: and tokens:, else --no-pack, as published)",
    )
    batch_size: int = _flag("data", low=1, help="rows in one forward pass of one process")
    gradient_accumulation: int = _flag(
        "data",
        0,
        low=0,
        help="forward passes in one update (default: from the two batch sizes, else 1)",
    )
    total_batch_size: int = _flag(
        "data",
        0,
        low=0,
        help="rows in one update, over all processes (default: batch_size x gradient_accumulation "
        "x processes)",
    )
    workers: int = _flag(
        "data",
        0,
        low=0,
        help="processes that read ahead for each training process; 0 reads in threads of the "
        "trainer itself, which is fastest on few cores. What is read does not depend on it",
    )

    optimizer: str = _flag(
        "optimizer",
        "adam",
        choices=FULL_RANK + SUBSPACE_OPTIMIZERS + PER_LAYER,
        type=str.lower,
        help="optimizer of the weights",
    )
    lr: float = _flag("optimizer", 1e-4, above=0, help="peak learning rate")
    full_lr: float | None = _flag(
        "optimizer",
        None,
        above=0,
        help="peak learning rate of embedding, head and norms, which are never projected (default: "
        "lr)",
    )
    scheduler: Scheduler = _flag(
        "optimizer",
        "cosine",
        choices=get_args(Scheduler),
        type=str.lower,
        help="how the learning rate falls after the warmup: linear to 0, cosine to min_lr_ratio. "
        "cosine_restarts: one cosine over the whole run that starts again from 0 every "
        "cycle_length updates",
    )
    min_lr_ratio: float = _flag(
        "optimizer", 0.1, low=0, high=1, help="cosine: last learning rate as a part of the peak"
    )
    warmup_steps: int = _flag(
        "optimizer", 1000, low=0, help="updates in which the learning rate rises from 0"
    )
    cycle_length: int | None = _flag(
        "optimizer",
        None,
        low=1,
        help="cosine_restarts: updates in a cycle (default: a quarter of the run)",
    )
    restart_warmup_steps: int | None = _flag(
        "optimizer",
        None,
        low=1,
        help="cosine_restarts: updates of warmup after a restart (default: a tenth of a cycle)",
    )
    num_training_steps: int = _flag("optimizer", 10_000, low=1, type=count, help="updates")
    max_train_tokens: int | None = _flag(
        "optimizer",
        None,
        low=1,
        type=count,
        help="train on this many tokens (100M, 1B) in place of num_training_steps; padding counts",
    )
    weight_decay: float = _flag("optimizer", 0.0, low=0, help="weight decay")
    grad_clipping: float = _flag(
        "optimizer", 0.0, low=0, help="largest norm of the whole gradient; 0 does not clip"
    )
    beta1: float = _flag(
        "optimizer",
        0.0,
        low=0,
        high=0.9999999,
        help="decay of the first moment; 0: 0.9 for Adam and Lion, none for Adafactor",
    )
    beta2: float | None = _flag(
        "optimizer",
        None,
        low=0,
        high=0.9999999,
        help="decay of the second moment, of Lion's moment (default: 0.999, Lion 0.99)",
    )
    eps: float | None = _flag(
        "optimizer",
        None,
        above=0,
        help="added to the root of Adam's second moment (default: galore_adamw 1e-6, else 1e-8)",
    )
    momentum: float | None = _flag(
        "optimizer",
        None,
        low=0,
        high=0.9999999,
        help=f"decay of Muon's momentum; 0 keeps none (default: {MOMENTUM})",
    )
    nesterov: bool = _flag("optimizer", False, help="Nesterov's form of Muon's momentum")
    muon_scale: str = _flag(
        "optimizer",
        "adamw",
        choices=MUON_SCALES,
        type=str.lower,
        help="factor on Muon's orthogonal update: 0.2 sqrt(max(m, n)), with which AdamW's rates "
        "carry over (adamw), Muon's own sqrt(max(1, m / n)) (muon), or none",
    )
    ns_dtype: str | None = _flag(
        "optimizer",
        None,
        choices=("bfloat16", "float32"),
        type=_dtype,
        help="dtype of Muon's Newton-Schulz steps (default: float32)",
    )
    second_moment: str = _flag(
        "optimizer",
        "full",
        choices=SECOND_MOMENTS,
        type=str.lower,
        help="Adam's second moment of embedding and head: one number a weight (full), or one a "
        "word (row)",
    )
    first_moment: str = _flag(
        "optimizer",
        "full",
        choices=FIRST_MOMENTS,
        type=str.lower,
        help="with --second_moment row: their first moment, and Muon's momentum, in float32 or in "
        "8 bits",
    )
    no_decay: str | None = _flag(
        "optimizer",
        None,
        metavar="WORDS",
        help="no weight decay for parameters with one of these words in their names, such as "
        "norm,embed,head (default: all have it)",
    )

    rank: int = _flag("subspace", 128, low=1, help="rank of the subspace")
    update_proj_gap: int = _flag(
        "subspace",
        50,
        low=1,
        help="updates between two new projectors; for continuous kinds the projector's step size "
        "is 1/this",
    )
    update_proj_every: int = _flag(
        "subspace",
        1,
        low=1,
        help="continuous kinds move the projector at every so manieth update only, by a step of "
        "the same size",
    )
    galore_scale: float = _flag("subspace", 1.0, above=0, help="factor on the lifted update")
    proj_type: str = _flag(
        "subspace",
        "std",
        choices=PROJ_TYPES,
        type=str.lower,
        help="rule that moves the projector: continuous* by online PCA with that optimizer; random "
        "and gaussian by chance; oja by a step of Oja's rule and a QR; the rest by an SVD, of the "
        "shorter side (std), the longer, the left, the right, or both (full)",
    )

    residual: str = _flag(
        "subspace",
        "none",
        choices=tuple(RESIDUALS),
        type=str.lower,
        help="what of a gradient outside the subspace reaches the weights: norm_ratio (Fira; "
        "norm_ratio_released as its code computes it), column_ema (Alice), gradient_only (APOLLO, "
        "with --proj_type gaussian; gradient_only_matrix is APOLLO-Mini) or sign (FRUGAL)",
    )
    residual_scale: float | None = _flag(
        "subspace",
        None,
        low=0,
        help="weight of the residual, of column_ema (default: 0.4) and sign (default: 1)",
    )
    growth_limiter: bool = _flag(
        "subspace",
        True,
        help="norm_ratio and gradient_only: let the residual's norm grow by at most 1%% a step",
    )

    penalty: float = _flag(
        "paper", 0.0, low=0, help="orthogonality penalty of online PCA; the paper's is 0.1"
    )
    projector_lr_multiple: float | None = _flag(
        "paper",
        None,
        above=0,
        help="the projector's step size as a multiple of the learning rate; the paper's is 5 "
        "(default: 1 / update_proj_gap, scheduled alike)",
    )
    projector_weight_decay: float | None = _flag(
        "paper",
        None,
        low=0,
        help="weight decay of the projector; the paper's is that of the weights (default: 0.01 for "
        "continuous, else 0)",
    )
    lion_sign: LionSign = _flag(
        "paper",
        "lifted",
        choices=get_args(LionSign),
        help="take Lion's sign of the lifted direction, or inside the subspace as in the paper",
    )
    transport_moments: bool = _flag(
        "subspace",
        False,
        help="carry the moments over to the new projector whenever it changes, in place of reading "
        "them as they are",
    )
    stochastic_rounding: bool = _flag(
        "optimizer",
        False,
        help="round weights in bfloat16 up or down at random, so that updates smaller than a "
        "weight's spacing add up; without effect on float32",
    )
    move_projector: MoveProjector = _flag(
        "paper",
        "after",
        choices=get_args(MoveProjector),
        help="move the projector after the weights have moved with the old one, or before",
    )

    name: str = _flag("run", "test", help="name of the run: its log lies in RUN_DIR/NAME")
    run_dir: str = _flag("run", "runs", metavar="DIR", help="where runs are kept")
    save_dir: str | None = _flag(
        "run",
        None,
        metavar="DIR",
        help="where checkpoints and the final model are kept (default: RUN_DIR/NAME)",
    )
    save_every: int = _flag("run", 10_000, low=1, help="updates between two checkpoints")
    keep: int = _flag("run", 2, low=1, help="newest checkpoints to keep")
    resume: bool = _flag(
        "run", False, help="go on from the run's newest checkpoint; start it if there is none"
    )
    overwrite: bool = _flag("run", False, help="delete what an earlier run of this name left")
    eval_every: int = _flag(
        "run", 5000, low=1, help="updates between two evaluations; one more stands at the end"
    )
    eval_tokens: int = _flag(
        "run",
        10_000_000,
        low=1,
        type=count,
        help="held-out tokens in an evaluation, padding counted (10M, 100K)",
    )
    log_every: int = _flag("run", 1, low=1, help="updates between two lines of the log")
    prompt: str = _flag(
        "run",
        "The",
        metavar="TEXT",
        help="start of the sample of text that the trained model writes",
    )
    sample_tokens: int = _flag("run", 100, low=0, help="tokens in that sample; 0 writes none")
    seed: int = _flag(
        "run", 0, low=0, high=2**32 - 1, help="seed of weights, data order and projectors"
    )
    tags: str | None = _flag(
        "run", None, metavar="TEXT", help="free words, kept with the run's options"
    )
    wandb: bool = _flag("run", False, help="log to Weights & Biases too, which has to be installed")

    single_gpu: bool = _flag(
        "memory and devices",
        False,
        help="one device: JAX then leaves the others alone. PyTorch accepts it, as in the "
        "published commands, and does not need it",
    )
    per_layer: bool = _flag(
        "memory and devices",
        False,
        help="update each layer inside the backward pass, so that the gradients of projected "
        "weights never pile up (default: on for the *_per_layer optimizers)",
    )
    fsdp: bool = _flag(
        "memory and devices",
        False,
        help="share weights, gradients and optimizer state out over the devices; otherwise each "
        "holds all of them, and a share of the batch. In JAX the same as --mesh fsdp=-1",
    )
    compress_gradients: bool = _flag(
        "memory and devices",
        False,
        help="reduce the low-rank sketch of a projected gradient over the processes, or over the "
        "mesh's data axis, in place of the gradient",
    )

    basis_dtype: str = _flag(
        "memory and devices",
        "float32",
        choices=("bfloat16", "float32"),
        type=_dtype,
        help="dtype of the projector",
    )

    projector_init: ProjectorInit = _flag(
        "jax",
        "svd",
        choices=get_args(ProjectorInit),
        type=str.lower,
        help="how online PCA finds its first projector in the first gradient: its leading singular "
        "vectors, as published, or the range of a random sketch of it, for TPUs, where an SVD "
        "compiles for minutes",
    )
    accumulate_sketches: bool = _flag(
        "jax",
        False,
        help="keep of each micro-batch the sketch of a projected gradient in place of the sum of "
        "the gradients, as layer-by-layer updates do in either framework",
    )
    mesh: str | None = _flag(
        "jax",
        None,
        metavar="SIZES",
        help="data=D,fsdp=F,tensor=T: D groups of F x T devices; each group holds one copy, "
        "weights are shared out over F and, as in Megatron, over T, and the batch over D x F. "
        "What is left out is 1, -1 takes what is left (default: data=-1, all devices)",
    )
    coordinator_address: str | None = _flag(
        "jax",
        None,
        metavar="HOST:PORT",
        help="where several processes meet: a machine's name, on which the first process runs, "
        "and any free port of it",
    )
    num_processes: int | None = _flag("jax", None, low=1, help="how many there are")
    process_id: int | None = _flag("jax", None, low=0, help="which of them this one is, from 0")

    compile: bool = _flag(
        "pytorch", False, help="compile the layers with torch.compile: slower to start, then faster"
    )
    timeout_minutes: float | None = _flag(
        "pytorch",
        None,
        above=0,
        high=10_000,
        help="how long a process waits for another one before the run ends; the first one prepares "
        "the data meanwhile (default: 10)",
    )

    @classmethod
    def parse(
        cls,
        argv: Sequence[str],
        *,
        prog: str | None = None,
        description: str = "Train a LLaMA with Online Subspace Descent.",
    ) -> Self:
        """Reads a command line, without the program's name. `check` looks at the values.

        Raises:
            UsageError: a flag is unknown or missing, or its value is not of its type.
            SystemExit: code 0, after `--help`.
        """
        parser = _parser(prog, description)
        _refuse_unknown(argv)
        return cls(**vars(parser.parse_args(argv)))

    @property
    def path(self) -> Path:
        """The run's directory: options, metrics, pictures."""
        return Path(self.run_dir) / self.name

    @property
    def save_path(self) -> Path:
        """Where checkpoints and the final model are kept."""
        return Path(self.save_dir) if self.save_dir else self.path

    @property
    def tokens_per_update(self) -> int:
        """Positions in one update over all processes, padding included; of checked options only."""
        return self.total_batch_size * self.max_length

    @property
    def continues_itself(self) -> bool:
        """Whether `continue_from` names this very run or one of its checkpoints."""
        if self.continue_from is None:
            return False
        start = Path(self.continue_from).resolve()
        return any(start.is_relative_to(own.resolve()) for own in (self.path, self.save_path))

    @property
    def base_optimizer(self) -> str:
        """The optimizer's name without `_per_layer`, which says when it steps and not how."""
        return self.optimizer.removesuffix("_per_layer")

    def model(self) -> dict[str, Any]:
        """The model config as it stands in the file.

        Raises:
            UsageError: the file is missing, or no JSON object.
        """
        path = Path(self.model_config)
        if not path.is_file():
            raise UsageError(f"--model_config: no file {path}; {_neighbours(path)}")
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"--model_config: {path} is not JSON: {error}") from None
        if not isinstance(config, dict):
            raise UsageError(
                f"--model_config: {path} holds a {type(config).__name__}, expected a JSON object"
            )
        return config

    def record(self) -> dict[str, Any]:
        """What `options.json` keeps: the options, and the model's config as it was."""
        return {"options": dataclasses.asdict(self), "model": self.model()}

    def check(self, processes: int = 1) -> Self:
        """Checks everything that can be checked without a framework, and fills in what is derived.

        Args:
            processes: how many training processes share an update.

        Returns:
            The options with every derived value filled in.

        Raises:
            UsageError: the first thing found wrong.
        """
        for field in dataclasses.fields(self):
            _check_value(field, getattr(self, field.name))
        self._check_combinations()
        given = self._with_home()._with_tokenizer()
        given._check_model()
        given._check_data()
        resolved = given._with_batch(processes)._with_steps()
        per_layer = self.per_layer or self.optimizer in PER_LAYER
        resolved = dataclasses.replace(resolved, per_layer=per_layer)
        resolved._check_sketches()
        resolved._check_directories()
        return resolved

    def _check_sketches(self) -> None:
        """Refuses a rule that needs the gradient where only its sketch is kept."""
        self._check_gradients_stay()
        waits = self.gradient_accumulation > 1 or self.grad_clipping
        if self.per_layer and waits and self.move_projector == "before":
            cause = "--grad_clipping" if self.grad_clipping else "several micro-batches"
            raise UsageError(
                "--move_projector: before takes R again from the gradient, of which layer-by-layer "
                f"updates (--per_layer) with {cause} keep only a sketch; use after, or one "
                "micro-batch in an update and no clipping"
            )
        if self.accumulate_sketches and (self.per_layer or self.gradient_accumulation == 1):
            reason = (
                "layer-by-layer updates (--per_layer) do so always"
                if self.per_layer
                else "an update has one micro-batch, and nothing is accumulated"
            )
            raise UsageError(f"--accumulate_sketches: {reason}; leave it out")
        if self.accumulate_sketches and self.move_projector == "before":
            raise UsageError(
                "--move_projector: before takes R again from the gradient, of which "
                "--accumulate_sketches keeps only a sketch; use after"
            )

    def _check_gradients_stay(self) -> None:
        """Refuses sketches in place of gradients where the lift adds the gradient itself."""
        rule = f"--residual {self.residual}"
        if self.base_optimizer == "osd_muon":
            rule = f"--optimizer {self.optimizer}"
        elif self.residual == "none":
            return
        several = self.gradient_accumulation > 1
        causes = {  # the flag, and what beside it drops the gradient
            ("accumulate_sketches", ""): self.accumulate_sketches,
            ("compress_gradients", ""): self.compress_gradients,
            ("per_layer", " with several micro-batches"): self.per_layer and several,
            ("per_layer", " with --grad_clipping"): self.per_layer and self.grad_clipping,
        }
        for (name, beside), is_given in causes.items():
            if is_given:
                raise UsageError(
                    f"--{name}: {rule} adds a part of the gradient itself, and --{name}{beside} "
                    "keeps a sketch of it only; leave one of them out"
                )

    def _check_combinations(self) -> None:
        """Refuses what the chosen optimizer or schedule would silently ignore."""
        is_projected = self.optimizer not in FULL_RANK
        takers = {
            name: (
                reader.who.replace("proj_type", "--proj_type"),
                reader.reads(self.base_optimizer, self.proj_type),
            )
            for name, (_, reader) in OPTIONS.items()
            if name in _FIELDS
        }
        takers |= {
            "cycle_length": ("--scheduler cosine_restarts", self.scheduler == "cosine_restarts"),
            "min_lr_ratio": ("a cosine --scheduler", self.scheduler != "linear"),
            "compress_gradients": ("a galore_* optimizer or osd_muon", is_projected),
            "accumulate_sketches": ("a galore_* optimizer or osd_muon", is_projected),
        }
        takers["restart_warmup_steps"] = takers["cycle_length"]
        for name in ("proj_type", "rank", "update_proj_gap", "basis_dtype"):
            takers[name] = takers["compress_gradients"]
        is_galore = self.optimizer.startswith("galore_")
        takers["galore_scale"] = ("a galore_* optimizer", is_galore)
        for name, (taker, chosen) in takers.items():
            if not chosen and getattr(self, name) != _FIELDS[name].default:
                raise UsageError(
                    f"--{name}: only {taker} takes it, and this is --optimizer {self.optimizer} "
                    f"--proj_type {self.proj_type} --scheduler {self.scheduler}; leave it out"
                )
        with _about("nesterov"):
            check_muon(self.muon_scale, self.nesterov, self.momentum)
        with _about("residual"):
            check_residual(
                self.residual,
                self.residual_scale,
                self.growth_limiter,
                self.galore_scale,
                "galore_scale",
            )
        with _about("first_moment"):
            check_moments(self.second_moment, self.first_moment)
        if self.no_decay is not None and not self.weight_decay:
            raise UsageError("--no_decay: only --weight_decay above 0 reads it; leave it out")
        if self.no_decay is not None and not all(map(str.strip, self.no_decay.split(","))):
            raise UsageError(
                f"--no_decay: {self.no_decay!r} has an empty word in it; expected words with "
                "commas between them, such as norm,embed,head"
            )
        if self.fsdp and self.compress_gradients:
            raise UsageError(
                "--compress_gradients: --fsdp reduces gradients itself, whole; use one of the two"
            )
        if self.accumulate_sketches and self.compress_gradients:
            raise UsageError(
                "--accumulate_sketches: --compress_gradients makes one sketch of the sum of the "
                "micro-batches' gradients; use one of the two"
            )
        if self.mesh is not None and (self.fsdp or self.single_gpu):
            other = "--fsdp" if self.fsdp else "--single_gpu"
            raise UsageError(
                f"--mesh: {other} says which devices are used for what, too; leave one out"
            )
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise UsageError("--wandb: wandb is not installed; pip install wandb, or leave it out")

    def _with_home(self) -> Self:
        """Spells out a `~`, which a shell leaves alone behind "text:" or "="."""
        paths = {name: os.path.expanduser(path) for name in _PATHS if (path := getattr(self, name))}
        kind, colon, where = self.dataset.partition(":")
        return dataclasses.replace(self, dataset=kind + colon + os.path.expanduser(where), **paths)

    def _with_tokenizer(self) -> Self:
        """The tokenizer that the weights were trained with, unless another is asked for."""
        weights = Path(self.continue_from or "")
        files = (weights / "config.json", weights / "tokenizer.json")
        if self.tokenizer or not self.continue_from or not all(file.is_file() for file in files):
            return self
        return dataclasses.replace(self, tokenizer=str(weights))

    def _check_model(self) -> None:
        config, where = self.model(), f"--model_config: {self.model_config}"
        kind = config.get("model_type", "llama")
        if kind != "llama":
            raise UsageError(f"{where} describes a {kind!r} model, expected 'llama'")
        for key in _SIZES:
            value = config.get(key)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"{where} has {key} {value!r}, expected a whole number from 1")
        longest = config.get("max_sequence_length", config.get("max_position_embeddings"))
        if longest is not None and (not isinstance(longest, int) or longest < 1):
            raise UsageError(
                f"{where} has {longest!r} positions (max_sequence_length), expected a whole number "
                "from 1"
            )
        if longest is not None and self.max_length > longest:
            raise UsageError(
                f"--max_length: {self.max_length} is more than the {longest} positions of "
                f"{self.model_config}; lower it, or raise max_sequence_length there"
            )

    def _check_data(self) -> None:
        from launch.data.files import c4_files, text_files  # which loads NumPy

        kind, _, where = self.dataset.partition(":")
        if kind not in ("builtin", "c4", *_PLACED) or (kind in _PLACED) != bool(where):
            known = ["builtin", "c4", *(f"{name}:" for name in _PLACED)]
            raise UsageError(
                f"--dataset: {self.dataset!r} is unknown{_close(self.dataset, known)}; expected "
                "builtin, c4, tfds:NAME, text:GLOB, tokens:PATH or hf:NAME"
            )
        if self.text_column != _FIELDS["text_column"].default and kind != "text":
            raise UsageError(
                f"--text_column: only text: reads it, and --dataset is {self.dataset}; leave it out"
            )
        if not self.text_column:
            raise UsageError("--text_column: '' is no name; leave it out for text")
        if kind in ("text", "tokens"):
            files = [Path(where)] if Path(where).is_file() else []
            if kind == "text":
                with _about("dataset"):
                    files = text_files(where)
            if not files:
                raise UsageError(f"--dataset: no file matches {where}; expected a file to read")
            if not any(path.stat().st_size for path in files):
                names = ", ".join(map(str, files[:3]))
                raise UsageError(f"--dataset: {names} is empty; there is nothing to train on")
        local = self.data_dir is not None and "://" not in self.data_dir
        if self.data_dir and local and not Path(self.data_dir).is_dir():
            raise UsageError(
                f"--data_dir: no directory {self.data_dir}; expected the one with the prepared data"
            )
        if kind == "c4":
            with _about("data_dir"):
                c4_files(self.data_dir)

    def _with_batch(self, processes: int) -> Self:
        unit = self.batch_size * processes
        shares = f"--batch_size {self.batch_size} x {processes} process" + "es" * (processes > 1)
        steps = self.gradient_accumulation or max(1, self.total_batch_size // unit)
        total = self.total_batch_size or unit * steps
        if total != unit * steps:
            if self.gradient_accumulation:
                raise UsageError(
                    f"--total_batch_size: {total} is not {unit * steps} ({shares} x "
                    f"--gradient_accumulation {steps}); leave one of the three out"
                )
            near = unit * max(1, round(total / unit))
            raise UsageError(
                f"--total_batch_size: {total} is not a multiple of {unit} ({shares}); use {near}, "
                "or another --batch_size"
            )
        return dataclasses.replace(self, gradient_accumulation=steps, total_batch_size=total)

    def _with_steps(self) -> Self:
        steps = self.num_training_steps
        if self.max_train_tokens is not None:
            steps = self.max_train_tokens // self.tokens_per_update
            if steps < 1:
                raise UsageError(
                    f"--max_train_tokens: {self.max_train_tokens} is less than one update of "
                    f"{self.tokens_per_update} tokens ({self.total_batch_size} rows of "
                    f"{self.max_length}); raise it, or lower --total_batch_size"
                )
        if self.warmup_steps > steps:
            raise UsageError(
                f"--warmup_steps: {self.warmup_steps} is more than the run's {steps} updates; "
                f"lower it, to {steps // 10} for example"
            )
        cycle, restart = self.cycle_length, self.restart_warmup_steps
        if self.scheduler == "cosine_restarts":
            cycle = max(1, steps // 4) if cycle is None else cycle
            restart = max(1, cycle // 10) if restart is None else restart
            warmups = {"warmup_steps": self.warmup_steps, "restart_warmup_steps": restart}
            for name, value in warmups.items():
                if value > cycle:
                    raise UsageError(
                        f"--{name}: {value} is more than a cycle of {cycle} updates; lower it, or "
                        "raise --cycle_length"
                    )
        return dataclasses.replace(
            self, num_training_steps=steps, cycle_length=cycle, restart_warmup_steps=restart
        )

    def _check_directories(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name == "..":
            raise UsageError(f"--name: {self.name!r} is not a plain name; --run_dir says where")
        for path in (self.path, self.save_path):
            nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
            if not nearest.is_dir():
                raise UsageError(f"--run_dir, --save_dir: {nearest} is a file, not a directory")
        if self.overwrite and (self.resume or self.continue_from is not None):
            raise UsageError(
                "--overwrite starts anew, and --resume and --continue_from go on: leave one out"
            )
        doomed = [(self.save_path / name).resolve() for name in ("checkpoints", "model")]
        for name in ("model_config", "tokenizer"):
            path = Path(getattr(self, name) or "").resolve()
            if self.overwrite and any(path.is_relative_to(directory) for directory in doomed):
                raise UsageError(
                    f"--{name}: {path} is part of what --overwrite deletes; copy it, or use "
                    "another --name"
                )
        if self.continue_from is not None and not Path(self.continue_from).is_dir():
            raise UsageError(
                f"--continue_from: no directory {self.continue_from}; expected a run, one of its "
                "checkpoints or a Hugging Face model"
            )
        taken = next((path for path in (self.path, self.save_path) if _holds_a_run(path)), None)
        if taken and not (self.resume or self.overwrite or self.continues_itself):
            raise UsageError(
                f"--name: {taken} holds a run already; go on with it by --resume, replace it by "
                "--overwrite, or choose another --name"
            )
        if taken and not self.overwrite and (kept := self.kept_record()):
            self.check_same_run(kept, self.path)

    def kept_record(self) -> dict[str, Any] | None:
        """The `record` of the run that lies where this one is kept; None where there is none.

        Raises:
            UsageError: its file is damaged.
        """
        path = self.path / "options.json"
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"--name: {path} is damaged: {error}; use another --name") from None

    def check_same_run(self, kept: dict[str, Any], where: Path) -> None:
        """Refuses to go on with other values of what `FIXED` names.

        Args:
            kept: The `record` of the run to go on with.
            where: It is kept.

        Raises:
            UsageError: an option of `FIXED`, or the model, is another one.
        """
        then, now = kept["options"], dataclasses.asdict(self)
        # An option that is younger than the run was at its default.
        old = {name: then.get(name, _FIELDS[name].default) for name in FIXED}
        pairs = [(f"--{name}", old[name], now[name]) for name in FIXED]
        then, now = kept["model"], self.model()
        pairs += [
            (f"--model_config: {key}", then.get(key), now.get(key)) for key in {**then, **now}
        ]
        for what, old, new in pairs:
            if old != new:
                raise UsageError(
                    f"{what}: {where} was started with {old}, not {new}; go on with {old}, or "
                    "start another run with --name"
                )


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
_PLACED = ("tfds", "text", "tokens", "hf")
_PATHS = (
    "model_config", "continue_from", "data_dir", "cache_dir", "tokenizer", "run_dir", "save_dir",
)  # fmt: skip
_FIELDS = {field.name: field for field in dataclasses.fields(Options)}


def run_cli(main: Callable[[Sequence[str]], int | None]) -> int:
    """Runs `main` on the command line's arguments and returns the exit code.

    `UsageError` becomes one line on stderr and code 2, any other OSError (a full disk) one line and
    code 1, an interrupt code 130. Anything else is a fault of the program and keeps its traceback;
    wrap calls whose ValueError or OSError is the user's in `user_errors`.
    """
    try:
        return main(sys.argv[1:]) or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turns a ValueError or OSError raised inside into a `UsageError` with the same message."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def _about(flag: str) -> Iterator[None]:
    """Names the flag in a `UsageError` for the ValueError or OSError raised inside."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(f"--{flag}: {error}") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see --help")


def _parser(prog: str | None, description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=100),
        usage="%(prog)s --model_config FILE --batch_size N [options]",
    )
    groups = {name: parser.add_argument_group(name, text or None) for name, text in GROUPS.items()}
    types = get_type_hints(Options)
    for name, field in _FIELDS.items():
        hint = types[name]  # a type, a type or None, or a Literal of names
        kind = next((t for t in (hint, *get_args(hint)) if t in (bool, int, float)), str)
        required = field.default is dataclasses.MISSING
        about = field.metadata["help"]
        if choices := field.metadata.get("choices"):
            about += f"; one of {', '.join(choices)}"
        if required:
            about += " (required)"
        elif kind is not bool and field.default is not None and "(default" not in about:
            about += f" (default: {field.default})"
        add = groups[field.metadata["group"]].add_argument
        if kind is bool:
            add(f"--{name}", action=argparse.BooleanOptionalAction, help=about)
        else:
            metavar = {int: "N", float: "X", str: "NAME"}[kind]
            add(
                f"--{name}",
                type=field.metadata.get("type", kind),
                metavar=field.metadata.get("metavar", metavar),
                required=required,
                help=about,
            )
    return parser


def _refuse_unknown(argv: Sequence[str]) -> None:
    """Names a misspelt flag; argparse would first ask for the required one it was meant for."""
    known = [f"--{name}" for name in (*_FIELDS, "help")]
    known += [f"--no-{name}" for name, field in _FIELDS.items() if _is_flag(field)]
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in known:
            raise UsageError(f"{flag}: no such flag{_close(flag, known)}; see --help")


def _is_flag(field: dataclasses.Field[Any]) -> bool:
    return str(field.type).startswith("bool")


def _close(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _check_value(field: dataclasses.Field[Any], value: Any) -> None:
    if value is None:
        return
    rules, where = field.metadata, f"--{field.name}: {value!r}"
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} is not a finite number")
    if "low" in rules and value < rules["low"]:
        raise UsageError(f"{where} is too small; expected {rules['low']} or more")
    if "above" in rules and value <= rules["above"]:
        raise UsageError(f"{where} is too small; expected more than {rules['above']}")
    if "high" in rules and value > rules["high"]:
        raise UsageError(f"{where} is too large; expected {rules['high']} or less")
    if "choices" in rules and value not in rules["choices"]:
        names = ", ".join(rules["choices"])
        raise UsageError(f"{where} is unknown{_close(value, rules['choices'])}; expected {names}")


def _holds_a_run(path: Path) -> bool:
    names = ("options.json", "metrics.jsonl", "checkpoints", "model")
    return any((path / name).exists() for name in names)


def _neighbours(path: Path) -> str:
    there = ", ".join(sorted(other.name for other in path.parent.glob("*.json")))
    return f"{path.parent} holds {there}" if there else "configs/llama_60m.json would be one"
