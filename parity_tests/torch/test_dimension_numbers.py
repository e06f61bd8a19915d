"""Parameters of any shape: each matrix of a stack is stepped as it is alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

import osd_torch
from osd_torch import SubspaceDimensionNumbers
from osd_torch.layout import from_stack, to_stack
from osd_torch.rules import SGD, Adam
from osd_torch.sharding import whole
from parity_tests.support.lifts import lifts_of
from parity_tests.support.two_processes import Run

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


# Models.

SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 16,
    "num_experts_per_tok": 2,
}  # fmt: skip
MIXTURES = {
    "Mixtral": {**SMALL, "num_local_experts": 4},
    "Qwen2Moe": {
        **SMALL, "num_experts": 4, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
    },
    "GptOss": {**SMALL, "num_local_experts": 4, "head_dim": 8},
}  # fmt: skip


def mixture(name: str, seed: int = 0) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**MIXTURES[name])
    config._experts_implementation = "eager"  # the grouped product has no float64
    return getattr(transformers, f"{name}ForCausalLM")(config).double()


def loss_of(model: torch.nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 32, (1, 6), generator=generator)  # few: some expert gets none
    return model(input_ids=tokens, labels=tokens).loss


def build_for(model: torch.nn.Module, **how: Any) -> Any:
    return osd_torch.make_optimizer(
        model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4, weight_decay=0.1,
        peak_lr=0.01, **how,
    )  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_each_expert_of_a_model_is_stepped_as_alone(name: str) -> None:
    """50 steps, with the gradients of the stacks given to their matrices one by one."""
    model = mixture(name)
    optimizer = build_for(model)
    stacks = {n: p for n, p in model.named_parameters() if "experts." in n and p.ndim == 3}
    assert len(stacks) == 4 and stacks.keys() <= osd_torch.projectors(optimizer).keys()
    numbers = SubspaceDimensionNumbers(*((1, 2) if name == "GptOss" else (2, 1)))
    matrices = lambda x: to_stack(x, numbers).contiguous()
    alone = {
        n: [torch.nn.Parameter(x.clone()) for x in matrices(p.detach())] for n, p in stacks.items()
    }
    of_each = osd_torch.make_optimizer(
        [(f"{n}.{i}.mlp", x) for n, several in alone.items() for i, x in enumerate(several)],
        "galore_adamw", "continuous", lr=0.01, rank=4, weight_decay=0.1, peak_lr=0.01,
    )  # fmt: skip
    first, idle = float(loss_of(model, 0)), 0
    for step in range(50):
        optimizer.zero_grad()
        loss_of(model, step % 4).backward()
        for n, several in alone.items():
            for param, gradient in zip(several, matrices(stacks[n].grad), strict=True):
                param.grad = gradient.clone()
                idle += not gradient.any()
        optimizer.step()
        of_each.step()
    assert idle > 0  # some expert had no token
    assert float(loss_of(model, 0)) < first
    for n, several in alone.items():
        for mine, its in zip(matrices(stacks[n].detach()), several, strict=True):
            torch.testing.assert_close(mine, its.detach(), rtol=1e-8, atol=1e-8)


def test_a_model_with_experts_resumes_bit_for_bit() -> None:
    ends = []
    for cut in (None, 4):
        model = mixture("Qwen2Moe")
        optimizer = build_for(model)
        for step in range(8):
            if step == cut:
                memory = io.BytesIO()
                torch.save((model.state_dict(), optimizer.state_dict()), memory)
                memory.seek(0)
                weights, state = torch.load(memory)
                model = mixture("Qwen2Moe", seed=1)
                model.load_state_dict(weights)
                optimizer = build_for(model)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
        ends.append(list(model.parameters()))
    assert all(map(torch.equal, *ends))


def test_a_convolutional_net_trains() -> None:
    """Its kernels by name, and equal to their matrices."""
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    for i, (n_in, n_out) in enumerate(((3, 8), (8, 12))):
        net.add_module(f"conv{i}", torch.nn.Conv2d(n_in, n_out, 3))
        net.add_module(f"relu{i}", torch.nn.ReLU())
    net.double()
    kernels = [net.conv0.weight, net.conv1.weight]
    alone = [torch.nn.Parameter(x.detach().flatten(1).clone()) for x in kernels]
    options: dict[str, Any] = {"lr": 0.01, "rank": 4, "peak_lr": 0.01}
    optimizer = osd_torch.make_optimizer(
        net.named_parameters(), "galore_adamw", "continuous",
        select=lambda name, param: param.ndim == 4, **options,
    )  # fmt: skip
    of_each = osd_torch.make_optimizer(
        [(f"{i}.mlp", x) for i, x in enumerate(alone)], "galore_adamw", "continuous", **options
    )
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (net(draw((2, 3, 9, 9), 5)) - 1).square().mean()
        loss.backward()
        losses.append(loss.item())
        for param, kernel in zip(alone, kernels, strict=True):
            param.grad = kernel.grad.flatten(1).clone()
        optimizer.step()
        of_each.step()
    assert losses[-1] < losses[0] / 2
    for kernel, param in zip(kernels, alone, strict=True):
        torch.testing.assert_close(kernel.flatten(1), param, rtol=1e-9, atol=1e-9)


def test_the_axes_that_names_and_shapes_give() -> None:
    for name, expected in (("Mixtral", (2, 1)), ("GptOss", (1, 2))):
        optimizer = build_for(mixture(name))
        found = {group["dimension_numbers"] for group in optimizer.param_groups}
        assert found == {None, SubspaceDimensionNumbers(*expected)}
    kernel = torch.nn.Parameter(torch.ones(4, 3, 5))
    with pytest.raises(ValueError, match="nothing says which of its axes form matrices"):
        osd_torch.make_optimizer(
            [("layers.0.mix", kernel)], "galore_adamw", lr=0.1, select=lambda name, param: True
        )


# Sharded over two processes: each of them steps its own experts.


def train_mixture(is_sharded: bool) -> dict[str, Tensor]:
    model = mixture("Mixtral")
    if is_sharded:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_for(model)
    for step in range(6):
        if step == 3:
            saved = get_optimizer_state_dict(model, optimizer)
            optimizer = build_for(model)
            set_optimizer_state_dict(model, optimizer, saved)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return {name: whole(param.detach()).clone() for name, param in model.named_parameters()}


def test_experts_sharded_over_two_processes(two_processes: Run) -> None:
    """As in one process, through torch.distributed.checkpoint's state dicts."""
    expected = train_mixture(False)
    for found in two_processes(train_mixture, True):
        for name, param in expected.items():
            torch.testing.assert_close(found[name], param, rtol=1e-9, atol=1e-9)
