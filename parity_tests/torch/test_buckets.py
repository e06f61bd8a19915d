"""Matrices of one shape stepped together as stacks equal the same bucket stepped one by one."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import osd_torch
from osd_torch.buckets import in_buckets
from osd_torch.rules import SGD, Adam, Lion, Trace
from parity_tests.support.combinations import PROJ_TYPES, RULES
from parity_tests.support.lifts import lifts_of

SHAPES = [(6, 10), (10, 6), (6, 10), (8, 8), (6, 10), (8, 8), (7,), (6, 10), (6, 10), (10, 6), (7,)]
STEPS = 20
# The two ways sum the same products in another order: float64's rounding, over 20 steps.
TOLERANCE = 1e-10


@pytest.fixture(autouse=True)
def _float64(one_thread: None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def weights(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda shape: torch.randn(shape, generator=generator).to(dtype)
    return [torch.nn.Parameter(draw(shape)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    """At some steps one matrix has a zero gradient, one none, and one is stepped later."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, param in enumerate(params):
        gradient = torch.randn(param.shape, generator=generator).to(param.dtype)
        is_zero = (i, step) in ((0, 0), (0, 1), (2, 9))
        is_absent = (i, step) in ((3, 5), (4, 0))
        param.grad = None if is_absent else gradient * (0 if is_zero else 1)


def named(params: list[torch.nn.Parameter]) -> list[tuple[str, Tensor]]:
    return [(f"{i}.mlp.weight" if x.ndim == 2 else f"{i}.norm", x) for i, x in enumerate(params)]


def trajectory(build: Any, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[Any]:
    params = weights(dtype)
    optimizer = build(named(params))
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    return [*params, *(x for each in state.values() for x in each.values())]


def assert_equal_both_ways(build: Any, **options: Any) -> None:
    one_by_one = trajectory(lambda pairs: build(pairs, foreach=False), **options)
    together = trajectory(lambda pairs: build(pairs, foreach=True), **options)
    assert_equal(together, one_by_one)


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    for mine, its in zip(found, wanted, strict=True):
        assert mine.shape == its.shape and mine.dtype == its.dtype
        error = (mine.double() - its.double()).abs().max() / its.double().abs().max().clamp(min=1)
        assert error <= TOLERANCE


COMBINATIONS = [
    (rule, proj_type)
    for rule in RULES
    for proj_type in PROJ_TYPES
    # An SVD of G makes U^T G V diagonal: the sign of what is zero elsewhere is that of rounding.
    if (rule, proj_type) != ("lion, sign in subspace", "full")
]


def build_published(pairs: Any, rule: str, proj_type: str, **how: Any) -> Any:
    optimizer, options = RULES[rule]
    lr = torch.tensor(0.01) if how.get("capturable") else 0.01
    peak = {"peak_lr": 0.01} if proj_type.startswith(("continuous", "oja")) else {}
    return osd_torch.make_optimizer(
        pairs, optimizer, proj_type, lr=lr, rank=3, update_proj_gap=6, weight_decay=0.1,
        **peak, **options, **how,
    )  # fmt: skip


def published_trajectory(rule: str, proj_type: str, **how: bool) -> list[Any]:
    return trajectory(lambda pairs: build_published(pairs, rule, proj_type, **how))


@functools.cache
def one_by_one(rule: str, proj_type: str) -> list[Any]:
    """What the stacks and the steps without the host are compared with."""
    return published_trajectory(rule, proj_type, foreach=False)


@pytest.mark.parametrize(("rule", "proj_type"), COMBINATIONS)
def test_every_published_combination(rule: str, proj_type: str) -> None:
    together = published_trajectory(rule, proj_type, foreach=True)
    assert_equal(together, one_by_one(rule, proj_type))


LIFTS = lifts_of(osd_torch, torch.float64)
BASES = {
    "online_pca": osd_torch.online_pca(Adam(), step_size=0.02, penalty=0.1, weight_decay=0.01),
    "before, every 3": osd_torch.online_pca(SGD(), step_size=0.1, order="before", every=3),
    "oja": osd_torch.oja(step_size=0.5, every=2),
    "svd": osd_torch.svd(6),
    "gaussian": osd_torch.gaussian(7),
}


@pytest.mark.parametrize("lift", LIFTS)
def test_every_lift(lift: str) -> None:
    for basis in BASES.values():
        assert_equal_both_ways(
            lambda pairs, basis=basis, **how: osd_torch.SubspaceAdamW(
                pairs, 0.01, rank=3, basis=basis, lift=LIFTS[lift], **how
            )
        )


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("rule", [Adam(), Lion(), Trace(0.9, nesterov=True), SGD()], ids=str)
def test_moments_carried_over(basis: str, rule: Any) -> None:
    assert_equal_both_ways(
        lambda pairs, **how: osd_torch.OnlineSubspaceDescent(
            pairs, 0.01, rule=rule, rank=3, basis=BASES[basis], transport_moments=True, **how
        )
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "lion", "adafactor", "muon"])
def test_full_rank_optimizers(optimizer: str) -> None:
    """In bfloat16 these are osd_torch's own; a weight may round the other way."""
    build = lambda pairs, **how: osd_torch.make_optimizer(
        pairs, optimizer, lr=0.01, weight_decay=0.1, **how
    )
    one_by_one, together = (
        trajectory(lambda pairs, how=how: build(pairs, foreach=how), dtype=torch.bfloat16)
        for how in (False, True)
    )
    for mine, its in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(mine, its, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("stochastic_rounding", [False, True])
def test_bfloat16_weights_round_once(stochastic_rounding: bool) -> None:
    """The stack adds to the weight in float32, as a matrix does, and draws the same bits."""
    ends = [
        trajectory(
            lambda pairs, how=how: osd_torch.make_optimizer(
                pairs, "osd_muon", "oja", lr=0.01, rank=3, foreach=how,
                stochastic_rounding=stochastic_rounding,
            ),
            dtype=torch.bfloat16,
        )
        for how in (False, True)
    ]  # fmt: skip
    same = [bool((mine == its).float().mean() > 0.9) for mine, its in zip(*ends, strict=True)]
    assert all(same[: len(SHAPES)])


def test_8_bit_moments_are_stacked_where_no_block_spans_two_matrices() -> None:
    pytest.importorskip("bitsandbytes")

    def build(pairs: Any, how: bool) -> Any:
        return osd_torch.SubspaceAdamW8bit(
            pairs,
            0.01,
            rank=16,
            select=lambda name, param: True,
            min_8bit_size=1,
            basis=osd_torch.svd(50),
            foreach=how,
        )

    for shape, is_stacked in (((32, 64), True), ((32, 65), False)):
        ends = []
        for how in (False, True):
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(shape).float()) for _ in range(3)]
            optimizer = build([(f"{i}.weight", x) for i, x in enumerate(params)], how)
            for _ in range(5):
                for param in params:
                    param.grad = torch.randn(shape).float()
                optimizer.step()
            ends.append([*params, *(x for s in optimizer.state.values() for x in s.values())])
        assert len(in_buckets(optimizer, optimizer.param_groups[0], params, {})) == (
            1 if is_stacked else 3
        )
        for mine, its in zip(*ends, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


class Launches(TorchDispatchMode):
    """Counts the operations that start work on a device: not views, allocations and host reads."""

    FREE = ("empty", "_unsafe_view", "promote_types", "profiler", "_local_scalar_dense")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_free = func.is_view or any(name in str(func) for name in self.FREE)
        self.count += not is_free
        return func(*args, **(kwargs or {}))


def launches(layers: int, optimizer: str, proj_type: str, width: int = 16, **how: Any) -> int:
    """Of one step of the matrices of a LLaMA with this number of layers, seven each."""
    hidden = 5 * width // 2
    shapes = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes * layers]
    pairs = [(f"{i}.mlp.weight", param) for i, param in enumerate(params)]
    built = osd_torch.make_optimizer(pairs, optimizer, proj_type, lr=0.01, rank=width // 4, **how)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn_like(param)
        with Launches() as counted:
            built.step()
    return counted.count


@pytest.mark.parametrize(
    ("optimizer", "proj_type", "most"),
    [
        ("galore_adamw", "continuous", 120),
        ("galore_adamw", "std", 60),
        ("galore_lion", "continuous", 130),
        ("galore_adafactor", "continuous", 180),
        ("osd_muon", "continuous_sgd", 200),
    ],
)
def test_launches_do_not_grow_with_the_layers(optimizer: str, proj_type: str, most: int) -> None:
    """60M has 8 layers, 350M has 24."""
    of_60m, of_350m = (launches(n, optimizer, proj_type, foreach=True) for n in (8, 24))
    print(f"{optimizer} {proj_type}: {of_60m} launches")
    assert of_60m == of_350m <= most
    one_by_one = launches(8, optimizer, proj_type, foreach=False)
    assert one_by_one > 4 * of_60m > 0  # the counter counts


@pytest.mark.parametrize(
    ("proj_type", "most"), [("continuous_adam8bit", 140), ("continuous_sgd", 120), ("std", 60)]
)
def test_launches_of_8_bit_state_do_not_grow_with_the_layers(proj_type: str, most: int) -> None:
    """Matrices large enough for 8 bits."""
    args = ("galore_adamw8bit", proj_type, 256)
    of_two, of_four = (launches(n, *args, foreach=True) for n in (2, 4))
    print(f"galore_adamw8bit {proj_type}: {of_two} launches")
    assert of_two == of_four <= most
    assert launches(4, *args, foreach=False) > 3 * of_four > 0  # the counter counts


def test_states_are_views_that_load_and_copy() -> None:
    """state_dict has the same keys and shapes, and continues bit for bit, whatever foreach is."""
    build = lambda pairs, how: build_published(pairs, "adamw", "continuous", foreach=how)
    params = weights()
    first = build(named(params), True)
    for step in range(6):
        set_gradients(params, step)
        first.step()
    moment = first.state[params[7]]["exp_avg"]
    assert moment.untyped_storage().nbytes() == 3 * moment.nbytes  # a view of a stack of three
    memory = io.BytesIO()
    torch.save(first.state_dict(), memory)
    memory.seek(0)
    saved = torch.load(memory)
    ends = []
    for how in (True, False):
        own = [torch.nn.Parameter(param.detach().clone()) for param in params]
        second = build(named(own), how)
        second.load_state_dict(saved)
        assert all(group["foreach"] is how for group in second.param_groups)
        kinds = lambda optimizer: [
            {k: (x.shape, x.dtype) for k, x in s.items()} for s in optimizer.state.values()
        ]
        assert kinds(first) == kinds(second)
        ends.append((own, second))
    copied = copy.deepcopy((params, first))
    pickled = pickle.loads(pickle.dumps((params, first)))
    for step in range(6, 12):
        for own, optimizer in [(params, first), *ends, copied, pickled]:
            set_gradients(own, step)
            optimizer.step()
    for own, _ in (ends[0], copied, pickled):
        assert all(map(torch.equal, own, params))
    for mine, its in zip(ends[1][0], params, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_a_group_joins_and_a_rule_of_a_user_is_stepped_alone() -> None:
    def build(pairs: Any, **how: Any) -> Any:
        mine = osd_torch.Lift(lambda D, seen: osd_torch.Lifted(D / (1 + D.abs().max())))
        optimizer = osd_torch.SubspaceAdamW(pairs[:3], 0.01, rank=2, lift=mine, **how)
        optimizer.add_param_group({"params": pairs[3:6], "rank": 3, "lift": None})
        assert len(in_buckets(optimizer, optimizer.param_groups[0], [pairs[0][1]], {})) == 1
        return optimizer

    assert_equal_both_ways(build)
    params = weights()
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = build(named(params), foreach=True)
    sizes = [
        sorted(len(bucket.params) for bucket in in_buckets(optimizer, group, group["params"], {}))
        for group in (optimizer.param_groups[0], optimizer.param_groups[-1])
    ]
    assert sizes == [[1, 1, 1], [1, 2]]


def test_held_sketches_are_applied_together() -> None:
    def build(pairs: Any, **how: Any) -> Any:
        optimizer = build_published(pairs, "adamw", "continuous", **how)
        take = optimizer.step

        def step() -> None:
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if param.grad is not None and group["rank"] is not None:
                        gradient = param.grad
                        for part in (gradient * 0.25, gradient * 0.75):
                            param.grad = part
                            optimizer.accumulate(param, 0.5)
            take()

        optimizer.step = step
        return optimizer

    assert_equal_both_ways(build)


# Capturable.


@pytest.mark.parametrize(("rule", "proj_type"), COMBINATIONS)
def test_capturable_steps_are_the_same(rule: str, proj_type: str) -> None:
    on_device = published_trajectory(rule, proj_type, capturable=True)
    assert_equal(on_device, one_by_one(rule, proj_type))


@pytest.mark.parametrize("lift", LIFTS)
def test_capturable_lifts(lift: str) -> None:
    for basis in (BASES["online_pca"], BASES["before, every 3"]):
        build = lambda pairs, basis=basis, **how: osd_torch.SubspaceAdamW(
            pairs, 0.01, rank=3, basis=basis, lift=LIFTS[lift], transport_moments=True, **how
        )
        on_host = trajectory(lambda pairs, build=build: build(pairs, foreach=False))
        on_device = trajectory(lambda pairs, build=build: build(pairs, capturable=True))
        for mine, its in zip(on_device, on_host, strict=True):
            torch.testing.assert_close(mine, its, rtol=TOLERANCE, atol=TOLERANCE)


class NoHost(TorchDispatchMode):
    """Raises where the host reads a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number"
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {x.device.type for x in (args[0], out) if isinstance(x, Tensor)}
            assert len(devices) == 1, "a tensor is copied to or from the host"
        return out


@pytest.mark.parametrize(
    ("rule", "proj_type"), [("adamw", "continuous"), ("muon", "oja"), ("lion", "std")]
)
def test_capturable_steps_read_nothing_on_the_host(rule: str, proj_type: str) -> None:
    params = weights()
    optimizer = build_published(named(params), rule, proj_type, capturable=True)
    optimizer.param_groups[0]["update_proj_gap"] = 100
    set_gradients(params, 50)
    optimizer.step()  # sets P
    for step in range(20):
        set_gradients(params, 51 + step)
        if step == 3:
            params[1].grad.fill_(torch.nan)
        if step == 4:
            before = [param.clone() for param in params]
        with NoHost():
            optimizer.step()
        if step == 3:
            counted = osd_torch.skipped_steps(optimizer)
    assert counted == (1, 1) and osd_torch.skipped_steps(optimizer) == (1, 0)
    assert not any(map(torch.equal, params, before))


def test_a_capturable_step_with_a_non_finite_gradient_changes_nothing() -> None:
    for value in (torch.nan, torch.inf):
        params = weights()
        optimizer = build_published(named(params), "adamw", "continuous", capturable=True)
        for step in range(3):
            set_gradients(params, 50 + step)
            if step == 2:
                params[4].grad[0, 0] = value
            before = copy.deepcopy((params, optimizer.state_dict()["state"]))
            optimizer.step()
        assert all(map(torch.equal, params, before[0]))
        for index, state in optimizer.state_dict()["state"].items():
            for name, x in state.items():
                assert torch.equal(x, before[1][index][name]), name


@pytest.mark.parametrize(
    ("rule", "proj_type", "backend"),
    [
        ("adamw", "continuous", "aot_eager"),
        ("muon", "continuous_sgd", "eager"),
        ("adafactor", "std", "eager"),
    ],
)
def test_a_capturable_step_compiles_once(rule: str, proj_type: str, backend: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    ends, counter, compiled = [], CompileCounterWithBackend(backend), 0
    for is_compiled in (False, True):
        params = weights()
        optimizer = build_published(named(params), rule, proj_type, capturable=True)
        take = optimizer.step
        if is_compiled:
            torch._dynamo.reset()
            take = torch.compile(optimizer.step, backend=counter, fullgraph=True)
        for step in range(8):
            optimizer.param_groups[0]["lr"].fill_(0.01 * (1 - step / 20))
            set_gradients(params, 50 + step)
            optimizer.refresh_()
            take()
            compiled = counter.frame_count if step == 0 else compiled
        ends.append([*params, *(x for s in optimizer.state.values() for x in s.values())])
    assert counter.frame_count == compiled > 0
    for mine, its in zip(*ends, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-12)


def test_a_compiled_step_before_the_first_refresh_says_what_to_call() -> None:
    params = weights()
    optimizer = build_published(named(params), "adamw", "std", capturable=True)
    set_gradients(params, 50)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"optimizer.refresh_\(\)"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foreach": False}, "foreach is False"),
        ({"stochastic_rounding": True}, "stochastic_rounding is True"),
        ({"optimizer": "galore_adamw8bit"}, "Adam8bit"),
        ({"second_moment": "row"}, "AdamOfRows"),
        ({"optimizer": "sgd"}, "optimizer='sgd'"),
        ({"capturable": "yes"}, "capturable is 'yes'"),
        ({"lr": torch.tensor(0.01), "peak_lr": None}, "peak_lr"),
    ],
)
def test_what_is_not_capturable_is_refused_by_name(options: Any, message: str) -> None:
    given: dict[str, Any] = {
        "optimizer": "galore_adamw", "proj_type": "continuous", "lr": 0.01, "rank": 3,
        "capturable": True,
    }  # fmt: skip
    if options.get("optimizer") == "sgd":
        given.pop("proj_type")
    with pytest.raises(ValueError, match=message):
        osd_torch.make_optimizer(named(weights()), **{**given, **options})


@pytest.mark.parametrize("name", ["maximize", "differentiable"])
def test_options_of_torch_that_are_refused_by_name(name: str) -> None:
    with pytest.raises((TypeError, ValueError), match=name):
        osd_torch.SubspaceAdamW(named(weights()), 0.01, rank=3, **{name: True})
