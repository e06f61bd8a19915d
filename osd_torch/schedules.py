"""Estimates the peak of a scheduled learning rate from a parameter group."""

from __future__ import annotations

from typing import Any

from osd_torch.state import Group

# What a group records of the learning rates that it saw; see `seen_rates`.
SEEN = "seen_lr"


def first_rates(group: Group) -> dict[str, Any]:
    """The initial `SEEN` of a group: the peak according to its keys, and no rates."""
    keys = schedule_keys(group)
    given = (keys["max_lr"], keys["initial_lr"], group["lr"])
    peak = float(next(x for x in given if x is not None))
    return {"peak": peak, "first": None, "last": None, "highest": 0.0, **keys}


def schedule_keys(group: Group) -> dict[str, float | None]:
    """The keys that PyTorch's schedulers set in a group when they are created."""
    found = {key: group.get(key) for key in ("max_lr", "initial_lr")}
    return {key: None if x is None else float(x) for key, x in found.items()}


def seen_rates(group: Group) -> dict[str, Any]:
    """The new `SEEN` at the current learning rate.

    A dict of "peak", the estimate; the "first", "last" and "highest" rate of the current schedule;
    and the keys that its scheduler has set. A new schedule has started if a key has changed, or if
    lr does what it never does under `OneCycleLR`: it rises after it fell, or is below `min_lr`. A
    schedule that rose and then falls has shown its peak, if that is below half of the estimate.
    """
    seen, lr, keys = group[SEEN], float(group["lr"]), schedule_keys(group)
    if not lr:  # at the start of a warm-up, and when tools inspect the state
        return seen
    last, highest = seen["last"], seen["highest"]
    changed = [key for key in keys if keys[key] != seen[key]]
    fell = last is not None and last < highest
    after_one_cycle = keys["max_lr"] is not None and (
        (fell and lr > last * (1 + 1e-6)) or lr < float(group.get("min_lr", 0)) * (1 - 1e-6)
    )
    if changed or after_one_cycle:
        known = keys["max_lr"] if "max_lr" in changed else keys["initial_lr"]
        peak = lr if after_one_cycle and not changed or known is None else known
        seen = {"peak": peak, "first": None, "last": None, "highest": 0.0}
        last, highest = None, 0.0
    first = lr if last is None else seen["first"]
    has_shown = last is not None and first < highest and lr < last and highest < seen["peak"] / 2
    peak = highest if has_shown else max(seen["peak"], lr)
    return {"peak": peak, "first": first, "last": lr, "highest": max(highest, lr), **keys}


def with_seen_rates(group: Group) -> Group:
    """A saved group; in groups of earlier versions `peak_lr` is lr when the group was added."""
    if SEEN in group or "peak_lr" not in group:
        return group
    return {**group, "peak_lr": None, SEEN: first_rates({**group, "lr": group["peak_lr"]})}
