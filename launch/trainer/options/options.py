"""All options of a training run, in one frozen object of six groups that both trainers share.

Importing this module is cheap, so that a mistake is reported before anything heavy is loaded:

    options = Options.parse(sys.argv[1:]).check()

An invalid value raises `UsageError`, which `launch.trainer.cli.run_cli` turns into one line on
stderr and exit code 2.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from launch.trainer.cli import UsageError
from launch.trainer.options import checks, flags
from launch.trainer.options.groups import FLAGS, GROUPS, Data, Devices, Model, Run
from launch.trainer.options.method import PER_LAYER, Optimizer, Subspace
from launch.trainer.options.record import Record, check_same_run, read_record

_SECTIONS = {
    "model": "",
    "data": "",
    "optimizer": "",
    "subspace": "How gradients are projected: only used by the galore_* optimizers and osd_muon.",
    "paper": "Where paper and published code differ. The defaults are those of the published code.",
    "run": "",
    "memory and devices": "JAX trains on all devices that it finds, PyTorch on one per process.",
    "jax": "PyTorch rejects these with the reason; torchrun connects its processes. Under SLURM "
    "(srun), Open MPI and on a TPU pod JAX detects its processes itself.",
    "pytorch": "JAX rejects these with the reason.",
}
_PATHS = (
    "model_config", "continue_from", "data_dir", "cache_dir", "tokenizer", "run_dir", "save_dir",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a run. Build it with `Options.parse` or `Options.of`, then call `check`.

    `check` returns a copy with all derived values: `gradient_accumulation`, `total_batch_size`,
    `num_training_steps` (from `max_train_tokens`), `cycle_length`, `restart_warmup_steps`,
    `per_layer` and `tokenizer` (of a model to continue from).

    Example:
        >>> options = Options.of(model_config="configs/llama_9m.json", batch_size=8, rank=64)
        >>> options.subspace.rank, options.optimizer.lr
        (64, 0.0001)
    """

    model: Model
    data: Data
    optimizer: Optimizer
    subspace: Subspace
    run: Run
    devices: Devices

    @classmethod
    def parse(
        cls,
        argv: Sequence[str],
        *,
        prog: str | None = None,
        description: str = "Train a LLaMA with Online Subspace Descent.",
    ) -> Self:
        """Parses a command line, without the program's name. `check` validates the values.

        Raises:
            UsageError: A flag is unknown or missing, or its value has the wrong type.
            SystemExit: With code 0, after `--help`.
        """
        shown = {"devices": "memory and devices"}
        groups = {shown.get(name, name): group for name, group in GROUPS.items()}
        return cls.of(**flags.parse(argv, groups, _SECTIONS, prog=prog, description=description))

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Options from the values of flags, by name; omitted flags have their defaults.

        Raises:
            TypeError: There is no such flag, or a required one is missing.
        """
        if unknown := values.keys() - FLAGS.keys():
            raise TypeError(f"there is no flag --{min(unknown)}")
        own = {
            name: {f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values}
            for name, group in GROUPS.items()
        }
        return cls(**{name: group(**own[name]) for name, group in GROUPS.items()})

    def values(self) -> dict[str, Any]:
        """Every flag's value by its name."""
        groups = dataclasses.asdict(self)
        return {name: value for group in groups.values() for name, value in group.items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with other values for some flags."""
        return self.of(**{**self.values(), **changes})

    def is_given(self, name: str) -> bool:
        """Whether a flag differs from its default."""
        return self.values()[name] != FLAGS[name].default

    def refuse(self, reasons: Mapping[str, str], other: str) -> None:
        """Rejects flags of the other trainer.

        Args:
            reasons: By flag, why this trainer does not read it.
            other: The trainer that does.

        Raises:
            UsageError: Such a flag is given.
        """
        for name, reason in reasons.items():
            if self.is_given(name):
                raise UsageError(f"--{name}: {reason}; leave it out, or use {other}")

    @property
    def continues_itself(self) -> bool:
        """Whether `continue_from` names this very run or one of its checkpoints."""
        if self.model.continue_from is None:
            return False
        start = Path(self.model.continue_from).resolve()
        places = (self.run.path, self.run.save_path)
        return any(start.is_relative_to(own.resolve()) for own in places)

    def record(self) -> Record:
        """The contents of `options.json`: the options, and the model's config at the start."""
        return {"options": self.values(), "model": self.model.config()}

    def check(self, processes: int = 1) -> Self:
        """Checks everything that can be checked without a framework, and fills in derived values.

        Args:
            processes: Number of training processes that share an update.

        Returns:
            The options with every derived value filled in.

        Raises:
            UsageError: The first problem found.
        """
        for name, value in self.values().items():
            flags.check_value(FLAGS[name], value)
        checks.check_read(self.optimizer, self.subspace, self.devices)
        checks.check_no_decay(self.optimizer)
        checks.check_devices(self.devices)
        checks.check_wandb(self.run)
        given = self._with_home()._with_tokenizer()
        checks.check_model(given.model, given.data.max_length)
        checks.check_data(given.data)
        found = given._resolved(processes)
        checks.check_sketches(found.data, found.optimizer, found.subspace, found.devices)
        checks.check_memory(found.devices)
        checks.check_directories(found.run, found.model, found.data, found.continues_itself)
        found._check_kept()
        return found

    def _with_home(self) -> Self:
        """Expands a `~`, which a shell leaves unchanged after "text:" or "="."""
        values = self.values()
        paths = {name: os.path.expanduser(values[name]) for name in _PATHS if values[name]}
        kind, colon, where = self.data.dataset.partition(":")
        return self.replace(dataset=kind + colon + os.path.expanduser(where), **paths)

    def _with_tokenizer(self) -> Self:
        """Uses the tokenizer of the weights unless another is given."""
        if self.data.tokenizer or not self.model.continue_from:
            return self
        weights = Path(self.model.continue_from)
        files = (weights / "config.json", weights / "tokenizer.json")
        return self.replace(tokenizer=str(weights)) if all(f.is_file() for f in files) else self

    def _resolved(self, processes: int) -> Self:
        data = checks.with_batch(self.data, processes)
        optimizer = checks.with_steps(self.optimizer, data)
        per_layer = self.devices.per_layer or optimizer.optimizer in PER_LAYER
        devices = dataclasses.replace(self.devices, per_layer=per_layer)
        return dataclasses.replace(self, data=data, optimizer=optimizer, devices=devices)

    def _check_kept(self) -> None:
        """Rejects resuming an existing run with incompatible options."""
        run = self.run
        taken = checks.holds_a_run(run.path) or checks.holds_a_run(run.save_path)
        if taken and not run.overwrite and (kept := read_record(run.path)):
            check_same_run(kept, self.record(), run.path)
