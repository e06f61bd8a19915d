"""The options of the method: the optimizer of the weights, and the subspace of its gradients.

The names of optimizers, projections and residuals, and what of them reads which option, stand in
`osd_names`.
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
)

SCHEDULERS = ("linear", "cosine", "cosine_restarts")
PER_LAYER = tuple(f"{name}_per_layer" for name in SUBSPACE_OPTIMIZERS)
"""A subspace optimizer and `--per_layer`, in one published name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """The rule of the weights, its rates and how many updates it does."""

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
        help="how the learning rate falls after the warmup: linear to 0, cosine to min_lr_ratio. "
        "cosine_restarts: one cosine over the whole run that starts again from 0 every "
        "cycle_length updates",
    )
    min_lr_ratio: float = flag(
        0.1, low=0, high=1, help="cosine: last learning rate as a part of the peak"
    )
    warmup_steps: int = flag(1000, low=0, help="updates in which the learning rate rises from 0")
    cycle_length: int | None = flag(
        None, low=1, help="cosine_restarts: updates in a cycle (default: a quarter of the run)"
    )
    restart_warmup_steps: int | None = flag(
        None,
        low=1,
        help="cosine_restarts: updates of warmup after a restart (default: a tenth of a cycle)",
    )
    num_training_steps: int = flag(10_000, low=1, type=count, help="updates")
    max_train_tokens: int | None = flag(
        None,
        low=1,
        type=count,
        help="train on this many tokens (100M, 1B) in place of num_training_steps; padding counts",
    )
    weight_decay: float = flag(0.0, low=0, help="weight decay")
    grad_clipping: float = flag(
        0.0, low=0, help="largest norm of the whole gradient; 0 does not clip"
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
        help="decay of the second moment, of Lion's moment (default: 0.999, Lion 0.99)",
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
    nesterov: bool = flag(False, help="Nesterov's form of Muon's momentum")
    muon_scale: str = flag(
        "adamw",
        choices=MUON_SCALES,
        type=str.lower,
        help="factor on Muon's orthogonal update: 0.2 sqrt(max(m, n)), with which AdamW's rates "
        "carry over (adamw), Muon's own sqrt(max(1, m / n)) (muon), or none",
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
        help="Adam's second moment of embedding and head: one number a weight (full), or one a "
        "word (row)",
    )
    first_moment: str = flag(
        "full",
        choices=FIRST_MOMENTS,
        type=str.lower,
        help="with --second_moment row: their first moment, and Muon's momentum, in float32 or in "
        "8 bits",
    )
    no_decay: str | None = flag(
        None,
        metavar="WORDS",
        help="no weight decay for parameters with one of these words in their names, such as "
        "norm,embed,head (default: all have it)",
    )
    stochastic_rounding: bool = flag(
        False,
        help="round weights in bfloat16 up or down at random, so that updates smaller than a "
        "weight's spacing add up; without effect on float32",
    )

    @property
    def base(self) -> str:
        """The optimizer's name without `_per_layer`, which says when it steps and not how."""
        return self.optimizer.removesuffix("_per_layer")

    @property
    def is_projected(self) -> bool:
        """Whether it trains matrices in a subspace."""
        return self.optimizer not in FULL_RANK_OPTIMIZERS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subspace:
    """How gradients are projected, and how the projector moves."""

    rank: int = flag(128, low=1, help="rank of the subspace")
    update_proj_gap: int = flag(
        50,
        low=1,
        help="updates between two new projectors; for continuous kinds the projector's step size "
        "is 1/this",
    )
    update_proj_every: int = flag(
        1,
        low=1,
        help="continuous kinds move the projector at every k-th update only, by a step of the same "
        "size",
    )
    galore_scale: float = flag(1.0, above=0, help="factor on the lifted update")
    proj_type: str = flag(
        "std",
        choices=PROJ_TYPES,
        type=str.lower,
        help="rule that moves the projector: continuous* by online PCA with that optimizer; random "
        "and gaussian by chance; oja by a step of Oja's rule and a QR; the rest by an SVD, of the "
        "shorter side (std), the longer, the left, the right, or both (full)",
    )
    residual: str = flag(
        "none",
        choices=tuple(RESIDUALS),
        type=str.lower,
        help="what of a gradient outside the subspace reaches the weights: norm_ratio (Fira; "
        "norm_ratio_released as its code computes it), column_ema (Alice), gradient_only (APOLLO, "
        "with --proj_type gaussian; gradient_only_matrix is APOLLO-Mini) or sign (FRUGAL)",
    )
    residual_scale: float | None = flag(
        None,
        low=0,
        help="weight of the residual, of column_ema (default: 0.4) and sign (default: 1)",
    )
    growth_limiter: bool = flag(
        True,
        help="norm_ratio and gradient_only: let the residual's norm grow by at most 1%% a step",
    )
    penalty: float = flag(
        0.0, section="paper", low=0, help="orthogonality penalty of online PCA; the paper's is 0.1"
    )
    projector_lr_multiple: float | None = flag(
        None,
        section="paper",
        above=0,
        help="the projector's step size as a multiple of the learning rate; the paper's is 5 "
        "(default: 1 / update_proj_gap, scheduled alike)",
    )
    projector_weight_decay: float | None = flag(
        None,
        section="paper",
        low=0,
        help="weight decay of the projector; the paper's is that of the weights (default: 0.01 for "
        "continuous, else 0)",
    )
    lion_sign: str = flag(
        "lifted",
        section="paper",
        choices=LION_SIGNS,
        help="take Lion's sign of the lifted direction, or inside the subspace as in the paper",
    )
    transport_moments: bool = flag(
        False,
        help="carry the moments over to the new projector whenever it changes, in place of reading "
        "them as they are",
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
    projector_init: str = flag(
        "svd",
        section="jax",
        choices=PROJECTOR_INITS,
        type=str.lower,
        help="how online PCA finds its first projector in the first gradient: its leading singular "
        "vectors, as published, or the range of a random sketch of it, for TPUs, where an SVD "
        "compiles for minutes",
    )
