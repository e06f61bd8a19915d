"""The end of a run: the model in Hugging Face's format, and a text sample."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launch.trainer.options import Options

if TYPE_CHECKING:
    import numpy as np

    from launch.data import Data, Tokenizer
    from launch.trainer.run_log import RunLog

Sample = Callable[["np.ndarray", int], "np.ndarray"]


def finish(
    options: Options,
    data: Data,
    tokenizer: Tokenizer,
    loss: float,
    log: RunLog,
    sample: Sample,
    save_model: Callable[[Path], None],
) -> None:
    """Writes the model, a text sample, and a comparison with token frequencies alone.

    Args:
        options: Checked options.
        data: The training data.
        tokenizer: Tokenizer of the text; saved with the model.
        loss: The loss of the last evaluation, in nats.
        log: Log of the run.
        sample: Continues a prompt, int32 (n,), to the given number of tokens.
        save_model: Writes the weights and then config.json, which marks the model as complete.
    """
    text = sample_of_text(options, tokenizer, sample)
    directory = options.run.save_path / "model"
    if log.active:
        unigram = data.unigram_perplexity(options.run.eval_tokens)
        log.write(
            "final",
            options.optimizer.num_training_steps,
            options.optimizer.num_training_steps * options.data.tokens_per_update,
            loss=loss,
            unigram_perplexity=unigram,
            sample=text,
        )
    with writing_model(options, directory):
        if log.active:
            tokenizer.save(directory)
        save_model(directory)
    if not log.active:
        return
    log.note(
        f"\nValidation perplexity {math.exp(loss):,.1f}; from token frequencies alone it would be "
        f"{unigram:,.1f}."
    )
    if text is not None:
        log.note(f"A sample of its text:\n\n    {text}\n")
    log.note(f"The model is in {directory}, in Hugging Face's format.")


@contextlib.contextmanager
def writing_model(options: Options, directory: Path) -> Iterator[None]:
    """Removes a new directory that is incomplete, and reports what is safe.

    Raises:
        OSError: It is raised inside.
    """
    is_new = not directory.exists()
    try:
        yield
    except OSError as error:
        if is_new:
            shutil.rmtree(directory, ignore_errors=True)
        raise OSError(
            f"the model cannot be written to {directory}: {error.strerror or error}; the trained "
            f"state is safe in {options.run.save_path / 'checkpoints'}: free space, and the same "
            "command with --resume writes the model"
        ) from error


def sample_of_text(options: Options, tokenizer: Tokenizer, sample: Sample) -> str | None:
    """The prompt and the model's continuation; None if there is no prompt to continue."""
    from launch.data.tokenizer import NoTokenizer

    if not options.run.sample_tokens or isinstance(tokenizer, NoTokenizer):
        return None
    prompt = tokenizer.encode_batch([options.run.prompt])[0]
    if not len(prompt):
        return None
    length = min(options.data.max_length, len(prompt) + options.run.sample_tokens)
    return tokenizer.decode(sample(prompt, length))
