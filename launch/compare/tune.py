"""The search for a method's learning rate, the same for each method, and the confirming runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from launch.compare.methods import Config, Method

TRIALS = 8
MORE = 2  # trials to find the best rate between two worse ones, once the flags are chosen
TUNING_SEED, SECOND_SEED = 0, 100

Loss = Callable[[Config], float]


def search(
    loss: Loss,
    start: Config,
    own: tuple[str, ...],
    trials: int = TRIALS,
    wider: Mapping[str, str] = MappingProxyType({}),
) -> list[Config]:
    """The tried configurations, the best first.

    The learning rate is doubled or halved until it lies between two worse ones, or half of the
    trials, at least three, are used. Then the method's own flags are tried, all within `trials`
    runs. With the best flags the learning rate is searched again, for at most `MORE` further runs,
    so that it does not end at an edge.

    Args:
        loss: Configuration -> loss.
        start: The first configuration.
        own: Flags to choose from.
        trials: Maximum number of runs, not counting `MORE`.
        wider: Additional flags to try if the best of `own` is at an edge.
    """
    tried: dict[Config, float] = {}

    def attempt(config: Config, most: int = trials) -> float:
        if config not in tried:
            if len(tried) == most:
                return math.inf
            tried[config] = loss(config)
        return tried[config]

    def climb(config: Config, most: int) -> Config:
        while True:
            lr = config.lr
            near = (config, config._replace(lr=lr / 2), config._replace(lr=lr * 2))
            best = min(near, key=lambda config: attempt(config, most))
            if best == config or len(tried) >= most:
                return best
            config = best

    best = climb(start, min(trials, max(3, trials // 2)))
    best = min((best._replace(own=flags) for flags in (best.own, *own)), key=attempt)
    if best.own in wider:
        best = min((best, best._replace(own=wider[best.own])), key=attempt)
    climb(best, trials + MORE)
    return sorted(tried, key=tried.__getitem__)


def tuned(
    loss: Callable[[Config, int], float], method: Method, start: Config, trials: int
) -> Config:
    """The best configuration: of the two best with one seed, the better one with two seeds."""
    ranked = search(
        lambda config: loss(config, TUNING_SEED), start, method.own, trials, method.wider
    )
    both = lambda config: loss(config, TUNING_SEED) + loss(config, SECOND_SEED)
    return min(ranked[:2], key=both)
