"""Parts of the model alone, forward and backward: where the two frameworks' train steps differ.

The attention and the MLP of one layer, without the products of attention's four kernels, and the
single head with its loss. Inputs are random, with the shapes of the train step. JAX's head computes
its logits in slices, and recomputes them in the backward pass, if all of them would exceed
`osd_jax.llama.LOGITS_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from launch.bench.timing import Spread, Step, spread, time_in_rounds
from launch.bench.train import Setting

PARTS = ("attention of a layer", "MLP of a layer", "head and loss")


def run(setting: Setting, rounds: int) -> dict[str, dict[str, Spread]]:
    """Seconds forward and backward, by part and framework."""
    inputs = arrays(setting)
    built = {
        f"{part}, {framework}": step
        for framework, build in (("torch", of_torch), ("jax", of_jax))
        for part, step in zip(PARTS, build(setting, *inputs), strict=True)
    }
    times = time_in_rounds(built, rounds=rounds)
    return {
        part: {framework: spread(times[f"{part}, {framework}"]) for framework in ("torch", "jax")}
        for part in PARTS
    }


def arrays(setting: Setting) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """The inputs of each part, float32: (query, key, value), (x, up, gate, down), (x, head)."""
    shape, rows, length = setting.shape(), setting.batch, setting.length
    heads, hidden, inner = (
        shape[name] for name in ("num_attention_heads", "hidden_size", "intermediate_size")
    )
    generator = np.random.default_rng(0)

    def draw(*size: int) -> np.ndarray:
        return generator.standard_normal(size, np.float32)

    kernel = lambda *size: np.float32(0.02) * draw(*size)
    x = draw(rows * length, hidden)
    qkv = [draw(rows, length, heads, hidden // heads) for _ in range(3)]
    mlp = [x, kernel(hidden, inner), kernel(hidden, inner), kernel(inner, hidden)]
    return qkv, mlp, [x, kernel(hidden, shape["vocab_size"])]


def of_torch(setting: Setting, *inputs: list[np.ndarray]) -> list[Step]:
    """As in Hugging Face's LLaMA."""
    import torch
    from torch.nn import functional

    labels = torch.from_numpy(setting.tokens()["tokens"]).flatten().long().to(setting.device)

    def attention(query: Any, key: Any, value: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum()

    def mlp(x: Any, up: Any, gate: Any, down: Any) -> Any:
        return ((functional.silu(x @ gate) * (x @ up)) @ down).sum()

    def loss(x: Any, head: Any) -> Any:
        return functional.cross_entropy((x @ head).float(), labels)

    def step(part: Callable[..., Any], given: list[np.ndarray]) -> Step:
        put = lambda x: torch.tensor(x, dtype=getattr(torch, setting.dtype), device=setting.device)
        tensors = [put(x).requires_grad_() for x in given]

        def one() -> None:
            for x in tensors:
                x.grad = None
            part(*tensors).backward()
            if setting.device == "cuda":
                torch.cuda.synchronize()

        return one

    parts: list[Callable[..., Any]] = [attention, mlp, loss]
    return [step(part, x) for part, x in zip(parts, inputs, strict=True)]


def of_jax(setting: Setting, *inputs: list[np.ndarray]) -> list[Step]:
    """As in `osd_jax.llama`."""
    import jax
    import jax.numpy as jnp

    from osd_jax import llama

    shape = {**setting.shape(), "tie_word_embeddings": False}
    config = llama.LlamaConfig.from_hf_dict(shape)
    tokens = setting.tokens()["tokens"][0]

    def attention(query: Any, key: Any, value: Any) -> Any:
        return llama.attend(query, key, value).sum()

    def mlp(x: Any, up: Any, gate: Any, down: Any) -> Any:
        return ((jax.nn.silu(x @ gate) * (x @ up)) @ down).sum()

    def loss(x: Any, head: Any) -> Any:
        params = {"norm": jnp.ones(config.hidden_size), "head": head}
        rows = x.reshape(*tokens.shape, config.hidden_size)
        return llama.loss_of_output(params, config, rows, tokens)[0]

    def step(part: Callable[..., Any], given: list[np.ndarray]) -> Step:
        tensors = [jnp.asarray(x, setting.dtype) for x in given]
        gradient = jax.jit(jax.value_and_grad(part, tuple(range(len(tensors)))))
        return lambda: jax.block_until_ready(gradient(*tensors))

    parts: list[Callable[..., Any]] = [attention, mlp, loss]
    return [step(part, x) for part, x in zip(parts, inputs, strict=True)]
