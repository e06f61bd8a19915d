"""The published names -> a built optimizer (`make_optimizer`), and the classes behind it.

Each class is a short composition: the rule of W; by its parameter groups' `proj_type` the
projector that moves P; decoupled weight decay.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from osd_torch.blockwise import Adam8bit, import_bitsandbytes
from osd_torch.lift import Lift, scaled, sign_after_lift
from osd_torch.projectors import BasisRule, Order, check_period, online_pca, random, svd
from osd_torch.rules import SGD, Adafactor, Adam, Lion, Rule
from osd_torch.selection import (
    Kinds,
    LinearSelection,
    Select,
    say_what_is_projected,
)
from osd_torch.sharding import is_distributed
from osd_torch.subspace import (
    Group,
    Side,
    SubspaceOptimizer,
    check_basis_dtype,
    check_dense,
    check_dtype,
    check_number,
    check_rank,
    count_if_not_finite,
    log,
    resolve_side,
)

LionSign = Literal["lifted", "subspace"]
MoveProjector = Literal["after", "before"]

SUBSPACE_OPTIMIZERS = ("galore_adamw", "galore_lion", "galore_adafactor", "galore_adamw8bit")
FULL_RANK_OPTIMIZERS = ("adam", "adamw", "lion", "adafactor", "adam8bit", "sgd")
SIDES_BY_PROJ_TYPE: dict[str, Side] = {
    "std": "shorter",
    "reverse_std": "longer",
    "left": "output",
    "right": "input",
    "full": "both",
    "random": "shorter",
    "continuous": "shorter",
    "continuous_adam8bit": "shorter",
    "continuous_lion": "shorter",
    "continuous_adafactor": "shorter",
    "continuous_sgd": "shorter",
}
PROJ_TYPES = tuple(SIDES_BY_PROJ_TYPE)
# The rule that moves P, and its weight decay in the release.
PROJECTOR_RULES: dict[str, tuple[Rule, float]] = {
    "continuous": (Adam(), 0.01),
    "continuous_adam8bit": (Adam8bit(), 0.0),
    "continuous_lion": (Lion(), 0.0),
    "continuous_adafactor": (Adafactor(), 0.0),
    "continuous_sgd": (SGD(), 0.0),
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
    "seed": 0,
}
# The options of a group that say what its basis rule is.
BASIS_OPTIONS = (
    "proj_type", "update_proj_gap", "update_proj_every", "penalty", "projector_weight_decay",
    "move_projector",
)  # fmt: skip
# What a group keeps of the learning rates that it saw; see `seen_rates`.
SEEN = "seen_lr"


class PublishedOptimizer(SubspaceOptimizer):
    """A subspace optimizer whose groups name their projector as the release does.

    A group with `rank` takes these further keys, of which `galore_torch` has the first three:

        update_proj_gap         steps between refreshes for the SVD kinds and `random`; for online
                                PCA, P's step size is 1 / update_proj_gap times lr / peak lr (200)
        scale                   multiplies the lifted update (1.0)
        proj_type               one of `PROJ_TYPES` ("std")
        update_proj_every       online PCA moves P at every so manieth step only (1)
        penalty                 weight of the orthogonality penalty in P's loss (0.0)
        projector_lr_multiple   P's step size as a multiple of lr, in place of the above (None)
        peak_lr                 the peak of lr, which P's step size is relative to; None: a guess
                                (None)
        projector_weight_decay  decoupled weight decay of P; None: the release's, 0.01 for
                                `continuous` and 0 for the others (None)
        move_projector          whether P moves "after" W's step or "before" it ("after")
        basis_dtype             dtype of P; None: float32, float64 for float64 parameters (None)
        transport_moments       carry the moments of R over whenever P changes (False)
        seed                    of `random` (0)

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

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        super().__init__(params, {**SUBSPACE_DEFAULTS, **defaults})

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_spelling(group, self.defaults)
        super().check_group(group)
        check_choice("proj_type", group["proj_type"], PROJ_TYPES)
        check_choice("move_projector", group["move_projector"], get_args(MoveProjector))
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

    def side(self, group: Group, param: Tensor) -> Side:
        """The side of a matrix (output, input) that P projects, by `proj_type`."""
        return resolve_side(SIDES_BY_PROJ_TYPE[group["proj_type"]], param)

    def basis_rule(self, group: Group) -> BasisRule:
        """The rule for P, by `proj_type`."""
        return _basis_rule(*(group[name] for name in BASIS_OPTIONS))

    def lift(self, group: Group) -> Lift:
        """The plain lift, times `scale`."""
        return _scaled(group["scale"])

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group of parameters, projected if it has a `rank`; raises as the class does."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[SEEN] = first_rates(group)

    def observe(self, group: Group) -> None:
        """Guesses the peak of the group's learning rate, where it is read and not given."""
        is_online = group["rank"] is not None and group["proj_type"] in PROJECTOR_RULES
        if not is_online or group["peak_lr"] is not None or group["projector_lr_multiple"]:
            return
        before, group[SEEN] = group[SEEN], seen_rates(group)
        peak = group[SEEN]["peak"]
        if not self._has_named_peak:
            self._has_named_peak = True
            log.info(
                "P's step size is lr / peak / update_proj_gap; the peak of lr is guessed to be %g. "
                "peak_lr= gives it",
                peak,
            )
        is_same_schedule = all(before[key] == group[SEEN][key] for key in schedule_keys(group))
        is_other = not math.isclose(peak, before["peak"], rel_tol=1e-6)
        if is_same_schedule and is_other and not self._has_mended_peak:
            self._has_mended_peak = True
            log.warning(
                "the peak of lr was guessed to be %g, and is %g by the rates seen so far: P's step "
                "size, lr / peak / update_proj_gap, follows it. peak_lr= gives it",
                before["peak"],
                peak,
            )

    def projector_lr(self, group: Group) -> float:
        """P's step size: the release's, or a multiple of lr as in the paper."""
        lr = float(group["lr"])
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
    if proj_type == "random":
        return random(gap)
    if proj_type not in PROJECTOR_RULES:
        return svd(gap)
    rule, release_decay = PROJECTOR_RULES[proj_type]
    decay = release_decay if weight_decay is None else weight_decay
    return online_pca(rule, penalty=penalty, weight_decay=decay, order=order, every=every)


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
        lr: Learning rate; the peak, if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times lr.

    Raises:
        ValueError: for an option out of range, a dtype that is not float32, bfloat16 or float64,
            or a projected parameter that is not a matrix.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam with the release's eps."""
        return Adam(tuple(group["betas"]), group["eps"], eps_first=True)


class SubspaceLion(PublishedOptimizer):
    """`galore_lion`: Lion on the low-rank gradient; weight decay after the update.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate; the peak, if a schedule changes it.
        betas: Weight of the moment in the direction, and its decay.
        weight_decay: Decoupled, times lr.
        lion_sign: "lifted": the sign is taken after the lift, so that `scale` has no effect (the
            release); "subspace": of the low-rank direction, then lifted (the paper).

    Raises:
        ValueError: as for `SubspaceAdamW`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        lion_sign: LionSign = "lifted",
    ) -> None:
        super().__init__(
            params, dict(lr=lr, betas=betas, weight_decay=weight_decay, lion_sign=lion_sign)
        )

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        check_choice("lion_sign", group["lion_sign"], get_args(LionSign))
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Lion, with its sign here or after the lift."""
        sign_in_subspace = group["rank"] is None or group["lion_sign"] == "subspace"
        return Lion(tuple(group["betas"]), sign=sign_in_subspace)

    def lift(self, group: Group) -> Lift:
        """W <- W - lr * sign(P D), or the plain lift of signs; see `lion_sign`."""
        return super().lift(group) if group["lion_sign"] == "subspace" else _sign_after_lift()


class SubspaceAdafactor(PublishedOptimizer):
    """`galore_adafactor`: Adafactor on the low-rank gradient; weight decay before the update.

    The step size is `lr` as given: neither relative to the step count nor to the parameters.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate; the peak, if a schedule changes it.
        beta1: Decay of the first moment; None: no first moment.
        eps: Added to the squared gradient.
        clip_threshold: The largest root mean square of an update before lr.
        decay_rate: The second moment's decay at step t is `1 - t ** decay_rate`.
        weight_decay: Decoupled, times lr.

    Raises:
        ValueError: as for `SubspaceAdamW`.
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        beta1: float | None = None,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        weight_decay: float = 0.0,
    ) -> None:
        rule = Adafactor(beta1, eps, clip_threshold, decay_rate)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, **dataclasses.asdict(rule)))

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option out of range, naming it and the choices."""
        if group["beta1"] is not None:
            check_beta("beta1", group["beta1"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adafactor with the group's options."""
        return Adafactor(*(group[f.name] for f in dataclasses.fields(Adafactor)))


class SubspaceAdamW8bit(PublishedOptimizer):
    """`galore_adamw8bit`: AdamW with 8-bit moments, by bitsandbytes; weight decay after the update.

    Args:
        params: Parameters, (name, parameter) pairs, or groups; see `PublishedOptimizer`.
        lr: Learning rate; the peak, if a schedule changes it.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times lr.
        min_8bit_size: State of fewer values is kept in float32.

    Raises:
        ValueError: as for `SubspaceAdamW`.
        ImportError: at the first step, if bitsandbytes is not installed.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        min_8bit_size: int = 4096,
    ) -> None:
        rule = Adam8bit(betas, eps, min_8bit_size)
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, **dataclasses.asdict(rule)))

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        super().check_group(group)

    def rule(self, group: Group) -> Adam8bit:
        """Adam with moments in 8 bits."""
        return Adam8bit(tuple(group["betas"]), group["eps"], group["min_8bit_size"])


class FullRankAdam(PublishedOptimizer):
    """`adam` and `adamw` for bfloat16 parameters: as in `torch.optim`, but float32 moments.

    There the moments would be bfloat16, in which `0.999 * v` rounds to v and never decays.

    Args:
        params: Parameters, (name, parameter) pairs, or groups without rank.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled, times lr, before the update.
        l2: Weight decay that is added to the gradient.

    Raises:
        ValueError: as for `SubspaceAdamW`.
    """

    decays_first = True

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l2=l2)
        super().__init__(params, defaults)

    def check_group(self, group: Group) -> None:
        """Raises ValueError for an option out of range, naming it and the choices."""
        check_betas(group)
        check_number("weight_decay", group["l2"])
        super().check_group(group)

    def rule(self, group: Group) -> Rule:
        """Adam."""
        return Adam(tuple(group["betas"]), group["eps"])

    def full_rank_gradient(self, group: Group, param: Tensor) -> Tensor:
        """The gradient with its L2 term."""
        gradient = super().full_rank_gradient(group, param)
        return gradient.add(param, alpha=group["l2"]) if group["l2"] else gradient


def make_optimizer(
    named_parameters: Iterable[tuple[str, Tensor]],
    optimizer: str,
    proj_type: str = "std",
    *,
    lr: float,
    rank: int = 128,
    update_proj_gap: int = 200,
    update_proj_every: int = 1,
    scale: float = 1.0,
    weight_decay: float = 0.0,
    beta1: float | None = None,
    select: Select | None = None,
    seed: int = 0,
    penalty: float = 0.0,
    projector_lr_multiple: float | None = None,
    projector_weight_decay: float | None = None,
    peak_lr: float | None = None,
    lion_sign: LionSign = "lifted",
    move_projector: MoveProjector = "after",
    basis_dtype: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """Builds an optimizer by its published name.

    The defaults are the release's; the paper's (arXiv 2408.12857) are named options: `penalty=0.1`,
    `projector_lr_multiple=5`, `projector_weight_decay=weight_decay`, `lion_sign="subspace"`,
    `scale=1`.

    Args:
        named_parameters: Such as `model.named_parameters()`.
        optimizer: `galore_adamw`, `galore_lion`, `galore_adafactor` or `galore_adamw8bit`: selected
            parameters in a subspace, all else by the same rule at full rank; or `adam`, `adamw`,
            `lion`, `adafactor`, `adam8bit` or `sgd`: everything at full rank.
        proj_type: How P is found and moved: `std`, `reverse_std`, `left`, `right`, `full` (SVD
            every `update_proj_gap` steps), `random` (drawn as often), or online PCA by AdamW
            (`continuous`), `continuous_adam8bit`, `continuous_lion`, `continuous_adafactor`,
            `continuous_sgd`.
        lr: Learning rate; the peak, if a scheduler changes it.
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
        beta1: First moment of `galore_adafactor` and `adafactor`. None: none.
        select: (name, parameter) -> whether it is projected, such as `select_linear(model)`. None:
            the matrices inside numbered blocks, and those with `attn`, `attention` or `mlp` in
            their name, but no embeddings, tables, heads and routers. The log (`osd_torch`) says
            what was chosen and what was left.
        seed: Of `random`.
        penalty: Weight of the orthogonality penalty in P's loss.
        projector_lr_multiple: P's step size as a multiple of lr, in place of `1 / update_proj_gap`.
        projector_weight_decay: Decoupled weight decay of P. None: 0.01 for `continuous`, else 0.
        peak_lr: The peak of lr, which P's step size is relative to. None: guessed, and never below
            an lr that was seen; see `PublishedOptimizer`.
        lion_sign: Whether Lion's sign is taken after the lift, or of the low-rank direction.
        move_projector: Whether P moves after W's step or before it.
        basis_dtype: dtype of P. None: float32 (float64 for float64 parameters).

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
    check_choice("optimizer", optimizer, SUBSPACE_OPTIMIZERS + FULL_RANK_OPTIMIZERS)
    check_choice("proj_type", proj_type, PROJ_TYPES)
    check_choice("lion_sign", lion_sign, get_args(LionSign))
    check_choice("move_projector", move_projector, get_args(MoveProjector))
    check_rank(rank)
    check_period(update_proj_gap)
    check_period(update_proj_every, "update_proj_every")
    check_seed(seed)
    check_number("lr", lr)
    if select is not None and not callable(select):
        raise ValueError(
            f"select is {select!r}: expected a function (name, parameter) -> whether to project it"
        )
    is_online = optimizer in SUBSPACE_OPTIMIZERS and proj_type.startswith("continuous")
    _check_used("beta1", beta1, None, "adafactor" in optimizer, "Adafactor")
    _check_used("lion_sign", lion_sign, "lifted", optimizer == "galore_lion", "galore_lion")
    for name, value, default in (
        ("update_proj_every", update_proj_every, 1),
        ("penalty", penalty, 0.0),
        ("projector_lr_multiple", projector_lr_multiple, None),
        ("projector_weight_decay", projector_weight_decay, None),
        ("peak_lr", peak_lr, None),
        ("move_projector", move_projector, "after"),
    ):
        _check_used(name, value, default, is_online, "online PCA (proj_type continuous...)")
    named_parameters = list(named_parameters)
    trained = trained_parameters(named_parameters)
    common: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
    for name, param in trained:
        check_dtype(name, param)
    if optimizer == "adam8bit" and any(is_distributed(param) for _, param in trained):
        raise ValueError(
            "optimizer is 'adam8bit', which is bitsandbytes' own and takes whole parameters, and "
            "these are DTensors: choose galore_adamw8bit or adamw, or do not shard the model"
        )
    if optimizer in FULL_RANK_OPTIMIZERS:
        return _full_rank(optimizer, trained, common, beta1)

    kinds = Kinds(name for name, _ in named_parameters)
    chosen = select or kinds.selects
    projected = [(name, param) for name, param in trained if chosen(name, param)]
    others = [(name, param) for name, param in trained if not chosen(name, param)]
    if others and not projected:
        warnings.warn(
            f"none of the {len(others)} parameters is projected ({others[0][0]!r} first): every "
            "one is trained at full rank. select= says which to project",
            stacklevel=2,
        )
    by_us = select is None or isinstance(select, LinearSelection)
    names = {name for name, _ in projected}
    say_what_is_projected(trained, names, kinds=kinds, rank=rank, chosen_here=by_us)
    options = {
        "rank": rank,
        "update_proj_gap": update_proj_gap,
        "update_proj_every": update_proj_every,
        "scale": scale,
        "proj_type": proj_type,
        "penalty": penalty,
        "projector_lr_multiple": projector_lr_multiple,
        "projector_weight_decay": projector_weight_decay,
        "peak_lr": peak_lr,
        "move_projector": move_projector,
        "basis_dtype": basis_dtype,
        "seed": seed,
    }
    groups: list[Group] = [{"params": projected, **options}, {"params": others}]
    groups = [group for group in groups if group["params"]]
    match optimizer:
        case "galore_adamw":
            return SubspaceAdamW(groups, **common)
        case "galore_lion":
            return SubspaceLion(groups, **common, lion_sign=lion_sign)
        case "galore_adafactor":
            return SubspaceAdafactor(groups, **common, beta1=beta1)
        case "galore_adamw8bit":
            return SubspaceAdamW8bit(groups, **common)
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


def _full_rank(
    optimizer: str,
    params: list[tuple[str, Tensor]],
    common: dict[str, Any],
    beta1: float | None,
) -> torch.optim.Optimizer:
    is_narrow = any(param.dtype == torch.bfloat16 for _, param in params)
    match optimizer:
        case "adam" if is_narrow:
            return FullRankAdam(params, lr=common["lr"], l2=common["weight_decay"])
        case "adamw" if is_narrow:
            return FullRankAdam(params, **common)
        case "adam":
            return TorchAdam(params, **common)
        case "adamw":
            return TorchAdamW(params, **common)
        case "sgd":
            return TorchSGD(params, **common)
        case "adam8bit":
            return skip_if_not_finite(import_bitsandbytes().optim.Adam8bit(params, **common))
        case "lion":
            return SubspaceLion(params, **common)
        case "adafactor":
            return SubspaceAdafactor(params, **common, beta1=beta1)
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


def _check_used(name: str, value: Any, default: Any, is_used: bool, user: str) -> None:
    """Raises ValueError for an argument that would be silently ignored."""
    if not is_used and value != default:
        raise ValueError(f"{name} is {value!r}: only {user} reads it; leave it out")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")


def check_seed(seed: int) -> None:
    """Raises ValueError unless `seed` is a whole number."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ValueError(f"seed is {seed!r}: expected a whole number")


def check_spelling(group: Group, known: Iterable[str]) -> None:
    """Raises ValueError for a key of a group that is not known, and close to one that is."""
    for key in group.keys() - set(known):
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.8)
        if near:
            raise ValueError(f"a parameter group has the key {key!r}: did you mean {near[0]!r}?")


def check_beta(name: str, beta: float) -> None:
    """Raises ValueError unless `beta` is in [0, 1)."""
    if not 0 <= beta < 1:
        raise ValueError(f"{name} is {beta!r}: expected a number in [0, 1)")


def check_betas(group: Group) -> None:
    """Raises ValueError unless the group's `betas` are two numbers in [0, 1)."""
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are {group['betas']!r}: expected two numbers in [0, 1)")
