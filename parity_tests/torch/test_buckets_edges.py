"""Stacks and capturable steps at their edges: what is absent, empty, mixed, or set later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import osd_torch
from osd_torch import SubspaceDimensionNumbers

EXPERTS = SubspaceDimensionNumbers(reduction_axis=2, output_axis=1)
ONLINE_PCA = osd_torch.online_pca(step_size=0.02)
ALONE, STACKED, CAPTURABLE = {"foreach": False}, {"foreach": True}, {"capturable": True}


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(draw(shape, i)) for i, shape in enumerate(shapes)]


def trained(
    build: Callable[..., Any],
    shapes: list[tuple[int, ...]],
    how: dict[str, Any],
    absent: tuple[tuple[int, int], ...] = (),
    steps: int = 5,
    before_step: Callable[[Any, int], object] = lambda optimizer, step: None,
) -> list[Tensor]:
    """The parameters after some steps; (index, step) pairs in `absent` have no gradient."""
    params = parameters(*shapes)
    optimizer = build(params, **how)
    for step in range(steps):
        for i, param in enumerate(params):
            param.grad = None if (i, step) in absent else draw(param.shape, 100 * step + i)
        before_step(optimizer, step)
        optimizer.step()
    return [param.detach() for param in params]


def adamw(params: list[Any], **how: Any) -> Any:
    return osd_torch.SubspaceAdamW(
        [{"params": params, "rank": 2, "basis": ONLINE_PCA}], 0.01, **how
    )


def assert_close(mine: list[Tensor], its: list[Tensor], rtol: float = 1e-5) -> None:
    for x, y in zip(mine, its, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("proj_type", ["continuous_adam8bit", "continuous"])
def test_an_8_bit_basis_of_an_expert_that_waited(proj_type: str) -> None:
    """bitsandbytes reads a number of the step, and that of P differs between the experts."""
    pytest.importorskip("bitsandbytes")
    shape = (2, 128, 96)
    stack = torch.nn.Parameter(draw(shape, 0))
    alone = [torch.nn.Parameter(x.clone()) for x in stack.detach()]
    build = lambda group: osd_torch.SubspaceAdamW(
        [{**group, "rank": 48, "proj_type": proj_type}], 0.01
    )
    of_stack = build({"params": [stack], "dimension_numbers": EXPERTS})
    of_each = build({"params": alone})
    for step in range(4):
        stack.grad = draw(shape, 10 + step)
        stack.grad[1] *= step > 1
        for param, gradient in zip(alone, stack.grad, strict=True):
            param.grad = gradient.clone()
        of_stack.step()
        of_each.step()
    assert_close(list(stack.detach()), [param.detach() for param in alone], rtol=1e-4)


def test_8_bit_experts_of_which_one_layer_had_no_gradient() -> None:
    pytest.importorskip("bitsandbytes")
    build = lambda params, **how: osd_torch.SubspaceAdamW8bit(
        [{"params": params, "rank": 16, "dimension_numbers": EXPERTS}],
        0.01, min_8bit_size=1, **how,
    )  # fmt: skip
    shapes = [(2, 32, 64), (2, 32, 64)]
    mine, its = (trained(build, shapes, how, absent=((0, 1),)) for how in (STACKED, ALONE))
    assert_close(mine, its, rtol=1e-4)


def test_experts_with_different_numbers_of_steps_round_stochastically() -> None:
    params = parameters((2, 6, 8), (2, 6, 8))
    ends = []
    for how in (STACKED, ALONE):
        own = [torch.nn.Parameter(param.detach().bfloat16()) for param in params]
        group = {"params": own, "rank": 2, "dimension_numbers": EXPERTS, "basis": ONLINE_PCA}
        optimizer = osd_torch.SubspaceAdamW([group], 1e-3, stochastic_rounding=True, **how)
        for step in range(4):
            for i, param in enumerate(own):
                is_absent = (i, step) == (0, 1)
                param.grad = None if is_absent else draw(param.shape, step).bfloat16()
            optimizer.step()
        ends.append([param.detach().float() for param in own])
    assert all((x == y).float().mean() > 0.95 for x, y in zip(*ends, strict=True))


@pytest.mark.parametrize("shape", [(0, 6, 8), (3, 0, 8)])
def test_a_stack_may_be_empty(shape: tuple[int, ...]) -> None:
    """As on a process of FSDP2 when there are fewer experts than processes."""
    build = lambda params, **how: osd_torch.SubspaceAdamW(
        [{"params": params, "rank": 2, "dimension_numbers": EXPERTS, "basis": ONLINE_PCA}],
        0.01, **how,
    )  # fmt: skip
    for how in (ALONE, STACKED):
        trained(build, [shape], how, steps=2)


@pytest.mark.parametrize("side", ["output", "input", "both"])
def test_a_bfloat16_basis_does_not_round_directions_of_float32_weights(side: str) -> None:
    basis = osd_torch.svd(100)
    build = lambda params, **how: osd_torch.SubspaceAdamW(
        [{"params": params, "rank": 4, "basis": basis, "side": side}],
        0.01, basis_dtype=torch.bfloat16, **how,
    )  # fmt: skip
    mine, its = (trained(build, [(16, 24)] * 3, how) for how in (STACKED, ALONE))
    assert_close(mine, its, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (4, 3, 2, 2), (5, 4, 3)])
def test_adafactor_at_full_rank_of_any_shape(shape: tuple[int, ...]) -> None:
    build = lambda params, **how: osd_torch.SubspaceAdafactor([{"params": params}], 0.01, **how)
    ends = [trained(build, [shape] * 2, how) for how in (ALONE, STACKED, CAPTURABLE)]
    assert_close(ends[1], ends[0])
    assert_close(ends[2], ends[0])


def test_dimension_numbers_are_those_of_projected_stacks() -> None:
    """Given with a rank, they leave matrices and parameters at full rank alone."""
    params = parameters((3, 6, 8), (8,), (6, 8))
    named = list(zip(["layers.0.experts.w", "bias", "layers.0.mlp.weight"], params, strict=True))
    by_name = osd_torch.SubspaceAdamW(named, 0.01, rank=2, dimension_numbers=EXPERTS)
    by_shape = osd_torch.SubspaceAdamW(
        params, 0.01, rank=2, dimension_numbers=EXPERTS, select=lambda name, param: param.ndim > 1
    )
    in_groups = osd_torch.SubspaceAdamW(
        [{"params": [params[0]], "rank": 2}, {"params": params[1:]}],
        0.01, dimension_numbers=EXPERTS,
    )  # fmt: skip
    for param in params:
        param.grad = torch.ones_like(param)
    for optimizer in (by_name, by_shape, in_groups):
        assert optimizer.state[params[0]]["basis"].shape[0] == 3
        optimizer.step()
    with pytest.raises(ValueError, match=r"dimension_numbers is \(2, 1\): expected"):
        osd_torch.make_optimizer(named, "galore_adamw", lr=0.01, dimension_numbers=(2, 1))


# Capturable.


def test_a_capturable_step_without_gradients_does_nothing() -> None:
    (param,) = params = parameters((6, 8))
    optimizer = adamw(params, capturable=True)
    optimizer.step()
    param.grad = draw((6, 8), 1)
    optimizer.step()
    before = param.detach().clone()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(param, before)


def test_a_capturable_step_with_empty_parameters() -> None:
    build = lambda params, **how: osd_torch.SubspaceAdamW([{"params": params}], 0.01, **how)
    for shapes in ([(0,)], [(6, 8), (0,), (1,)]):
        assert_close(*(trained(build, shapes, how) for how in (CAPTURABLE, ALONE)))


def test_a_capturable_step_refuses_sparse_gradients() -> None:
    embedding = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = osd_torch.SubspaceAdamW(embedding.parameters(), 0.01, capturable=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


def test_options_that_change_reach_a_capturable_step() -> None:
    """As schedulers of momentum change betas."""

    def change(optimizer: Any, step: int) -> None:
        optimizer.param_groups[0]["betas"] = (0.9 - 0.1 * step, 0.999)
        optimizer.param_groups[0]["weight_decay"] = 0.1 * step

    ends = [trained(adamw, [(6, 8)] * 2, how, before_step=change) for how in (CAPTURABLE, ALONE)]
    assert_close(*ends)


def test_a_state_that_is_replaced_reaches_a_capturable_step() -> None:
    """As when the moments are reset during training."""

    def reset(optimizer: Any, step: int) -> None:
        if step == 2:
            for state in optimizer.state.values():
                state["exp_avg"] = torch.zeros_like(state["exp_avg"])
        if step == 3:
            optimizer.state.clear()

    ends = [trained(adamw, [(6, 8)] * 2, how, before_step=reset) for how in (CAPTURABLE, ALONE)]
    assert_close(*ends)


def test_capturable_may_be_set_in_the_groups() -> None:
    def switch(optimizer: Any, step: int) -> None:
        optimizer.param_groups[0]["capturable"] = step in (2, 3)

    changing = trained(adamw, [(6, 8)] * 2, STACKED, before_step=switch)
    assert_close(changing, trained(adamw, [(6, 8)] * 2, ALONE))
    optimizer = adamw(parameters((6, 8)), foreach=False)
    optimizer.param_groups[0]["capturable"] = True
    with pytest.raises(osd_torch.NotCapturableError, match="foreach is False"):
        optimizer.step()


def test_the_peak_of_lr_is_observed_before_a_compiled_step() -> None:
    params = parameters((6, 8))
    optimizer = osd_torch.SubspaceAdamW(
        [{"params": params, "rank": 2, "proj_type": "continuous"}], 0.001, capturable=True
    )
    for lr in (0.001, 0.01, 0.005):
        optimizer.param_groups[0]["lr"] = lr
        params[0].grad = draw((6, 8), 1)
        optimizer.refresh_()
    assert optimizer.param_groups[0]["seen_lr"]["peak"] == 0.01


def test_refresh_does_nothing_where_the_step_does_it() -> None:
    params = parameters((6, 8))
    optimizer = adamw(params)
    params[0].grad = draw((6, 8), 1)
    optimizer.refresh_()
    assert int(optimizer.state[params[0]]["set_at"]) == -1


def test_layer_by_layer_updates_refuse_a_capturable_optimizer() -> None:
    with pytest.raises(ValueError, match="capturable is True, but layer-by-layer"):
        osd_torch.LayerwiseUpdates(adamw(parameters((6, 8)), capturable=True))


def test_parameters_on_two_devices_are_not_capturable() -> None:
    params = [torch.nn.Parameter(torch.empty(6, 8, device=device)) for device in ("cpu", "meta")]
    with pytest.raises(osd_torch.NotCapturableError, match="are on cpu, meta: expected one device"):
        adamw(params, capturable=True)
