"""Code shared by tests in several files; no test imports another test."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
GOLDEN = ROOT / "parity_tests" / "golden"
