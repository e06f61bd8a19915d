"""Sharding of a LLaMA over processes."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from osd_torch.sharding import Model


def fully_shard_llama(
    model: Model, mesh: DeviceMesh | None = None, *, reshard_after_forward: bool = True
) -> Model:
    """Shards a Hugging Face LLaMA over the processes, in place: each decoder layer, then the rest.

    Build the optimizer afterwards: the parameters become DTensors. Gradients are averaged in
    float32.

    Args:
        model: A `LlamaForCausalLM`, or any model with its decoder layers in `model.model.layers`.
        mesh: A one-dimensional mesh; None: all processes.
        reshard_after_forward: Whether a layer's weights are freed after its forward pass and
            gathered again in the backward pass. False sends fewer bytes, and a process holds all
            layers whole during a step.

    Returns:
        The model.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> torch.distributed.init_process_group(
        ...     "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> model = fully_shard_llama(LlamaForCausalLM(config))
        >>> type(model.lm_head.weight).__name__
        'DTensor'
        >>> torch.distributed.destroy_process_group()
    """
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    layers: torch.nn.ModuleList = model.get_submodule("model.layers")  # type: ignore[assignment]
    for module in layers:
        fully_shard(
            module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward
        )
    # The backward pass needs the head at once, so FSDP2 keeps the root's weights by default.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
