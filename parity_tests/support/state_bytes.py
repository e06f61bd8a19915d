"""The bytes of an optimizer's state by formula, and the README's table of them."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax

from osd_jax import llama
from osd_names import PROJECTIONS, SUBSPACE_OPTIMIZERS
from parity_tests.support import CONFIGS

RANKS = {"60m": 128, "1b": 1024}  # of the published runs
Tree = Any


def moment_bytes(a: int, b: int, *, is_8bit: bool) -> int:
    """One moment of an a x b matrix: float32, or a byte each and a float32 for 256 in a row."""
    if is_8bit and a * b >= 4096:
        return a * b + 4 * a * math.ceil(b / 256)
    return 4 * a * b


def rule_bytes(rule: str, a: int, b: int, *, beta1: bool = False) -> int:
    """The state of a rule for an a x b matrix; a vector is 1 x b.

    Args:
        rule: A full-rank optimizer's name, which is also what `galore_*` and `continuous_*` run on
            R and on P.
        a: Rows.
        b: Columns.
        beta1: Whether Adafactor has a first moment.
    """
    match rule:
        case "adam" | "adamw":
            return 2 * moment_bytes(a, b, is_8bit=False)
        case "adam8bit" | "adamw8bit":
            return 2 * moment_bytes(a, b, is_8bit=True)
        case "lion":
            return moment_bytes(a, b, is_8bit=False)
        case "adafactor":
            return 4 * (a + b) + beta1 * moment_bytes(a, b, is_8bit=False)
        case "muon":
            return moment_bytes(a, b, is_8bit=False)
        case "sgd":
            return 0
    raise AssertionError(rule)


def projected_bytes(
    optimizer: str,
    proj_type: str,
    n_in: int,
    n_out: int,
    rank: int,
    *,
    beta1: bool = False,
    basis_bytes: int = 4,
) -> int:
    """The state of an n_in x n_out matrix in a subspace: P, OptimizerW's and OptimizerP's.

    P is p x r and R is r x q, where p is the side that P projects; `full` has two bases and an
    r x r R. The int32 count of the step that set P is one for each matrix.
    """
    r, rule = min(rank, n_in, n_out), optimizer.removeprefix("galore_").removeprefix("osd_")
    side = PROJECTIONS[proj_type].side
    if side == "both":
        return 4 + basis_bytes * (n_in + n_out) * r + rule_bytes(rule, r, r, beta1=beta1)
    if side in ("shorter", "longer"):
        side = "input" if (n_in <= n_out) == (side == "shorter") else "output"
    p, q = (n_in, n_out) if side == "input" else (n_out, n_in)
    p_state = 0  # an SVD's or a random P has no optimizer
    if proj_type.startswith("continuous"):
        p_state = rule_bytes(proj_type.removeprefix("continuous").strip("_") or "adamw", p, r)
    return 4 + basis_bytes * p * r + rule_bytes(rule, r, q, beta1=beta1) + p_state


def state_bytes(
    optimizer: str,
    proj_type: str,
    config: llama.LlamaConfig,
    rank: int,
    *,
    beta1: bool = False,
    basis_bytes: int = 4,
) -> int:
    """The whole state for a LLaMA, except for a few scalar counters."""
    h, f, v, layers = (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_hidden_layers,
    )
    name = optimizer.removeprefix("galore_").removeprefix("osd_")
    rule = functools.partial(rule_bytes, name, beta1=beta1)
    other = functools.partial(rule_bytes, "adamw" if name == "muon" else name, beta1=beta1)
    kernels = [(h, h)] * 4 + [(h, f)] * 2 + [(f, h)]  # query, key, value, output, gate, up, down
    if optimizer in SUBSPACE_OPTIMIZERS:
        kernel = functools.partial(
            projected_bytes, optimizer, proj_type, rank=rank, beta1=beta1, basis_bytes=basis_bytes
        )
    else:
        kernel = rule
    norms = (2 * layers + 1) * other(1, h)
    return layers * sum(kernel(a, b) for a, b in kernels) + other(v, h) + other(h, v) + norms


@functools.cache
def load(size: str) -> tuple[llama.LlamaConfig, Tree, Tree]:
    """A published config, its abstract parameters, and their matrix axes."""
    config = llama.LlamaConfig.load(CONFIGS / f"llama_{size}.json")
    params = jax.eval_shape(lambda: llama.init(config, 0))
    return config, params, llama.dimension_numbers(params)


ROWS = [  # label, optimizer, proj_type, bytes of a number in P
    ("AdamW, full rank", "adamw", "std", 4),
    ("AdamW, GaLore (`std`)", "galore_adamw", "std", 4),
    ("AdamW, online PCA (`continuous`)", "galore_adamw", "continuous", 4),
    ("AdamW, online PCA (`continuous_sgd`)", "galore_adamw", "continuous_sgd", 4),
    ("8-bit Adam, full rank", "adam8bit", "std", 4),
    ("8-bit AdamW, GaLore (`std`)", "galore_adamw8bit", "std", 4),
    ("the same, P in bfloat16", "galore_adamw8bit", "std", 2),
    ("8-bit AdamW, 8-bit online PCA", "galore_adamw8bit", "continuous_adam8bit", 4),
    ("the same, P in bfloat16", "galore_adamw8bit", "continuous_adam8bit", 2),
]  # fmt: skip


def table() -> str:
    """State in MB (10^6 bytes), in Markdown."""
    head = " | ".join(f"LLaMA {size.upper()}, rank {rank}" for size, rank in RANKS.items())
    lines = [f"| optimizer state, MB | {head} |", "|---|" + "---:|" * len(RANKS)]
    for label, optimizer, proj_type, basis_bytes in ROWS:
        sizes = [
            state_bytes(optimizer, proj_type, load(size)[0], rank, basis_bytes=basis_bytes)
            for size, rank in RANKS.items()
        ]
        lines.append(f"| {label} | " + " | ".join(f"{size / 1e6:,.0f}" for size in sizes) + " |")
    return "\n".join(lines)
