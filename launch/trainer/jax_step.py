"""JAX: builds the optimizer and the train step from the options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launch.trainer import keywords
from launch.trainer.cli import user_errors
from launch.trainer.options import Options

if TYPE_CHECKING:
    import optax
    from jax.sharding import Mesh

    from osd_jax.llama import LlamaConfig
    from osd_jax.llama.train import TrainStep
    from osd_jax.rules import Schedule

# Elements of an 8-bit array that a layer-by-layer step dequantizes at once: a sixteenth of the 7B
# model's embedding, the largest array there.
SLICE_SIZE = 2**23


def refuse_torch_only(options: Options) -> None:
    """Rejects options that only the PyTorch trainer has, with the reason.

    Raises:
        UsageError: Such an option is given.
    """
    reasons = {
        "compile": "JAX always compiles",
        "timeout_minutes": "JAX has its own limit, in launch/trainer/jax_processes.py",
    }
    options.refuse(reasons, "launch.train_torch")


def attention_on(backend: str, options: Options, config: LlamaConfig) -> str:
    """The implementation of attention that the options select on a backend.

    Args:
        backend: As from `jax.default_backend`.
        options: Checked options.
        config: The model's shape.

    Raises:
        UsageError: The backend cannot run it.
    """
    from osd_jax import llama

    with user_errors("attention"):
        return llama.select_attention(
            options.model.attention,
            backend,
            length=options.data.max_length,
            head_dim=config.head_dim,
            dtype=weights_dtype(options, backend),
        )


def make_step(
    options: Options,
    config: LlamaConfig,
    schedule: Schedule,
    mesh: Mesh | None,
    attention: str = "auto",
) -> tuple[optax.GradientTransformation, TrainStep]:
    """The optimizer and the jitted train step for the options.

    Args:
        options: Checked options.
        config: The model's shape.
        schedule: (step, from 0) -> factor on the learning rate.
        mesh: From `launch.trainer.mesh.make_mesh`.
        attention: From `attention_on`.

    Raises:
        ValueError: The options are incompatible.
    """
    import jax

    import osd_jax
    from osd_jax import llama
    from osd_jax.llama.layerwise import make_layerwise_train_step
    from osd_jax.llama.train import make_train_step
    from osd_jax.trees import paths_by_name

    weights = jax.eval_shape(lambda: llama.init(config, options.run.seed))
    keywords.check_words(options.optimizer.no_decay, paths_by_name(weights))
    tx = osd_jax.make_optimizer(
        options.optimizer.base,
        options.subspace.proj_type,
        learning_rate=options.optimizer.lr,
        schedule=schedule,
        select=llama.is_projected,
        dimension_numbers=llama.dimension_numbers,
        basis_dtype=options.subspace.basis_dtype,
        ns_dtype=options.optimizer.ns_dtype,
        projector_init=options.subspace.projector_init,
        slice_size=SLICE_SIZE if options.devices.per_layer and mesh is None else None,
        **keywords.optimizer_options(options),
    )
    common: dict[str, Any] = {
        "grad_clipping": options.optimizer.grad_clipping,
        "mesh": mesh,
        "compress_gradients": options.devices.compress_gradients,
        "attention": attention,
    }
    if options.devices.per_layer:
        return tx, make_layerwise_train_step(
            config, tx, offload_inputs=options.devices.offload_inputs, **common
        )
    return tx, make_train_step(
        config,
        tx,
        remat=options.model.activation_checkpointing,
        reshard_after_forward=options.devices.reshard_after_forward,
        accumulate="sketches" if options.devices.accumulate_sketches else "gradients",
        shard_over_data=options.devices.shard_over_data,
        **common,
    )


def weights_dtype(options: Options, backend: str) -> str:
    """The dtype of weights and activations on a backend named as in `jax.default_backend`."""
    return options.model.dtype or ("float32" if backend == "cpu" else "bfloat16")
