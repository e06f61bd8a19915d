"""Updates layer by layer: a gradient lives only until the backward pass has made the next one.

    updates = LayerwiseUpdates(optimizer, micro_batches=K, grad_clipping=1.0)
    for each update:
        for each micro-batch:
            updates.share = its tokens / the update's tokens
            loss.backward()
        norm = updates.finish()

With one micro-batch and no clipping, a hook on each parameter takes its step inside the backward
pass, for any optimizer. Else a step has to wait for the whole update: the hook of a projected
parameter adds the gradient's sketch to the held one, (p + q) r numbers for p q, and `finish` takes
the one step. Either way a gradient of a projected parameter is gone when its hook returns.
Parameters that are not projected have no sketch: where the step waits, their gradients wait with
it, so that a full-rank optimizer saves nothing there.

Where the step waits, a gradient that is not finite skips the whole update. Inside the backward
pass it skips the parameters that have one; those whose gradients are finite take their steps, as
the earlier ones have done by then. Either way it counts as one skipped step.

What a sum of sketches is and is not: `SubspaceOptimizer.accumulate`. The learning rate must be set
before the update's first backward pass. A compiled backward pass hands over all gradients of its
graph at once: compile layer by layer, or the whole model's gradients live together.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osd_torch.accumulation import (
    check_sketch_suffices,
    is_sketched,
    zero_where_others_have_gradients,
)
from osd_torch.clipping import clip_
from osd_torch.diagnostics import inner_optimizer
from osd_torch.numerics import check_number, without_autocast
from osd_torch.sharding import Reduce, is_distributed, means_of
from osd_torch.state import all_params, name_of
from osd_torch.subspace import SubspaceOptimizer

# A second set of hooks would look for gradients that the first has taken.
_UPDATED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Met(NamedTuple):
    """What processes learn of each other when they meet.

    Attributes:
        pass_is_done: Whether all are done with a backward pass.
        update_is_done: Whether all are done with the update.
        had_pass: Whether one has had a backward pass.
    """

    pass_is_done: bool
    update_is_done: bool
    had_pass: bool


class LayerwiseUpdates:
    """Hooks that update an optimizer's parameters during the backward pass.

    With `reduce` a gradient waits until every process has one of the same parameter, which costs
    nothing where all reach their parameters in one order. A process whose backward pass does not
    reach a parameter adds zeros. The processes meet once in each hook to agree on it.

    Args:
        optimizer: Any, or a wrapper such as `accelerate`'s around one, with no gradients; its
            parameters are hooked, those that are frozen now too.
        micro_batches: Backward passes to an update.
        grad_clipping: The largest norm of what is applied (`clip_`); 0: none.
        reduce: The mean over processes, where each has gradients of its own and the model is not in
            DistributedDataParallel. It becomes a `SubspaceOptimizer`'s `reduce`.

    Attributes:
        share: The present micro-batch's share of the update, over all processes, such as its share
            of the tokens; 1 / micro_batches unless it is set, before the backward pass.

    Raises:
        ValueError: for an argument out of range, parameters that are DTensors or have a gradient, a
            projector that needs the gradient itself where the step has to wait, or an optimizer
            that another `LayerwiseUpdates` updates.

    Example:
        >>> import torch, osd_torch
        >>> model = torch.nn.Sequential()
        >>> model.add_module("mlp", torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.make_optimizer(
        ...     model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4)
        >>> with osd_torch.LayerwiseUpdates(optimizer) as updates:
        ...     model(torch.ones(2, 24)).square().sum().backward()
        ...     norm = updates.finish()
        >>> model.mlp.weight.grad is None
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        micro_batches: int = 1,
        grad_clipping: float = 0.0,
        reduce: Reduce | None = None,
    ) -> None:
        if getattr(optimizer, "scaler", None) is not None:
            raise ValueError(
                f"the {type(optimizer).__name__} scales the loss (a GradScaler, for float16), and "
                "layer by layer a step is taken before gradients are scaled back: use bfloat16"
            )
        optimizer = inner_optimizer(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}: expected a torch.optim.Optimizer"
            )
        if reduce is not None and not callable(reduce):
            raise ValueError(
                f"reduce is {reduce!r}: expected a function of a tensor, such as "
                "osd_torch.mean_over_processes(), or None"
            )
        is_whole = isinstance(micro_batches, int) and not isinstance(micro_batches, bool)
        if not is_whole or micro_batches < 1:
            raise ValueError(
                f"micro_batches is {micro_batches!r}: expected a whole number of at least 1"
            )
        check_number("grad_clipping", grad_clipping)
        params = all_params(optimizer)
        if any(is_distributed(param) for param in params):
            raise ValueError(
                "the parameters are DTensors, whose gradients fully_shard makes a whole layer at a "
                "time: update layer by layer with whole weights, or shard without it"
            )
        if optimizer in _UPDATED:
            raise ValueError(
                "the optimizer is updated layer by layer already: close() the LayerwiseUpdates "
                "that does so, and then make another"
            )
        held = optimizer.held if isinstance(optimizer, SubspaceOptimizer) else {}
        left = next((param for param in params if param.grad is not None or param in held), None)
        if left is not None:
            raise ValueError(
                f"parameter '{name_of(optimizer, left)}' has a gradient already, or a sketch of "
                "one, which the first update would take in: call zero_grad() before"
            )
        self.optimizer = optimizer
        self.micro_batches = micro_batches
        self.grad_clipping = grad_clipping
        self.waits = micro_batches > 1 or grad_clipping > 0
        self.share = 1 / micro_batches
        self._reduce = reduce
        if isinstance(optimizer, SubspaceOptimizer):
            if self.waits:
                for group in optimizer.param_groups:
                    check_sketch_suffices(optimizer, group)
            self._reduce = optimizer.reduce = reduce or optimizer.reduce
        self._norms: list[Tensor] = []
        self._skipped_before: tuple[int, int] | None = None
        self._passes: dict[Tensor, int] = {}  # of this update, that reached a parameter
        self._graphs: list[int] = []  # of this update's backward passes, one for each hook
        # Gradients that not every process has yet, with their shares of the update.
        self._waiting: dict[Tensor, tuple[Tensor, float]] = {}
        self._group_index = {
            param: i for i, group in enumerate(optimizer.param_groups) for param in group["params"]
        }
        self._handles = [hooked(param, self._hook) for param in params]
        _UPDATED.add(optimizer)

    def finish(self) -> Tensor:
        """Ends an update, after its last backward pass: clips, and steps where that had to wait.

        Returns:
            The norm before clipping, 0-dimensional: of R for projected parameters, of G for others.

        Raises:
            RuntimeError: after another number of backward passes than `micro_batches`, or where
                DistributedDataParallel has put gradients back.
        """
        others_passed = self._end_update()
        # A nested backward pass, of reentrant checkpointing, has a graph of its own.
        graphs = min(len(set(self._graphs)), self.micro_batches)
        passes = max(graphs, *self._passes.values(), 0)
        if passes != self.micro_batches and not (passes == 0 and others_passed):
            raise RuntimeError(
                f"finish() after {passes} of the update's {self.micro_batches} backward passes "
                "(micro_batches): do those that are left, or drop() what was begun"
            )
        self._begin()
        self._refuse_gradients([p for p in self._group_index if not self._keeps_gradient(p)])
        if self.waits:
            self._reduce_gradients()
            norm = clip_(self.optimizer, self.grad_clipping)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return norm
        self._count_once()
        norms, self._norms = self._norms, []
        if not norms:
            return torch.zeros((), dtype=torch.float32)
        return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))

    def drop(self) -> None:
        """Drops an update that was begun, so that the next backward pass begins another.

        What was stepped inside the backward pass stays.
        """
        self.optimizer.zero_grad()
        self._begin()
        self._norms.clear()
        self._count_once()

    def close(self) -> None:
        """Removes the hooks. An update that was begun is dropped by `optimizer.zero_grad()`."""
        _UPDATED.discard(self.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> LayerwiseUpdates:
        """Nothing more to do."""
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    @without_autocast()
    def _hook(self, param: Tensor) -> None:
        passes = self._passes.get(param, 0)
        if passes == self.micro_batches:
            raise RuntimeError(
                f"parameter '{name_of(self.optimizer, param)}' has its gradient {passes + 1} times "
                f"in an update of {passes} backward passes (micro_batches): call finish() after "
                "each update, and checkpoint activations with use_reentrant=False"
            )
        self._passes[param] = passes + 1
        graph = torch._C._current_graph_task_id()
        if self._graphs and graph != self._graphs[-1]:
            self._end_backward_pass(param)
        self._graphs.append(graph)
        if self._keeps_gradient(param):
            return
        if self._reduce is None:
            self._take(param, self.share)
        else:
            assert param.grad is not None
            self._waiting[param], param.grad = (param.grad, self.share), None
            self._meet(self._reduce)

    def _begin(self) -> None:
        """The state of an update before its first backward pass."""
        self._passes.clear()
        self._graphs.clear()
        self._waiting.clear()

    def _end_backward_pass(self, param: Tensor) -> None:
        """Takes what is left of a backward pass, at the first gradient, `param`'s, of the next."""
        if self._reduce is not None:
            gradient, param.grad = param.grad, None
            while not self._meet(self._reduce, pass_is_done=True).pass_is_done:
                pass
            param.grad = gradient

    def _end_update(self) -> bool:
        """Takes what is left of the update; whether other processes have had a backward pass."""
        met = Met(False, self._reduce is None, False)
        while not met.update_is_done:
            assert self._reduce is not None
            met = self._meet(self._reduce, pass_is_done=True, update_is_done=True)
        return met.had_pass

    def _meet(
        self, reduce: Reduce, pass_is_done: bool = False, update_is_done: bool = False
    ) -> Met:
        """Takes the gradients that now wait on every process; all where the pass is done."""
        params = list(self._group_index)
        flags = [float(param in self._waiting) for param in params]
        shares = [self._waiting[param][1] if param in self._waiting else 0.0 for param in params]
        own = [float(x) for x in (pass_is_done, update_is_done, bool(self._passes))]
        means = means_of([*flags, *shares, *own], reduce, params[0].device)
        on_all = 1 - 1e-9
        met = Met(means[-3] > on_all, means[-2] > on_all, means[-1] > 0)
        for i, param in enumerate(params):
            having, share = means[i], means[len(params) + i]
            if having > (0 if met.pass_is_done else on_all):
                gradient, _ = self._waiting.pop(param, (None, 0.0))
                param.grad = torch.zeros_like(param) if gradient is None else gradient
                self._take(param, share / having)
        return met

    def _take(self, param: Tensor, share: float) -> None:
        """Takes a step with a gradient, or adds its sketch where the step waits."""
        if isinstance(self.optimizer, SubspaceOptimizer) and self._is_sketched(param):
            part = share if self.waits else 1.0
            self.optimizer.accumulate_agreed(self._group(param), param, part)
        if self.waits:
            return
        self._refuse_gradients([x for x in all_params(self.optimizer) if x is not param])
        if self._skipped_before is None:
            self._skipped_before = self._counts()
        self._reduce_gradients()
        self._norms.append(clip_(self.optimizer, 0))
        self.optimizer.step()
        param.grad = None

    def _group(self, param: Tensor) -> dict[str, Any]:
        return self.optimizer.param_groups[self._group_index[param]]

    def _is_sketched(self, param: Tensor) -> bool:
        if not isinstance(self.optimizer, SubspaceOptimizer):
            return False
        return is_sketched(self.optimizer, self._group(param))

    def _keeps_gradient(self, param: Tensor) -> bool:
        """Whether a gradient stays until the update ends."""
        return self.waits and not self._is_sketched(param)

    def _refuse_gradients(self, params: Iterable[Tensor]) -> None:
        """Raises where one of these has a gradient, which the next step would take in."""
        left = next((param for param in params if param.grad is not None), None)
        if left is not None:
            raise RuntimeError(
                f"parameter '{name_of(self.optimizer, left)}' has a gradient that no hook has "
                "taken: make LayerwiseUpdates when all parameters are in the optimizer, and leave "
                "grad to it. DistributedDataParallel writes averaged gradients after the hooks: "
                "leave the model out of it, and give LayerwiseUpdates reduce="
                "osd_torch.mean_over_processes()"
            )

    def _reduce_gradients(self) -> None:
        """For an optimizer that does not do it itself."""
        if self._reduce is None or isinstance(self.optimizer, SubspaceOptimizer):
            return
        if self.waits:
            zero_where_others_have_gradients(self.optimizer, self._reduce)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad = self._reduce(param.grad)

    def _counts(self) -> tuple[int, int]:
        return self.optimizer.param_groups[0].get("skipped_steps", (0, 0))

    def _count_once(self) -> None:
        """An update with any number of skipped parameters is one skipped step."""
        if self._skipped_before is None:
            return
        (total, in_a_row), (total_now, _) = self._skipped_before, self._counts()
        self._skipped_before = None
        group = self.optimizer.param_groups[0]
        if "skipped_steps" in group:  # else it does not count
            group["skipped_steps"] = (total + 1, in_a_row + 1) if total_now > total else (total, 0)


def hooked(param: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """The handle of a hook on a parameter's gradient; a frozen parameter has it when it is not."""
    is_trained = param.requires_grad
    param.requires_grad_(True)  # torch hooks no other
    handle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(is_trained)
    return handle
