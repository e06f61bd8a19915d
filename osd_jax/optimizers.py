"""The published names -> a built optimizer (`make_optimizer`).

Each published optimizer is a short composition of public pieces: the rule of W, from Optax or
`rules.py`; the projector that moves P; a learning rate; decoupled weight decay.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.blockwise import MIN_SIZE, quantize_state, slice_by_slice
from osd_jax.lift import Lift, scaled, sign_after_lift
from osd_jax.numerics import check_number, check_static, known_zero
from osd_jax.projectors import ORDERS as MOVE_PROJECTOR
from osd_jax.projectors import PROJECTOR_INITS, BasisRule, online_pca, random, svd
from osd_jax.rules import (
    Schedule,
    clip_by_matrix_rms,
    decay_after_update,
    decay_before_update,
    in_float32,
    interpolate_momentum,
    on_matrices,
    scale_by_adafactor,
    scale_by_adam_uncorrected_eps,
    scale_by_factored_second_moment,
)
from osd_jax.selection import Kinds, LinearSelection, Select, say_what_is_projected
from osd_jax.sketch import as_leaves, bare
from osd_jax.subspace import (
    DimensionNumbers,
    Side,
    SubspaceDimensionNumbers,
    SubspaceTransformation,
    all_finite,
    check_basis_dtype,
    check_dtype,
    check_rank,
    dimension_numbers_by_path,
    in_parts,
    projected_paths,
    scale_by_subspace,
)
from osd_jax.transport import transport_moments as follow_basis
from osd_jax.trees import (
    boxed_like,
    by_path,
    flatten,
    path_name,
    path_of,
    paths_by_name,
    promotes,
    takes_shapes,
    unboxed,
)

LION_SIGNS = ("lifted", "subspace")

SUBSPACE_OPTIMIZERS = ("galore_adamw", "galore_lion", "galore_adafactor", "galore_adamw8bit")
FULL_RANK_OPTIMIZERS = ("adam", "adamw", "lion", "adafactor", "adam8bit", "sgd")
SIDES_BY_PROJ_TYPE: dict[str, Side] = {
    "std": "shorter",
    "reverse_std": "longer",
    "left": "output",  # of PyTorch's (output, input) weights
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

# What decides which computation is built: `static_args` of `optax.inject_hyperparams`.
STATIC_ARGUMENTS = (
    "schedule",
    "rank",
    "update_proj_gap",
    "update_proj_every",
    "select",
    "dimension_numbers",
    "basis_dtype",
    "slice_size",
)


def make_optimizer(
    optimizer: str,
    proj_type: str = "std",
    *,
    learning_rate: jax.typing.ArrayLike,
    schedule: Schedule | None = None,
    rank: int = 128,
    update_proj_gap: int = 200,
    update_proj_every: int = 1,
    scale: float = 1.0,
    weight_decay: float = 0.0,
    beta1: float | None = None,
    select: Select | None = None,
    dimension_numbers: DimensionNumbers = None,
    seed: int = 0,
    penalty: float = 0.0,
    projector_lr_multiple: float | None = None,
    projector_weight_decay: float | None = None,
    lion_sign: str = "lifted",
    move_projector: str = "after",
    basis_dtype: jax.typing.DTypeLike | None = None,
    projector_init: str = "svd",
    slice_size: int | None = None,
    transport_moments: bool = False,
) -> SubspaceTransformation:
    """Builds an optimizer by its published name.

    The defaults are the release's; the paper's (arXiv 2408.12857) are named options: `penalty=0.1`,
    `projector_lr_multiple=5`, `projector_weight_decay=weight_decay`, `lion_sign="subspace"`,
    `scale=1`.

    Args:
      optimizer: `galore_adamw`, `galore_lion`, `galore_adafactor` or `galore_adamw8bit`: selected
        parameters in a subspace, all else by the same rule at full rank; or `adam`, `adamw`,
        `lion`, `adafactor`, `adam8bit` or `sgd`: everything at full rank.
      proj_type: How P is found and moved: `std`, `reverse_std`, `left`, `right`, `full` (SVD every
        `update_proj_gap` steps), `random` (drawn as often), or online PCA by AdamW (`continuous`),
        `continuous_adam8bit`, `continuous_lion`, `continuous_adafactor`, `continuous_sgd`.
      learning_rate: The peak.
      schedule: (step, from 0) -> factor on the learning rate and on P's step size. None: 1.
      rank: Columns of P; at most min(m, n) are used.
      update_proj_gap: Steps between refreshes for the SVD kinds and `random`; for online PCA, P's
        step size is `1 / update_proj_gap`.
      update_proj_every: Online PCA moves P at steps `update_proj_every`, twice that, ... only; its
        step size then, on the same schedule as W's, is that of a step where it moves at all of
        them. P's own count of steps follows from it, so it should not change within a run.
      scale: Multiplies the lifted update.
      weight_decay: Decoupled, on every parameter: after the update for the subspace optimizers and
        `lion` (before it for Adafactor), before it for `adamw`; for `adam`, L2 on the gradient.
      beta1: First moment of `galore_adafactor`. None: none.
      select: (path, parameter) -> whether it is projected, such as `select_linear(model)`. None:
        the matrices inside numbered blocks, and those with `attn`, `attention` or `mlp` in their
        path, but no embeddings, tables, heads and routers. The log (`osd_jax`) says what was chosen
        and what was left.
      dimension_numbers: Matrix axes; see `scale_by_subspace`. None: those that `select_linear`
        knows, or else 2-D arrays are (input, output).
      seed: Of `random`.
      penalty: Weight of the orthogonality penalty in P's loss.
      projector_lr_multiple: P's step size as a multiple of W's, in place of `1 / update_proj_gap`.
      projector_weight_decay: Decoupled weight decay of P. None: 0.01 for `continuous`, else 0.
      lion_sign: Whether Lion's sign is taken after the lift, or of the low-rank direction.
      move_projector: Whether P moves after W's step or before it.
      basis_dtype: dtype of P. None: float32 (float64 for float64 parameters).
      projector_init: How online PCA finds its first P: by "svd", or by "qr", for TPUs, where an SVD
        compiles for minutes.
      slice_size: Numbers of an array in 8-bit state that a step reads back at once; see
        `osd_jax.blockwise.slice_by_slice`. For one device: an embedding's first axis should not be
        sharded. None: all of them.
      transport_moments: Whether moments in the subspace follow P where it changes, as LDAdam's do
        (`osd_jax.transport_moments`); not with `galore_adafactor`.

    Returns:
      An Optax transformation whose updates are added to the parameters. It needs `params` in
      `update`. A step with any non-finite gradient changes nothing and is counted
      (`skipped_steps`). Its parts `refresh`, `project` and `apply` take the whole trees of
      gradients, states and sketches; a gradient that is not projected is its own sketch.

    `optax.inject_hyperparams(make_optimizer, static_args=osd_jax.optimizers.STATIC_ARGUMENTS)`
    holds the other numbers in its state.

    Raises:
      ValueError: for an unknown name, an argument out of range, or one that the optimizer and
        projector chosen do not read, naming it and the choices.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> params = {"mlp": {"kernel": jnp.ones((16, 24))}, "norm": jnp.ones(16)}
      >>> tx = osd_jax.make_optimizer(
      ...     "galore_adamw", "continuous", learning_rate=0.01, rank=4, update_proj_gap=200)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> list(osd_jax.projectors(state))
      ['mlp/kernel']
    """
    for name, value in (
        ("schedule", schedule),
        ("rank", rank),
        ("update_proj_gap", update_proj_gap),
        ("update_proj_every", update_proj_every),
        ("select", select),
        ("dimension_numbers", dimension_numbers),
        ("basis_dtype", basis_dtype),
        ("slice_size", slice_size),
    ):
        check_static(name, value, STATIC_ARGUMENTS)
    for name, function in (("schedule", schedule), ("select", select)):
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} is {function!r}: expected a function or None. optax.inject_hyperparams "
                f"calls every function, except for static_args={STATIC_ARGUMENTS}"
            )
    _check_choice("optimizer", optimizer, SUBSPACE_OPTIMIZERS + FULL_RANK_OPTIMIZERS)
    _check_choice("proj_type", proj_type, PROJ_TYPES)
    _check_choice("lion_sign", lion_sign, LION_SIGNS)
    _check_choice("move_projector", move_projector, MOVE_PROJECTOR)
    _check_choice("projector_init", projector_init, PROJECTOR_INITS)
    if slice_size is not None and (type(slice_size) is not int or slice_size < MIN_SIZE):
        raise ValueError(
            f"slice_size is {slice_size!r}: expected None, or a whole number of at least {MIN_SIZE}"
        )
    check_rank(rank)
    for name, period in (
        ("update_proj_gap", update_proj_gap),
        ("update_proj_every", update_proj_every),
    ):
        if type(period) is not int or period < 1:
            raise ValueError(f"{name} is {period!r}: expected a whole number of at least 1")
    if callable(learning_rate):
        raise ValueError(
            f"learning_rate is {learning_rate!r}: expected the peak, a number of at least 0; a "
            "schedule's factor on it goes to schedule="
        )
    check_number("learning_rate", learning_rate)
    check_number("scale", scale)
    check_number("weight_decay", weight_decay)
    check_number("penalty", penalty)
    if projector_lr_multiple is not None:
        check_number("projector_lr_multiple", projector_lr_multiple)
    if projector_weight_decay is not None:
        check_number("projector_weight_decay", projector_weight_decay)
    if beta1 is not None:
        check_number("beta1", beta1)
    if isinstance(beta1, (int, float)) and not beta1 < 1:
        raise ValueError(f"beta1 is {beta1!r}: expected None or a number in [0, 1)")
    check_basis_dtype(basis_dtype)
    if not isinstance(transport_moments, bool):
        raise ValueError(f"transport_moments is {transport_moments!r}: expected True or False")
    if transport_moments and optimizer == "galore_adafactor":
        raise ValueError(
            "transport_moments is True, and galore_adafactor keeps means of its second moment's "
            "rows and columns, which do not say what it is in a new basis: leave it out, or use "
            "another optimizer"
        )
    _check_used(
        "transport_moments",
        transport_moments,
        False,
        optimizer in SUBSPACE_OPTIMIZERS,
        "a subspace optimizer (galore_...)",
    )
    is_online = optimizer in SUBSPACE_OPTIMIZERS and proj_type.startswith("continuous")
    _check_used("beta1", beta1, None, "adafactor" in optimizer, "Adafactor")
    _check_used("lion_sign", lion_sign, "lifted", optimizer == "galore_lion", "galore_lion")
    for name, value, default in (
        ("update_proj_every", update_proj_every, 1),
        ("penalty", penalty, 0.0),
        ("projector_lr_multiple", projector_lr_multiple, None),
        ("projector_weight_decay", projector_weight_decay, None),
        ("move_projector", move_projector, "after"),
        ("projector_init", projector_init, "svd"),
    ):
        _check_used(name, value, default, is_online, "online PCA (proj_type continuous...)")

    if dimension_numbers is None and isinstance(select, LinearSelection):
        dimension_numbers = select.dimension_numbers
    factor = schedule or (lambda count: 1.0)
    lr = lambda count: learning_rate * factor(count)
    as_matrices = lambda tx: on_matrices(tx, dimension_numbers)

    if optimizer in FULL_RANK_OPTIMIZERS:
        tx = _full_rank(optimizer, lr, weight_decay, beta1, as_matrices, slice_size)
        return in_parts(guarded(in_float32(tx)), None)

    rule = _subspace_rule(optimizer, lr, beta1, lion_sign, slice_size)

    def projector_step_size(count: Any) -> Any:
        step = update_proj_every * (count + 1)  # of W, where OptimizerP has taken `count` steps
        if projector_lr_multiple is None:
            return factor(step) / update_proj_gap
        return projector_lr_multiple * lr(step)

    projector = _projector(
        proj_type,
        gap=update_proj_gap,
        every=update_proj_every,
        step_size=projector_step_size,
        weight_decay=projector_weight_decay,
        penalty=penalty,
        move=move_projector,
        init=projector_init,
    )
    subspace = scale_by_subspace(
        rule.low_rank,
        projector,
        rank=rank,
        lift=rule.lift or scaled(scale),
        transport=follow_basis() if transport_moments else None,
        side=SIDES_BY_PROJ_TYPE[proj_type],
        dimension_numbers=dimension_numbers,
        seed=seed,
        basis_dtype=basis_dtype,
        widen_updates=True,
    )
    labels = _labels(select, dimension_numbers)
    full_rank = (as_matrices if rule.reads_matrices else in_float32)(
        rule.full_rank or rule.low_rank
    )
    transforms = {"subspace": subspace, "full": full_rank}
    tx = optax.chain(optax.partition(transforms, labels), rule.finish(weight_decay))
    return in_parts(guarded(tx, _announcer(select, dimension_numbers, rank)), subspace)


class _Rule(NamedTuple):
    """A rule of W: its half inside the subspace, the lift, and what follows it.

    Attributes:
      low_rank: Of R.
      finish: (weight decay) -> what follows, for all parameters.
      reads_matrices: Whether it reads its last two axes as a matrix; it then runs in float32 by
        itself.
      lift: None: the scaled one.
      full_rank: Of parameters that are not projected, with a state as that of `low_rank`. None:
        `low_rank`.
    """

    low_rank: optax.GradientTransformation
    finish: Callable[[float], optax.GradientTransformation]
    reads_matrices: bool = False
    lift: Lift | None = None
    full_rank: optax.GradientTransformation | None = None


def _subspace_rule(
    optimizer: str, lr: Schedule, beta1: float | None, lion_sign: str, slice_size: int | None
) -> _Rule:
    # Of the low-rank direction where it can be: a pass over R's shape, and not one over W's.
    descend = optax.scale_by_learning_rate(lr)
    descending = lambda rule: optax.chain(rule, descend)
    decay_after = lambda decay: decay_after_update(decay, lr)
    match optimizer:
        case "galore_adamw":
            return _Rule(descending(scale_by_adam_uncorrected_eps()), decay_after)
        case "galore_adamw8bit":
            rule = descending(_scale_by_adam_8bit(slice_size))
            return _Rule(rule, decay_after, reads_matrices=True)
        case "galore_lion" if lion_sign == "subspace":
            # Signs are exact in any dtype of P; times the learning rate they are not.
            finish = lambda decay: optax.chain(descend, decay_after(decay))
            return _Rule(optax.scale_by_lion(), finish)
        case "galore_lion":
            # The identity has the place that the sign once had here, and has in checkpoints.
            finish = lambda decay: optax.chain(optax.identity(), descend, decay_after(decay))
            return _Rule(
                interpolate_momentum(),
                finish,
                lift=sign_after_lift(),
                full_rank=optax.scale_by_lion(),
            )
        case "galore_adafactor":
            # The learning rate is inside, since the first moment averages scaled updates.
            decay_before = lambda decay: optax.chain(
                optax.scale(-1.0), decay_before_update(decay, lr)
            )
            rule = in_float32(scale_by_adafactor(lr, beta1))
            return _Rule(rule, decay_before, reads_matrices=True)
    raise AssertionError(optimizer)


def _scale_by_adam_8bit(slice_size: int | None) -> optax.GradientTransformation:
    tx = in_float32(quantize_state(optax.scale_by_adam()))
    return tx if slice_size is None else slice_by_slice(tx, slice_size)


def _full_rank(
    optimizer: str,
    lr: Schedule,
    weight_decay: float,
    beta1: float | None,
    as_matrices: Callable[[optax.GradientTransformation], optax.GradientTransformation],
    slice_size: int | None,
) -> optax.GradientTransformation:
    descend = optax.scale_by_learning_rate(lr)
    l2 = optax.identity() if known_zero(weight_decay) else optax.add_decayed_weights(weight_decay)
    match optimizer:
        case "adam":  # torch.optim.Adam: L2 on the gradient
            return optax.chain(l2, optax.scale_by_adam(), descend)
        case "adamw":  # torch.optim.AdamW: decoupled, before the update
            return optax.chain(optax.scale_by_adam(), l2, descend)
        case "lion":
            return optax.chain(optax.scale_by_lion(), descend, decay_after_update(weight_decay, lr))
        case "adafactor":
            rule = as_matrices(scale_by_adafactor(lr, beta1))
            return optax.chain(rule, optax.scale(-1.0), decay_before_update(weight_decay, lr))
        case "adam8bit":  # bitsandbytes' Adam8bit: weight decay is decoupled
            return optax.chain(as_matrices(_scale_by_adam_8bit(slice_size)), l2, descend)
        case "sgd":
            return optax.chain(l2, descend)
    raise AssertionError(optimizer)


def _projector(
    proj_type: str,
    *,
    gap: int,
    every: int,
    step_size: Schedule,
    weight_decay: float | None,
    penalty: float,
    move: str,
    init: str,
) -> BasisRule:
    if not proj_type.startswith("continuous"):
        return random(gap) if proj_type == "random" else svd(gap)
    rules: dict[str, tuple[Callable[[], optax.GradientTransformation], float]] = {
        "continuous": (optax.scale_by_adam, 0.01),
        "continuous_adam8bit": (lambda: _scale_by_adam_8bit(None), 0.0),
        "continuous_lion": (optax.scale_by_lion, 0.0),
        "continuous_adafactor": (
            lambda: optax.chain(scale_by_factored_second_moment(), clip_by_matrix_rms()),
            0.0,
        ),
        "continuous_sgd": (optax.identity, 0.0),
    }
    rule, release_decay = rules[proj_type]
    decay = release_decay if weight_decay is None else weight_decay
    optimizer = optax.chain(
        rule(),
        optax.identity() if known_zero(decay) else optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(step_size),
    )
    return online_pca(
        optimizer, penalty=penalty, init=init, moves_first=move == "before", every=every
    )


def skipped_steps(opt_state: optax.OptState) -> tuple[jax.Array, jax.Array]:
    """(total, in a row): the steps that a non-finite gradient made `make_optimizer`'s skip."""
    is_guard = lambda x: isinstance(x, optax.ApplyIfFiniteState)
    for leaf in jax.tree.leaves(unboxed(opt_state), is_leaf=is_guard):
        if is_guard(leaf):
            return leaf.total_notfinite, leaf.notfinite_count
    raise ValueError("this optimizer state counts no skipped steps: it is not make_optimizer's")


def _labels(
    select: Select | None, dimension_numbers: DimensionNumbers
) -> Callable[[optax.Params], optax.Params]:
    def labels(params: optax.Params) -> optax.Params:
        bare = unboxed(params)
        chosen = select or _kinds(bare, dimension_numbers).selects
        name_of = {path_of(path): name for name, path in paths_by_name(bare).items()}
        label = lambda path, x: "subspace" if chosen(name_of[path_of(path)], x) else "full"
        return boxed_like(params, jax.tree_util.tree_map_with_path(label, bare))

    return labels


def _kinds(
    params: optax.Params, dimension_numbers: DimensionNumbers, some_have_none: bool = False
) -> Kinds:
    numbers = dimension_numbers_by_path(dimension_numbers, params)
    paths = paths_by_name(params)

    def numbers_of(name: str) -> SubspaceDimensionNumbers | None:
        with contextlib.suppress(ValueError) if some_have_none else contextlib.nullcontext():
            return numbers(paths[name])
        return None

    return Kinds(paths, numbers_of)


def _announcer(
    select: Select | None, dimension_numbers: DimensionNumbers, rank: int
) -> Callable[[optax.Params, optax.OptState], None]:
    """(parameters, state) -> None: logs what is projected, once for the same parameters."""
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
                f"none of the {len(shapes)} parameters is projected ({first!r} first): every one "
                "is trained at full rank. select= says which to project, dimension_numbers= what "
                "the matrices are of those that are not 2-D",
                stacklevel=3,
            )
        if shapes not in said:
            said.append(shapes)
            # The axes of what the user's own selection leaves are nobody's concern.
            kinds = _kinds(params, dimension_numbers, some_have_none=select is not None)
            say_what_is_projected(shapes, projected, kinds=kinds, rank=rank, chosen_here=by_us)

    return announce


def guarded(
    tx: optax.GradientTransformation,
    announce: Callable[[optax.Params, optax.OptState], None] = lambda params, state: None,
) -> optax.GradientTransformationExtraArgs:
    """Checks dtypes, rounds the updates once at the end, and skips non-finite gradients.

    As `optax.apply_if_finite`, which takes whole gradients only; this takes sketches too, so that
    a composition with `osd_jax.in_parts` around it trains by sketches. `skipped_steps` counts.

    Args:
      tx: The optimizer.
      announce: Tells what is projected, from the parameters and the state.

    Example:
      >>> import jax.numpy as jnp, optax, osd_jax
      >>> from osd_jax.optimizers import guarded
      >>> subspace = osd_jax.scale_by_subspace(optax.scale_by_adam(), osd_jax.svd(200), rank=4)
      >>> chained = optax.chain(subspace, optax.scale_by_learning_rate(0.1))
      >>> tx = osd_jax.in_parts(guarded(chained), subspace)
      >>> params = {"kernel": jnp.ones((16, 24))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.full((16, 24), jnp.nan)}, state, params)
      >>> int(osd_jax.skipped_steps(state)[0])
      1
    """
    tx = optax.with_extra_args_support(tx)

    @takes_shapes
    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        leaves = flatten(unboxed(params))
        for path, x in leaves:
            check_dtype(path_name(path), x)
        state = tx.init(params)
        announce(params, state)
        zero = lambda: jnp.zeros([], jnp.int32)  # two arrays: a state may be donated
        return optax.ApplyIfFiniteState(zero(), jnp.array(True), zero(), state)

    @promotes
    def update(
        grads: optax.Updates,
        state: optax.ApplyIfFiniteState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        def step(grads: optax.Updates, inner: optax.OptState) -> Any:
            updates, inner = tx.update(as_leaves(like, grads), inner, params, **extra_args)
            return jax.tree.map(lambda u, like: u.astype(like.dtype), updates, like), inner

        def skip(grads: optax.Updates, inner: optax.OptState) -> Any:
            return jax.tree.map(lambda like: jnp.zeros_like(like, like.dtype), like), inner

        # As `optax.apply_if_finite`, but for how finite gradients are told, which takes less time.
        like, grads = grads, bare(grads)
        finite = all_finite(grads)
        updates, inner = jax.lax.cond(finite, step, skip, grads, state.inner_state)
        one_more = optax.safe_increment
        return updates, optax.ApplyIfFiniteState(
            notfinite_count=jnp.where(finite, 0, one_more(state.notfinite_count)),
            last_finite=finite,
            total_notfinite=jnp.where(
                finite, state.total_notfinite, one_more(state.total_notfinite)
            ),
            inner_state=inner,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _check_used(name: str, value: Any, default: Any, is_used: bool, user: str) -> None:
    """Raises ValueError for an argument that would be silently ignored."""
    if not is_used and isinstance(value, (str, int, float)) and value != default:
        raise ValueError(f"{name} is {value!r}: only {user} reads it; leave it out")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
