"""Parameters of any shape: each matrix of a stack is stepped as it is alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import osd_torch
from osd_torch import SubspaceDimensionNumbers
from osd_torch.layout import from_stack, to_stack
from osd_torch.rules import SGD, Adam
from parity_tests.support.lifts import lifts_of

EXPERTS = SubspaceDimensionNumbers(reduction_axis=2, output_axis=1)
# name -> (shape, dimension numbers, its matrices written out)
Parts = Callable[[Tensor], list[Tensor]]
KINDS: dict[str, tuple[tuple[int, ...], SubspaceDimensionNumbers, Parts]] = {
    "experts (output, input)": ((3, 6, 10), EXPERTS, lambda x: list(x)),
    "experts (input, output)": (
        (3, 10, 6),
        SubspaceDimensionNumbers(reduction_axis=1, output_axis=2),
        lambda x: [each.T for each in x],
    ),
    "layers of experts": (
        (2, 2, 6, 10),
        SubspaceDimensionNumbers(3, 2),
        lambda x: list(x.flatten(0, 1)),
    ),
    "convolution": (
        (6, 3, 2, 2),
        SubspaceDimensionNumbers((1, 2, 3), 0),
        lambda x: [x.reshape(6, 12)],
    ),
    "transposed convolution": (
        (3, 6, 2, 2),
        SubspaceDimensionNumbers((0, 2, 3), 1),
        lambda x: [x.transpose(0, 1).reshape(6, 12)],
    ),
    "queries, keys and values": (
        (18, 10),
        SubspaceDimensionNumbers(1, 0, parts=3),
        lambda x: list(x.view(3, 6, 10)),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradient_of(shape: tuple[int, ...], step: int, parts: Parts) -> Tensor:
    """The second matrix, if there is one, has no gradient at first and later once."""
    gradient = draw(shape, 100 + step)
    if step in (0, 1, 7) and len(parts(gradient)) > 1:
        parts(gradient)[1].zero_()
    return gradient


def check_as_alone(kind: str, build: Callable[..., Any], steps: int = 12, **how: Any) -> None:
    shape, numbers, parts = KINDS[kind]
    stack = torch.nn.Parameter(draw(shape, 0))
    alone = [torch.nn.Parameter(x.clone()) for x in parts(stack.detach())]
    of_stack = build([{"params": [stack], "rank": 3, "dimension_numbers": numbers}], **how)
    of_each = build([{"params": alone, "rank": 3}])
    for step in range(steps):
        stack.grad = gradient_of(shape, step, parts)
        for param, gradient in zip(alone, parts(stack.grad), strict=True):
            param.grad = gradient.clone()
        of_stack.step()
        of_each.step()
    for mine, its in zip(parts(stack.detach()), alone, strict=True):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-10, atol=1e-10)
    for name, x in of_stack.state[stack].items():
        for i, param in enumerate(alone):
            its = of_each.state[param][name]
            assert x[i].shape == its.shape and x.dtype == its.dtype, name
            torch.testing.assert_close(x[i], its, rtol=1e-10, atol=1e-10)


BASES = {
    "online_pca": osd_torch.online_pca(Adam(), step_size=0.02, penalty=0.1),
    "before, every 3": osd_torch.online_pca(SGD(), step_size=0.1, order="before", every=3),
    "oja": osd_torch.oja(step_size=0.5),
    "svd": osd_torch.svd(5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("basis", BASES)
def test_each_matrix_is_stepped_as_alone(kind: str, basis: str) -> None:
    for how in ({}, {"foreach": True}, {"capturable": True}):
        check_as_alone(
            kind,
            lambda groups, **how: osd_torch.SubspaceAdamW(
                [{**group, "basis": BASES[basis]} for group in groups],
                0.01,
                weight_decay=0.1,
                transport_moments=True,
                **how,
            ),
            **how,
        )


@pytest.mark.parametrize("lift", lifts_of(osd_torch, torch.float64))
def test_each_lift(lift: str) -> None:
    made = lifts_of(osd_torch, torch.float64)[lift]
    for kind in ("experts (input, output)", "transposed convolution"):
        check_as_alone(
            kind, lambda groups, **how: osd_torch.SubspaceAdamW(
                [{**group, "lift": made} for group in groups], 0.01, **how)
        )  # fmt: skip


@pytest.mark.parametrize(
    "optimizer",
    [osd_torch.SubspaceLion, osd_torch.SubspaceAdafactor, osd_torch.SubspaceMuon],
)
def test_each_weight_rule(optimizer: Any) -> None:
    check_as_alone("experts (output, input)", lambda groups, **how: optimizer(groups, 0.01, **how))


@pytest.mark.parametrize("shape", [(3, 32, 64), (3, 31, 33)])
def test_8_bit_moments_of_each_matrix_have_their_own_blocks(shape: tuple[int, ...]) -> None:
    pytest.importorskip("bitsandbytes")
    stack = torch.nn.Parameter(draw(shape, 0).float())
    alone = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    build = lambda group: osd_torch.SubspaceAdamW8bit(
        [{**group, "rank": 16, "proj_type": "continuous_adam8bit"}], 0.01, min_8bit_size=1
    )
    of_stack, of_each = (
        build({"params": [stack], "dimension_numbers": EXPERTS}),
        build({"params": alone}),
    )
    for step in range(5):
        stack.grad = draw(shape, step).float()
        for param, gradient in zip(alone, stack.grad, strict=True):
            param.grad = gradient.clone()
        of_stack.step()
        of_each.step()
    assert of_stack.state[stack]["exp_avg"].dtype == torch.uint8
    for mine, its in zip(stack.detach(), alone, strict=True):
        torch.testing.assert_close(mine, its.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_views_and_back(kind: str) -> None:
    shape, numbers, parts = KINDS[kind]
    array = draw(shape, 3)
    stack = to_stack(array, numbers)
    assert all(map(torch.equal, stack, parts(array)))
    assert torch.equal(from_stack(stack, numbers, shape), array)


def test_an_expert_with_nan_skips_the_step() -> None:
    stack = torch.nn.Parameter(draw((3, 6, 10), 0))
    optimizer = osd_torch.SubspaceAdamW(
        [{"params": [stack], "rank": 3, "dimension_numbers": EXPERTS}], 0.01
    )
    before = stack.detach().clone()
    stack.grad = draw((3, 6, 10), 1)
    stack.grad[1, 0, 0] = torch.nan
    optimizer.step()
    assert torch.equal(stack, before) and osd_torch.skipped_steps(optimizer) == (1, 1)


def test_saved_and_resumed_bit_for_bit() -> None:
    ends = []
    for cut in (None, 5):
        stack = torch.nn.Parameter(draw((3, 6, 10), 0))
        build = lambda stack=stack: osd_torch.SubspaceAdamW(
            [{"params": [stack], "rank": 3, "dimension_numbers": EXPERTS}], 0.01
        )
        optimizer = build()
        for step in range(10):
            if step == cut:
                memory = io.BytesIO()
                torch.save(optimizer.state_dict(), memory)
                memory.seek(0)
                optimizer = build()
                optimizer.load_state_dict(torch.load(memory))
            stack.grad = gradient_of((3, 6, 10), step, list)
            optimizer.step()
        ends.append([stack, *optimizer.state[stack].values()])
    assert all(map(torch.equal, *ends))


def test_sketches_of_micro_batches() -> None:
    stacks = [torch.nn.Parameter(draw((3, 6, 10), 0)) for _ in range(2)]
    built = [
        osd_torch.SubspaceAdamW(
            [{"params": [stack], "rank": 3, "dimension_numbers": EXPERTS}], 0.01,
            basis=osd_torch.svd(4),
        )
        for stack in stacks
    ]  # fmt: skip
    for step in range(1, 6):
        gradient = gradient_of((3, 6, 10), step, list)
        stacks[0].grad = gradient
        for part in (gradient / 4, 3 * gradient / 4):
            stacks[1].grad = part
            built[1].accumulate(stacks[1], 0.5)
        for optimizer in built:
            optimizer.step()
    torch.testing.assert_close(*stacks, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({}, "which is not a matrix"),
        ({"dimension_numbers": SubspaceDimensionNumbers(3, 1)}, "expected two disjoint"),
        ({"dimension_numbers": SubspaceDimensionNumbers(1, 1)}, "expected two disjoint"),
        ({"dimension_numbers": SubspaceDimensionNumbers(2, 1, parts=4)}, "expected parts"),
        ({"dimension_numbers": (2, 1)}, "expected SubspaceDimensionNumbers"),
        (
            {
                "dimension_numbers": EXPERTS,
                "lift": osd_torch.Lift(lambda D, seen: osd_torch.Lifted(D)),
            },
            "does not accept stacks",
        ),
    ],
)  # fmt: skip
def test_what_is_not_a_stack_is_refused(group: dict[str, Any], message: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, 6, 10))
    with pytest.raises(ValueError, match=message):
        osd_torch.SubspaceAdamW([{"params": [param], "rank": 2, **group}])
