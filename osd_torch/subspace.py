"""The optimizer: gradient -> sketch -> step of W -> step of P.

Online Subspace Descent keeps the optimizer state in a subspace of each weight matrix. It reads only
a `Sketch` of a gradient G, and a step of one parameter consists of three methods of
`SubspaceOptimizer`:

    refresh(group, param)          sets P from G, on the few steps that do so
    project(group, param)          -> Sketch: large in, small out
    apply(group, param, sketch)    small in, large out: updates W, P and the moments in place

`step` calls them in this order. Between `project` and `apply` no gradient needs to be alive:

    accumulate(param, share)       refresh, project, add to the held sketch, drop the gradient
    clip_(optimizer, max_norm)     scales the held sketches and the other gradients
    step()                         applies the held sketches

Micro-batches, reduced sketches and layer-by-layer updates are built from these.

A gradient is laid out as M, of shape (p, q): the axis that P projects, then the other axis; for two
sides (output, input). P has shape (p, r), and its columns are the basis.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from osd_torch.accumulation import (
    check_agreed,
    check_sketch_suffices,
    forward_reduce,
    is_sketched,
    read_norms,
    zero_where_others_have_gradients,
)
from osd_torch.bucket_optimizer import gradient_of
from osd_torch.capturable import CapturableOptimizer, check_capturable
from osd_torch.guard import check_dense
from osd_torch.numerics import without_autocast
from osd_torch.sharding import Reduce, is_distributed
from osd_torch.sketch import Sketch
from osd_torch.state import Group, name_of

log = logging.getLogger("osd_torch")


class SubspaceOptimizer(CapturableOptimizer):
    """Base of the optimizer classes: a weight rule in a subspace that a basis rule moves.

        R = P^T M,   D = rule(R),   W <- W - lr * scale * P D

    A parameter group with a `rank` is projected: for a gradient laid out as M, the rule turns R
    into a direction D, and the lift turns D into an update of W, as above for the plain lift. A
    group without a rank is trained with the same rule at full rank.

    The state of a parameter consists of contiguous tensors: `step`; the moments in the shape of R,
    float32 (float64 for float64 parameters) or 8 bits; `basis`, or `basis_output` and
    `basis_input`; `set_at`, the step at which P was set; the moments of P's optimizer, with the
    prefix `projector_`; and the state of the lift, with the prefix `lift_`. All of it exists as
    soon as the optimizer holds the parameter, so it is the same on every process before the first
    step. With `dimension_numbers` each tensor has one more axis in front, that of the matrices.
    Tensors of parameters that were stepped together are views of one: `clone` one that is saved or
    kept by itself.

    P is set from a nonzero gradient: its squared norm is neither zero nor infinite. Until the first
    one P is zero and `set_at` is -1, and the parameter takes steps of zero. If the gradient is zero
    when a refresh is due, the next nonzero one sets P.

    A step with a non-finite value in any gradient changes nothing and is counted; see
    `skipped_steps`. The check takes one device synchronization per step, and none with
    `capturable=True`. (If sketches are computed
    before this is known, P may have been set and its moments carried over; it is set again at the
    next update. If each parameter is stepped inside the backward pass, each counts as a step: see
    `osd_torch.layerwise`.)

    Attributes:
        held: The sketches that the next step applies, by parameter. Transient: `state_dict` does
            not contain them, and `zero_grad` drops them.

    References:
        arXiv 2408.12857, equation 6.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(24, 16)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.01, rank=4)
        >>> for half in (torch.ones(2, 24), torch.zeros(2, 24)):  # two micro-batches, as sketches
        ...     (layer(half).square().sum() / 2).backward()
        ...     optimizer.accumulate(layer.weight, share=0.5)
        >>> layer.weight.grad is None
        True
        >>> optimizer.step()
    """

    _has_said_uncompiled = False
    _reduce: Reduce | None = None
    _is_reduced = False  # whether what the next step applies is already equal on every process

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.held: dict[Tensor, Sketch] = {}
        super().__init__(params, defaults)
        forward_reduce()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, a loaded state or a pickle; no sketches are held."""
        super().__setstate__(state)
        self.held = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> SubspaceOptimizer:
        """A copy with the same `reduce`; after unpickling, `reduce` must be set again."""
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        other._reduce = self._reduce
        return other

    @property
    def reduce(self) -> Reduce | None:
        """The mean over processes, if each has its own gradients; None: gradients are equal.

        It reduces sketches instead of projected gradients, which are reduced only when they set P;
        other gradients are reduced as a whole.
        """
        return self._reduce

    @reduce.setter
    def reduce(self, reduce: Reduce | None) -> None:
        params = [param for group in self.param_groups for param in group["params"]]
        if reduce is not None and any(is_distributed(param) for param in params):
            raise ValueError(
                "reduce is set, but the parameters are DTensors, whose gradients fully_shard "
                "already reduces: leave reduce None"
            )
        if reduce is not None and self.is_capturable:
            raise ValueError(
                "reduce is set, but capturable is True, and sketches are reduced by the host: "
                "build the optimizer without capturable"
            )
        self._reduce = reduce

    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Takes one step with the held sketches and with the gradients in `grad`.

        Parameters with neither stay unchanged. The step is unaffected by `torch.autocast`.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The result of the closure.

        Raises:
            RuntimeError: A gradient is sparse.
            ValueError: A parameter has both a held sketch and a gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not torch.compiler.is_compiling():
            self.see_options()
        if self.is_capturable:
            self._step_on_device()
        else:
            self._step(torch.compiler.is_compiling())
        return loss

    @torch.no_grad()
    @without_autocast()
    def _step_on_device(self) -> None:
        self.step_on_device()

    @torch.compiler.disable(reason="steps of osd_torch's optimizers run uncompiled")
    @torch.no_grad()
    @without_autocast()
    def _step(self, is_compiling: bool) -> None:
        if is_compiling and not self._has_said_uncompiled:
            self._has_said_uncompiled = True
            log.warning(
                "torch.compile: steps of %s run uncompiled; compile only the model, or build it "
                "with capturable=True",
                type(self).__name__,
            )
        for group in self.param_groups:
            self.observe(group)
        self.reduce_()
        self._is_reduced = False
        present = list(self.present())
        held, self.held = self.held, {}
        applied = [held[p].low_rank if p in held else gradient_of(p) for _, p in present]
        check_dense(self, applied)
        squares = read_norms(applied, held.values())
        if self.skips(applied, squares):
            return
        known = dict(zip((param for _, param in present), squares, strict=True))
        for group in self.param_groups:
            params = [param for its, param in present if its is group]
            self.step_group(group, params, held, known)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients and the held sketches."""
        super().zero_grad(set_to_none)
        self.held.clear()
        self._is_reduced = False

    def present(self) -> Iterator[tuple[Group, Tensor]]:
        """The parameters that the next step updates, each with its group.

        Raises:
            ValueError: A parameter has both a held sketch and a gradient.
        """
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param in self.held:
                    raise ValueError(
                        f"parameter '{name_of(self, param)}' has a gradient in addition to the "
                        "sketch of earlier ones: call accumulate after each backward pass, or "
                        "zero_grad() to restart the update"
                    )
                if param.grad is not None or param in self.held:
                    yield group, param

    @torch.no_grad()
    @without_autocast()
    def accumulate(self, param: Tensor, share: float = 1.0) -> None:
        """Turns a projected parameter's gradient into a sketch, adds it to the held one, drops it.

        The gradient is one micro-batch's part of the update's gradient: parts add up, as backward
        passes add to `grad`. R of their sum is exact. Each statistic is approximated by the mean
        over the parts' own values, with each part scaled up to a whole gradient by its share. When
        P is due, the first part of the update with a nonzero gradient sets it.

        Args:
            param: A parameter with a `grad`.
            share: This part's share of the update, such as its share of the tokens; the shares sum
                to 1. A part with share 0 adds nothing.

        Raises:
            ValueError: The share is outside [0, 1]; the parameter is not projected, has no gradient
                or is not the optimizer's; a rule needs the gradient itself when the step is taken;
                capturable is True; or with `reduce` set the processes call it for different
                parameters or shares.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share!r}: expected a number in [0, 1]")
        name = name_of(self, param)
        group = next(g for g in self.param_groups if any(p is param for p in g["params"]))
        if group["rank"] is None:
            raise ValueError(
                f"parameter '{name}' is not projected and has no sketch: keep its gradient; "
                "backward passes add to it"
            )
        check_sketch_suffices(self, group)
        if self.is_capturable:
            raise ValueError(
                "capturable is True, but sketches of micro-batches are accumulated by the host: "
                "build the optimizer without capturable"
            )
        if param.grad is None:
            raise ValueError(f"parameter '{name}' has no gradient: call accumulate after backward")
        if self._reduce is not None:
            check_agreed(self, self._reduce, param, share)
        self.accumulate_agreed(group, param, share)

    @torch.no_grad()
    @without_autocast()
    def accumulate_agreed(self, group: Group, param: Tensor, share: float = 1.0) -> None:
        """`accumulate` for a parameter on which all processes have agreed, without its checks."""
        if share:
            if self.is_due(group, param):
                if self._reduce is not None:
                    param.grad = self._reduce(gradient_of(param))
                self.refresh(group, param)
            part, held = self.project(group, param).part(share), self.held.get(param)
            self.held[param] = part if held is None else held.add_(part)
        param.grad = None

    @torch.no_grad()
    @without_autocast()
    def reduce_(self) -> None:
        """If `reduce` is set, makes what the next step applies equal on every process.

        `step` and `clip_` call it. Gradients of projected parameters become held sketches. A
        parameter with a gradient on only some processes gets a zero gradient on the others.
        """
        if self._reduce is None or self._is_reduced:
            return
        zero_where_others_have_gradients(self, self._reduce, self.held)
        for group, param in self.present():
            if not is_sketched(self, group):
                param.grad = self._reduce(gradient_of(param))
            elif param.grad is not None:
                self.accumulate_agreed(group, param)
        self._is_reduced = True

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        super().check_group(group)
        check_capturable(self, group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restores a `state_dict`; see `StatefulOptimizer.load_state_dict`."""
        super().load_state_dict(state_dict)
        forward_reduce()  # called by accelerate, which may not have been imported before
