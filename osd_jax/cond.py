"""A `lax.cond` that runs only one branch under `jax.vmap` too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from osd_jax.trees import promotes


def cond_once(
    due: jax.Array,
    do: Callable[..., Any],
    keep: Callable[..., Any],
    *args: Any,
    derivative_of: Callable[..., Any] | None = None,
) -> Any:
    """`do(*args)` if `due`, else `keep(*args)`, which must be cheaper.

    Plain `lax.cond`, except under `jax.vmap` with a batched `due`: there `cond` would run both
    branches at every step, including an SVD, so an outer `cond` tests whether any of them is due.
    `derivative_of`, if given, has the derivative of `do`.
    """
    batchable = jax.custom_batching.custom_vmap(
        lambda due, *args: jax.lax.cond(due, do, keep, *args)
    )
    choose = jax.custom_jvp(batchable)

    @choose.defjvp
    @promotes
    def differentiated(primals, tangents):  # type: ignore[no-untyped-def]
        # Reverse mode supports neither custom `vmap` rules nor a `cond` of tangents whose `due` is
        # batched.
        (due, *args), (_, *directions) = primals, tangents
        new, old = (
            jax.jvp(branch, tuple(args), tuple(directions))[1]
            for branch in (derivative_of or do, keep)
        )
        is_integer = lambda tangent: tangent.dtype == jax.dtypes.float0
        pick = lambda x, y: x if is_integer(x) else jnp.where(due, x, y)
        return choose(*primals), jax.tree.map(pick, new, old)

    @batchable.def_vmap
    @promotes
    def batched(axis_size, in_batched, due, *args):  # type: ignore[no-untyped-def]
        def spread(x: jax.Array, is_batched: bool) -> jax.Array:
            return x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))

        due_all, *rest = (
            jax.tree.map(spread, x, b) for x, b in zip((due, *args), in_batched, strict=True)
        )

        def some(*args: Any) -> Any:
            pick = jax.vmap(lambda due, new, old: jnp.where(due, new, old))
            new, old = jax.vmap(do)(*args), jax.vmap(keep)(*args)
            return jax.tree.map(functools.partial(pick, due_all), new, old)

        out = jax.lax.cond(jnp.any(due), some, jax.vmap(keep), *rest)
        return out, jax.tree.map(lambda _: True, out)

    return choose(due, *args)
