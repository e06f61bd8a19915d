"""A LLaMA in Flax NNX and its training: model, weights, partitioning, train steps, checkpoints.

This namespace has the names of the model and its weights. `train`, `layerwise`, `checkpoint` and
`partition` are separate modules. Nothing else in the library imports Orbax or safetensors, or
imports Flax at import time: `select_linear` imports Flax when it is called.
"""

from osd_jax.llama.attention import attend, select_attention
from osd_jax.llama.attention_plain import causal_bias, wide_einsum
from osd_jax.llama.config import LlamaConfig, RopeScaling
from osd_jax.llama.cross_entropy import (
    LOGITS_BYTES,
    MIN_VOCABULARY_SLICE,
    loss,
    loss_of_output,
    num_predicted,
)
from osd_jax.llama.model import (
    Attention,
    Block,
    Llama,
    Mlp,
    Params,
    Tokens,
    dimension_numbers,
    embed,
    forward,
    head_kernel,
    init,
    is_projected,
    layer,
    num_parameters,
    positions,
    rms_norm,
)
from osd_jax.llama.rotary import rotary_angles, rotate, token_positions
from osd_jax.llama.weights import SHARD_BYTES, WEIGHTS, load_hf, save_hf, weight_files

__all__ = [
    "Attention",
    "Block",
    "LOGITS_BYTES",
    "Llama",
    "LlamaConfig",
    "MIN_VOCABULARY_SLICE",
    "Mlp",
    "Params",
    "RopeScaling",
    "Tokens",
    "SHARD_BYTES",
    "WEIGHTS",
    "attend",
    "causal_bias",
    "dimension_numbers",
    "embed",
    "forward",
    "head_kernel",
    "init",
    "is_projected",
    "layer",
    "load_hf",
    "loss",
    "loss_of_output",
    "num_parameters",
    "num_predicted",
    "positions",
    "rms_norm",
    "rotary_angles",
    "rotate",
    "save_hf",
    "select_attention",
    "token_positions",
    "weight_files",
    "wide_einsum",
]
