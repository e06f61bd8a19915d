"""Transformations around a subspace: weight decay, scale, the rule of unprojected parameters."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from osd_jax.bases import online_pca
from osd_jax.basis_rule import BasisRule
from osd_jax.diagnostics import projected_paths
from osd_jax.guard import guarded
from osd_jax.layout import DimensionNumbers, dimension_numbers_by_path
from osd_jax.lift import Lift, scaled, sign_after_lift
from osd_jax.numerics import check_number, check_object, check_static, known_zero
from osd_jax.parts import in_parts
from osd_jax.quantization import Rounding, quantize_state, slice_by_slice
from osd_jax.rules import (
    correct_adam_bias,
    decay_after_update,
    decay_before_update,
    in_float32,
    interpolate_momentum,
    on_matrices,
    scale_by_adafactor,
    scale_by_adam_of_age,
    scale_by_adam_uncorrected_eps,
    scale_by_raw_adam,
)
from osd_jax.selection import Kinds, LinearSelection, Select, say_what_is_projected
from osd_jax.subspace import SubspaceTransformation, scale_by_subspace
from osd_jax.transport import Transport
from osd_jax.transport import transport_moments as follow_basis
from osd_jax.trees import boxed_like, by_path, path_of, paths_by_name, unboxed
from osd_names import Side, check_flag


def check_betas(expected: str = "a number in [0, 1)", **betas: Any) -> None:
    """Raises ValueError unless each is a number in [0, 1) or an array, which may be traced."""
    for name, beta in betas.items():
        is_plain = isinstance(beta, (int, float, np.floating))
        if not isinstance(beta, jax.Array) and not (is_plain and 0 <= beta < 1):
            raise ValueError(f"{name} is {beta!r}: expected {expected}")


AfterLift = Callable[[optax.GradientTransformation], optax.GradientTransformation]
# (weight decay after or before the update, the learning rate) -> decay transformation
Decay = Callable[[Callable[..., optax.GradientTransformation], Any], optax.GradientTransformation]


def decaying(
    weight_decay: Any,
    mask: Any,
    kind: Callable[..., optax.GradientTransformation],
    learning_rate: Any,
) -> optax.GradientTransformation:
    """Weight decay of the given kind, for the parameters in the mask."""
    tx = kind(weight_decay, learning_rate)
    return tx if mask is None or known_zero(weight_decay) else optax.masked(tx, mask)


def composed(
    rule: WeightRule,
    basis: BasisRule,
    *,
    rank: int,
    lift: Lift,
    decay: Decay,
    side: Side,
    select: Select | None,
    dimension_numbers: DimensionNumbers,
    seed: int,
    basis_dtype: jax.typing.DTypeLike | None,
    transport: Transport | None,
    stochastic_rounding: bool,
) -> SubspaceTransformation:
    """A weight rule in a subspace for selected parameters, and at full rank for all others."""
    subspace = scale_by_subspace(
        rule.low_rank,
        basis,
        rank=rank,
        lift=lift,
        transport=transport,
        side=side,
        dimension_numbers=dimension_numbers,
        seed=seed,
        basis_dtype=basis_dtype,
        widen_updates=True,
    )
    labels = _labels(select, dimension_numbers)
    full_rank = rule.full_rank or rule.low_rank
    if rule.reads_matrices:
        full_rank = on_matrices(full_rank, dimension_numbers)
    if rule.after_full_rank:  # outside the folding to matrices: masks read the parameters' shapes
        full_rank = rule.after_full_rank(full_rank)
    if rule.after_full_rank or not rule.reads_matrices:
        full_rank = in_float32(full_rank)
    projected = rule.after_lift(subspace) if rule.after_lift else subspace
    transforms = {"subspace": projected, "full": full_rank}
    tx = optax.chain(optax.partition(transforms, labels), rule.finish(decay))
    announce = _announcer(select, dimension_numbers, rank)
    rounding_seed = seed if stochastic_rounding else None
    return in_parts(guarded(tx, announce, rounding_seed=rounding_seed), subspace)


class WeightRule(NamedTuple):
    """A weight rule: its part inside the subspace, the lift, and the transformations after it.

    Attributes:
      low_rank: The rule for R.
      finish: (what decays) -> the transformation that follows, for all parameters.
      reads_matrices: Whether it reads its last two axes as a matrix; it then runs in float32.
      lift: None: the scaled lift.
      full_rank: The rule of unprojected parameters. None: `low_rank`.
      after_lift: (the subspace's transformation) -> the same with transformations that apply only
        to projected parameters. None: nothing.
      after_full_rank: The same for `full_rank`.
    """

    low_rank: optax.GradientTransformation
    finish: Callable[[Decay], optax.GradientTransformation]
    reads_matrices: bool = False
    lift: Lift | None = None
    full_rank: optax.GradientTransformation | None = None
    after_lift: AfterLift | None = None
    after_full_rank: AfterLift | None = None


def descending(tx: optax.GradientTransformation, lr: Any) -> optax.GradientTransformation:
    """A rule followed by its learning rate."""
    # Applied to the low-rank direction if possible: a pass over R's shape instead of W's.
    return optax.chain(tx, optax.scale_by_learning_rate(lr))


def decay_after(lr: Any) -> Callable[[Decay], optax.GradientTransformation]:
    """Weight decay after the rule, multiplied by the learning rate."""
    return lambda decay: decay(decay_after_update, lr)


def adamw_rule(
    lr: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-6, *, linear: bool = True
) -> WeightRule:
    """AdamW; epsilon is added before bias correction, as in the release.

    With a lift that is not linear, bias correction and learning rate follow the lift.
    """
    if linear:
        tx = scale_by_adam_uncorrected_eps(b1, b2, eps)
        return WeightRule(descending(tx, lr), decay_after(lr))
    correct, descend = correct_adam_bias(b1, b2), optax.scale_by_learning_rate(lr)
    finish = lambda decay: optax.chain(correct, descend, decay_after(lr)(decay))
    return WeightRule(scale_by_raw_adam(b1, b2, eps), finish)


def apart(own: WeightRule, others: WeightRule, decay: Decay) -> WeightRule:
    """A rule that uses another rule for the unprojected parameters.

    Args:
      own: The rule of projected parameters.
      others: The rule of all other parameters.
      decay: What decays.
    """
    after_lift = own.after_lift or (lambda subspace: subspace)
    return own._replace(
        finish=lambda decay: optax.identity(),
        full_rank=others.full_rank or others.low_rank,
        after_full_rank=lambda rest: optax.chain(rest, others.finish(decay)),
        after_lift=lambda subspace: optax.chain(after_lift(subspace), own.finish(decay)),
    )


def adam8bit_rule(
    lr: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-8,
    *,
    slice_size: int | None = None,
    linear: bool = True,
) -> WeightRule:
    """AdamW with 8-bit moments; with a lift that is not linear, the learning rate follows it."""
    tx = in_8bit(optax.scale_by_adam(b1, b2, eps), slice_size)
    if linear:
        return WeightRule(descending(tx, lr), decay_after(lr), reads_matrices=True)
    descend = optax.scale_by_learning_rate(lr)
    finish = lambda decay: optax.chain(descend, decay_after(lr)(decay))
    return WeightRule(tx, finish, reads_matrices=True)


def lion_rule(lr: Any, b1: Any = 0.9, b2: Any = 0.99, *, sign: str = "lifted") -> WeightRule:
    """Lion, with its sign applied after the lift or to the low-rank direction."""
    descend, lion = optax.scale_by_learning_rate(lr), optax.scale_by_lion(b1, b2)
    if sign == "subspace":
        # Signs are exact in any dtype of P; multiplied by the learning rate they are not.
        finish = lambda decay: optax.chain(descend, decay_after(lr)(decay))
        return WeightRule(lion, finish)
    # The identity replaces the sign of earlier versions: checkpoints keep their structure.
    finish = lambda decay: optax.chain(optax.identity(), descend, decay_after(lr)(decay))
    low_rank = interpolate_momentum(b1, b2)
    return WeightRule(low_rank, finish, lift=sign_after_lift(), full_rank=lion)


def adafactor_rule(lr: Any, beta1: Any = None, *, linear: bool = True) -> WeightRule:
    """Adafactor, with weight decay before the update.

    The learning rate is applied inside, because the first moment averages scaled updates. With a
    lift that is not linear it follows the lift, and the first moment in the subspace averages
    unscaled updates.
    """
    schedule = lr if callable(lr) else lambda count: lr
    tx = in_float32(scale_by_adafactor(schedule, beta1))
    finish = lambda decay: optax.chain(optax.scale(-1.0), decay(decay_before_update, lr))
    if linear:
        return WeightRule(tx, finish, reads_matrices=True)
    times_lr = optax.scale_by_learning_rate(lr, flip_sign=False)
    return WeightRule(
        in_float32(scale_by_adafactor(lambda count: 1.0, beta1)),
        finish,
        reads_matrices=True,
        full_rank=tx,
        after_lift=lambda subspace: optax.chain(subspace, times_lr),
    )


def by_selection(
    selected: optax.GradientTransformation,
    others: optax.GradientTransformation,
    select: Select | None,
    dimension_numbers: DimensionNumbers,
) -> optax.GradientTransformation:
    """Applies one transformation to the selected parameters and another to all others."""
    labels = _labels(select, dimension_numbers)
    return optax.partition({"subspace": selected, "full": others}, labels)


def in_8bit(
    tx: optax.GradientTransformation, slice_size: int | None = None
) -> optax.GradientTransformation:
    """`tx` in float32 with 8-bit state, dequantized `slice_size` numbers at a time."""
    tx = in_float32(quantize_state(tx))
    return tx if slice_size is None else slice_by_slice(tx, slice_size)


def _labels(
    select: Select | None, dimension_numbers: DimensionNumbers
) -> Callable[[optax.Params], optax.Params]:
    def labels(params: optax.Params) -> optax.Params:
        bare = unboxed(params)
        chosen = select or _kinds(bare, dimension_numbers).selects
        label = lambda name, x: "subspace" if chosen(name, x) else "full"
        return boxed_like(params, _by_name(label, bare))

    return labels


def mask_of(select: Select) -> Callable[[optax.Params], Any]:
    """(parameters) -> a tree like them of booleans: whether each is selected."""
    chosen = lambda name, x: bool(select(name, x))
    return lambda params: boxed_like(params, _by_name(chosen, unboxed(params)))


def _by_name(function: Callable[[str, Any], Any], tree: Any) -> Any:
    """A tree like `tree` with the results of a function of each leaf's name and value."""
    name_of = {path_of(path): name for name, path in paths_by_name(tree).items()}
    one = lambda path, x: function(name_of[path_of(path)], x)
    return jax.tree_util.tree_map_with_path(one, tree)


def _kinds(
    params: optax.Params, dimension_numbers: DimensionNumbers, some_have_none: bool = False
) -> Kinds:
    numbers = dimension_numbers_by_path(dimension_numbers, params, some_have_none=some_have_none)
    paths = paths_by_name(params)
    return Kinds(paths, lambda name: numbers(paths[name]))


def _announcer(
    select: Select | None, dimension_numbers: DimensionNumbers, rank: int
) -> Callable[[optax.Params, optax.OptState], None]:
    """(parameters, state) -> None: logs once which parameters are projected."""
    by_us = select is None or isinstance(select, LinearSelection)
    said: list[dict[str, tuple[int, ...]]] = []

    def announce(params: optax.Params, state: optax.OptState) -> None:
        arrays, is_projected = by_path(unboxed(params)), set(map(path_of, projected_paths(state)))
        paths = {name: path_of(path) for name, path in paths_by_name(params).items()}
        shapes = {name: tuple(arrays[path].shape) for name, path in paths.items()}
        projected = [name for name, path in paths.items() if path in is_projected]
        if shapes and not projected:
            first = next(iter(shapes))
            warnings.warn(
                f"none of the {len(shapes)} parameters is projected (the first is {first!r}): all "
                "are trained at full rank. Select the parameters to project with select=, and "
                "give the matrix axes of those that are not 2-D in dimension_numbers=",
                stacklevel=3,
            )
        if shapes not in said:
            said.append(shapes)
            # The matrix axes of parameters that the user's selection excludes are not checked.
            kinds = _kinds(params, dimension_numbers, some_have_none=select is not None)
            say_what_is_projected(shapes, projected, kinds=kinds, rank=rank, chosen_here=by_us)

    return announce


ScalarOrSchedule = jax.typing.ArrayLike | Callable[[Any], Any]
Mask = Any | Callable[[optax.Params], Any] | None

# Arguments that determine which computation is built: `static_args` of `optax.inject_hyperparams`.
STATIC_ARGUMENTS = (
    "rank",
    "mask",
    "basis",
    "lift",
    "side",
    "select",
    "dimension_numbers",
    "transport_moments",
    "stochastic_rounding",
    "basis_dtype",
    "seed",
)


class Subspace(NamedTuple):
    """Arguments that all optimizers here share; see `osd_adamw`."""

    rank: int
    weight_decay: Any
    mask: Mask
    basis: BasisRule | None
    lift: Lift | None
    side: Side
    select: Select | None
    dimension_numbers: DimensionNumbers
    stochastic_rounding: bool
    basis_dtype: Any
    seed: int


def in_subspace(
    rule: WeightRule, shared: Subspace, transport: Transport | None
) -> SubspaceTransformation:
    """`composed`, with the defaults of the optimizers in `aliases` and `muon`.

    Raises:
      ValueError: An argument has the wrong type.
    """
    if shared.basis is not None:
        check_object("basis", shared.basis, BasisRule, "online_pca(optax.adam(5e-3))", "None or a")
    if shared.lift is not None:
        check_object("lift", shared.lift, Lift, "scaled(0.25)", "None or a")
    check_flag("stochastic_rounding", shared.stochastic_rounding)
    select, numbers = shared.select, shared.dimension_numbers
    if select is not None and not callable(select):
        raise ValueError(
            f"select is {select!r}: expected None or a function (path, parameter) -> bool"
        )
    if numbers is None and isinstance(select, LinearSelection):
        numbers = select.dimension_numbers
    by_adam = optax.chain(scale_by_adam_of_age(), optax.scale(-5e-3))
    return composed(
        rule,
        shared.basis or online_pca(by_adam),
        rank=shared.rank,
        lift=shared.lift or rule.lift or scaled(1.0),
        decay=functools.partial(decaying, shared.weight_decay, shared.mask),
        side=shared.side,
        select=select,
        dimension_numbers=numbers,
        seed=shared.seed,
        basis_dtype=shared.basis_dtype,
        transport=transport,
        stochastic_rounding=shared.stochastic_rounding,
    )


def following(
    transport_moments: Any, b1: Any, b2: Any, rounding: Rounding = "table"
) -> Transport | None:
    """The transport of Adam's, Lion's or Muon's moments to a new P, if requested."""
    check_flag("transport_moments", transport_moments)
    return follow_basis(b1, b2, rounding=rounding) if transport_moments else None


def is_linear(lift: Any) -> bool:
    """Whether the learning rate can be applied before the lift; for None the optimizer decides."""
    return lift is None or (isinstance(lift, Lift) and lift.linear)


def check_rates(learning_rate: Any, weight_decay: Any, rank: Any, **numbers: Any) -> None:
    """Raises ValueError for a negative number, or an array where a plain number is required."""
    check_static("rank", rank, STATIC_ARGUMENTS)
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate)
    for name, value in {"weight_decay": weight_decay, **numbers}.items():
        check_number(name, value)
