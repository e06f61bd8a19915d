"""Bytes of optimizer state: measured on the arrays' shapes, and by formula.

`python -m parity_tests.test_state_bytes` prints the README's table.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from osd_jax import llama, make_optimizer
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, PROJECTIONS, SUBSPACE_OPTIMIZERS

CONFIGS = Path(__file__).parent.parent / "configs"
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
    """The whole state for a LLaMA, but for a few scalar counters."""
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


def measured_bytes(
    optimizer: str,
    proj_type: str,
    size: str,
    *,
    beta1: bool = False,
    dtype: Any = jnp.float32,
    basis_dtype: Any = None,
) -> int:
    """The bytes of every array in the state; its scalars are a few counters."""
    _, params, numbers = load(size)
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)
    tx = make_optimizer(
        optimizer, proj_type, learning_rate=0.01, rank=RANKS[size],
        beta1=0.9 if beta1 else None, dimension_numbers=numbers, basis_dtype=basis_dtype,
    )  # fmt: skip
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    assert sum(x.dtype.itemsize for x in leaves if x.ndim == 0) <= 64
    return sum(x.size * x.dtype.itemsize for x in leaves if x.ndim > 0)


@pytest.mark.parametrize("optimizer", SUBSPACE_OPTIMIZERS)
@pytest.mark.parametrize("size", RANKS)
def test_subspace_state_has_the_bytes_of_the_formula(size: str, optimizer: str) -> None:
    config = load(size)[0]
    full_rank = measured_bytes("adamw", "std", size)
    for proj_type in PROJ_TYPES:
        for beta1 in (False, True) if optimizer == "galore_adafactor" else (False,):
            measured = measured_bytes(optimizer, proj_type, size, beta1=beta1)
            assert measured == state_bytes(optimizer, proj_type, config, RANKS[size], beta1=beta1)
            if PROJECTIONS[proj_type].side in ("shorter", "both"):
                assert measured < full_rank


@pytest.mark.parametrize("optimizer", FULL_RANK_OPTIMIZERS)
@pytest.mark.parametrize("size", RANKS)
def test_full_rank_state_has_the_bytes_of_the_formula(size: str, optimizer: str) -> None:
    assert measured_bytes(optimizer, "std", size) == state_bytes(optimizer, "std", load(size)[0], 1)


def test_full_rank_adamw_is_two_floats_a_parameter() -> None:
    for size in RANKS:
        assert measured_bytes("adamw", "std", size) == 8 * llama.num_parameters(load(size)[0])


@pytest.mark.parametrize("optimizer", SUBSPACE_OPTIMIZERS)
def test_bfloat16_parameters_have_the_same_state(optimizer: str) -> None:
    sizes = {measured_bytes(optimizer, "continuous", "60m", dtype=t) for t in ("f4", jnp.bfloat16)}
    assert len(sizes) == 1


def test_a_bfloat16_basis_is_half_as_large() -> None:
    """Its optimizer's state stays float32."""
    expected = state_bytes("galore_adamw", "continuous", load("60m")[0], 128, basis_bytes=2)
    measured = measured_bytes("galore_adamw", "continuous", "60m", basis_dtype=jnp.bfloat16)
    assert measured == expected


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


if __name__ == "__main__":
    print(table())
