"""`make_optimizer`: builds an optimizer from the published names.

Each published optimizer is a short composition of public parts: the weight rule, from Optax or
`rules.py`; the projector that moves P; a learning rate; decoupled weight decay.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax

from osd_jax.adam_of_rows import scale_by_adam_of_rows
from osd_jax.composition import (
    WeightRule,
    adafactor_rule,
    adam8bit_rule,
    adamw_rule,
    apart,
    by_selection,
    check_betas,
    composed,
    decay_after,
    decaying,
    descending,
    lion_rule,
    mask_of,
)
from osd_jax.full_rank import full_rank_rule
from osd_jax.guard import guarded
from osd_jax.layout import DimensionNumbers, check_basis_dtype, check_rank
from osd_jax.lift import scaled
from osd_jax.muon import full_rank_muon, muon_rule, scale_by_momentum
from osd_jax.newton_schulz import orthogonalized
from osd_jax.numerics import check_number, check_static
from osd_jax.parts import in_parts
from osd_jax.published import RESIDUAL_LIFTS, published_basis
from osd_jax.quantization import MIN_8BIT_SIZE
from osd_jax.residuals import add_gradient
from osd_jax.rules import Schedule, in_float32
from osd_jax.selection import LinearSelection, Select
from osd_jax.subspace import SubspaceTransformation
from osd_jax.transport import transport_moments as follow_basis
from osd_names import (
    LION_SIGNS,
    MOMENTUM,
    MOVE_PROJECTOR,
    OPTIMIZERS,
    PROJECTIONS,
    PROJECTOR_INITS,
    RESIDUALS,
    FirstMoment,
    LionSign,
    MuonScale,
    Order,
    ProjectorInit,
    SecondMoment,
    check_choice,
    check_flag,
    check_moments,
    check_muon,
    check_names,
    check_read,
    check_residual,
)

# Arguments that determine which computation is built: `static_args` of `optax.inject_hyperparams`.
STATIC_ARGUMENTS = (
    "schedule",
    "rank",
    "update_proj_gap",
    "update_proj_every",
    "no_decay",
    "ns_dtype",
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
    full_lr: jax.typing.ArrayLike | None = None,
    schedule: Schedule | None = None,
    rank: int = 128,
    update_proj_gap: int = 200,
    update_proj_every: int = 1,
    scale: float = 1.0,
    weight_decay: float = 0.0,
    no_decay: Select | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    muon_scale: MuonScale = "adamw",
    ns_dtype: jax.typing.DTypeLike | None = None,
    residual: str = "none",
    residual_scale: float | None = None,
    growth_limiter: bool = True,
    second_moment: SecondMoment = "full",
    first_moment: FirstMoment = "full",
    select: Select | None = None,
    dimension_numbers: DimensionNumbers = None,
    seed: int = 0,
    penalty: float = 0.0,
    projector_lr_multiple: float | None = None,
    projector_weight_decay: float | None = None,
    lion_sign: LionSign = "lifted",
    move_projector: Order = "after",
    basis_dtype: jax.typing.DTypeLike | None = None,
    projector_init: ProjectorInit = "svd",
    slice_size: int | None = None,
    transport_moments: bool = False,
    stochastic_rounding: bool = False,
) -> SubspaceTransformation:
    """Builds an optimizer by its published name.

    The defaults are those of the release; the choices of the paper (arXiv 2408.12857) are options:
    `penalty=0.1`, `projector_lr_multiple=5`, `projector_weight_decay=weight_decay`,
    `lion_sign="subspace"`, `scale=1`.

    Args:
      optimizer: `galore_adamw`, `galore_lion`, `galore_adafactor` or `galore_adamw8bit`: selected
        parameters in a subspace, all others by the same rule at full rank. `osd_muon`: momentum in
        a subspace plus the full gradient, orthogonalized, all others by AdamW (see the function
        `osd_muon`). `adam`, `adamw`, `lion`, `adafactor`, `adam8bit` or `sgd`: everything at full
        rank. `muon`: selected parameters by Muon, all others by AdamW.
      proj_type: How P is set and moved: `std`, `reverse_std`, `left`, `right`, `full` (SVD every
        `update_proj_gap` steps); `random` or `gaussian` (drawn every `update_proj_gap` steps);
        online PCA by AdamW (`continuous`), `continuous_adam8bit`, `continuous_lion`,
        `continuous_adafactor`, `continuous_sgd`; or `oja`, a step of Oja's rule and a QR.
      learning_rate: The peak learning rate.
      full_lr: Learning rate of the parameters that are not selected. None: `learning_rate`.
      schedule: (step, from 0) -> factor on the learning rate and on P's step size. None: 1.
      rank: Number of columns of P; at most min(m, n) are used.
      update_proj_gap: Steps between refreshes for the SVD kinds, `random` and `gaussian`; for
        online PCA, P's step size is `1 / update_proj_gap`.
      update_proj_every: Online PCA moves P only at steps `update_proj_every`, twice that, ... Its
        step size there, on the same schedule as W's, is the same as if P moved at every step. P's
        own step count follows from it, so it should not change within a run.
      scale: Multiplies the lifted update.
      weight_decay: Decoupled, on every parameter: after the update for the subspace optimizers and
        `lion` (before it for Adafactor), before it for `adamw`; for `adam`, L2 on the gradient.
      no_decay: (path, parameter) -> whether it has no weight decay. None: all have weight decay.
      beta1: Decay of the first moment, and of Lion's moment in the direction. None: 0.9, and no
        first moment for Adafactor.
      beta2: Decay of the second moment, and of Lion's moment. None: 0.999, for Lion 0.99.
      eps: Added to the root of Adam's second moment. None: 1e-6 for `galore_adamw`, otherwise 1e-8.
      momentum: Momentum of Muon. None: 0.95; 0: no moment is kept.
      nesterov: Whether to use Nesterov momentum.
      muon_scale: Scale of Muon's update: "adamw", with which AdamW's learning rates carry over,
        "muon" or "none"; see `orthogonalized`.
      ns_dtype: Dtype of Newton-Schulz. None: float32 (float64 for float64 parameters).
      residual: What is added of the gradient outside the subspace: `none`; Fira's `norm_ratio`, or
        `norm_ratio_released` as in its code; Alice's `column_ema`; APOLLO's `gradient_only` (with
        `gaussian`), or APOLLO-Mini's `gradient_only_matrix`; FRUGAL's `sign`. See
        `osd_jax.residuals`. With a residual, Lion's own sign is taken in the subspace.
      residual_scale: Weight of the residuals `column_ema` (None: 0.4) and `sign` (None: 1).
      growth_limiter: Whether `norm_ratio` and `gradient_only` grow by at most 1 % per step.
      second_moment: Second moment of Adam for matrices that are not selected: "full", or "row", one
        number for each entry of the longer axis, so that an embedding has one per token. Stacked
        vectors, such as the norms of all layers, must then be declared in `dimension_numbers`.
      first_moment: With "row": "full", or "8bit"; Muon's momentum is then in 8 bits too.
      select: (path, parameter) -> whether it is projected, such as `select_linear(model)`. None:
        the matrices inside numbered blocks, and those with `attn`, `attention` or `mlp` in their
        path, but no embeddings, tables, heads and routers. The logger `osd_jax` reports the
        selection.
      dimension_numbers: Matrix axes; see `scale_by_subspace`. None: those of `select_linear`,
        otherwise 2-D arrays are (input, output).
      seed: Seed of `random` and `gaussian`, and of stochastic rounding.
      penalty: Weight of the orthogonality penalty in P's loss.
      projector_lr_multiple: P's step size as a multiple of W's, instead of `1 / update_proj_gap`.
      projector_weight_decay: Decoupled weight decay of P. None: 0.01 for `continuous`, otherwise 0.
      lion_sign: Whether Lion's sign is applied after the lift or to the low-rank direction.
      move_projector: Whether P moves after W's step or before it.
      basis_dtype: dtype of P. None: float32 (float64 for float64 parameters).
      projector_init: How online PCA sets its first P: by "svd", or by "qr", for TPUs, where an SVD
        takes minutes to compile.
      slice_size: Number of elements of 8-bit state that a step dequantizes at a time; see
        `osd_jax.quantization.slice_by_slice`. For one device: the first axis of an embedding should
        not be sharded. None: all of them.
      transport_moments: Whether moments in the subspace follow changes of P, as in LDAdam
        (`osd_jax.transport_moments`); not with `galore_adafactor`.
      stochastic_rounding: Computes bfloat16 weights in float32 and rounds them up or down at
        random, so that the expectation is the float32 value: updates smaller than a weight's
        spacing are not lost. The random bits depend on the seed, the parameter's name and the step,
        so a resumed run repeats them. The updates of such weights are float32, which
        `optax.apply_updates` adds and casts (see `osd_jax.rounding`). No effect on float32 and
        float64. Not with `sgd` and `adam8bit`.

    Returns:
      An Optax transformation whose updates are added to the parameters. Its `update` requires
      `params`. A step with any non-finite gradient changes nothing and is counted
      (`skipped_steps`). Its parts `refresh`, `project` and `apply` take the whole trees of
      gradients, states and sketches; a gradient that is not projected is its own sketch.

    `optax.inject_hyperparams(make_optimizer, static_args=osd_jax.optimizers.STATIC_ARGUMENTS)`
    keeps the other numbers in its state.

    Raises:
      ValueError: A name is unknown, an argument is out of range, or the chosen optimizer and
        projector do not read it; the message names the argument and the choices.

    References:
      Liang et al., arXiv 2408.12857, and its released code.

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
        ("no_decay", no_decay),
        ("ns_dtype", ns_dtype),
        ("select", select),
        ("dimension_numbers", dimension_numbers),
        ("basis_dtype", basis_dtype),
        ("slice_size", slice_size),
    ):
        check_static(name, value, STATIC_ARGUMENTS)
    functions = (("schedule", schedule), ("select", select), ("no_decay", no_decay))
    for name, function in functions:
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} is {function!r}: expected a function or None. optax.inject_hyperparams "
                f"calls every function that is not in static_args={STATIC_ARGUMENTS}"
            )
    check_names(optimizer, proj_type)
    check_choice("lion_sign", lion_sign, LION_SIGNS)
    check_choice("move_projector", move_projector, MOVE_PROJECTOR)
    check_choice("projector_init", projector_init, PROJECTOR_INITS)
    if slice_size is not None and (type(slice_size) is not int or slice_size < MIN_8BIT_SIZE):
        raise ValueError(
            f"slice_size is {slice_size!r}: expected None, or a whole number of at least "
            f"{MIN_8BIT_SIZE}"
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
            f"learning_rate is {learning_rate!r}: expected the peak, a number of at least 0; pass "
            "a schedule's factor on it as schedule="
        )
    check_number("learning_rate", learning_rate)
    if full_lr is not None:
        check_number("full_lr", full_lr)
    check_number("scale", scale)
    check_number("weight_decay", weight_decay)
    check_number("penalty", penalty)
    if projector_lr_multiple is not None:
        check_number("projector_lr_multiple", projector_lr_multiple)
    if projector_weight_decay is not None:
        check_number("projector_weight_decay", projector_weight_decay)
    given = {k: x for k, x in (("beta1", beta1), ("beta2", beta2)) if x is not None}
    check_betas("None or a number in [0, 1)", **given)
    if momentum is not None:
        check_betas(momentum=momentum)
    if eps is not None:
        check_number("eps", eps)
    check_basis_dtype(basis_dtype)
    check_flag("transport_moments", transport_moments)
    check_flag("stochastic_rounding", stochastic_rounding)
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
            "move_projector": move_projector,
            "projector_init": projector_init,
        },
    )

    momentum = MOMENTUM if momentum is None else momentum
    check_muon(muon_scale, nesterov, momentum)
    check_basis_dtype(ns_dtype, "ns_dtype")
    check_residual(residual, residual_scale, growth_limiter, scale)
    if residual_scale is not None:
        check_number("residual_scale", residual_scale)
    check_moments(second_moment, first_moment)

    if dimension_numbers is None and isinstance(select, LinearSelection):
        dimension_numbers = select.dimension_numbers
    factor = schedule or (lambda count: 1.0)
    at_rate = lambda peak: lambda count: peak * factor(count)
    lr = at_rate(learning_rate)
    kind, is_projected = OPTIMIZERS[optimizer]
    mask = None if no_decay is None else mask_of(lambda name, x: not no_decay(name, x))
    decay = functools.partial(decaying, weight_decay, mask)
    betas = _betas(kind, beta1, beta2)
    own_eps = 1e-6 if optimizer == "galore_adamw" else 1e-8
    adam = (*betas, own_eps if eps is None else eps)
    by_rows = functools.partial(
        scale_by_adam_of_rows, *adam,
        first_8bit=first_moment == "8bit", dimension_numbers=dimension_numbers,
    )  # fmt: skip
    newton_schulz: dict[str, Any] = {"dtype": ns_dtype, "scale": muon_scale}
    trace = scale_by_momentum(momentum, nesterov, in_8bit=first_moment == "8bit")
    # Parameters that are not selected, with a separate learning rate.
    others_lr = lr if full_lr is None else at_rate(full_lr)

    if not is_projected:
        rounding_seed = seed if stochastic_rounding else None
        full_rank = functools.partial(
            full_rank_rule,
            decay=decay, adam=adam, beta1=beta1, dimension_numbers=dimension_numbers,
            slice_size=slice_size,
        )  # fmt: skip
        if kind == "muon":
            selected = full_rank_muon(lr, decay, trace, dimension_numbers, newton_schulz)
            tx = full_rank("adamw", others_lr, by_rows if second_moment == "row" else None)
            tx = by_selection(selected, tx, select, dimension_numbers)
        elif full_lr is None and second_moment == "full":
            tx = full_rank(kind, lr)
        else:
            others = full_rank(kind, others_lr, by_rows if second_moment == "row" else None)
            tx = by_selection(full_rank(kind, lr), others, select, dimension_numbers)
        return in_parts(guarded(in_float32(tx), rounding_seed=rounding_seed), None)

    own_scale = RESIDUALS[residual].scale if residual_scale is None else residual_scale
    lift = RESIDUAL_LIFTS[residual](scale, own_scale, growth_limiter)
    linear = lift is None or lift.linear

    def rule_at(lr: Any, linear: bool) -> WeightRule:
        if kind == "adamw":
            return adamw_rule(lr, *adam, linear=linear)
        if kind == "adam8bit":
            return adam8bit_rule(lr, *adam, slice_size=slice_size, linear=linear)
        if kind == "lion":
            return lion_rule(lr, *betas, sign="subspace" if lift else lion_sign)
        return adafactor_rule(lr, beta1, linear=linear)

    if kind == "muon":
        rule = muon_rule(
            lr, others_lr, decay, orthogonalized(add_gradient(), **newton_schulz),
            trace=trace,
            adam=by_rows() if second_moment == "row" else optax.scale_by_adam(*adam),
        )  # fmt: skip
    elif full_lr is None and second_moment == "full":
        rule = rule_at(lr, linear)
    else:
        others_rule = rule_at(others_lr, True)
        if second_moment == "row":
            others_rule = WeightRule(descending(by_rows(), others_lr), decay_after(others_lr))
        rule = apart(rule_at(lr, linear), others_rule, decay)

    def projector_step_size(count: Any) -> Any:
        step = update_proj_every * (count + 1)  # step of W after `count` steps of P's optimizer
        if projector_lr_multiple is None:
            return factor(step) / update_proj_gap
        return projector_lr_multiple * lr(step)

    rounding: Any = "nearest" if kind == "muon" else "table"
    projector = published_basis(
        proj_type,
        gap=update_proj_gap,
        every=update_proj_every,
        step_size=projector_step_size,
        weight_decay=projector_weight_decay,
        penalty=penalty,
        order=move_projector,
        init=projector_init,
    )
    return composed(
        rule,
        projector,
        rank=rank,
        lift=lift or rule.lift or scaled(scale),
        decay=decay,
        side=PROJECTIONS[proj_type].side,
        select=select,
        dimension_numbers=dimension_numbers,
        seed=seed,
        basis_dtype=basis_dtype,
        transport=follow_basis(*betas, rounding=rounding) if transport_moments else None,
        stochastic_rounding=stochastic_rounding,
    )


def _betas(kind: str, beta1: Any, beta2: Any) -> tuple[Any, Any]:
    """The decays of a rule's moments, with the rule's defaults for None."""
    second = 0.99 if kind == "lion" else 0.999
    return 0.9 if beta1 is None else beta1, second if beta2 is None else beta2
