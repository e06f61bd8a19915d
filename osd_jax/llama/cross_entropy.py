"""The loss of LLaMA's head, in slices of the vocabulary."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from osd_jax.llama.config import LlamaConfig
from osd_jax.llama.model import Params, Tokens, head_kernel, logits_of, module_of, rms_norm

LOGITS_BYTES = 64 * 2**20
"""Default size in bytes of the float32 logits that `loss` holds at once.

Below this size the full logits fit next to the activations of the same batch, and a single slice
avoids the second product with the head that recomputation costs (a quarter of the head's work).
Above it the logits would be the largest array of the step.
"""

MIN_VOCABULARY_SLICE = 1024
"""Minimum number of columns of the head in one slice: narrower products underuse the hardware."""


def loss(
    params: Params,
    config: LlamaConfig,
    tokens: Tokens,
    loss_mask: Tokens | None = None,
    *,
    mask: Tokens | None = None,
    segments: Tokens | None = None,
    dtype: DTypeLike | None = None,
    remat: bool = False,
    attention: str = "auto",
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """Negative log likelihood of each token given the preceding ones, summed over the batch.

    Returns a sum and a count instead of their quotient, so that parts of a batch add up exactly.

    Args:
        params: The weights.
        config: Their shape.
        tokens: Integers (B, S): the inputs, and shifted left by one the labels.
        loss_mask: Booleans (B, S), False for tokens that are not labels.
        mask: Padding on the left, as in `forward`.
        segments: As in `forward`. `loss_mask` should exclude the first token of each document.
        dtype: As in `forward`.
        remat: As in `forward`.
        attention: As in `forward`.
        logits_bytes: Float32 logits to hold at once. If all (B, S, V) of them need more, they are
            computed in slices of the vocabulary, and recomputed in the backward pass.

    Returns:
        The sum, float32, and the number of tokens, int32.
    """
    x = module_of(params, config).hidden(
        tokens, mask, segments=segments, dtype=dtype, remat=remat, attention=attention
    )
    return loss_of_output(params, config, x, tokens, loss_mask, logits_bytes=logits_bytes)


def loss_of_output(
    params: Params,
    config: LlamaConfig,
    x: jax.Array,
    tokens: Tokens,
    loss_mask: Tokens | None = None,
    *,
    logits_bytes: int = LOGITS_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """`loss` from the output of the last layer: the final norm, the head and the softmax.

    Args:
        params: The weights; only those of norm and head are read, or of norm and embedding if the
            embedding is tied.
        config: Their shape.
        x: (B, S, H).
        tokens: As in `loss`.
        loss_mask: As in `loss`.
        logits_bytes: As in `loss`.

    Returns:
        As in `loss`.
    """
    x = rms_norm(x, params["norm"], config.rms_norm_eps)
    head = head_kernel(params, config)
    # The last position predicts nothing: it stays, with weight zero, so that the arrays keep their
    # even shape.
    labels = jnp.roll(tokens, -1, axis=1)
    columns = max(MIN_VOCABULARY_SLICE, logits_bytes // (4 * tokens.size))
    losses = _token_losses(
        x.reshape(-1, config.hidden_size),
        head,
        labels.reshape(-1),
        slices=-(-config.vocab_size // columns),
    )
    weights = _is_predicted(tokens, loss_mask).reshape(-1)
    return jnp.sum(losses, where=weights), num_predicted(tokens, loss_mask)


def num_predicted(tokens: Tokens, loss_mask: Tokens | None = None) -> jax.Array:
    """The number of tokens whose losses `loss` sums.

    Args:
        tokens: Integers (..., B, S).
        loss_mask: Booleans (..., B, S), False for tokens that are not labels; None: all are.

    Returns:
        int32 ().
    """
    return jnp.sum(_is_predicted(tokens, loss_mask), dtype=jnp.int32)


def _is_predicted(tokens: Tokens, loss_mask: Tokens | None) -> jax.Array:
    """Booleans (..., B, S): whether the loss of a position's next token counts."""
    weights = jnp.ones_like(tokens, bool) if loss_mask is None else loss_mask.astype(bool)
    return jnp.roll(weights, -1, axis=-1).at[..., -1].set(False)


def _token_losses(x: jax.Array, head: jax.Array, labels: jax.Array, slices: int) -> jax.Array:
    """-log softmax(x @ head)[label], float32 (T,), for x (T, H), head (H, V), labels (T,).

    The head is split into `slices` of equal width. Each slice yields the log of its sum of
    exponentials and, if it contains the label, the label's logit, so that the backward pass needs
    only two numbers per token from it.
    """
    hidden, vocab = head.shape
    width = -(-vocab // slices)

    def slice_terms(first: jax.Array | int, part: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(x, part)
        column = first + jnp.arange(part.shape[1])
        if slices * width > vocab:
            logits = jnp.where(column < vocab, logits, -jnp.inf)
        is_label = column == labels[:, None]
        return jax.nn.logsumexp(logits, axis=1), jnp.sum(logits, axis=1, where=is_label)

    if slices == 1:
        total, label = slice_terms(0, head)
        return total - label
    padded = jnp.pad(head.astype(x.dtype), ((0, 0), (0, slices * width - vocab)))
    parts = padded.reshape(hidden, slices, width).swapaxes(0, 1)
    totals, label_logits = jax.lax.map(
        jax.checkpoint(lambda first_and_part: slice_terms(*first_and_part), prevent_cse=False),
        (width * jnp.arange(slices), parts),
    )
    return jax.nn.logsumexp(totals, axis=0) - jnp.sum(label_logits, axis=0)
