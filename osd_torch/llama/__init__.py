"""Hugging Face's LLaMA and its training: model, weights, partitioning, train step, checkpoints.

This namespace has the names of the model and its weights; `train` and `checkpoint` are separate
modules. Only this package imports transformers and safetensors.
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
    within_documents,
)
from osd_torch.llama.partition import fully_shard_llama
from osd_torch.llama.weights import (
    SHARD_BYTES,
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
    "SHARD_BYTES",
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
    "within_documents",
    "write_safetensors",
]
