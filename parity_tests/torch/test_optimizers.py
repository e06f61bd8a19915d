"""osd_torch's optimizers as optimizers: state, dtypes, errors and unusual gradients."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import osd_torch
from osd_names import FULL_RANK_OPTIMIZERS, PROJ_TYPES, SUBSPACE_OPTIMIZERS
from osd_torch.bases import online_pca_gradient
from osd_torch.rules import SGD
from osd_torch.sketch import make_sketch, product

CLASSES = {
    "galore_adamw": osd_torch.SubspaceAdamW,
    "galore_lion": osd_torch.SubspaceLion,
    "galore_adafactor": osd_torch.SubspaceAdafactor,
    "galore_adamw8bit": osd_torch.SubspaceAdamW8bit,
}
COMBINATIONS = list(itertools.product(SUBSPACE_OPTIMIZERS, PROJ_TYPES))
ONE_OF_EACH = [
    ("galore_adamw", "std"),
    ("galore_adamw", "full"),
    ("galore_lion", "random"),
    ("galore_adafactor", "continuous"),
    ("galore_adamw8bit", "continuous_adam8bit"),
    ("galore_adamw", "continuous_adafactor"),
]


def make_params(dtype: torch.dtype = torch.float32, m: int = 24, n: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"attn.weight": (m, n), "mlp.weight": (n, m), "norm.weight": (m,), "head": (n, n)}
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in shapes.items()
    }


def make(params: dict[str, Tensor], optimizer: str, proj_type: str = "std", **options):
    options = {"lr": 0.01, "rank": 4, "update_proj_gap": 3, **options}
    return osd_torch.make_optimizer(params.items(), optimizer, proj_type, **options)


def set_gradients(params: dict[str, Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params.values():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer: torch.optim.Optimizer, params: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def everything(optimizer: torch.optim.Optimizer, params: dict[str, Tensor]) -> list[Tensor]:
    """Copies of all parameters and of all that the optimizer keeps."""
    state = [x for p in params.values() for _, x in sorted(optimizer.state[p].items())]
    return [x.detach().clone() for x in [*params.values(), *state]]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(("optimizer", "proj_type"), COMBINATIONS)
def test_every_combination_descends(optimizer: str, proj_type: str) -> None:
    params = make_params(m=80, n=72)
    targets = {name: torch.ones_like(param) for name, param in params.items()}
    built = make(params, optimizer, proj_type, lr=0.02, rank=64, update_proj_gap=20)
    losses = []
    for _ in range(12):
        loss = sum((params[name] - target).square().sum() for name, target in targets.items())
        built.zero_grad()
        loss.backward()
        built.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    bases = osd_torch.projectors(built)
    assert list(bases) == ["attn.weight", "mlp.weight"]
    shapes = [tuple(x.shape) for x in bases["attn.weight"]] if proj_type == "full" else None
    if shapes is not None:
        assert shapes == [(80, 64), (72, 64)]
    elif proj_type in ("reverse_std", "left"):
        assert bases["attn.weight"].shape == (80, 64)
    else:
        assert bases["attn.weight"].shape == (72, 64)


@pytest.mark.parametrize("optimizer", FULL_RANK_OPTIMIZERS)
def test_every_full_rank_optimizer_descends(optimizer: str) -> None:
    params = make_params()
    built = make(params, optimizer, weight_decay=0.1)
    before = sum(p.square().sum() for p in params.values())
    for _ in range(5):
        for param in params.values():
            param.grad = 2 * param.detach()
        built.step()
    assert sum(p.square().sum() for p in params.values()) < before
    assert osd_torch.projectors(built) == {}
    assert osd_torch.skipped_steps(built) == (0, 0)


def test_full_rank_names_are_torchs_own() -> None:
    for name, kind in {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}.items():
        assert isinstance(make(make_params(), name), getattr(torch.optim, kind))


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_copy_skips_nonfinite_steps_too(name: str) -> None:
    params = make_params()
    copied = copy.deepcopy(make(params, name))
    copied.load_state_dict(copied.state_dict())
    weights = [p for group in copied.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    for param in weights:
        param.grad = torch.full_like(param, torch.nan)
    copied.step()
    assert all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    assert osd_torch.skipped_steps(copied) == (1, 1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_bfloat16_parameters_get_torchs_adam_with_float32_moments(
    optimizer: str, weight_decay: float
) -> None:
    narrow = make_params(torch.bfloat16)
    wide = {name: torch.nn.Parameter(p.detach().float()) for name, p in narrow.items()}
    built = [make(params, optimizer, weight_decay=weight_decay) for params in (narrow, wide)]
    for step in range(5):
        set_gradients(narrow, step)
        for name, param in wide.items():
            param.grad = narrow[name].grad.float()
            param.data.copy_(narrow[name])  # the same weights before each step
        for one in built:
            one.step()
        for name, param in narrow.items():
            torch.testing.assert_close(param, wide[name].bfloat16())
    assert {x.dtype for state in built[0].state.values() for x in state.values()} == {torch.float32}


@pytest.mark.parametrize("weight_decay", [0.0, 1e-8])
@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_a_whole_basis_changes_nothing(proj_type: str, weight_decay: float) -> None:
    """An eps that dwarfs the gradient makes AdamW linear, which commutes with a rotation."""
    start = make_params(torch.float64)["head"].detach()
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    options = {"lr": 1e7, "weight_decay": weight_decay, "eps": 1e9}
    projected = {"params": [weights[1]], "rank": 99, "proj_type": proj_type}
    optimizers = [
        osd_torch.SubspaceAdamW([weights[0]], **options),
        osd_torch.SubspaceAdamW([projected], **options),
    ]
    for step in range(3):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            set_gradients({"head": weight}, step)
            optimizer.step()
    assert (weights[0] - start).abs().max() > 1e-3
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("optimizer", "proj_type"), ONE_OF_EACH)
def test_state_goes_through_a_file_and_continues_bit_for_bit(
    optimizer: str, proj_type: str, dtype: torch.dtype
) -> None:
    params = make_params(dtype, m=80, n=72)
    options = {"rank": 64, "weight_decay": 0.1}
    built = make(params, optimizer, proj_type, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(built, lambda step: 1 / (1 + step))
    train(built, params, range(4))
    schedule.step()
    file = io.BytesIO()
    torch.save({"optimizer": built.state_dict(), "params": params}, file)
    train(built, params, range(4, 8))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_params = {name: torch.nn.Parameter(p) for name, p in saved["params"].items()}
    resumed = make(resumed_params, optimizer, proj_type, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, resumed_params, range(4, 8))
    assert all_equal(everything(built, params), everything(resumed, resumed_params))
    for state in resumed.state.values():
        assert all(isinstance(value, Tensor) for value in state.values())
        wide = torch.promote_types(dtype, torch.float32)
        assert {x.dtype for x in state.values()} <= {wide, torch.float32, torch.uint8}


def test_loading_copies_the_state() -> None:
    params = make_params()
    first, second = make(params, "galore_adamw"), make(params, "galore_adamw")
    train(first, params, range(1))
    second.load_state_dict(first.state_dict())
    before = everything(first, {})
    train(second, params, range(1, 2))
    assert all_equal(before, everything(first, {}))
    for ours, theirs in zip(first.state.values(), second.state.values(), strict=True):
        assert all(ours[name].data_ptr() != theirs[name].data_ptr() for name in ours)


def saved_state(params: dict[str, Tensor], optimizer: str, proj_type: str, **options) -> dict:
    built = make(params, optimizer, proj_type, **options)
    train(built, params, range(2))
    return built.state_dict()


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        (("galore_lion", "continuous"), "option 'eps' of group 0 is absent there and present in"),
        (("galore_adafactor", "continuous"), "the option 'betas' of group 0 is absent there"),
        (("galore_adamw8bit", "continuous"), "the option 'min_8bit_size' of group 0 is present"),
        (("adamw", "std"), "the number of parameter groups is 1 there and 2 in this SubspaceAdamW"),
    ],
    ids=str,
)
def test_the_state_of_another_optimizer_is_refused(saved: tuple[str, str], message: str) -> None:
    state = saved_state(make_params(), *saved)
    with pytest.raises(ValueError, match=message):
        make(make_params(), "galore_adamw", "continuous").load_state_dict(state)


def test_the_state_of_other_parameters_is_refused_and_changes_nothing() -> None:
    params = make_params(m=16)
    state = saved_state(params, "galore_adamw", "continuous", rank=4)
    built = make(params, "galore_adamw", "continuous", rank=4)
    train(built, params, range(1))
    before = everything(built, params)

    def refusal(state: dict, optimizer: torch.optim.Optimizer = built) -> str:
        with pytest.raises(ValueError, match="the state is of another optimizer or mod") as caught:
            optimizer.load_state_dict(state)
        return str(caught.value)

    reverse = make(dict(reversed(params.items())), "galore_adamw", "continuous", rank=4)
    assert "parameter 0 of group 0 is 'attn.weight' there and 'mlp.weight' in" in refusal(
        state, reverse
    )
    wider = make(make_params(m=20), "galore_adamw", "continuous", rank=4)
    assert "of parameter 'attn.weight' is (16, 4) there and (20, 4) in" in refusal(state, wider)
    for broken, message in (
        ({"exp_avg": "x"}, "'exp_avg' of parameter 'attn.weight' is None there and (16, 4) in"),
        ({"exp_avg_absmax": torch.ones(1)}, "'exp_avg_absmax' of parameter 'attn.weight' is (1,)"),
    ):
        states = {**state["state"], 0: {**state["state"][0], **broken}}
        assert message in refusal({**state, "state": states})
    assert all_equal(before, everything(built, params))
    # Names that a wrapper has lengthened are the same.
    wrapped = make({f"module.{n}": p for n, p in params.items()}, "galore_adamw", "continuous")
    wrapped.load_state_dict(state)


@pytest.mark.parametrize(("optimizer", "proj_type"), ONE_OF_EACH)
def test_the_state_of_a_first_step_that_was_skipped_is_loaded(
    optimizer: str, proj_type: str
) -> None:
    params = make_params()
    built = make(params, optimizer, proj_type)
    with osd_torch.LayerwiseUpdates(built, grad_clipping=1.0):
        sum((p * p).sum() for p in params.values()).backward()
    for param in params.values():
        if param.grad is not None:
            param.grad.fill_(math.nan)
    built.step()
    assert osd_torch.skipped_steps(built) == (1, 1)
    make(make_params(), optimizer, proj_type).load_state_dict(built.state_dict())


def test_moments_of_bfloat16_parameters_are_float32_and_decay() -> None:
    params = make_params(torch.bfloat16)
    built = make(params, "galore_adamw", "continuous")
    train(built, params, range(2))
    state = built.state[params["attn.weight"]]
    assert all(x.dtype == torch.float32 for x in state.values())
    before = state["exp_avg_sq"].clone()
    for _ in range(100):
        for param in params.values():
            param.grad = torch.zeros_like(param)
        built.step()
    torch.testing.assert_close(state["exp_avg_sq"], before * 0.999**100)


def test_basis_dtype_and_no_hidden_memory() -> None:
    params = make_params(m=64, n=32)
    built = make(params, "galore_adamw", "continuous", basis_dtype=torch.bfloat16)
    train(built, params, range(3))
    assert {P.dtype for P in osd_torch.projectors(built).values()} == {torch.bfloat16}
    for proj_type in ("std", "full", "continuous", "random"):
        built = make(params, "galore_adamw", proj_type)
        train(built, params, range(3))
        for state in built.state.values():
            assert all(x.untyped_storage().nbytes() == x.nbytes for x in state.values())


def test_closure() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = osd_torch.SubspaceAdamW([{"params": [weight], "rank": 2}], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 16
    assert optimizer.step(closure).item() < 16


@pytest.mark.parametrize("kind", CLASSES.values())
def test_param_groups_of_galore_torch(kind: type) -> None:
    params = make_params()
    galore = {"rank": 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [
        {"params": [params["norm.weight"]]},
        {"params": [params["attn.weight"], params["mlp.weight"]], **galore},
    ]
    optimizer = kind(groups, lr=0.01)
    optimizer.add_param_group({"params": [params["head"]], "rank": 2, "proj_type": "continuous"})
    params["attn.weight"].grad = None
    train(optimizer, params, range(2))
    assert set(osd_torch.projectors(optimizer)) == {"1.0", "1.1", "2.0"}
    assert "basis" not in optimizer.state[params["norm.weight"]]


def test_a_parameter_without_gradient_is_left_alone() -> None:
    params = make_params()
    built = make(params, "galore_adamw")
    set_gradients(params, 0)
    params["attn.weight"].grad = None
    before = params["attn.weight"].detach().clone()
    built.step()
    assert torch.equal(before, params["attn.weight"])
    bases = osd_torch.projectors(built)
    assert {name: bool(P.any()) for name, P in bases.items()} == {
        "attn.weight": False,  # not set yet
        "mlp.weight": True,
    }


@pytest.mark.parametrize("optimizer", SUBSPACE_OPTIMIZERS)
def test_sparse_gradient(optimizer: str) -> None:
    embedding = torch.nn.Embedding(8, 4, sparse=True)
    built = osd_torch.make_optimizer(embedding.named_parameters(), optimizer, lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        built.step()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [*SUBSPACE_OPTIMIZERS, *FULL_RANK_OPTIMIZERS])
def test_a_step_with_a_non_finite_gradient_changes_nothing(name: str, value: float) -> None:
    params = make_params()
    built = make(params, name, "continuous", weight_decay=0.1)
    train(built, params, range(2))
    before = everything(built, params) if name in SUBSPACE_OPTIMIZERS else list(params.values())
    before = [x.detach().clone() for x in before]
    for count in (1, 2):
        set_gradients(params, count)
        params["mlp.weight"].grad[1, 2] = value
        built.step()
        assert osd_torch.skipped_steps(built) == (count, count)
    after = everything(built, params) if name in SUBSPACE_OPTIMIZERS else list(params.values())
    assert all_equal(before, after)
    restored = make(params, name, "continuous", weight_decay=0.1)
    restored.load_state_dict(copy.deepcopy(built.state_dict()))
    train(restored, params, range(1))
    assert osd_torch.skipped_steps(restored) == (2, 0)


def test_a_non_finite_gradient_at_the_first_step() -> None:
    params = make_params()
    built = make(params, "galore_adamw")
    set_gradients(params, 0)
    params["attn.weight"].grad[0, 0] = math.nan
    built.step()
    assert osd_torch.skipped_steps(built) == (1, 1)
    fresh = make(make_params(), "galore_adamw")
    assert built.state_dict()["state"].keys() == fresh.state_dict()["state"].keys()
    for index, state in fresh.state_dict()["state"].items():
        kept = built.state_dict()["state"][index]
        assert state.keys() == kept.keys()
        assert all(torch.equal(x, kept[name]) for name, x in state.items())


@pytest.mark.parametrize(("optimizer", "proj_type"), COMBINATIONS)
def test_a_zero_gradient_moves_nothing(optimizer: str, proj_type: str) -> None:
    params = make_params()
    start = [param.detach().clone() for param in params.values()]
    built = make(params, optimizer, proj_type)
    for _ in range(2):
        for param in params.values():
            param.grad = torch.zeros_like(param)
        built.step()
    assert all_equal(start, [param.detach() for param in params.values()])
    assert all(torch.isfinite(x.float()).all() for x in everything(built, params))
    train(built, params, range(3))
    before = osd_torch.projectors(built)["attn.weight"]
    before = before.clone() if isinstance(before, Tensor) else before
    for param in params.values():
        param.grad = torch.zeros_like(param)
    built.step()
    assert all(torch.isfinite(x.float()).all() for x in everything(built, params))
    if proj_type.startswith("continuous"):
        assert torch.equal(before, osd_torch.projectors(built)["attn.weight"])


@pytest.mark.parametrize("size", [1e-22, 1e-19, 1e18, 1e30])
def test_gradients_of_extreme_size_leave_the_basis_finite(size: float) -> None:
    params = make_params()
    built = make(params, "galore_adamw", "continuous_sgd")
    for step in range(3):
        set_gradients(params, step)
        for param in params.values():
            param.grad *= size
        built.step()
    assert all(torch.isfinite(P).all() for P in osd_torch.projectors(built).values())


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full", "random", "continuous"])
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_the_effective_rank(rank: int, proj_type: str) -> None:
    params = make_params()
    built = make(params, "galore_adamw", proj_type, rank=rank)
    train(built, params, range(4))
    for basis in osd_torch.projectors(built).values():
        for side in basis if isinstance(basis, osd_torch.TwoSided) else [basis]:
            assert side.shape[1] == min(rank, 16)
            if proj_type != "continuous":
                identity = torch.eye(side.shape[1])
                torch.testing.assert_close(side.mT @ side, identity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_online_pca_gradient_is_autograds(penalty: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    for p, q, r in [(7, 5, 3), (4, 9, 4), (6, 6, 1)]:
        matrix, basis = draw(p, q), draw(p, r).requires_grad_()
        unit = matrix / matrix.norm()
        loss = (basis @ basis.mT @ unit - unit).square().sum()
        loss = loss + penalty * (basis.mT @ basis - torch.eye(r)).square().sum()
        (expected,) = torch.autograd.grad(loss, basis)
        rule = osd_torch.online_pca(SGD(), penalty=penalty)
        sketch = make_sketch(basis.detach(), matrix, rule.needs.statistics)
        assert rule.gradient is not None
        closed = rule.gradient(basis.detach(), sketch)
        torch.testing.assert_close(closed, expected, rtol=1e-12, atol=1e-12)


def test_the_papers_options() -> None:
    """Each named option against the step written out, on one matrix, P on the output side."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    start, gradients, lr, decay = draw(6, 9), draw(3, 6, 9), 0.01, 0.1
    weight = torch.nn.Parameter(start.clone())
    optimizer = osd_torch.make_optimizer(
        [("mlp", weight)],
        "galore_lion",
        "continuous_sgd",
        lr=lr,
        rank=2,
        weight_decay=decay,
        penalty=0.1,
        projector_lr_multiple=5,
        projector_weight_decay=decay,
        lion_sign="subspace",
        move_projector="before",
    )
    basis = torch.linalg.svd(gradients[0])[0][:, :2]
    expected, moment = start, torch.zeros(2, 9, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        weight.grad = gradient.clone()
        optimizer.step()
        if step > 0:
            sketch = make_sketch(basis, gradient, osd_torch.online_pca(SGD()).needs.statistics)
            slope = online_pca_gradient(basis, sketch, 0.1)
            basis = basis * (1 - 5 * lr * decay) - 5 * lr * slope
        low_rank = basis.mT @ gradient
        sign = torch.sign(0.9 * moment + 0.1 * low_rank)
        moment = 0.99 * moment + 0.01 * low_rank
        expected = (expected - lr * basis @ sign) * (1 - lr * decay)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(osd_torch.projectors(optimizer)["mlp"], basis)


def test_the_projectors_step_follows_the_schedule() -> None:
    params = make_params()
    built = make(params, "galore_adamw", "continuous", update_proj_gap=50)
    group = built.param_groups[0]
    assert built.projector_lr(group) == 1 / 50
    group["lr"] = 0.005  # by hand
    assert built.projector_lr(group) == 0.5 / 50
    group["lr"] = 0.01
    torch.optim.lr_scheduler.LambdaLR(built, lambda step: 0.25)
    assert built.projector_lr(group) == pytest.approx(0.25 / 50)


def test_random_repeats_by_seed_and_differs_by_name_and_refresh() -> None:
    drawn = []
    for seed in (0, 0, 1):
        params = make_params(m=16, n=16)
        built = make(params, "galore_adamw", "random", seed=seed)
        train(built, params, range(1))
        bases = osd_torch.projectors(built)
        drawn.append({name: P.clone() for name, P in bases.items()})
        train(built, params, range(1, 4))  # a refresh at step 3
        assert not torch.equal(drawn[-1]["mlp.weight"], osd_torch.projectors(built)["mlp.weight"])
    assert torch.equal(drawn[0]["mlp.weight"], drawn[1]["mlp.weight"])
    assert not torch.equal(drawn[0]["mlp.weight"], drawn[2]["mlp.weight"])
    assert not torch.equal(drawn[0]["mlp.weight"], drawn[0]["attn.weight"])


def test_8bit_state_is_bitsandbytes_own() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weights = [torch.nn.Parameter(torch.ones(64, 80)) for _ in range(2)]
    ours = osd_torch.SubspaceAdamW8bit(weights[:1], lr=0.01)
    theirs = bitsandbytes.optim.Adam8bit(weights[1:], lr=0.01)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(64, 80, generator=generator)
        for weight, optimizer in zip(weights, (ours, theirs), strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    state, other = ours.state[weights[0]], theirs.state[weights[1]]
    assert torch.equal(state["exp_avg"], other["state1"])
    assert torch.equal(state["exp_avg_sq"], other["state2"])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-6)


def test_8bit_state_of_small_matrices_is_float32_and_moves() -> None:
    params = make_params()
    built = make(params, "galore_adamw8bit", "continuous_adam8bit")
    before = params["attn.weight"].detach().clone()
    train(built, params, range(3))
    assert built.state[params["attn.weight"]]["exp_avg"].dtype == torch.float32
    assert (params["attn.weight"] != before).all()


def test_a_missing_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    params = make_params()
    with pytest.raises(ImportError, match="pip install"):
        train(make(params, "galore_adamw8bit"), params, range(1))
    with pytest.raises(ImportError, match="pip install"):
        make(params, "adam8bit")


def test_the_library_alone_imports_neither_bitsandbytes_nor_jax() -> None:
    code = "import sys, osd_torch; sys.exit(bool({'bitsandbytes', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "galore_adam"}, "galore_adam.*galore_adamw, galore_lion"),
        ({"proj_type": "svd"}, "svd.*std, reverse_std"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": -3}, "rank is -3"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"update_proj_gap": 0}, "update_proj_gap is 0"),
        ({"update_proj_every": 0}, "update_proj_every is 0: expected a whole number of at least 1"),
        ({"update_proj_every": 2.0}, "update_proj_every is 2.0"),
        ({"update_proj_every": 5}, "update_proj_every is 5: only online PCA"),
        ({"lr": -1.0}, "lr is -1"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": True}, "lr is True"),
        ({"optimizer": "adamw", "lr": True}, "lr is True"),
        ({"seed": None}, "seed is None: expected a whole number"),
        ({"select": "mlp"}, r"select is 'mlp': expected a function \(name, parameter\)"),
        ({"scale": -1.0}, "scale is -1"),
        ({"scale": math.inf}, "scale is inf"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"optimizer": "galore_adafactor", "beta1": 1.0}, "beta1 is 1.0"),
        ({"proj_type": "continuous", "penalty": -1.0}, "penalty is -1"),
        ({"projector_lr_multiple": -1.0}, "projector_lr_multiple is -1"),
        ({"projector_weight_decay": -1.0}, "projector_weight_decay is -1"),
        ({"lion_sign": "both"}, "both.*lifted, subspace"),
        ({"move_projector": "never"}, "never.*after, before"),
        ({"select": lambda name, param: True}, "norm.weight.*not a matrix"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_options_are_checked_at_construction(options: dict, message: str) -> None:
    options = {"optimizer": "galore_adamw", **options}
    with pytest.raises(ValueError, match=message):
        make(make_params(), options.pop("optimizer"), options.pop("proj_type", "std"), **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
@pytest.mark.parametrize("optimizer", [*SUBSPACE_OPTIMIZERS, *FULL_RANK_OPTIMIZERS])
def test_dtypes_that_are_not_trained(optimizer: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"attn.weight.*float32, bfloat16 or float64"):
        make(make_params(dtype), optimizer)


def test_a_bad_group_is_not_added() -> None:
    params = make_params()
    optimizer = osd_torch.SubspaceAdamW([params["head"]])
    with pytest.raises(ValueError, match="rank is 0"):
        optimizer.add_param_group({"params": [params["mlp.weight"]], "rank": 0})
    assert len(optimizer.param_groups) == 1


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="empty"):
        osd_torch.make_optimizer([], "galore_adamw", lr=0.1)


@pytest.mark.parametrize("optimizer", ["galore_adamw", "adamw"])
def test_parameters_that_cannot_be_trained(optimizer: str) -> None:
    model = torch.nn.Linear(3, 2)
    for params in (model.parameters(), [{"params": list(model.parameters())}]):
        with pytest.raises(ValueError, match=r"contains a (Parameter|dict).*named_parameters\(\)"):
            osd_torch.make_optimizer(params, optimizer, lr=0.1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="none of the 2 parameters requires a gradient"):
        osd_torch.make_optimizer(model.named_parameters(), optimizer, lr=0.1)


@pytest.mark.parametrize("name", ["galore_adamw", "adamw", "adam8bit"])
def test_counts_of_skipped_steps_are_the_optimizers_own(name: str) -> None:
    def build() -> torch.optim.Optimizer:
        return osd_torch.make_optimizer(make_params().items(), name, lr=0.1)

    built = build()
    for param in built.param_groups[0]["params"]:
        param.grad = torch.full_like(param, math.nan)
    built.step()
    saved = built.state_dict()
    assert not any("skipped_steps" in group for group in built.param_groups)
    # bitsandbytes' own class cannot step after a copy.
    copies = [copy.deepcopy(built), pickle.loads(pickle.dumps(built))] if name != "adam8bit" else []
    for copied in copies:
        assert osd_torch.skipped_steps(copied) == (1, 1)
        for param in copied.param_groups[0]["params"]:
            param.grad = torch.full_like(param, math.nan)
        copied.step()
        assert osd_torch.skipped_steps(copied) == (2, 2)
    # A state without counts, as other tools save it.
    groups = [{k: x for k, x in g.items() if k != "skipped_steps"} for g in saved["param_groups"]]
    plain = {"state": saved["state"], "param_groups": groups}
    for state, counts in ((saved, (1, 1)), (plain, (0, 0))):
        built = build()
        built.load_state_dict(copy.deepcopy(state))
        assert osd_torch.skipped_steps(built) == counts
        assert "skipped_steps" not in built.param_groups[0]


def test_products_of_bfloat16_accumulate_in_float32() -> None:
    a = torch.full((1, 4096), 0.01, dtype=torch.bfloat16)
    assert product(a, a.mT).dtype == torch.float32
    torch.testing.assert_close(product(a, a.mT).item(), 4096 * a[0, 0].item() ** 2)


@pytest.mark.parametrize("name", ["galore_adamw", "adamw"])  # torch steps sgd to make its state
def test_the_state_for_a_distributed_checkpoint_has_the_counts(name: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = torch.nn.ModuleDict({"mlp": torch.nn.Linear(6, 5)})
        return model, osd_torch.make_optimizer(model.named_parameters(), name, lr=0.1)

    model, built = build()
    for value in (1.0, math.nan):
        for param in model.parameters():
            param.grad = torch.full_like(param, value)
        built.step()
    other, restored = build()
    set_optimizer_state_dict(other, restored, get_optimizer_state_dict(model, built))
    assert osd_torch.skipped_steps(restored) == (1, 1)
