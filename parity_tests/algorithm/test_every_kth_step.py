"""P moves only every k steps: what the other steps leave unchanged and do not compute.

`algorithm/test_oracle.py` checks the numbers.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from torch.utils._python_dispatch import TorchDispatchMode

import osd_jax
import osd_torch
from launch.trainer.cli import UsageError
from launch.trainer.keywords import optimizer_options
from launch.trainer.options import Options
from launch.trainer.options.record import check_same_run
from osd_jax import llama
from osd_jax.llama.layerwise import make_layerwise_train_step
from osd_jax.llama.train import init_state, make_train_step
from osd_jax.sharding import make_mesh, state_sharding
from parity_tests.support import CONFIGS
from parity_tests.support.arrays import normal
from parity_tests.support.jax_toys import is_one_of_its_shape

EVERY = 3
MOVES = [False, False, False, True, False, False, True, False]  # of steps 0, 1, ...
SHAPES = {"mlp_wide": (8, 16), "mlp_tall": (16, 8), "head": (8, 5)}
PROJECTED = ("mlp_wide", "mlp_tall")
PROJ_TYPES = ("continuous", "continuous_adam8bit", "continuous_adafactor", "continuous_sgd")

Tree = Any


def draw(seed: int) -> dict[str, np.ndarray]:
    return normal(seed, SHAPES)


def in_jax(proj_type: str = "continuous", **more: Any) -> Any:
    options = {"learning_rate": 0.1, "rank": 4, "update_proj_gap": 5, "update_proj_every": EVERY}
    return osd_jax.make_optimizer("galore_adamw", proj_type, **options | more)


def in_torch(proj_type: str = "continuous", **more: Any) -> tuple[dict[str, Any], Any]:
    params = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in draw(0).items()}
    options = {"lr": 0.1, "rank": 4, "update_proj_gap": 5, "update_proj_every": EVERY}
    return params, osd_torch.make_optimizer(
        params.items(), "galore_adamw", proj_type, **options | more
    )


def set_gradients(params: dict[str, Any], seed: int) -> None:
    for name, gradient in draw(seed).items():
        params[name].grad = torch.tensor(gradient)


def projector_state_in_jax(state: Any) -> list[bytes]:
    (own,) = osd_jax.diagnostics.subspace_states(state)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(own.projector)]


def projector_state_in_torch(params: dict[str, Any], optimizer: Any) -> list[bytes]:
    state = [optimizer.state[params[name]] for name in PROJECTED]
    kept = [(k, x) for s in state for k, x in sorted(s.items()) if k.startswith(("basis", "proj"))]
    return [x.numpy().tobytes() for _, x in kept]


# --------------------------------------------------------------- what the steps between leave alone


@pytest.mark.parametrize("move_projector", ["after", "before"])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_between_moves_the_basis_and_its_optimizer_stay_bit_for_bit(
    proj_type: str, move_projector: str
) -> None:
    tx = in_jax(proj_type, move_projector=move_projector)
    params: Tree = draw(0)
    state, update = tx.init(params), jax.jit(tx.update)
    theirs, built = in_torch(proj_type, move_projector=move_projector)
    found: dict[str, list[bool]] = {"jax": [], "torch": []}
    kept: dict[str, list[bytes]] = {}
    for step in range(len(MOVES)):
        updates, state = update(draw(step + 1), state, params)
        assert all(np.any(x) for x in updates.values())
        set_gradients(theirs, step + 1)
        built.step()
        now = {
            "jax": projector_state_in_jax(state),
            "torch": projector_state_in_torch(theirs, built),
        }
        for side, arrays in now.items():
            found[side].append(step > 0 and arrays != kept[side])
        kept = now
    assert found == {"jax": MOVES, "torch": MOVES}


def test_a_skipped_step_puts_the_move_off() -> None:
    """The count that says whether P moves is of the steps that were taken."""
    tx, params = in_jax(), draw(0)
    state, (theirs, built) = tx.init(params), in_torch()
    for step in range(EVERY):
        state = tx.update(draw(step + 1), state, params)[1]
        set_gradients(theirs, step + 1)
        built.step()
    bad = {name: np.full_like(x, np.nan) for name, x in draw(9).items()}
    kept = projector_state_in_jax(state), projector_state_in_torch(theirs, built)
    state = tx.update(bad, state, params)[1]
    for name, gradient in bad.items():
        theirs[name].grad = torch.tensor(gradient)
    built.step()
    assert (projector_state_in_jax(state), projector_state_in_torch(theirs, built)) == kept
    state = tx.update(draw(8), state, params)[1]
    set_gradients(theirs, 8)
    built.step()
    assert projector_state_in_jax(state) != kept[0]
    assert projector_state_in_torch(theirs, built) != kept[1]


# ----------------------------------------------------------------- what the steps between leave out


def products(jaxpr: Any, due: bool, within: bool = False) -> int:
    """Matrix products of a step with finite gradients, past the first, on a CPU.

    Args:
        jaxpr: Of the step.
        due: Whether P moves.
        within: Whether it is inside the conditional of finite gradients, whose last branch steps.
            Those within ask for a platform, for a first P, and for a move of P.
    """
    count = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            branches = [x.jaxpr for x in eqn.params["branches"]]
            asked = "branches_platforms" in eqn.params or any("svd" in str(x) for x in branches)
            taken = branches[-1] if not within else branches[0 if asked else due]
            count += products(taken, due, within=True)
        else:
            count += eqn.primitive.name == "dot_general"
            inner = [x for x in eqn.params.values() if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
            count += sum(products(getattr(x, "jaxpr", x), due, within) for x in inner)
    return count


def test_between_moves_jax_takes_two_products_a_matrix_and_else_seven() -> None:
    tx, params = in_jax(), draw(0)
    state = tx.init(params)
    jaxpr = jax.make_jaxpr(tx.update)(params, state, params).jaxpr
    assert products(jaxpr, due=False) == 2 * len(PROJECTED)
    assert products(jaxpr, due=True) == 7 * len(PROJECTED)


class CountProducts(TorchDispatchMode):
    """Counts matrix products by the name of PyTorch's operator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.found[name] += 1
        return func(*args, **kwargs or {})


def test_between_moves_pytorch_takes_two_products_a_matrix_and_else_seven() -> None:
    params, built = in_torch()
    counts = []
    for step in range(len(MOVES)):
        set_gradients(params, step + 1)
        with CountProducts() as counter:
            built.step()
        counts.append(counter.found.total())
    assert counts == [(7 if moves else 2) * len(PROJECTED) for moves in MOVES]


# --------------------------------------------------------------------------- other ways to step


def test_parts_vmap_and_layers_apart_are_the_update() -> None:
    """Under `vmap` with the learning rate traced and the counts batched, of different steps."""

    def steps(params: Tree, grads: Tree, rate: jax.Array) -> Tree:
        tx = in_jax(learning_rate=rate)

        def one(carry: Tree, grads: Tree) -> tuple[Tree, None]:
            params, state = carry
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, tx.init(params)), grads)[0]

    def in_parts(params: Tree, grads: Tree, rate: jax.Array) -> Tree:
        tx = in_jax(learning_rate=rate)
        state = tx.init(params)
        for step in range(len(MOVES)):
            now = jax.tree.map(lambda g, step=step: g[step], grads)
            state = tx.refresh(now, state)
            updates, state = tx.apply(tx.project(now, state), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
    many = [
        (draw(layer), stack([draw(10 * layer + step) for step in range(len(MOVES))]))
        for layer in (1, 2)
    ]
    rates = jnp.asarray([0.1, 0.02])
    alone = [jax.jit(steps)(*one, rate) for one, rate in zip(many, rates, strict=True)]
    batched = jax.jit(jax.vmap(steps))(*stack(many), rates)
    parts = [jax.jit(in_parts)(*one, rate) for one, rate in zip(many, rates, strict=True)]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, batched, stack(alone))
    jax.tree.map(close, stack(parts), stack(alone))

    # One layer is a step ahead, so that P of one moves while the other's stays.
    tx = in_jax()
    states = [tx.init(params) for params, _ in many]
    update = jax.jit(tx.update)
    for step in range(EVERY + 1):
        states[0] = update(draw(step + 1), states[0], many[0][0])[1]
        states[1] = update(draw(step + 1), states[1], many[1][0])[1] if step else states[1]
    state = stack(states)
    for step in range(EVERY):
        grads = [draw(20 + step), draw(30 + step)]
        pairs = zip(grads, states, strict=True)
        found = [update(g, s, p) for (g, s), (p, _) in zip(pairs, many, strict=True)]
        states = [new for _, new in found]
        params = stack([p for p, _ in many])
        updates, state = jax.jit(jax.vmap(tx.update))(stack(grads), state, params)
        jax.tree.map(close, (updates, state), (stack([u for u, _ in found]), stack(states)))


CONFIG = llama.LlamaConfig(
    vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)


def llama_optimizer(**more: Any) -> Any:
    return in_jax(
        learning_rate=1e-3,
        select=is_one_of_its_shape,
        dimension_numbers=llama.dimension_numbers,
        update_proj_every=2,
        **more,
    )


def llama_run(step: Any, tx: Any, dtype: Any, micro_batches: int, mesh: Any = None) -> Any:
    """The loss of the last of six steps, and the weights after it."""
    params = jax.tree.map(lambda x: x.astype(dtype), llama.init(CONFIG, 0))
    state, rng = init_state(params, tx, mesh), np.random.default_rng(0)
    for _ in range(6):
        tokens = rng.integers(0, CONFIG.vocab_size, (micro_batches, 8, 9), np.int32)
        state, metrics = step(state, {"tokens": tokens, "mask": tokens >= 0}, False)
    return metrics["loss"], state.params


@pytest.mark.parametrize(("micro_batches", "clipping"), [(1, 0.0), (2, 0.5)])
def test_layer_by_layer_in_jax_is_the_plain_step(micro_batches: int, clipping: float) -> None:
    with jax.enable_x64(True):
        tx = llama_optimizer()
        plain = make_train_step(CONFIG, tx, grad_clipping=clipping, accumulate="sketches")
        layerwise = make_layerwise_train_step(CONFIG, tx, grad_clipping=clipping)
        ends = [llama_run(step, tx, jnp.float64, micro_batches) for step in (plain, layerwise)]
    # As in test_jax_layerwise: the model's norms, softmax and loss are float32.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), *ends)


def test_reduced_sketches_in_jax() -> None:
    """On a mesh, whole gradients give one device's losses, reduced sketches come near them."""
    tx = llama_optimizer(update_proj_gap=200)
    alone = llama_run(make_train_step(CONFIG, tx), tx, jnp.float32, 1)[0]
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for compress, tolerance in ((False, 1e-5), (True, 1e-4)):
        step = make_train_step(CONFIG, tx, mesh=mesh, compress_gradients=compress)
        np.testing.assert_allclose(
            llama_run(step, tx, jnp.float32, 1, mesh)[0], alone, atol=tolerance
        )


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_numbers_and_the_states_layout_stay(kind: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))
    specs = {
        "mlp_wide": PartitionSpec("x", "y"),
        "mlp_tall": PartitionSpec("y", "x"),
        "head": PartitionSpec("x", None),
    }
    tx = in_jax()
    alone = tx.init(draw(0))
    with jax.set_mesh(mesh):
        put = lambda tree: {
            k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in tree.items()
        }
        params = put(draw(0))
        layout = state_sharding(tx, params, specs, mesh)
        state = jax.jit(tx.init, out_shardings=layout)(params)
        update = jax.jit(tx.update, out_shardings=(None, layout))
        for step in range(EVERY + 2):
            updates, state = update(put(draw(step + 1)), state, params)
    plain = jax.jit(tx.update)
    for step in range(EVERY + 2):
        expected, alone = plain(draw(step + 1), alone, draw(0))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, (updates, state), (expected, alone))


class Net(torch.nn.Module):
    """Projected on the input side and on the output side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp_up = torch.nn.Linear(12, 20, bias=False)
        self.mlp_down = torch.nn.Linear(20, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp_down(torch.tanh(self.mlp_up(x)))


def train_net(layerwise: bool, micro_batches: int, clipping: float, reduce: Any = None) -> Any:
    net, generator = Net().double(), torch.Generator().manual_seed(1)
    built: Any = osd_torch.make_optimizer(
        net.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4,
        update_proj_every=EVERY,
    )  # fmt: skip
    hooks = {"micro_batches": micro_batches, "grad_clipping": clipping, "reduce": reduce}
    updates = osd_torch.LayerwiseUpdates(built, **hooks) if layerwise else None
    built.reduce = reduce
    for _ in range(len(MOVES)):
        for _ in range(micro_batches):
            x = torch.randn(6, 12, generator=generator, dtype=torch.float64)
            (net(x).square().sum() / micro_batches).backward()
            if not updates and micro_batches > 1:
                built.accumulate(net.mlp_up.weight, 1 / micro_batches)
                built.accumulate(net.mlp_down.weight, 1 / micro_batches)
        if updates:
            updates.finish()
        else:
            osd_torch.clip_(built, clipping)
            built.step()
            built.zero_grad()
    return [x.detach() for p in net.parameters() for x in (p, *built.state[p].values())]


# One micro-batch clipped alone is left out: there the plain step clips by whole gradients' norm.
@pytest.mark.parametrize(
    ("micro_batches", "clipping", "reduce"),
    [(1, 0.0, None), (2, 0.0, None), (2, 0.5, None), (1, 0.5, torch.clone), (2, 0.5, torch.clone)],
)
def test_layer_by_layer_in_pytorch_is_the_plain_step(
    micro_batches: int, clipping: float, reduce: Any
) -> None:
    ends = [train_net(way, micro_batches, clipping, reduce) for way in (False, True)]
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


# ------------------------------------------------------------------------------ saved and resumed


def test_a_saved_state_goes_on_bit_for_bit_and_an_older_one_is_of_every_step(
    tmp_path: Path,
) -> None:
    """Saved between two moves: how far the next one is away follows from the count."""
    params, built = in_torch()
    for step in range(5):
        set_gradients(params, step)
        built.step()
    torch.save((params, built.state_dict()), tmp_path / "state.pt")
    ends = []
    for again in (False, True):
        if again:
            kept, state = torch.load(tmp_path / "state.pt", weights_only=True)
            params, built = in_torch()
            with torch.no_grad():
                for name, param in params.items():
                    param.copy_(kept[name])
            built.load_state_dict(state)
        for step in range(5, 8):
            set_gradients(params, step)
            built.step()
        ends.append(
            [x.detach().clone() for p in params.values() for x in (p, *built.state[p].values())]
        )
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    for group in state["param_groups"]:
        del group["update_proj_every"]
    built.load_state_dict(state)
    assert [group["update_proj_every"] for group in built.param_groups] == [1, 1]


def test_the_state_holds_nothing_new() -> None:
    shapes = [
        jax.tree.map(jnp.shape, in_jax(update_proj_every=every).init(draw(0))) for every in (1, 3)
    ]
    assert shapes[0] == shapes[1]


# -------------------------------------------------------------------------------- the trainers


def options(line: str) -> Options:
    config = CONFIGS / "llama_9m.json"
    return Options.parse(f"--model_config {config} --batch_size 4 {line}".split()).check()


def test_the_flag_reaches_either_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    online = "--optimizer galore_adamw --proj_type continuous"
    assert optimizer_options(options(online))["update_proj_every"] == 1
    assert optimizer_options(options(f"{online} --update_proj_every 5"))["update_proj_every"] == 5
    with pytest.raises(UsageError, match="--update_proj_every: 0 is too small; expected 1 or more"):
        options(f"{online} --update_proj_every 0")
    with pytest.raises(UsageError, match=r"--update_proj_every: only .* continuous\* --proj_type"):
        options("--optimizer galore_adamw --update_proj_every 5")


def test_a_run_goes_on_with_its_own_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is older than the option had P moved at every step."""
    monkeypatch.chdir(tmp_path)
    every_fifth = options("--optimizer galore_adamw --proj_type continuous --update_proj_every 5")
    kept = every_fifth.record()
    check_same_run(kept, every_fifth.record(), Path("runs/test"))
    del kept["options"]["update_proj_every"]
    with pytest.raises(UsageError, match="--update_proj_every: .* started with 1, not 5"):
        check_same_run(kept, every_fifth.record(), Path("runs/test"))
