"""osd_torch's residual lifts and Muon, compared with released codes and with explicit formulas."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import osd_torch
from osd_torch import BasisRule, Clock
from osd_torch.lift import Seen
from osd_torch.newton_schulz import MUON_COEFFICIENTS, newton_schulz
from osd_torch.residuals import residual_energies
from osd_torch.rules import Adam, Trace
from osd_torch.sharding import whole
from osd_torch.sketch import COLUMN_ENERGIES, make_sketch
from parity_tests.support.lifts import lifts_of
from parity_tests.support.residual_cases import ResidualCase, residual_cases
from parity_tests.support.two_processes import Run

pytestmark = pytest.mark.usefixtures("one_thread")

ALL = lambda name, param: True
LIFTS = lifts_of(osd_torch, torch.float64)


# The released codes.


def lift_of(case: ResidualCase) -> osd_torch.Lift:
    if case.method == "fira_adamw":
        return osd_torch.norm_ratio(case.scale, release=True)
    return osd_torch.gradient_only(
        case.scale, per="matrix" if case.method == "apollo_mini" else "column"
    )


def basis_of(case: ResidualCase, matrices: int) -> BasisRule:
    if "svd" in case.method or case.method == "fira_adamw":
        return osd_torch.svd(case.update_proj_gap)
    drawn = (P for P in case.bases[:: case.update_proj_gap] for _ in range(matrices))
    fresh = lambda matrix, old, side, key, each: torch.tensor(next(drawn)).to(old.dtype)
    return BasisRule(Clock(case.update_proj_gap), fresh)


@pytest.mark.parametrize("foreach", [False, True], ids=["alone", "in a stack"])
@pytest.mark.parametrize("case", residual_cases(), ids=lambda case: case.key)
def test_a_matrix_follows_the_released_code(case: ResidualCase, foreach: bool) -> None:
    """In a stack: the second of two; the first has the other sign."""
    weight = nn.Parameter(torch.tensor(case.start))
    beside = [("other.mlp", nn.Parameter(-torch.tensor(case.start)))] * foreach
    optimizer = osd_torch.SubspaceAdamW(
        [*beside, ("mlp", weight)], lr=case.lr, betas=case.betas, eps=case.eps, rank=case.rank,
        weight_decay=case.weight_decay, basis=basis_of(case, 1 + foreach), lift=lift_of(case),
        foreach=foreach,
    )  # fmt: skip
    for gradient, ratio in zip(case.gradients, case.lr_ratio, strict=True):
        optimizer.param_groups[0]["lr"] = case.lr * ratio
        weight.grad = torch.tensor(gradient)
        for _, other in beside:
            other.grad = -weight.grad
        optimizer.step()
    assert case.error(weight.numpy(force=True)) <= 3e-4
    norm = float(optimizer.state[weight]["lift_norm"])
    assert norm == pytest.approx(case.norms[-1], rel=1e-3)


# The rules written out.


def written_out(name: str, P: Tensor, M: Tensor, D: Tensor, kept: dict[str, Any]) -> Tensor:
    """The direction of W by a lift, from the whole residual, in float64."""
    R = P.mT @ M
    kind = name.split(",")[0]
    columns = lambda x: x.square().sum(dim=0).sqrt()
    if kind == "residual_sign":
        return 0.25 * P @ D + 0.5 * (M - P @ R).sign()
    if kind == "muon":
        update = M + P @ (D - R)
        is_wide = name == "muon, float64"
        X = update / update.norm()
        a, b, c = MUON_COEFFICIENTS
        for _ in range(7 if is_wide else 5):
            A = X @ X.mT
            X = a * X + (b * A + c * A @ A) @ X
        return X * kept["factor"][is_wide]
    if kind == "column_ema":
        E = (M - P @ R).square().sum(dim=0)
        kept["t"] = kept.get("t", 0) + 1
        kept["p"] = 0.9 * kept.get("p", 0) + 0.1 * E
        root = (kept["p"] / (1 - 0.9 ** kept["t"])).sqrt()
        root = torch.maximum(root, 1e-3 * columns(M))
        k = 0.4 * math.sqrt(P.shape[0] - P.shape[1]) / root
        return P @ D + (M - P @ R) * k
    k = columns(D) / (columns(R) + 1e-8)
    if kind == "gradient_only":
        if "matrix" in name:
            return math.sqrt(128) * M * (D.norm() / (R.norm() + 1e-8))
        rest, inside, scale = M * k, 0 * M, math.sqrt(2)
    elif name == "norm_ratio, release":
        rest, inside, scale = (M - 0.25 * P @ R) * k, 0.25 * P @ D, 1.0
    else:
        rest, inside, scale = (M - P @ R) * k, P @ D, 1.0 if "free" in name else 0.25
    if "free" not in name:
        if kept.get("norm", 0) > 0:
            rest = rest / (max(float(rest.norm() / (kept["norm"] + 1e-8)), 1.01) / 1.01)
        kept["norm"] = rest.norm()
    return scale * (inside + rest)


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)])
@pytest.mark.parametrize("basis", ["svd", "online", "gaussian"])
@pytest.mark.parametrize("name", LIFTS)
def test_twenty_steps_against_the_rule_written_out(
    name: str, basis: str, shape: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    rules = {
        "svd": osd_torch.svd(7),
        "online": osd_torch.online_pca(Adam(), step_size=0.05),
        "gaussian": osd_torch.gaussian(7),
    }
    weight, lr, decay = nn.Parameter(draw(*shape)), 0.01, 0.1
    is_muon = "muon" in name
    options: dict[str, Any] = {"rank": 3, "select": ALL, "basis": rules[basis], "lift": LIFTS[name]}
    optimizer = osd_torch.OnlineSubspaceDescent(
        [("mlp", weight)], lr, weight_decay=decay, **options,
        rule=Trace(0.8) if is_muon else Adam((0.9, 0.99), 1e-6, eps_first=True),
    )  # fmt: skip
    m = n, is_input = max(shape), shape[0] > shape[1]
    m, v, expected = 0.0, 0.0, weight.detach().clone()
    kept: dict[str, Any] = {"factor": (0.2 * math.sqrt(n), math.sqrt(max(1, shape[0] / shape[1])))}
    for t in range(1, 21):
        gradient = draw(*shape)
        if t == 5:
            gradient[:, 2] = gradient[3] = 0  # a column of M that is zero, on either side
        before = {k: P.clone() for k, P in osd_torch.projectors(optimizer).items()}
        weight.grad = gradient.clone()
        optimizer.step()
        after = osd_torch.projectors(optimizer)["mlp"]
        P = before["mlp"] if basis == "online" and t > 1 else after
        M = gradient.mT if is_input else gradient
        R = P.mT @ M
        if is_muon:
            m = D = 0.8 * m + R
            rate = lr
        else:
            m, v = 0.9 * m + 0.1 * R, 0.99 * v + 0.01 * R**2
            D, rate = m / (v.sqrt() + 1e-6), lr * math.sqrt(1 - 0.99**t) / (1 - 0.9**t)
        update = written_out(name, P, M, D, kept)
        update = update.mT if is_input else update
        expected = (expected - rate * update) * (1 - lr * decay)
        scale = float(expected.abs().max())
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-9 * scale)


def seen(P: Tensor, M: Tensor) -> Seen:
    return Seen(P, make_sketch(P, M, (COLUMN_ENERGIES,)), M, {})


def test_energies_come_from_statistics_for_any_p() -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    P, M = draw(12, 4) / 3, draw(12, 30)
    for a in (1.0, 0.25):
        wanted = (M - a * P @ P.mT @ M).square().sum(dim=0)
        torch.testing.assert_close(residual_energies(seen(P, M), a), wanted, rtol=1e-12, atol=0)
    inside = torch.linalg.qr(P)[0] @ draw(4, 30)  # no residual: rounding may go below zero
    assert (residual_energies(seen(torch.linalg.qr(P)[0], inside)) >= 0).all()


class LargeProducts(TorchDispatchMode):
    """Counts products that read or write a matrix of the weight's size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_, aten.bmm):
            tensors = [x for x in (*args, found) if isinstance(x, Tensor)]
            self.count += any(x.numel() == self.size for x in tensors)
        return found


def products_of_a_step(lift: osd_torch.Lift) -> int:
    weight = nn.Parameter(torch.randn(40, 30))
    optimizer = osd_torch.SubspaceAdamW([("mlp", weight)], lr=0.01, rank=4, lift=lift)
    for _ in range(3):
        weight.grad = torch.randn(40, 30)
        with LargeProducts(weight.numel()) as mode:
            optimizer.step()
    return mode.count


def test_products_with_the_gradient() -> None:
    """R, A and the lift; `gradient_only` lifts nothing, and `residual_sign` lifts R too."""
    plain = products_of_a_step(osd_torch.scaled())
    assert plain == 3
    for name, lift in LIFTS.items():
        if "muon" not in name:
            more = {"gradient_only": -1, "residual_sign": 1}.get(name.split(",")[0], 0)
            assert products_of_a_step(lift) == plain + more, name


# Muon.


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(14, 9), (9, 14), (12, 12)])
def test_muon_of_full_rank_is_muon(shape: tuple[int, int], nesterov: bool) -> None:
    """With P orthonormal and square, against torch.optim.Muon, whose iteration is in bfloat16."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=draw))
    other = nn.Parameter(weight.detach().clone())
    options = {"momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.1}
    ours = osd_torch.SubspaceMuon(
        [weight], lr=0.02, rank=99, basis=osd_torch.svd(100), ns_dtype=torch.bfloat16, **options
    )
    # torch's momentum is a mean of gradients, (1 - b) times ours: the orthogonalization divides by
    # the norm.
    theirs = torch.optim.Muon([other], lr=0.02, adjust_lr_fn="match_rms_adamw", **options)
    start = weight.detach().clone()
    for _ in range(6):
        gradient = torch.randn(shape, generator=draw)
        weight.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step()
        theirs.step()
    error = (weight - other).detach().norm() / (other - start).detach().norm()
    print(f"{float(error):.1e}")
    assert error < 0.02  # some roundings of bfloat16, 2^-8 each


def test_muon_trains_the_rest_by_adamw_at_its_own_rate() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"mlp": nn.Linear(12, 8), "norm": nn.LayerNorm(8)})
    optimizer = osd_torch.SubspaceMuon(
        model.named_parameters(), lr=0.02, full_lr=0.005, betas=(0.8, 0.9), eps=1e-6, rank=3,
        weight_decay=0.1,
    )  # fmt: skip
    rest = {name: p for name, p in model.named_parameters() if name != "mlp.weight"}
    copies = [nn.Parameter(p.detach().clone()) for p in rest.values()]
    adamw = torch.optim.AdamW(copies, lr=0.005, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.005]
    for step in range(5):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        for copied, param in zip(copies, rest.values(), strict=True):
            copied.grad = param.grad.clone()
        optimizer.step()
        adamw.step()
    for copied, param in zip(copies, rest.values(), strict=True):
        torch.testing.assert_close(param, copied)
    state = optimizer.state[model["mlp"].weight]
    kept = {name for name, x in state.items() if x.ndim == 2 and not name.startswith("projector")}
    assert kept == {"basis", "exp_avg"} and state["exp_avg"].numel() == 3 * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"muon_scale": "big"}, "muon_scale is 'big': expected one of adamw, muon, none"),
        ({"nesterov": "yes"}, "nesterov is 'yes': expected True or False"),
        ({"nesterov": True, "momentum": 0}, "a momentum of 0 keeps no moment"),
        ({"ns_steps": 0}, "steps is 0: expected a whole number"),
        ({"ns_coefficients": (1.0, 2.0)}, "coefficients are .*: expected three numbers"),
        ({"ns_dtype": torch.float16}, "ns_dtype is torch.float16: expected None, float32"),
        ({"momentum": 1.0}, "momentum is 1.0: expected a number in"),
        ({"full_lr": -1.0}, "full_lr is -1.0"),
        ({"ns_steps": 3, "lift": osd_torch.scaled()}, "ns_steps is 3, but lift is given"),
    ],
)
def test_what_muon_does_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        osd_torch.SubspaceMuon([nn.Parameter(torch.ones(4, 3))], rank=2, **options)


# Corners.


@pytest.mark.parametrize("name", LIFTS)
def test_zero_gradients_move_nothing_but_by_momentum(name: str) -> None:
    weight = nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    start = weight.detach().clone()
    optimizer = osd_torch.SubspaceAdamW(
        [("mlp", weight)], lr=0.1, rank=3, lift=LIFTS[name], select=ALL
    )
    for _ in range(3):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.equal(weight, start)
    gradient = torch.randn(12, 8, dtype=torch.float64)
    weight.grad = gradient.clone()
    optimizer.step()  # a kept norm of 0 limits nothing
    first = weight.detach() - start
    assert torch.isfinite(weight).all() and first.norm() > 0.01
    for _ in range(2):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert torch.isfinite(weight).all()
    weight.grad = gradient.clone()
    weight.grad[0, 0] = math.nan
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before) and osd_torch.skipped_steps(optimizer) == (1, 1)


def test_the_limiter_is_blind_to_the_learning_rate() -> None:
    """A warm-up of the rate does not make the residual grow."""
    norms = []
    for rates in ((0.1,) * 6, (0.001, 0.01, 0.1, 0.1, 0.1, 0.1)):
        weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
        optimizer = osd_torch.SubspaceAdamW(
            [("mlp", weight)], lr=0.1, rank=3, lift=osd_torch.norm_ratio(), select=ALL,
            basis=osd_torch.svd(100),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for rate in rates:
            optimizer.param_groups[0]["lr"] = rate
            weight.grad = torch.randn(12, 8, generator=generator, dtype=torch.float64)
            optimizer.step()
        norms.append(float(optimizer.state[weight]["lift_norm"]))
    assert norms[0] == norms[1]


def test_a_residual_grows_by_one_percent_at_most() -> None:
    weight = nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
    optimizer = osd_torch.SubspaceAdamW(
        [("mlp", weight)], lr=0.1, rank=3, lift=osd_torch.gradient_only(), select=ALL
    )
    norms, generator = [], torch.Generator().manual_seed(0)
    for step in range(10):
        draw = torch.randn(12, 8, generator=generator, dtype=torch.float64)
        weight.grad = draw * 10**step
        optimizer.step()
        norms.append(float(optimizer.state[weight]["lift_norm"]))
    growth = [b / a for a, b in zip(norms, norms[1:], strict=False)]
    assert max(growth) <= 1.01 + 1e-9 and max(growth) > 1.0099


def test_newton_schulz_against_the_polar_factor() -> None:
    """The singular values that its polynomial gives, and the polar factor's vectors."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((20, 12), (12, 20), (16, 16)):
        matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        values = s / matrix.norm()
        a, b, c = MUON_COEFFICIENTS
        for _ in range(5):
            values = a * values + b * values**3 + c * values**5
        found = newton_schulz(matrix)
        torch.testing.assert_close(found, (u * values) @ vt, rtol=0, atol=1e-12)
        large = s / matrix.norm() > 2e-3
        assert ((values[large] > 0.68) & (values[large] < 1.21)).all()
        in_16_bits = newton_schulz(matrix.float(), dtype=torch.bfloat16)
        assert in_16_bits.dtype == torch.float32
        assert float((in_16_bits - found).norm() / found.norm()) < 0.03
    for x in (0.0, 1e-25, 1e-30, 1e30):  # the squared norm underflows or overflows
        assert (newton_schulz(torch.full((4, 3), x)).abs() < 1e-2).all()
    assert not newton_schulz(torch.zeros(4, 3)).any()


@pytest.mark.parametrize("name", LIFTS)
def test_where_gradients_are_gone_they_are_refused(name: str) -> None:
    weight = nn.Parameter(torch.randn(12, 8))
    optimizer = osd_torch.SubspaceAdamW(
        [("mlp", weight)], lr=0.1, rank=3, lift=LIFTS[name], select=ALL
    )
    with pytest.raises(ValueError, match="adds a part of the gradient itself.*plain lift"):
        osd_torch.LayerwiseUpdates(optimizer, micro_batches=2)
    if name != "residual_sign" and "muon" not in name:
        with pytest.raises(ValueError, match=r"P is on both sides.*reads one basis"):
            osd_torch.SubspaceAdamW(
                [("mlp", weight)], lr=0.1, rank=3, lift=LIFTS[name], select=ALL, side="both",
                basis=osd_torch.svd(5),
            )  # fmt: skip


@pytest.mark.parametrize("name", LIFTS)
def test_a_layer_at_a_time_with_one_micro_batch(name: str) -> None:
    ends = []
    for layerwise in (False, True):
        torch.manual_seed(0)
        layer = nn.Linear(12, 8)
        optimizer = osd_torch.SubspaceAdamW(
            layer.named_parameters(), lr=0.1, rank=3, lift=LIFTS[name],
            select=lambda name, param: param.ndim == 2,
        )  # fmt: skip
        updates = osd_torch.LayerwiseUpdates(optimizer) if layerwise else None
        for step in range(4):
            layer(torch.full((2, 12), 1.0 + step)).square().sum().backward()
            if updates is None:
                optimizer.step()
                optimizer.zero_grad()
            else:
                updates.finish()
        ends.append(layer.weight.detach().clone())
    assert torch.equal(*ends)


class Matrices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"attn": (16, 12), "mlp": (11, 18)}.items():
            start = torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(start))


def trained(name: str, is_sharded: bool) -> dict[str, Tensor]:
    module = Matrices()
    if is_sharded:
        fully_shard(module)
    optimizer = osd_torch.SubspaceAdamW(
        module.named_parameters(), lr=0.01, rank=4, lift=LIFTS[name], select=ALL
    )
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for param in module.parameters():
            gradient = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            if isinstance(param, DTensor):
                gradient = distribute_tensor(gradient, param.device_mesh, param.placements)
            param.grad = gradient
        optimizer.step()
    return {name: whole(param.detach()).clone() for name, param in module.named_parameters()}


@pytest.mark.parametrize("name", LIFTS)
def test_two_processes_with_shards_are_one(two_processes: Run, name: str) -> None:
    wanted = trained(name, False)
    for found in two_processes(functools.partial(trained, name), True):
        for key, weight in wanted.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", LIFTS)
def test_a_run_resumes_bit_for_bit(name: str) -> None:
    def build() -> tuple[nn.Parameter, Any]:
        weight = nn.Parameter(torch.ones(16, 12))
        return weight, osd_torch.SubspaceAdamW8bit(
            [("mlp", weight)], lr=0.01, rank=4, lift=LIFTS[name], select=ALL, min_8bit_size=1
        )

    pytest.importorskip("bitsandbytes")
    (weight, optimizer), (other, resumed) = build(), build()
    for step in range(8):
        gradient = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone()
        optimizer.step()
        if step == 3:
            other.data.copy_(weight)
            resumed.load_state_dict(optimizer.state_dict())
        elif step > 3:
            other.grad = gradient.clone()
            resumed.step()
    assert torch.equal(weight, other)
    assert float(weight.detach().mean()) != 1
