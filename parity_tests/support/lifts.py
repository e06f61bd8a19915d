"""The lifts that read the gradient, of either library."""

from __future__ import annotations

from typing import Any


def lifts_of(library: Any, float64: Any) -> dict[str, Any]:
    return {
        "norm_ratio": library.norm_ratio(0.25),
        "norm_ratio, release": library.norm_ratio(0.25, release=True),
        "norm_ratio, free": library.norm_ratio(limiter=False),
        "column_ema": library.column_ema(0.4),
        "gradient_only": library.gradient_only(2.0),
        "gradient_only, matrix": library.gradient_only(128.0, per="matrix", limiter=False),
        "residual_sign": library.residual_sign(0.5, 0.25),
        "muon": library.orthogonalized(library.add_gradient()),
        "muon, float64": library.orthogonalized(
            library.add_gradient(), steps=7, dtype=float64, scale="muon"
        ),
    }
