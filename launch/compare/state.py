"""What each method keeps beside the weights, counted on the arrays of its optimizer."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from launch.compare.methods import BAR, METHODS, Config, Setting, flags_of
from launch.trainer.options import Options


class Size(NamedTuple):
    """Of an optimizer's state, counts and scales and P's own optimizer included.

    Attributes:
        numbers: How many it holds, of any dtype.
        bytes: That these take.
    """

    numbers: int
    bytes: int


@functools.cache
def state_size(model: str, method: str) -> Size:
    """The state of a method's optimizer for a model of `launch.compare.methods.MODELS`.

    The shapes and dtypes of what `init` makes, as the trainer builds it; nothing is allocated.
    """
    import jax

    from launch.trainer.jax_step import make_step
    from osd_jax import llama

    own = METHODS[method]
    setting = Setting(model, 10**9)
    flags = flags_of(setting, own, Config(own.lr, own.lr, own.own[0]), seed=0)
    options = Options.parse([*flags.split(), "--overwrite"]).check()
    config = llama.LlamaConfig.from_hf_dict({"model_type": "llama", **options.model.config()})
    tx, _ = make_step(options, config, lambda count: 1.0, None)
    params = jax.eval_shape(lambda: llama.init(config, 0))
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    numbers = [math.prod(x.shape) for x in leaves]
    return Size(
        sum(numbers), sum(n * x.dtype.itemsize for n, x in zip(numbers, leaves, strict=True))
    )


def share_of_bar(model: str, method: str) -> tuple[float, float]:
    """A method's state in percent of AdamW's: (by count, by bytes)."""
    own, bar = state_size(model, method), state_size(model, BAR)
    return 100 * own.numbers / bar.numbers, 100 * own.bytes / bar.bytes
