"""osd_torch on two processes compared with one: DDP, FSDP2, reduced sketches, layer by layer."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import osd_torch
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, SUBSPACE_OPTIMIZERS
from osd_torch.llama import checkpoint, fully_shard_llama
from osd_torch.quantization import BLOCK_SIZE, code_books
from osd_torch.rules import SGD
from osd_torch.sharding import whole
from osd_torch.sketch import make_sketch
from osd_torch.state import ON_HOST
from parity_tests.support.two_processes import WORLD, Run

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

# A tiny LLaMA, for 20 steps.

STEPS, ROWS, LENGTH, VOCABULARY = 20, 32, 32, 301
# Rounding flips the sign of an entry that is almost zero, which moves a weight by 2 lr: at 1e-3
# that moves a loss by 7e-5.
LR = {"galore_lion": 2e-4}
MODES = ("ddp", "fsdp", "compressed", "layerwise")


def make_llama() -> torch.nn.Module:
    """With 45 rows in the MLP and 301 in the head, neither divisible by 2."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def batch(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 40, (ROWS, LENGTH), generator=generator)
    return tokens.cumsum(1) % VOCABULARY


class Outcome(NamedTuple):
    """What a run leaves: the total batch's losses, the optimizer's count, weights that differ."""

    losses: list[float]
    skipped: tuple[int, int]
    moved: list[str]


def train_llama(
    mode: str,
    optimizer: str,
    proj_type: str,
    steps: int = STEPS,
    nan_steps: tuple[int, ...] = (),
    with_unused: bool = False,
    micro_batches: int = 1,
) -> Outcome:
    """Trains on one process or on both.

    Args:
        mode: "one", one of `MODES`, or "fsdp, gathered once".
        optimizer: Published name.
        proj_type: Published name.
        steps: How many.
        nan_steps: Those whose gradient is NaN, on the last process only.
        with_unused: Adds a projected weight that no batch reaches.
        micro_batches: To an update; more than one go layer by layer, and are clipped.
    """
    rank, world = (0, 1) if mode == "one" else (dist.get_rank(), WORLD)
    model = make_llama()
    if with_unused:
        model.model.layers[0].mlp.unused = torch.nn.Linear(32, 24)
    start = {name: param.detach().clone() for name, param in model.named_parameters()}
    if mode.startswith("fsdp"):
        fully_shard_llama(model, reshard_after_forward=mode == "fsdp")
    forward = osd_torch.data_parallel(model) if mode == "ddp" else model
    built = osd_torch.make_optimizer(
        model.named_parameters(),
        optimizer,
        proj_type,
        lr=LR.get(optimizer, 0.01),
        rank=8,
        update_proj_gap=200 if proj_type.startswith("continuous") else 8,  # a refresh or two
        weight_decay=0.01,
    )
    reduce = None if mode == "one" else osd_torch.mean_over_processes()
    updates = None
    if mode == "layerwise" or micro_batches > 1:
        clipping = 1.0 if micro_batches > 1 else 0.0
        updates = osd_torch.LayerwiseUpdates(
            built, micro_batches=micro_batches, grad_clipping=clipping, reduce=reduce
        )
    if mode == "compressed":
        built.reduce = reduce
    losses = []
    for step in range(steps):
        is_nan = step in nan_steps and rank == world - 1
        loss = torch.zeros(())
        for rows in batch(step).chunk(micro_batches):
            tokens = rows[rank::world]
            part = forward(input_ids=tokens, labels=tokens).loss / micro_batches
            (part * math.nan if is_nan else part).backward()
            loss += part.detach()
        if updates:
            updates.finish()
        else:
            osd_torch.clip_(built, 0)
            built.step()
            built.zero_grad()
        losses.append(reduce(loss) if reduce else loss)
    moved = [n for n, p in model.named_parameters() if not torch.equal(start[n], whole(p.detach()))]
    return Outcome(torch.stack(losses).tolist(), osd_torch.skipped_steps(built), moved)


one_process = functools.cache(functools.partial(train_llama, "one"))


def assert_as_on_one(two_processes: Run, mode: str, *args: Any) -> None:
    first, second = two_processes(train_llama, mode, *args)
    expected = one_process(*args)
    assert first == second
    assert first[1:] == expected[1:]
    # Codes of the embedding's and the head's moments: `assert_close_8bit`'s probability is 1e-5 for
    # each of 20 steps, 4 moments and 9,632 codes, which makes 8. One moves a weight by at most a
    # step, 0.01, and the loss by 0.01 of the gradient's entry, of about 1 / sqrt(19,264): 2e-4.
    tolerance = 1e-3 if "8bit" in args[0] else 1e-4
    assert first.losses == pytest.approx(expected.losses, rel=0, abs=tolerance)


@pytest.mark.parametrize(
    ("mode", "optimizer", "proj_type"),
    [
        *itertools.product(MODES, ["galore_adamw"], ["std", "continuous"]),
        ("compressed", "galore_lion", "random"),
        ("compressed", "galore_adamw8bit", "continuous_adam8bit"),
        ("layerwise", "galore_adafactor", "std"),
        ("layerwise", "adamw", "std"),
        ("fsdp", "galore_lion", "continuous_lion"),
        ("fsdp", "galore_adafactor", "continuous_adafactor"),
        ("fsdp", "galore_adamw8bit", "continuous_adam8bit"),
        ("fsdp", "adamw", "std"),
        ("fsdp, gathered once", "galore_adamw", "continuous"),
    ],
)
def test_losses_of_two_processes_are_those_of_one(
    two_processes: Run, mode: str, optimizer: str, proj_type: str
) -> None:
    """At the same total batch of 32 rows, over 20 steps in float32."""
    assert_as_on_one(two_processes, mode, optimizer, proj_type)


def gathers_of_a_step(reshard_after_forward: bool) -> int:
    """The number of all-gathers of weights in a forward and a backward pass."""
    model = fully_shard_llama(make_llama(), reshard_after_forward=reshard_after_forward)
    with CommDebugMode() as communication:
        model(input_ids=batch(0), labels=batch(0)).loss.backward()
    counts = communication.get_comm_counts()
    return sum(count for op, count in counts.items() if "allgather" in str(op))


def test_weights_are_gathered_once_or_twice(two_processes: Run) -> None:
    """Two layers and the root, which keeps its weights; FSDP2 counts a group as one all-gather."""
    assert two_processes(gathers_of_a_step, True) == [5, 5]
    assert two_processes(gathers_of_a_step, False) == [3, 3]


@pytest.mark.parametrize("proj_type", ["std", "continuous"])
def test_micro_batches_layer_by_layer_on_two_processes(two_processes: Run, proj_type: str) -> None:
    assert_as_on_one(two_processes, "layerwise", "galore_adamw", proj_type, STEPS, (), False, 2)


@pytest.mark.parametrize("mode", MODES)
def test_nan_on_one_process_skips_one_step_on_both(two_processes: Run, mode: str) -> None:
    """At the first step, where there is no P yet, in between, and twice in a row."""
    args = ("galore_adamw", "continuous", 6, (0, 2, 3))
    assert one_process(*args).skipped == (3, 0)
    assert_as_on_one(two_processes, mode, *args)


@pytest.mark.parametrize("mode", ["fsdp", "compressed", "layerwise"])
def test_a_parameter_without_gradient_is_left_alone(two_processes: Run, mode: str) -> None:
    args = ("galore_adamw", "std", 3, (), True)
    assert_as_on_one(two_processes, mode, *args)
    assert not any("unused" in name for name in one_process(*args).moved)


# Reduced sketches.


def sketch_both_ways(seed: int) -> tuple[Any, Any, Any]:
    """(the mean's sketch, the sketch made of the parts, this process' own) in float64."""
    draw = lambda *shape, generator: torch.randn(*shape, generator=generator, dtype=torch.float64)
    shared, own = (torch.Generator().manual_seed(seed + i) for i in (0, 1 + dist.get_rank()))
    basis = torch.linalg.qr(draw(12, 3, generator=shared))[0]
    part = draw(12, 9, generator=shared) + 0.5 * draw(12, 9, generator=own)
    reduce = osd_torch.mean_over_processes()

    def sketch(matrix: torch.Tensor, reduce: Any = None) -> Any:
        return make_sketch(basis, matrix, osd_torch.online_pca(SGD()).needs.statistics, reduce)

    return sketch(reduce(part.clone())), sketch(part, reduce), sketch(part)


def test_the_reduced_r_and_a_are_exact_and_the_norm_an_estimate(two_processes: Run) -> None:
    (exact, reduced, first), (_, other, second) = two_processes(sketch_both_ways, 7)
    for x, y, z in zip(*(each.values() for each in (exact, reduced, other)), strict=True):
        assert torch.equal(y, z)
        if x.ndim:
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    norm, *of_parts = (x.statistics["squared_norm"] for x in (reduced, first, second))
    in_parts, whole = sum(of_parts) / 2, exact.statistics["squared_norm"]
    ratio = (
        2 * exact.low_rank.square().sum() / sum(x.low_rank.square().sum() for x in (first, second))
    )
    torch.testing.assert_close(norm, in_parts * ratio)
    # Noise of half the signal's size makes the parts' mean square 1/8 of it too large.
    assert abs(norm / whole - 1) < 0.06
    assert in_parts / whole - 1 > 0.06


# The optimizer alone, on sharded matrices.


class Matrices(torch.nn.Module):
    """Rows that divide by 2 and rows that do not, and one row."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            start = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(name, torch.nn.Parameter(start))


SHAPES = {
    "attn": (160, 144),
    "mlp_up": (161, 140),
    "mlp_down": (93, 166),
    "mlp_row": (1, 40),
    "norm": (81,),
    "head": (90, 64),
}
RANK = 64


def matrices(is_sharded: bool, dtype: torch.dtype = torch.float32) -> Matrices:
    module = Matrices(dtype)
    if is_sharded:
        fully_shard(module)
    return module


def optimizer_of(
    module: Matrices, optimizer: str, proj_type: str, **more: Any
) -> torch.optim.Optimizer:
    named = module.named_parameters()
    options = {"lr": 0.01, "rank": RANK, "update_proj_gap": 3, "weight_decay": 0.1, **more}
    return osd_torch.make_optimizer(named, optimizer, proj_type, **options)


def take_steps(module: Matrices, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in module.parameters():
            gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            gradient = gradient.to(param.dtype)
            if isinstance(param, DTensor):
                gradient = distribute_tensor(gradient, param.device_mesh, param.placements)
            param.grad = gradient
        osd_torch.clip_(optimizer, 100.0)
        optimizer.step()


def everything(module: Matrices, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole copies of the weights and of all state."""
    found = {}
    for name, param in module.named_parameters():
        found[name] = whole(param.detach()).clone()
        for key, value in optimizer.state[param].items():
            found[f"{name}/{key}"] = whole(value).clone()
    return found


def sharded_run(optimizer: str, proj_type: str, dtype: torch.dtype) -> dict[str, Tensor]:
    module = matrices(True, dtype)
    built = optimizer_of(module, optimizer, proj_type)
    take_steps(module, built, range(7))
    check_placements(module, built)
    return everything(module, built)


def check_placements(module: Matrices, optimizer: torch.optim.Optimizer) -> None:
    """P as the axis that it projects, and the state of both rules as `sharding.py` says."""
    for name, param in module.named_parameters():
        state = optimizer.state[param]
        assert not any(isinstance(state.get(key), DTensor) for key in ON_HOST)
        assert all(isinstance(x, DTensor) for key, x in state.items() if key not in ON_HOST)
        if name == "mlp_row":  # its shapes do not tell the axes apart
            continue
        sharded, replicated = (Shard(0),), (Replicate(),)
        for side, length in zip(("output", "input"), param.shape, strict=False):
            one_sided = state.get("basis")
            is_on_side = one_sided is not None and one_sided.shape[0] == length
            basis = one_sided if is_on_side else state.get(f"basis_{side}")
            if basis is not None:
                assert basis.placements == (sharded if side == "output" else replicated), name
        moment = state.get("exp_avg")
        if moment is not None and moment.dtype != torch.uint8:
            follows_rows = moment.shape[0] == param.shape[0]
            assert moment.placements == (sharded if follows_rows else replicated), name


def through_state_dicts(is_sharded: bool, taken: int, foreach: bool) -> list[dict[str, Tensor]]:
    """Ten more steps by an optimizer that takes over after `taken` steps, and by the first one.

    The state goes from one to the other by `get_optimizer_state_dict`.
    """
    module = matrices(is_sharded, torch.float64)
    module.register_parameter("attn_2", torch.nn.Parameter(module.attn.detach().clone()))
    first = optimizer_of(module, "galore_adamw", "continuous", foreach=foreach)
    take_steps(module, first, range(taken))
    saved = copy.deepcopy(get_optimizer_state_dict(module, first))
    weights = copy.deepcopy(module.state_dict())
    ends = []
    for loads in (False, True):
        optimizer = first
        if loads:
            module.load_state_dict(weights)
            optimizer = optimizer_of(module, "galore_adamw", "continuous", foreach=foreach)
            set_optimizer_state_dict(module, optimizer, saved)
        take_steps(module, optimizer, range(taken, taken + 10))
        ends.append(everything(module, optimizer))
    return ends


@pytest.mark.parametrize("foreach", [False, True], ids=["one at a time", "stacks"])
@pytest.mark.parametrize("taken", [0, 10])
@pytest.mark.parametrize("where", ["one process", "two processes", "sharded over two"])
def test_state_dicts_of_torch_distributed(
    two_processes: Run, where: str, taken: int, foreach: bool
) -> None:
    """Before the first step and after ten: the optimizer that loads continues bit for bit."""
    args = (where == "sharded over two", taken, foreach)
    if where == "one process":
        results = [through_state_dicts(*args)]
    else:
        results = two_processes(through_state_dicts, *args)
    for expected, found in results:
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


# Each rule of W and of P, and each side. 8-bit codes come from float32 arithmetic: see below.
FLOAT64_PAIRS = [
    ("galore_adamw", "std"),
    ("galore_adamw", "reverse_std"),
    ("galore_adamw", "continuous"),
    ("galore_adamw", "continuous_adafactor"),
    ("galore_lion", "full"),
    ("galore_lion", "continuous_lion"),
    ("galore_adafactor", "left"),
    ("galore_adafactor", "right"),
    ("galore_adafactor", "full"),
    ("galore_adafactor", "continuous_sgd"),
    ("adafactor", "std"),
    ("adamw", "std"),
    ("sgd", "std"),
]
EVERY_PAIR = [
    *itertools.product(SUBSPACE_OPTIMIZERS[:3], PROJ_TYPES),
    *itertools.product(FULL_RANK_OPTIMIZERS, ["std"]),
]
OTHER_PAIRS = [x for x in EVERY_PAIR if x not in FLOAT64_PAIRS and "8bit" not in "".join(x)]


def run_whole(optimizer: str, proj_type: str, dtype: torch.dtype) -> dict[str, Tensor]:
    module = matrices(False, dtype)
    built = optimizer_of(module, optimizer, proj_type)
    take_steps(module, built, range(7))
    return everything(module, built)


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each tensor's largest value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        atol = tolerance * value.abs().max().item()
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=name)


def distance(found: Tensor, expected: Tensor) -> float:
    """||found - expected||_F / ||expected||_F."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def assert_close_8bit(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float32, where another order of a sum may change a code.

    R, a sum of some 160 products, is off by d = 160^0.5 2^-24 = 1e-6 of itself, so that a value is
    stored as the neighbour of its code with probability 2 d / s, where s = 0.05 is the median
    spacing of the code book: 4e-5 at each of 7 steps, 3e-4 in total, and 1e-3 leaves room for
    values near zero. Where later gradients cancel most of such a moment, the remainder differs by
    many codes. In the norm of the moment that is sqrt(1e-3) s = 1.6e-3, and the same holds for the
    distance that a weight moves.
    """
    share, limit = 1e-3, 2e-3
    assert found.keys() == expected.keys()
    start = dict(Matrices().named_parameters())
    for name, value in expected.items():
        parameter, _, key = name.partition("/")
        if value.dtype == torch.uint8:
            assert (found[name] != value).double().mean() <= share, name
            value, ours = (values_of(run, parameter, key) for run in (expected, found))
            assert distance(ours, value) <= limit, name
        elif key.endswith("_absmax"):  # of codes
            assert distance(found[name], value) <= limit, name
        elif key:
            assert distance(found[name], value) <= 1e-5, name
        else:
            origin = start[name].detach()
            assert distance(found[name] - origin, value - origin) <= limit, name


def values_of(run: dict[str, Tensor], parameter: str, moment: str) -> Tensor:
    """What the codes of a moment stand for."""
    codes, scales = run[f"{parameter}/{moment}"], run[f"{parameter}/{moment}_absmax"]
    book = code_books(codes.device)[moment == "exp_avg_sq"]
    return book[codes.flatten().long()] * scales.repeat_interleave(BLOCK_SIZE)[: codes.numel()]


@pytest.mark.parametrize(
    ("optimizer", "proj_type"),
    [*FLOAT64_PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in OTHER_PAIRS)],
)
def test_sharded_numbers_are_those_of_whole_matrices(
    two_processes: Run, optimizer: str, proj_type: str
) -> None:
    """In float64, where what a sum's order changes stays far below what the method computes."""
    expected = run_whole(optimizer, proj_type, torch.float64)
    for found in two_processes(sharded_run, optimizer, proj_type, torch.float64):
        assert_close(found, expected, 1e-8)


def test_sharded_8bit_state_is_that_of_whole_matrices(two_processes: Run) -> None:
    """`random`, since a singular vector or a step of P makes more of a rounding error.

    161 rows times 64 is not whole blocks to each process, and 160 rows are.
    """
    expected = run_whole("galore_adamw8bit", "random", torch.float32)
    found, _ = two_processes(sharded_run, "galore_adamw8bit", "random", torch.float32)
    assert_close_8bit(found, expected)


def test_sharded_bfloat16_weights_keep_float32_state(two_processes: Run) -> None:
    """`random`: P does not depend on a rounding error, so that weights are a rounding apart."""
    expected = run_whole("galore_adamw", "random", torch.bfloat16)
    found, _ = two_processes(sharded_run, "galore_adamw", "random", torch.bfloat16)
    assert {x.dtype for name, x in found.items() if "/" in name} == {torch.float32}
    for name, value in expected.items():
        if "/" in name:
            assert distance(found[name], value) <= 1e-5, name
    # A step of about 0.01, off by 1e-6 of itself, moves a weight of about 1 over the border between
    # two bfloat16 numbers, 2^-7 apart, with probability 2e-6; 1e-3 leaves room for 7 steps and for
    # weights near zero, where the numbers are closer. Each is then off by 2^-7 of itself.
    weights, others = (
        torch.cat([x.flatten() for name, x in run.items() if "/" not in name])
        for run in (expected, found)
    )
    share = 1e-3
    assert (others != weights).double().mean() <= share
    assert distance(others, weights) <= 2**-7 * share**0.5


def placements_of_8bit_state() -> dict[str, list[bool]]:
    """By parameter: whether the codes, and their scales, are sharded."""
    module = matrices(True)
    built = optimizer_of(module, "galore_adamw8bit", "continuous_adam8bit")
    take_steps(module, built, range(2))
    names = [f"{x}exp_avg{y}" for x in ("", "projector_") for y in ("", "_absmax")]
    return {
        name: [built.state[param][key].placements == (Shard(0),) for key in names]
        for name, param in module.named_parameters()
        if name in ("attn", "mlp_up", "mlp_down")
    }


def test_8bit_state_is_sharded_where_whole_blocks_fit(two_processes: Run) -> None:
    """R of `attn` and `mlp_up` is (64, rows), and P of `mlp_down` is (93, 64)."""
    for found in two_processes(placements_of_8bit_state):
        assert found["attn"] == [True, True, False, False]
        assert found["mlp_up"] == [False, False, False, False]
        assert found["mlp_down"] == [False, False, False, False]


# Checkpoints of the optimizer.


def save(is_sharded: bool, directory: Path, *args: Any) -> dict[str, Tensor]:
    """Saves after 4 steps, and continues to 7."""
    module = matrices(is_sharded, args[-1])
    built = optimizer_of(module, *args[:-1])
    take_steps(module, built, range(4))
    dcp.save(tensors(module, built), checkpoint_id=directory)
    take_steps(module, built, range(4, 7))
    return everything(module, built)


def resume(is_sharded: bool, directory: Path, *args: Any) -> dict[str, Tensor]:
    """Continues from 4 to 7."""
    module = matrices(is_sharded, args[-1])
    built = optimizer_of(module, *args[:-1])
    loaded = tensors(module, built)
    dcp.load(loaded, checkpoint_id=directory)
    set_model_state_dict(module, loaded["model"])
    set_optimizer_state_dict(module, built, loaded["optimizer"])
    take_steps(module, built, range(4, 7))
    return everything(module, built)


def tensors(module: Matrices, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(module),
        "optimizer": get_optimizer_state_dict(module, optimizer),
    }


@pytest.mark.parametrize(
    ("optimizer", "proj_type", "dtype"),
    [
        ("galore_adamw", "continuous", torch.float64),
        ("galore_adafactor", "full", torch.float64),
        ("galore_adamw8bit", "random", torch.float32),
    ],
)
def test_a_checkpoint_goes_on_on_another_number_of_processes(
    two_processes: Run, tmp_path: Path, optimizer: str, proj_type: str, dtype: torch.dtype
) -> None:
    is_close = functools.partial(assert_close, tolerance=1e-8)
    if dtype == torch.float32:
        is_close = assert_close_8bit
    args = (optimizer, proj_type, dtype)
    on_two, same = two_processes(save, True, tmp_path / "two", *args)
    on_one = save(False, tmp_path / "one", *args)
    resumed, _ = two_processes(resume, True, tmp_path / "two", *args)
    for name, value in on_two.items():
        assert torch.equal(value, same[name]) and torch.equal(value, resumed[name]), name
    is_close(resume(False, tmp_path / "two", *args), on_one)
    for found in two_processes(resume, True, tmp_path / "one", *args):
        is_close(found, on_one)


# What is refused.


def refusals() -> list[str]:
    module = matrices(True)
    messages = []
    for attempt in (
        lambda: optimizer_of(module, "adam8bit", "std"),
        lambda: osd_torch.LayerwiseUpdates(optimizer_of(module, "galore_adamw", "std")),
        lambda: setattr(
            optimizer_of(module, "galore_adamw", "std"), "reduce", osd_torch.mean_over_processes()
        ),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        messages.append(str(caught.value))
    return messages


def test_what_sharded_weights_cannot_do_is_refused_with_a_remedy(two_processes: Run) -> None:
    for messages in two_processes(refusals):
        assert "galore_adamw8bit" in messages[0]
        assert "unsharded weights" in messages[1]
        assert "leave reduce None" in messages[2]


def test_no_process_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        osd_torch.mean_over_processes()


# Who takes part in an update, and whole state in sharded parameters.


class Experts(torch.nn.Module):
    """Two matrices, a bias each, and a head; a process may leave some out of its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp_a, self.mlp_b = torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 12)

    def forward(self, x: Tensor, used: str) -> Tensor:
        """Sums what the used experts make of x."""
        return self.head(sum(getattr(self, f"mlp_{name}")(x) for name in used))


# What each process uses in the first part of an update and in the second; None: no backward pass.
Routes = tuple[tuple[str | None, str | None], tuple[str | None, str | None]]
ROUTES: dict[str, Routes] = {
    "one idle": (("ab", "a"), ("a", "ab")),
    "swapped": (("a", "b"), ("b", "a")),
    "nobody": (("a", "a"), ("a", "a")),
    "one part": (("a", "a"), ("ab", "a")),
    "one process": (("ab", "ab"), (None, None)),
}
SHARES = {1: (1.0,), 2: (0.25, 0.75)}
WAYS = {"plain": 1, "layerwise": 1, "waiting": 2}


def rows_of(rank: int, step: int) -> Tensor:
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(100 * step + rank))


def part_of_loss(net: Experts, used: str, rank: int, step: int, share: float) -> Tensor:
    return share * net(rows_of(rank, step), used).square().mean()


def route(optimizer: str, routes: Routes, way: str) -> list[Tensor]:
    """Three updates in which each process uses the experts that are routed to it."""
    net, rank = Experts(), dist.get_rank()
    options = {"lr": 0.01, "rank": 4, "weight_decay": 0.1}
    built = osd_torch.make_optimizer(net.named_parameters(), optimizer, "continuous_sgd", **options)
    reduce = osd_torch.mean_over_processes()
    shares = SHARES[WAYS[way]]
    updates = None
    if way == "plain":
        built.reduce = reduce
    else:
        updates = osd_torch.LayerwiseUpdates(built, micro_batches=len(shares), reduce=reduce)
    for step in range(3):
        for share, used in zip(shares, routes[rank], strict=False):
            if updates is not None:
                updates.share = share
            if used is not None:
                part_of_loss(net, used, rank, step, share).backward()
        if updates is None:
            built.step()
            built.zero_grad()
        else:
            updates.finish()
    return [param.detach().clone() for param in net.parameters()]


def wanted_of_routes(optimizer: str, routes: Routes, parts: int) -> list[Tensor]:
    """The same by one process: the mean of the gradients, where a missing one is zero."""
    net = Experts()
    options = {"lr": 0.01, "rank": 4, "weight_decay": 0.1}
    built = osd_torch.make_optimizer(net.named_parameters(), optimizer, "continuous_sgd", **options)
    for step in range(3):
        for part, share in enumerate(SHARES[parts]):
            for rank in range(WORLD):
                if (used := routes[rank][part]) is not None:
                    (part_of_loss(net, used, rank, step, share) / WORLD).backward()
            for expert in (net.mlp_a, net.mlp_b):
                if parts > 1 and optimizer != "adamw" and expert.weight.grad is not None:
                    built.accumulate(expert.weight, share)
        built.step()
        built.zero_grad()
    return [param.detach().clone() for param in net.parameters()]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ROUTES)
def test_processes_agree_on_who_takes_part(two_processes: Run, case: str, way: str) -> None:
    """A parameter with a gradient on one process only gets the mean with zeros."""
    one, other = two_processes(route, "galore_adamw", ROUTES[case], way)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)
    wanted = wanted_of_routes("galore_adamw", ROUTES[case], WAYS[way])
    start = [param.detach() for param in Experts().parameters()]
    for found, expected, before in zip(one, wanted, start, strict=True):
        # The squared norm of a mean is estimated, which scales P's small steps.
        moved = (expected - before).norm()
        assert (found - expected).norm() <= 0.02 * moved
        assert moved > 0 or torch.equal(found, before)


@pytest.mark.parametrize("way", ["layerwise", "waiting"])
@pytest.mark.parametrize("case", ["swapped", "one part"])
def test_a_full_rank_optimizer_agrees_too(two_processes: Run, case: str, way: str) -> None:
    one, other = two_processes(route, "adamw", ROUTES[case], way)
    wanted = wanted_of_routes("adamw", ROUTES[case], WAYS[way])
    for a, b, expected in zip(one, other, wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-6)


def accumulate_another() -> str:
    net = Experts()
    built = osd_torch.make_optimizer(net.named_parameters(), "galore_adamw", lr=0.01, rank=4)
    built.reduce = osd_torch.mean_over_processes()
    net(rows_of(0, 0), "ab").square().mean().backward()
    try:
        built.accumulate((net.mlp_a if dist.get_rank() else net.mlp_b).weight)
    except ValueError as error:
        return str(error)
    return "no error"


def test_parameters_accumulated_apart_are_named(two_processes: Run) -> None:
    for message in two_processes(accumulate_another):
        assert "different parameters: 'mlp_a.weight', 'mlp_b.weight'" in message


def layerwise_in_ddp(parts: int) -> str:
    torch.manual_seed(0)
    net = torch.nn.Sequential()
    net.add_module("mlp", torch.nn.Linear(12, 12))
    net.add_module("head", torch.nn.Linear(12, 12))
    built = osd_torch.make_optimizer(net.named_parameters(), "galore_adamw", lr=0.01, rank=4)
    updates = osd_torch.LayerwiseUpdates(built, micro_batches=parts)
    wrapped = torch.nn.parallel.DistributedDataParallel(net)
    try:
        for step in range(2):
            for _ in range(parts):
                wrapped(rows_of(dist.get_rank(), step)).square().mean().backward()
            updates.finish()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("parts", [1, 2])
def test_hooks_that_find_gradients_in_ddps_hands_say_so(two_processes: Run, parts: int) -> None:
    for message in two_processes(layerwise_in_ddp, parts):
        assert "DistributedDataParallel" in message and "mean_over_processes()" in message


LOADED = [
    ("galore_adamw", "continuous"),
    ("galore_adamw", "full"),
    ("galore_adafactor", "std"),
    ("galore_adamw8bit", "continuous_adam8bit"),
]


def load_whole(optimizer: str, proj_type: str, how: str) -> dict[str, tuple[Tensor, Tensor]]:
    """State of one sharded model into another, and two more steps of both."""
    first, second = matrices(True), matrices(True)
    trained = optimizer_of(first, optimizer, proj_type)
    other = optimizer_of(second, optimizer, proj_type)
    take_steps(first, trained, range(4))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        b.data.copy_(a.data)
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    saved = get_optimizer_state_dict(first, trained, options=full)
    if how == "plain":
        states = trained.state_dict()
        states["state"] = {
            i: {key: whole(x).clone() for key, x in state.items()}
            for i, state in states["state"].items()
        }
        other.load_state_dict(states)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        saved = saved if dist.get_rank() == 0 else {}
        set_optimizer_state_dict(second, other, saved, options=options)
    for state in (*trained.state.values(), *other.state.values()):
        for key, value in state.items():
            part = value.to_local() if isinstance(value, DTensor) else value
            assert part.is_contiguous(), key
    take_steps(first, trained, range(4, 6))
    take_steps(second, other, range(4, 6))
    found, wanted = everything(second, other), everything(first, trained)
    assert found.keys() == wanted.keys()
    return {name: (found[name], wanted[name]) for name in found}


@pytest.mark.parametrize("how", ["broadcast", "plain"])
@pytest.mark.parametrize(("optimizer", "proj_type"), LOADED)
def test_whole_state_loads_into_sharded_parameters(
    two_processes: Run, optimizer: str, proj_type: str, how: str
) -> None:
    for process in two_processes(load_whole, optimizer, proj_type, how):
        for name, (found, wanted) in process.items():
            assert torch.equal(found, wanted), name


def read_without_set_at(directory: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A sharded checkpoint as earlier versions wrote it, read into another model."""
    first, second = matrices(True), matrices(True)
    trained = optimizer_of(first, "galore_adamw", "continuous")
    other = optimizer_of(second, "galore_adamw", "continuous")
    take_steps(first, trained, range(4))
    parts = checkpoint._sharded_state(first, trained)
    states = parts["optimizer"]["state"]
    for name, state in states.items():
        states[name] = {key: x for key, x in state.items() if key != "set_at"}
    checkpoint._save_sharded(Path(directory) / "sharded", parts)
    checkpoint._load_sharded(Path(directory), second, other)
    take_steps(first, trained, range(4, 6))
    take_steps(second, other, range(4, 6))
    found, wanted = everything(second, other), everything(first, trained)
    return {name: (found[name], wanted[name]) for name in found}


def test_a_sharded_checkpoint_without_set_at_is_read(two_processes: Run, tmp_path: Path) -> None:
    for process in two_processes(read_without_set_at, str(tmp_path)):
        for name, (found, wanted) in process.items():
            assert torch.equal(found, wanted), name
