"""One optimizer step on one matrix in JAX: floor, published implementation, and optimizers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from launch.bench.contender import GAP, LR, SCALE, Arrays, Built, Case, period_of, scale_of
from launch.bench.timing import Step


def compiled_step(tx: Any, given: Arrays, dtype: str, start: Callable[[Any], Any]) -> Step:
    """One compiled step of an Optax transformation, with donated weights and state."""
    import jax
    import jax.numpy as jnp
    import optax

    # Created on the device: JAX would borrow NumPy's memory, which cannot be donated.
    put = lambda x: jnp.array(x, dtype, copy=True)
    params, grads = {"mlp": put(given.weight)}, {"mlp": put(given.gradient)}
    state = start(jax.jit(tx.init)(params))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        nonlocal params, state
        params, state = jax.block_until_ready(update(params, state, grads))

    return step


def svd(given: Arrays) -> Step:
    """GaLore's SVD of the gradient, alone."""
    import jax
    import jax.numpy as jnp

    gradient = jnp.asarray(given.gradient)
    # Compiled here: a large one is measured only once.
    decompose = jax.jit(lambda g: jnp.linalg.svd(g, full_matrices=False)).lower(gradient).compile()
    return lambda: jax.block_until_ready(decompose(gradient))


def after_first_step(state: Any, basis_of: Callable[[Any], Any]) -> Any:
    """The state of an `osd_jax` optimizer after one step, without the SVD of the first step.

    Args:
        state: From `init`.
        basis_of: old P -> P, with the same shape and dtype.
    """
    import jax
    import jax.numpy as jnp

    from osd_jax.state import SubspaceState

    is_subspace = lambda x: isinstance(x, SubspaceState)

    def moved(part: Any) -> Any:
        if not is_subspace(part):
            return part
        projector = part.projector._replace(
            basis=jax.tree.map(basis_of, part.projector.basis),
            set_at=jax.tree.map(jnp.zeros_like, part.projector.set_at),
        )
        return part._replace(count=jnp.ones_like(part.count), projector=projector)

    return jax.tree.map(moved, state, is_leaf=is_subspace)


def osd(
    optimizer: str, proj_type: str, every: int = 1
) -> Callable[[Case, Arrays, str, str], Built]:
    """A subspace optimizer of `osd_jax`; GaLore's SVD is measured alone."""

    def build(case: Case, given: Arrays, device: str, dtype: str) -> Built:
        import jax.numpy as jnp

        import osd_jax

        online = proj_type.startswith("continuous")
        tx = osd_jax.make_optimizer(
            optimizer, proj_type, learning_rate=LR, rank=case.rank,
            update_proj_gap=GAP if online else 10**9, update_proj_every=every,
            **scale_of(optimizer),
        )  # fmt: skip
        basis_of = lambda old: jnp.array(given.basis, old.dtype, copy=True)
        step = compiled_step(tx, given, dtype, lambda state: after_first_step(state, basis_of))
        return period_of(step, every) if online else Built(step, svd(given))

    return build


def muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """`osd_jax`'s Muon at full rank."""
    import osd_jax

    tx = osd_jax.make_optimizer("muon", learning_rate=LR)
    return Built(compiled_step(tx, given, dtype, lambda state: state))


def optax_muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """`optax.contrib.muon`, with the same scale."""
    import optax

    tx = optax.contrib.muon(LR, nesterov=False, consistent_rms=0.2)
    return Built(compiled_step(tx, given, dtype, lambda state: state))


def optax_galore(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """`optax.contrib.galore`; its SVD is measured alone."""
    import jax
    import jax.numpy as jnp
    import optax

    # It projects the longer side, so its P is larger and its R smaller.
    tx = optax.contrib.galore(LR, rank=case.rank, update_proj_gap=10**9, scale=SCALE)
    is_galore = lambda x: isinstance(x, optax.contrib.GaLoreState)

    def after_first_step(state: Any) -> Any:
        if not is_galore(state):
            return state
        fill = lambda old: jnp.full(old.shape, max(case.shape) ** -0.5, old.dtype)
        projector = jax.tree.map(fill, state.projector)
        return state._replace(count=jnp.ones_like(state.count), projector=projector)

    start = lambda state: jax.tree.map(after_first_step, state, is_leaf=is_galore)
    return Built(compiled_step(tx, given, dtype, start), svd(given))


def adamw(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """`optax.adamw`."""
    import optax

    return Built(compiled_step(optax.adamw(LR), given, dtype, lambda state: state))


def seven_products(weight: Any, gradient: Any, basis: Any, direction: Any) -> tuple[Any, ...]:
    """The floor in JAX: (W, R, A, the two products of P's gradient, added)."""
    import jax.numpy as jnp

    def wide(a: Any, b: Any) -> Any:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    narrow = basis.astype(gradient.dtype)
    low_rank = wide(narrow.T, gradient)
    weight = weight - (LR * wide(narrow, direction)).astype(weight.dtype)
    correlation = wide(gradient, low_rank.astype(gradient.dtype).T)
    inner, gram = basis.T @ correlation, basis.T @ basis
    return weight, low_rank, correlation, basis @ inner + correlation @ gram


def floor(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """The seven products."""
    import jax
    import jax.numpy as jnp

    put = lambda x: jnp.array(x, dtype, copy=True)
    transposed = case.shape[0] > case.shape[1]  # else P is on the left in JAX's layout
    weight, gradient = (put(x.T if transposed else x) for x in given[:2])
    basis = jnp.asarray(given.basis)
    direction = 1e-3 * jax.random.normal(jax.random.key(0), (case.rank, gradient.shape[1]), dtype)
    products = jax.jit(seven_products, donate_argnums=0)

    def step() -> None:
        nonlocal weight
        weight, *rest = jax.block_until_ready(products(weight, gradient, basis, direction))

    return Built(step)


def published(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    """The published implementation of a step: P by autograd, and AdamW."""
    import jax
    import jax.numpy as jnp
    import optax

    put = lambda x: jnp.array(x, dtype, copy=True)
    transposed = case.shape[0] > case.shape[1]
    weight, gradient = (put(x.T if transposed else x) for x in given[:2])
    basis = put(given.basis)
    of_weight = optax.chain(optax.scale_by_adam(eps=1e-6), optax.scale(-LR * SCALE))
    of_basis = optax.adamw(1 / GAP, weight_decay=0.01)

    def loss(basis: Any, unit: Any) -> Any:
        return jnp.sum(jnp.square(basis @ basis.T @ unit - unit))

    @functools.partial(jax.jit, donate_argnums=0)
    def update(carry: Any, gradient: Any) -> Any:
        weight, basis, weight_state, basis_state = carry
        direction, weight_state = of_weight.update(basis.T @ gradient, weight_state)
        weight = weight + basis @ direction
        slope = jax.grad(loss)(basis, gradient / jnp.linalg.norm(gradient))
        move, basis_state = of_basis.update(slope, basis_state, basis)
        return weight, basis + move, weight_state, basis_state

    carry = (weight, basis, of_weight.init(basis.T @ gradient), of_basis.init(basis))

    def step() -> None:
        nonlocal carry
        carry = jax.block_until_ready(update(carry, gradient))

    return Built(step)
