"""Weight rules and kinds of P that are compared with the oracle."""

from __future__ import annotations

from typing import Any

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("galore_adamw", {}),
    "lion": ("galore_lion", {}),
    "lion, sign in subspace": ("galore_lion", {"lion_sign": "subspace"}),
    "adafactor": ("galore_adafactor", {}),
    "adafactor, beta1": ("galore_adafactor", {"beta1": 0.9}),
    "muon": ("osd_muon", {}),
}
PROJ_TYPES = (
    "std", "reverse_std", "left", "right", "full", "random", "gaussian",
    "continuous", "continuous_lion", "continuous_adafactor", "continuous_sgd",
    "oja",
)  # fmt: skip
