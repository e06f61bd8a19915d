"""osd_torch's optimizers inside other programs: dtypes, schedulers, autocast, wrappers.

Also with zero gradients, as from an expert without tokens or a gate that starts at 0.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import lr_scheduler

import osd_torch
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, SUBSPACE_OPTIMIZERS

GAP = 200
ONLINE_AND_NOT = ("std", "full", "random", "continuous", "continuous_adam8bit")


class Pair(nn.ModuleDict):
    """Two linear layers, whose matrices are projected on their output and on their input side."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__({"mlp": nn.Linear(24, 16), "attn": nn.Linear(16, 24)})

    def forward(self, x: Tensor) -> Tensor:
        """Batches of vectors of 24."""
        return self["attn"](torch.relu(self["mlp"](x)))


def build(model: nn.Module, name: str, proj_type: str = "std", **options: Any) -> Any:
    options = {"lr": 0.01, "rank": 4, "update_proj_gap": 3, **options}
    return osd_torch.make_optimizer(model.named_parameters(), name, proj_type, **options)


def inputs(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 24, generator=generator, dtype=torch.float32)


def loss_of(model: nn.Module, step: int) -> Tensor:
    return (model(inputs(step)) - inputs(step)).square().mean()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of all weights and of all state."""
    states = [optimizer.state[param] for param in model.parameters()]
    state = [x for values in states for _, x in sorted(values.items()) if isinstance(x, Tensor)]
    return [x.detach().clone() for x in (*model.parameters(), *state)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


EVERY_OPTIMIZER = [
    *itertools.product(SUBSPACE_OPTIMIZERS, ONLINE_AND_NOT),
    *((name, "std") for name in FULL_RANK_OPTIMIZERS),
]


# The default dtype.


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "proj_type"), EVERY_OPTIMIZER)
def test_the_default_dtype_changes_nothing(name: str, proj_type: str, default: torch.dtype) -> None:
    """bfloat16 counts no further than 256; and 8-bit codes stand for float32 values."""
    steps = 270 if default == torch.bfloat16 else 20

    def run(dtype: torch.dtype) -> list[Tensor]:
        osd_torch.quantization.code_books.cache_clear()
        model = Pair()
        with default_dtype(dtype):
            options = {"update_proj_gap": 100}
            optimizer = build(model, name, proj_type, **options)
            with torch.no_grad():
                gradients = [p.clone() for p in model.parameters()]
            for step in range(steps):
                for param, gradient in zip(model.parameters(), gradients, strict=True):
                    param.grad = gradient * (1 + step % 7)
                osd_torch.clip_(optimizer, 1.0)
                optimizer.step()
        osd_torch.quantization.code_books.cache_clear()
        # torch.optim's own step counts follow a default of float64, which loses nothing.
        found = everything(model, optimizer)
        return [x.to(torch.float32) if x.dtype == torch.float64 else x for x in found]

    assert_same(run(default), run(torch.float32))


# A gradient without direction.


def low_rank_gradients(steps: int, shape: tuple[int, int] = (32, 48)) -> list[Tensor]:
    """Of one row space and one column space, with a little noise."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    left, right = draw(shape[0], 3), draw(3, shape[1])
    return [left @ draw(3, 3) @ right + 0.05 * draw(*shape) for _ in range(steps)]


def energy(optimizer: torch.optim.Optimizer, gradient: Tensor) -> float:
    """The part of a gradient's squared norm that lies in the subspace."""
    (basis,) = osd_torch.projectors(optimizer).values()
    if isinstance(basis, osd_torch.TwoSided):
        kept = basis.output.T @ gradient @ basis.input
    else:
        kept = basis.T @ (gradient if len(basis) == len(gradient) else gradient.T)
    return float((kept.norm() / gradient.norm()) ** 2)


def captured(
    proj_type: str,
    zeros_at: tuple[int, ...] = (),
    gap: int = GAP,
    steps: int = 12,
    before: Callable[[nn.Module, Any], Any] = lambda model, optimizer: None,
    kind: str = "galore_adamw",
) -> list[float]:
    """The energy after each step."""
    model = nn.ModuleDict({"mlp": nn.Linear(48, 32, bias=False)})
    nn.init.zeros_(model["mlp"].weight)
    optimizer = build(model, kind, proj_type, update_proj_gap=gap)
    before(model, optimizer)
    energies = []
    for step, gradient in enumerate(low_rank_gradients(steps)):
        model["mlp"].weight.grad = gradient * (step not in zeros_at)
        optimizer.step()
        energies.append(energy(optimizer, gradient))
    assert all(torch.isfinite(x).all() for x in everything(model, optimizer))
    return energies


FROM_GRADIENT = [name for name in PROJ_TYPES if name not in ("random", "gaussian")]


@pytest.mark.parametrize("proj_type", FROM_GRADIENT)
@pytest.mark.parametrize("zeros", [(0,), (0, 1, 2)])
def test_p_waits_for_the_first_gradient_with_a_direction(
    proj_type: str, zeros: tuple[int, ...]
) -> None:
    always, found = captured(proj_type), captured(proj_type, zeros)
    assert found[: len(zeros)] == [0.0] * len(zeros)  # P is not set
    for step in range(len(zeros), 12):
        # Lion and Adafactor move every entry of P, so that what it captures goes up and down.
        wanted = (
            min(always)
            if proj_type in ("continuous_lion", "continuous_adafactor")
            else always[step]
        )
        assert found[step] > 0.99 * wanted, (step, found, always)


@pytest.mark.parametrize("proj_type", [n for n in FROM_GRADIENT if "continuous" not in n])
def test_a_refresh_waits_for_the_next_gradient_with_a_direction(proj_type: str) -> None:
    found = captured(proj_type, zeros_at=(5,), gap=5, steps=10)
    always = captured(proj_type, gap=5, steps=10)
    assert found[:5] == always[:5]
    assert found[5] > 0.99 * found[4]  # the old P
    # It is refreshed at step 6 instead of 5.
    later = captured(proj_type, gap=6, steps=10)
    torch.testing.assert_close(found[6:], later[6:], rtol=1e-5, atol=1e-6)


def test_p_rests_at_a_refresh_without_direction() -> None:
    param = nn.Parameter(torch.zeros(32, 48))
    optimizer = osd_torch.SubspaceAdamW([{"params": [param], "rank": 4, "update_proj_gap": 5}])
    for step, gradient in enumerate(low_rank_gradients(8)):
        before = optimizer.state[param]["basis"].clone() if step else None
        param.grad = gradient * (step != 5)
        optimizer.step()
        is_set = step in (0, 6)
        assert int(optimizer.state[param]["set_at"]) == {5: -1}.get(step, 0 if step < 5 else 6)
        if before is not None:
            assert torch.equal(before, optimizer.state[param]["basis"]) == (not is_set)


@pytest.mark.parametrize("proj_type", ["std", "continuous", "continuous_sgd"])
def test_p_is_set_by_the_first_part_of_an_update_that_has_a_direction(proj_type: str) -> None:
    param = nn.Parameter(torch.zeros(32, 48))
    group = {"params": [param], "rank": 4, "proj_type": proj_type, "update_proj_gap": 5}
    optimizer = osd_torch.SubspaceAdamW([group])
    first, second, third = low_rank_gradients(3)
    for gradient in (torch.zeros_like(first), second, third):
        param.grad = gradient / 3
        optimizer.accumulate(param, 1 / 3)
    optimizer.step()
    assert int(optimizer.state[param]["set_at"]) == 0
    assert energy(optimizer, second) > 0.99
    assert param.detach().abs().max() > 0


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_reading_the_state_before_training_harms_nothing(proj_type: str) -> None:
    """`torch.distributed.checkpoint` takes a step of zeros to see what the state will be."""
    found = captured(proj_type, before=get_optimizer_state_dict)
    assert all(x > 0 for x in found)
    if proj_type in FROM_GRADIENT:  # the others draw by the number of the step
        always = captured(proj_type)
        assert min(found) > 0.99 * min(always), (found, always)


def test_a_run_that_resumes_while_p_waits_is_the_same_run() -> None:
    gradients = low_rank_gradients(8)

    def train(param: nn.Parameter, optimizer: Any, steps: range) -> None:
        for step in steps:
            param.grad = gradients[step] * (step not in (0, 1))
            optimizer.step()

    def make() -> tuple[nn.Parameter, Any]:
        param = nn.Parameter(torch.ones(32, 48))
        group = {"params": [param], "rank": 4, "proj_type": "continuous"}
        return param, osd_torch.SubspaceAdamW([group], lr=0.01)

    (whole, one), (first, two), (second, three) = make(), make(), make()
    train(whole, one, range(8))
    train(first, two, range(1))
    second.data.copy_(first.data)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    train(second, three, range(1, 8))
    assert torch.equal(whole, second)
    assert all(torch.equal(x, three.state[second][key]) for key, x in one.state[whole].items())


def test_a_state_that_does_not_say_when_p_was_set_loads() -> None:
    """As earlier versions saved it; and with a P alone, where their first step was skipped."""
    param = nn.Parameter(torch.ones(32, 48))
    group = {"params": [param], "rank": 4, "proj_type": "continuous"}
    optimizer = osd_torch.SubspaceAdamW([group], lr=0.01)
    gradients = low_rank_gradients(4)
    for gradient in gradients[:2]:
        param.grad = gradient
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    old = copy.deepcopy(saved)
    del old["state"][0]["set_at"]
    for group in old["param_groups"]:
        group["peak_lr"] = 0.01
        del group["seen_lr"]
    weights = param.detach().clone()
    ends = []
    for state in (saved, old):
        param.data.copy_(weights)
        optimizer.load_state_dict(state)
        for gradient in gradients[2:]:
            param.grad = gradient
            optimizer.step()
        ends.append(param.detach().clone())
    assert torch.equal(*ends)
    assert optimizer.param_groups[0]["peak_lr"] is None
    old["state"] = {0: {"basis": torch.ones(32, 4)}}
    optimizer.load_state_dict(old)
    param.grad = gradients[0]
    optimizer.step()
    assert int(optimizer.state[param]["step"]) == 1


# The learning rate's peak.

Schedule = Callable[[torch.optim.Optimizer], Any]
SCHEDULES: dict[str, tuple[float | Tensor, Schedule]] = {
    "constant": (1e-2, lambda o: lr_scheduler.LambdaLR(o, lambda s: 1.0)),
    "one cycle": (1e-2, lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=60)),
    "cyclic": (1e-2, lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, step_size_up=20)),
    "growing": (1e-6, lambda o: lr_scheduler.LambdaLR(o, lambda s: 1e4 * min(1, (s + 1) / 10))),
    "shrunk": (1.0, lambda o: lr_scheduler.LambdaLR(o, lambda s: 1e-2 * min(1, (s + 1) / 10))),
    "warm-up": (1e-2, lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=10)),
    "restarts": (1e-2, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 10)),
    "one cycle from its end's rate": (
        1e-2,
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=60, final_div_factor=1),
    ),
    "plateau": (1e-2, lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2)),
    "tensor": (
        torch.tensor(1e-2),
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=60),
    ),
    "by hand": (1e-5, lambda o: ByHand(o, lambda step: 1e-2 * min(1, step / 10))),
}


class ByHand:
    """A learning rate that the training loop sets itself."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: Callable[[int], float]) -> None:
        self.optimizer, self.lr, self.steps = optimizer, lr, 0

    def step(self) -> None:
        """Before the next step of the optimizer."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.steps)


def online(lr: float | Tensor = 1e-2, **options: Any) -> tuple[nn.Parameter, Any]:
    param = nn.Parameter(torch.full((16, 24), 0.02))
    group = {"params": [param], "rank": 4, "proj_type": "continuous", **options}
    return param, osd_torch.SubspaceAdamW([group], lr=lr)


def ratios(param: nn.Parameter, optimizer: Any, scheduler: Any, steps: int = 50) -> list[float]:
    """P's step size at each step, as a part of 1 / update_proj_gap."""
    found = []
    for gradient in low_rank_gradients(steps, (16, 24)):
        param.grad = gradient
        optimizer.step()
        found.append(optimizer.projector_lr(optimizer.param_groups[0]) * GAP)
        is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        scheduler.step(1.0) if is_plateau else scheduler.step()
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULES)
def test_ps_step_size_never_exceeds_the_releases(name: str) -> None:
    lr, schedule = SCHEDULES[name]
    param, optimizer = online(copy.deepcopy(lr))
    scheduler = schedule(optimizer)
    found = ratios(param, optimizer, scheduler)
    assert 0 < max(found) <= 1 + 1e-6
    basis = optimizer.state[param]["basis"]
    # 49 steps of 1 / 200 move each column by less than that, were all of them in one direction.
    assert (basis.T @ basis - torch.eye(4)).norm() / 2 < 0.1


def test_a_schedules_known_peak_is_used_from_its_first_step() -> None:
    param, optimizer = online()
    found = ratios(param, optimizer, SCHEDULES["one cycle"][1](optimizer))
    assert found[0] == pytest.approx(1 / 25, rel=1e-5)  # OneCycleLR's div_factor
    assert max(found) == pytest.approx(1, rel=1e-2)


@pytest.mark.parametrize("one_cycle", [{}, {"final_div_factor": 1}, {"three_phase": True}])
def test_one_cycle_is_followed_to_its_end(one_cycle: dict[str, Any]) -> None:
    param, optimizer = online()
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=50, **one_cycle)
    rates = []

    class Watched:
        def step(self) -> None:
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()

    found = ratios(param, optimizer, Watched(), 49)
    assert found == pytest.approx([rate / 1e-2 for rate in rates])


@pytest.mark.parametrize("steps", [29, 25, 50])
@pytest.mark.parametrize("lr", [1e-4, 1e-9])
@pytest.mark.parametrize("keys", ["kept", "initial_lr set again", "taken away"])
def test_a_phase_of_a_lower_rate_is_seen_as_one(keys: str, lr: float, steps: int) -> None:
    """After OneCycleLR, also where the loop stopped before its end."""
    param, optimizer = online()
    scheduler = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=30 if steps < 30 else 51)
    ratios(param, optimizer, scheduler, steps)
    group = optimizer.param_groups[0]
    if keys == "initial_lr set again":
        group["initial_lr"] = lr
    elif keys == "taken away":
        del group["initial_lr"], group["max_lr"]
    group["lr"] = lr
    found = ratios(param, optimizer, ByHand(optimizer, lambda step: lr), 5)
    is_seen = keys != "kept" or lr < 1e-8 or steps != 25  # else it may be the cycle's own descent
    assert found == pytest.approx([1.0 if is_seen else lr / 1e-2] * 5)


def test_a_schedule_that_shows_a_lower_peak_corrects_the_guess(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As the schedule of "Attention Is All You Need" does, with lr=1 and absolute factors."""
    param, optimizer = online(1.0)
    factor = lambda step: 1e-3 * min((step + 1) / 10, (10 / (step + 1)) ** 0.5)
    found = ratios(param, optimizer, lr_scheduler.LambdaLR(optimizer, factor), 30)
    assert max(found[:10]) <= 1e-3
    assert found[11:] == pytest.approx([factor(step) / 1e-3 for step in range(11, 30)])
    assert "estimated as 1, but the learning rates seen so far give 0.001" in caplog.text


def test_the_peak_can_be_given() -> None:
    param, optimizer = online(peak_lr=2e-2)
    assert ratios(param, optimizer, ByHand(optimizer, lambda s: 1e-2), 3) == pytest.approx(
        [0.5] * 3
    )
    param, optimizer = online(peak_lr=1e-3)
    found = ratios(param, optimizer, ByHand(optimizer, lambda s: 1e-2), 2)
    assert found == pytest.approx([10, 10])  # asked for
    for wrong in (0, -1.0, math.inf, "a"):
        with pytest.raises(ValueError, match="peak_lr is"):
            online(peak_lr=wrong)
    with pytest.raises(ValueError, match="peak_lr is 0.01: only online PCA"):
        build(Pair(), "galore_adamw", "std", peak_lr=0.01)


def test_the_guess_is_named_once_and_its_change_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "osd_torch")
    param, optimizer = online(1e-5)
    ratios(param, optimizer, SCHEDULES["by hand"][1](optimizer), 20)
    info, warning = caplog.records
    assert info.levelno == logging.INFO
    assert "estimated as 1e-05" in info.message and "peak_lr=" in info.message
    assert warning.levelno == logging.WARNING and "estimated as 1e-05" in warning.message
    caplog.clear()
    param, optimizer = online(1e-5, peak_lr=1e-2)
    ratios(param, optimizer, SCHEDULES["by hand"][1](optimizer), 20)
    assert not caplog.records


def test_the_guess_goes_with_the_state() -> None:
    param, optimizer = online(1e-5)
    ratios(param, optimizer, SCHEDULES["by hand"][1](optimizer), 20)
    other, resumed = online(1e-5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for built in (optimizer, resumed):
        built.param_groups[0]["lr"] = 5e-3
    assert resumed.projector_lr(resumed.param_groups[0]) == pytest.approx(0.5 / GAP)


# Autocast.


@pytest.mark.parametrize("layerwise", [None, 1, 2], ids=["step", "hooks", "waiting"])
@pytest.mark.parametrize(("name", "proj_type"), EVERY_OPTIMIZER)
def test_autocast_does_not_reach_the_optimizer(
    name: str, proj_type: str, layerwise: int | None
) -> None:
    if name == "osd_muon" and layerwise == 2:
        with pytest.raises(ValueError, match="adds a part of the gradient itself"):
            osd_torch.LayerwiseUpdates(build(Pair(), name, proj_type), micro_batches=layerwise)
        return

    def run(is_inside: bool) -> list[Tensor]:
        model = Pair()
        optimizer = build(model, name, proj_type)
        autocast = lambda enabled: torch.autocast("cpu", torch.bfloat16, enabled=enabled)
        updates = None
        if layerwise:
            updates = osd_torch.LayerwiseUpdates(optimizer, micro_batches=layerwise)
        for step in range(4 * (layerwise or 1)):
            with autocast(True):
                loss = loss_of(model, step)
                with autocast(is_inside):
                    loss.backward()
                    if updates is None:
                        osd_torch.clip_(optimizer, 1.0)
                        optimizer.step()
                        optimizer.zero_grad()
                    elif (step + 1) % (layerwise or 1) == 0:
                        updates.finish()
        return everything(model, optimizer)

    assert_same(run(True), run(False))


def test_autocast_does_not_reach_the_parts_of_a_step() -> None:
    def run(is_inside: bool) -> list[Tensor]:
        model = Pair()
        optimizer = build(model, "galore_adamw", "continuous")
        for step in range(3):
            loss_of(model, step).backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=is_inside):
                for group in optimizer.param_groups:
                    for param in group["params"]:
                        if group["rank"] is None:
                            continue
                        if step == 1:
                            optimizer.accumulate(param)
                            continue
                        optimizer.refresh(group, param)
                        sketch = optimizer.project(group, param)
                        optimizer.apply(group, param, sketch)
                        param.grad = None
                optimizer.step()
            optimizer.zero_grad()
        return everything(model, optimizer)

    assert_same(run(True), run(False))


def test_a_closure_keeps_the_callers_autocast() -> None:
    model = Pair()
    optimizer = build(model, "galore_adamw", "continuous")
    seen = []

    def closure() -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
    assert seen == [True]


# Accelerate, and other wrappers.


class Wrapper(torch.optim.Optimizer):
    """What such libraries put around an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    step = property(lambda self: self.optimizer.step)
    zero_grad = property(lambda self: self.optimizer.zero_grad)


def accelerated(optimizer: torch.optim.Optimizer) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(optimizer)


WRAPPERS = {"accelerate": accelerated, "wrapper": Wrapper, "two": lambda o: Wrapper(Wrapper(o))}


@pytest.mark.parametrize(("micro_batches", "clip"), [(1, 0.0), (2, 0.0), (1, 1e-3), (2, 1e-3)])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_layerwise_updates_of_a_wrapped_optimizer(
    kind: str, micro_batches: int, clip: float
) -> None:
    def run(wrap: Callable[[Any], Any]) -> list[Tensor]:
        model = Pair()
        optimizer = build(model, "galore_adamw", "continuous")
        options = {"micro_batches": micro_batches, "grad_clipping": clip}
        with osd_torch.LayerwiseUpdates(wrap(optimizer), **options) as updates:
            for step in range(3 * micro_batches):
                (loss_of(model, step) / micro_batches).backward()
                assert model["mlp"].weight.grad is None and model["attn"].weight.grad is None
                if (step + 1) % micro_batches == 0:
                    updates.finish()
        return everything(model, optimizer)

    assert_same(run(WRAPPERS[kind]), run(lambda optimizer: optimizer))


@pytest.mark.parametrize("kind", WRAPPERS)
def test_helpers_of_a_wrapped_optimizer(kind: str) -> None:
    model = Pair()
    optimizer = build(model, "galore_adamw", "continuous")
    wrapped = WRAPPERS[kind](optimizer)
    assert osd_torch.skipped_steps(wrapped) == (0, 0)
    assert not any(P.any() for P in osd_torch.projectors(wrapped).values())
    loss_of(model, 0).backward()
    for module in model.values():
        optimizer.accumulate(module.weight)
    norm = osd_torch.clip_(wrapped, 1e-3)
    assert norm > 1e-3
    assert osd_torch.clip_(optimizer, 0) == pytest.approx(1e-3, rel=1e-2)
    wrapped.step()
    assert list(osd_torch.projectors(wrapped)) == ["mlp.weight", "attn.weight"]
    model["mlp"].weight.grad = torch.full((16, 24), math.nan)
    wrapped.step()
    assert osd_torch.skipped_steps(wrapped) == (1, 1)


def test_reduce_reaches_a_prepared_optimizer() -> None:
    model = Pair()
    optimizer = build(model, "galore_adamw", "continuous")
    prepared = accelerated(optimizer)
    calls = []

    def reduce(tensor: Tensor) -> Tensor:
        calls.append(tensor.shape)
        return tensor

    prepared.reduce = reduce
    assert optimizer.reduce is reduce and prepared.reduce is reduce
    loss_of(model, 0).backward()
    prepared.step()
    assert calls
    other = torch.optim.SGD(model.parameters())
    assert accelerated(other).reduce is None


def test_a_copy_reduces_too() -> None:
    optimizer = build(Pair(), "galore_adamw", "continuous")
    optimizer.reduce = torch.clone
    assert copy.deepcopy(optimizer).reduce is torch.clone


def test_wrappers_that_are_refused() -> None:
    model = Pair()
    optimizer = build(model, "galore_adamw", "continuous")
    other = Wrapper(optimizer)
    type_of_its_own = type("Sharder", (Wrapper,), {"param_groups": [{"params": []}]})
    for function in (osd_torch.LayerwiseUpdates, osd_torch.projectors, osd_torch.skipped_steps):
        with pytest.raises(
            ValueError, match="Sharder around a SubspaceAdamW has its own parameter groups"
        ):
            function(type_of_its_own(optimizer))
    with pytest.raises(ValueError, match="Sharder around a SubspaceAdamW"):
        osd_torch.clip_(type_of_its_own(optimizer), 1.0)
    for attribute in ("optimizer", "optim"):  # as ZeroRedundancyOptimizer has it
        shard = torch.optim.SGD([nn.Parameter(torch.zeros(2))])
        setattr(shard, attribute, optimizer)
        with pytest.raises(
            ValueError, match="SGD around a SubspaceAdamW has its own parameter groups"
        ):
            osd_torch.LayerwiseUpdates(shard, micro_batches=2)
    other.scaler = object()
    with pytest.raises(ValueError, match="Wrapper scales the loss"):
        osd_torch.LayerwiseUpdates(other)


# The state's memory, and compiled steps.


@pytest.mark.parametrize(
    ("name", "proj_type"),
    [*itertools.product(SUBSPACE_OPTIMIZERS, PROJ_TYPES), ("lion", "std"), ("adafactor", "std")],
)
def test_state_is_contiguous(name: str, proj_type: str) -> None:
    model = Pair()
    tall = nn.Parameter(torch.randn(6, 8).T)  # full rank, laid out as its transpose
    model.register_parameter("tall", tall)
    options = {"min_8bit_size": 1} if name == "galore_adamw8bit" else {}
    optimizer = build(model, name, proj_type)
    for group in optimizer.param_groups:
        group.update(options)

    def check(optimizer: torch.optim.Optimizer) -> None:
        for param, state in optimizer.state.items():
            for key, value in state.items():
                assert value.is_contiguous(), (key, tuple(param.shape))

    for step in range(3):
        loss_of(model, step).backward()
        tall.grad = torch.ones_like(tall)
        optimizer.step()
        optimizer.zero_grad()
        check(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():  # as earlier versions, or others, have written it
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim == 2:
                state[key] = value.T.contiguous().T
    before = everything(model, optimizer)
    optimizer.load_state_dict(saved)
    check(optimizer)
    assert_same(everything(model, optimizer), before)


@pytest.mark.parametrize(("name", "proj_type"), [("galore_adamw", "continuous"), ("adamw", "std")])
def test_a_compiled_step_is_the_step(name: str, proj_type: str) -> None:
    """It runs uncompiled: no page of the compiler's, and the same numbers."""

    def run(compiled: bool) -> list[Tensor]:
        model = Pair()
        optimizer = build(model, name, proj_type)
        step_of = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for step in range(3):
            loss_of(model, step).backward()
            step_of()
            optimizer.zero_grad()
        return everything(model, optimizer)

    torch.testing.assert_close(run(True), run(False))


def test_a_step_compiled_as_one_graph_says_why_it_cannot_be() -> None:
    model = Pair()
    optimizer = build(model, "galore_adamw", "continuous")
    loss_of(model, 0).backward()
    with pytest.raises(Exception, match="steps of osd_torch's optimizers run uncompiled"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
