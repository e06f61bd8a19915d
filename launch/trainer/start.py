"""The start of a run: its text, and the Hugging Face weights of `--continue_from`, if any."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.trainer.cli import UsageError
from launch.trainer.options import Options

if TYPE_CHECKING:
    from launch.data import Data, Tokenizer

WEIGHTS = (".safetensors", ".bin", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
"""Suffixes of a model's weight files that a run's checkpoints do not have."""


def open_text(options: Options, vocab_size: int) -> tuple[Tokenizer, Data]:
    """The tokenizer and the data of the options.

    Args:
        options: Checked options.
        vocab_size: Vocabulary size of the model.

    Raises:
        DataError: They are missing, unsuitable, or do not fit the model.
    """
    from launch.data import load_tokenizer, open_data

    places: dict[str, Any] = {
        "data_dir": options.data.data_dir,
        "cache_dir": options.data.cache_dir,
        "text_column": options.data.text_column,
    }
    tokenizer = load_tokenizer(
        options.data.tokenizer, options.data.dataset, **places, vocab_size=vocab_size
    )
    data = open_data(
        options.data.dataset,
        tokenizer,
        **places,
        max_length=options.data.max_length,
        pack=options.data.pack,
        separate=options.data.separate_documents,
        seed=options.run.seed,
    )
    return tokenizer, data


def special_tokens(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's ids by the config's names: the published ones belong to another tokenizer."""
    from launch.data.tokenizer import NoTokenizer

    if isinstance(tokenizer, NoTokenizer):
        return {}
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def hugging_face_weights(options: Options) -> Path | None:
    """The Hugging Face directory that `--continue_from` names, if it names one.

    Raises:
        UsageError: It is this run's own model, which has no position in the run, a model without
            `config.json`, or empty.
    """
    directory = Path(options.model.continue_from) if options.model.continue_from else None
    if directory is None:
        return None
    if not (directory / "config.json").is_file():
        if not goes_on(options):
            _check_may_be_a_run(directory)
        return None
    if options.continues_itself:
        raise UsageError(
            f"--continue_from: {directory} is this run's own model, with weights only; resume the "
            "run with --resume, or train the model further under another --name"
        )
    return directory


def goes_on(options: Options) -> bool:
    """Whether `--resume` finds a checkpoint of this run, so that `--continue_from` is not read."""
    own = (options.run.save_path / "checkpoints").glob("*")
    return options.run.resume and any(path.name.isdigit() for path in own)


def _check_may_be_a_run(directory: Path) -> None:
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        raise UsageError(
            f"--continue_from: {directory} is empty; give the directory of a run, of a checkpoint "
            "or of a model"
        )
    weights = [name for name in names if name.endswith(WEIGHTS)]
    if weights:
        raise UsageError(
            f"--continue_from: {directory} has {weights[0]} but no config.json, which describes "
            "its model; put the model's config.json next to it"
        )


def check_alike(directory: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Rejects weights of another model than `--model_config` describes.

    Args:
        directory: Directory of the weights.
        found: Their config, by field.
        wanted: `--model_config`, by field.

    Raises:
        UsageError: The configs differ in a field that affects the weights or the computation.
    """
    for name, new in wanted.items():
        old = found[name]
        free = ("max_position_embeddings", "initializer_range")
        if old != new and name not in free and not name.endswith("_token_id"):
            raise UsageError(
                f"--continue_from: {directory} holds another model: its {name} is {old}, but "
                f"--model_config has {new}; give its own config.json as --model_config"
            )
