"""Train steps of a small LLaMA on one device or on a mesh, with the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from osd_jax import llama
from osd_jax.llama.partition import batch_sharding
from osd_jax.llama.train import TrainState, init_state


class MeshRun(NamedTuple):
    """A run: the metrics of each step as floats, the last state, and the compiled step."""

    metrics: list[dict[str, float]]
    state: TrainState
    compiled: Any

    @property
    def losses(self) -> np.ndarray:
        """The loss of each step."""
        return np.array([metrics["loss"] for metrics in self.metrics])


def train(
    config: llama.LlamaConfig,
    tx: Any,
    step: Any,
    mesh: Mesh | None,
    shape: tuple[int, int, int],
    measures: Sequence[bool],
    shard_over_data: bool = False,
    layerwise: bool = False,
) -> MeshRun:
    """Compiles a train step and takes one step for each entry of `measures`.

    Args:
        config: The model's shape; its weights are those of seed 0.
        tx: The optimizer.
        step: From `make_train_step` or `make_layerwise_train_step`, for `mesh`.
        mesh: From `make_mesh`; None: one device.
        shape: Of a batch, (micro-batches, rows, length); about a tenth of it is masked.
        measures: Whether each step measures the subspace.
        shard_over_data: As for `step`.
        layerwise: Whether `step` is from `make_layerwise_train_step`.
    """
    state = init_state(llama.init(config, 0), tx, mesh, shard_over_data, layerwise)
    found, compiled = [], None
    rng = np.random.default_rng(0)
    for measure in measures:
        batch = {
            "tokens": rng.integers(0, config.vocab_size, shape, np.int32),
            "mask": rng.random(shape) > 0.1,
        }
        where = jax.devices()[0] if mesh is None else batch_sharding(mesh)
        args = (state, jax.device_put(batch, where), jax.numpy.array(measure))
        # One layout in and out: a step never compiles again.
        compiled = compiled or step.lower(*args).compile()
        state, metrics = compiled(*args)
        found.append(jax.tree.map(float, metrics))
    return MeshRun(found, state, compiled)
