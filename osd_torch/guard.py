"""Skips and counts steps with a non-finite gradient."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from osd_torch.sharding import all_finite
from osd_torch.state import all_params, inner_optimizer

# Of the counts in a pickle, and in the first group of a state_dict: torch.distributed.checkpoint
# saves nothing but the groups and the parameters' states.
KEY = "skipped_steps"
Counts = tuple[int, int]  # (total, in a row)


def check_dense(optimizer: torch.optim.Optimizer, gradients: Iterable[Tensor]) -> None:
    """Raises RuntimeError for a sparse gradient."""
    if any(gradient.layout != torch.strided for gradient in gradients):
        raise RuntimeError(
            f"{type(optimizer).__name__} does not support sparse gradients: use a dense embedding"
            " (sparse=False)"
        )


class SkipsNonFinite:
    """Base class of optimizers that skip and count steps with a non-finite gradient.

    The counts belong to the optimizer, not to a parameter group. Copies, pickles, `state_dict` and
    `torch.distributed.checkpoint` keep them. (bitsandbytes' optimizers cannot be copied or
    pickled.)

    """

    _skipped: Counts | Tensor = (0, 0)  # a tensor (2,) if the device counts

    @property
    def skipped(self) -> Counts:
        """(total, in a row); synchronizes with the device if that counts."""
        total, in_a_row = (int(x) for x in self._skipped)
        return total, in_a_row

    @skipped.setter
    def skipped(self, counts: Counts) -> None:
        if isinstance(self._skipped, Tensor):  # a CUDA graph knows its address
            self._skipped.copy_(torch.tensor(counts))
        else:
            self._skipped = counts

    def counts_on(self, device: torch.device) -> None:
        """Moves the counts to a device, so that it counts; before a step that it decides."""
        if not isinstance(self._skipped, Tensor) or self._skipped.device != device:
            self._skipped = torch.tensor(self.skipped, device=device)

    def count_on_device(self, is_finite: Tensor) -> None:
        """Counts a step that is taken if `is_finite`, without a device sync; see `counts_on`."""
        assert isinstance(self._skipped, Tensor)
        is_skipped = (~is_finite).to(self._skipped.dtype)
        self._skipped.add_(is_skipped)
        self._skipped[1:].mul_(is_skipped)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), KEY: self.skipped}  # type: ignore[dict-item]

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {name: x for name, x in state.items() if name != KEY}
        super().__setstate__(own)  # type: ignore[misc]
        if KEY in state or "defaults" in state:  # a copy or a pickle; else from load_state_dict
            self.skipped = saved_counts(state)
        for group in self.param_groups:  # type: ignore[attr-defined]
            group.pop(KEY, None)

    def state_dict(self) -> StateDict:
        """As in torch; the first group also has the counts, as "skipped_steps"."""
        state_dict = super().state_dict()  # type: ignore[misc]
        first, *others = state_dict["param_groups"]
        return {**state_dict, "param_groups": [{**first, KEY: self.skipped}, *others]}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in torch, with the counts."""
        super().load_state_dict(state_dict)  # type: ignore[misc]
        self.skipped = saved_counts(state_dict)

    def skips(self, gradients: Sequence[Tensor], squares: Sequence[Tensor] | None = None) -> bool:
        """Counts the step of these gradients; returns whether it is skipped. One device sync.

        Args:
            gradients: Dense tensors.
            squares: Their squared norms, if known.
        """
        is_finite = all_finite(gradients, squares)
        total, in_a_row = self.skipped
        self.skipped = (total, 0) if is_finite else (total + 1, in_a_row + 1)
        return not is_finite


def saved_counts(state: Mapping[str, Any]) -> Counts:
    """The counts in a pickle or a state_dict; (0, 0) if another tool saved it without them."""
    groups = state.get("param_groups") or [{}]
    total, in_a_row = state.get(KEY) or groups[0].get(KEY) or (0, 0)
    return int(total), int(in_a_row)


def as_one_step(before: Counts, now: Counts) -> Counts:
    """The counts after an update of several steps: one step, skipped if any of them was skipped."""
    total, in_a_row = before
    return (total + 1, in_a_row + 1) if now[0] > total else (total, 0)


def skipped_steps(optimizer: torch.optim.Optimizer) -> Counts:
    """Number of steps that the optimizer skipped for a non-finite gradient.

    Args:
        optimizer: An optimizer of this library, or a wrapper around one.

    Returns:
        (total, in a row).

    Raises:
        ValueError: The optimizer does not count skipped steps.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(24, 16)
        >>> optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=0.01, rank=4)
        >>> (layer(torch.ones(2, 24)) * float("nan")).sum().backward()
        >>> optimizer.step()
        >>> osd_torch.skipped_steps(optimizer)
        (1, 1)
    """
    optimizer = inner_optimizer(optimizer)
    if not isinstance(optimizer, SkipsNonFinite):
        raise ValueError(
            f"{type(optimizer).__name__} counts no skipped steps: expected an optimizer of "
            "make_optimizer or of osd_torch"
        )
    return optimizer.skipped


@torch.compiler.disable(reason="the host decides whether a step is skipped")
def drop_if_not_finite(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Step pre-hook of a `SkipsNonFinite`: drops all gradients if one is not finite, and counts."""
    present = [p for p in all_params(optimizer) if p.grad is not None]
    gradients = [p.grad for p in present if p.grad is not None]
    check_dense(optimizer, gradients)
    assert isinstance(optimizer, SkipsNonFinite)
    if optimizer.skips(gradients):
        for param in present:
            param.grad = None


class _Hooked(SkipsNonFinite):
    """`SkipsNonFinite` for classes of other libraries, by a hook.

    Gradients that a closure computes inside `step` are not checked.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_step_pre_hook(drop_if_not_finite)  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch drops the hooks of a copy, and also calls this in load_state_dict.
        hooks = self._optimizer_step_pre_hooks  # type: ignore[attr-defined]
        if drop_if_not_finite not in hooks.values():
            self.register_step_pre_hook(drop_if_not_finite)  # type: ignore[attr-defined]


class TorchAdam(_Hooked, torch.optim.Adam):
    """`torch.optim.Adam` that skips steps with a non-finite gradient."""


class TorchAdamW(_Hooked, torch.optim.AdamW):
    """`torch.optim.AdamW` that skips steps with a non-finite gradient."""


class TorchSGD(_Hooked, torch.optim.SGD):
    """`torch.optim.SGD` that skips steps with a non-finite gradient."""


@functools.cache
def skipping(kind: Any) -> Any:
    """A subclass of another library's optimizer class that skips steps with a non-finite gradient.

    For classes that are imported only where they are needed, such as bitsandbytes'. It keeps the
    name, which checkpoints store.
    """
    return type(kind.__name__, (_Hooked, kind), {"__doc__": kind.__doc__})
