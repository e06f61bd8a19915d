"""Layer-by-layer updates, and accumulated sketches of micro-batches."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import osd_torch
from osd_names import FULL_RANK_OPTIMIZERS, SUBSPACE_OPTIMIZERS
from osd_torch.rules import SGD
from osd_torch.sketch import make_sketch

PEAK, GAP, RANK, SCALE, DECAY = 0.02, 3, 4, 0.5, 0.1
BETAS, EPS = (0.9, 0.999), 1e-6


class Net(torch.nn.Module):
    """Three projected weights, whose P is on the input side, the output side and either."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp_up = torch.nn.Linear(12, 20, bias=False)
        self.mlp_down = torch.nn.Linear(20, 12, bias=False)
        self.attn = torch.nn.Linear(12, 12)
        self.head = torch.nn.Linear(12, 7)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_down(torch.tanh(self.mlp_up(x)))
        return self.head(torch.tanh(self.attn(x)))


PROJECTED = ("mlp_up.weight", "mlp_down.weight", "attn.weight")


def build(net: Net, optimizer: str, proj_type: str, **options: Any) -> torch.optim.Optimizer:
    scale = 1.0 if optimizer == "osd_muon" else SCALE
    options = {"lr": PEAK, "rank": RANK, "update_proj_gap": GAP, "scale": scale, **options}
    return osd_torch.make_optimizer(net.named_parameters(), optimizer, proj_type, **options)


def micro_batches(update: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Three, of 5, 9 and 2 rows."""
    generator = torch.Generator().manual_seed(update)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)
    return [(draw(rows, 12), draw(rows, 7)) for rows in (5, 9, 2)]


def loss_of(net: Net, micro: tuple[Tensor, Tensor], rows: int) -> Tensor:
    """This micro-batch's part of the mean over an update's rows."""
    return (net(micro[0]) - micro[1]).square().sum() / rows


def whole_batch(update: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*micro_batches(update, dtype), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def state_of(net: Net, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [x for p in net.parameters() for _, x in sorted(optimizer.state[p].items())]
    return [x.detach().clone() for x in (*net.parameters(), *state) if isinstance(x, Tensor)]


@pytest.mark.parametrize("proj_type", ["std", "continuous"])
@pytest.mark.parametrize("optimizer", [*SUBSPACE_OPTIMIZERS, *FULL_RANK_OPTIMIZERS])
def test_a_step_inside_the_hook_is_the_plain_step_bit_for_bit(
    optimizer: str, proj_type: str
) -> None:
    if optimizer in FULL_RANK_OPTIMIZERS and proj_type != "std":
        return
    ends = []
    for layerwise in (False, True):
        net = Net(torch.float32)
        built = build(net, optimizer, proj_type, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.LambdaLR(built, lambda step: 1 / (1 + step))
        updates = osd_torch.LayerwiseUpdates(built) if layerwise else None
        for update in range(5):
            loss_of(net, whole_batch(update, torch.float32), 16).backward()
            if updates:
                assert all(param.grad is None for param in net.parameters())
                updates.finish()
            else:
                built.step()
                built.zero_grad()
            schedule.step()
        ends.append(state_of(net, built))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def plain_loop(proj_type: str, lrs: list[float], clipping: float) -> tuple[Net, list[float]]:
    """The method from its equations, with whole gradients, in the release's conventions.

    P from the first micro-batch where it is due. R of the whole gradient; A and s as the mean over
    the micro-batches. P moves by plain gradient descent ("continuous_sgd") or by SVD ("std").
    """
    net = Net()
    params = dict(net.named_parameters())
    first = {name: 0.0 for name in params}
    second = {name: 0.0 for name in params}
    bases: dict[str, Tensor] = {}
    norms = []
    for update, lr in enumerate(lrs):
        parts = []
        for micro in micro_batches(update):
            loss = loss_of(net, micro, 16)
            grads = torch.autograd.grad(loss, list(params.values()))
            parts.append(dict(zip(params, grads, strict=True)))
        shares = [len(x) / 16 for x, _ in micro_batches(update)]
        applied, correlation, square = {}, {}, {}
        for name in params:
            matrices = [part[name] for part in parts]
            if name in PROJECTED:
                u, _, vt = torch.linalg.svd(matrices[0], full_matrices=False)
                m, n = params[name].shape
                if update == 0 or (proj_type == "std" and update % GAP == 0):
                    bases[name] = (vt.mT if m >= n else u)[:, :RANK].clone()
                if m >= n:
                    matrices = [matrix.mT for matrix in matrices]
                P = bases[name]
                correlation[name] = sum(
                    G @ (P.mT @ G).mT / w for G, w in zip(matrices, shares, strict=True)
                )
                square[name] = sum(
                    G.square().sum() / w for G, w in zip(matrices, shares, strict=True)
                )
                applied[name] = P.mT @ sum(matrices)
            else:
                applied[name] = sum(matrices)
        norm = torch.sqrt(sum(x.square().sum() for x in applied.values()))
        norms.append(norm.item())
        factor = min(1.0, clipping / (norm.item() + 1e-6)) if clipping else 1.0
        for name, param in params.items():
            gradient = applied[name] * factor
            first[name] = BETAS[0] * first[name] + (1 - BETAS[0]) * gradient
            second[name] = BETAS[1] * second[name] + (1 - BETAS[1]) * gradient**2
            correction = (1 - BETAS[1] ** (update + 1)) ** 0.5 / (1 - BETAS[0] ** (update + 1))
            step = lr * correction * first[name] / (second[name].sqrt() + EPS)
            with torch.no_grad():
                if name in PROJECTED:
                    P, (m, n) = bases[name], param.shape
                    step = SCALE * P @ step
                    step = step.mT if m >= n else step
                param.copy_((param - step) * (1 - lr * DECAY))
            if name in PROJECTED and proj_type == "continuous_sgd" and update > 0:
                A, s = correlation[name], square[name]
                slope = 2 / s * (P @ (P.mT @ A) + A @ (P.mT @ P) - 2 * A)
                bases[name] = P - lr / PEAK / GAP * slope
    return net, norms


@pytest.mark.parametrize("clipping", [0.0, 3.2])
@pytest.mark.parametrize("proj_type", ["std", "continuous_sgd"])
def test_micro_batches_layer_by_layer_against_a_plain_loop(proj_type: str, clipping: float) -> None:
    """Steps, learning rates, norms, clipping and final weights of 7 updates of 3 micro-batches."""
    net = Net()
    built = build(net, "galore_adamw", proj_type, weight_decay=DECAY)
    ratio = lambda step: min(1.0, (step + 1) / 3) * 0.9**step
    schedule = torch.optim.lr_scheduler.LambdaLR(built, ratio)
    lrs: list[float] = []
    record = lambda optimizer, args, kwargs: lrs.append(optimizer.param_groups[0]["lr"])
    built.register_step_post_hook(record)
    norms = []
    with osd_torch.LayerwiseUpdates(built, micro_batches=3, grad_clipping=clipping) as updates:
        for update in range(7):
            for micro in micro_batches(update):
                updates.share = len(micro[0]) / 16
                loss_of(net, micro, 16).backward()
                assert all(net.get_parameter(name).grad is None for name in PROJECTED)
            norms.append(updates.finish().item())
            assert all(param.grad is None for param in net.parameters())
            schedule.step()
    expected_lrs = [PEAK * ratio(step) for step in range(7)]
    expected, expected_norms = plain_loop(proj_type, expected_lrs, clipping)
    assert lrs == expected_lrs
    assert {int(state["step"]) for state in built.state.values()} == {7}
    assert norms == pytest.approx(expected_norms, rel=1e-9)
    assert not clipping or max(norms) > clipping > min(norms)
    for ours, theirs in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_clipping_alone_waits_and_one_micro_batch_is_exact() -> None:
    """Clipping that does not bite changes nothing, bit for bit."""
    ends = []
    for clipping in (0.0, 1e6):
        net = Net()
        built = build(net, "galore_adamw", "continuous")
        updates = osd_torch.LayerwiseUpdates(built, grad_clipping=clipping)
        assert updates.waits == bool(clipping)
        for update in range(4):
            loss_of(net, whole_batch(update, torch.float64), 16).backward()
            updates.finish()
        ends.append(state_of(net, built))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


def test_a_sum_of_sketches() -> None:
    """R of a sum is exact; A and s are the mean of the parts' own, each scaled to a whole."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(10, 14, dtype=torch.float64))
    optimizer = osd_torch.make_optimizer([("mlp", weight)], "galore_adamw", "continuous", lr=0.1)
    optimizer.param_groups[0]["rank"] = 3
    draw = lambda: torch.randn(10, 14, generator=generator, dtype=torch.float64)
    shares = (0.25, 0.125, 0.625)
    for step in range(2):  # P is set in the first, and does not move: only R is read
        parts = [share * (draw() + 1) for share in shares]
        for part, share in zip(parts, shares, strict=True):
            weight.grad = part.clone()
            optimizer.accumulate(weight, share)
            assert weight.grad is None
        basis, held = osd_torch.projectors(optimizer)["mlp"], optimizer.held[weight]
        statistics = osd_torch.online_pca(SGD()).needs.statistics if step else ()
        whole = make_sketch(basis, sum(parts), statistics)
        torch.testing.assert_close(held.low_rank, whole.low_rank, rtol=1e-12, atol=1e-12)
        assert held.statistics.keys() == whole.statistics.keys()
        if step == 0:
            u = torch.linalg.svd(parts[0])[0][:, :3]
            torch.testing.assert_close(basis, u)  # set from the first part
            optimizer.step()
    own = [
        make_sketch(basis, part / share, statistics)
        for part, share in zip(parts, shares, strict=True)
    ]
    for name in ("correlation", "squared_norm"):
        mean = sum(w * x.statistics[name] for w, x in zip(shares, own, strict=True))
        torch.testing.assert_close(held.statistics[name], mean, rtol=1e-12, atol=1e-12)
    # The mean is over more than the whole's own: the parts' variance is in it.
    assert held.statistics["squared_norm"] > whole.statistics["squared_norm"]


def test_a_micro_batch_without_tokens_adds_nothing() -> None:
    ends = []
    for shares in ((0.0, 0.25, 0.75), (0.25, 0.75)):
        net = Net()
        built = build(net, "galore_adamw", "continuous")
        updates = osd_torch.LayerwiseUpdates(built, micro_batches=len(shares))
        for update in range(2):
            used = iter(micro_batches(update))
            for share in shares:
                updates.share = share
                inputs, targets = next(used) if share else micro_batches(99)[0]
                (share * (net(inputs) - targets).square().mean()).backward()
            updates.finish()
        ends.append(state_of(net, built))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("galore_adamw", {}),
        ("galore_adamw", {"micro_batches": 3}),
        ("galore_adamw8bit", {"micro_batches": 3, "grad_clipping": 1.0}),
        ("adamw", {}),
    ],
)
def test_gradients_of_projected_weights_never_pile_up(optimizer: str, options: dict) -> None:
    """Their bytes alive at once are at most the largest weight's, at every hook."""
    net = Net(torch.float32)
    built = build(net, optimizer, "std")
    alive: dict[int, tuple[weakref.ref, int]] = {}
    peaks = []

    def watch(gradient: Tensor) -> None:
        storage = gradient.untyped_storage()
        alive[id(gradient)] = (weakref.ref(gradient), storage.nbytes())
        peaks.append(sum(size for ref, size in alive.values() if ref() is not None))

    projected = [net.get_parameter(name) for name in PROJECTED]
    for param in projected:
        param.register_hook(watch)
    with osd_torch.LayerwiseUpdates(built, **options) as updates:
        for update in range(2):
            for micro in micro_batches(update, torch.float32):
                loss_of(net, micro, 16).backward()
                if not updates.waits:
                    updates.finish()
            if updates.waits:
                updates.finish()
    assert len(peaks) == 2 * 3 * len(projected)
    assert max(peaks) <= max(param.numel() * 4 for param in projected)


@pytest.mark.parametrize("optimizer", ["galore_adamw", "adamw"])
@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"grad_clipping": 1.0}])
def test_a_gradient_that_is_not_finite_is_one_skipped_update(optimizer: str, options: dict) -> None:
    """NaN in the first layer's gradients, at the first update and at a later one."""
    net = Net(torch.float32)
    built = build(net, optimizer, "continuous" if optimizer == "galore_adamw" else "std")
    counts = []
    updates = osd_torch.LayerwiseUpdates(built, **options)
    for update in range(6):
        before = [param.detach().clone() for param in net.parameters()]
        is_bad = update in (0, 3, 4)
        for i in range(options.get("micro_batches", 1)):
            inputs, targets = micro_batches(update, torch.float32)[i]
            hidden = inputs.clone()
            if is_bad and i == 0:
                hidden[0, 0] = torch.inf
            loss_of(net, (hidden, targets), 16).backward()
        norm = updates.finish()
        counts.append(osd_torch.skipped_steps(built))
        assert torch.isfinite(norm) == (not is_bad)
        assert all(torch.isfinite(param).all() for param in net.parameters())
        same = [torch.equal(x, y) for x, y in zip(before, net.parameters(), strict=True)]
        assert any(same) if is_bad else not any(same)
        assert all(same) or not (is_bad and updates.waits)
    assert counts == [(1, 1), (1, 0), (1, 0), (2, 1), (3, 2), (3, 0)]


@pytest.mark.parametrize("options", [{}, {"micro_batches": 3}, {"grad_clipping": 1.0}])
@pytest.mark.parametrize("proj_type", ["std", "continuous"])
def test_moments_of_bfloat16_weights_are_float32_and_decay(proj_type: str, options: dict) -> None:
    """After the gradients stop, n updates leave beta^n of each moment."""
    net = Net(torch.bfloat16)
    built = build(net, "galore_adamw", proj_type, update_proj_gap=1000)
    with osd_torch.LayerwiseUpdates(built, **options) as updates:
        for update in range(12):
            if update == 2:
                before = {p: {k: x.clone() for k, x in built.state[p].items()} for p in built.state}
            for micro in micro_batches(update, torch.bfloat16):
                loss = loss_of(net, micro, 16)
                (loss if update < 2 else 0 * loss).backward()
                if not updates.waits or "grad_clipping" in options:
                    break
            updates.finish()
    for param, state in built.state.items():
        assert {x.dtype for x in state.values()} == {torch.float32}
        assert torch.isfinite(param).all()
        for name, beta in (("exp_avg", BETAS[0]), ("exp_avg_sq", BETAS[1])):
            torch.testing.assert_close(
                state[name], before[param][name] * beta**10, rtol=1e-5, atol=1e-12
            )


def test_clip_measures_and_scales_gradients_of_any_optimizer() -> None:
    net = Net(torch.float32)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss_of(net, whole_batch(0, torch.float32), 16).backward()
    grads = [param.grad.clone() for param in net.parameters()]
    norm = osd_torch.clip_(optimizer, 0)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in grads]).norm())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, net.parameters(), strict=True))
    assert osd_torch.clip_(optimizer, 0.1) == norm
    torch.testing.assert_close(osd_torch.clip_(optimizer, 0), torch.tensor(0.1))


def test_held_sketches_are_transient() -> None:
    net = Net()
    built = build(net, "galore_adamw", "std")
    loss_of(net, micro_batches(0)[0], 16).backward()
    weight = net.attn.weight
    built.accumulate(weight)
    assert "held" not in str(built.state_dict().keys())
    loss_of(net, micro_batches(0)[1], 16).backward()
    with pytest.raises(ValueError, match="attn.weight.*call accumulate"):
        built.step()
    built.zero_grad()
    assert not built.held
    before = weight.detach().clone()
    built.step()
    assert torch.equal(before, weight)


@pytest.mark.parametrize("options", [{"micro_batches": 2}, {"grad_clipping": 1.0}])
def test_moving_p_first_needs_the_gradient_and_is_refused_where_it_is_gone(options: dict) -> None:
    built = build(Net(), "galore_adamw", "continuous", move_projector="before")
    with pytest.raises(ValueError, match="move_projector is 'before'.*use move_projector='after'"):
        osd_torch.LayerwiseUpdates(built, **options)


def test_moving_p_first_inside_the_hook() -> None:
    ends = []
    for layerwise in (False, True):
        net = Net()
        built = build(net, "galore_adamw", "continuous", move_projector="before")
        updates = osd_torch.LayerwiseUpdates(built) if layerwise else None
        for update in range(4):
            loss_of(net, whole_batch(update, torch.float64), 16).backward()
            updates.finish() if updates else built.step()
            built.zero_grad()
        ends.append(state_of(net, built))
    assert all(torch.equal(x, y) for x, y in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batches": 0}, "micro_batches is 0"),
        ({"micro_batches": 1.5}, "micro_batches is 1.5"),
        ({"micro_batches": True}, "micro_batches is True"),
        ({"reduce": "mean"}, "reduce is 'mean': expected a function"),
        ({"grad_clipping": -1.0}, "grad_clipping is -1"),
    ],
)
def test_arguments_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        osd_torch.LayerwiseUpdates(build(Net(), "galore_adamw", "std"), **options)


def test_an_optimizer_that_is_none() -> None:
    with pytest.raises(ValueError, match="optimizer is a Net: expected a torch.optim.Optimizer"):
        osd_torch.LayerwiseUpdates(Net())  # type: ignore[arg-type]


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range(share: float) -> None:
    net = Net()
    built = build(net, "galore_adamw", "std")
    loss_of(net, micro_batches(0)[0], 16).backward()
    with pytest.raises(ValueError, match="share is"):
        built.accumulate(net.attn.weight, share)


def test_close_removes_the_hooks() -> None:
    net = Net()
    with osd_torch.LayerwiseUpdates(build(net, "galore_adamw", "std")):
        pass
    loss_of(net, micro_batches(0)[0], 16).backward()
    assert net.attn.weight.grad is not None


def test_one_set_of_hooks_at_a_time() -> None:
    net = Net()
    optimizer = build(net, "galore_adamw", "std")
    with pytest.raises(ValueError, match="grad_clipping"):
        osd_torch.LayerwiseUpdates(optimizer, grad_clipping=-1)
    updates = osd_torch.LayerwiseUpdates(optimizer, micro_batches=2)
    with pytest.raises(
        ValueError, match=r"another LayerwiseUpdates already updates this optimizer: close\(\)"
    ):
        osd_torch.LayerwiseUpdates(optimizer)
    # Leaving the context during an update: the message says that held sketches must be dropped.
    micro = micro_batches(0)[0]
    loss_of(net, micro, 5).backward()
    updates.close()
    loss_of(net, micro, 5).backward()
    with pytest.raises(ValueError, match=r"zero_grad\(\) to restart the update"):
        optimizer.step()
    optimizer.zero_grad()
    with osd_torch.LayerwiseUpdates(optimizer) as updates:
        loss_of(net, micro, 5).backward()
        assert updates.finish() > 0


def steps_taken(net: Net, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    return {n: int(optimizer.state[p].get("step", 0)) for n, p in net.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"grad_clipping": 1.0}])
def test_a_parameter_that_is_unfrozen_later_takes_one_step_an_update(options: dict) -> None:
    net = Net()
    optimizer = build(net, "galore_adamw", "continuous")
    frozen = [net.head.weight, net.mlp_up.weight]
    with osd_torch.LayerwiseUpdates(optimizer, **options) as updates:
        for update in range(4):
            for param in frozen:
                param.requires_grad_(update >= 2)
            loss_of(net, micro_batches(update)[0], 5).backward()
            updates.finish()
            assert all(param.grad is None for param in net.parameters())
    late = {"head.weight", "mlp_up.weight"}
    assert steps_taken(net, optimizer) == {
        name: 2 if name in late else 4 for name, _ in net.named_parameters()
    }


def test_frozen_parameters_stay_frozen() -> None:
    net = Net()
    net.head.weight.requires_grad_(False)
    with osd_torch.LayerwiseUpdates(torch.optim.SGD(net.parameters(), lr=0.1)):
        assert not net.head.weight.requires_grad


def test_gradients_that_no_hook_takes_are_named() -> None:
    """Left from before, or of a parameter that the optimizer got later."""
    net = Net()
    optimizer = build(net, "galore_adamw", "continuous")
    micro = micro_batches(0)[0]
    loss_of(net, micro, 5).backward()
    with pytest.raises(ValueError, match=r"'mlp_up.weight' already has a gradient.*zero_grad\(\)"):
        osd_torch.LayerwiseUpdates(optimizer)
    optimizer.accumulate(net.mlp_up.weight)
    with pytest.raises(ValueError, match="'mlp_up.weight' already has a gradient, or a sketch"):
        osd_torch.LayerwiseUpdates(optimizer)
    optimizer.zero_grad()
    late = torch.nn.Linear(7, 7).double()
    with osd_torch.LayerwiseUpdates(optimizer):
        optimizer.add_param_group({"params": list(late.named_parameters())})
        with pytest.raises(
            RuntimeError, match=r"'(weight|bias)' has a gradient that no hook consumed"
        ):
            late(net(micro[0])).sum().backward()


@pytest.mark.parametrize("options", [{}, {"micro_batches": 2}, {"micro_batches": 3}])
def test_finish_counts_the_backward_passes(options: dict) -> None:
    net = Net()
    optimizer = build(net, "galore_adamw", "continuous")
    updates, due = osd_torch.LayerwiseUpdates(optimizer, **options), options.get("micro_batches", 1)
    micro = micro_batches(0)[0]
    for done in range(due):
        with pytest.raises(RuntimeError, match=rf"finish\(\) after {done} of the update's {due} "):
            updates.finish()
        loss_of(net, micro, 5).backward()
    with pytest.raises(RuntimeError, match=rf"gradient {due + 1} times in an update of {due} back"):
        loss_of(net, micro, 5).backward()
    updates.drop()
    before = steps_taken(net, optimizer)
    for _ in range(due):
        loss_of(net, micro, 5).backward()
    assert updates.finish() > 0
    assert steps_taken(net, optimizer) == {name: step + 1 for name, step in before.items()}


def test_accumulate_names_what_it_cannot_take() -> None:
    net = Net()
    optimizer = build(net, "galore_adamw", "std")
    with pytest.raises(ValueError, match="'attn.weight' has no gradient: call accumulate after"):
        optimizer.accumulate(net.attn.weight)
    loss_of(net, micro_batches(0)[0], 5).backward()
    with pytest.raises(ValueError, match="'head.weight' is not projected.*keep its gradient"):
        optimizer.accumulate(net.head.weight)
    foreign = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"does not hold the parameter, of shape \(3, 2\)"):
        optimizer.accumulate(foreign)


class Lines:
    """Counts the lines of osd_torch and of torch.optim that run, in every pass of a loop."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Lines:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _enter(self, frame: Any, event: str, arg: Any) -> Any:
        parts = Path(frame.f_code.co_filename).parts
        return self._line if "osd_torch" in parts or "optim" in parts else None

    def _line(self, frame: Any, event: str, arg: Any) -> Any:
        self.count += event == "line"
        return self._line


@pytest.mark.parametrize("case", ["projected", "sketches", "full rank", "torch", "reduce"])
def test_a_hook_visits_its_own_parameter(case: str) -> None:
    """The work of an update is linear in the number of parameters."""

    def lines(count: int) -> int:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(6, 6, bias=False) for _ in range(count)]
        net = torch.nn.ModuleDict({f"mlp{i}": layer for i, layer in enumerate(layers)})
        named = list(net.named_parameters())
        more: dict[str, Any] = {"micro_batches": 2} if case == "sketches" else {}
        if case == "torch":
            optimizer: Any = torch.optim.SGD(net.parameters(), lr=1e-3)
        elif case == "full rank":
            optimizer = osd_torch.make_optimizer(named, "adamw", lr=1e-3)
        else:
            optimizer = osd_torch.make_optimizer(named, "galore_adamw", "random", lr=1e-3, rank=2)
        if case == "reduce":
            more["reduce"] = torch.clone
        with osd_torch.LayerwiseUpdates(optimizer, **more) as updates:
            for step in range(2):  # P is set in the first one
                with Lines() if step else contextlib.nullcontext() as counted:
                    for _ in range(updates.micro_batches):
                        out = functools.reduce(lambda x, layer: layer(x), layers, torch.ones(1, 6))
                        out.sum().backward()
                updates.finish()
        return counted.count

    few, many = lines(8), lines(32)
    assert few > 8 * 10
    assert many < 4.05 * few


def test_a_user_s_hook_sees_the_optimizer_whole() -> None:
    net = Net()
    optimizer = build(net, "galore_adamw", "continuous")
    wanted, seen = sum(len(g["params"]) for g in optimizer.param_groups), []
    optimizer.register_step_post_hook(
        lambda own, *_: seen.append(sum(len(g["params"]) for g in own.param_groups))
    )
    with osd_torch.LayerwiseUpdates(optimizer) as updates:
        loss_of(net, micro_batches(0)[0], 5).backward()
        updates.finish()
    assert seen and set(seen) == {wanted}


def test_a_parameter_that_joins_a_group_later_is_named() -> None:
    net, late = Net(), torch.nn.Linear(7, 7).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with osd_torch.LayerwiseUpdates(optimizer):
        optimizer.param_groups[0]["params"].extend(late.parameters())
        with pytest.raises(RuntimeError, match="has a gradient that no hook consumed"):
            late(net(micro_batches(0)[0][0])).sum().backward()
