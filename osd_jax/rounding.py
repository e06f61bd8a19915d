"""Stochastic rounding of bfloat16 weights, as an Optax transformation at the end of a chain.

A bfloat16 weight has 8 significant bits: rounding the sum to nearest loses every update below half
of the weight's spacing, 1 / 256 of the weight. Rounded up or down at random, with probabilities
that make the expectation exact, such updates accumulate.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from osd_jax.numerics import like_sharding, random_bits, round_stochastically
from osd_jax.subspace import random_draws
from osd_jax.trees import promotes, unboxed

# Folded into the key of the seed, which random basis rules use too.
PURPOSE = zlib.crc32(b"stochastic_rounding")


class RoundingState(NamedTuple):
    """State of `round_updates`.

    Attributes:
      count: int32 scalar, the number of steps.
    """

    count: jax.Array  # type: ignore[assignment]  # a field, as in Optax's states


def round_updates(seed: Any) -> optax.GradientTransformationExtraArgs:
    """Returns updates with which `optax.apply_updates` rounds bfloat16 weights stochastically.

    It must be the last of a chain. For a bfloat16 weight w and an update u it returns, in float32,
    the difference between w and the stochastically rounded w + u; other updates are unchanged. The
    sum with w must be computed in float32 and cast, as `optax.apply_updates` does; casting the
    updates to bfloat16 earlier, or scaling them, rounds a second time.

    The bits depend on the seed, the parameter's name and the step count. They are drawn separately
    for each index of the first axis, so that a layer of a stack has the same bits when it is
    updated separately, with its index as the extra argument `layer=` of `update`.

    Args:
      seed: Seed of the random bits; may be traced.

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
    """The float32 number d such that casting w + d gives the stochastically rounded w + u.

    It is d = new - w, and the cast of the float32 sum w + d is `new` for any w and u for which w,
    u, w + u and d are finite. Let e(x) be the exponent of x; bfloat16 has 8 significant bits,
    float32 24.

    - e(w) - 16 <= e(new) <= e(w) + 16: d is exact. Its bits lie between 2^e of the larger number
      and 2^(e - 7) of the smaller one, 24 of them; there is a carry bit only if both have nearly
      the same size. And w + d is exact, because it is a bfloat16.
    - e(new) > e(w) + 16: d and w + d are each rounded by at most 2^(e(new) - 24). Half of the least
      spacing of bfloat16 at `new` is 2^(e(new) - 9), so the cast gives `new`.
    - e(new) < e(w) - 16: w + u is so small compared with w that -u lies between w / 2 and 2 w, and
      the sum is exact (Sterbenz): a multiple of u's spacing, at least 2^(e(w) - 24), and below
      2^(e(w) - 16). So it has 8 bits, rounding does not change it, and d = u. If 8 bits reach below
      the smallest bfloat16, 2^-133, then e(w) < -109, and d has at most 24 bits, from 2^e(w) to
      2^-133.

    On a device that flushes subnormal numbers to 0, this function does too, like every sum there.

    Args:
      param: w, bfloat16.
      update: u.
      bits: As in `round_stochastically`.
    """
    old = param.astype(jnp.float32)
    new = round_stochastically(old + update.astype(jnp.float32), bits)
    return new.astype(jnp.float32) - old
