"""One optimizer step on all projected matrices of a LLaMA in PyTorch, against its floor.

The matrices have the shapes and the number of layers of a config, and random gradients. The floor
is the seven products of each matrix, one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.bench.contender import GAP, LR
from launch.bench.in_torch import SevenProducts, after_first_step, done
from launch.bench.timing import Step, ratios, spread, time_in_rounds

FLOOR = "seven products"
ADAMW = "AdamW (fused)"
# contender -> (optimizer, proj_type, options of make_optimizer)
OURS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "continuous": ("galore_adamw", "continuous", {"foreach": True}),
    "continuous, capturable": ("galore_adamw", "continuous", {"capturable": True}),
    "continuous, one at a time": ("galore_adamw", "continuous", {"foreach": False}),
    "GaLore, between SVDs": ("galore_adamw", "std", {"foreach": True}),
    "osd_muon": ("osd_muon", "continuous_sgd", {"foreach": True}),
}


def matrices(config: Path) -> list[tuple[int, int]]:
    """The shapes of a model's projected matrices, in PyTorch's orientation."""
    import torch

    from osd_torch import llama

    with torch.device("meta"):
        model = llama.build(llama.load_config(config), seed=0, dtype=torch.float32, device="meta")
    named = model.named_parameters()
    return [(x.shape[0], x.shape[1]) for name, x in named if llama.is_projected(name, x)]


def parameters(shapes: list[tuple[int, int]], device: str, dtype: str) -> list[Any]:
    """Weights with gradients."""
    import torch

    torch.manual_seed(0)
    made = []
    for shape in shapes:
        weight = torch.nn.Parameter(torch.randn(shape, device=device).to(getattr(torch, dtype)))
        weight.grad = torch.randn(shape, device=device).to(weight.dtype)
        made.append(weight)
    return made


def floor(shapes: list[tuple[int, int]], rank: int, device: str, dtype: str) -> Step:
    """The seven products of each matrix."""
    import torch

    products = []
    for weight in parameters(shapes, device, dtype):
        is_right = weight.shape[0] >= weight.shape[1]
        p, r = min(weight.shape), min(rank, *weight.shape)
        basis = torch.linalg.qr(torch.randn(p, r, device=device))[0]
        products.append(SevenProducts(weight, weight.grad, basis, is_right))

    def step() -> None:
        for each in products:
            each()

    return done(step, device)


def ours(name: str, shapes: list[tuple[int, int]], rank: int, device: str, dtype: str) -> Step:
    """A step of `osd_torch`, after the first one, which sets P."""
    import torch

    import osd_torch

    optimizer, proj_type, options = OURS[name]
    gap = GAP if proj_type.startswith("continuous") else 10**9
    weights = parameters(shapes, device, dtype)
    built = osd_torch.make_optimizer(
        [(f"{i}.mlp.weight", weight) for i, weight in enumerate(weights)],
        optimizer, proj_type, lr=LR, rank=rank, update_proj_gap=gap, **options,
    )  # fmt: skip
    after_first_step(built, lambda p, r: torch.linalg.qr(torch.randn(p, r, device=device))[0])
    return done(built.step, device)


def adamw(shapes: list[tuple[int, int]], device: str, dtype: str) -> Step:
    """PyTorch's fused AdamW."""
    import torch

    return done(
        torch.optim.AdamW(parameters(shapes, device, dtype), lr=LR, fused=True).step, device
    )


def run(config: Path, rank: int, device: str, dtype: str, rounds: int) -> list[dict[str, Any]]:
    """One record per contender: its seconds, and their ratio to the floor's in the same round."""
    shapes = matrices(config)
    steps: dict[str, Step] = {FLOOR: floor(shapes, rank, device, dtype)}
    steps |= {name: ours(name, shapes, rank, device, dtype) for name in OURS}
    steps[ADAMW] = adamw(shapes, device, dtype)
    times = time_in_rounds(steps, rounds=rounds)
    return [
        {
            "contender": name,
            "matrices": len(shapes),
            "seconds": spread(seconds)._asdict(),
            "over_floor": ratios(seconds, times[FLOOR])._asdict(),
            "over_adamw": ratios(seconds, times[ADAMW])._asdict(),
        }
        for name, seconds in times.items()
    ]
