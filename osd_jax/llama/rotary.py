"""Rotary position embedding: the position of each token as an angle of each pair of entries."""

import math

import jax
import jax.numpy as jnp

from osd_jax.llama.config import LlamaConfig, RopeScaling


def token_positions(length: int, segments: jax.Array | None = None) -> jax.Array:
    """The position of each token; it restarts at 0 where the segment changes.

    Args:
        length: S, the length of a row.
        segments: Integers (B, S), the document of each token; None: one document per row.

    Returns:
        int32 (S,), or (B, S) with `segments`.
    """
    index = jnp.arange(length, dtype=jnp.int32)
    if segments is None:
        return index
    is_start = (segments != jnp.roll(segments, 1, axis=1)).at[:, 0].set(True)
    return index - jax.lax.cummax(jnp.where(is_start, index, 0), axis=1)


def rotary_angles(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotary embedding.

    Frequency i is `rope_theta^(-2 i / D)`, scaled by the config's `rope_scaling`.

    Args:
        config: The model's shape; D is its `head_dim`.
        positions: Integers (..., S), such as from `token_positions`.

    Returns:
        Two float32 (..., S, 1, D / 2).
    """
    size = config.head_dim
    frequencies = 1.0 / config.rope_theta ** (jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    frequencies = _scaled(frequencies, config.rope_scaling)
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _scaled(frequencies: jax.Array, scaling: RopeScaling | None) -> jax.Array:
    """The frequencies of the scaled embedding; see `RopeScaling`."""
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    length = scaling.original_max_position_embeddings
    assert low and high and length  # checked by RopeScaling
    wavelengths = 2 * math.pi / frequencies
    share = jnp.clip((length / wavelengths - low) / (high - low), 0, 1)  # of what stays
    return (1 - share) * frequencies / scaling.factor + share * frequencies


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each head by its position's angles; entry i is paired with entry i + D / 2.

    Args:
        x: (B, S, heads, D).
        angles: From `rotary_angles`.

    Returns:
        (B, S, heads, D) in `x`'s dtype.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
