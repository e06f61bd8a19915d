"""One optimizer step on one matrix: the contenders and their floor.

With the closed form, a step of Online Subspace Descent is seven matrix products of a gradient M
(p, q), P (p, r) and the direction D (r, q) of the weight rule:

    R = P^T M     W += P D     A = M R^T                  2 p q r operations each
    P^T A     P^T P     P (P^T A)     A (P^T P)           2 p r r operations each

These alone are the floor. All other operations of a step read or write each number a few times.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from launch.bench.timing import Spread, Step, Times, ratios, samples, spread, time_in_rounds

GAP = 200
"""Steps between two SVDs of GaLore, and 1 / P's step size of online PCA."""
LR, SCALE = 1e-3, 0.25


class Case(NamedTuple):
    """A matrix from a model of this size, in PyTorch's orientation."""

    model: str
    shape: tuple[int, int]
    rank: int


CASES = (
    Case("60M", (512, 512), 128),
    Case("60M", (512, 1376), 128),
    Case("350M", (1024, 1024), 256),
    Case("350M", (1024, 2736), 256),
    Case("1B", (2048, 2048), 512),
    Case("1B", (2048, 5461), 512),
)
CASES_ON_GPU = (Case("7B", (4096, 4096), 1024), Case("7B", (4096, 11008), 1024))


class Arrays(NamedTuple):
    """The common input of all contenders, NumPy: W and G of a case, and an orthonormal P."""

    weight: np.ndarray
    gradient: np.ndarray
    basis: np.ndarray


class Built(NamedTuple):
    """A contender, ready to run.

    Attributes:
        step: One step, or a period of different steps.
        refresh: What it does additionally once every `GAP` steps, alone.
        period: The number of steps in `step`.
    """

    step: Step
    refresh: Step | None = None
    period: int = 1


class Contender(NamedTuple):
    """A program to time.

    Attributes:
        framework: "torch" or "jax".
        build: (case, arrays, device, dtype) -> `Built`.
        package: A dependency that may be missing.
    """

    framework: str
    build: Callable[[Case, Arrays, str, str], Built]
    package: str | None = None


def arrays(case: Case, seed: int = 0) -> Arrays:
    """W, G and P of a case, float32; G has the rank of the case plus noise, like real gradients."""
    m, n = case.shape
    p = min(m, n)
    draw = np.random.default_rng(seed).standard_normal
    low = draw((m, case.rank), np.float32) @ draw((case.rank, n), np.float32)
    gradient = 1e-3 * (low / case.rank**0.5 + draw((m, n), np.float32))
    basis = np.linalg.qr(draw((p, case.rank), np.float32))[0]
    return Arrays(0.02 * draw((m, n), np.float32), gradient, basis.astype(np.float32))


# ------------------------------------------------------------------------------------- PyTorch


def _torch_tensors(given: Arrays, device: str, dtype: str) -> tuple[Any, Any, Any]:
    """W with G in its `grad`, the same G, and P."""
    import torch

    to = lambda x: torch.from_numpy(x.copy()).to(device)
    weight = torch.nn.Parameter(to(given.weight).to(getattr(torch, dtype)))
    weight.grad = to(given.gradient).to(weight.dtype)
    return weight, weight.grad, to(given.basis)


def _torch_done(step: Step, device: str) -> Step:
    import torch

    if device == "cpu":
        return step

    def synchronised() -> None:
        step()
        torch.cuda.synchronize()

    return synchronised


def _is_right(case: Case) -> bool:
    """Whether P multiplies a matrix in PyTorch's layout from the right, on its input side."""
    return case.shape[0] >= case.shape[1]


class SevenProducts:
    """The floor in PyTorch: the products of a step, written into preallocated memory."""

    def __init__(self, weight: Any, gradient: Any, basis: Any, right: bool) -> None:
        import torch

        self.weight, self.matrix = weight.data, gradient
        if right:
            self.weight, self.matrix = self.weight.mT, gradient.mT
        self.basis, self.narrow = basis, basis.to(gradient.dtype)
        (p, r), q = basis.shape, self.matrix.shape[1]
        empty = functools.partial(torch.empty, device=basis.device)  # float32, like P
        self.low_rank = empty(r, q, dtype=gradient.dtype)
        self.correlation = empty(p, r, dtype=gradient.dtype)
        self.direction = 1e-3 * torch.randn(r, q).to(self.low_rank)
        self.inner, self.gram = empty(r, r), empty(r, r)
        self.wide, self.moved = empty(p, r), empty(p, r)

    def __call__(self) -> None:
        """Runs it once."""
        import torch

        torch.mm(self.narrow.mT, self.matrix, out=self.low_rank)
        self.weight.addmm_(self.narrow, self.direction, alpha=-LR)
        torch.mm(self.matrix, self.low_rank.mT, out=self.correlation)
        correlation = self.correlation
        if correlation.dtype != self.wide.dtype:
            correlation = self.wide.copy_(correlation)
        torch.mm(self.basis.mT, correlation, out=self.inner)
        torch.mm(self.basis.mT, self.basis, out=self.gram)
        torch.mm(self.basis, self.inner, out=self.moved)
        self.moved.addmm_(correlation, self.gram)


def _torch_floor(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    products = SevenProducts(*_torch_tensors(given, device, dtype), _is_right(case))
    return Built(_torch_done(products, device))


class PublishedStep:
    """The published implementation: P by autograd through `||P P^T G - G||_F^2`, and AdamW.

    R = P^T G; Adam's direction for R, lifted by P, updates W; then P takes one step of AdamW, with
    step size 1 / gap, down the gradient of the loss on G / ||G||_F, for which P P^T is formed.
    """

    def __init__(self, weight: Any, gradient: Any, basis: Any, right: bool) -> None:
        import torch

        self.weight, self.gradient, self.right = weight.data, gradient, right
        self.basis = torch.nn.Parameter(basis.to(gradient.dtype))
        self.optimizer = torch.optim.AdamW([self.basis], lr=1 / GAP)
        low_rank = self._low_rank()
        self.first, self.second = torch.zeros_like(low_rank), torch.zeros_like(low_rank)
        self.count = 0

    def _low_rank(self) -> Any:
        basis = self.basis.data
        return self.gradient @ basis if self.right else basis.mT @ self.gradient

    def __call__(self) -> None:
        """One step."""
        beta1, beta2, eps = 0.9, 0.999, 1e-6
        low_rank = self._low_rank()
        self.count += 1
        self.first.mul_(beta1).add_(low_rank, alpha=1 - beta1)
        self.second.mul_(beta2).addcmul_(low_rank, low_rank, value=1 - beta2)
        correction = (1 - beta2**self.count) ** 0.5 / (1 - beta1**self.count)
        direction = self.first / self.second.sqrt().add_(eps)
        basis = self.basis.data
        lifted = direction @ basis.mT if self.right else basis @ direction
        self.weight.add_(lifted * SCALE, alpha=-LR * correction)
        self.move()

    def move(self) -> None:
        """Only P's step."""
        unit = self.gradient / self.gradient.norm()
        onto = self.basis @ self.basis.mT
        found = unit @ onto if self.right else onto @ unit
        (found - unit).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _torch_published(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    step = PublishedStep(*_torch_tensors(given, device, dtype), _is_right(case))
    return Built(_torch_done(step, device))


def _period_of(step: Step, every: int) -> Built:
    """All steps from one move of P to the next."""

    def period() -> None:
        for _ in range(every):
            step()

    return Built(period if every > 1 else step, period=every)


def _osd_torch(
    optimizer: str, proj_type: str, every: int = 1
) -> Callable[[Case, Arrays, str, str], Built]:
    def build(case: Case, given: Arrays, device: str, dtype: str) -> Built:
        import osd_torch
        from osd_torch.bases import leading_singular_vectors
        from osd_torch.layout import to_matrix

        weight, gradient, basis = _torch_tensors(given, device, dtype)
        online = proj_type.startswith("continuous")
        made = osd_torch.make_optimizer(
            [("mlp", weight)], optimizer, proj_type, lr=LR, rank=case.rank,
            update_proj_gap=GAP if online else 10**9, update_proj_every=every,
            **scale_of(optimizer),
        )  # fmt: skip
        assert isinstance(made, osd_torch.SubspaceOptimizer)
        torch_after_first_step(made, lambda p, rank: basis)
        side = made.side(made.param_groups[0], weight)
        matrix, old = to_matrix(gradient, side), basis.float()
        refresh = lambda: leading_singular_vectors(matrix, old, side)
        step = _torch_done(made.step, device)
        return _period_of(step, every) if online else Built(step, _torch_done(refresh, device))

    return build


def scale_of(optimizer: str) -> dict[str, Any]:
    """The factor on the lifted update, for the optimizers that read it."""
    return {"scale": SCALE} if optimizer.startswith("galore") else {}


def torch_after_first_step(optimizer: Any, basis_of: Callable[[int, int], Any]) -> None:
    """Gives an `osd_torch` optimizer the state after one step, without the SVD of the first step.

    That SVD takes minutes at the larger shapes.

    Args:
        optimizer: A new optimizer.
        basis_of: (p, r) -> P.
    """
    for group in optimizer.param_groups:
        for param in group["params"] if group["rank"] is not None else ():
            state = optimizer.state_of(group, param)
            state["basis"].copy_(basis_of(*state["basis"].shape))
            state["step"].fill_(1)
            state["set_at"].fill_(0)


def _torch_muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    import osd_torch

    weight, *_ = _torch_tensors(given, device, dtype)
    made = osd_torch.make_optimizer([("mlp", weight)], "muon", lr=LR)
    return Built(_torch_done(made.step, device))


def _torchs_own_muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    import torch

    weight, *_ = _torch_tensors(given, device, dtype)
    own = torch.optim.Muon([weight], lr=LR, nesterov=False, adjust_lr_fn="match_rms_adamw")
    return Built(_torch_done(own.step, device))


def _torch_adamw(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    import torch

    weight, *_ = _torch_tensors(given, device, dtype)
    return Built(_torch_done(torch.optim.AdamW([weight], lr=LR, fused=True).step, device))


def _bitsandbytes(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    bitsandbytes = importlib.import_module("bitsandbytes")
    weight, *_ = _torch_tensors(given, device, dtype)
    return Built(_torch_done(bitsandbytes.optim.AdamW8bit([weight], lr=LR).step, device))


# ----------------------------------------------------------------------------------------- JAX


def _jax_step(tx: Any, given: Arrays, dtype: str, start: Callable[[Any], Any]) -> Step:
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


def _jax_svd(given: Arrays) -> Step:
    import jax
    import jax.numpy as jnp

    gradient = jnp.asarray(given.gradient)
    # Compiled here: a large one is measured only once.
    decompose = jax.jit(lambda g: jnp.linalg.svd(g, full_matrices=False)).lower(gradient).compile()
    return lambda: jax.block_until_ready(decompose(gradient))


def jax_after_first_step(state: Any, basis_of: Callable[[Any], Any]) -> Any:
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


def _osd_jax(
    optimizer: str, proj_type: str, every: int = 1
) -> Callable[[Case, Arrays, str, str], Built]:
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
        step = _jax_step(tx, given, dtype, lambda state: jax_after_first_step(state, basis_of))
        return _period_of(step, every) if online else Built(step, _jax_svd(given))

    return build


def _jax_muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    import osd_jax

    tx = osd_jax.make_optimizer("muon", learning_rate=LR)
    return Built(_jax_step(tx, given, dtype, lambda state: state))


def _optax_muon(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    import optax

    tx = optax.contrib.muon(LR, nesterov=False, consistent_rms=0.2)
    return Built(_jax_step(tx, given, dtype, lambda state: state))


def _optax_galore(case: Case, given: Arrays, device: str, dtype: str) -> Built:
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
    return Built(_jax_step(tx, given, dtype, start), _jax_svd(given))


def _optax_adamw(case: Case, given: Arrays, device: str, dtype: str) -> Built:
    import optax

    return Built(_jax_step(optax.adamw(LR), given, dtype, lambda state: state))


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


def _jax_floor(case: Case, given: Arrays, device: str, dtype: str) -> Built:
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


def _jax_published(case: Case, given: Arrays, device: str, dtype: str) -> Built:
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


# -------------------------------------------------------------------------------- measurement

FLOORS = {"torch": "floor, torch", "jax": "floor, jax"}
PUBLISHED = {"torch": "published way, torch", "jax": "published way, jax"}
FULL_RANK = {"torch": "AdamW fused, torch", "jax": "optax.adamw"}
GALORE = {"torch": "GaLore, osd_torch", "jax": "GaLore, osd_jax"}
EVERY = 10  # docs/comparison shows the effect on the loss
CONTENDERS: Mapping[str, Contender] = {
    FLOORS["torch"]: Contender("torch", _torch_floor),
    "osd_torch, AdamW": Contender("torch", _osd_torch("galore_adamw", "continuous")),
    "osd_torch, 8-bit AdamW": Contender(
        "torch", _osd_torch("galore_adamw8bit", "continuous_adam8bit"), "bitsandbytes"
    ),
    "osd_torch, P by SGD": Contender("torch", _osd_torch("galore_adamw", "continuous_sgd")),
    f"osd_torch, P moved every {EVERY}": Contender(
        "torch", _osd_torch("galore_adamw", "continuous", EVERY)
    ),
    "osd_torch, osd_muon": Contender("torch", _osd_torch("osd_muon", "continuous")),
    "osd_torch, Muon": Contender("torch", _torch_muon),
    GALORE["torch"]: Contender("torch", _osd_torch("galore_adamw", "std")),
    PUBLISHED["torch"]: Contender("torch", _torch_published),
    FULL_RANK["torch"]: Contender("torch", _torch_adamw),
    "torch.optim.Muon": Contender("torch", _torchs_own_muon),
    "bitsandbytes AdamW8bit": Contender("torch", _bitsandbytes, "bitsandbytes"),
    FLOORS["jax"]: Contender("jax", _jax_floor),
    "osd_jax, AdamW": Contender("jax", _osd_jax("galore_adamw", "continuous")),
    "osd_jax, 8-bit AdamW": Contender("jax", _osd_jax("galore_adamw8bit", "continuous_adam8bit")),
    "osd_jax, P by SGD": Contender("jax", _osd_jax("galore_adamw", "continuous_sgd")),
    f"osd_jax, P moved every {EVERY}": Contender(
        "jax", _osd_jax("galore_adamw", "continuous", EVERY)
    ),
    "osd_jax, osd_muon": Contender("jax", _osd_jax("osd_muon", "continuous")),
    "osd_jax, Muon": Contender("jax", _jax_muon),
    GALORE["jax"]: Contender("jax", _osd_jax("galore_adamw", "std")),
    "GaLore, optax.contrib": Contender("jax", _optax_galore),
    PUBLISHED["jax"]: Contender("jax", _jax_published),
    FULL_RANK["jax"]: Contender("jax", _optax_adamw),
    "optax.contrib.muon": Contender("jax", _optax_muon),
}


def rates(device: str, dtype: str, rounds: int) -> dict[str, dict[str, Spread]]:
    """Peak rates of the device: operations/s of a large product, bytes/s of a copy.

    Args:
        device: "cpu" or "cuda".
        dtype: Of the matrices.
        rounds: Number of measurements.

    Returns:
        By framework, "product" (operations per second) and "copy" (bytes read and written per
        second).
    """
    import jax
    import jax.numpy as jnp
    import torch

    n = 2048 if device == "cpu" else 8192
    square = torch.full((n, n), 1e-3, dtype=getattr(torch, dtype), device=device)
    result = torch.empty_like(square)
    of_jax = jnp.full((n, n), 1e-3, dtype)
    multiply, negate = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    times = time_in_rounds(
        {
            "torch product": _torch_done(lambda: torch.mm(square, square, out=result), device),
            "torch copy": _torch_done(lambda: result.copy_(square), device),
            "jax product": lambda: jax.block_until_ready(multiply(of_jax, of_jax)),
            "jax copy": lambda: jax.block_until_ready(negate(of_jax)),
        },
        rounds=rounds,
    )
    work = {"product": 2 * n**3, "copy": 2 * square.numel() * square.element_size()}
    return {
        framework: {
            what: spread([amount / x for x in times[f"{framework} {what}"]])
            for what, amount in work.items()
        }
        for framework in FLOORS
    }


class Settings(NamedTuple):
    """How long to measure."""

    rounds: int = 15
    turn_seconds: float = 0.05
    svd_seconds: float = 10.0


def run_case(case: Case, settings: Settings, device: str, dtype: str) -> list[dict[str, Any]]:
    """One record per contender: its seconds, and their ratios to others' in the same round."""
    given = arrays(case)
    built: dict[str, Built] = {}
    missing: dict[str, str] = {}
    for name, contender in CONTENDERS.items():
        if contender.package and importlib.util.find_spec(contender.package) is None:
            missing[name] = f"{contender.package} is not installed"
        else:
            built[name] = contender.build(case, given, device, dtype)
    by_framework: dict[str, Spread] = {}  # the same SVD serves all contenders of one framework
    refreshes: dict[str, Spread] = {}
    for name, it in built.items():
        framework = CONTENDERS[name].framework
        if it.refresh is not None:
            if framework not in by_framework:
                taken = samples(it.refresh, most=3, seconds=settings.svd_seconds)
                by_framework[framework] = spread(taken)
            refreshes[name] = by_framework[framework]
    times = time_in_rounds(
        {name: it.step for name, it in built.items()},
        rounds=settings.rounds,
        turn_seconds=settings.turn_seconds,
    )
    times = {name: [x / built[name].period for x in xs] for name, xs in times.items()}
    return records(case, times, refreshes, missing)


def records(
    case: Case, times: Times, refreshes: Mapping[str, Spread], missing: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The times of one case as records; work done every `GAP` steps is amortized over them."""
    whole = {
        name: [x + refreshes[name].median / GAP for x in xs] if name in refreshes else xs
        for name, xs in times.items()
    }
    best_floor = min((times[name] for name in FLOORS.values()), key=lambda x: spread(x).median)
    found = []
    for name, contender in CONTENDERS.items():
        record: dict[str, Any] = {**case._asdict(), "contender": name}
        record["framework"] = contender.framework
        if name in missing:
            found.append({**record, "missing": missing[name]})
            continue
        seconds, side = whole[name], contender.framework
        record |= {
            "seconds": spread(seconds)._asdict(),
            "over_floor": ratios(seconds, times[FLOORS[side]])._asdict(),
            "over_best_floor": ratios(seconds, best_floor)._asdict(),
            "published_over_this": ratios(times[PUBLISHED[side]], seconds)._asdict(),
            "over_galore": ratios(seconds, whole[GALORE[side]])._asdict(),
            "over_full_rank": ratios(seconds, times[FULL_RANK[side]])._asdict(),
        }
        if name in refreshes:
            record["step_alone"] = spread(times[name])._asdict()
            record["svd"] = refreshes[name]._asdict()
        found.append(record)
    return found
