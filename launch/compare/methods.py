"""The compared methods and models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FULL_RATES = (0.003, 0.01, 0.03)  # of unprojected parameters: tuned with the baseline, shared
BAR = "adamw"


class Model(NamedTuple):
    """A model, its text and its updates.

    Attributes:
        config: Path of its config.
        rows: Rows per update.
        length: Tokens per row.
        data: Flags of the text.
    """

    config: str
    rows: int
    length: int
    data: str = "--dataset builtin"


MODELS: Mapping[str, Model] = {
    "quickstart": Model("configs/llama_quickstart.json", 16, 256),
    "9m": Model("configs/llama_9m.json", 16, 256),
    "60m": Model("configs/llama_60m.json", 512, 256),
    "350m": Model("configs/llama_350m.json", 512, 256),
    "1b": Model("configs/llama_1b.json", 512, 256),
}


class Method(NamedTuple):
    """A training method.

    Attributes:
        title: Its name on the page.
        flags: Flags of the trainer, except for the learning rates; {rank} is a quarter of the
            hidden size, {low} a sixteenth, {never} more updates than any run has.
        lr: First learning rate of the matrices in the search.
        own: Flags that are tuned in addition to the learning rate; the search starts with the
            first.
        one_rate: Whether all parameters have the learning rate of the matrices.
    """

    title: str
    flags: str
    lr: float
    own: tuple[str, ...] = ("",)
    one_rate: bool = False

    @property
    def wider(self) -> Mapping[str, str]:
        """Flags beyond the edges of `own`, tried if the best ones are at the edge."""
        return {flags: _WIDER[flags] for flags in self.own if flags in _WIDER}


_BETAS = ("--beta2 0.999", "--beta2 0.95", "--beta1 0.8 --beta2 0.95")
_MOMENTA = ("--momentum 0.8", "--momentum 0.95", "--momentum 0.6")
_WIDER = {
    "--beta1 0.8 --beta2 0.95": "--beta1 0.6 --beta2 0.9",
    "--momentum 0.6": "--momentum 0.4",
    "--momentum 0.95": "--momentum 0.98",
}
_GALORE = "--optimizer galore_adamw --rank {rank} --update_proj_gap 200"
_MUON = "--optimizer osd_muon --update_proj_gap 200"

METHODS: Mapping[str, Method] = {
    "adamw": Method("AdamW", "--optimizer adamw", 1e-3, _BETAS),
    "muon": Method("Muon", "--optimizer muon", 0.01, _MOMENTA),
    "osd_muon": Method(
        "osd_muon, P by online PCA, rank 1/4",
        f"{_MUON} --proj_type continuous --rank {{rank}}", 0.01, _MOMENTA,
    ),
    "osd_muon_small": Method(
        "osd_muon, rank 1/16, embedding and head by rows and in 8 bits",
        f"{_MUON} --proj_type continuous --rank {{low}} --second_moment row --first_moment 8bit",
        0.01, _MOMENTA,
    ),
    "stateless": Method(
        "orthogonalized gradient, matrices without state", "--optimizer muon --momentum 0", 0.01
    ),
    "osd_muon_fixed": Method(
        "osd_muon, P of the first gradient kept, rank 1/4",
        "--optimizer osd_muon --update_proj_gap {never} --proj_type std --rank {rank}",
        0.01, _MOMENTA,
    ),
    "osd_muon_low": Method(
        "osd_muon, P by online PCA, rank 1/16",
        f"{_MUON} --proj_type continuous --rank {{low}}", 0.01, _MOMENTA,
    ),
    "osd": Method(
        "online PCA as published, rank 1/4", f"{_GALORE} --proj_type continuous", 2e-3, _BETAS
    ),
    "osd_paper": Method(
        "online PCA, the paper's penalty, moments carried over, rank 1/4",
        f"{_GALORE} --proj_type continuous --penalty 0.1 --transport_moments", 2e-3,
        (
            *(f"--beta1 0.8 --beta2 0.95 --projector_lr_multiple {x}" for x in (5, 20, 1.25)),
            "--beta2 0.95 --projector_lr_multiple 5",
        ),
    ),
    "galore": Method("GaLore, rank 1/4", f"{_GALORE} --proj_type std", 2e-3, _BETAS),
    "adamw_one_rate": Method("AdamW, one rate", "--optimizer adamw", 4e-3, _BETAS, one_rate=True),
    "adamw_8bit": Method("AdamW in 8 bits", "--optimizer adam8bit", 1e-3, _BETAS),
    "osd_muon_svd": Method(
        "osd_muon, P by an SVD every 50, rank 1/4",
        "--optimizer osd_muon --update_proj_gap 50 --proj_type std --rank {rank}",
        0.01, _MOMENTA,
    ),
    "osd_muon_every_10": Method(
        "osd_muon, P by online PCA at every 10th update, rank 1/4",
        f"{_MUON} --proj_type continuous --update_proj_every 10 --rank {{rank}}", 0.01, _MOMENTA,
    ),
    "fira": Method(
        "online PCA, norm_ratio (Fira), rank 1/4",
        f"{_GALORE} --proj_type continuous --residual norm_ratio", 2e-3, _BETAS,
    ),
    "alice": Method(
        "online PCA, column_ema (Alice), rank 1/4",
        f"{_GALORE} --proj_type continuous --residual column_ema", 2e-3, _BETAS,
    ),
    "alice_1": Method(
        "column_ema, rank 1: nearly no subspace",
        "--optimizer galore_adamw --rank 1 --update_proj_gap 200 --proj_type continuous "
        "--residual column_ema", 2e-3, _BETAS,
    ),
    "apollo": Method(
        "gradient_only (APOLLO), rank 1/4",
        f"{_GALORE} --proj_type gaussian --residual gradient_only", 2e-3, _BETAS,
    ),
}  # fmt: skip


class Config(NamedTuple):
    """The tuned values of a method.

    Attributes:
        lr: Learning rate of the matrices.
        full_lr: Learning rate of all other parameters.
        own: One of the method's own flags.
    """

    lr: float
    full_lr: float
    own: str


class Setting(NamedTuple):
    """A model and a number of tokens.

    Attributes:
        model: One of `MODELS`.
        tokens: Number of tokens of a run.
        dtype: Dtype of weights and activations.
    """

    model: str
    tokens: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """For example quickstart-1.2M; includes the dtype if it is not float32."""
        return f"{self.family}-{self.tokens / 1e6:g}M"

    @property
    def family(self) -> str:
        """The name without the number of tokens, by which the runs of one family are compared."""
        return self.model if self.dtype == "float32" else f"{self.model}-{self.dtype}"

    @property
    def updates(self) -> int:
        """Number of updates of a run."""
        model = MODELS[self.model]
        return self.tokens // (model.rows * model.length)

    def flags(self) -> str:
        """The flags common to all runs: the model, its text, the schedule."""
        model = MODELS[self.model]
        return (
            f"--model_config {model.config} {model.data} --max_length {model.length} "
            f"--batch_size {min(model.rows, 64)} --total_batch_size {model.rows} "
            f"--dtype {self.dtype} --num_training_steps {self.updates} "
            f"--warmup_steps {self.updates // 10} --eval_every 1000000 --eval_tokens 100K "
            "--log_every 10 --sample_tokens 0 --single_gpu"
        )


def flags_of(setting: Setting, method: Method, config: Config, seed: int) -> str:
    """All flags of a run, except for its name and directory."""
    hidden = json.loads(Path(MODELS[setting.model].config).read_text())["hidden_size"]
    own = method.flags.format(rank=hidden // 4, low=hidden // 16, never=10**9)
    rates = f"--lr {config.lr:g}" + ("" if method.one_rate else f" --full_lr {config.full_lr:g}")
    return " ".join(f"{setting.flags()} {own} {config.own} {rates} --seed {seed}".split())
