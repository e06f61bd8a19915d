"""Trains a LLaMA with Online Subspace Descent in PyTorch, in one process or several.

    python launch/train_torch.py --model_config configs/llama_60m.json --batch_size 32 \
        --optimizer galore_adamw --proj_type continuous --rank 128 --lr 0.01 --dataset builtin

    torchrun --standalone --nproc_per_node 2 launch/train_torch.py ...

Options are checked before anything is loaded; `--help` lists them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# When run as a script, Python looks for modules next to this file; `launch` is in the project's
# root.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch.trainer import description, keywords, resume, torch_processes
from launch.trainer.cli import UsageError, run_cli, set_up_logging
from launch.trainer.directory import claimed
from launch.trainer.loop import StopSignal, Trainer, run_updates, stacked
from launch.trainer.options import Options
from launch.trainer.processes import Processes
from launch.trainer.start import (
    check_alike,
    goes_on,
    hugging_face_weights,
    open_text,
    special_tokens,
)
from osd_names import OPTIMIZERS

if TYPE_CHECKING:
    import torch

log = logging.getLogger("launch")


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    processes = torch_processes.launched()
    with torch_processes.told_by_the_first(processes):
        options = Options.parse(argv, prog="train_torch.py").check(processes=processes.count)
        refuse_jax_only(options)
        set_up_logging(shows=processes.is_first)
        device = torch_processes.own_device()
        with torch_processes.joined(options, processes, device):
            return train(options, processes, device)


def refuse_jax_only(options: Options) -> None:
    """Rejects options that only the JAX trainer has, with the reason, and unsupported combinations.

    Raises:
        UsageError: Such an option is given.
    """
    meets = "torchrun connects the processes (--nnodes, --rdzv_endpoint)"
    reasons = {
        "mesh": "PyTorch has one device per process, and shards weights with --fsdp",
        "coordinator_address": meets,
        "num_processes": meets,
        "process_id": meets,
        "projector_init": "PyTorch starts from an SVD",
        "attention": "PyTorch's scaled_dot_product_attention selects among its own kernels",
        "shard_over_data": "PyTorch shards weights and state with --fsdp",
        "accumulate_sketches": "PyTorch accumulates sketches in layer-by-layer updates "
        "(--per_layer)",
    }
    options.refuse(reasons, "launch.train_jax")
    if options.devices.fsdp and options.devices.per_layer:
        raise UsageError(
            "--fsdp: it reduces the gradients of a whole layer at a time, but --per_layer and "
            "the *_per_layer optimizers step before that; use one of the two"
        )


def build_optimizer(options: Options, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, bool]:
    """The optimizer, and whether its step is compiled: with --compile, if it can be."""
    import torch

    import osd_torch
    from osd_torch import llama

    ns_dtype = options.optimizer.ns_dtype

    def build(capturable: bool = False) -> torch.optim.Optimizer:
        return osd_torch.make_optimizer(
            model.named_parameters(),
            options.optimizer.base,
            options.subspace.proj_type,
            lr=options.optimizer.lr,
            select=llama.is_projected,
            basis_dtype=getattr(torch, options.subspace.basis_dtype),
            ns_dtype=getattr(torch, ns_dtype) if ns_dtype else None,
            capturable=capturable,
            **keywords.optimizer_options(options),
        )

    is_whole = not (options.devices.per_layer or options.devices.compress_gradients)
    if options.devices.compile and is_whole and OPTIMIZERS[options.optimizer.base].is_projected:
        try:
            return build(capturable=True), True
        except osd_torch.NotCapturableError as error:
            log.warning("--compile compiles the model, but not the optimizer's step: %s", error)
    return build(), False


def train(options: Options, processes: Processes, device: torch.device) -> int:
    """Trains by the options, from the start or from a checkpoint; returns the exit code."""
    import torch
    import transformers

    from launch.trainer.run_log import RunLog
    from osd_torch import llama
    from osd_torch.llama.checkpoint import Checkpoints
    from osd_torch.llama.train import (
        learning_rate_schedule,
        make_eval_step,
        make_train_step,
        sample,
    )

    transformers.logging.disable_progress_bar()  # shown in every process while reading weights

    # Data and model. Any problem with them is found here, before anything is built.
    with processes.together(in_turn=True):
        config = llama.config_from_dict({"model_type": "llama", **options.model.config()})
        weights = hugging_face_weights(options)
        if weights:
            found = llama.load_config(weights / "config.json")
            check_alike(weights, llama.compared(found), llama.compared(config))
            if not goes_on(options):
                llama.weight_files(weights)  # raises for a folder without weights, before any work
        tokenizer, data = open_text(options, config.vocab_size)
        for name, value in special_tokens(tokenizer).items():
            setattr(config, name, value)
    batches = data.train(
        options.data.batch_size, processes.index, processes.count, workers=options.data.workers
    )

    # The model: Hugging Face weights, or new weights.
    dtype = options.model.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    made: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    with processes.together():
        if weights:
            model = llama.load_hf(weights, config=config, **made)
        else:
            model = llama.build(config, seed=options.run.seed, **made)
    llama.prepare(
        model,
        activation_checkpointing=options.model.activation_checkpointing,
        compile_layers=options.devices.compile,
    )
    if options.devices.fsdp:
        llama.fully_shard_llama(model, reshard_after_forward=options.devices.reshard_after_forward)

    # Optimizer and steps.
    schedule = learning_rate_schedule(
        options.optimizer.scheduler, **keywords.schedule_options(options)
    )
    keywords.check_words(options.optimizer.no_decay, (name for name, _ in model.named_parameters()))
    with processes.together():
        optimizer, compiles = build_optimizer(options, model)

    with processes.together():
        train_step = make_train_step(
            model,
            optimizer,
            schedule=schedule,
            micro_batches=options.data.gradient_accumulation,
            grad_clipping=options.optimizer.grad_clipping,
            per_layer=options.devices.per_layer,
            compress_gradients=options.devices.compress_gradients,
            compile_step=compiles,
        )

    # The initial state: a checkpoint, or the one just created.
    start, note = 0, None  # number of updates, and a message about them
    with processes.together():
        source, steps = resume.checkpoints_to_read(options, Checkpoints, "train_torch")
    with processes.together():
        check_all_see(processes, source.directory, steps)
        if steps:
            start, _, note = resume.go_on(
                options,
                processes,
                source.directory,
                steps,
                lambda step: (None, source.restore(step, model, optimizer)),
                batches,
            )
    micro_batches = stacked(batches, options.data.gradient_accumulation)
    done = start
    with (
        contextlib.ExitStack() as held,
        StopSignal(shows=processes.is_first) as stop,
    ):
        checkpoints = Checkpoints(options.run.save_path / "checkpoints", options.run.keep)
        with processes.together(in_turn=True):
            if processes.is_first:
                held.enter_context(claimed(options))
                # Damaged, or later than the requested one.
                checkpoints.set_aside_after(start)
        about = describe(options, processes, model, device, start)
        log = RunLog(options, resume_step=start or None, active=processes.is_first)
        held.enter_context(log)
        log.note(about)
        if note:
            log.note(note)

        def update(measure: bool) -> dict[str, float]:
            nonlocal done
            metrics = train_step(done, next(micro_batches), measure)
            done += 1
            if done == start + 1:  # PyTorch creates the state in the first update
                log.note(memory(optimizer, device))
            return metrics

        def save(step: int) -> None:
            places = processes.gathered(batches.get_state())
            checkpoints.save(step, model, optimizer, resume.extra(options, places))

        trainer = Trainer(
            update=update,
            eval_step=make_eval_step(model),
            save=save,
            sample=lambda prompt, length: sample(
                model, prompt, length=length, seed=options.run.seed
            ),
            save_model=lambda directory: llama.save_hf(directory, model),
        )
        run = (options, data, tokenizer, log, checkpoints, trainer, processes)
        return run_updates(*run, start=start, schedule=schedule, stop=stop)


def check_all_see(processes: Processes, directory: Path, steps: list[int]) -> None:
    """Raises if processes would start from different checkpoints.

    Raises:
        UsageError: Processes see different checkpoints in the directory.
    """
    first, *others = processes.gathered(steps)
    for process, seen in enumerate(others, 1):
        if seen != first:
            raise UsageError(
                f"--save_dir: in {directory} process 0 sees the checkpoints {first}, but process "
                f"{process} sees {seen}; every process needs the same files, such as on a disk "
                "that all machines share"
            )


def describe(
    options: Options,
    processes: Processes,
    model: torch.nn.Module,
    device: torch.device,
    step: int,
) -> str:
    """Prints a few lines about the run."""
    import torch

    from osd_torch.llama.checkpoint import size_in_bytes

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    several = f"{processes.count} x " if processes.count > 1 else ""
    return description.describe(
        options,
        parameters=sum(param.numel() for param in model.parameters()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=several + name,
        weight_bytes=size_in_bytes(model),
        step=step,
    )


def memory(optimizer: torch.optim.Optimizer, device: torch.device) -> str:
    """The memory that the first update needed."""
    import torch

    from osd_torch.llama.checkpoint import size_in_bytes

    text = description.optimizer_state(size_in_bytes(optimizer))
    if device.type == "cuda":
        text += f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:,.2f} GiB"
    return text


if __name__ == "__main__":
    sys.exit(run_cli(main))
