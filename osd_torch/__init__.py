"""Online Subspace Descent as PyTorch optimizers.

Source: Liang, Liu, Chen and Liu, "Memory-Efficient LLM Training with Online Subspace Descent",
arXiv 2408.12857.
"""

from osd_names import __version__ as __version__
from osd_names import not_installed as _not_installed

try:
    import torch as _torch  # noqa: F401
except ModuleNotFoundError as error:
    raise _not_installed("osd_torch", "torch", error) from error

from osd_torch.aliases import (
    OnlineSubspaceDescent,
    SubspaceAdafactor,
    SubspaceAdamW,
    SubspaceAdamW8bit,
    SubspaceLion,
)
from osd_torch.bases import gaussian, oja, online_pca, random, svd
from osd_torch.basis_rule import BasisRule, Clock
from osd_torch.capturable import NotCapturableError
from osd_torch.clipping import clip_
from osd_torch.diagnostics import projectors
from osd_torch.guard import skipped_steps
from osd_torch.layerwise import LayerwiseUpdates
from osd_torch.layout import SubspaceDimensionNumbers
from osd_torch.lift import Lift, Lifted, Seen, scaled, sign_after_lift
from osd_torch.muon import SubspaceMuon
from osd_torch.newton_schulz import orthogonalized
from osd_torch.optimizers import make_optimizer
from osd_torch.residuals import add_gradient, column_ema, gradient_only, norm_ratio, residual_sign
from osd_torch.selection import select_linear
from osd_torch.sharding import data_parallel, mean_over_processes
from osd_torch.sketch import (
    COLUMN_ENERGIES,
    CORRELATION,
    SQUARED_NORM,
    Needs,
    Sketch,
    Statistic,
    TwoSided,
)
from osd_torch.subspace import SubspaceOptimizer

__all__ = [
    "COLUMN_ENERGIES",
    "CORRELATION",
    "SQUARED_NORM",
    "BasisRule",
    "Clock",
    "LayerwiseUpdates",
    "Lift",
    "Lifted",
    "Needs",
    "NotCapturableError",
    "OnlineSubspaceDescent",
    "Seen",
    "Sketch",
    "Statistic",
    "SubspaceAdafactor",
    "SubspaceAdamW",
    "SubspaceAdamW8bit",
    "SubspaceDimensionNumbers",
    "SubspaceLion",
    "SubspaceMuon",
    "SubspaceOptimizer",
    "TwoSided",
    "add_gradient",
    "clip_",
    "column_ema",
    "data_parallel",
    "gaussian",
    "gradient_only",
    "make_optimizer",
    "mean_over_processes",
    "norm_ratio",
    "oja",
    "online_pca",
    "orthogonalized",
    "projectors",
    "random",
    "residual_sign",
    "scaled",
    "select_linear",
    "sign_after_lift",
    "skipped_steps",
    "svd",
]
