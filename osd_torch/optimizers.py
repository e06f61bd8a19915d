"""The optimizers: classes that compose a rule, a basis rule and a lift; and `make_optimizer`.

Each class is a short composition: the rule of W; the basis rule, given as an object or by the
published name in a parameter group; the lift; decoupled weight decay. `make_optimizer` parses the
published names (`osd_names`) into them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from osd_names import (
    FULL_RANK_OPTIMIZERS,
    LION_SIGNS,
    MOMENTUM,
    MOVE_PROJECTOR,
    OPTIMIZERS,
    PROJ_TYPES,
    PROJECTIONS,
    RESIDUALS,
    SIDES,
    SUBSPACE_OPTIMIZERS,
    Side,
    check_choice,
    check_flag,
    check_moments,
    check_muon,
    check_names,
    check_read,
    check_residual,
)
from osd_torch.blockwise import Adam8bit, Trace8bit, import_bitsandbytes
from osd_torch.lift import Lift, scaled, sign_after_lift
from osd_torch.projectors import (
    BasisRule,
    Order,
    check_period,
    check_rule,
    gaussian,
    name_of_rule,
    oja,
    online_pca,
    random,
    svd,
)
from osd_torch.residuals import (
    MUON_COEFFICIENTS,
    add_gradient,
    column_ema,
    gradient_only,
    norm_ratio,
    orthogonalize,
    orthogonalized,
    residual_sign,
)
from osd_torch.rules import SGD, Adafactor, Adam, AdamOfRows, Lion, Rule, Trace
from osd_torch.selection import (
    Kinds,
    LinearSelection,
    Select,
    say_what_is_projected,
)
from osd_torch.sharding import is_distributed
from osd_torch.subspace import (
    Group,
    SubspaceOptimizer,
    check_basis_dtype,
    check_dense,
    check_dtype,
    check_number,
    check_rank,
    count_if_not_finite,
    log,
    named_parameters,
    resolve_side,
)

__all__ = [
    "FULL_RANK_OPTIMIZERS", "PROJ_TYPES", "SUBSPACE_OPTIMIZERS", "FullRankAdam",
    "OnlineSubspaceDescent", "PublishedOptimizer", "SubspaceAdafactor", "SubspaceAdamW",
    "SubspaceAdamW8bit", "SubspaceLion", "SubspaceMuon", "make_optimizer",
]  # fmt: skip

LionSign = Literal["lifted", "subspace"]
MoveProjector = Order

# The rules of P's step, by the names in `osd_names.PROJECTIONS`.
PROJECTOR_RULES: dict[str, Rule] = {
    "adam": Adam(),
    "adam8bit": Adam8bit(),
    "lion": Lion(),
    "adafactor": Adafactor(),
    "sgd": SGD(),
}
# The rules that set P every so many steps, by their names there.
REFRESHED: dict[str, Callable[[int], BasisRule]] = {
    "svd": svd, "random": random, "gaussian": gaussian
}  # fmt: skip
# The lifts by the names in `osd_names.RESIDUALS`: (scale, residual_scale, growth_limiter) -> lift.
RESIDUAL_LIFTS: dict[str, Callable[[float, float, bool], Lift | None]] = {
    "none": lambda a, own, limiter: None,
    "norm_ratio": lambda a, own, limiter: norm_ratio(a, limiter=limiter),
    "norm_ratio_released": lambda a, own, limiter: norm_ratio(a, limiter=limiter, release=True),
    "column_ema": lambda a, own, limiter: column_ema(own),
    "gradient_only": lambda a, own, limiter: gradient_only(a, limiter=limiter),
    "gradient_only_matrix": lambda a, own, limiter: gradient_only(a, per="matrix", limiter=limiter),
    "sign": lambda a, own, limiter: residual_sign(own, a),
}
SUBSPACE_DEFAULTS: dict[str, Any] = {
    "rank": None,
    "update_proj_gap": 200,
    "update_proj_every": 1,
    "scale": 1.0,
    "proj_type": "std",
    "penalty": 0.0,
    "projector_lr_multiple": None,
    "projector_weight_decay": None,
    "peak_lr": None,
    "move_projector": "after",
    "basis_dtype": None,
    "transport_moments": False,
    "stochastic_rounding": False,
    "seed": 0,
    "basis": None,
    "lift": None,
    "side": None,
}
# The options of a group that say what its basis rule is.
BASIS_OPTIONS = (
    "proj_type", "update_proj_gap", "update_proj_every", "penalty", "projector_weight_decay",
    "move_projector",
)  # fmt: skip
# The options of Muon's orthogonalization.
MUON_DEFAULTS: dict[str, Any] = {
    "ns_steps": 5, "ns_coefficients": MUON_COEFFICIENTS, "ns_dtype": None, "muon_scale": "adamw",
}  # fmt: skip
# The forms of the moments of matrices that are not projected.
MOMENT_DEFAULTS: dict[str, Any] = {"second_moment": "full", "first_moment": "full"}
# What torch's schedulers put into groups.
SCHEDULER_KEYS = ("initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum")
# What a group keeps of the learning rates that it saw; see `seen_rates`.
SEEN = "seen_lr"


class Subspace(TypedDict, total=False):
    """How matrices are projected: keywords of the optimizer classes.

    Attributes:
        rank: Columns of P; at most min(m, n) are used. Given here and not in parameter groups, it
            is that of the parameters that `select` takes; all others are trained at full rank.
            Parameters without names are taken if they are matrices.
        select: (name, parameter) -> whether it is projected. None: as in `make_optimizer`.
        basis: The rule for P, such as `online_pca(Adam(), step_size=5e-3)`. None: with `rank`,
            `online_pca()`; in groups of the published form, what `proj_type` names.
        lift: What turns a direction into an update of W, such as `scaled(0.25)`. None: the class'
            own.
        side: The side of a matrix that P projects: "input", "output", "shorter" (ties: input),
            "longer" (ties: output) or "both". None: "shorter", or that of `proj_type`.
        transport_moments: Carry the moments of R over whenever P changes.
        stochastic_rounding: Round weights in bfloat16 up or down at random, so that the mean is
            the weight in float32; see `make_optimizer`.
        basis_dtype: Of P. None: float32, float64 for float64 parameters.
        seed: Of rules that draw, and of stochastic rounding.
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
    """A subspace optimizer whose groups have their rules as objects, or by the release's names.

    A group with `rank` takes the keys of `Subspace`, and in place of `basis`, `lift` and `side`
    these, the first three as in `galore_torch`:

        update_proj_gap         steps between refreshes for the SVD kinds and `random`; for online
                                PCA, P's step size is 1 / update_proj_gap times lr / peak lr (200)
        scale                   multiplies the lifted update (1.0)
        proj_type               one of `PROJ_TYPES` ("std")
        update_proj_every       online PCA moves P every `update_proj_every` steps (1)
        penalty                 weight of the orthogonality penalty in P's loss (0.0)
        projector_lr_multiple   P's step size as a multiple of lr, in place of the above (None)
        peak_lr                 the peak of lr, which P's step size is relative to; None: a guess
                                (None)
        projector_weight_decay  decoupled weight decay of P; None: the release's, 0.01 for
                                `continuous` and 0 for the others (None)
        move_projector          whether P moves "after" W's step or "before" it ("after")

    A key that is close to one of an optimizer's, and none, is taken for a mistake; others stay, for
    whoever put them there.

    Without `peak_lr` the peak of lr is guessed: `max_lr` (which `OneCycleLR` sets in the group), or
    else `initial_lr` (which PyTorch's other schedulers set), or else lr as the group was added; and
    never less than an lr that was seen, so that P's step size is at most 1 / update_proj_gap. A
    schedule that rises and falls below half of the guess corrects it, and one that follows another
    starts it again; see `seen_rates`. The logger "osd_torch" names the guess once.
    """

    _has_named_peak = False  # of this object, which its state does not keep
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
            raise ValueError("select is given, and rank is not: give rank, or put it into groups")
        super().__init__(params, {**SUBSPACE_DEFAULTS, **subspace, **defaults})
        given = [name for name in ("basis", "lift", "side") if subspace.get(name) is not None]
        given += ["transport_moments"] * bool(subspace.get("transport_moments"))
        if given and all(group["rank"] is None for group in self.param_groups):
            raise ValueError(f"{given[0]} is given, and nothing is projected: give rank")

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option out of range, naming it and the choices."""
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
        """The side of a matrix (output, input) that P projects, by `side` or `proj_type`."""
        return resolve_side(side_of(group), param)

    def basis_rule(self, group: Group) -> BasisRule:
        """The rule for P, `basis` or what `proj_type` names."""
        return group["basis"] or _basis_rule(*(group[name] for name in BASIS_OPTIONS))

    def lift(self, group: Group) -> Lift:
        """The group's `lift`, or the plain one times `scale`."""
        return group["lift"] or _scaled(group["scale"])

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, projected if it has a `rank`; raises as the class does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[SEEN] = first_rates(group)

    def observe(self, group: Group) -> None:
        """Guesses the peak of the group's learning rate, where it is read and not given."""
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
                "P's step size follows lr / peak; the peak of lr is guessed to be %g. "
                "peak_lr= gives it",
                peak,
            )
        is_same_schedule = all(before[key] == group[SEEN][key] for key in schedule_keys(group))
        is_other = not math.isclose(peak, before["peak"], rel_tol=1e-6)
        if is_same_schedule and is_other and not self._has_mended_peak:
            self._has_mended_peak = True
            log.warning(
                "the peak of lr was guessed to be %g, and is %g by the rates seen so far: P's step "
                "size, which follows lr / peak, changes with it. peak_lr= gives it",
                before["peak"],
                peak,
            )

    def projector_lr(self, group: Group) -> float:
        """P's step size: the release's, or a multiple of lr as in the paper."""
        lr, rule = float(group["lr"]), group["basis"]
        if rule is not None:
            return rule.step_size(lr) if callable(rule.step_size) else rule.step_size
        if group["projector_lr_multiple"] is not None:
            return group["projector_lr_multiple"] * lr
        peak = seen_rates(group)["peak"] if group["peak_lr"] is None else float(group["peak_lr"])
        return (lr / peak if peak else 1.0) / group["update_proj_gap"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy, a pickle of an earlier version too."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(_with_seen_rates(group))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Restores what `state_dict` returned; see `SubspaceOptimizer.load_state_dict`."""
        groups = [_with_seen_rates(group) for group in state_dict["param_groups"]]
        super().load_state_dict({**state_dict, "param_groups": groups})


@functools.cache
def _basis_rule(
    proj_type: str, gap: int, every: int, penalty: float, weight_decay: float | None, order: Order
) -> BasisRule:
    """The rule for P that `BASIS_OPTIONS` describe."""
    named = PROJECTIONS[proj_type]
    if named.basis in REFRESHED:
        return REFRESHED[named.basis](gap)
    if named.basis == "oja":
        return oja(PROJECTOR_RULES[named.rule], order=order, every=every)
    decay = named.weight_decay if weight_decay is None else weight_decay
    rule = PROJECTOR_RULES[named.rule]
    return online_pca(rule, penalty=penalty, weight_decay=decay, order=order, every=every)


@functools.cache
def _muon_lift(
    steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype | None, scale: str
) -> Lift:
    options: dict[str, Any] = {"steps": steps, "coefficients": coefficients, "dtype": dtype}
    return orthogonalized(add_gradient(), scale=scale, **options)


_scaled, _sign_after_lift = functools.cache(scaled), functools.cache(sign_after_lift)


def first_rates(group: Group) -> dict[str, Any]:
    """What `SEEN` is when a group is added: the peak by what the group says of it, and no rate."""
    keys = schedule_keys(group)
    given = (keys["max_lr"], keys["initial_lr"], group["lr"])
    peak = float(next(x for x in given if x is not None))
    return {"peak": peak, "first": None, "last": None, "highest": 0.0, **keys}


def schedule_keys(group: Group) -> dict[str, float | None]:
    """What PyTorch's schedulers set in a group when they are made."""
    found = {key: group.get(key) for key in ("max_lr", "initial_lr")}
    return {key: None if x is None else float(x) for key, x in found.items()}


def seen_rates(group: Group) -> dict[str, Any]:
    """What `SEEN` is to be at the present learning rate.

    A dict of "peak", the guess; the "first", "last" and "highest" rate of the present schedule; and
    the keys that its scheduler has set. Another schedule has begun where a key has changed, or
    where lr does what `OneCycleLR` does not: it rises after it fell, or is below `min_lr`. A
    schedule that rose and falls has shown its peak, if that is below half of the guess.
    """
    seen, lr, keys = group[SEEN], float(group["lr"]), schedule_keys(group)
    if not lr:  # at the start of a warm-up, and where tools look at the state
        return seen
    last, highest = seen["last"], seen["highest"]
    changed = [key for key in keys if keys[key] != seen[key]]
    fell = last is not None and last < highest
    after_one_cycle = keys["max_lr"] is not None and (
        (fell and lr > last * (1 + 1e-6)) or lr < float(group.get("min_lr", 0)) * (1 - 1e-6)
    )
    if changed or after_one_cycle:
        known = keys["max_lr"] if "max_lr" in changed else keys["initial_lr"]
        peak = lr if after_one_cycle and not changed or known is None else known
        seen = {"peak": peak, "first": None, "last": None, "highest": 0.0}
        last, highest = None, 0.0
    first = lr if last is None else seen["first"]
    has_shown = last is not None and first < highest and lr < last and highest < seen["peak"] / 2
    peak = highest if has_shown else max(seen["peak"], lr)
    return {"peak": peak, "first": first, "last": lr, "highest": max(highest, lr), **keys}


def _with_seen_rates(group: Group) -> Group:
    """A saved group; in those of earlier versions `peak_lr` is lr as the group was added."""
    if SEEN in group or "peak_lr" not in group:
        return group
    return {**group, "peak_lr": None, SEEN: first_rates({**group, "lr": group["peak_lr"]})}


class SubspaceAdamW(PublishedOptimizer):
    """`galore_adamw`: AdamW on the low-rank gradient; weight decay after the update.

    As in the release, eps is added to the root of the second moment before the bias correction.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak, if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times lr.
        second_moment: Of matrices that are not projected: "full", or "row", one number for each
            entry of the longer axis; see `osd_torch.rules.AdamOfRows`.
        first_moment: Of these with "row": "full", or "8bit".
        **subspace: See `Subspace`.

    Raises:
        ValueError: for an option out of range, a dtype that is not float32, bfloat16 or float64,
            or a projected parameter that is not a matrix.

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
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        check_moments(group["second_moment"], group["first_moment"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam with the release's eps."""
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

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak, if a schedule changes it.
        betas: Weight of the moment in the direction, and its decay.
        weight_decay: Decoupled, times lr.
        lion_sign: "lifted": the sign is taken after the lift, so that `scale` has no effect (the
            release); "subspace": of the low-rank direction, then lifted (the paper), as it always
            is with a `lift` of your own.
        **subspace: See `Subspace`.

    Raises:
        ValueError: as for `SubspaceAdamW`.

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
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        check_choice("lion_sign", group["lion_sign"], LION_SIGNS)
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Lion, with its sign here or after the lift."""
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

    The step size is `lr` as given: neither relative to the step count nor to the parameters.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate, a number or a tensor; the peak, if a schedule changes it.
        beta1: Decay of the first moment; None: no first moment.
        eps: Added to the squared gradient.
        clip_threshold: The largest root mean square of an update before lr.
        decay_rate: The second moment's decay at step t is `1 - t ** decay_rate`.
        weight_decay: Decoupled, times lr.
        **subspace: See `Subspace`.

    Raises:
        ValueError: as for `SubspaceAdamW`.

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
        """Raises ValueError for an option out of range, naming it and the choices."""
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
        lr: Learning rate, a number or a tensor; the peak, if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times lr.
        min_8bit_size: State of fewer values is kept in float32.
        **subspace: See `Subspace`.

    Raises:
        ValueError: as for `SubspaceAdamW`.
        ImportError: if bitsandbytes is not installed.

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
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        size = group["min_8bit_size"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"min_8bit_size is {size!r}: expected a whole number of at least 0")
        super().check_group(group)

    def rule(self, group: Group) -> Adam8bit:
        """Adam with moments in 8 bits."""
        return Adam8bit(tuple(group["betas"]), group["eps"], group["min_8bit_size"])


class SubspaceMuon(PublishedOptimizer):
    """Momentum in a subspace, the whole gradient, and the sum orthogonalized; weight decay first.

    For a projected matrix, with R = P^T M: `m <- b m + R`, and
    `W <- (1 - lr wd) W - lr s O(M + P (D - R))`, where D is m, or `R + b m` with Nesterov's
    momentum, O moves all singular values near to 1 (Newton-Schulz) and s is a `scale`. With P of
    full rank this is Muon. What is not projected is trained by AdamW, or in groups with
    `use_muon=True` by Muon itself. With a momentum of 0 no moment is kept.

    The state of a projected (m, n) matrix is r max(m, n) numbers for m, r min(m, n) for P, and what
    P's optimizer keeps.

    Source: Muon (https://kellerjordan.github.io/posts/muon/; scale "adamw" of arXiv 2502.16982) on
    the subspace of arXiv 2408.12857.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate of the projected matrices, a number or a tensor.
        momentum: b.
        nesterov: Nesterov's momentum.
        weight_decay: Decoupled, times lr, before the update.
        full_lr: Learning rate of what is not projected, where `rank` is given; None: lr. In groups
            it is `lr`.
        betas: AdamW's, of what is not projected.
        eps: Likewise.
        second_moment: Likewise, of matrices: "full", or "row", one number for each entry of the
            longer axis; see `osd_torch.rules.AdamOfRows`.
        first_moment: "full", or "8bit": that of these matrices with "row", and the momentum.
        ns_steps: Steps of Newton-Schulz.
        ns_coefficients: Its polynomial.
        ns_dtype: That it runs in; None: float32 or float64.
        muon_scale: "adamw", "muon" or "none"; see `orthogonalized`.
        **subspace: See `Subspace`.

    Raises:
        ValueError: as for `SubspaceAdamW`, and for `muon_scale` or Newton-Schulz options out of
            range.

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
        """Raises ValueError for an option out of range, naming it and the choices."""
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
                        f"{name} is {group[name]!r}, and lift is given, which does not read it: "
                        "leave it out, or give it to orthogonalized(...)"
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
        """The gradient and the momentum, orthogonalized."""
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
            f"use_muon is True, and rank is {group['rank']!r}: a group with a rank is trained by "
            "Muon in a subspace; leave one of them out"
        )
    for name, param in named_parameters(group):
        if param.ndim != 2:
            raise ValueError(
                f"parameter '{name}' has shape {tuple(param.shape)}, which is not a matrix: put it "
                "into a group without use_muon"
            )


class OnlineSubspaceDescent(PublishedOptimizer):
    """Any rule of W in a subspace; weight decay after the update.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate; the peak, if a schedule changes it. A number or a tensor.
        rule: Turns R into a direction, and the gradient of a parameter that is not projected, such
            as `osd_torch.rules.Adam(betas=(0.9, 0.95))`, or a `Rule` of your own.
        weight_decay: Decoupled, times lr.
        **subspace: See `Subspace`.

    Raises:
        ValueError: as for `SubspaceAdamW`, and for a `rule` that is none.

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
        """Raises ValueError for an option out of range, naming it and the choices."""
        is_rule = callable(getattr(group["rule"], "step", None))
        if isinstance(group["rule"], type) or not is_rule:
            raise ValueError(
                f"rule is {group['rule']!r}: expected a Rule, such as osd_torch.rules.Adam()"
            )
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """The group's."""
        rule: Rule = group["rule"]
        return rule


class FullRankAdam(PublishedOptimizer):
    """`adam` and `adamw` for bfloat16 parameters, and with other moments than `torch.optim`'s.

    Moments are float32. There they would be bfloat16, in which `0.999 * v` rounds to v and never
    decays.

    Args:
        params: Parameters, (name, parameter) pairs, or groups without rank.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times lr, before the update.
        l2: Weight decay that is added to the gradient.
        second_moment: Of matrices: "full", or "row", one number for each entry of the longer axis;
            see `osd_torch.rules.AdamOfRows`.
        first_moment: Of these with "row": "full", or "8bit".
        stochastic_rounding: Round weights up or down at random; see `make_optimizer`.
        seed: Of that.

    Raises:
        ValueError: as for `SubspaceAdamW`.
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
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        check_number("weight_decay", group["l2"])
        check_moments(group["second_moment"], group["first_moment"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam."""
        return full_rank_adam(group)

    def full_rank_gradient(self, group: Group, param: Tensor) -> Tensor:
        """The gradient with its L2 term."""
        gradient = super().full_rank_gradient(group, param)
        return gradient.add(param, alpha=group["l2"]) if group["l2"] else gradient


def make_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    optimizer: str,
    proj_type: str = "std",
    *,
    lr: float | Tensor,
    full_lr: float | Tensor | None = None,
    rank: int = 128,
    update_proj_gap: int = 200,
    update_proj_every: int = 1,
    scale: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: Select | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    nesterov: bool = False,
    muon_scale: str = "adamw",
    ns_dtype: torch.dtype | None = None,
    residual: str = "none",
    residual_scale: float | None = None,
    growth_limiter: bool = True,
    second_moment: str = "full",
    first_moment: str = "full",
    select: Select | None = None,
    seed: int = 0,
    penalty: float = 0.0,
    projector_lr_multiple: float | None = None,
    projector_weight_decay: float | None = None,
    peak_lr: float | None = None,
    lion_sign: LionSign = "lifted",
    move_projector: MoveProjector = "after",
    basis_dtype: torch.dtype | None = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
) -> torch.optim.Optimizer:
    """Builds an optimizer by its published name.

    The defaults are the release's; the paper's (arXiv 2408.12857) are named options: `penalty=0.1`,
    `projector_lr_multiple=5`, `projector_weight_decay=weight_decay`, `lion_sign="subspace"`,
    `scale=1`.

    Args:
        named_parameters: Such as `model.named_parameters()`.
        optimizer: `galore_adamw`, `galore_lion`, `galore_adafactor` or `galore_adamw8bit`: selected
            parameters in a subspace, all else by the same rule at full rank; `osd_muon`: momentum
            in a subspace, the whole gradient, their sum orthogonalized, all else by AdamW (see
            `SubspaceMuon`); or `adam`, `adamw`, `lion`, `adafactor`, `adam8bit` or `sgd`:
            everything at full rank; `muon`: selected parameters by Muon, all else by AdamW.
        proj_type: How P is found and moved: `std`, `reverse_std`, `left`, `right`, `full` (SVD
            every `update_proj_gap` steps), `random` or `gaussian` (drawn as often), or online PCA
            by AdamW (`continuous`), `continuous_adam8bit`, `continuous_lion`,
            `continuous_adafactor`, `continuous_sgd`; or `oja`, a step of Oja's rule and a QR.
        lr: Learning rate, a number or a tensor; the peak, if a scheduler changes it.
        full_lr: That of parameters that are not selected. None: `lr`.
        rank: Columns of P; at most min(m, n) are used.
        update_proj_gap: Steps between refreshes for the SVD kinds and `random`; for online PCA,
            P's step size is `1 / update_proj_gap`, times the scheduler's factor on lr.
        update_proj_every: Online PCA moves P at steps `update_proj_every`, twice that, ... only;
            its step size then, on the same schedule as W's, is that of a step where it moves at all
            of them. P's own count of steps follows from it, so it should not change within a run.
        scale: Multiplies the lifted update.
        weight_decay: Decoupled, on every parameter: after the update for the subspace optimizers
            and `lion` (before it for Adafactor), before it for `adamw`; for `adam`, L2 on the
            gradient.
        no_decay: (name, parameter) -> whether it has no weight decay. None: all have it.
        beta1: Decay of the first moment, and of Lion's moment in the direction. None: 0.9, and no
            first moment for Adafactor.
        beta2: Decay of the second moment, and of Lion's moment. None: 0.999, Lion's 0.99.
        eps: Added to the root of Adam's second moment. None: 1e-6 for `galore_adamw`, else 1e-8.
        momentum: Muon's. None: 0.95; 0: no moment is kept.
        nesterov: Whether it is Nesterov's.
        muon_scale: Of Muon's update, with which AdamW's rates carry over ("adamw"), or "muon" or
            "none"; see `orthogonalized`.
        ns_dtype: That Newton-Schulz runs in. None: float32 (float64 for float64 parameters).
        residual: What of a gradient outside the subspace reaches the weights: `none`; Fira's
            `norm_ratio`, or as its code computes it `norm_ratio_released`; Alice's `column_ema`;
            APOLLO's `gradient_only` (with `gaussian`), or Mini's `gradient_only_matrix`; FRUGAL's
            `sign`. See `osd_torch.residuals`. Lion's own sign is then taken in the subspace.
        residual_scale: Its weight, of `column_ema` (None: 0.4) and `sign` (1).
        growth_limiter: Whether it grows by at most 1 % a step, of `norm_ratio` and `gradient_only`.
        second_moment: Of Adam, for matrices that are not selected: "full", or "row", one number for
            each entry of the longer axis, so that an embedding has one for each word.
        first_moment: With "row": "full", or "8bit"; then Muon's momentum is in 8 bits too.
        select: (name, parameter) -> whether it is projected, such as `select_linear(model)`. None:
            the matrices inside numbered blocks, and those with `attn`, `attention` or `mlp` in
            their name, but no embeddings, tables, heads and routers. The log (`osd_torch`) says
            what was chosen and what was left.
        seed: Of `random`, and of stochastic rounding.
        penalty: Weight of the orthogonality penalty in P's loss.
        projector_lr_multiple: P's step size as a multiple of lr, in place of `1 / update_proj_gap`.
        projector_weight_decay: Decoupled weight decay of P. None: 0.01 for `continuous`, else 0.
        peak_lr: The peak of lr, which P's step size is relative to. None: guessed, and never below
            an lr that was seen; see `PublishedOptimizer`.
        lion_sign: Whether Lion's sign is taken after the lift, or of the low-rank direction.
        move_projector: Whether P moves after W's step or before it.
        basis_dtype: dtype of P. None: float32 (float64 for float64 parameters).
        transport_moments: Carry the moments of R over whenever P changes (arXiv 2410.16103), in
            place of reading them as moments of the new R.
        stochastic_rounding: Weights in bfloat16 are computed in float32 and rounded up or down at
            random, so that the mean is the float32 value: updates that are smaller than a weight's
            spacing are not lost. The random bits follow from the seed, the parameter's name and its
            step, so that a resumed run and every process repeat them; each part of a sharded
            parameter has bits of its own. Without effect on float32 and float64. Not with `sgd` and
            `adam8bit`.

    Returns:
        A `torch.optim.Optimizer`. A step with any non-finite gradient changes nothing and is
        counted (`skipped_steps`).

    Raises:
        ValueError: for an unknown name, an argument out of range, or one that the optimizer and
            projector chosen do not read, naming it and the choices.

    Example:
        >>> import torch, osd_torch
        >>> model = torch.nn.Sequential()
        >>> model.add_module("mlp", torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.make_optimizer(
        ...     model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4)
        >>> model(torch.ones(2, 24)).square().sum().backward()
        >>> optimizer.step()
        >>> list(osd_torch.projectors(optimizer))
        ['mlp.weight']
    """
    check_names(optimizer, proj_type)
    check_choice("lion_sign", lion_sign, LION_SIGNS)
    check_choice("move_projector", move_projector, MOVE_PROJECTOR)
    check_rank(rank)
    check_period(update_proj_gap)
    check_period(update_proj_every, "update_proj_every")
    check_seed(seed)
    check_number("lr", lr)
    if full_lr is not None:
        check_number("full_lr", full_lr)
    for name, beta in (("beta1", beta1), ("beta2", beta2), ("momentum", momentum)):
        if beta is not None:
            check_beta(name, beta)
    if eps is not None:
        check_number("eps", eps)
    check_flag("stochastic_rounding", stochastic_rounding)
    for name, function in (("select", select), ("no_decay", no_decay)):
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} is {function!r}: expected a function (name, parameter) -> bool"
            )
    check_read(
        optimizer,
        proj_type,
        {
            "beta1": beta1,
            "beta2": beta2,
            "eps": eps,
            "momentum": momentum,
            "nesterov": nesterov,
            "muon_scale": muon_scale,
            "ns_dtype": None if ns_dtype is None else str(ns_dtype),
            "scale": scale,
            "residual": residual,
            "residual_scale": residual_scale,
            "growth_limiter": growth_limiter,
            "second_moment": second_moment,
            "first_moment": first_moment,
            "lion_sign": lion_sign,
            "transport_moments": transport_moments,
            "stochastic_rounding": stochastic_rounding,
            "update_proj_every": update_proj_every,
            "penalty": penalty,
            "projector_lr_multiple": projector_lr_multiple,
            "projector_weight_decay": projector_weight_decay,
            "peak_lr": peak_lr,
            "move_projector": move_projector,
        },
    )
    momentum = MOMENTUM if momentum is None else momentum
    check_muon(muon_scale, nesterov, momentum)
    check_basis_dtype(ns_dtype, "ns_dtype")
    check_residual(residual, residual_scale, growth_limiter, scale)
    if residual_scale is not None:
        check_number("residual_scale", residual_scale)
    check_moments(second_moment, first_moment)
    named_parameters = list(named_parameters)
    trained = trained_parameters(named_parameters)
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    common |= rule_options(OPTIMIZERS[optimizer].rule, optimizer, beta1, beta2, eps)
    for name, param in trained:
        check_dtype(name, param)
    if optimizer == "adam8bit" and any(is_distributed(param) for _, param in trained):
        raise ValueError(
            "optimizer is 'adam8bit', which is bitsandbytes' own and takes whole parameters, and "
            "these are DTensors: choose galore_adamw8bit or adamw, or do not shard the model"
        )
    rounding = {"stochastic_rounding": True, "seed": seed} if stochastic_rounding else {}
    muon = {
        "momentum": momentum, "nesterov": nesterov, "muon_scale": muon_scale, "ns_dtype": ns_dtype,
    }  # fmt: skip
    if OPTIMIZERS[optimizer].rule == "muon":
        common |= {**muon, "second_moment": second_moment, "first_moment": first_moment}
    apart: dict[str, Any] = {} if full_lr is None else {"lr": full_lr}
    if second_moment != "full":
        apart |= {"second_moment": second_moment, "first_moment": first_moment}
    if optimizer in FULL_RANK_OPTIMIZERS:
        given: list[Group] = [{"params": trained}]
        if apart or optimizer == "muon":
            selected, others = split_by_selection(named_parameters, trained, select)
            given = [{"params": selected}, {"params": others, **apart}]
            given[0] |= {"use_muon": True} if optimizer == "muon" else {}
        return _full_rank(optimizer, split_by_decay(given, no_decay), common, rounding)
    common |= rounding

    projected, others = divided(named_parameters, trained, select, rank)
    own_scale = RESIDUALS[residual].scale if residual_scale is None else residual_scale
    lift = RESIDUAL_LIFTS[residual](scale, own_scale or 0.0, growth_limiter)
    options = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "update_proj_every": update_proj_every,
        "scale": scale if lift is None else 1.0,
        "lift": lift,
        "proj_type": proj_type,
        "penalty": penalty,
        "projector_lr_multiple": projector_lr_multiple,
        "projector_weight_decay": projector_weight_decay,
        "peak_lr": peak_lr,
        "move_projector": move_projector,
        "basis_dtype": basis_dtype,
        "transport_moments": transport_moments,
        "seed": seed,
    }
    groups: list[Group] = [{"params": projected, **options}, {"params": others, **apart}]
    groups = split_by_decay([group for group in groups if group["params"]], no_decay)
    match optimizer:
        case "galore_adamw":
            return SubspaceAdamW(groups, **common)
        case "galore_lion":
            return SubspaceLion(groups, **common, lion_sign=lion_sign)
        case "galore_adafactor":
            return SubspaceAdafactor(groups, **common)
        case "galore_adamw8bit":
            return SubspaceAdamW8bit(groups, **common)
        case "osd_muon":
            return SubspaceMuon(groups, **common)
    raise AssertionError(optimizer)


def trained_parameters(
    named_parameters: Iterable[tuple[str, Tensor]],
) -> list[tuple[str, Tensor]]:
    """Those that require a gradient, with their names.

    Raises:
        ValueError: for what is no pair of a name and a parameter, or if none requires a gradient.
    """
    pairs = list(named_parameters)
    for pair in pairs:
        is_pair = isinstance(pair, tuple) and len(pair) == 2
        if not is_pair or not isinstance(pair[0], str) or not isinstance(pair[1], Tensor):
            raise ValueError(
                f"named_parameters has a {type(pair).__name__} in it: expected pairs of a name and "
                "a parameter, such as model.named_parameters()"
            )
    trained = [(name, param) for name, param in pairs if param.requires_grad]
    if pairs and not trained:
        raise ValueError(
            f"none of the {len(pairs)} parameters requires a gradient ({pairs[0][0]!r} first): "
            "call requires_grad_() on those to be trained"
        )
    return trained


def rule_options(
    rule: str, optimizer: str, beta1: float | None, beta2: float | None, eps: float | None
) -> dict[str, Any]:
    """`make_optimizer`'s options of the rule of W as its class takes them."""
    if rule == "adafactor":
        return {"beta1": beta1}
    if rule == "sgd":
        return {}
    second = 0.99 if rule == "lion" else 0.999
    betas = (0.9 if beta1 is None else beta1, second if beta2 is None else beta2)
    if rule == "lion":
        return {"betas": betas}
    default = 1e-6 if optimizer == "galore_adamw" else 1e-8
    return {"betas": betas, "eps": default if eps is None else eps}


def split_by_decay(groups: Sequence[Group], no_decay: Select | None) -> list[Group]:
    """Groups of (name, parameter) pairs, each split in two where some have no weight decay."""
    if no_decay is None:
        return list(groups)
    found = []
    for group in groups:
        pairs, named = group["params"], {name: no_decay(name, x) for name, x in group["params"]}
        parts: tuple[Group, Group] = (
            {**group, "params": [pair for pair in pairs if not named[pair[0]]]},
            {**group, "params": [pair for pair in pairs if named[pair[0]]], "weight_decay": 0.0},
        )
        found += [part for part in parts if part["params"]]
    return found


def divided(
    named: Iterable[tuple[str, Tensor]],
    given: Sequence[tuple[str, Tensor]],
    select: Select | None,
    rank: int,
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(projected, others) of (name, parameter) pairs; says what was chosen and what was left.

    Args:
        named: All of the model.
        given: Those to divide.
        select: (name, parameter) -> whether it is projected. None: by name and shape.
        rank: Of the projected ones.
    """
    named = list(named)
    projected, others = split_by_selection(named, given, select)
    if others and not projected:
        warnings.warn(
            f"none of the {len(others)} parameters is projected ({others[0][0]!r} first): every "
            "one is trained at full rank. select= says which to project",
            stacklevel=3,
        )
    by_us = select is None or isinstance(select, LinearSelection)
    trained = [pair for pair in given if pair[1].requires_grad]
    names, kinds = {name for name, _ in projected}, Kinds(name for name, _ in named)
    say_what_is_projected(trained, names, kinds=kinds, rank=rank, chosen_here=by_us)
    return projected, others


def split_by_selection(
    named: Iterable[tuple[str, Tensor]],
    given: Sequence[tuple[str, Tensor]],
    select: Select | None,
) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """(selected, others) of (name, parameter) pairs; see `divided`."""
    chosen = select or Kinds(name for name, _ in named).selects
    is_chosen = [bool(chosen(*pair)) for pair in given]
    return (
        [pair for pair, yes in zip(given, is_chosen, strict=True) if yes],
        [pair for pair, yes in zip(given, is_chosen, strict=True) if not yes],
    )


def projected_groups(params: ParamsT, rank: int, select: Select | None) -> list[Group]:
    """Parameters or (name, parameter) pairs as groups: the projected ones, and all others.

    Args:
        params: No groups: those say themselves which are projected.
        rank: Of the projected group.
        select: (name, parameter) -> whether it is projected. None: by name as `make_optimizer`
            does; without names every matrix.

    Raises:
        ValueError: for groups.
    """
    given = list(params)
    if any(isinstance(item, dict) for item in given):
        raise ValueError(
            "rank is given, and params are groups: put rank, basis, lift and side into the groups "
            "that are to be projected"
        )
    parts: tuple[list[Any], list[Any]]
    if all(isinstance(item, tuple) for item in given):
        pairs: Any = given
        parts = divided(pairs, pairs, select, rank)
    else:
        chosen = select or (lambda name, param: param.ndim == 2)
        tensors: Any = given
        parts = (
            [param for param in tensors if chosen("", param)],
            [param for param in tensors if not chosen("", param)],
        )
    groups: list[Group] = [{"params": parts[0], "rank": rank}, {"params": parts[1]}]
    return [group for group in groups if group["params"]]


def _full_rank(
    optimizer: str, groups: list[Group], common: dict[str, Any], rounding: dict[str, Any]
) -> torch.optim.Optimizer:
    """`rounding` is for bfloat16, which other libraries' classes do not round stochastically."""
    is_own = any(param.dtype == torch.bfloat16 for group in groups for _, param in group["params"])
    groups = [group for group in groups if group["params"]]
    is_own = is_own or any("second_moment" in group for group in groups)
    match optimizer:
        case "muon":
            return SubspaceMuon(groups, **common, **rounding)
        case "adam" if is_own:
            decay = common.pop("weight_decay")
            l2 = [{"l2": group.pop("weight_decay", decay), **group} for group in groups]
            return FullRankAdam(l2, **common, **rounding)
        case "adamw" if is_own:
            return FullRankAdam(groups, **common, **rounding)
        case "adam":
            return TorchAdam(groups, **common)
        case "adamw":
            return TorchAdamW(groups, **common)
        case "sgd":
            return TorchSGD(groups, **common)
        case "adam8bit":
            return skip_if_not_finite(import_bitsandbytes().optim.Adam8bit(groups, **common))
        case "lion":
            return SubspaceLion(groups, **common, **rounding)
        case "adafactor":
            return SubspaceAdafactor(groups, **common, **rounding)
    raise AssertionError(optimizer)


@torch.compiler.disable(reason="the host decides whether a step is skipped")
def drop_if_not_finite(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """A step's pre-hook: drops all gradients, and counts, if one is not finite."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    present = [p for p in params if p.grad is not None]
    gradients = [p.grad for p in present]
    check_dense(optimizer, gradients)
    if count_if_not_finite(optimizer, gradients):
        for param in present:
            param.grad = None


def skip_if_not_finite(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Makes an optimizer of another library skip, and count, steps with a non-finite gradient.

    What a closure computes inside `step` is not seen.
    """
    optimizer.param_groups[0].setdefault("skipped_steps", (0, 0))
    optimizer.register_step_pre_hook(drop_if_not_finite)
    return optimizer


class _SkipsNonFinite:
    """`skip_if_not_finite` for classes of torch.optim; copies and pickles keep it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        skip_if_not_finite(self)  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        # torch drops the hooks of a copy, and calls this for load_state_dict too.
        hooks = self._optimizer_step_pre_hooks  # type: ignore[attr-defined]
        if drop_if_not_finite not in hooks.values():
            skip_if_not_finite(self)  # type: ignore[arg-type]


class TorchAdam(_SkipsNonFinite, torch.optim.Adam):
    """`torch.optim.Adam`, which skips steps with a non-finite gradient."""


class TorchAdamW(_SkipsNonFinite, torch.optim.AdamW):
    """`torch.optim.AdamW`, which skips steps with a non-finite gradient."""


class TorchSGD(_SkipsNonFinite, torch.optim.SGD):
    """`torch.optim.SGD`, which skips steps with a non-finite gradient."""


def side_of(group: Group) -> Side:
    """The side that a group's P projects, before it is known which is shorter."""
    if group["side"] is not None:
        return group["side"]
    return "shorter" if group["basis"] is not None else PROJECTIONS[group["proj_type"]].side


def check_objects(group: Group) -> None:
    """Raises ValueError for a `basis`, `lift` or `side` that is none."""
    for name, kind, example in (
        ("basis", BasisRule, "online_pca(Adam(), step_size=5e-3)"),
        ("lift", Lift, "scaled(0.25)"),
    ):
        if group[name] is not None and not isinstance(group[name], kind):
            raise ValueError(
                f"{name} is {group[name]!r}: expected None or a {kind.__name__}, such as "
                f"osd_torch.{example}"
            )
    if group["basis"] is not None:
        check_rule(group["basis"])
    for name, options in (("basis", BASIS_OPTIONS), ("lift", ("scale",))):
        for option in options if group[name] is not None else ():
            if group[option] != SUBSPACE_DEFAULTS[option]:
                raise ValueError(
                    f"{option} is {group[option]!r}, and {name} is given, which does not read it: "
                    f"leave it out, or give it to {name_of_rule(group[name])}"
                )
    for name in ("transport_moments", "stochastic_rounding"):
        check_flag(name, group[name])
    if group["side"] is not None:
        check_choice("side", group["side"], SIDES)
    if side_of(group) == "both" and group["basis"] and not group["basis"].two_sided:
        raise ValueError(
            f"side is 'both', and basis is {name_of_rule(group['basis'])}, which moves one basis: "
            "use svd(...) or random(...), or one side"
        )
    if side_of(group) == "both" and group["lift"] and not group["lift"].two_sided:
        raise ValueError(
            f"P is on both sides (side='both', proj_type='full'), and lift is "
            f"{name_of_rule(group['lift'])}, which reads one basis: use one side"
        )


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` is a whole number."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}: expected a whole number")


def check_spelling(group: Group, known: Iterable[str]) -> None:
    """Raises ValueError for a key of a group that is not known, and close to one that is."""
    for key in group.keys() - set(known) - set(SCHEDULER_KEYS):
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"a parameter group has the key {key!r}: did you mean {near[0]!r}?")


def check_beta(name: str, beta: Any) -> None:
    """Raises ValueError unless `beta` is in [0, 1)."""
    if not isinstance(beta, (int, float)) or not 0 <= beta < 1:
        raise ValueError(f"{name} is {beta!r}: expected a number in [0, 1)")


def check_betas(group: Group) -> None:
    """Raises ValueError unless the group's `betas` are two numbers in [0, 1), and its eps one."""
    betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else ()
    if len(betas) != 2 or not all(isinstance(b, (int, float)) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas are {group['betas']!r}: expected two numbers in [0, 1)")
    if "eps" in group:
        check_number("eps", group["eps"])
