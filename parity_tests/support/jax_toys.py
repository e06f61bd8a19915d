"""A tiny LLaMA whose optimizer is composed outside osd_jax, and six of its steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import osd_jax
from osd_jax import llama
from osd_jax.guard import guarded
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.train import init_state, make_train_step
from osd_jax.sharding import make_mesh
from osd_jax.trees import path_name

Tree = Any

CONFIG = llama.LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


KINDS = ("attention/query", "mlp/up", "mlp/down")


def is_one_of_its_shape(name: str, x: Any) -> bool:
    """Selects a kernel of each shape: the others would compile the same once more."""
    return llama.is_projected(name, x) and name.endswith(KINDS)


def llama_toy(rule: Any, lift: Any, **more: Any) -> Any:
    """The whole optimizer, composed outside the library."""
    subspace = osd_jax.scale_by_subspace(
        optax.scale_by_adam(), rule, rank=4, lift=lift, widen_updates=True,
        dimension_numbers=llama.dimension_numbers, **more,
    )  # fmt: skip

    def labels(params: Tree) -> Tree:
        of = lambda path, x: "in" if is_one_of_its_shape(path_name(path), x) else "full"
        return jax.tree_util.tree_map_with_path(of, params)

    parts = optax.partition({"in": subspace, "full": optax.scale_by_adam()}, labels)
    return osd_jax.in_parts(guarded(optax.chain(parts, optax.scale(-1e-3))), subspace)


def assert_sketches_are_refused(tx: Any, match: str) -> None:
    """Every mode that frees gradients rejects an optimizer that reads them."""
    refused = pytest.raises(ValueError, match=match)
    with refused:
        osd_jax.accumulate_sketches(tx, 2)
    with refused:
        make_train_step(CONFIG, tx, accumulate="sketches")
    with refused:
        make_train_step(CONFIG, tx, mesh=make_mesh(8), compress_gradients=True)
    layerwise = make_layerwise_train_step(CONFIG, tx)
    with refused:
        llama_run(layerwise, tx, 2)


def llama_run(
    step: Any, tx: Any, micro_batches: int, *, mesh: Any = None, dtype: Any = jnp.float32
) -> tuple[np.ndarray, Tree]:
    """The losses of six steps, and the weights after them."""
    params = jax.tree.map(lambda x: x.astype(dtype), llama.init(CONFIG, 0))
    state, rng, losses = init_state(params, tx, mesh), np.random.default_rng(0), []
    for _ in range(6):
        tokens = rng.integers(0, CONFIG.vocab_size, (micro_batches, 8, 9), np.int32)
        state, metrics = step(state, {"tokens": tokens, "mask": tokens >= 0}, False)
        losses.append(float(metrics["loss"]))
    return np.array(losses), jax.device_get(state.params)
