"""Stochastic rounding of bfloat16 weights, in both libraries and by both trainers."""

from __future__ import annotations

import copy as copies
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import osd_jax
import osd_torch
from launch import train_jax, train_torch
from osd_jax import llama
from osd_jax import numerics as jax_numerics
from osd_jax.guard import guarded
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.train import init_state, make_train_step
from osd_jax.rounding import RoundingState, rounded_update
from osd_torch import numerics as torch_numerics
from osd_torch.full_rank import FullRankAdam
from parity_tests.support.trainer_runs import SHORT, assert_same_end, copy, make_home
from parity_tests.support.two_processes import Run

MAX = float(jnp.finfo(jnp.bfloat16).max)
EVERY_LOWER_HALF = np.arange(1 << 16, dtype=np.int32)


def by_jax(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Upper halves, uint16."""
    rounded = jax.jit(jax_numerics.round_stochastically)(jnp.asarray(x), jnp.asarray(bits))
    return np.asarray(rounded).view(np.uint16)


def by_torch(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Upper halves, uint16."""
    rounded = torch_numerics.round_stochastically(torch.tensor(x), torch.tensor(bits))
    return rounded.view(torch.int16).numpy().view(np.uint16)


both = pytest.mark.parametrize("rounded", [by_jax, by_torch], ids=["jax", "torch"])


def as_float(half: np.ndarray) -> np.ndarray:
    return (half.astype(np.uint32) << 16).view(np.float32)


# ------------------------------------------------------------------------------- one number


@both
@pytest.mark.parametrize(
    "x",
    [
        1.0, 1 + 2**-9, -(1 + 3 * 2**-16), 0.1, -math.pi, 1e-38, 1e-39, -2e-45, 0.0, 3.3e38, -MAX,
        2 - 2**-20,
    ],
)  # fmt: skip
def test_the_mean_over_all_bits_is_the_number_itself(rounded: Any, x: float) -> None:
    wide = np.full(EVERY_LOWER_HALF.shape, x, np.float32)
    found = as_float(rounded(wide, EVERY_LOWER_HALF)).astype(np.float64)
    assert found.mean() == float(wide[0])
    assert len(set(found)) <= 2


@both
def test_numbers_that_bfloat16_holds_stay(rounded: Any) -> None:
    """All 65,536 of them: +-0, subnormals, infinities and NaNs, with the most bits added."""
    halves = EVERY_LOWER_HALF.astype(np.uint16)
    found = rounded(as_float(halves), np.full_like(EVERY_LOWER_HALF, 0xFFFF))
    is_nan = np.isnan(as_float(halves))
    np.testing.assert_array_equal(found[~is_nan], halves[~is_nan])
    assert np.isnan(as_float(found[is_nan])).all()


@both
def test_what_is_not_finite_stays_so_and_the_largest_stays_finite(rounded: Any) -> None:
    words = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32)
    largest = np.finfo(np.float32).max
    x = np.concatenate([words.view(np.float32), np.float32([np.inf, -np.inf, largest, -largest])])
    found = as_float(rounded(x, np.full(8, 0xFFFF, np.int32)))
    assert np.isnan(found[:4]).all()
    assert found[4:].tolist() == [np.inf, -np.inf, MAX, -MAX]


def test_both_libraries_round_alike() -> None:
    draw = np.random.default_rng(0)
    words = draw.integers(0, 1 << 32, 100_000, dtype=np.uint32)
    bits = draw.integers(0, 1 << 16, 100_000, dtype=np.int32)
    x = words.view(np.float32)
    np.testing.assert_array_equal(by_jax(x, bits), by_torch(x, bits))


def test_the_bits_are_uniform() -> None:
    """Each bit is up in half of n draws; six standard deviations of that are 3 / sqrt(n)."""
    n = 100_000
    of_jax = jax_numerics.random_bits(jax.random.key(0), (n // 4, 4))
    of_torch = torch_numerics.random_bits(torch.empty(n), "0/mlp/7")
    for bits in (np.asarray(of_jax).ravel(), of_torch.numpy()):
        assert bits.min() >= 0 and bits.max() < 1 << 16
        up = (bits[:, None] >> np.arange(16)) & 1
        assert np.abs(up.mean(axis=0) - 0.5).max() < 3 / math.sqrt(n)


@pytest.mark.parametrize("kind", ["any", "to nearly zero", "next to -w", "of all sizes"])
def test_a_weight_plus_its_rounded_update_is_the_rounded_weight(kind: str) -> None:
    """Bit for bit, as `rounded_update` proves it; here for numbers of any exponent.

    Subnormal numbers and overflow are left out: XLA takes the former for 0 on a CPU.
    """
    draw, n = np.random.default_rng(1), 200_000
    halves = draw.integers(0, 1 << 16, n, dtype=np.uint32).astype(np.uint16)
    w, sign = as_float(halves), draw.choice(np.float32([-1, 1]), n)
    power = lambda low, high: np.exp2(draw.integers(low, high, n)).astype(np.float32)
    with np.errstate(all="ignore"):
        u = {
            "any": draw.integers(0, 1 << 32, n, dtype=np.uint32).view(np.float32),
            "to nearly zero": -w * (1 + sign * power(-26, 0)),
            "next to -w": np.nextafter(-w, sign * np.float32(np.inf)),
            "of all sizes": w * power(-30, 30) * draw.normal(size=n).astype(np.float32),
        }[kind]
        total = w + u
        is_normal = np.logical_and.reduce(
            [np.isfinite(x) & (np.abs(x) > 2e-38) & (np.abs(x) < 1e38) for x in (w, u, total)]
        )
    weights, updates = jnp.asarray(halves[is_normal]).view(jnp.bfloat16), u[is_normal]
    bits = draw.integers(0, 1 << 16, len(updates), dtype=np.int32)

    def applied(w: jax.Array, u: jax.Array, bits: jax.Array) -> jax.Array:
        return optax.apply_updates(w, rounded_update(w, u, bits))

    wanted = by_torch(total[is_normal], bits)
    assert len(wanted) > 40_000
    for apply in (applied, jax.jit(applied)):
        found = np.asarray(apply(weights, jnp.asarray(updates), jnp.asarray(bits)))
        np.testing.assert_array_equal(found.view(np.uint16), wanted)


# ------------------------------------------------------- equal steps below a weight's spacing

EQUAL_STEPS, RATE, SHAPE = 200, 1e-3, (16, 24)
PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("adamw", {}),
    ("adamw", {"second_moment": "row", "first_moment": "8bit"}),
    ("muon", {}),
    ("osd_muon", {"proj_type": "continuous"}),
    ("lion", {}),
    ("adafactor", {}),
    ("galore_adamw", {"proj_type": "continuous"}),
    ("galore_adamw", {"proj_type": "std"}),
    ("galore_lion", {"proj_type": "std"}),
    ("galore_adafactor", {"proj_type": "continuous"}),
    ("galore_adamw8bit", {"proj_type": "continuous"}),
]


def projecting(optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    """So that each entry moves by about `RATE`: P of rank 1 has entries 1 / 4, or 24^-1/2."""
    if optimizer == "osd_muon":
        return {"rank": 1, **options}
    if not optimizer.startswith("galore"):
        return options
    return {"rank": 1, "scale": 1.0 if "lion" in optimizer else 4.0, **options}


def is_matrix(name: str, x: Any) -> bool:
    return x.ndim == 2


def rate_of(optimizer: str) -> float:
    """Muon's scale times an orthogonal matrix of rank 1 has entries of 0.2 / 4."""
    return 20 * RATE if "muon" in optimizer else RATE


def built_by_jax(optimizer: str, **options: Any) -> Any:
    options = projecting(optimizer, options)
    return osd_jax.make_optimizer(
        optimizer, learning_rate=rate_of(optimizer), select=is_matrix, **options
    )


def built_by_torch(params: dict[str, torch.Tensor], optimizer: str, **options: Any) -> Any:
    options = projecting(optimizer, options)
    return osd_torch.make_optimizer(
        params.items(), optimizer, lr=rate_of(optimizer), select=is_matrix, **options
    )


def moved_by_jax(dtype: str, build: Callable[..., Any]) -> np.ndarray:
    """How far a matrix of ones is after `EQUAL_STEPS` of a gradient of ones."""
    params = {"mlp": jnp.ones(SHAPE, dtype)}
    tx = build()

    @jax.jit
    def run(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(ones, state, params)
            return (optax.apply_updates(params, updates), state), None

        ones = jax.tree.map(jnp.ones_like, params)
        return jax.lax.scan(step, (params, tx.init(params)), length=EQUAL_STEPS)[0][0]

    return np.asarray(run(params)["mlp"], np.float64) - 1


def moved_by_torch(dtype: str, build: Callable[..., Any]) -> np.ndarray:
    """How far a matrix of ones is after `EQUAL_STEPS` of a gradient of ones."""
    weight = torch.nn.Parameter(torch.ones(SHAPE, dtype=getattr(torch, dtype)))
    optimizer = build({"mlp": weight})
    for _ in range(EQUAL_STEPS):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach().double().numpy() - 1


def assert_moves_as_in_float32(rounded: np.ndarray, wide: np.ndarray) -> None:
    """Step for step the mean is exact, so that the sums differ by chance alone.

    A step is rounded with at most half of the spacing, 2^-8 below 1, as its standard deviation. The
    bound is six standard deviations of the mean over the entries of the sum of all steps.
    """
    deviation = math.sqrt(EQUAL_STEPS / rounded.size) * 2**-9
    assert wide.mean() < -0.05
    assert abs(rounded.mean() - wide.mean()) < 6 * deviation
    assert len(np.unique(rounded)) > 3  # each entry has its own bits


@pytest.mark.parametrize(
    ("optimizer", "options"),
    PUBLISHED,
    ids=lambda x: x if isinstance(x, str) else "".join(x.values()),
)
@pytest.mark.parametrize("library", ["jax", "torch"])
def test_equal_steps_add_up(library: str, optimizer: str, options: dict[str, Any]) -> None:
    """200 steps of about 1e-3, each lost if weights are rounded to nearest."""
    moved, build = {
        "jax": (moved_by_jax, built_by_jax),
        "torch": (moved_by_torch, built_by_torch),
    }[library]
    if "8bit" in optimizer and library == "torch":
        pytest.importorskip("bitsandbytes")
    run: Any = lambda dtype, **more: moved(
        dtype, lambda *params: build(*params, optimizer=optimizer, **options, **more)
    )
    assert not run("bfloat16").any()
    assert_moves_as_in_float32(run("bfloat16", stochastic_rounding=True), run("float32"))


ALIASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "adamw": (osd_jax.osd_adamw, osd_torch.SubspaceAdamW, {}),
    "lion": (osd_jax.osd_lion, osd_torch.SubspaceLion, {}),
    "adafactor": (osd_jax.osd_adafactor, osd_torch.SubspaceAdafactor, {}),
    "adamw8bit": (osd_jax.osd_adamw8bit, osd_torch.SubspaceAdamW8bit, {}),
    # An orthogonal matrix of rank 1 has entries of 384^-1/2.
    "muon": (osd_jax.osd_muon, osd_torch.SubspaceMuon, {"muon_scale": "none"}),
}


@pytest.mark.parametrize("name", ALIASES)
def test_equal_steps_add_up_by_every_class(name: str) -> None:
    alias, kind, options = ALIASES[name]
    rate = {"muon": 0.02, "lion": RATE}.get(name, 4 * RATE)
    of_jax: Any = lambda **more: alias(rate, rank=1, select=is_matrix, **options, **more)
    of_torch: Any = lambda params, **more: kind(
        params.items(), lr=rate, rank=1, select=is_matrix, **options, **more
    )
    if "8bit" in name:
        pytest.importorskip("bitsandbytes")
    for moved, build in ((moved_by_jax, of_jax), (moved_by_torch, of_torch)):
        rounding: Any = lambda *params, build=build: build(*params, stochastic_rounding=True)
        assert not moved("bfloat16", build).any()
        assert_moves_as_in_float32(moved("bfloat16", rounding), moved("float32", build))


# --------------------------------------------------------------- a run, and the same run again


def drawn(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "mlp.a": draw.normal(size=SHAPE).astype(dtype),
        "mlp.b": draw.normal(size=SHAPE).astype(dtype),
        "norm": np.ones(SHAPE[0], dtype),
    }


def gradients(step: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(100 + step)
    return {name: draw.normal(size=x.shape).astype(np.float32) for name, x in drawn().items()}


class JaxRun:
    """A run with the published names."""

    def __init__(self, optimizer: str, dtype: str = "bfloat16", **options: Any) -> None:
        self.tx = built_by_jax(optimizer, **options)
        self.params = {name: jnp.asarray(x, dtype) for name, x in drawn().items()}
        self.state = self.tx.init(self.params)
        self.update = jax.jit(self.tx.update)

    def step(self, number: int) -> None:
        grads = {
            name: jnp.asarray(g, self.params[name].dtype) for name, g in gradients(number).items()
        }
        updates, self.state = self.update(grads, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def again(self, *args: Any, **options: Any) -> JaxRun:
        """Another run, as if read from this one's checkpoint."""
        other = JaxRun(*args, **options)
        other.params, other.state = jax.device_get((self.params, self.state))
        return other

    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(x, np.float64) for name, x in self.params.items()}


class TorchRun:
    """A run with the published names."""

    def __init__(self, optimizer: str, dtype: str = "bfloat16", **options: Any) -> None:
        wanted = getattr(torch, dtype)
        self.params = {
            name: torch.nn.Parameter(torch.tensor(x, dtype=wanted)) for name, x in drawn().items()
        }
        self.optimizer = built_by_torch(self.params, optimizer, **options)

    def step(self, number: int) -> None:
        for name, gradient in gradients(number).items():
            self.params[name].grad = torch.tensor(gradient).to(self.params[name].dtype)
        self.optimizer.step()

    def again(self, *args: Any, **options: Any) -> TorchRun:
        """Another run, as if read from this one's checkpoint."""
        other = TorchRun(*args, **options)
        with torch.no_grad():
            for name, param in other.params.items():
                param.copy_(self.params[name])
        other.optimizer.load_state_dict(copies.deepcopy(self.optimizer.state_dict()))
        return other

    def weights(self) -> dict[str, np.ndarray]:
        return {name: x.detach().double().numpy() for name, x in self.params.items()}


runs = pytest.mark.parametrize("run", [JaxRun, TorchRun], ids=["jax", "torch"])


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, x in one.items():
        np.testing.assert_array_equal(x, other[name], err_msg=name)


@runs
@pytest.mark.parametrize(
    ("optimizer", "options"), [("adamw", {}), ("galore_adamw", {"proj_type": "continuous"})]
)
def test_a_resumed_run_repeats_the_bits(run: Any, optimizer: str, options: dict[str, Any]) -> None:
    options = {**options, "stochastic_rounding": True, "weight_decay": 0.1, "seed": 3}
    whole, middle = run(optimizer, **options), None
    for number in range(6):
        if number == 3:
            middle = whole.again(optimizer, **options)
        whole.step(number)
    assert middle is not None
    for number in range(3, 6):
        middle.step(number)
    assert_equal(middle.weights(), whole.weights())

    other = run(optimizer, **{**options, "seed": 4})
    for number in range(6):
        other.step(number)
    assert any((x != other.weights()[name]).any() for name, x in whole.weights().items())


@runs
@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw"])
def test_parameters_and_steps_have_bits_of_their_own(run: Any, optimizer: str) -> None:
    """Two weights alike, with equal gradients, and equal steps of one weight."""
    built, ones = run(optimizer, stochastic_rounding=True), np.ones(SHAPE, np.float32)
    moves = []
    for _ in range(3):
        if run is JaxRun:
            params = {
                "mlp.a": jnp.ones(SHAPE, jnp.bfloat16),
                "mlp.b": jnp.ones(SHAPE, jnp.bfloat16),
            }
            built.params = {**built.params, **params}
            grads = {name: jnp.ones_like(x) for name, x in built.params.items()}
            updates, built.state = built.update(grads, built.state, built.params)
            built.params = optax.apply_updates(built.params, updates)
        else:
            with torch.no_grad():
                for name in ("mlp.a", "mlp.b"):
                    built.params[name].fill_(1)
            for param in built.params.values():
                param.grad = torch.ones_like(param)
            built.optimizer.step()
        moves += [built.weights()[name] - ones for name in ("mlp.a", "mlp.b")]
    for i, one in enumerate(moves):
        assert all((one != other).any() for other in moves[:i])


@runs
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "galore_adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_the_option_or_in_float32_nothing_changes(
    run: Any, optimizer: str, dtype: str
) -> None:
    """Bit for bit; a bfloat16 weight is the sum in float32, rounded to nearest."""
    plain = run(optimizer, dtype)
    other = run(optimizer, dtype, stochastic_rounding=dtype == "float32")
    for number in range(3):
        plain.step(number)
        other.step(number)
    assert_equal(plain.weights(), other.weights())


def test_without_the_option_jax_keeps_its_state_and_the_dtype_of_its_updates() -> None:
    is_rounding = lambda x: isinstance(x, RoundingState)
    for rounds in (False, True):
        run = JaxRun("galore_adamw", stochastic_rounding=rounds)
        leaves = jax.tree.leaves(run.state, is_leaf=is_rounding)
        assert sum(map(is_rounding, leaves)) == rounds
        updates, _ = run.tx.update(run.params, run.state, run.params)
        assert {x.dtype.name for x in updates.values()} == {"float32" if rounds else "bfloat16"}


@runs
def test_a_skipped_step_leaves_the_bits_of_the_next_one(run: Any) -> None:
    whole, skipping = (run("adamw", stochastic_rounding=True) for _ in range(2))
    for number in range(2):
        whole.step(number)
    skipping.step(0)
    if run is JaxRun:
        grads = {name: jnp.full_like(x, jnp.nan) for name, x in skipping.params.items()}
        updates, skipping.state = skipping.update(grads, skipping.state, skipping.params)
        assert not any(jnp.any(x) for x in updates.values())
    else:
        for param in skipping.params.values():
            param.grad = torch.full_like(param, math.nan)
        skipping.optimizer.step()
    skipping.step(1)
    assert_equal(skipping.weights(), whole.weights())


@runs
@pytest.mark.parametrize("optimizer", ["sgd", "adam8bit"])
def test_optimizers_of_other_libraries_refuse(run: Any, optimizer: str) -> None:
    with pytest.raises(ValueError, match=r"stochastic_rounding is True: only .* leave it out"):
        run(optimizer, stochastic_rounding=True)


@runs
def test_what_is_no_flag_is_refused(run: Any) -> None:
    with pytest.raises(ValueError, match="stochastic_rounding is 'no': expected True or False"):
        run("adamw", stochastic_rounding="no")
    with pytest.raises(ValueError, match="stochastic_rounding is 1: expected True or False"):
        if run is JaxRun:
            osd_jax.osd_adamw(RATE, rank=2, stochastic_rounding=1)  # type: ignore[arg-type]
        else:
            params = [torch.nn.Parameter(torch.ones(SHAPE))]
            osd_torch.SubspaceAdamW(params, rank=2, stochastic_rounding=1)  # type: ignore[typeddict-item]


# --------------------------------------------------------------------------------- PyTorch


def test_torch_takes_the_state_of_versions_without_the_option() -> None:
    """And keeps the option that the optimizer was built with, as it had none."""
    options = {"proj_type": "std", "seed": 1}
    old = TorchRun("galore_adamw", **options)
    old.step(0)
    state = old.optimizer.state_dict()
    for group in state["param_groups"]:
        del group["stochastic_rounding"]
    for rounds in (False, True):
        new = TorchRun("galore_adamw", **options, stochastic_rounding=rounds)
        new.optimizer.load_state_dict(copies.deepcopy(state))
        assert {g["stochastic_rounding"] for g in new.optimizer.param_groups} == {rounds}


def test_torch_adam_of_other_dtypes_stays_torchs() -> None:
    wide = TorchRun("adamw", "float32", stochastic_rounding=True).optimizer
    assert isinstance(wide, torch.optim.AdamW)
    assert isinstance(TorchRun("adam", stochastic_rounding=True).optimizer, FullRankAdam)


def test_torch_layer_by_layer_is_the_plain_step() -> None:
    """Each parameter has its own count of steps."""

    def trained(layerwise: bool) -> list[np.ndarray]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 8)).bfloat16()
        built = osd_torch.make_optimizer(
            model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4,
            stochastic_rounding=True, select=is_matrix,
        )  # fmt: skip
        updates = osd_torch.LayerwiseUpdates(built) if layerwise else None
        for _ in range(4):
            model(torch.ones(2, 24, dtype=torch.bfloat16)).square().sum().backward()
            if updates:
                updates.finish()
            else:
                built.step()
                built.zero_grad()
        return [x.detach().double().numpy() for x in model.parameters()]

    for one, other in zip(trained(True), trained(False), strict=True):
        np.testing.assert_array_equal(one, other)


def replicas() -> dict[str, np.ndarray]:
    """Weights of a model in DDP after three steps, with gradients of each process' own rows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.Linear(16, 8)).bfloat16()
    forward = osd_torch.data_parallel(model)
    built = osd_torch.make_optimizer(
        model.named_parameters(), "galore_adamw", "continuous", lr=1e-3, rank=4,
        stochastic_rounding=True, select=is_matrix,
    )  # fmt: skip
    for _ in range(3):
        forward(torch.full((2, 24), 1.0 + dist.get_rank()).bfloat16()).square().sum().backward()
        built.step()
        built.zero_grad()
    return {name: x.detach().double().numpy() for name, x in model.named_parameters()}


def parts() -> dict[str, np.ndarray]:
    """This process' parts of equal weights after a few equal steps, by their placement."""
    mesh = dist.init_device_mesh("cpu", (2,))
    params = {
        name: torch.nn.Parameter(
            distribute_tensor(torch.ones(SHAPE, dtype=torch.bfloat16), mesh, [placement])
        )
        for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("whole", Replicate()))
    }
    for optimizer in ("adamw", "galore_adamw"):
        built = built_by_torch(params, optimizer, stochastic_rounding=True)
        for _ in range(3):
            for param in params.values():
                param.grad = torch.ones_like(param)
            built.step()
    locals_ = {name: x.to_local() for name, x in params.items()}  # type: ignore[attr-defined]
    return {name: x.detach().double().numpy() for name, x in locals_.items()}


def test_processes_round_replicas_alike_and_parts_each_by_bits_of_its_own(
    two_processes: Run,
) -> None:
    one, other = two_processes(replicas)
    assert_equal(one, other)
    one, other = two_processes(parts)
    np.testing.assert_array_equal(one["whole"], other["whole"])
    for name in ("rows", "columns"):
        assert (one[name] != other[name]).any()
    for before, after in zip((one, other), two_processes(parts), strict=True):
        assert_equal(before, after)


# ------------------------------------------------------------------------------------- JAX


def test_jax_without_params_says_so() -> None:
    run = JaxRun("adamw", stochastic_rounding=True)
    with pytest.raises(ValueError, match="stochastic_rounding needs update"):
        run.tx.update(run.params, run.state)


@pytest.mark.parametrize("wrap", ["accumulate_sketches", "MultiSteps", "inject_hyperparams"])
def test_jax_wrappers_pass_the_updates_on(wrap: str) -> None:
    """The weights after two updates are those of the optimizer alone."""
    options: dict[str, Any] = {"proj_type": "continuous", "stochastic_rounding": True}
    plain = JaxRun("galore_adamw", **options)
    tx, calls = plain.tx, 2
    if wrap == "accumulate_sketches":
        tx = osd_jax.accumulate_sketches(tx, every_k=2)
    elif wrap == "MultiSteps":
        tx = optax.MultiSteps(tx, every_k_schedule=2)
    else:
        static, calls = osd_jax.optimizers.STATIC_ARGUMENTS, 1
        tx = optax.inject_hyperparams(osd_jax.make_optimizer, static_args=static)(
            "galore_adamw", learning_rate=RATE, select=is_matrix,
            **projecting("galore_adamw", options),
        )  # fmt: skip
    params, update = plain.params, jax.jit(tx.update)
    state = tx.init(params)
    for number in range(2):
        plain.step(number)
        grads = {name: jnp.asarray(g, jnp.bfloat16) for name, g in gradients(number).items()}
        for _ in range(calls):
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    assert_equal({name: np.asarray(x, np.float64) for name, x in params.items()}, plain.weights())


@pytest.mark.slow
def test_jax_layer_by_layer_has_the_bits_of_the_plain_step() -> None:
    """Inside the backward pass and after it, for updates that do not depend on the gradient."""
    config = llama.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=2,
    )  # fmt: skip
    equal = optax.stateless(lambda grads, params: jax.tree.map(lambda g: 0 * g - 1e-4, grads))
    tx = osd_jax.in_parts(guarded(equal, rounding_seed=5), None)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), llama.init(config, 0))
    tokens = jax.random.randint(jax.random.key(0), (1, 2, 8), 0, 64)
    batch = {"tokens": tokens, "mask": tokens >= 0}
    found = []
    for step in (
        make_train_step(config, tx),
        make_layerwise_train_step(config, tx),
        make_layerwise_train_step(config, tx, grad_clipping=1e9),
    ):
        state = init_state(jax.tree.map(jnp.copy, weights), tx)
        for _ in range(3):
            state, _ = step(state, batch, False)
        found.append(jax.tree.map(lambda x: np.asarray(x, np.float64), state.params))
    for layerwise in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, layerwise, found[0])
    gate = found[0]["layers"]["mlp"]["gate"] - np.asarray(weights["layers"]["mlp"]["gate"], float)
    assert gate.any() and (gate[0] != gate[1]).any()


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_jax_meshes_have_the_bits_of_one_device(axis_type: str) -> None:
    kind = getattr(jax.sharding.AxisType, axis_type)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    tx = guarded(optax.scale(-1e-3), rounding_seed=1)
    update = jax.jit(tx.update)
    params = {"mlp": jnp.ones(SHAPE, jnp.bfloat16)}
    wanted, _ = update(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", None))
        parted = jax.device_put(params, spec)
        found, _ = update(parted, tx.init(parted), parted)
    np.testing.assert_array_equal(np.asarray(found["mlp"]), np.asarray(wanted["mlp"]))


# -------------------------------------------------------------------------------- trainers


@pytest.mark.parametrize(
    "trainer",
    [
        pytest.param(train_jax, marks=pytest.mark.slow, id="jax"),
        pytest.param(train_torch, id="torch"),
    ],
)
def test_a_killed_trainer_goes_on_bit_for_bit(trainer: Any, tmp_path: Path) -> None:
    home = make_home(tmp_path, trainer)
    settings = {
        **SHORT, "num_training_steps": 6, "save_every": 3, "keep": 5, "dtype": "bfloat16",
        "proj_type": "continuous", "lr": 1e-3, "batch_size": 8, "stochastic_rounding": True,
    }  # fmt: skip
    assert home.run("whole", **settings) == 0
    copy(home / "whole", home, "killed", newest=3)
    assert home.run("killed", **settings, resume=True) == 0
    assert_same_end(home / "killed", home / "whole")

    assert home.run("plain", **{**settings, "stochastic_rounding": None}) == 0
    model = "model/model.safetensors"
    assert (home / "plain" / model).read_bytes() != (home / "whole" / model).read_bytes()
