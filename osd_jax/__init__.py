"""Online Subspace Descent as composable Optax transformations.

Source: Liang, Liu, Chen and Liu, "Memory-Efficient LLM Training with Online Subspace Descent",
arXiv 2408.12857.
"""

from osd_names import __version__ as __version__
from osd_names import not_installed as _not_installed

try:
    import jax as _jax  # noqa: F401
    import optax as _optax  # noqa: F401
except ModuleNotFoundError as error:
    raise _not_installed("osd_jax", "jax", error) from error

from osd_jax.accumulation import accumulate_sketches
from osd_jax.adam_of_rows import scale_by_adam_of_rows
from osd_jax.aliases import osd_adafactor, osd_adamw, osd_adamw8bit, osd_lion
from osd_jax.bases import gaussian, oja, online_pca, random, svd
from osd_jax.basis_rule import BasisRule, Clock
from osd_jax.diagnostics import projectors
from osd_jax.guard import skipped_steps
from osd_jax.layout import SubspaceDimensionNumbers
from osd_jax.lift import Lift, Lifted, Seen, scaled, sign_after_lift
from osd_jax.muon import osd_muon
from osd_jax.newton_schulz import orthogonalized
from osd_jax.optimizers import make_optimizer
from osd_jax.parts import in_parts
from osd_jax.quantization import quantize_state
from osd_jax.residuals import add_gradient, column_ema, gradient_only, norm_ratio, residual_sign
from osd_jax.selection import select_linear
from osd_jax.sketch import (
    COLUMN_ENERGIES,
    CORRELATION,
    SQUARED_NORM,
    Needs,
    Sketch,
    Statistic,
    TwoSided,
)
from osd_jax.state import SubspaceState
from osd_jax.subspace import scale_by_subspace
from osd_jax.transport import transport_moments

__all__ = [
    "COLUMN_ENERGIES",
    "CORRELATION",
    "SQUARED_NORM",
    "BasisRule",
    "Clock",
    "Lift",
    "Lifted",
    "Needs",
    "Seen",
    "Sketch",
    "Statistic",
    "SubspaceDimensionNumbers",
    "SubspaceState",
    "TwoSided",
    "accumulate_sketches",
    "add_gradient",
    "column_ema",
    "gaussian",
    "gradient_only",
    "in_parts",
    "make_optimizer",
    "norm_ratio",
    "oja",
    "online_pca",
    "orthogonalized",
    "osd_adafactor",
    "osd_adamw",
    "osd_adamw8bit",
    "osd_lion",
    "osd_muon",
    "projectors",
    "quantize_state",
    "random",
    "residual_sign",
    "scale_by_adam_of_rows",
    "scale_by_subspace",
    "scaled",
    "select_linear",
    "sign_after_lift",
    "skipped_steps",
    "svd",
    "transport_moments",
]
