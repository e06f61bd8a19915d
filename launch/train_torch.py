"""Trains a LLaMA with Online Subspace Descent in PyTorch, in one process or several.

    python launch/train_torch.py --model_config configs/llama_60m.json --batch_size 32 \
        --optimizer galore_adamw --proj_type continuous --rank 128 --lr 0.01 --dataset builtin

    torchrun --standalone --nproc_per_node 2 launch/train_torch.py ...

Options are checked before anything is loaded; `--help` lists them.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

# As a script, Python looks for modules beside this file; `launch` is found in the project's root.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from launch import training
from launch.cpu import keep_memory
from launch.trainer.cli import UsageError, run_cli
from launch.trainer.options import Options

if TYPE_CHECKING:
    import torch

TIMEOUT_MINUTES = 10.0
GLOO_TIMEOUTS = ("Timed out waiting", "timeout caused pair closure")
SECONDS_FOR_THE_FIRST = 30.0
"""How long the others wait before they tell of a mistake in their options: on a busy machine the
first, which tells of the same, may be that far behind."""
SECONDS_TO_BE_STOPPED = 2.0
"""How long one of several processes waits before it tells of an error.

Most are the same on all, or follow from another process's end. torchrun stops the others as soon as
one has ended, so that only the first one's message, or the cause, is shown.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the program; returns its exit code."""
    try:
        options = Options.parse(argv, prog="train_torch.py").check(processes=process_count())
        refuse_jax_only(options)
        training.set_up_logging(shows=process_index() == 0)
        with processes(options) as device:
            return train(options, device)
    except (UsageError, OSError):
        if process_index():
            time.sleep(SECONDS_FOR_THE_FIRST)
        raise


def refuse_jax_only(options: Options) -> None:
    """Refuses what only the JAX trainer does, with the reason, and what PyTorch cannot combine.

    Raises:
        UsageError: such an option is given.
    """
    meets = "torchrun brings the processes together (--nnodes, --rdzv_endpoint)"
    reasons = {
        "mesh": "PyTorch has one device a process, and shares weights out by --fsdp",
        "coordinator_address": meets,
        "num_processes": meets,
        "process_id": meets,
        "projector_init": "PyTorch starts from an SVD",
        "accumulate_sketches": "PyTorch accumulates sketches where it updates layer by layer "
        "(--per_layer)",
    }
    for name, reason in reasons.items():
        if options.is_given(name):
            raise UsageError(f"--{name}: {reason}; leave it out, or use launch.train_jax")
    if options.devices.fsdp and options.devices.per_layer:
        raise UsageError(
            "--fsdp: it makes the gradients of a whole layer at a time, which --per_layer and "
            "the *_per_layer optimizers do not wait for; use one of the two"
        )


def process_count() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def process_index() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ.get("RANK", 0))


@contextlib.contextmanager
def processes(options: Options) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if there are several; gives this one's device.

    Raises:
        UsageError: there are more processes than GPUs, or they cannot meet.
        OSError: one has waited for another for too long.
    """
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        index, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= there:
            raise UsageError(
                f"--nproc_per_node: process {index + 1} of this machine has no GPU, of which there "
                f"are {there}; start at most {there}, or show more in CUDA_VISIBLE_DEVICES"
            )
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        # TF32 on tensor cores, as XLA does unless told otherwise: P's products are float32.
        torch.set_float32_matmul_precision("high")
    else:
        keep_memory()
    if process_count() == 1 and not options.devices.fsdp:
        yield device
        return
    # gloo for what lies on the CPU: counts, and what the processes agree on.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    minutes = options.devices.timeout_minutes or TIMEOUT_MINUTES
    alone: dict[str, Any] = {}
    if process_count() == 1:
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes), **alone)
        dist.barrier()  # nothing is written before all have checked their options
    except (RuntimeError, ValueError) as error:  # a port in use, an address that is none
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{training.several(process_count())} cannot meet at {where}: {reason}; start them by "
            "torchrun --standalone, which finds a free port, or give another --master_port"
        ) from None
    try:
        yield device
    except UsageError as error:  # all processes know of it, and the first one tells
        # Frees DistributedDataParallel, which would else free the group later. With Python's lock
        # held, that waits for a thread of gloo which may be waiting for the lock.
        traceback.clear_frames(error.__traceback__)
        dist.destroy_process_group()
        if process_index():
            raise SystemExit(2) from None
        raise
    except Exception as error:
        # Still connected, so that the others do not fail of this before it is told.
        time.sleep(SECONDS_TO_BE_STOPPED)
        if any(words in str(error) for words in GLOO_TIMEOUTS):
            raise OSError(
                f"another process has not answered for {minutes:g} minutes: it hangs, or is busy "
                "for longer than --timeout_minutes; see to it, or raise that, and go on with "
                "--resume"
            ) from error
        raise
    dist.destroy_process_group()


def train(options: Options, device: torch.device) -> int:
    """Trains as the options say, from the start or from a checkpoint; returns the exit code."""
    import torch
    import transformers

    import osd_torch
    from launch.data import is_exact, reshard
    from launch.run_log import RunLog
    from osd_torch import llama
    from osd_torch.llama.checkpoint import Checkpoints
    from osd_torch.llama.train import (
        learning_rate_schedule,
        make_eval_step,
        make_train_step,
        sample,
    )

    rank, world = process_index(), process_count()
    transformers.logging.disable_progress_bar()  # of reading weights, once in every process

    # Data and model. All that can be wrong with them shows here, before anything is built.
    with together(in_turn=True):
        config = llama.config_from_dict({"model_type": "llama", **options.model.config()})
        weights = training.hugging_face_weights(options)
        if weights:
            found = llama.load_config(weights / "config.json")
            training.check_alike(weights, llama.compared(found), llama.compared(config))
            if not training.goes_on(options):
                llama.weight_files(weights)  # refuses a folder without them before any work
        tokenizer, data = training.open_text(options, config.vocab_size)
        for name, value in training.special_tokens(tokenizer).items():
            setattr(config, name, value)
    batches = data.train(options.data.batch_size, rank, world, workers=options.data.workers)

    # The model: Hugging Face weights, or fresh ones.
    dtype = options.model.dtype or ("float32" if device.type == "cpu" else "bfloat16")
    made: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device}
    with together():
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
        llama.fully_shard_llama(model)

    # Optimizer and steps.
    schedule = learning_rate_schedule(
        options.optimizer.scheduler, **training.schedule_options(options)
    )
    training.check_words(options.optimizer.no_decay, (name for name, _ in model.named_parameters()))
    with together():
        optimizer = osd_torch.make_optimizer(
            model.named_parameters(),
            options.optimizer.base,
            options.subspace.proj_type,
            lr=options.optimizer.lr,
            select=llama.is_projected,
            basis_dtype=getattr(torch, options.subspace.basis_dtype),
            ns_dtype=getattr(torch, options.optimizer.ns_dtype)
            if options.optimizer.ns_dtype
            else None,
            **training.optimizer_options(options),
        )

    with together():
        train_step = make_train_step(
            model,
            optimizer,
            schedule=schedule,
            micro_batches=options.data.gradient_accumulation,
            grad_clipping=options.optimizer.grad_clipping,
            per_layer=options.devices.per_layer,
            compress_gradients=options.devices.compress_gradients,
        )

    # The state to start from: a checkpoint, or what was just made.
    start, note = 0, None
    with together():
        source, steps = training.checkpoints_to_read(options, Checkpoints, "train_torch")
    with together():
        check_all_see(source.directory, steps)
        if steps:
            start, _, places = training.restore_newest(
                options,
                source.directory,
                steps,
                lambda step: (None, source.restore(step, model, optimizer)),
            )
            batches.set_state(reshard(places, world)[rank])
            training.check_not_beyond(options, start, source.directory)
            if not is_exact(places, world):
                note = training.skipped_documents(len(places), world)
    micro_batches = training.stacked(batches, options.data.gradient_accumulation)
    done = start
    with (
        contextlib.ExitStack() as held,
        training.StopSignal(shows=rank == 0) as stop,
    ):
        checkpoints = Checkpoints(options.run.save_path / "checkpoints", options.run.keep)
        with together(in_turn=True):
            if rank == 0:
                held.enter_context(training.claimed(options))
                # Damaged, or younger than the one that was asked for.
                checkpoints.set_aside_after(start)
        about = describe(options, model, device, start)
        log = RunLog(options, resume_step=start or None, active=rank == 0)
        held.enter_context(log)
        log.note(about)
        if note:
            log.note(note)

        def update(measure: bool) -> dict[str, float]:
            nonlocal done
            metrics = train_step(done, next(micro_batches), measure)
            done += 1
            if done == start + 1:  # PyTorch makes the state in the first update
                log.note(memory(optimizer, device))
            return metrics

        def save(step: int) -> None:
            places = gathered(batches.get_state())
            checkpoints.save(step, model, optimizer, training.extra(options, places))

        trainer = training.Trainer(
            update=update,
            eval_step=make_eval_step(model),
            save=save,
            sample=lambda prompt, length: sample(
                model, prompt, length=length, seed=options.run.seed
            ),
            save_model=lambda directory: llama.save_hf(directory, model),
            process=(rank, world),
            any_process=any_process,
        )
        run = (options, data, tokenizer, log, checkpoints, trainer)
        return training.train(*run, start=start, schedule=schedule, stop=stop)


def together(in_turn: bool = False) -> contextlib.AbstractContextManager[None]:
    """What is the user's mistake in one process ends all; see `training.together`."""
    return training.together(gathered, process_index() == 0, in_turn)


def check_all_see(directory: Path, steps: list[int]) -> None:
    """Refuses to go on where processes would start from different checkpoints.

    Raises:
        UsageError: they see other ones in the directory.
    """
    first, *others = gathered(steps)
    for process, seen in enumerate(others, 1):
        if seen != first:
            raise UsageError(
                f"--save_dir: in {directory} process 0 sees the checkpoints {first}, and process "
                f"{process} sees {seen}; every process needs the same files, such as on a disk "
                "that all machines share"
            )


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return flag
    found = torch.tensor(float(flag))
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def gathered(value: Any) -> list[Any]:
    """What each process has, on every process."""
    from osd_torch.sharding import gathered

    return gathered(value)


def describe(options: Options, model: torch.nn.Module, device: torch.device, step: int) -> str:
    """What is about to run, in a few lines."""
    import torch

    from osd_torch.llama.checkpoint import size_in_bytes

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    several = f"{process_count()} x " if process_count() > 1 else ""
    return training.describe(
        options,
        parameters=sum(param.numel() for param in model.parameters()),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        device=several + name,
        weight_bytes=size_in_bytes(model),
        step=step,
    )


def memory(optimizer: torch.optim.Optimizer, device: torch.device) -> str:
    """What the first update has shown of the memory that is needed."""
    import torch

    from osd_torch.llama.checkpoint import size_in_bytes

    text = training.optimizer_state(size_in_bytes(optimizer))
    if device.type == "cuda":
        text += f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:,.2f} GiB"
    return text


if __name__ == "__main__":
    sys.exit(run_cli(main))
