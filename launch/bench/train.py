"""The whole train step of `launch.train_jax` and `launch.train_torch`, by method."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from launch.bench import in_jax, in_torch
from launch.bench.contender import GAP, scale_of
from launch.bench.timing import Step, Times, ratios, spread, time_in_rounds
from osd_names import SUBSPACE_OPTIMIZERS

FULL_RANK = "full-rank AdamW"
METHODS: Mapping[str, tuple[str, str]] = {
    "online PCA": ("galore_adamw", "continuous"),
    "GaLore": ("galore_adamw", "std"),
    "osd_muon": ("osd_muon", "continuous"),
    "Muon": ("muon", "std"),
    FULL_RANK: ("adamw", "std"),
    "8-bit online PCA": ("galore_adamw8bit", "continuous_adam8bit"),
    "8-bit GaLore": ("galore_adamw8bit", "std"),
    "8-bit Adam": ("adam8bit", "std"),
}
TIMED = ("online PCA", "GaLore", "osd_muon", "Muon", FULL_RANK)
"""GaLore is timed between its SVDs."""
LR = 1e-3


class Setting(NamedTuple):
    """The model and batch to train.

    Attributes:
        model_config: Path of the model's config.
        batch: Rows per step.
        length: Tokens per row.
        rank: Rank of P.
        device: "cpu" or "cuda".
        dtype: Dtype of the weights.
    """

    model_config: Path
    batch: int
    length: int
    rank: int
    device: str
    dtype: str

    def shape(self) -> dict[str, Any]:
        """The model's shape, with Hugging Face's names."""
        return {"model_type": "llama", **json.loads(self.model_config.read_text(encoding="utf-8"))}

    def tokens(self) -> dict[str, np.ndarray]:
        """One micro-batch, (1, B, S), without padding."""
        size = (1, self.batch, self.length)
        drawn = np.random.default_rng(0).integers(3, self.shape()["vocab_size"], size)
        return {"tokens": drawn.astype(np.int32), "mask": np.ones(size, bool)}


class Contender(NamedTuple):
    """A framework, a method, and whether layers are updated one by one."""

    framework: str
    method: str
    layerwise: bool

    @property
    def name(self) -> str:
        """For example `osd_jax, online PCA, layerwise`."""
        return f"osd_{self.framework}, {self.method}{', layerwise' * self.layerwise}"


CONTENDERS = tuple(
    Contender(framework, method, layerwise)
    for framework in ("torch", "jax")
    for layerwise in (False, True)
    for method in TIMED
    if not layerwise or method not in ("osd_muon", "Muon")
)


def optimizer_options(method: str, rank: int) -> dict[str, Any]:
    """The arguments of both libraries' `make_optimizer`; GaLore's P is set once."""
    optimizer, proj_type = METHODS[method]
    if optimizer not in SUBSPACE_OPTIMIZERS:
        return {}
    gap = GAP if proj_type != "std" else 10**9
    return {"rank": rank, "update_proj_gap": gap, **scale_of(optimizer)}


class TorchRun:
    """A model, its optimizer and their train step.

    Args:
        setting: The model and batch.
        method: One of `METHODS`.
        layerwise: Whether layers are updated one by one.
    """

    def __init__(self, setting: Setting, method: str, layerwise: bool) -> None:
        import torch

        import osd_torch
        from osd_torch import llama
        from osd_torch.llama.train import make_train_step

        config = llama.config_from_dict(setting.shape())
        dtype = getattr(torch, setting.dtype)
        self.model = llama.build(config, seed=0, dtype=dtype, device=setting.device)
        self.optimizer = osd_torch.make_optimizer(
            self.model.named_parameters(), *METHODS[method], lr=LR, select=llama.is_projected,
            **optimizer_options(method, setting.rank),
        )  # fmt: skip
        if isinstance(self.optimizer, osd_torch.SubspaceOptimizer):
            eye = functools.partial(torch.eye, device=setting.device)
            in_torch.after_first_step(self.optimizer, eye)
        self._step = make_train_step(
            self.model, self.optimizer, schedule=lambda step: 1.0, per_layer=layerwise
        )
        self._batch = setting.tokens()

    def __call__(self) -> None:
        """Runs one step and reads its metrics, so that it is complete."""
        self._step(0, self._batch, False)


class JaxRun:
    """The state of a method, and its train steps, which donate it to each other.

    Args:
        setting: The model and batch.
        method: One of `METHODS`.
        shapes_only: Whether to create no arrays; the steps can then be compiled, not run.
    """

    def __init__(self, setting: Setting, method: str, *, shapes_only: bool = False) -> None:
        import jax
        import jax.numpy as jnp

        import osd_jax
        from osd_jax import llama
        from osd_jax.llama.layerwise import make_layerwise_train_step
        from osd_jax.llama.train import init_state, make_train_step

        config = llama.LlamaConfig.from_hf_dict(setting.shape())
        tx = osd_jax.make_optimizer(
            *METHODS[method], learning_rate=LR, select=llama.is_projected,
            dimension_numbers=llama.dimension_numbers, **optimizer_options(method, setting.rank),
        )  # fmt: skip

        def eye(old: Any) -> Any:
            p, r = old.shape[-2:]
            return jnp.broadcast_to(jnp.eye(p, r, dtype=old.dtype), old.shape)

        def start(seed: Any) -> Any:
            params = jax.tree.map(lambda x: x.astype(setting.dtype), llama.init(config, seed))
            state = init_state(params, tx)
            return state._replace(opt_state=in_jax.after_first_step(state.opt_state, eye))

        self.state = jax.eval_shape(start, 0) if shapes_only else jax.jit(start)(0)
        self.batch = setting.tokens()
        self.steps = {
            False: make_train_step(config, tx),
            True: make_layerwise_train_step(config, tx),
        }

    def step(self, layerwise: bool) -> Step:
        """Runs one step and reads its metrics, so that it is complete."""
        import jax

        def one() -> None:
            self.state, metrics = self.steps[layerwise](self.state, self.batch, np.asarray(False))
            jax.block_until_ready(self.state)
            jax.device_get(metrics)

        return one


def steps(setting: Setting, contenders: Iterable[Contender]) -> dict[Contender, Step]:
    """One train step per contender."""
    of_jax = functools.cache(lambda method: JaxRun(setting, method))
    build: Mapping[str, Callable[[Contender], Step]] = {
        "torch": lambda c: TorchRun(setting, c.method, c.layerwise),
        "jax": lambda c: of_jax(c.method).step(c.layerwise),
    }
    return {contender: build[contender.framework](contender) for contender in contenders}


def run(setting: Setting, rounds: int) -> list[dict[str, Any]]:
    """One record per contender: tokens per second, and ratios within rounds."""
    built = {contender.name: step for contender, step in steps(setting, CONTENDERS).items()}
    times = time_in_rounds(built, rounds=rounds, settle=False)
    return records(times, setting.batch * setting.length)


def records(times: Times, tokens: int) -> list[dict[str, Any]]:
    """The times of all contenders as records."""
    found = []
    for contender in CONTENDERS:
        own = times[contender.name]
        other = contender._replace(framework="jax" if contender.framework == "torch" else "torch")
        full_rank = contender._replace(method=FULL_RANK)
        found.append(
            {
                "contender": contender.name,
                **contender._asdict(),
                "tokens_per_second": spread([tokens / x for x in own])._asdict(),
                "of_full_rank": ratios(times[full_rank.name], own)._asdict(),
                "of_plain_full_rank": ratios(
                    times[full_rank._replace(layerwise=False).name], own
                )._asdict(),
                "of_other_framework": ratios(times[other.name], own)._asdict(),
            }
        )
    return found
