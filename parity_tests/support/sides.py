"""Both libraries with one interface: NumPy trajectories in PyTorch's orientation in and out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import osd_jax
import osd_torch
from parity_tests.support.oracle import projected_sides

Arrays = Mapping[str, np.ndarray]
TRACED = ("lr", "scale", "weight_decay")  # options whose changes do not recompile in JAX
# Compiling is nearly all of a run's time here, and half of it LLVM's optimizing.
FAST_COMPILE = {"xla_backend_optimization_level": 0}


class Trajectory(NamedTuple):
    """What a run leaves after each of T steps.

    Attributes:
        weights: By name: (T, m, n), or (T, n) for a vector; float64 copies.
        bases: By name of a projected parameter, and by side, "output" or "input": (T, p, r).
    """

    weights: dict[str, np.ndarray]
    bases: dict[str, dict[str, np.ndarray]]


Run = Callable[..., Trajectory]


def run_jax(
    start: Arrays,
    gradients: Arrays,
    lr_ratio: np.ndarray,
    optimizer: str,
    proj_type: str,
    *,
    dtype: str = "float32",
    transposed: bool = True,
    rejoin: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    **options: Any,
) -> Trajectory:
    """T steps of osd_jax as one scan, compiled once for each set of shapes and static options.

    Args:
        start: Weights by name; those with `mlp` in their name are projected.
        gradients: By name, (T, ...).
        lr_ratio: (T,), factors on lr.
        optimizer: Published name.
        proj_type: Published name.
        dtype: Dtype of the parameters.
        transposed: Whether kernels are (input, output), as usual in JAX; False: they stay (output,
            input), declared by `SubspaceDimensionNumbers`.
        rejoin: By name and side, (T, p, r): the value that P takes after each step, up to the signs
            of its columns; NaN to keep P. The trajectory has the P before that.
        **options: `lr` and make_optimizer's.
    """
    turn = lambda x: np.swapaxes(x, -1, -2) if transposed else x
    is_matrix = {name: x.ndim == 2 for name, x in start.items()}
    if not transposed:
        options["dimension_numbers"] = osd_jax.SubspaceDimensionNumbers(1, 0)
    with jax.enable_x64(dtype == "float64"):
        wide = "float64" if dtype == "float64" else "float32"
        to_jax = lambda tree, dtype: {
            name: jnp.asarray(turn(x) if is_matrix[name] else x, dtype) for name, x in tree.items()
        }
        names = TRACED if optimizer.startswith("galore") else ("lr",)
        traced = {name: jnp.asarray(options.pop(name), wide) for name in names}
        run = _jax_run(optimizer, proj_type, tuple(sorted(options.items())))
        params, ratio = to_jax(start, dtype), jnp.asarray(lr_ratio, wide)
        others = {name: tuple(x.values()) for name, x in (rejoin or {}).items()}
        grads = to_jax(gradients, dtype)
        weights, bases = jax.device_get(run(params, grads, others, ratio, traced))
    return Trajectory(
        {name: _float64(turn(x) if is_matrix[name] else x) for name, x in weights.items()},
        {name: _by_side(x, proj_type, start[name].shape) for name, x in bases.items()},
    )


@functools.cache
def _jax_run(optimizer: str, proj_type: str, options: tuple[tuple[str, Any], ...]) -> Any:
    @functools.partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(
        params: Any,
        gradients: Any,
        rejoin: Any,
        lr_ratio: jax.Array,
        traced: dict[str, jax.Array],
    ) -> Any:
        tx = osd_jax.make_optimizer(
            optimizer,
            proj_type,
            learning_rate=traced.pop("lr"),
            schedule=lambda step: lr_ratio[step],
            **traced,
            **dict(options),
        )

        def step(carry: Any, now: Any) -> Any:
            (params, state), (grads, others) = carry, now
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            bases = dict(osd_jax.projectors(state))
            held = {
                name: basis if isinstance(basis, tuple) else (basis,)
                for name, basis in bases.items()
            }
            exchanged = {
                id(P): _rejoined(P, other)
                for name in others
                for P, other in zip(held[name], others[name], strict=True)
            }
            state = jax.tree.map(lambda x: exchanged.get(id(x), x), state)
            return (params, state), (params, bases)

        return jax.lax.scan(step, (params, tx.init(params)), (gradients, rejoin))[1]

    return run


def _rejoined(basis: jax.Array, other: jax.Array) -> jax.Array:
    """`other`, with the signs of the columns of `basis`, or that where `other` is NaN."""
    signs = jnp.where(jnp.sum(basis * other, axis=0) < 0, -1, 1)
    return jnp.where(jnp.isnan(other), basis, (other * signs).astype(basis.dtype))


def forget_compiled() -> None:
    """Frees what `run_jax` compiled: each run keeps memory maps, and a process may have 65,530."""
    _jax_run.cache_clear()
    jax.clear_caches()


def run_torch(
    start: Arrays,
    gradients: Arrays,
    lr_ratio: np.ndarray,
    optimizer: str,
    proj_type: str,
    *,
    dtype: str = "float32",
    **options: Any,
) -> Trajectory:
    """T steps of osd_torch; see `run_jax`."""
    to_torch = lambda x: torch.tensor(x).to(getattr(torch, dtype))
    params = {name: torch.nn.Parameter(to_torch(x)) for name, x in start.items()}
    grads = {name: to_torch(x) for name, x in gradients.items()}
    peak = options.pop("lr")
    built = osd_torch.make_optimizer(params.items(), optimizer, proj_type, lr=peak, **options)
    peaks = [group["lr"] for group in built.param_groups]
    weights: dict[str, list[np.ndarray]] = {name: [] for name in params}
    bases: dict[str, list[Any]] = {}
    for step, ratio in enumerate(lr_ratio):
        for group, own in zip(built.param_groups, peaks, strict=True):
            group |= {"lr": own * float(ratio), "peak_lr": own}  # a ratio may exceed 1
        for name, param in params.items():
            param.grad = grads[name][step]
        built.step()
        for name, param in params.items():
            weights[name].append(_float64(param.detach().double().numpy(force=True)))
        for name, basis in osd_torch.projectors(built).items():
            sides = basis if isinstance(basis, osd_torch.TwoSided) else (basis,)
            bases.setdefault(name, []).append([P.numpy(force=True).copy() for P in sides])
    return Trajectory(
        {name: np.stack(x) for name, x in weights.items()},
        {
            name: _by_side(tuple(map(np.stack, zip(*x, strict=True))), proj_type, start[name].shape)
            for name, x in bases.items()
        },
    )


def _by_side(basis: Any, proj_type: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    arrays = basis if isinstance(basis, tuple) else (basis,)
    sides = projected_sides(proj_type, shape)
    return {side: _float64(P) for side, P in zip(sides, arrays, strict=True)}


def _float64(x: np.ndarray) -> np.ndarray:
    return np.array(x, np.float64)


def gradients(
    rng: np.random.Generator, steps: int, shape: tuple[int, ...], falling_by: float = 0.0
) -> np.ndarray:
    """Gradients (steps, *shape) of a slowly turning direction and noise, as training has them.

    Args:
        rng: Draws them.
        steps: How many.
        shape: Of a matrix or a vector.
        falling_by: The factor by which each singular value is below the one before, so that no
            cut between them is a close one; 0: as they come.
    """
    fixed = rng.standard_normal(shape)
    drawn = fixed + rng.standard_normal((steps, *shape))
    if not falling_by:
        return drawn
    u, s, vt = np.linalg.svd(drawn, full_matrices=False)
    spectrum = 4.0 * falling_by ** -np.arange(s.shape[-1], dtype=float)
    return (u * spectrum) @ vt
