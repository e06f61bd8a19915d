"""The options of the method: the optimizer of the weights, and the subspace of its gradients.

`osd_names` has the names of optimizers, projections and residuals, and which of them read which
option.
"""

from __future__ import annotations

import dataclasses

from launch.trainer.options.flags import DTYPES, count, dtype_name, flag
from osd_names import (
    FIRST_MOMENTS,
    FULL_RANK_OPTIMIZERS,
    LION_SIGNS,
    MOMENTUM,
    MOVE_PROJECTOR,
    MUON_SCALES,
    PROJ_TYPES,
    PROJECTOR_INITS,
    RESIDUALS,
    SECOND_MOMENTS,
    SUBSPACE_OPTIMIZERS,
    ProjectorInit,
)

SCHEDULERS = ("linear", "cosine", "cosine_restarts")
PER_LAYER = tuple(f"{name}_per_layer" for name in SUBSPACE_OPTIMIZERS)
"""A subspace optimizer and `--per_layer`, in one published name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The weight rule, its learning rates and its number of updates."""

    optimizer: str = flag(
        "adam",
        choices=FULL_RANK_OPTIMIZERS + SUBSPACE_OPTIMIZERS + PER_LAYER,
        type=str.lower,
        help="optimizer of the weights",
    )
    lr: float = flag(0.0001, above=0, help="peak learning rate")
    full_lr: float | None = flag(
        None,
        above=0,
        help="peak learning rate of embedding, head and norms, which are never projected (default: "
        "lr)",
    )
    scheduler: str = flag(
        "cosine",
        choices=SCHEDULERS,
        type=str.lower,
        help="decay of the learning rate after the warmup: linear to 0, cosine to min_lr_ratio. "
        "cosine_restarts: one cosine over the whole run that restarts from 0 every "
        "cycle_length updates",
    )
    min_lr_ratio: float = flag(
        0.1, low=0, high=1, help="cosine: final learning rate as a fraction of the peak"
    )
    warmup_steps: int = flag(1000, low=0, help="updates over which the learning rate rises from 0")
    cycle_length: int | None = flag(
        None, low=1, help="cosine_restarts: updates per cycle (default: a quarter of the run)"
    )
    restart_warmup_steps: int | None = flag(
        None,
        low=1,
        help="cosine_restarts: warmup updates after a restart (default: a tenth of a cycle)",
    )
    num_training_steps: int = flag(10_000, low=1, type=count, help="updates")
    max_train_tokens: int | None = flag(
        None,
        low=1,
        type=count,
        help="train on this many tokens (100M, 1B) instead of num_training_steps; padding counts",
    )
    weight_decay: float = flag(0.0, low=0, help="weight decay")
    grad_clipping: float = flag(
        0.0, low=0, help="maximum norm of the whole gradient; 0 does not clip"
    )
    beta1: float = flag(
        0.0,
        low=0,
        high=0.9999999,
        help="decay of the first moment; 0: 0.9 for Adam and Lion, none for Adafactor",
    )
    beta2: float | None = flag(
        None,
        low=0,
        high=0.9999999,
        help="decay of the second moment, and of Lion's moment (default: 0.999, Lion 0.99)",
    )
    eps: float | None = flag(
        None,
        above=0,
        help="added to the root of Adam's second moment (default: galore_adamw 1e-6, else 1e-8)",
    )
    momentum: float | None = flag(
        None,
        low=0,
        high=0.9999999,
        help=f"decay of Muon's momentum; 0 keeps none (default: {MOMENTUM})",
    )
    nesterov: bool = flag(False, help="use Nesterov momentum in Muon")
    muon_scale: str = flag(
        "adamw",
        choices=MUON_SCALES,
        type=str.lower,
        help="factor on Muon's orthogonal update: 0.2 sqrt(max(m, n)), with which AdamW's "
        "learning rates carry over (adamw), Muon's own sqrt(max(1, m / n)) (muon), or none",
    )
    ns_dtype: str | None = flag(
        None,
        choices=DTYPES,
        type=dtype_name,
        help="dtype of Muon's Newton-Schulz steps (default: float32)",
    )
    second_moment: str = flag(
        "full",
        choices=SECOND_MOMENTS,
        type=str.lower,
        help="Adam's second moment of embedding and head: one number per weight (full), or one "
        "per token (row)",
    )
    first_moment: str = flag(
        "full",
        choices=FIRST_MOMENTS,
        type=str.lower,
        help="with --second_moment row: their first moment, and Muon's momentum, in float32 or "
        "in 8 bits",
    )
    no_decay: str | None = flag(
        None,
        metavar="WORDS",
        help="no weight decay for parameters with one of these words in their names, such as "
        "norm,embed,head (default: all have it)",
    )
    stochastic_rounding: bool = flag(
        False,
        help="round bfloat16 weights up or down at random, so that updates smaller than a "
        "weight's spacing accumulate; no effect on float32",
    )

    @property
    def base(self) -> str:
        """The optimizer's name without `_per_layer`, which only affects when it steps."""
        return self.optimizer.removesuffix("_per_layer")

    @property
    def is_projected(self) -> bool:
        """Whether it trains matrices in a subspace."""
        return self.optimizer not in FULL_RANK_OPTIMIZERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
    """How gradients are projected, and how the projector moves."""

    rank: int = flag(128, low=1, help="rank of the subspace")
    # The default of the libraries is 200, as in the published commands; that of the trainers is the
    # default of the published script, so that a run without the flag is the same.
    update_proj_gap: int = flag(
        50,
        low=1,
        help="updates between two refreshes of the projector; for continuous kinds the "
        "projector's step size is 1/this",
    )
    update_proj_every: int = flag(
        1,
        low=1,
        help="continuous kinds move the projector only every k updates, with the same step size",
    )
    galore_scale: float = flag(1.0, above=0, help="factor on the lifted update")
    proj_type: str = flag(
        "std",
        choices=PROJ_TYPES,
        type=str.lower,
        help="how the projector is set and moved: continuous* by online PCA with that optimizer; "
        "random and gaussian at random; oja by a step of Oja's rule and a QR; the others by "
        "an SVD, of the shorter side (std), the longer, the left, the right, or both (full)",
    )
    residual: str = flag(
        "none",
        choices=tuple(RESIDUALS),
        type=str.lower,
        help="what is added of the gradient outside the subspace: norm_ratio (Fira; "
        "norm_ratio_released as in its code), column_ema (Alice), gradient_only (APOLLO, "
        "with --proj_type gaussian; gradient_only_matrix is APOLLO-Mini) or sign (FRUGAL)",
    )
    residual_scale: float | None = flag(
        None,
        low=0,
        help="weight of the residuals column_ema (default: 0.4) and sign (default: 1)",
    )
    growth_limiter: bool = flag(
        True,
        help="norm_ratio and gradient_only: limit the residual's growth to 1%% per step",
    )
    penalty: float = flag(
        0.0, section="paper", low=0, help="orthogonality penalty of online PCA; 0.1 in the paper"
    )
    projector_lr_multiple: float | None = flag(
        None,
        section="paper",
        above=0,
        help="the projector's step size as a multiple of the learning rate; 5 in the paper "
        "(default: 1 / update_proj_gap, with the same schedule)",
    )
    projector_weight_decay: float | None = flag(
        None,
        section="paper",
        low=0,
        help="weight decay of the projector; that of the weights in the paper (default: 0.01 for "
        "continuous, else 0)",
    )
    lion_sign: str = flag(
        "lifted",
        section="paper",
        choices=LION_SIGNS,
        help="apply Lion's sign to the lifted direction, or inside the subspace as in the paper",
    )
    transport_moments: bool = flag(
        False,
        help="carry the moments over to the new projector when it changes, instead of using them "
        "unchanged",
    )
    move_projector: str = flag(
        "after",
        section="paper",
        choices=MOVE_PROJECTOR,
        help="move the projector after the weights have moved with the old one, or before",
    )
    basis_dtype: str = flag(
        "float32", choices=DTYPES, type=dtype_name, help="dtype of the projector"
    )
    projector_init: ProjectorInit = flag(
        "svd",
        section="jax",
        choices=PROJECTOR_INITS,
        type=str.lower,
        help="how online PCA sets its first projector from the first gradient: its leading "
        "singular vectors, as published, or the range of a random sketch of it, for TPUs, "
        "where an SVD takes minutes to compile",
    )
