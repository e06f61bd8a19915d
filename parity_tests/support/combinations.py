"""Weight rules and kinds of P that are compared with the oracle."""

from __future__ import annotations

from typing import Any

from osd_names import PROJECTIONS

RULES: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("galore_adamw", {}),
    "lion": ("galore_lion", {}),
    "lion, sign in subspace": ("galore_lion", {"lion_sign": "subspace"}),
    "adafactor": ("galore_adafactor", {}),
    "adafactor, beta1": ("galore_adafactor", {"beta1": 0.9}),
    "muon": ("osd_muon", {}),
}
# The oracle has no 8-bit state.
PROJ_TYPES = tuple(kind for kind in PROJECTIONS if kind != "continuous_adam8bit")
