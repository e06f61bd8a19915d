"""Checks of options that need no framework; each check takes the groups that it reads.

All raise UsageError with the value, what was expected and what to do.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

from launch.trainer.cli import UsageError, user_errors
from launch.trainer.options.flags import close
from launch.trainer.options.groups import FLAGS, Data, Devices, Model, Run
from launch.trainer.options.method import Optimizer, Subspace
from osd_names import OPTIONS, check_moments, check_muon, check_residual

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
)  # fmt: skip
_PLACED = ("tfds", "text", "tokens", "hf")  # prefixes of a dataset's location


# ----------------------------------------------------------------- silently ignored options


def check_read(optimizer: Optimizer, subspace: Subspace, devices: Devices) -> None:
    """Rejects a flag that the chosen optimizer or schedule would silently ignore."""
    projected = ("a galore_* optimizer or osd_muon", optimizer.is_projected)
    restarts = ("--scheduler cosine_restarts", optimizer.scheduler == "cosine_restarts")
    readers = {  # flag -> who reads it, and whether that applies here
        name: (
            reader.who.replace("proj_type", "--proj_type"),
            reader.reads(optimizer.base, subspace.proj_type),
        )
        for name, (_, reader) in OPTIONS.items()
        if name in FLAGS
    }
    readers |= {
        "cycle_length": restarts,
        "restart_warmup_steps": restarts,
        "min_lr_ratio": ("a cosine --scheduler", optimizer.scheduler != "linear"),
        "galore_scale": ("a galore_* optimizer", optimizer.optimizer.startswith("galore_")),
    }
    readers |= dict.fromkeys(("compress_gradients", "accumulate_sketches"), projected)
    readers |= dict.fromkeys(("proj_type", "rank", "update_proj_gap", "basis_dtype"), projected)
    values = {**vars(optimizer), **vars(subspace), **vars(devices)}
    for name, (reader_name, is_read) in readers.items():
        if not is_read and values[name] != FLAGS[name].default:
            raise UsageError(
                f"--{name}: only {reader_name} reads it, but this is --optimizer "
                f"{optimizer.optimizer} --proj_type {subspace.proj_type} --scheduler "
                f"{optimizer.scheduler}; leave it out"
            )
    with user_errors("nesterov"):
        check_muon(optimizer.muon_scale, optimizer.nesterov, optimizer.momentum)
    with user_errors("residual"):
        check_residual(
            subspace.residual,
            subspace.residual_scale,
            subspace.growth_limiter,
            subspace.galore_scale,
            "galore_scale",
        )
    with user_errors("first_moment"):
        check_moments(optimizer.second_moment, optimizer.first_moment)


def check_no_decay(optimizer: Optimizer) -> None:
    """Rejects words of `--no_decay` that are empty or that no weight decay reads."""
    if optimizer.no_decay is None:
        return
    if not optimizer.weight_decay:
        raise UsageError("--no_decay: only --weight_decay above 0 reads it; leave it out")
    if not all(map(str.strip, optimizer.no_decay.split(","))):
        raise UsageError(
            f"--no_decay: {optimizer.no_decay!r} contains an empty word; expected words separated "
            "by commas, such as norm,embed,head"
        )


def check_devices(devices: Devices) -> None:
    """Rejects two flags that specify the same thing differently."""
    if devices.fsdp and devices.compress_gradients:
        raise UsageError(
            "--compress_gradients: --fsdp itself reduces whole gradients; use one of the two"
        )
    if devices.accumulate_sketches and devices.compress_gradients:
        raise UsageError(
            "--accumulate_sketches: --compress_gradients makes one sketch of the sum of the "
            "micro-batches' gradients; use one of the two"
        )
    if devices.mesh is not None and (devices.fsdp or devices.single_gpu):
        other = "--fsdp" if devices.fsdp else "--single_gpu"
        raise UsageError(f"--mesh: {other} also determines how devices are used; leave one out")


def check_memory(devices: Devices) -> None:
    """Rejects options about memory where they have no effect; for a resolved group."""
    if devices.offload_inputs and not devices.per_layer:
        raise UsageError(
            "--offload_inputs: only layer-by-layer updates (--per_layer) read it; add --per_layer, "
            "or leave it out"
        )
    if devices.shard_over_data:
        if devices.per_layer:
            raise UsageError(
                "--shard_over_data: layer-by-layer updates (--per_layer) read weights and state a "
                "layer at a time; split them over --mesh fsdp=F, and leave one of the two out"
            )
        if devices.compress_gradients:
            raise UsageError(
                "--shard_over_data: --compress_gradients keeps weights and state whole over the "
                "mesh's data axis; use one of the two"
            )
        if devices.fsdp or devices.single_gpu:
            other = "--fsdp" if devices.fsdp else "--single_gpu"
            raise UsageError(
                f"--shard_over_data: {other} leaves no data axis over which to split; leave one out"
            )
    if devices.reshard_after_forward:
        return
    if devices.per_layer:
        raise UsageError(
            "--no-reshard_after_forward: layer-by-layer updates (--per_layer) gather one layer at "
            "a time; leave one of them out"
        )
    if not devices.fsdp and devices.mesh is None:
        raise UsageError(
            "--no-reshard_after_forward: only weights that are split over devices are gathered; "
            "add --fsdp or, in JAX, --mesh fsdp=F, or leave it out"
        )


def check_wandb(run: Run) -> None:
    """Rejects `--wandb` if it is not installed."""
    if run.wandb and importlib.util.find_spec("wandb") is None:
        raise UsageError("--wandb: wandb is not installed; pip install wandb, or leave it out")


# ----------------------------------------------------------- sketches instead of gradients


def check_sketches(data: Data, optimizer: Optimizer, subspace: Subspace, devices: Devices) -> None:
    """Rejects a rule that needs the gradient if only its sketch is kept; for resolved groups."""
    several = data.gradient_accumulation > 1
    _check_gradients_stay(several, optimizer, subspace, devices)
    waits = several or optimizer.grad_clipping
    if devices.per_layer and waits and subspace.move_projector == "before":
        cause = "--grad_clipping" if optimizer.grad_clipping else "several micro-batches"
        raise UsageError(
            "--move_projector: before recomputes R from the gradient, but layer-by-layer updates "
            f"(--per_layer) with {cause} keep only a sketch of it; use after, or one micro-batch "
            "per update and no clipping"
        )
    if not devices.accumulate_sketches:
        return
    if devices.per_layer or not several:
        reason = (
            "layer-by-layer updates (--per_layer) always do so"
            if devices.per_layer
            else "an update has one micro-batch, and nothing is accumulated"
        )
        raise UsageError(f"--accumulate_sketches: {reason}; leave it out")
    if subspace.move_projector == "before":
        raise UsageError(
            "--move_projector: before recomputes R from the gradient, but --accumulate_sketches "
            "keeps only a sketch of it; use after"
        )


def _check_gradients_stay(
    several: bool, optimizer: Optimizer, subspace: Subspace, devices: Devices
) -> None:
    """Rejects sketches instead of gradients if the lift adds the gradient itself."""
    rule = f"--residual {subspace.residual}"
    if optimizer.base == "osd_muon":
        rule = f"--optimizer {optimizer.optimizer}"
    elif subspace.residual == "none":
        return
    causes = {  # flag, and the additional condition under which it drops the gradient
        ("accumulate_sketches", ""): devices.accumulate_sketches,
        ("compress_gradients", ""): devices.compress_gradients,
        ("per_layer", " with several micro-batches"): devices.per_layer and several,
        ("per_layer", " with --grad_clipping"): devices.per_layer and optimizer.grad_clipping,
    }
    for (name, beside), is_given in causes.items():
        if is_given:
            raise UsageError(
                f"--{name}: {rule} adds a part of the gradient itself, but --{name}{beside} keeps "
                "only its sketch; leave one of them out"
            )


# ---------------------------------------------------------------------- model and data


def check_model(model: Model, max_length: int) -> None:
    """Rejects a config that is not a LLaMA's, or one with too few positions."""
    config, where = model.config(), f"--model_config: {model.model_config}"
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
    if longest is not None and max_length > longest:
        raise UsageError(
            f"--max_length: {max_length} is more than the {longest} positions of "
            f"{model.model_config}; lower it, or raise max_sequence_length there"
        )


def check_data(data: Data) -> None:
    """Rejects an unknown dataset, and one whose files are missing or empty."""
    from launch.data.common import check_separate  # these import NumPy
    from launch.data.files import c4_files, text_files

    kind, _, where = data.dataset.partition(":")
    if kind not in ("builtin", "c4", *_PLACED) or (kind in _PLACED) != bool(where):
        known = ["builtin", "c4", *(f"{name}:" for name in _PLACED)]
        raise UsageError(
            f"--dataset: {data.dataset!r} is unknown{close(data.dataset, known)}; expected "
            "builtin, c4, tfds:NAME, text:GLOB, tokens:PATH or hf:NAME"
        )
    if data.text_column != FLAGS["text_column"].default and kind != "text":
        raise UsageError(
            f"--text_column: only text: reads it, but --dataset is {data.dataset}; leave it out"
        )
    if data.separate_documents:
        with user_errors("separate_documents"):
            check_separate(kind, data.pack)
    if not data.text_column:
        raise UsageError("--text_column: '' is not a name; leave it out for text")
    if kind in ("text", "tokens"):
        files = [Path(where)] if Path(where).is_file() else []
        if kind == "text":
            with user_errors("dataset"):
                files = text_files(where)
        if not files:
            raise UsageError(f"--dataset: no file matches {where}; expected a file to read")
        if not any(path.stat().st_size for path in files):
            names = ", ".join(map(str, files[:3]))
            raise UsageError(f"--dataset: {names} is empty; there is nothing to train on")
    local = data.data_dir is not None and "://" not in data.data_dir
    if data.data_dir and local and not Path(data.data_dir).is_dir():
        raise UsageError(
            f"--data_dir: no directory {data.data_dir}; expected the one with the prepared data"
        )
    if kind == "c4":
        with user_errors("data_dir"):
            c4_files(data.data_dir)


# ----------------------------------------------------------- derived values


def with_batch(data: Data, processes: int) -> Data:
    """The data's options with `gradient_accumulation` and `total_batch_size` filled in."""
    unit = data.batch_size * processes
    shares = f"--batch_size {data.batch_size} x {processes} process" + "es" * (processes > 1)
    steps = data.gradient_accumulation or max(1, data.total_batch_size // unit)
    total = data.total_batch_size or unit * steps
    if total != unit * steps:
        if data.gradient_accumulation:
            raise UsageError(
                f"--total_batch_size: {total} is not {unit * steps} ({shares} x "
                f"--gradient_accumulation {steps}); leave one of the three out"
            )
        near = unit * max(1, round(total / unit))
        raise UsageError(
            f"--total_batch_size: {total} is not a multiple of {unit} ({shares}); use {near}, "
            "or another --batch_size"
        )
    return dataclasses.replace(data, gradient_accumulation=steps, total_batch_size=total)


def with_steps(optimizer: Optimizer, data: Data) -> Optimizer:
    """The optimizer's options with the number of updates and the schedule's cycle filled in.

    Args:
        optimizer: As given.
        data: From `with_batch`.
    """
    steps = optimizer.num_training_steps
    if optimizer.max_train_tokens is not None:
        steps = optimizer.max_train_tokens // data.tokens_per_update
        if steps < 1:
            raise UsageError(
                f"--max_train_tokens: {optimizer.max_train_tokens} is less than one update of "
                f"{data.tokens_per_update} tokens ({data.total_batch_size} rows of "
                f"{data.max_length}); raise it, or lower --total_batch_size"
            )
    if optimizer.warmup_steps > steps:
        raise UsageError(
            f"--warmup_steps: {optimizer.warmup_steps} is more than the run's {steps} updates; "
            f"lower it, to {steps // 10} for example"
        )
    cycle, restart = optimizer.cycle_length, optimizer.restart_warmup_steps
    if optimizer.scheduler == "cosine_restarts":
        cycle = max(1, steps // 4) if cycle is None else cycle
        restart = max(1, cycle // 10) if restart is None else restart
        warmups = {"warmup_steps": optimizer.warmup_steps, "restart_warmup_steps": restart}
        for name, value in warmups.items():
            if value > cycle:
                raise UsageError(
                    f"--{name}: {value} is more than a cycle of {cycle} updates; lower it, or "
                    "raise --cycle_length"
                )
    return dataclasses.replace(
        optimizer, num_training_steps=steps, cycle_length=cycle, restart_warmup_steps=restart
    )


# ------------------------------------------------------------------------- directories


def check_directories(run: Run, model: Model, data: Data, is_own: bool) -> None:
    """Rejects a run that would overwrite another one, or that cannot be written.

    Args:
        run: The group of the run.
        model: The group of the model.
        data: The group of the data.
        is_own: Whether `--continue_from` names this run itself.
    """
    if not run.name or Path(run.name).name != run.name or run.name == "..":
        raise UsageError(
            f"--name: {run.name!r} is not a plain name; give its directory with --run_dir"
        )
    for path in (run.path, run.save_path):
        nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
        if not nearest.is_dir():
            raise UsageError(f"--run_dir, --save_dir: {nearest} is a file, not a directory")
    if run.overwrite and (run.resume or model.continue_from is not None):
        raise UsageError(
            "--overwrite restarts from the beginning, but --resume and --continue_from continue "
            "a run: leave one out"
        )
    doomed = [(run.save_path / name).resolve() for name in ("checkpoints", "model")]
    read = {"model_config": model.model_config, "tokenizer": data.tokenizer}
    for name, place in read.items():
        path = Path(place or "").resolve()
        if run.overwrite and any(path.is_relative_to(directory) for directory in doomed):
            raise UsageError(
                f"--{name}: {path} is part of what --overwrite deletes; copy it, or use "
                "another --name"
            )
    if model.continue_from is not None and not Path(model.continue_from).is_dir():
        raise UsageError(
            f"--continue_from: no directory {model.continue_from}; expected a run, one of its "
            "checkpoints or a Hugging Face model"
        )
    taken = next((path for path in (run.path, run.save_path) if holds_a_run(path)), None)
    if taken and not (run.resume or run.overwrite or is_own):
        raise UsageError(
            f"--name: {taken} already contains a run; resume it with --resume, replace it with "
            "--overwrite, or choose another --name"
        )


def holds_a_run(path: Path) -> bool:
    """Whether a directory contains parts of an earlier run."""
    names = ("options.json", "metrics.jsonl", "checkpoints", "model")
    return any((path / name).exists() for name in names)
