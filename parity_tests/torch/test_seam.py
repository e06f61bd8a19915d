"""Custom rules for osd_torch, written outside the library; their needs; objects in the classes."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import osd_torch
from osd_torch import (
    COLUMN_ENERGIES,
    CORRELATION,
    SQUARED_NORM,
    BasisRule,
    Clock,
    Lift,
    Lifted,
    Needs,
    Seen,
    Sketch,
    Statistic,
)
from osd_torch.full_rank import FullRankAdam
from osd_torch.quantization import code_books, quantize, read_back
from osd_torch.rules import SGD, Adam, Lion
from osd_torch.sharding import settled, whole
from osd_torch.sketch import make_sketch
from parity_tests.support.two_processes import Run

pytestmark = pytest.mark.usefixtures("one_thread")

RANK, LR = 3, 0.05
SHAPES = {"mlp": (12, 8), "attn": (8, 12)}  # P on the input side, and on the output side


# Three toys: a statistic, a basis rule and a lift, as a user would write them.

ROW_SUMS = Statistic("row_sums", 1, lambda P, M, R: settled(M.sum(dim=1)))


def first_columns(matrix: Tensor, old: Any, side: str, key: str, each: Any) -> Any:
    return each(lambda M: torch.linalg.qr(M[:, : old.shape[1]])[0].to(old.dtype), matrix)


def oja(basis: Tensor, sketch: Sketch) -> Tensor:
    """Minus A, of a gradient of norm 1 in the subspace."""
    return -sketch.statistics["correlation"] / sketch.low_rank.square().sum()


TOY_BASIS = BasisRule(
    Clock(refresh_every=4, move_every=1),
    first_columns,
    Needs((CORRELATION,), "at a refresh", "P is set from the gradient's first columns"),
    gradient=oja,
    optimizer=SGD(),
    step_size=0.1,
    name="toy",
)


def add_row_sums(direction: Tensor, seen: Seen) -> Lifted:
    total = 0.5 * seen.state["total"] + seen.sketch.statistics["row_sums"]
    rest = 0.01 * total[:, None].expand(-1, direction.shape[1])
    return Lifted(direction, rest, then=lambda x: 2 * x, state={"total": total})


TOY_LIFT = Lift(
    add_row_sums,
    Needs((ROW_SUMS,)),
    init=lambda matrix, low_rank: {"total": torch.zeros_like(matrix[:, 0])},
    name="toy",
)
GREEDY = Lift(
    lambda direction, seen: Lifted(None, rest=seen.gradient),
    Needs(gradient="always", reason="greedy applies each entry of the gradient", remedy="scaled()"),
)


class Toy:
    """The toys written out, for one matrix in float64."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.side = weight.clone(), "input" if len(weight) == 12 else "output"
        self.total, self.moment, self.step = torch.zeros(8, dtype=torch.float64), 0.0, 0

    def __call__(self, gradient: Tensor, first_part: Tensor | None = None) -> None:
        """Takes a step; P is set from the first part where the gradient comes in parts."""
        turned = self.side == "input"
        M, W = (x.mT if turned else x for x in (gradient, self.weight))
        if self.step % 4 == 0:
            part = gradient if first_part is None else first_part
            self.basis = torch.linalg.qr((part.mT if turned else part)[:, :RANK])[0]
        P = self.basis
        R = P.mT @ M
        direction = 0.9 * self.moment + 0.1 * R
        self.moment = 0.99 * self.moment + 0.01 * R
        self.total = 0.5 * self.total + M.sum(dim=1)
        W -= LR * 2 * (P @ direction + 0.01 * self.total[:, None])
        if self.step % 4:
            self.basis = P + 0.1 * (M @ R.mT) / R.square().sum()
        self.step += 1


def model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    return nn.ParameterDict({name: nn.Parameter(draw(shape)) for name, shape in SHAPES.items()})


def gradient_of(step: int, name: str, part: int = 0) -> Tensor:
    seed = 1000 * part + 10 * step + list(SHAPES).index(name)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def toys(net: nn.Module, **more: Any) -> osd_torch.OnlineSubspaceDescent:
    given = {"basis": TOY_BASIS, "lift": TOY_LIFT, **more}
    named = net.named_parameters()
    return osd_torch.OnlineSubspaceDescent(
        named, LR, rule=Lion(sign=False), rank=RANK, select=lambda name, param: True, **given
    )


def written_out(steps: int, parts: int = 1) -> dict[str, Tensor]:
    found = {}
    for name, weight in model().items():
        toy = Toy(weight.detach())
        for step in range(steps):
            each = [gradient_of(step, name, part) / parts for part in range(parts)]
            toy(sum(each), each[0] if parts > 1 else None)
        found[name] = toy.weight
    return found


def assert_weights(net: Any, wanted: dict[str, Tensor], rtol: float = 1e-10) -> None:
    for name, param in net.items():
        torch.testing.assert_close(whole(param.detach()), wanted[name], rtol=rtol, atol=1e-10)


def plain(net: Any, optimizer: Any, steps: int = 11) -> None:
    for step in range(steps):
        for name, param in net.items():
            param.grad = gradient_of(step, name)
        optimizer.step()


def test_toys_plain() -> None:
    net = model()
    plain(net, toys(net))
    assert_weights(net, written_out(11))


def test_toys_accumulated() -> None:
    net = model()
    optimizer = toys(net)
    for step in range(11):
        for part in range(2):
            for name, param in net.items():
                param.grad = gradient_of(step, name, part) / 2
                optimizer.accumulate(param, 0.5)
        optimizer.step()
    # A is the mean of the parts' own, so P moves by another step than the sum's.
    assert_weights(net, mean_of_parts(11))


def mean_of_parts(steps: int) -> dict[str, Tensor]:
    found = {}
    for name, weight in model().items():
        toy = Toy(weight.detach())
        for step in range(steps):
            each = [gradient_of(step, name, part) for part in range(2)]
            before = getattr(toy, "basis", None)
            toy(sum(each) / 2, each[0])
            if step % 4:
                turned = toy.side == "input"
                matrices = [x.mT if turned else x for x in each]
                lows = [before.mT @ M for M in matrices]
                a = sum(M @ R.mT for M, R in zip(matrices, lows, strict=True)) / 2
                toy.basis = before + 0.1 * a / (sum(lows) / 2).square().sum()
        found[name] = toy.weight
    return found


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_toys_layer_by_layer(micro_batches: int) -> None:
    net = model()
    with osd_torch.LayerwiseUpdates(toys(net), micro_batches=micro_batches) as updates:
        for step in range(11):
            for part in range(micro_batches):
                loss = sum(
                    (param * gradient_of(step, name, part)).sum() for name, param in net.items()
                )
                (loss / micro_batches).backward()
            updates.finish()
    assert_weights(net, written_out(11) if micro_batches == 1 else mean_of_parts(11))


def reduced_toys() -> dict[str, Tensor]:
    net = model()
    optimizer = toys(net)
    optimizer.reduce = osd_torch.mean_over_processes()
    for step in range(11):
        for name, param in net.items():
            param.grad = gradient_of(step, name, dist.get_rank())
        optimizer.step()
    return {name: param.detach() for name, param in net.items()}


def test_toys_with_reduced_sketches(two_processes: Run) -> None:
    """Their statistics are exact under the mean, and P is set from the mean gradient."""
    wanted = {}
    for name, weight in model().items():
        toy = Toy(weight.detach())
        for step in range(11):
            toy(sum(gradient_of(step, name, part) for part in range(2)) / 2)
        wanted[name] = toy.weight
    for found in two_processes(reduced_toys):
        for name, weight in found.items():
            torch.testing.assert_close(weight, wanted[name], rtol=1e-10, atol=1e-10)


def sharded_toys(lift: str) -> dict[str, Tensor]:
    net = model()
    fully_shard(net)
    optimizer = toys(net, lift={"toy": TOY_LIFT, "greedy": GREEDY}[lift])
    for step in range(11):
        for name, param in net.items():
            gradient = gradient_of(step, name)
            assert isinstance(param, DTensor)
            param.grad = distribute_tensor(gradient, param.device_mesh, param.placements)
        optimizer.step()
    return {name: whole(param.detach()) for name, param in net.items()}


@pytest.mark.parametrize("lift", ["toy", "greedy"])
def test_toys_under_fsdp2(two_processes: Run, lift: str) -> None:
    net = model()
    plain(net, toys(net, lift={"toy": TOY_LIFT, "greedy": GREEDY}[lift]))
    for found in two_processes(sharded_toys, lift):
        assert_weights(net, found)


def test_what_needs_the_gradient_is_refused_by_its_reason_where_it_is_gone() -> None:
    net = model()
    optimizer = toys(net, lift=GREEDY)
    net["mlp"].grad = gradient_of(0, "mlp")
    reason = r"greedy applies each entry of the gradient, but only its sketch is kept here.*scaled"
    with pytest.raises(ValueError, match=reason):
        optimizer.accumulate(net["mlp"])
    optimizer.zero_grad()
    for options in ({"micro_batches": 2}, {"grad_clipping": 1.0}):
        with pytest.raises(ValueError, match=reason):
            osd_torch.LayerwiseUpdates(optimizer, **options)
    with osd_torch.LayerwiseUpdates(optimizer) as updates:  # the gradient is available here
        before = net["mlp"].detach().clone()
        (net["mlp"] * gradient_of(0, "mlp")).sum().backward()
        updates.finish()
    torch.testing.assert_close(net["mlp"], before - LR * gradient_of(0, "mlp"))


def test_a_lift_has_to_return_something() -> None:
    net = model()
    optimizer = toys(net, lift=Lift(lambda direction, seen: Lifted(None)))
    net["mlp"].grad = gradient_of(0, "mlp")
    with pytest.raises(ValueError, match="neither a direction nor a rest"):
        optimizer.step()


def test_rules_that_contradict_themselves_are_refused() -> None:
    for changed, message in (
        ({"clock": Clock(4)}, "toy has clock.move_every=None, a gradient that is given"),
        ({"optimizer": None}, "an optimizer that is None: a rule that moves P has all three"),
        ({"order": "before"}, "toy has order='before', which recomputes R"),
        ({"order": "never"}, "order is 'never': expected one of after, before"),
        ({"clock": Clock(0, 1)}, "the period of toy is 0: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            toys(model(), basis=TOY_BASIS._replace(**changed))
    optimizer = toys(model(), basis=TOY_BASIS._replace(fresh=lambda M, *_: M[:, :2]))
    params = optimizer.param_groups[0]["params"]
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(
        ValueError, match=r"the rule's P of parameter .* is .*2\), .*expected .*3\)"
    ):
        optimizer.step()
    twin = ROW_SUMS._replace(degree=2)
    both = TOY_LIFT._replace(needs=Needs((ROW_SUMS, twin)))
    with pytest.raises(ValueError, match="two different statistics are named 'row_sums'"):
        toys(model(), lift=both)


def test_toys_resume_bit_for_bit() -> None:
    net = model()
    optimizer = toys(net)
    plain(net, optimizer, 6)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other = model()
    resumed = toys(other)
    weights, state = torch.load(file, weights_only=True)  # no object of ours is in it
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for step in range(6, 11):
        for each, built in ((net, optimizer), (other, resumed)):
            for name, param in each.items():
                param.grad = gradient_of(step, name)
            built.step()
    assert all(torch.equal(net[name], other[name]) for name in SHAPES)
    changed = toys(model(), lift=osd_torch.scaled(0.25))
    with pytest.raises(ValueError, match=r"'lift' of group 0 is toy there and scaled\(0.25\) in"):
        changed.load_state_dict(state)


# Statistics.


def test_statistics_scale_by_their_degree() -> None:
    matrix, basis = gradient_of(0, "mlp"), torch.linalg.qr(gradient_of(1, "mlp")[:, :RANK])[0]
    statistics = (CORRELATION, SQUARED_NORM, COLUMN_ENERGIES, ROW_SUMS)
    sketch, scaled = (make_sketch(basis, m, statistics) for m in (matrix, 3 * matrix))
    for x, y in zip(sketch.scaled(3.0).values(), scaled.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    # Two equal halves: their mean is either one, and their sum the whole.
    half = make_sketch(basis, matrix / 2, statistics).part(0.5)
    for x, y in zip(half.add_(copy.deepcopy(half)).values(), sketch.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        sketch.statistics["column_energies"], matrix.square().sum(dim=0), rtol=1e-12, atol=0
    )


def column_energies(is_sharded_on: str) -> Tensor:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(gradient_of(0, "mlp"))

    module = One()
    fully_shard(module)
    matrix = module.weight.detach()
    return whole(COLUMN_ENERGIES.of(None, matrix if is_sharded_on == "rows" else matrix.mT, None))


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_column_energies_of_a_sharded_matrix(two_processes: Run, side: str) -> None:
    matrix = gradient_of(0, "mlp")
    wanted = matrix.square().sum(dim=0 if side == "rows" else 1)
    for found in two_processes(column_energies, side):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


# A change of P as an event.


def carried(m: Tensor, v: Tensor | None, Q: Tensor, t: int, betas: Any) -> tuple[Tensor, Any]:
    """LDAdam's rule, written out entry by entry."""
    if v is None:
        return Q @ m, None
    c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    new = torch.empty_like(v)
    for i in range(v.shape[0]):
        for j in range(v.shape[1]):
            variance = sum(
                Q[i, k] ** 2 * (v[k, j] / c2 - (m[k, j] / c1) ** 2) for k in range(v.shape[0])
            )
            mean = sum(Q[i, k] * m[k, j] / c1 for k in range(v.shape[0]))
            new[i, j] = c2 * abs(variance + mean**2)
    return Q @ m, new


@pytest.mark.parametrize("proj_type", ["std", "continuous", "continuous_sgd", "full"])
@pytest.mark.parametrize("optimizer", ["galore_adamw", "galore_lion"])
def test_transported_moments(optimizer: str, proj_type: str) -> None:
    """After each step the moments are what the last ones are, carried over wherever P changed."""
    net = model()
    built = osd_torch.make_optimizer(
        net.named_parameters(), optimizer, proj_type, lr=LR, rank=RANK, update_proj_gap=3,
        select=lambda name, param: True, transport_moments=True,
    )  # fmt: skip
    is_adam = optimizer == "galore_adamw"
    betas = (0.9, 0.999) if is_adam else (0.9, 0.99)
    expected: dict[str, Any] = {}
    changes = 0
    for step in range(8):
        before = {k: copy.deepcopy(P) for k, P in osd_torch.projectors(built).items()}
        for name, param in net.items():
            param.grad = gradient_of(step, name)
        built.step()
        for name, param in net.items():
            state, G = built.state[param], gradient_of(step, name)
            old, new = before[name], osd_torch.projectors(built)[name]
            is_input = proj_type != "full" and name == "mlp"
            M = G.mT if is_input else G
            m, v = expected.get(name, (0, 0 if is_adam else None))
            refreshed = not proj_type.startswith("continuous") and step % 3 == 0
            if refreshed and step:
                m, v = transported(m, v, old, new, step, betas)
                changes += 1
            used = new if refreshed or step == 0 else old
            both = isinstance(used, osd_torch.TwoSided)
            R = used.output.mT @ M @ used.input if both else used.mT @ M
            if is_adam:
                v = 0.999 * v + 0.001 * R**2
                m = 0.9 * m + 0.1 * R
            else:
                m = 0.99 * m + 0.01 * R
            if proj_type.startswith("continuous") and step:
                m, v = transported(m, v, old, new, step + 1, betas)
                changes += 1
            expected[name] = (m, v)
            for key, wanted in zip(("exp_avg", "exp_avg_sq")[: 1 + is_adam], (m, v), strict=False):
                found = state[key].mT if is_input else state[key]
                torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-13)
    assert changes >= 4


def transported(m: Any, v: Any, old: Any, new: Any, t: int, betas: Any) -> tuple[Any, Any]:
    if isinstance(old, Tensor):
        return carried(m, v, new.mT @ old, t, betas)
    left, right = new.output.mT @ old.output, new.input.mT @ old.input
    if v is None:
        return left @ m @ right.mT, None
    c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t
    mean = left @ (m / c1) @ right.mT
    variance = left**2 @ (v / c2 - (m / c1) ** 2) @ (right**2).mT
    return left @ m @ right.mT, c2 * (variance + mean**2).abs()


def eight_bits() -> tuple[nn.Parameter, Any]:
    """(weight, optimizer) with moments in 8 bits, and P by an SVD at every fourth step."""
    weight = nn.Parameter(torch.randn(96, 80, generator=torch.Generator().manual_seed(0)))
    return weight, osd_torch.SubspaceAdamW8bit(
        [("mlp", weight)], lr=0.01, min_8bit_size=1, rank=16, basis=osd_torch.svd(4),
        transport_moments=True,
    )  # fmt: skip


def test_moments_in_8_bits_are_read_back_carried_over_and_quantized() -> None:
    """Right after a change each value is a nearest code: half a step of the map, times its scale.

    The widest step of the signed map is 0.0078 (between 0.985 and 0.993 and so on), so a value is
    off by at most 0.0040 of its block's largest; and m before it by one quantization more.
    """
    pytest.importorskip("bitsandbytes")
    weight, narrow = eight_bits()
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        gradient = torch.randn(weight.shape, generator=generator)
        weight.grad = gradient.clone()
        narrow.step()
    state = narrow.state[weight]
    assert state["exp_avg"].dtype == torch.uint8
    books = code_books(weight.device)
    m, v = (
        read_back(state[k], state[f"{k}_absmax"], book)
        for k, book in zip(("exp_avg", "exp_avg_sq"), books, strict=True)
    )
    old = state["basis"].clone()
    group = narrow.param_groups[0]
    weight.grad = torch.randn(weight.shape, generator=generator)
    narrow.refresh(group, weight)
    Q = state["basis"].mT @ old
    c1, c2 = 1 - 0.9**4, 1 - 0.999**4
    wanted_m = m @ Q.mT
    wanted_v = c2 * ((v / c2 - (m / c1) ** 2) @ (Q**2).mT + (m / c1 @ Q.mT) ** 2).abs()
    moments = zip(("exp_avg", "exp_avg_sq"), (wanted_m, wanted_v), books, strict=True)
    for name, wanted, book in moments:
        codes, scales = quantize(wanted, book)
        found = read_back(state[name], state[f"{name}_absmax"], book)
        limit = float(torch.diff(book).max()) / 2 * 1.001
        per_value = scales.repeat_interleave(256)[: wanted.numel()].view(wanted.shape)
        assert ((found - wanted).abs() <= limit * per_value + 1e-7).all()
        assert (codes == state[name]).float().mean() > 0.999


def test_a_block_is_quantized_as_by_bitsandbytes() -> None:
    """Codes differ only where two are equally near, to 2^-15: its CPU kernel looks values up."""
    functional = pytest.importorskip("bitsandbytes").functional
    values = torch.randn(16, 96, generator=torch.Generator().manual_seed(0))
    signed, _ = code_books(values.device)
    codes, scales = quantize(values, signed)
    theirs, state = functional.quantize_blockwise(values, code=signed.clone(), blocksize=256)
    torch.testing.assert_close(scales, state.absmax, rtol=1e-6, atol=0)
    unit = (values.view(-1, 256) / scales[:, None]).flatten().double()
    off = [(unit - signed[x.flatten().long()]).abs() for x in (codes, theirs)]
    assert ((off[0] - off[1]).abs() <= 2**-15).all()
    assert (codes != theirs.view(codes.shape)).float().mean() <= 0.01


@pytest.mark.parametrize("basis", ["std", "continuous"])
def test_runs_with_transported_moments_resume_bit_for_bit(basis: str) -> None:
    def build(net: nn.Module) -> Any:
        return osd_torch.make_optimizer(
            net.named_parameters(), "galore_adamw", basis, lr=LR, rank=RANK, update_proj_gap=3,
            select=lambda name, param: True, transport_moments=True,
        )  # fmt: skip

    net, other = model(), model()
    optimizer, resumed = build(net), build(other)
    plain(net, optimizer, 5)
    other.load_state_dict(net.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(5, 9):
        for each, built in ((net, optimizer), (other, resumed)):
            for name, param in each.items():
                param.grad = gradient_of(step, name)
            built.step()
    assert all(torch.equal(net[name], other[name]) for name in SHAPES)


def test_moments_that_cannot_be_carried_over_are_refused() -> None:
    named = list(model().named_parameters())
    with pytest.raises(ValueError, match="transport_moments is True, but Adafactor cannot carry"):
        osd_torch.SubspaceAdafactor(named, lr=LR, rank=RANK, select=ALL, transport_moments=True)
    for name in ("galore_adafactor", "adamw"):
        with pytest.raises(ValueError, match="only a subspace optimizer .* factored"):
            osd_torch.make_optimizer(named, name, lr=LR, transport_moments=True)
    optimizer = osd_torch.OnlineSubspaceDescent(
        named, LR, rule=SGD(), rank=RANK, select=lambda *_: True, transport_moments=True
    )
    net = dict(named)
    for step in range(3):
        for name, param in net.items():
            param.grad = gradient_of(step, name)
        optimizer.step()


# Readiness.


def energies(zero_steps: int, proj_type: str, resume_at: int | None = None) -> list[float]:
    """The part of each gradient that P captured in the step after `zero_steps` zero gradients."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    left, right = draw(40, 3), draw(3, 60)

    def build() -> tuple[nn.Parameter, Any]:
        weight = nn.Parameter(torch.zeros(40, 60, dtype=torch.float64))
        return weight, osd_torch.make_optimizer(
            [("mlp", weight)], "galore_adamw", proj_type, lr=LR, rank=RANK, update_proj_gap=50
        )

    weight, optimizer = build()
    for step in range(zero_steps):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        if step == resume_at:
            saved, start = copy.deepcopy(optimizer.state_dict()), weight.detach().clone()
            weight, optimizer = build()
            weight.data.copy_(start)
            optimizer.load_state_dict(saved)
    found = []
    for _ in range(40):
        # The row space turns slowly, so that P has to follow.
        left = left + 0.02 * draw(40, 3)
        gradient = left @ draw(3, 3) @ right + 0.01 * draw(40, 60)
        weight.grad = gradient.clone()
        optimizer.step()
        basis = osd_torch.projectors(optimizer)["mlp"]
        found.append(float((basis.mT @ gradient).norm() / gradient.norm()) ** 2)
    return found


@pytest.mark.parametrize("proj_type", ["std", "continuous", "continuous_sgd"])
@pytest.mark.parametrize(("zero_steps", "resume_at"), [(1, None), (7, None), (130, None), (7, 3)])
def test_zero_gradients_at_first_cost_no_energy(
    proj_type: str, zero_steps: int, resume_at: int | None
) -> None:
    """P's optimizer counts from the step that set P, so that its first steps are of full size."""
    found, never = energies(zero_steps, proj_type, resume_at), energies(0, proj_type)
    for step, (mine, other) in enumerate(zip(found, never, strict=True)):
        is_refreshed = proj_type == "std" and step + zero_steps >= 50  # at another step of the two
        assert mine > 0.99 * other or is_refreshed, step


def test_all_state_exists_from_construction_on_one_process() -> None:
    net = nn.Sequential()
    net.add_module("mlp", nn.Linear(24, 16))
    named = net.named_parameters()
    optimizer = osd_torch.make_optimizer(named, "galore_adamw", "continuous", lr=LR)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    assert set(before) == {0, 1} and before[0].keys() >= {"step", "set_at", "basis", "exp_avg"}
    found = get_optimizer_state_dict(net, optimizer)  # takes a step of zeros where there is none
    assert float(found["state"]["mlp.weight"]["step"]) == 0
    assert float(found["state"]["mlp.weight"]["set_at"]) == -1


@pytest.mark.parametrize("change", ["dtype", "rank"])
def test_state_follows_what_changes_before_the_first_step(change: str) -> None:
    layer = nn.Linear(24, 16, bias=False)
    optimizer = osd_torch.SubspaceAdamW(layer.parameters(), lr=LR, rank=4)
    if change == "dtype":
        layer.double()
    else:
        optimizer.param_groups[0]["rank"] = 2
    layer(torch.ones(1, 24, dtype=layer.weight.dtype)).sum().backward()
    optimizer.step()
    (basis,) = osd_torch.projectors(optimizer).values()
    assert basis.dtype == (torch.float64 if change == "dtype" else torch.float32)
    assert basis.shape == (16, 4 if change == "dtype" else 2)


def test_state_follows_a_projection_that_changes_before_the_first_step() -> None:
    net = model()
    optimizer = osd_torch.make_optimizer(
        net.named_parameters(), "galore_adamw", "continuous", lr=LR, rank=RANK, select=ALL
    )
    optimizer.param_groups[0]["proj_type"] = "std"
    net["mlp"].grad = gradient_of(0, "mlp")
    optimizer.step()
    assert set(optimizer.state[net["mlp"]]) == {"step", "set_at", "basis", "exp_avg", "exp_avg_sq"}


def test_a_function_of_the_gradient_itself_leaves_it_alone() -> None:
    net = model()
    lift = GREEDY._replace(
        apply=lambda direction, seen: Lifted(None, rest=seen.gradient, then=Tensor.sign_)
    )
    optimizer = toys(net, lift=lift)
    net["mlp"].grad = gradient_of(0, "mlp")
    optimizer.step()
    assert torch.equal(net["mlp"].grad, gradient_of(0, "mlp"))


# The classes with objects.


def same_run(first: Callable[[Any], Any], second: Callable[[Any], Any]) -> None:
    ends = []
    for build in (first, second):
        net = model()
        optimizer = build(net)
        plain(net, optimizer)
        ends.append({name: param.detach() for name, param in net.items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in SHAPES)


ALL = lambda name, param: True


@pytest.mark.parametrize("proj_type", ["std", "random", "continuous", "full"])
def test_objects_are_what_the_names_stand_for(proj_type: str) -> None:
    rule = {
        "std": osd_torch.svd(5),
        "full": osd_torch.svd(5),
        "random": osd_torch.random(5),
        "continuous": osd_torch.online_pca(Adam(), step_size=0.25, weight_decay=0.01),
    }[proj_type]
    same_run(
        lambda net: osd_torch.SubspaceAdamW(
            net.named_parameters(), lr=LR, weight_decay=0.1, rank=RANK, basis=rule, select=ALL,
            lift=osd_torch.scaled(0.25), side="both" if proj_type == "full" else None,
        ),
        lambda net: osd_torch.make_optimizer(
            net.named_parameters(), "galore_adamw", proj_type, lr=LR, weight_decay=0.1, rank=RANK,
            update_proj_gap=4 if proj_type == "continuous" else 5, scale=0.25, select=ALL,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["galore_adamw", "galore_lion", "galore_adafactor"])
def test_the_learning_rate_may_be_a_tensor(name: str) -> None:
    def build(net: nn.Module, lr: Any) -> Any:
        options = {"lr": lr, "rank": RANK, "select": ALL}
        return osd_torch.make_optimizer(net.named_parameters(), name, "continuous", **options)

    exact = torch.tensor(LR, dtype=torch.float64)
    same_run(lambda net: build(net, LR), lambda net: build(net, exact))


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"beta1": 0.8, "beta2": 0.95, "eps": 1e-4}, Adam((0.8, 0.95), 1e-4, eps_first=True)),
        ({}, Adam((0.9, 0.999), 1e-6, eps_first=True)),
    ],
)
def test_betas_and_eps_reach_the_rule(options: dict[str, float], wanted: Adam) -> None:
    optimizer = osd_torch.make_optimizer(
        model().named_parameters(), "galore_adamw", lr=LR, select=ALL, **options
    )
    assert optimizer.rule(optimizer.param_groups[0]) == wanted
    for name in ("adamw", "adam"):
        group = osd_torch.make_optimizer(model().named_parameters(), name, lr=LR, **options)
        betas = (options.get("beta1", 0.9), options.get("beta2", 0.999))
        assert group.param_groups[0]["betas"] == betas
        assert group.param_groups[0]["eps"] == options.get("eps", 1e-8)


def test_no_decay_splits_the_groups() -> None:
    net = model()
    net["norm"] = nn.Parameter(torch.ones(4, dtype=torch.float64))
    built = osd_torch.make_optimizer(
        net.named_parameters(), "galore_adamw", lr=LR, weight_decay=0.1, rank=RANK,
        select=lambda name, param: name != "norm", no_decay=lambda name, param: name != "mlp",
    )  # fmt: skip
    found = {
        name: (group["weight_decay"], group["rank"])
        for group in built.param_groups
        for name in group["param_names"]
    }
    assert found == {"mlp": (0.1, RANK), "attn": (0.0, RANK), "norm": (0.0, None)}
    for name in ("adamw", "adam", "lion"):
        built = osd_torch.make_optimizer(
            net.named_parameters(), name, lr=LR, weight_decay=0.1,
            no_decay=lambda name, param: param.ndim < 2,
        )  # fmt: skip
        assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": "svd"}, "basis is 'svd': expected None or a BasisRule"),
        ({"lift": 0.25}, "lift is 0.25: expected None or a Lift"),
        ({"side": "top"}, "side is 'top': expected one of shorter"),
        ({"side": "both"}, r"side is 'both', but basis is online_pca\(.*moves one basis"),
        ({"rank": 0}, "rank is 0: expected a whole number"),
    ],
)
def test_what_is_no_object_is_refused(options: dict[str, Any], message: str) -> None:
    given = {"rank": RANK, "basis": osd_torch.online_pca(), **options}
    with pytest.raises(ValueError, match=message):
        osd_torch.SubspaceAdamW(model().named_parameters(), lr=LR, select=ALL, **given)


def test_rules_are_refused_or_taken_by_what_they_are() -> None:
    with pytest.raises(ValueError, match="rule is 'adam': expected a Rule"):
        osd_torch.OnlineSubspaceDescent(model().parameters(), LR, rule="adam", rank=RANK)
    with pytest.raises(TypeError, match="SubspaceAdamW has no argument 'projector'"):
        osd_torch.SubspaceAdamW(model().parameters(), lr=LR, rank=RANK, projector=None)
    with pytest.raises(ValueError, match="rank is given, but params are groups"):
        osd_torch.SubspaceAdamW([{"params": list(model().parameters())}], lr=LR, rank=RANK)
    with pytest.raises(ValueError, match="step_size is -1"):
        osd_torch.online_pca(step_size=-1.0)
    with pytest.raises(ValueError, match="factor is nan"):
        osd_torch.scaled(math.nan)


def test_optimizers_with_objects_are_copied_and_pickled() -> None:
    net = model()
    optimizer = osd_torch.SubspaceAdamW(
        net.named_parameters(), lr=LR, rank=RANK, select=ALL, lift=osd_torch.scaled(0.5),
        basis=osd_torch.online_pca(Adam(), penalty=0.1),
    )  # fmt: skip
    plain(net, optimizer, 3)
    ends = []
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (group,) = other.param_groups
        params = dict(zip(group["param_names"], group["params"], strict=True))
        for name, param in params.items():
            param.grad = gradient_of(3, name)
        other.step()
        ends.append(params)
    for name, param in net.items():
        param.grad = gradient_of(3, name)
    optimizer.step()
    assert all(torch.equal(net[name], end[name]) for end in ends for name in SHAPES)


def test_fields_of_rules_that_are_younger_come_last() -> None:
    """A pickle holds a tuple's fields by their places, so an old one would give a wrong meaning."""
    assert BasisRule._fields[:10] == (
        "clock", "fresh", "needs", "gradient", "optimizer", "weight_decay", "two_sided", "order",
        "step_size", "name",
    )  # fmt: skip
    assert Lift._fields[:6] == ("apply", "needs", "init", "name", "two_sided", "linear")


def test_a_pickle_without_younger_options_trains_on_and_takes_groups() -> None:
    optimizer = FullRankAdam([nn.Parameter(torch.ones(4, 3))], lr=LR)
    state = optimizer.__getstate__()
    younger = ("second_moment", "first_moment", "stochastic_rounding")
    for options in (state["defaults"], *state["param_groups"]):
        for name in younger:
            del options[name]
    old = FullRankAdam.__new__(FullRankAdam)
    old.__setstate__(state)
    old.add_param_group({"params": [nn.Parameter(torch.ones(2, 3))]})
    for group in old.param_groups:
        assert group["second_moment"] == "full"
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    old.step()


def test_a_rule_of_ones_own_may_refuse_or_read_a_change_of_p() -> None:
    class Counting(Adam):
        changes = 0

        def transport_(self, state: Any, change: Any, t: int) -> None:
            Counting.changes += 1
            super().transport_(state, change, t)

    net = model()
    optimizer = osd_torch.OnlineSubspaceDescent(
        net.named_parameters(), LR, rule=Counting(), rank=RANK, select=ALL, transport_moments=True
    )
    plain(net, optimizer, 4)
    assert Counting.changes == 2 * 3  # P is set at the first step, and moves after the others


@pytest.mark.parametrize("rule", [Adam(), Lion(), osd_torch.rules.Adafactor(0.9)])
def test_a_lift_that_is_not_linear_sees_no_learning_rate(rule: Any) -> None:
    """By the sign each entry moves by the rate times what the rule corrects biases by."""
    net = model()
    optimizer = osd_torch.OnlineSubspaceDescent(
        net.named_parameters(), 1e-3, rule=rule, rank=RANK, select=ALL,
        lift=osd_torch.sign_after_lift(),
    )  # fmt: skip
    before = net["mlp"].detach().clone()
    net["mlp"].grad = gradient_of(0, "mlp")
    optimizer.step()
    correction = math.sqrt(1e-3) / 0.1 if isinstance(rule, Adam) else 1.0
    moved = (net["mlp"].detach() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3 * correction))


def test_p_before_w_takes_what_a_lift_reads_again() -> None:
    seen_by_lift = []

    def note(direction: Tensor, seen: Seen) -> Lifted:
        fresh = make_sketch(seen.basis, seen.gradient, (CORRELATION,))
        seen_by_lift.append((seen.sketch.statistics["correlation"], fresh))
        return Lifted(direction)

    net = model()
    optimizer = osd_torch.OnlineSubspaceDescent(
        net.named_parameters(), LR, rule=Adam(), rank=RANK, select=ALL,
        basis=osd_torch.online_pca(SGD(), order="before"),
        lift=Lift(note, Needs((CORRELATION,), "always", "a test")),
    )  # fmt: skip
    plain(net, optimizer, 3)
    for found, fresh in seen_by_lift:
        torch.testing.assert_close(found, fresh.statistics["correlation"], rtol=1e-12, atol=1e-14)


def test_moments_stay_where_p_stays() -> None:
    ends = []
    for follow in (False, True):
        net = model()
        optimizer = osd_torch.SubspaceAdamW(
            net.named_parameters(), lr=LR, rank=RANK, select=ALL, transport_moments=follow,
            basis=osd_torch.online_pca(Adam(), step_size=0.0),
        )  # fmt: skip
        plain(net, optimizer, 4)
        ends.append(optimizer.state[net["mlp"]]["exp_avg_sq"])
    assert torch.equal(*ends)


def test_groups_that_are_added_have_the_constructors_rules() -> None:
    net = model()
    optimizer = osd_torch.SubspaceAdamW(
        [net["mlp"]], lr=LR, rank=RANK, basis=osd_torch.svd(7), lift=osd_torch.scaled(0.5)
    )
    optimizer.add_param_group({"params": [net["attn"]], "rank": 2})
    group = optimizer.param_groups[1]
    assert optimizer.basis_rule(group).name == "svd(7)"
    assert optimizer.lift(group).name == "scaled(0.5)"
    muon = osd_torch.SubspaceMuon([net["mlp"]], lr=LR, full_lr=0.5, rank=RANK)
    other = copy.deepcopy(muon)
    other.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert [group["lr"] for group in other.param_groups] == [LR, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"basis": osd_torch.svd(5)}, "basis is given, but nothing is projected: give rank"),
        ({"transport_moments": True}, "transport_moments is given, but nothing is projected"),
        ({"select": ALL}, "select is given without rank"),
        ({"rank": 2, "transport_moments": "no"}, "transport_moments is 'no': expected True or"),
        ({"betas": 0.9}, "betas are 0.9: expected two numbers"),
        ({"eps": -1.0}, "eps is -1.0"),
    ],
)
def test_nothing_is_ignored_in_silence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        osd_torch.SubspaceAdamW([("mlp", nn.Parameter(torch.ones(4, 3)))], lr=LR, **options)


def test_names_beside_objects_are_refused() -> None:
    named = [("mlp", nn.Parameter(torch.ones(4, 3)))]
    for key, value, of in (("penalty", 0.1, "basis"), ("scale", 0.5, "lift")):
        group = {"params": named, "rank": 2, key: value}
        given = {"basis": osd_torch.svd(5)} if of == "basis" else {"lift": osd_torch.scaled()}
        with pytest.raises(ValueError, match=f"{key} is {value}, but {of} is given"):
            osd_torch.SubspaceAdamW([{**group, **given}], lr=LR)
    with pytest.raises(ValueError, match="optimizer is <class.*expected a Rule"):
        osd_torch.online_pca(Adam)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="min_8bit_size is -1"):
        osd_torch.SubspaceAdamW8bit(named, lr=LR, min_8bit_size=-1)


def test_a_rule_without_a_name_is_known_by_its_code() -> None:
    class Plain:
        """A rule without a repr."""

        init, step, step_, transport_ = SGD.init, SGD.step, SGD.step_, SGD.transport_

    first, second = (Lift(lambda direction, seen: Lifted(direction)) for _ in range(2))
    saved = toys(model(), lift=Lift(add_row_sums, TOY_LIFT.needs, TOY_LIFT.init))
    loaded = toys(model(), lift=Lift(add_row_sums, TOY_LIFT.needs, TOY_LIFT.init))
    loaded.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match="'lift' of group 0"):
        toys(model(), lift=first).load_state_dict(saved.state_dict())
    assert second.name == ""
    build = lambda: osd_torch.OnlineSubspaceDescent(
        model().named_parameters(), LR, rule=Plain(), rank=RANK, select=ALL
    )
    build().load_state_dict(build().state_dict())


def test_a_lift_may_not_return_other_state_than_it_began_with() -> None:
    def grows(direction: Tensor, seen: Seen) -> Lifted:
        return Lifted(direction, state={"more": direction})

    net = model()
    optimizer = toys(net, lift=Lift(grows, name="grows"))
    net["mlp"].grad = gradient_of(0, "mlp")
    with pytest.raises(ValueError, match="the lift grows returns state 'more'.*its init, absent"):
        optimizer.step()


def test_a_state_from_before_moments_could_follow_p_keeps_the_choice() -> None:
    def build(**more: Any) -> Any:
        return osd_torch.make_optimizer(
            model().named_parameters(), "galore_adamw", lr=LR, rank=RANK, select=ALL, **more
        )

    old = build().state_dict()
    for group in old["param_groups"]:
        for name in ("transport_moments", "basis", "lift", "side"):
            del group[name]
    new = build(transport_moments=True)
    new.load_state_dict(old)
    assert new.param_groups[0]["transport_moments"] is True
