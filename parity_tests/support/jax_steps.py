"""Optimizers and compiled steps that runs of `launch.train_jax` in one process share.

A file whose runs share them imports the fixture `steps_made_once`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from launch import train_jax
from launch.trainer import jax_step
from launch.trainer.options import Options
from osd_jax.llama import train as llama_train

made: dict[str, Any] = {}  # optimizers and steps, by what they are made of


@pytest.fixture(scope="module", autouse=True)
def steps_made_once() -> Iterator[None]:
    """Runs of the same options in this process share their steps, which JAX then traces once.

    A run after a kill has a process of its own, which traces them again.
    """
    make_step, make_eval_step = jax_step.make_step, llama_train.make_eval_step

    def step_once(options: Options, config: Any, schedule: Any, *where: Any) -> Any:
        groups = (options.model, options.subspace, options.optimizer, options.devices)
        name = repr((groups, options.run.seed, config, where))  # the schedule is of the optimizer
        if name not in made:
            made[name] = make_step(options, config, schedule, *where)
        return made[name]

    def eval_step_once(*of: Any) -> Any:
        return made.setdefault(repr(of), make_eval_step(*of))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_jax, "make_step", step_once)
        patch.setattr(llama_train, "make_eval_step", eval_step_once)
        yield
    forget_steps()


def forget_steps() -> None:
    """The next run traces its steps again."""
    made.clear()
