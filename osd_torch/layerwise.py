"""Layer-by-layer updates: each gradient is freed before the backward pass computes the next one.

    updates = LayerwiseUpdates(optimizer, micro_batches=K, grad_clipping=1.0)
    for each update:
        for each micro-batch:
            updates.share = its tokens / the update's tokens
            loss.backward()
        norm = updates.finish()

With one micro-batch and no clipping, a hook on each parameter takes its step inside the backward
pass, for any optimizer. Otherwise the step waits for the whole update: the hook of a projected
parameter adds the gradient's sketch to the held one, (p + q) r numbers instead of p q, and `finish`
takes the one step. In both cases the gradient of a projected parameter is freed when its hook
returns. Parameters that are not projected have no sketch: if the step waits, their gradients are
kept, so a full-rank optimizer saves nothing.

If the step waits, a non-finite gradient skips the whole update. Inside the backward pass it skips
only its own parameter; parameters with finite gradients take their steps, as the earlier ones have
already done. In both cases it counts as one skipped step.

`SubspaceOptimizer.accumulate` describes the accuracy of a sum of sketches. Set the learning rate
before the first backward pass of an update. A compiled backward pass returns all gradients of its
graph at once: compile layer by layer, or the gradients of the whole model are alive together.
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
from osd_torch.guard import SkipsNonFinite, as_one_step
from osd_torch.numerics import check_number, without_autocast
from osd_torch.one_parameter import alone, can_step_alone, group_sizes
from osd_torch.sharding import Reduce, is_distributed, means_of
from osd_torch.state import Group, all_params, inner_optimizer, name_of, named_parameters
from osd_torch.subspace import SubspaceOptimizer

# A second set of hooks would look for gradients that the first set has consumed.
_UPDATED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Met(NamedTuple):
    """What processes exchange when they synchronize.

    Attributes:
        pass_is_done: Whether all have finished a backward pass.
        update_is_done: Whether all have finished the update.
        had_pass: Whether any had a backward pass.
    """

    pass_is_done: bool
    update_is_done: bool
    had_pass: bool


class Place(NamedTuple):
    """Where an optimizer holds a parameter.

    Attributes:
        position: Among all parameters.
        group: Index of its group.
        name: Its name (`name_of`).
    """

    position: int
    group: int
    name: str


class LayerwiseUpdates:
    """Hooks that update an optimizer's parameters during the backward pass.

    With `reduce` a gradient waits until every process has one for the same parameter, which costs
    nothing if all reach their parameters in the same order. A process whose backward pass does not
    reach a parameter adds zeros. The processes synchronize once in each hook to agree on this.

    Args:
        optimizer: Any optimizer, or a wrapper around one such as `accelerate`'s, without gradients;
            the hooks are on all its parameters, including currently frozen ones.
        micro_batches: Number of backward passes per update.
        grad_clipping: Maximum norm of what is applied (`clip_`); 0: no clipping.
        reduce: The mean over processes, if each has its own gradients and the model is not in
            DistributedDataParallel. It becomes the `reduce` of a `SubspaceOptimizer`.

    Attributes:
        share: The current micro-batch's share of the update over all processes, such as its share
            of the tokens; 1 / micro_batches unless set before the backward pass.

    Raises:
        ValueError: An argument is out of range, the parameters are DTensors or have a gradient, a
            projector needs the gradient itself although the step waits, or another
            `LayerwiseUpdates` updates the optimizer.

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
                f"the {type(optimizer).__name__} scales the loss (a GradScaler, for float16), but "
                "layer-by-layer updates step before gradients are unscaled: use bfloat16"
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
                "the parameters are DTensors, whose gradients fully_shard reduces one layer at a "
                "time: use unsharded weights for layer-by-layer updates, or shard without them"
            )
        if optimizer in _UPDATED:
            raise ValueError(
                "another LayerwiseUpdates already updates this optimizer: close() it before "
                "creating a new one"
            )
        held = optimizer.held if isinstance(optimizer, SubspaceOptimizer) else {}
        left = next((param for param in params if param.grad is not None or param in held), None)
        if left is not None:
            raise ValueError(
                f"parameter '{name_of(optimizer, left)}' already has a gradient, or a sketch of "
                "one, which the first update would include: call zero_grad() first"
            )
        self.optimizer = optimizer
        self.micro_batches = micro_batches
        self.grad_clipping = grad_clipping
        self.waits = micro_batches > 1 or grad_clipping > 0
        self.share = 1 / micro_batches
        self._reduce = reduce
        if isinstance(optimizer, SubspaceOptimizer):
            if optimizer.is_capturable:
                raise ValueError(
                    "capturable is True, but layer-by-layer updates are driven by the host: build "
                    "the optimizer without capturable"
                )
            if self.waits:
                for group in optimizer.param_groups:
                    check_sketch_suffices(optimizer, group)
            self._reduce = optimizer.reduce = reduce or optimizer.reduce
        self._norms: list[Tensor] = []
        self._skipped_before: tuple[int, int] | None = None
        self._passes: dict[Tensor, int] = {}  # passes of this update that reached a parameter
        self._graphs: list[int] = []  # of this update's backward passes, one per hook
        # Gradients that not every process has yet, with their shares of the update.
        self._waiting: dict[Tensor, tuple[Tensor, float]] = {}
        self._last: Tensor | None = None  # the parameter of the last step
        self._sizes = group_sizes(optimizer)
        named = [
            (param, i, name)
            for i, group in enumerate(optimizer.param_groups)
            for name, param in named_parameters(group, prefix=f"{i}.")
        ]
        self._places = {param: Place(k, i, name) for k, (param, i, name) in enumerate(named)}
        self._handles = [hooked(param, self._hook) for param in params]
        _UPDATED.add(optimizer)

    def finish(self) -> Tensor:
        """Ends an update after its last backward pass: clips, and steps if the step had to wait.

        Returns:
            The norm before clipping, 0-dimensional: of R for projected parameters, of G for others.

        Raises:
            RuntimeError: The number of backward passes is not `micro_batches`, or
                DistributedDataParallel has written gradients again.
        """
        others_passed = self._end_update()
        # A nested backward pass, of reentrant checkpointing, has its own graph.
        graphs = min(len(set(self._graphs)), self.micro_batches)
        passes = max(graphs, *self._passes.values(), 0)
        if passes != self.micro_batches and not (passes == 0 and others_passed):
            raise RuntimeError(
                f"finish() after {passes} of the update's {self.micro_batches} backward passes "
                "(micro_batches): run the remaining ones, or drop() the update"
            )
        self._begin()
        kept = {param for param in self._places if self._keeps_gradient(param)}
        self._refuse_gradients(p for p in all_params(self.optimizer) if p not in kept)
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
        """Drops an incomplete update, so that the next backward pass starts another.

        Steps already taken inside the backward pass remain.
        """
        self.optimizer.zero_grad()
        self._begin()
        self._norms.clear()
        self._count_once()

    def close(self) -> None:
        """Removes the hooks. `optimizer.zero_grad()` drops an incomplete update."""
        _UPDATED.discard(self.optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> LayerwiseUpdates:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    @without_autocast()
    def _hook(self, param: Tensor) -> None:
        passes = self._passes.get(param, 0)
        if passes == self.micro_batches:
            raise RuntimeError(
                f"parameter '{name_of(self.optimizer, param)}' has its gradient {passes + 1} "
                f"times in an update of {passes} backward passes (micro_batches): call finish() "
                "after each update, and checkpoint activations with use_reentrant=False"
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
        """Finishes a backward pass when `param`'s gradient, the first of the next one, arrives."""
        if self._reduce is not None:
            gradient, param.grad = param.grad, None
            while not self._meet(self._reduce, pass_is_done=True).pass_is_done:
                pass
            param.grad = gradient

    def _end_update(self) -> bool:
        """Finishes the update; returns whether other processes have had a backward pass."""
        met = Met(False, self._reduce is None, False)
        while not met.update_is_done:
            assert self._reduce is not None
            met = self._meet(self._reduce, pass_is_done=True, update_is_done=True)
        return met.had_pass

    def _meet(
        self, reduce: Reduce, pass_is_done: bool = False, update_is_done: bool = False
    ) -> Met:
        """Takes the gradients that now wait on every process; all of them if the pass is done."""
        # If each process waits with one gradient, and all with that of the same parameter, a few
        # numbers show it: the variance of the positions is 0, and of n processes that differ at
        # least (n - 1) / n^2. Otherwise they exchange a flag and a share of every parameter.
        waits = len(self._waiting) == 1 and not pass_is_done
        param, (gradient, share) = (
            next(iter(self._waiting.items())) if waits else (self._first, (None, 0.0))
        )
        position = float(self._places[param].position)
        flags = (waits, pass_is_done, update_is_done, bool(self._passes))
        own = [position, position**2, share, *map(float, flags)]
        mean, mean_square, share, *shares_of_flags = means_of(own, reduce, self._first.device)
        on_all = 1 - 1e-9
        all_wait, all_passed, all_updated, any_passed = shares_of_flags
        met = Met(all_passed > on_all, all_updated > on_all, any_passed > 0)
        if all_wait > on_all and mean_square - mean**2 < 1e-5:
            del self._waiting[param]
            param.grad = gradient
            self._take(param, share)
        else:
            self._meet_in_full(reduce, 0 if met.pass_is_done else on_all)
        return met

    def _meet_in_full(self, reduce: Reduce, least: float) -> None:
        """Takes the gradients that wait on more than a share `least` of the processes."""
        params = list(self._places)
        flags = [float(param in self._waiting) for param in params]
        shares = [self._waiting[param][1] if param in self._waiting else 0.0 for param in params]
        means = means_of([*flags, *shares], reduce, self._first.device)
        for i, param in enumerate(params):
            having, share = means[i], means[len(params) + i]
            if having > least:
                gradient, _ = self._waiting.pop(param, (None, 0.0))
                param.grad = torch.zeros_like(param) if gradient is None else gradient
                self._take(param, share / having)

    def _take(self, param: Tensor, share: float) -> None:
        """Takes a step with a gradient, or adds its sketch if the step waits."""
        is_sketched = self._is_sketched(param)
        if not self.waits:
            # A step that visits one parameter cannot include another gradient that no hook
            # consumed; the last parameter shows one early, and `finish` looks at all.
            is_one = can_step_alone(self.optimizer) and group_sizes(self.optimizer) == self._sizes
            seen = [self._last] if is_one else all_params(self.optimizer)
            self._refuse_gradients(x for x in seen if x is not None and x is not param)
            self._last = param
        place = self._places[param]
        with alone(self.optimizer, place.group, param, place.name) as group:
            if is_sketched and isinstance(self.optimizer, SubspaceOptimizer):
                part = share if self.waits else 1.0
                self.optimizer.accumulate_agreed(group, param, part)
            if self.waits:
                return
            if self._skipped_before is None and isinstance(self.optimizer, SkipsNonFinite):
                self._skipped_before = self.optimizer.skipped
            self._reduce_gradients()
            self._norms.append(clip_(self.optimizer, 0))
            self.optimizer.step()
            param.grad = None

    @property
    def _first(self) -> Tensor:
        return next(iter(self._places))

    def _group(self, param: Tensor) -> Group:
        return self.optimizer.param_groups[self._places[param].group]

    def _is_sketched(self, param: Tensor) -> bool:
        if not isinstance(self.optimizer, SubspaceOptimizer):
            return False
        return is_sketched(self.optimizer, self._group(param))

    def _keeps_gradient(self, param: Tensor) -> bool:
        """Whether a gradient is kept until the update ends."""
        return self.waits and not self._is_sketched(param)

    def _refuse_gradients(self, params: Iterable[Tensor]) -> None:
        """Raises if one of these has a gradient, which the next step would include."""
        left = next((param for param in params if param.grad is not None), None)
        if left is not None:
            raise RuntimeError(
                f"parameter '{name_of(self.optimizer, left)}' has a gradient that no hook "
                "consumed: create LayerwiseUpdates after all parameters are in the optimizer, "
                "and do not set grad yourself. DistributedDataParallel writes averaged gradients "
                "after the hooks: do not wrap the model in it, and give LayerwiseUpdates "
                "reduce=osd_torch.mean_over_processes()"
            )

    def _reduce_gradients(self) -> None:
        """For an optimizer that does not reduce gradients itself."""
        if self._reduce is None or isinstance(self.optimizer, SubspaceOptimizer):
            return
        if self.waits:
            zero_where_others_have_gradients(self.optimizer, self._reduce)
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad = self._reduce(param.grad)

    def _count_once(self) -> None:
        """Counts an update in which any parameter was skipped as one skipped step."""
        before, self._skipped_before = self._skipped_before, None
        if before is not None and isinstance(self.optimizer, SkipsNonFinite):
            self.optimizer.skipped = as_one_step(before, self.optimizer.skipped)


def hooked(param: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """The handle of a hook on a parameter's gradient; on a frozen one it runs once unfrozen."""
    is_trained = param.requires_grad
    param.requires_grad_(True)  # torch only allows hooks on these
    handle = param.register_post_accumulate_grad_hook(hook)
    param.requires_grad_(is_trained)
    return handle
