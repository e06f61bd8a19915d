"""Base of the published optimizers: rules as objects, or by the release's names."""

from __future__ import annotations

import functools
import math
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from osd_names import MOVE_PROJECTOR, PROJ_TYPES, ResolvedSide, Side, check_choice
from osd_torch.bases import online_pca
from osd_torch.basis_rule import BasisRule
from osd_torch.groups import (
    BASIS_OPTIONS,
    SUBSPACE_DEFAULTS,
    check_objects,
    check_seed,
    projected_groups,
    side_of,
)
from osd_torch.layout import (
    SubspaceDimensionNumbers,
    check_basis_dtype,
    check_rank,
    matrix_shape,
    resolve_side,
)
from osd_torch.lift import Lift, scaled
from osd_torch.numerics import Number, check_number, check_period
from osd_torch.published import published_basis
from osd_torch.schedules import SEEN, first_rates, schedule_keys, seen_rates, with_seen_rates
from osd_torch.selection import Select
from osd_torch.state import Group, lr_of
from osd_torch.subspace import SubspaceOptimizer, log


class Subspace(TypedDict, total=False):
    """How matrices are projected: keyword arguments of the optimizer classes.

    Attributes:
        rank: Number of columns of P; at most min(m, n) are used. If given here instead of in
            parameter groups, it applies to the parameters that `select` takes, and all others are
            trained at full rank. Parameters without names are projected if they are matrices.
        select: (name, parameter) -> whether it is projected. None: as in `make_optimizer`.
        basis: The basis rule, such as `online_pca(Adam(), step_size=5e-3)`. None: with `rank`,
            `online_pca()`; in groups of the published form, determined by `proj_type`.
        lift: Turns a direction into an update of W, such as `scaled(0.25)`. None: the default of
            the class.
        side: The side of a matrix that P projects: "input", "output", "shorter" (ties: input),
            "longer" (ties: output) or "both". None: "shorter", or determined by `proj_type`.
        transport_moments: Whether to carry the moments of R over when P changes.
        stochastic_rounding: Whether to round bfloat16 weights up or down at random, so that the
            expectation is the float32 weight; see `make_optimizer`.
        basis_dtype: dtype of P. None: float32, float64 for float64 parameters.
        seed: Seed of random basis rules and of stochastic rounding.
        foreach: Whether matrices of one shape are stepped together, as stacks: a few launches for
            all of them, and temporaries of the stack's size (at most 1 GiB of gradients each).
            None: on a GPU, for matrices of fewer than 2**24 values.
        capturable: Whether a step reads nothing on the host, so that a CUDA graph can capture it
            and `torch.compile` compile it; see `SubspaceOptimizer.refresh_`. Such a step reads the
            learning rate of a schedule from a tensor on the parameters' device, `lr`.
        dimension_numbers: The axes of the parameters' matrices, if they are stacks of matrices
            (experts) or have more axes than a matrix (convolutions). Each matrix has its own P. If
            given with `rank`, they are those of the selected parameters that are no matrices.
    """

    rank: int | None
    select: Select | None
    basis: BasisRule | None
    lift: Lift | None
    side: Side | None
    transport_moments: bool
    stochastic_rounding: bool
    basis_dtype: torch.dtype | None
    seed: int
    foreach: bool | None
    capturable: bool
    dimension_numbers: SubspaceDimensionNumbers | None


class PublishedOptimizer(SubspaceOptimizer):
    """A subspace optimizer whose groups specify their rules as objects or by the release's names.

    A group with `rank` accepts the keys of `Subspace`, and instead of `basis`, `lift` and `side`
    the following, the first three as in `galore_torch`:

        update_proj_gap         steps between refreshes for the SVD kinds, `random` and `gaussian`;
                                for online PCA, P's step size is 1 / update_proj_gap times
                                lr / peak lr (200)
        scale                   multiplies the lifted update (1.0)
        proj_type               one of `PROJ_TYPES` ("std")
        update_proj_every       online PCA moves P every `update_proj_every` steps (1)
        penalty                 weight of the orthogonality penalty in P's loss (0.0)
        projector_lr_multiple   P's step size as a multiple of lr, instead of the above (None)
        peak_lr                 the peak of lr, to which P's step size is relative; None: estimated
                                (None)
        projector_weight_decay  decoupled weight decay of P; None: the release's, 0.01 for
                                `continuous` and 0 for the others (None)
        move_projector          whether P moves "after" W's step or "before" it ("after")

    As in torch, a group keeps other keys for the code that added them.

    Without `peak_lr` the peak of lr is estimated as `max_lr` (which `OneCycleLR` sets in the
    group), or else `initial_lr` (which PyTorch's other schedulers set), or else lr when the group
    was added; it is never less than an lr that was seen, so that P's step size is at most 1 /
    update_proj_gap. A schedule that rises and then falls below half of the estimate corrects it,
    and a new schedule restarts it; see `seen_rates`. The logger "osd_torch" reports the estimate
    once.
    """

    _has_named_peak = False  # not part of the saved state
    _has_corrected_peak = False

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        rank: int | None = None,
        select: Select | None = None,
        **subspace: Any,
    ) -> None:
        for name in subspace.keys() - Subspace.__annotations__.keys():
            raise TypeError(f"{type(self).__name__} has no argument {name!r}")
        if rank is not None:
            check_rank(rank)
            subspace = {"basis": online_pca(), **subspace}
            numbers = subspace.pop("dimension_numbers", None)
            params = projected_groups(params, rank, select, numbers)
        elif select is not None:
            raise ValueError("select is given without rank: give rank, or put it into groups")
        super().__init__(params, {**SUBSPACE_DEFAULTS, **subspace, **defaults})
        given = [name for name in ("basis", "lift", "side") if subspace.get(name) is not None]
        given += ["transport_moments"] * bool(subspace.get("transport_moments"))
        if given and all(group["rank"] is None for group in self.param_groups):
            raise ValueError(f"{given[0]} is given, but nothing is projected: give rank")

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_choice("proj_type", group["proj_type"], PROJ_TYPES)
        check_choice("move_projector", group["move_projector"], MOVE_PROJECTOR)
        check_objects(group)
        for name in ("update_proj_gap", "update_proj_every"):
            check_period(group[name], name)
        check_number("scale", group["scale"])
        check_number("penalty", group["penalty"])
        check_basis_dtype(group["basis_dtype"])
        check_seed(group["seed"])
        for name in ("projector_lr_multiple", "projector_weight_decay", "peak_lr"):
            if group[name] is not None:
                check_number(name, group[name])
        if group["capturable"] and isinstance(group["lr"], Tensor) and self.estimates_peak(group):
            raise ValueError(
                "capturable is True and lr is a tensor, which the host does not read, but P's "
                f"step size with {group['proj_type']!r} is relative to the peak of lr: give "
                "peak_lr, or projector_lr_multiple"
            )
        if group["peak_lr"] is not None and not group["peak_lr"] > 0:
            raise ValueError(f"peak_lr is {group['peak_lr']!r}: expected None or a number above 0")
        super().check_group(group)

    def side(self, group: Group, param: Tensor) -> ResolvedSide:
        """The side of a matrix (output, input) that P projects, from `side` or `proj_type`."""
        return resolve_side(side_of(group), matrix_shape(param.shape, group["dimension_numbers"]))

    def basis_rule(self, group: Group) -> BasisRule:
        """The basis rule: `basis`, or the one of `proj_type`."""
        return group["basis"] or published_basis(*(group[name] for name in BASIS_OPTIONS))

    def lift(self, group: Group) -> Lift:
        """The group's `lift`, or the plain lift with `scale`."""
        return group["lift"] or _scaled(group["scale"])

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, projected if it has a `rank`; raises like the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[SEEN] = first_rates(group)

    def estimates_peak(self, group: Group) -> bool:
        """Whether P's step size reads the peak of the group's learning rate, which is not given."""
        is_named = group["rank"] is not None and group["basis"] is None
        if not is_named or group["peak_lr"] is not None or group["projector_lr_multiple"]:
            return False
        return self.basis_rule(group).gradient is not None

    def observe(self, group: Group) -> None:
        """Estimates the peak of the group's learning rate if it is read and not given."""
        if not self.estimates_peak(group):
            return
        before, group[SEEN] = group[SEEN], seen_rates(group)
        peak = group[SEEN]["peak"]
        if not self._has_named_peak:
            self._has_named_peak = True
            log.info(
                "P's step size is proportional to lr / peak; the peak of lr is estimated as %g. "
                "Set it with peak_lr=",
                peak,
            )
        is_same_schedule = all(before[key] == group[SEEN][key] for key in schedule_keys(group))
        is_other = not math.isclose(peak, before["peak"], rel_tol=1e-6)
        if is_same_schedule and is_other and not self._has_corrected_peak:
            self._has_corrected_peak = True
            log.warning(
                "the peak of lr was estimated as %g, but the learning rates seen so far give %g: "
                "P's step size, which is proportional to lr / peak, changes accordingly. Set it "
                "with peak_lr=",
                before["peak"],
                peak,
            )

    def projector_lr(self, group: Group) -> Number:
        """P's step size: as in the release, or a multiple of lr as in the paper."""
        lr, rule = lr_of(group), group["basis"]
        if rule is not None:
            return rule.step_size(lr) if callable(rule.step_size) else rule.step_size
        if group["projector_lr_multiple"] is not None:
            return group["projector_lr_multiple"] * lr
        peak = seen_rates(group)["peak"] if group["peak_lr"] is None else float(group["peak_lr"])
        return (lr / peak if peak else 1.0) / group["update_proj_gap"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, or a pickle whose groups lack newer entries."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(with_seen_rates(group))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restores a `state_dict`; see `SubspaceOptimizer.load_state_dict`."""
        groups = [with_seen_rates(group) for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


_scaled = functools.cache(scaled)
