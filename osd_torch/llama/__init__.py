"""Hugging Face's LLaMA and what trains it: model, weights, partition, train step, checkpoints.

The names here are those of the model and its weights; `train` and `checkpoint` are modules of their
own. This package alone imports transformers and safetensors.
"""

from osd_torch.llama.model import (
    KINDS,
    LOGITS_BYTES,
    REQUIRED,
    SIZES,
    build,
    compared,
    config_from_dict,
    hf_config,
    is_projected,
    kind,
    load_config,
    loss,
    prepare,
)
from osd_torch.llama.partition import fully_shard_llama
from osd_torch.llama.weights import (
    WEIGHTS,
    hf_tensors,
    load_hf,
    save_hf,
    weight_files,
    write_safetensors,
)

__all__ = [
    "KINDS",
    "LOGITS_BYTES",
    "REQUIRED",
    "SIZES",
    "WEIGHTS",
    "build",
    "compared",
    "config_from_dict",
    "fully_shard_llama",
    "hf_config",
    "hf_tensors",
    "is_projected",
    "kind",
    "load_config",
    "load_hf",
    "loss",
    "prepare",
    "save_hf",
    "weight_files",
    "write_safetensors",
]
