"""The options of a run in groups: frozen dataclasses whose fields are flags with the same name.

Names, meanings and defaults are those of the published commands. This project adds the residuals,
the storage of the moments, Muon's options, `update_proj_every`, the section "paper" of `--help`,
and most of `Data`, `Run` and `Devices`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from launch.trainer.cli import UsageError
from launch.trainer.options.flags import DTYPES, Field, count, dtype_name, flag
from launch.trainer.options.method import Optimizer, Subspace
from osd_names import ATTENTIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """The model, its initial weights and its dtype."""

    model_config: str = flag(
        metavar="FILE",
        help="LLaMA shape: a JSON file in Hugging Face's config format, such as "
        "configs/llama_60m.json",
    )
    continue_from: str | None = flag(
        None,
        metavar="DIR",
        help="continue from here: a run, or one of its checkpoints, with everything (weights, "
        "optimizer, schedule, position in the data); a Hugging Face directory, with the "
        "weights only",
    )
    dtype: str | None = flag(
        None,
        choices=DTYPES,
        type=dtype_name,
        help="dtype of weights and activations (default: bfloat16 on an accelerator, float32 on a "
        "CPU)",
    )
    activation_checkpointing: bool = flag(
        False, help="save one activation per layer and recompute the rest in the backward pass"
    )
    attention: str = flag(
        "auto",
        section="jax",
        choices=ATTENTIONS,
        type=str.lower,
        help="how attention is computed: cudnn on a GPU, splash (a Pallas kernel) on a TPU, "
        "blockwise for long rows and written_out for short ones on a CPU; auto chooses by these "
        "rules",
    )

    def config(self) -> dict[str, Any]:
        """The contents of the model config file.

        Raises:
            UsageError: The file is missing, or not a JSON object.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """The data, and how much of it an update reads."""

    dataset: str = flag(
        "c4",
        metavar="NAME",
        help="builtin (the State of the Union addresses), c4, tfds:NAME, text:GLOB (a file, a "
        "folder or a pattern; .txt, .json, .jsonl, these as .gz or .zst, and .parquet), "
        "tokens:PATH or hf:NAME",
    )
    text_column: str = flag(
        "text",
        help="only for text: the key or column with the text in .json, .jsonl and .parquet files",
    )
    data_dir: str | None = flag(
        None,
        metavar="DIR",
        help="folder of prepared TensorFlow Datasets, or for c4 the folder that holds en/ with "
        "C4's own files, c4-train.*.json.gz and c4-validation.*.json.gz",
    )
    cache_dir: str | None = flag(
        None,
        metavar="DIR",
        help="folder of prepared data and trained tokenizers (default: $OSD_CACHE, else "
        "~/.cache/online_subspace_descent)",
    )
    tokenizer: str | None = flag(
        None,
        metavar="NAME",
        help="a Hugging Face tokenizer's directory or name, or byte (default: that of "
        "continue_from's model, else LLaMA's 32,000 pieces if the model's vocabulary is "
        "large enough, else one trained on the data)",
    )
    max_length: int = flag(256, low=2, help="tokens per row")
    pack: bool | None = flag(
        None,
        help="join the documents and cut them into full rows, or keep one document per row, "
        "truncated or padded (default: --pack for builtin, text: and tokens:, else "
        "--no-pack, as published)",
    )
    separate_documents: bool = flag(
        False,
        help="with --pack: no token sees another document of its row, positions start at 0 in "
        "each document, and its first token is not predicted",
    )
    batch_size: int = flag(low=1, help="rows in one forward pass of one process")
    gradient_accumulation: int = flag(
        0, low=0, help="forward passes per update (default: from the two batch sizes, else 1)"
    )
    total_batch_size: int = flag(
        0,
        low=0,
        help="rows per update, over all processes (default: batch_size x gradient_accumulation x "
        "processes)",
    )
    workers: int = flag(
        0,
        low=0,
        help="processes that read ahead for each training process; 0 reads in threads of the "
        "trainer itself, which is fastest on few cores. The data do not depend on it",
    )

    @property
    def tokens_per_update(self) -> int:
        """Positions per update over all processes, including padding; only for checked options."""
        return self.total_batch_size * self.max_length


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The run's directory, what it logs, and how it resumes."""

    name: str = flag("test", help="name of the run, whose log is in RUN_DIR/NAME")
    run_dir: str = flag("runs", metavar="DIR", help="parent folder of the runs")
    save_dir: str | None = flag(
        None,
        metavar="DIR",
        help="folder of checkpoints and the final model (default: RUN_DIR/NAME)",
    )
    save_every: int = flag(10_000, low=1, help="updates between two checkpoints")
    keep: int = flag(2, low=1, help="number of newest checkpoints to keep")
    resume: bool = flag(
        False, help="resume from the run's newest checkpoint; start the run if there is none"
    )
    overwrite: bool = flag(False, help="delete an earlier run of this name")
    eval_every: int = flag(
        5000, low=1, help="updates between two evaluations; there is always one at the end"
    )
    eval_tokens: int = flag(
        10_000_000,
        low=1,
        type=count,
        help="held-out tokens per evaluation, including padding (10M, 100K)",
    )
    log_every: int = flag(1, low=1, help="updates between two lines of the log")
    prompt: str = flag(
        "The", metavar="TEXT", help="prompt of the text sample that the trained model writes"
    )
    sample_tokens: int = flag(100, low=0, help="tokens of that sample; 0 writes none")
    seed: int = flag(0, low=0, high=2**32 - 1, help="seed of weights, data order and projectors")
    tags: str | None = flag(None, metavar="TEXT", help="free text, stored with the run's options")
    wandb: bool = flag(False, help="also log to Weights & Biases, which must be installed")

    @property
    def path(self) -> Path:
        """The run's directory: options, metrics, figures."""
        return Path(self.run_dir) / self.name

    @property
    def save_path(self) -> Path:
        """The folder of checkpoints and the final model."""
        return Path(self.save_dir) if self.save_dir else self.path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """How processes and devices share the work, and options that save memory."""

    single_gpu: bool = flag(
        False,
        help="one device: JAX then does not use the others. PyTorch accepts it, as in the "
        "published commands, and ignores it",
    )
    per_layer: bool = flag(
        False,
        help="update each layer inside the backward pass, so that the gradients of projected "
        "weights never accumulate (default: on for the *_per_layer optimizers)",
    )
    fsdp: bool = flag(
        False,
        help="shard weights, gradients and optimizer state over the devices; otherwise each "
        "holds all of them, and a share of the batch. In JAX the same as --mesh fsdp=-1",
    )
    reshard_after_forward: bool = flag(
        True,
        help="with --fsdp, or a mesh's fsdp axis: gather the weights of a layer again in the "
        "backward pass. --no-reshard_after_forward sends fewer bytes, and each device holds all "
        "layers whole during a step",
    )
    compress_gradients: bool = flag(
        False,
        help="reduce the low-rank sketch of a projected gradient over the processes, or over the "
        "mesh's data axis, instead of the gradient",
    )
    shard_over_data: bool = flag(
        False,
        section="jax",
        help="split weights and optimizer state over the mesh's data axis too (ZeRO); the weights "
        "are gathered over it once per update",
    )
    offload_inputs: bool = flag(
        False,
        section="jax",
        help="with --per_layer: keep the layers' inputs in the host's memory between the forward "
        "and the backward pass",
    )
    accumulate_sketches: bool = flag(
        False,
        section="jax",
        help="accumulate the sketch of a projected gradient of each micro-batch instead of the "
        "gradient, as layer-by-layer updates do in either framework",
    )
    mesh: str | None = flag(
        None,
        section="jax",
        metavar="SIZES",
        help="data=D,fsdp=F,tensor=T: D groups of F x T devices; each group holds one copy, "
        "weights are sharded over F and, as in Megatron, over T, and the batch over D x F. "
        "An omitted size is 1, -1 takes the remaining devices (default: data=-1, all "
        "devices)",
    )
    coordinator_address: str | None = flag(
        None,
        section="jax",
        metavar="HOST:PORT",
        help="address at which several processes connect: the host name of the first process's "
        "machine, and any free port of it",
    )
    num_processes: int | None = flag(None, section="jax", low=1, help="number of processes")
    process_id: int | None = flag(None, section="jax", low=0, help="index of this process, from 0")
    compile: bool = flag(
        False,
        section="pytorch",
        help="compile the layers with torch.compile: slower to start, then faster",
    )
    timeout_minutes: float | None = flag(
        None,
        section="pytorch",
        above=0,
        high=10_000,
        help="how long a process waits for another one before the run ends; the first one "
        "prepares the data meanwhile (default: 10)",
    )


def _neighbours(path: Path) -> str:
    there = ", ".join(sorted(other.name for other in path.parent.glob("*.json")))
    return f"{path.parent} holds {there}" if there else "configs/llama_60m.json would be one"


GROUPS: dict[str, type] = {
    "model": Model,
    "data": Data,
    "optimizer": Optimizer,
    "subspace": Subspace,
    "run": Run,
    "devices": Devices,
}
FLAGS: dict[str, Field] = {
    field.name: field for group in GROUPS.values() for field in dataclasses.fields(group)
}
"""Every flag by its name, which no two groups share."""
