"""The optimizer classes, each composed of a weight rule, a basis rule and a lift."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from osd_names import (
    LION_SIGNS,
    MOVE_PROJECTOR,
    PROJ_TYPES,
    Side,
    check_choice,
    check_moments,
    check_muon,
)
from osd_torch.bases import (
    BasisRule,
    Order,
    check_period,
    online_pca,
)
from osd_torch.groups import (
    BASIS_OPTIONS,
    SUBSPACE_DEFAULTS,
    check_beta,
    check_betas,
    check_objects,
    check_seed,
    check_spelling,
    projected_groups,
    side_of,
)
from osd_torch.layout import check_basis_dtype, check_rank, resolve_side
from osd_torch.lift import Lift, scaled, sign_after_lift
from osd_torch.numerics import check_number
from osd_torch.published import published_basis
from osd_torch.residuals import (
    MUON_COEFFICIENTS,
    add_gradient,
    orthogonalize,
    orthogonalized,
)
from osd_torch.rules import SGD, Adafactor, Adam, Lion, Rule, Trace
from osd_torch.rules_8bit import Adam8bit, AdamOfRows, Trace8bit
from osd_torch.schedules import SEEN, first_rates, schedule_keys, seen_rates, with_seen_rates
from osd_torch.selection import Select
from osd_torch.state import Group, named_parameters
from osd_torch.subspace import SubspaceOptimizer, log

LionSign = Literal["lifted", "subspace"]
MoveProjector = Order
# Options of Muon's orthogonalization.
MUON_DEFAULTS: dict[str, Any] = {
    "ns_steps": 5, "ns_coefficients": MUON_COEFFICIENTS, "ns_dtype": None, "muon_scale": "adamw",
}  # fmt: skip
# Storage of the moments of matrices that are not projected.
MOMENT_DEFAULTS: dict[str, Any] = {"second_moment": "full", "first_moment": "full"}


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

    An unknown key that is similar to an optimizer's key raises as a typo; other unknown keys are
    kept for the code that added them.

    Without `peak_lr` the peak of lr is estimated as `max_lr` (which `OneCycleLR` sets in the
    group), or else `initial_lr` (which PyTorch's other schedulers set), or else lr when the group
    was added; it is never less than an lr that was seen, so that P's step size is at most 1 /
    update_proj_gap. A schedule that rises and then falls below half of the estimate corrects it,
    and a new schedule restarts it; see `seen_rates`. The logger "osd_torch" reports the estimate
    once.
    """

    _has_named_peak = False  # not part of the saved state
    _has_mended_peak = False

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
            params = projected_groups(params, rank, select)
        elif select is not None:
            raise ValueError("select is given without rank: give rank, or put it into groups")
        super().__init__(params, {**SUBSPACE_DEFAULTS, **subspace, **defaults})
        given = [name for name in ("basis", "lift", "side") if subspace.get(name) is not None]
        given += ["transport_moments"] * bool(subspace.get("transport_moments"))
        if given and all(group["rank"] is None for group in self.param_groups):
            raise ValueError(f"{given[0]} is given, but nothing is projected: give rank")

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_spelling(group, self.defaults)
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
        if group["peak_lr"] is not None and not group["peak_lr"] > 0:
            raise ValueError(f"peak_lr is {group['peak_lr']!r}: expected None or a number above 0")
        super().check_group(group)

    def side(self, group: Group, param: Tensor) -> Side:
        """The side of a matrix (output, input) that P projects, from `side` or `proj_type`."""
        return resolve_side(side_of(group), param)

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

    def observe(self, group: Group) -> None:
        """Estimates the peak of the group's learning rate if it is read and not given."""
        is_named = group["rank"] is not None and group["basis"] is None
        if not is_named or group["peak_lr"] is not None or group["projector_lr_multiple"]:
            return
        if self.basis_rule(group).gradient is None:
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
        if is_same_schedule and is_other and not self._has_mended_peak:
            self._has_mended_peak = True
            log.warning(
                "the peak of lr was estimated as %g, but the learning rates seen so far give %g: "
                "P's step size, which is proportional to lr / peak, changes accordingly. Set it "
                "with peak_lr=",
                before["peak"],
                peak,
            )

    def projector_lr(self, group: Group) -> float:
        """P's step size: as in the release, or a multiple of lr as in the paper."""
        lr, rule = float(group["lr"]), group["basis"]
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


@functools.cache
def _muon_lift(
    steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype | None, scale: str
) -> Lift:
    options: dict[str, Any] = {"steps": steps, "coefficients": coefficients, "dtype": dtype}
    return orthogonalized(add_gradient(), scale=scale, **options)


_scaled, _sign_after_lift = functools.cache(scaled), functools.cache(sign_after_lift)


class SubspaceAdamW(PublishedOptimizer):
    """`galore_adamw`: AdamW on the low-rank gradient; weight decay after the update.

        R = P^T G,   W <- (1 - lr wd) (W - lr * lift(Adam(R)))

    As in the release, epsilon is added to the root of the second moment before bias correction.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, multiplied by lr.
        second_moment: For matrices that are not projected: "full", or "row", one number for each
            entry of the longer axis; see `osd_torch.rules_8bit.AdamOfRows`.
        first_moment: For these matrices with "row": "full", or "8bit".
        **subspace: See `Subspace`.

    Raises:
        ValueError: An option is out of range, a dtype is not float32, bfloat16 or float64, or a
            projected parameter is not a matrix.

    References:
        Liang et al., arXiv 2408.12857, algorithm 1.

    Example:
        >>> import torch, osd_torch
        >>> from osd_torch.rules import Adam
        >>> model = torch.nn.Sequential()
        >>> model.add_module("mlp", torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.SubspaceAdamW(
        ...     model.named_parameters(), lr=0.01, betas=(0.9, 0.95), rank=4,
        ...     basis=osd_torch.online_pca(Adam(), step_size=5e-3, penalty=0.1))
        >>> model(torch.ones(2, 24)).square().sum().backward()
        >>> optimizer.step()
        >>> osd_torch.projectors(optimizer)["mlp.weight"].shape
        torch.Size([16, 4])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        second_moment: str = "full",
        first_moment: str = "full",
        **subspace: Unpack[Subspace],
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(second_moment=second_moment, first_moment=first_moment)
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_moments(group["second_moment"], group["first_moment"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam with epsilon as in the release."""
        if group["rank"] is None and group["second_moment"] == "row":
            return full_rank_adam(group)
        return Adam(tuple(group["betas"]), group["eps"], eps_first=True)


def full_rank_adam(group: Group) -> Rule:
    """Adam with the group's options, for parameters that are not projected."""
    betas, eps = tuple(group["betas"]), group["eps"]
    if group["second_moment"] == "full":
        return Adam(betas, eps)
    return AdamOfRows(betas, eps, group["first_moment"] == "8bit")


class SubspaceLion(PublishedOptimizer):
    """`galore_lion`: Lion on the low-rank gradient; weight decay after the update.

        D = b1 m + (1 - b1) R,   m <- b2 m + (1 - b2) R,   W <- (1 - lr wd) (W - lr * lift(D))

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        betas: Weight of the moment in the direction, and its decay.
        weight_decay: Decoupled, multiplied by lr.
        lion_sign: "lifted": the sign is applied after the lift, so `scale` has no effect (the
            release). "subspace": it is applied to the low-rank direction, which is then lifted (the
            paper); this is always the case with a custom `lift`.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`.

    References:
        Chen et al., arXiv 2302.06675.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceLion(layer.parameters(), lr=1e-4, rank=2)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        lion_sign: LionSign = "lifted",
        **subspace: Unpack[Subspace],
    ) -> None:
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, lion_sign=lion_sign)
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_choice("lion_sign", group["lion_sign"], LION_SIGNS)
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Lion, with its sign applied here or after the lift."""
        is_lifted = group["rank"] is not None and group["lift"] is None
        sign = not is_lifted or group["lion_sign"] == "subspace"
        return Lion(tuple(group["betas"]), sign=sign)

    def lift(self, group: Group) -> Lift:
        """W <- W - lr * sign(P D), or the plain lift of signs; see `lion_sign`."""
        if group["lift"] is not None or group["lion_sign"] == "subspace":
            return super().lift(group)
        return _sign_after_lift()


class SubspaceAdafactor(PublishedOptimizer):
    """`galore_adafactor`: Adafactor on the low-rank gradient; weight decay before the update.

    The step size is `lr` as given, relative neither to the step count nor to the parameters.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        beta1: Decay of the first moment; None: no first moment.
        eps: Added to the squared gradient.
        clip_threshold: Maximum root mean square of an update before lr.
        decay_rate: The second moment's decay at step t is `1 - t ** decay_rate`.
        weight_decay: Decoupled, multiplied by lr.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`.

    References:
        Shazeer and Stern, arXiv 1804.04235.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceAdafactor(layer.parameters(), lr=1e-3, rank=2, beta1=0.9)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        beta1: float | None = None,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
        **subspace: Unpack[Subspace],
    ) -> None:
        rule = Adafactor(beta1, eps, clip_threshold, decay_rate)
        defaults = dict(lr=lr, weight_decay=weight_decay, **dataclasses.asdict(rule))
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        if group["beta1"] is not None:
            check_beta("beta1", group["beta1"])
        check_number("eps", group["eps"])
        check_number("clip_threshold", group["clip_threshold"])
        if not group["decay_rate"] <= 0:
            raise ValueError(f"decay_rate is {group['decay_rate']!r}: expected a number up to 0")
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adafactor with the group's options."""
        return Adafactor(*(group[f.name] for f in dataclasses.fields(Adafactor)))


class SubspaceAdamW8bit(PublishedOptimizer):
    """`galore_adamw8bit`: AdamW with 8-bit moments, by bitsandbytes; weight decay after the update.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment, after bias correction.
        weight_decay: Decoupled, multiplied by lr.
        min_8bit_size: State of fewer values stays in float32.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`.
        ImportError: bitsandbytes is not installed.

    References:
        Dettmers et al., arXiv 2110.02861.

    Example:
        >>> import torch, osd_torch
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.SubspaceAdamW8bit(layer.parameters(), lr=1e-3, rank=2)
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
        **subspace: Unpack[Subspace],
    ) -> None:
        rule = Adam8bit(betas, eps, min_8bit_size)
        defaults = dict(lr=lr, weight_decay=weight_decay, **dataclasses.asdict(rule))
        super().__init__(params, defaults, **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        size = group["min_8bit_size"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"min_8bit_size is {size!r}: expected a whole number of at least 0")
        super().check_group(group)

    def rule(self, group: Group) -> Adam8bit:
        """Adam with 8-bit moments."""
        return Adam8bit(tuple(group["betas"]), group["eps"], group["min_8bit_size"])


class SubspaceMuon(PublishedOptimizer):
    """Momentum in a subspace plus the full gradient, orthogonalized; weight decay first.

        m <- b m + R,   R = P^T M
        W <- (1 - lr wd) W - lr s O(M + P (D - R))

    for a projected matrix. D is m, or `R + b m` with Nesterov momentum; O moves all singular values
    close to 1 (Newton-Schulz); s is a scale. With a full-rank P this is Muon. Parameters that are
    not projected are trained by AdamW, or in groups with `use_muon=True` by Muon itself. With a
    momentum of 0 no moment is kept.

    The state of a projected (m, n) matrix is r max(m, n) numbers for m, r min(m, n) for P, and the
    state of P's optimizer.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate of the projected matrices, a number or a tensor.
        momentum: b.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: Decoupled, multiplied by lr, before the update.
        full_lr: Learning rate of the parameters that are not projected if `rank` is given; None:
            lr. In groups it is `lr`.
        betas: AdamW's betas for the parameters that are not projected.
        eps: AdamW's eps for these.
        second_moment: For matrices that are not projected: "full", or "row", one number for each
            entry of the longer axis; see `osd_torch.rules_8bit.AdamOfRows`.
        first_moment: "full", or "8bit" for the first moment of these matrices with "row", and for
            the momentum.
        ns_steps: Number of Newton-Schulz steps.
        ns_coefficients: Coefficients of its polynomial.
        ns_dtype: Dtype of the iteration; None: float32 or float64.
        muon_scale: "adamw", "muon" or "none"; see `orthogonalized`.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`; also for `muon_scale` or Newton-Schulz options that are out
            of range.

    References:
        Muon (https://kellerjordan.github.io/posts/muon/; scale "adamw" of arXiv 2502.16982) on the
        subspace of arXiv 2408.12857.

    Example:
        >>> import torch, osd_torch
        >>> model = torch.nn.Sequential()
        >>> model.add_module("mlp", torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.SubspaceMuon(
        ...     model.named_parameters(), lr=0.02, full_lr=0.01, momentum=0.8, rank=4)
        >>> model(torch.ones(2, 24)).square().sum().backward()
        >>> optimizer.step()
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        full_lr: float | Tensor | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        second_moment: str = "full",
        first_moment: str = "full",
        ns_steps: int = 5,
        ns_coefficients: tuple[float, float, float] = MUON_COEFFICIENTS,
        ns_dtype: torch.dtype | None = None,
        muon_scale: str = "adamw",
        **subspace: Unpack[Subspace],
    ) -> None:
        defaults: dict[str, Any] = dict(
            lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, betas=betas,
            eps=eps, second_moment=second_moment, first_moment=first_moment, ns_steps=ns_steps,
            ns_coefficients=tuple(ns_coefficients), ns_dtype=ns_dtype, muon_scale=muon_scale,
            use_muon=False,
        )  # fmt: skip
        if full_lr is not None:
            check_number("full_lr", full_lr)
        super().__init__(params, {**defaults, "full_lr": full_lr}, **subspace)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters; see `PublishedOptimizer`."""
        full_lr = self.defaults["full_lr"]
        by_adam = param_group.get("rank") is None and not param_group.get("use_muon")
        if full_lr is not None and by_adam:
            param_group = {"lr": full_lr, **param_group}
        super().add_param_group(param_group)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_beta("momentum", group["momentum"])
        check_muon(group["muon_scale"], group["nesterov"], group["momentum"])
        check_basis_dtype(group["ns_dtype"], "ns_dtype")
        if group["use_muon"]:
            check_use_muon(group)
        by_adam = group["rank"] is None and not group["use_muon"]
        check_moments(group["second_moment"] if by_adam else "row", group["first_moment"])
        if group["lift"] is not None:
            for name, default in MUON_DEFAULTS.items():
                if group[name] != default:
                    raise ValueError(
                        f"{name} is {group[name]!r}, but lift is given, which does not read it: "
                        "leave it out, or pass it to orthogonalized(...)"
                    )
        self.lift(group)
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Momentum, or Adam at full rank."""
        if group["rank"] is None and not group["use_muon"]:
            return full_rank_adam(group)
        if not group["momentum"]:
            return SGD()
        kind = Trace8bit if group["first_moment"] == "8bit" else Trace
        return kind(group["momentum"], group["nesterov"])

    def lift(self, group: Group) -> Lift:
        """The full gradient plus the momentum, orthogonalized."""
        steps, coefficients, dtype, scale = (group[name] for name in MUON_DEFAULTS)
        return group["lift"] or _muon_lift(steps, tuple(coefficients), dtype, scale)

    def full_rank_direction(self, group: Group, direction: Tensor) -> Tensor:
        """Orthogonalized, in a group with `use_muon`."""
        if not group["use_muon"]:
            return direction
        steps, coefficients, dtype, scale = (group[name] for name in MUON_DEFAULTS)
        return orthogonalize(
            direction, "output", steps=steps, coefficients=coefficients, dtype=dtype, scale=scale
        )


def check_use_muon(group: Group) -> None:
    """Raises ValueError for a group that Muon cannot train at full rank."""
    if not isinstance(group["use_muon"], bool):
        raise ValueError(f"use_muon is {group['use_muon']!r}: expected True or False")
    if group["rank"] is not None:
        raise ValueError(
            f"use_muon is True, but rank is {group['rank']!r}: a group with a rank is trained by "
            "Muon in a subspace; leave one of them out"
        )
    for name, param in named_parameters(group):
        if param.ndim != 2:
            raise ValueError(
                f"parameter '{name}' has shape {tuple(param.shape)}, which is not a matrix: put it "
                "into a group without use_muon"
            )


class OnlineSubspaceDescent(PublishedOptimizer):
    """Any weight rule in a subspace; weight decay after the update.

        W <- (1 - lr wd) (W - lr * lift(rule(R))),   R = P^T G

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak if a schedule changes it.
        rule: Turns R, or the gradient of a parameter that is not projected, into a direction, such
            as `osd_torch.rules.Adam(betas=(0.9, 0.95))` or a custom `Rule`.
        weight_decay: Decoupled, multiplied by lr.
        **subspace: See `Subspace`.

    Raises:
        ValueError: See `SubspaceAdamW`; also if `rule` is not a `Rule`.

    References:
        Liang et al., arXiv 2408.12857, algorithm 1.

    Example:
        >>> import torch, osd_torch
        >>> from osd_torch.rules import SGD, Lion
        >>> layer = torch.nn.Linear(8, 6)
        >>> optimizer = osd_torch.OnlineSubspaceDescent(
        ...     layer.parameters(), lr=0.1, rule=Lion(), rank=2, side="output",
        ...     basis=osd_torch.online_pca(SGD(), step_size=lambda lr: 5 * lr),
        ...     lift=osd_torch.scaled(0.25))
        >>> layer(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> [tuple(P.shape) for P in osd_torch.projectors(optimizer).values()]
        [(6, 2)]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rule: Rule,
        weight_decay: float = 0.0,
        **subspace: Unpack[Subspace],
    ) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, rule=rule), **subspace)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        is_rule = callable(getattr(group["rule"], "step", None))
        if isinstance(group["rule"], type) or not is_rule:
            raise ValueError(
                f"rule is {group['rule']!r}: expected a Rule, such as osd_torch.rules.Adam()"
            )
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """The group's rule."""
        rule: Rule = group["rule"]
        return rule


class FullRankAdam(PublishedOptimizer):
    """`adam` and `adamw` for bfloat16 parameters, and with moments that `torch.optim` lacks.

    Moments are float32. In `torch.optim` they would be bfloat16, in which `0.999 * v` rounds to v
    and never decays.

    Args:
        params: Parameters, (name, parameter) pairs, or groups without rank.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, multiplied by lr, before the update.
        l2: Weight decay that is added to the gradient.
        second_moment: For matrices: "full", or "row", one number for each entry of the longer axis;
            see `osd_torch.rules_8bit.AdamOfRows`.
        first_moment: For these with "row": "full", or "8bit".
        stochastic_rounding: Whether to round weights up or down at random; see `make_optimizer`.
        seed: Seed of stochastic rounding.

    Raises:
        ValueError: See `SubspaceAdamW`.
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        l2: float = 0.0,
        second_moment: str = "full",
        first_moment: str = "full",
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        defaults |= dict(l2=l2, second_moment=second_moment, first_moment=first_moment)
        super().__init__(params, defaults, stochastic_rounding=stochastic_rounding, seed=seed)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option that is out of range, naming it and the choices."""
        check_betas(group)
        check_number("weight_decay", group["l2"])
        check_moments(group["second_moment"], group["first_moment"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam."""
        return full_rank_adam(group)

    def full_rank_gradient(self, group: Group, param: Tensor) -> Tensor:
        """The gradient plus its L2 term."""
        gradient = super().full_rank_gradient(group, param)
        return gradient.add(param, alpha=group["l2"]) if group["l2"] else gradient
