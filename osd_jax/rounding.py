"""Stochastic rounding of bfloat16 weights, as an Optax transformation at the end of a chain.

A weight in bfloat16 keeps 8 bits: an update below half of its spacing, 1 / 256 of the weight, is
lost when the sum is rounded to nearest, at every step alike. Rounded up or down at random, with
the probabilities that make the mean exact, such updates add up.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.layout import random_draws
from osd_jax.numerics import like_sharding, random_bits, round_stochastically
from osd_jax.trees import promotes, unboxed

# Folded into the seed's key, which the rules of P that draw use too.
PURPOSE = zlib.crc32(b"stochastic_rounding")


class RoundingState(NamedTuple):
    """State of `round_updates`.

    Attributes:
      count: int32 scalar, steps taken.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, as in Optax's states


def round_updates(seed: Any) -> optax.GradientTransformationExtraArgs:
    """Updates by which `optax.apply_updates` rounds weights in bfloat16 stochastically.

    The last of a chain. For a weight w in bfloat16 and an update u it returns, in float32, the
    difference between w and w + u rounded stochastically; other updates pass. Their sum with w has
    to be taken in float32 and cast, as `optax.apply_updates` does; whoever casts them to bfloat16
    before, or scales them, rounds a second time.

    The bits follow from the seed, the parameter's name and the count of steps. They are drawn for
    each index of the first axis alone, so that a layer of stacked ones has the same bits where it
    is updated on its own, with `layer=` its index as an extra argument of `update`.

    Args:
      seed: Of the random bits; may be traced.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(1e-4), round_updates(0))
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> updates, state = tx.update(jnp.ones(10_000), tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)
      >>> sorted(set(moved.tolist())), round(float(jnp.mean(moved.astype(jnp.float32))), 4)
      ([0.99609375, 1.0], 0.9999)
    """

    def init(params: optax.Params) -> RoundingState:
        del params
        return RoundingState(jnp.zeros([], jnp.int32))

    @promotes
    def update(
        updates: optax.Updates,
        state: RoundingState,
        params: optax.Params | None = None,
        *,
        layer: jax.typing.ArrayLike = 0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, RoundingState]:
        del extra_args
        if params is None:
            raise ValueError(
                "stochastic_rounding needs update(grads, state, params): params is None"
            )
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), PURPOSE), state.count)

        def one(update: jax.Array, param: jax.Array, draw: int) -> jax.Array:
            if param.dtype != jnp.bfloat16:
                return update
            bits = random_bits(jax.random.fold_in(key, draw), param.shape, layer)
            return rounded_update(param, update, like_sharding(bits, param))

        leaves, structure = jax.tree.flatten(updates)
        named = zip(leaves, jax.tree.leaves(params), random_draws(unboxed(params)), strict=True)
        rounded = jax.tree.unflatten(structure, [one(*each) for each in named])
        return rounded, RoundingState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def rounded_update(param: jax.Array, update: jax.Array, bits: jax.Array) -> jax.Array:
    """The float32 number d for which the cast of w + d is w + u, rounded stochastically.

    That is d = new - w, and the cast of the float32 sum w + d is `new` for any w and u of which w,
    u, w + u and d are finite. With e(x) the exponent of x, bfloat16 having 8 significant bits and
    float32 24:

    - e(w) - 16 <= e(new) <= e(w) + 16: d is exact. Its bits lie between 2^e of the larger one and
      2^(e - 7) of the smaller one, 24 of them; one more is carried only where both are nearly as
      large. And w + d is exact, being a bfloat16.
    - e(new) > e(w) + 16: d and w + d are each rounded by at most 2^(e(new) - 24). Half of the least
      spacing of bfloat16 at `new` is 2^(e(new) - 9), so that the cast gives `new`.
    - e(new) < e(w) - 16: w + u is so small beside w that -u lies between w / 2 and 2 w, and the sum
      is exact (Sterbenz): a multiple of u's spacing, 2^(e(w) - 24) or more, below 2^(e(w) - 16). So
      it has 8 bits, rounding leaves it as it is, and d = u. If 8 bits reach below the least
      bfloat16, 2^-133, then e(w) < -109, and d has at most 24 bits, from 2^e(w) to 2^-133.

    Where a device takes subnormal numbers for 0, this does too, as every sum there.

    Args:
      param: w, bfloat16.
      update: u.
      bits: As in `round_stochastically`.
    """
    old = param.astype(jnp.float32)
    new = round_stochastically(old + update.astype(jnp.float32), bits)
    return new.astype(jnp.float32) - old
