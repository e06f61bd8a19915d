"""The train step, the eval step, the learning rate schedule, and text sampling.

For one process or several: if `torch.distributed` is initialized, all processes call every function
here, and the results are over all of them.
"""

from __future__ import annotations

import contextlib
import math
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers import DynamicCache, LlamaForCausalLM

from osd_torch import llama
from osd_torch.clipping import clip_
from osd_torch.guard import skipped_steps
from osd_torch.layerwise import LayerwiseUpdates
from osd_torch.layout import to_matrix
from osd_torch.numerics import accumulator_dtype, without_autocast
from osd_torch.sharding import (
    Reduce,
    data_parallel,
    mean_over_processes,
    process_count,
    sum_over_processes,
    whole,
)
from osd_torch.sketch import TwoSided, low_rank_gradient
from osd_torch.state import NOT_SET, basis_of, inner_optimizer, named_parameters
from osd_torch.subspace import SubspaceOptimizer

Batch = Mapping[str, Any]  # "tokens", "mask" and, if documents are separate, "segments"; NumPy
Metrics = dict[str, float]
TrainStep = Callable[[int, Batch, bool], Metrics]
EvalStep = Callable[[Batch], tuple[float, int]]


def learning_rate_schedule(
    scheduler: str,
    *,
    num_training_steps: int,
    warmup_steps: int = 0,
    min_lr_ratio: float = 0.1,
    cycle_length: int | None = None,
    restart_warmup_steps: int = 0,
) -> Callable[[int], float]:
    """The learning rate as a fraction of its peak: (step, from 0) -> factor in [0, 1].

    All schedules rise linearly from 0 over `warmup_steps`. As in the release, the cosines end at
    `min_lr_ratio` and "linear" at 0.

    Args:
        scheduler: "linear" or "cosine" decay; "cosine_restarts" is the cosine, reset to 0 every
            `cycle_length` steps, from which it rises linearly over `restart_warmup_steps`.
        num_training_steps: Number of steps of the run.
        warmup_steps: Number of steps of the first warmup.
        min_lr_ratio: The final factor of a cosine.
        cycle_length: Number of steps between restarts; only read for "cosine_restarts".
        restart_warmup_steps: Number of warmup steps after a restart.

    Raises:
        ValueError: The scheduler is unknown, or restarts have no cycle length.

    Example:
        >>> schedule = learning_rate_schedule("cosine", num_training_steps=100, warmup_steps=10)
        >>> [round(schedule(step), 3) for step in (0, 5, 10, 55, 100)]
        [0.0, 0.5, 1.0, 0.55, 0.1]
    """
    if scheduler not in ("linear", "cosine", "cosine_restarts"):
        raise ValueError(f"scheduler is {scheduler!r}: expected linear, cosine or cosine_restarts")
    if scheduler == "cosine_restarts" and not cycle_length:
        raise ValueError(f"cycle_length is {cycle_length!r}: cosine_restarts needs at least 1")
    cycle = cycle_length or num_training_steps

    def decay(step: int) -> float:
        done = (step - warmup_steps) / max(1, num_training_steps - warmup_steps)
        done = min(max(done, 0), 1)
        if scheduler == "linear":
            return 1 - done
        return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    def factor(step: int) -> float:
        into = step % cycle
        if scheduler == "cosine_restarts" and step >= cycle and into < restart_warmup_steps:
            return into / restart_warmup_steps * decay(step - into + restart_warmup_steps)
        return step / warmup_steps if step < warmup_steps else decay(step)

    return factor


def make_train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    *,
    schedule: Callable[[int], float],
    micro_batches: int = 1,
    grad_clipping: float = 0.0,
    per_layer: bool = False,
    compress_gradients: bool = False,
    compile_step: bool = False,
) -> TrainStep:
    """Builds the train step, for one process or all of `torch.distributed`.

    Args:
        model: The LLaMA, unsharded or sharded by `fully_shard_llama`.
        optimizer: From `make_optimizer`, with the model's parameters. The peak learning rate of
            each group is its `lr` when this is called.
        schedule: Its factor at each counted step, from 0; sets `lr` in the optimizer's groups.
        micro_batches: K, the number of micro-batches per update.
        grad_clipping: Maximum norm; 0 does not clip. "gradient_norm" below says which norm.
        per_layer: Whether to update each layer inside the backward pass; see `LayerwiseUpdates`.
        compress_gradients: Whether to average sketches over the processes instead of gradients.
        compile_step: Whether to compile the optimizer's step; it must be capturable.

    Returns:
        A function (step, batch, measure) -> metrics, which all processes call alike.

        `step` counts the attempted updates before this one, including skipped ones.

        `batch` is this process's, with "tokens", int32 (K, B, S), and "mask", bool (K, B, S), False
        for tokens that are not labels, such as padding; "segments", int32 (K, B, S), as in
        `llama.loss`, is optional. The model processes the K micro-batches one by one; the gradient
        is that of the mean loss over all their tokens on all processes. Gradients are summed over
        micro-batches in the weights' dtype, as PyTorch does, and sketches in float32.

        `measure` says whether to measure the subspace, which costs one more product of each
        gradient.

        Metrics are "loss" (mean over predicted tokens, nats, before the update), "gradient_norm"
        (before clipping, of the whole gradient; with `per_layer` or `compress_gradients`, where no
        process holds the whole gradient, of what is applied, `R = P^T G` for a projected weight),
        "skipped" and "skipped_in_a_row" (updates with a non-finite gradient) and, for measured
        steps, "energy/KIND", the fraction of the gradient's squared norm that P captures, and
        "orthonormality/KIND", `||P^T P - I||_F / sqrt(r)`, each a mean over the layers of a kind
        such as "attention/query". With `per_layer` the energy is that of the micro-batches'
        gradients, and with several processes it is then the mean of theirs.

    Raises:
        ValueError: Options are incompatible, such as sharded weights and `per_layer`.
    """
    processes = process_count()
    device = next(model.parameters()).device
    local_gradients = per_layer or compress_gradients
    reduce: Reduce | None = None
    if processes > 1 and local_gradients:
        reduce = mean_over_processes()
    elif compress_gradients:
        reduce = lambda tensor: tensor  # the mean over one process, for clipping
    whole_model = not isinstance(model, FSDPModule)
    forward: torch.nn.Module = TokenLoss(model)
    if processes > 1 and whole_model and not reduce:
        forward = data_parallel(forward)
    diagnostics = Measurement(optimizer, in_backward=per_layer)  # its hooks run before those below
    updates = None
    if per_layer:
        updates = LayerwiseUpdates(
            optimizer, micro_batches=micro_batches, grad_clipping=grad_clipping, reduce=reduce
        )
    elif reduce:
        assert isinstance(optimizer, SubspaceOptimizer)
        optimizer.reduce = reduce

    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    if isinstance(optimizer, SubspaceOptimizer):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak_lr"] = peak  # known here, so not estimated
    take_step: Callable[[], Any] = optimizer.step
    if compile_step:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = torch.tensor(peak, dtype=torch.float32, device=device)
        take_step = compiled_step(optimizer)

    def train_step(step: int, batch: Batch, measure: bool) -> Metrics:
        factor = schedule(step - skipped_steps(optimizer)[0])
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            set_lr(group, peak * factor)
        arrays = _batch_arrays(batch)
        counts = sum_over_processes(arrays[1][..., 1:].sum(dim=(1, 2)))
        count = int(counts.sum())
        # Gradients are averaged over the processes, and each has its part of the sum.
        scale = processes / count if count else math.nan
        diagnostics.start(measure)
        total = torch.zeros((), dtype=torch.float32, device=device)
        for k in range(micro_batches):
            if updates:
                updates.share = int(counts[k]) / max(count, 1)
            with _synchronised(forward, k == micro_batches - 1):
                loss, _ = forward(*(array[k].to(device) for array in arrays))
                # Non-finite if the loss is, so that the optimizer skips the step.
                (loss * torch.where(loss.isfinite(), scale, math.nan)).backward()
            total += loss.detach()
        if updates:
            norm = updates.finish()
        else:
            diagnostics.of_gradients()
            norm = clip_(optimizer, grad_clipping)
            take_step()
            optimizer.zero_grad()
        skipped, in_a_row = skipped_steps(optimizer)
        measured = diagnostics.results(mean=local_gradients)

        return {
            "loss": float(sum_over_processes(total)) / count if count else math.nan,
            "gradient_norm": float(norm),
            "skipped": skipped,
            "skipped_in_a_row": in_a_row,
            **measured,
        }

    return train_step


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Sets a group's learning rate, in place if it is a tensor, as compiled steps read it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def compiled_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The compiled step of a capturable optimizer; the host sets P where it is due."""
    if not isinstance(optimizer, SubspaceOptimizer) or not optimizer.is_capturable:
        raise ValueError(
            f"compile_step is True, but the {type(optimizer).__name__} is not capturable: build it "
            "by make_optimizer(..., capturable=True)"
        )
    compiled = torch.compile(optimizer.step, fullgraph=True)

    def step() -> None:
        optimizer.refresh_()
        compiled()

    return step


class TokenLoss(torch.nn.Module):
    """`llama.loss` as a module's forward pass, on which DDP and FSDP act."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model
        self.is_sharded = isinstance(model, FSDPModule)
        if self.is_sharded:
            # FSDP gathers weights when a forward method is called, so the loss must be one.
            model.token_loss = types.MethodType(llama.loss, model)  # type: ignore[assignment]
            register_fsdp_forward_method(model, "token_loss")

    def forward(self, *arrays: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens, mask and optional segments, (B, S) -> sum of the losses, and their number."""
        if self.is_sharded:
            return self.model.token_loss(*arrays)  # type: ignore[operator]
        return llama.loss(self.model, *arrays)


def _batch_arrays(batch: Batch) -> list[Tensor]:
    """A batch's arrays as tensors on the CPU, in the order of `llama.loss`."""
    names = ("tokens", "mask", "segments")
    return [torch.from_numpy(batch[name]) for name in names if name in batch]


@contextlib.contextmanager
def _synchronised(forward: torch.nn.Module, is_last: bool) -> Iterator[None]:
    """Makes DDP average gradients once per update, after the last micro-batch."""
    waits = isinstance(forward, torch.nn.parallel.DistributedDataParallel) and not is_last
    with forward.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
        yield


class Measurement:
    """Compares P with the gradients that it is about to project, by kind of kernel.

    Args:
        optimizer: The optimizer with P.
        in_backward: Whether gradients are freed after the backward pass and must be measured in it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, in_backward: bool) -> None:
        self._optimizer = optimizer = inner_optimizer(optimizer)
        self._active = False
        self._sums: dict[str, list[Tensor]] = {}  # by kernel: captured, squared norm, deviation
        self._kernels: dict[Tensor, tuple[dict[str, Any], str]] = {}
        if isinstance(optimizer, SubspaceOptimizer):
            for group in optimizer.param_groups:
                if group["rank"] is not None:
                    self._kernels |= {p: (group, name) for name, p in named_parameters(group)}
        if in_backward:
            for param in self._kernels:
                param.register_post_accumulate_grad_hook(self._add)

    def start(self, measure: bool) -> None:
        """Begins an update."""
        self._active = measure
        self._sums = {}

    def of_gradients(self) -> None:
        """Measures all current gradients."""
        for param in self._kernels:
            self._add(param)

    @torch.no_grad()
    @without_autocast()
    def _add(self, param: Tensor) -> None:
        state = self._optimizer.state.get(param)
        if not self._active or not state or param.grad is None:
            return
        if int(state["set_at"]) == NOT_SET:
            return
        assert isinstance(self._optimizer, SubspaceOptimizer)
        group, name = self._kernels[param]
        gradient = whole(param.grad)
        basis = basis_of(state)
        sides = [whole(side) for side in (basis if isinstance(basis, TwoSided) else [basis])]
        matrix = to_matrix(gradient, self._optimizer.side(group, param))
        both = len(sides) == 2
        low_rank = low_rank_gradient(TwoSided(*sides) if both else sides[0], matrix)
        grams = [side.mT.to(low_rank.dtype) @ side.to(low_rank.dtype) for side in sides]
        # ||P R||^2 = <R, (P^T P) R>
        weighted = grams[0] @ low_rank
        if both:
            weighted = weighted @ grams[1]
        eye = torch.eye(len(grams[0]), dtype=low_rank.dtype, device=low_rank.device)
        off = [torch.linalg.matrix_norm(gram - eye) / len(gram) ** 0.5 for gram in grams]
        wide = matrix.to(accumulator_dtype(matrix.dtype))
        found = [(low_rank * weighted).sum(), wide.square().sum(), torch.stack(off).max()]
        if name in self._sums:
            found[:2] = [a + b for a, b in zip(self._sums[name], found[:2], strict=False)]
        self._sums[name] = found

    def results(self, mean: bool) -> Metrics:
        """The measurements of this update, as numbers; empty if it was not measured.

        Args:
            mean: Whether to average over the processes, whose gradients differ.
        """
        parts: dict[str, list[Tensor]] = defaultdict(list)
        for name, (captured, norm, off) in self._sums.items():
            kind = llama.kind(name) or name
            parts[f"energy/{kind}"].append(captured / torch.where(norm > 0, norm, 1))
            parts[f"orthonormality/{kind}"].append(off)
        if not parts:
            return {}
        names = sorted(parts)
        values = torch.stack([torch.stack(parts[name]).mean() for name in names])
        if mean:
            values = sum_over_processes(values) / process_count()
        return dict(zip(names, values.tolist(), strict=True))


def make_eval_step(model: LlamaForCausalLM) -> EvalStep:
    """Builds the eval step.

    Returns:
        A function of a batch as of `make_train_step`, with arrays (B, S) -> (sum of the tokens'
        losses in nats, their number), over all processes.
    """
    forward = TokenLoss(model)
    device = next(model.parameters()).device

    @torch.no_grad()
    def eval_step(batch: Batch) -> tuple[float, int]:
        model.eval()
        loss, count = forward(*(array.to(device) for array in _batch_arrays(batch)))
        model.train()
        both = sum_over_processes(torch.stack([loss.double(), count.double()]))
        return float(both[0]), int(both[1])

    return eval_step


@torch.no_grad()
def sample(
    model: LlamaForCausalLM,
    prompt: np.ndarray,
    *,
    length: int,
    seed: int = 0,
    temperature: float = 0.8,
) -> np.ndarray:
    """Continues a prompt by sampling.

    Args:
        model: The LLaMA. If it is sharded, all processes call this.
        prompt: Token ids, at least one.
        length: Total number of tokens, including the prompt.
        seed: Seed of the draws.
        temperature: Divides the logits.

    Returns:
        int32 (length,), or shorter if the end-of-text token is drawn.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    tokens = [int(token) for token in prompt[:length]]
    ends = set(np.ravel(model.config.eos_token_id or []).tolist())
    cache = DynamicCache(config=model.config)
    new = tokens
    while len(tokens) < length:
        ids = torch.tensor([new], device=device)
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        odds = torch.softmax(logits[0, -1].float().cpu() / temperature, dim=0)
        new = [int(torch.multinomial(odds, 1, generator=generator))]
        if new[0] in ends:
            break
        tokens += new
    model.train()
    return np.asarray(tokens, np.int32)
