"""One optimizer step on one matrix: the contenders and their floor.

With the closed form, a step of Online Subspace Descent is seven matrix products of a gradient M
(p, q), P (p, r) and the direction D (r, q) of the weight rule:

    R = P^T M     W += P D     A = M R^T                  2 p q r operations each
    P^T A     P^T P     P (P^T A)     A (P^T P)           2 p r r operations each

These alone are the floor. All other operations of a step read or write each number a few times.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

from launch.bench import in_jax, in_torch
from launch.bench.contender import GAP, Built, Case, Contender, arrays
from launch.bench.timing import Spread, Times, ratios, samples, spread, time_in_rounds

CASES = (
    Case("60M", (512, 512), 128),
    Case("60M", (512, 1376), 128),
    Case("350M", (1024, 1024), 256),
    Case("350M", (1024, 2736), 256),
    Case("1B", (2048, 2048), 512),
    Case("1B", (2048, 5461), 512),
)
CASES_ON_GPU = (Case("7B", (4096, 4096), 1024), Case("7B", (4096, 11008), 1024))

FLOORS = {"torch": "floor, torch", "jax": "floor, jax"}
PUBLISHED = {"torch": "published way, torch", "jax": "published way, jax"}
FULL_RANK = {"torch": "AdamW fused, torch", "jax": "optax.adamw"}
GALORE = {"torch": "GaLore, osd_torch", "jax": "GaLore, osd_jax"}
EVERY = 10  # docs/comparison shows the effect on the loss
CONTENDERS: Mapping[str, Contender] = {
    FLOORS["torch"]: Contender("torch", in_torch.floor),
    "osd_torch, AdamW": Contender("torch", in_torch.osd("galore_adamw", "continuous")),
    "osd_torch, 8-bit AdamW": Contender(
        "torch", in_torch.osd("galore_adamw8bit", "continuous_adam8bit"), "bitsandbytes"
    ),
    "osd_torch, P by SGD": Contender("torch", in_torch.osd("galore_adamw", "continuous_sgd")),
    f"osd_torch, P moved every {EVERY}": Contender(
        "torch", in_torch.osd("galore_adamw", "continuous", EVERY)
    ),
    "osd_torch, osd_muon": Contender("torch", in_torch.osd("osd_muon", "continuous")),
    "osd_torch, Muon": Contender("torch", in_torch.muon),
    GALORE["torch"]: Contender("torch", in_torch.osd("galore_adamw", "std")),
    PUBLISHED["torch"]: Contender("torch", in_torch.published),
    FULL_RANK["torch"]: Contender("torch", in_torch.adamw),
    "torch.optim.Muon": Contender("torch", in_torch.torch_muon),
    "bitsandbytes AdamW8bit": Contender("torch", in_torch.adamw_8bit, "bitsandbytes"),
    FLOORS["jax"]: Contender("jax", in_jax.floor),
    "osd_jax, AdamW": Contender("jax", in_jax.osd("galore_adamw", "continuous")),
    "osd_jax, 8-bit AdamW": Contender("jax", in_jax.osd("galore_adamw8bit", "continuous_adam8bit")),
    "osd_jax, P by SGD": Contender("jax", in_jax.osd("galore_adamw", "continuous_sgd")),
    f"osd_jax, P moved every {EVERY}": Contender(
        "jax", in_jax.osd("galore_adamw", "continuous", EVERY)
    ),
    "osd_jax, osd_muon": Contender("jax", in_jax.osd("osd_muon", "continuous")),
    "osd_jax, Muon": Contender("jax", in_jax.muon),
    GALORE["jax"]: Contender("jax", in_jax.osd("galore_adamw", "std")),
    "GaLore, optax.contrib": Contender("jax", in_jax.optax_galore),
    PUBLISHED["jax"]: Contender("jax", in_jax.published),
    FULL_RANK["jax"]: Contender("jax", in_jax.adamw),
    "optax.contrib.muon": Contender("jax", in_jax.optax_muon),
}


def rates(device: str, dtype: str, rounds: int) -> dict[str, dict[str, Spread]]:
    """Peak rates of the device: operations/s of a large product, bytes/s of a copy.

    Args:
        device: "cpu" or "cuda".
        dtype: Of the matrices.
        rounds: Number of measurements.

    Returns:
        By framework, "product" (operations per second) and "copy" (bytes read and written per
        second).
    """
    import jax
    import jax.numpy as jnp
    import torch

    n = 2048 if device == "cpu" else 8192
    square = torch.full((n, n), 1e-3, dtype=getattr(torch, dtype), device=device)
    result = torch.empty_like(square)
    of_jax = jnp.full((n, n), 1e-3, dtype)
    multiply, negate = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    times = time_in_rounds(
        {
            "torch product": in_torch.done(lambda: torch.mm(square, square, out=result), device),
            "torch copy": in_torch.done(lambda: result.copy_(square), device),
            "jax product": lambda: jax.block_until_ready(multiply(of_jax, of_jax)),
            "jax copy": lambda: jax.block_until_ready(negate(of_jax)),
        },
        rounds=rounds,
    )
    work = {"product": 2 * n**3, "copy": 2 * square.numel() * square.element_size()}
    return {
        framework: {
            what: spread([amount / x for x in times[f"{framework} {what}"]])
            for what, amount in work.items()
        }
        for framework in FLOORS
    }


class Settings(NamedTuple):
    """How long to measure."""

    rounds: int = 15
    turn_seconds: float = 0.05
    svd_seconds: float = 10.0


def run_case(case: Case, settings: Settings, device: str, dtype: str) -> list[dict[str, Any]]:
    """One record per contender: its seconds, and their ratios to others' in the same round."""
    given = arrays(case)
    built: dict[str, Built] = {}
    missing: dict[str, str] = {}
    for name, contender in CONTENDERS.items():
        if contender.package and importlib.util.find_spec(contender.package) is None:
            missing[name] = f"{contender.package} is not installed"
        else:
            built[name] = contender.build(case, given, device, dtype)
    by_framework: dict[str, Spread] = {}  # the same SVD serves all contenders of one framework
    refreshes: dict[str, Spread] = {}
    for name, it in built.items():
        framework = CONTENDERS[name].framework
        if it.refresh is not None:
            if framework not in by_framework:
                taken = samples(it.refresh, most=3, seconds=settings.svd_seconds)
                by_framework[framework] = spread(taken)
            refreshes[name] = by_framework[framework]
    times = time_in_rounds(
        {name: it.step for name, it in built.items()},
        rounds=settings.rounds,
        turn_seconds=settings.turn_seconds,
    )
    times = {name: [x / built[name].period for x in xs] for name, xs in times.items()}
    return records(case, times, refreshes, missing)


def records(
    case: Case, times: Times, refreshes: Mapping[str, Spread], missing: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The times of one case as records; work done every `GAP` steps is amortized over them."""
    whole = {
        name: [x + refreshes[name].median / GAP for x in xs] if name in refreshes else xs
        for name, xs in times.items()
    }
    best_floor = min((times[name] for name in FLOORS.values()), key=lambda x: spread(x).median)
    found = []
    for name, contender in CONTENDERS.items():
        record: dict[str, Any] = {**case._asdict(), "contender": name}
        record["framework"] = contender.framework
        if name in missing:
            found.append({**record, "missing": missing[name]})
            continue
        seconds, side = whole[name], contender.framework
        record |= {
            "seconds": spread(seconds)._asdict(),
            "over_floor": ratios(seconds, times[FLOORS[side]])._asdict(),
            "over_best_floor": ratios(seconds, best_floor)._asdict(),
            "published_over_this": ratios(times[PUBLISHED[side]], seconds)._asdict(),
            "over_galore": ratios(seconds, whole[GALORE[side]])._asdict(),
            "over_full_rank": ratios(seconds, times[FULL_RANK[side]])._asdict(),
        }
        if name in refreshes:
            record["step_alone"] = spread(times[name])._asdict()
            record["svd"] = refreshes[name]._asdict()
        found.append(record)
    return found
