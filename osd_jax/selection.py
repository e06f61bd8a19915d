"""Which parameters are projected: selected by their names (the default) or by the model's modules.

By name: the matrices inside numbered blocks, such as `layers_0/fc/kernel` and `blocks/3/w1`, and
any matrix with `attn`, `attention` or `mlp` in its path; but not embeddings, tables (of positions,
of states), heads and the routers of experts. A LoRA factor is treated like any other matrix; if its
shorter side is at most the rank, P saves nothing, and the log says so. An array with more than two
axes is a matrix, or a stack of matrices, if `dimension_numbers` declares it.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax

from osd_jax.layout import SubspaceDimensionNumbers
from osd_jax.trees import path_name, unboxed

if TYPE_CHECKING:
    from flax import nnx

Select = Callable[[str, jax.Array], bool]
Numbers = Callable[[str], SubspaceDimensionNumbers | None]
Axes = tuple[tuple[int, ...], tuple[int, ...]]  # input and output axes, counted from the last

logger = logging.getLogger("osd_jax")

MATRIX = "matrix"
EXPERTS = "stack of experts"
ARRAY = "array of three or more axes"
CONVOLUTION = "convolution kernel"
TABLE = "embedding or table"
HEAD = "head"
ROUTER = "router"
OUTSIDE = "matrix outside numbered blocks"
VECTOR = "vector"
PLURALS = {
    MATRIX: "matrices",
    EXPERTS: "stacks of experts",
    ARRAY: "arrays of three or more axes",
    CONVOLUTION: "convolution kernels",
    TABLE: "embeddings or tables",
    OUTSIDE: "matrices outside numbered blocks",
}
INNER = (MATRIX, EXPERTS, ARRAY)  # the kinds of linear maps in blocks
_ASK = "give the axes of their matrices in dimension_numbers="
REASONS = {EXPERTS: _ASK, ARRAY: _ASK, CONVOLUTION: _ASK}

# Patterns for a component of a name in lower case, words joined by underscores, without digits.
_BLOCKS = re.compile(r"(layer|block|stage|group)s?$|^h$")
_NAMED_AS_CHOSEN = re.compile(r"attn|attention|mlp")
_TABLE = re.compile(
    r"embed|(^|_)embs?(_|$)|^w[tp]e$|^shared$|(^|_)tables?(_|$)|codebook|tokens?$|latents$"
    r"|(^|_)rel(ative)?_pos|relative_attention_bias|pos(ition|itional)?_(bias$|enc)"
    r"|(^|_)log(_|$)|time_(decay|faaaa|first)"
)
_LINEAR = re.compile(r"proj|linear|dense")  # `_TABLE` matches it, but it is not a table
_VECTOR = re.compile(r"(^|_)(bias|biases|scale|gamma|beta|norm)(_[a-z])?$")
_HEAD = re.compile(
    r"(?<!multi)(^|_)heads?$|classifier|predict|pooler|^score$|^qa_outputs$|^cls$|logits"
)
_HEAD_IN_BLOCK = re.compile(r"(^|_)(lm|shared|output)_heads?$|classifier")
_GATE = re.compile(r"^(gates?|gating)$")
_EXPERT_GATE = re.compile(r"(expert|moe)s?_gate$|router")
_LEAVES = {"weight", "kernel", "w", "embedding", "scale", "bias", "b"}


# ------------------------------------------------------------------------------------- by name


def components(name: str) -> list[str]:
    """The components of a name or path, without the attribute that holds a boxed value."""
    parts = re.split(r"[./]", name)
    return parts[:-1] if len(parts) > 1 and parts[-1] == "value" else parts


def _snake(part: str) -> str:
    """Converts `SelfAttention_0` to "self_attention"."""
    return "_".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)).lower()


class Kinds:
    """The kind of each parameter, determined by its name, its shape and the names next to it.

    Args:
      names: Paths of all parameters of the model, including those that are not trained: a parameter
        named `gate` is a router if experts are next to it.
      numbers: The matrix axes of a parameter; None: unknown.

    Example:
      >>> import jax.numpy as jnp
      >>> from osd_jax.selection import Kinds
      >>> params = {"embed/kernel": jnp.ones((10, 4)), "layers_0/fc/kernel": jnp.ones((4, 8))}
      >>> kinds = Kinds(params)
      >>> [path for path, array in params.items() if kinds.selects(path, array)]
      ['layers_0/fc/kernel']
    """

    def __init__(self, names: Iterable[str], numbers: Numbers = lambda name: None) -> None:
        self._numbers = numbers
        self._beside: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for name in names:
            parts = components(name)
            for end, part in enumerate(parts):
                self._beside[tuple(parts[:end])].add(_snake(part))

    def __call__(self, name: str, shape: Sequence[int]) -> str:
        """`MATRIX` for a parameter projected by default; otherwise the reason why it is not.

        Args:
          name: Path of the parameter.
          shape: Shape of the parameter.
        """
        parts = components(name)
        words = [_snake(part) for part in parts]
        if len(shape) < 2 or (len(shape) > 2 and sum(size > 1 for size in shape) < 2):
            return VECTOR
        if self._is_router(parts, words):
            return ROUTER
        block = _first_block(parts, words, stacked=len(shape) > 2)
        as_chosen = any(_NAMED_AS_CHOSEN.search(word) and not _HEAD.search(word) for word in words)
        # A `text_embedder` around the blocks does not make their matrices tables.
        start = (-2 if as_chosen else 0) if block is None else block + 1
        if any(_TABLE.search(word) and not _LINEAR.search(word) for word in words[start:]):
            return TABLE
        if _VECTOR.search(words[-1]):
            return VECTOR
        if not as_chosen:
            if _is_head(parts, words, block):
                return HEAD
            if block is None:
                return _kind_of_array(words, shape, matrix=OUTSIDE)
        numbers = self._numbers(name)
        if numbers is not None:
            return VECTOR if numbers.reduction_axis == () else MATRIX
        return _kind_of_array(words, shape, matrix=MATRIX)

    def selects(self, name: str, param: jax.Array) -> bool:
        """The default selection; see the module's docstring."""
        return self(name, param.shape) == MATRIX

    def _is_router(self, parts: Sequence[str], words: Sequence[str]) -> bool:
        if any(_EXPERT_GATE.search(word) for word in words):
            return True
        for index, word in enumerate(words):
            if _GATE.search(word):
                beside = self._beside[tuple(parts[:index])]
                of_experts = any("expert" in other for other in beside) or (
                    index > 0 and "moe" in words[index - 1]
                )
                if of_experts and not any("router" in other for other in beside):
                    return True
        return False


def _first_block(parts: Sequence[str], words: Sequence[str], stacked: bool) -> int | None:
    """The index of the first component that is a numbered block, or blocks stacked in an array.

    A number is a block if the component before it names blocks (`layers.0.weight`), or if it has
    named parts (`net.0.fc.weight`). In `net.0.weight` it may be an embedding or a head.
    """
    for index, part in enumerate(parts):
        if part.isdigit():
            follows = index > 0 and _BLOCKS.search(words[index - 1])
            if follows or _has_named_parts(parts, index):
                return index
        elif _BLOCKS.search(words[index]):
            is_followed = index + 1 < len(parts) and parts[index + 1].isdigit()
            if part[-1].isdigit() or (stacked and not is_followed):
                return index
    return None


def _has_named_parts(parts: Sequence[str], block: int) -> bool:
    return any(part not in _LEAVES and not part.isdigit() for part in parts[block + 1 :])


def _is_head(parts: Sequence[str], words: Sequence[str], block: int | None) -> bool:
    """Whether the parameter is of a head: outside blocks, of numbered heads, or in a block."""
    before = words[:block]
    if block is None or not _has_named_parts(parts, block):
        if any(map(_HEAD.search, before)):
            return True
    elif before and _HEAD.search(before[-1]):
        return True
    return block is not None and any(map(_HEAD_IN_BLOCK.search, words[block:]))


def _kind_of_array(words: Sequence[str], shape: Sequence[int], matrix: str) -> str:
    if len(shape) == 2:
        return matrix
    if any(word.startswith("conv") or "_conv" in word for word in words):
        return CONVOLUTION
    if any("expert" in word or "moe" in word for word in words):
        return EXPERTS
    return ARRAY if matrix == MATRIX else OUTSIDE


# ---------------------------------------------------------------------------------- by modules


def select_linear(model: nnx.Module) -> LinearSelection:
    """Selects the kernels of a model's linear layers, whatever their names.

    It selects the kernels of `flax.nnx.Linear`, `LinearGeneral` (the projections of
    `MultiHeadAttention`) and `Einsum`, of their subclasses, and the factors of `LoRA`. It excludes
    kernels that are shared with an embedding, and those whose name denotes an output head or a
    router of experts.

    `make_optimizer` also takes the matrix axes of these kernels from here, unless
    `dimension_numbers` is given.

    Args:
      model: The model. Parameters are identified by their paths in `nnx.state(model)`.

    Returns:
      (path, parameter) -> whether it is projected, for `make_optimizer(select=...)`. It raises
      ValueError for a path that the model does not have.

    Raises:
      ValueError: `model` is not a module.

    Example:
      >>> from flax import nnx
      >>> import osd_jax
      >>> rngs = nnx.Rngs(0)
      >>> model = nnx.Sequential(nnx.Embed(10, 24, rngs=rngs), nnx.Linear(24, 16, rngs=rngs))
      >>> tx = osd_jax.make_optimizer(
      ...     "galore_adamw", "continuous", learning_rate=0.01, rank=4,
      ...     select=osd_jax.select_linear(model))
      >>> params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
      >>> list(osd_jax.projectors(tx.init(params)))
      ['layers/1/kernel']
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: expected a flax.nnx.Module, the one whose "
            "nnx.state(model) the optimizer receives"
        )
    return LinearSelection(model)


class LinearSelection:
    """The selection that `select_linear` returns."""

    def __init__(self, model: nnx.Module) -> None:
        from flax import nnx

        variables = {
            "/".join(map(str, path)): variable
            for path, variable in nnx.to_flat_state(nnx.state(model))
        }
        kinds = Kinds(variables)
        linear, tables = _linear_kernels(model)
        self._paths = set(variables)
        self._axes = {
            path: linear[id(variable)]
            for path, variable in variables.items()
            if id(variable) in linear
            and id(variable) not in tables
            and kinds(path, variable.shape) not in (HEAD, ROUTER)
        }

    def __call__(self, path: str, array: jax.Array) -> bool:
        """Whether the parameter is projected."""
        # The path of a leaf of `nnx.State` ends with the attribute that holds its array.
        path = path if path in self._paths else path.removesuffix("/value")
        if path not in self._paths:
            raise ValueError(
                f"parameter '{path}' does not belong to the model given to select_linear: pass "
                "the model whose nnx.state(model) the optimizer receives"
            )
        return path in self._axes

    def dimension_numbers(self, params: Any) -> Any:
        """Matrix axes of the linear layers' kernels in a tree like `params`; None elsewhere."""

        def numbers(path: tuple[Any, ...], array: jax.Array) -> SubspaceDimensionNumbers | None:
            name = path_name(path)
            axes = self._axes.get(name, self._axes.get(name.removesuffix("/value")))
            if axes is None:
                return None
            # Preceding axes are stacked layers.
            return SubspaceDimensionNumbers(
                *(tuple(axis % array.ndim for axis in side) for side in axes)
            )

        return jax.tree_util.tree_map_with_path(numbers, unboxed(params))


def _linear_kernels(model: nnx.Module) -> tuple[dict[int, Axes], set[int]]:
    """Axes of each linear layer's kernels, counted from the last, by id; ids of embeddings."""
    from flax import nnx

    linear: dict[int, Axes] = {}
    tables: set[int] = set()
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Embed):
            tables.add(id(module.embedding))
        for kernel, n_in, n_out in _kernels(module):
            linear[id(kernel)] = (n_in, n_out)
    return linear, tables


def _kernels(module: nnx.Module) -> Iterator[tuple[Any, tuple[int, ...], tuple[int, ...]]]:
    """The arrays with which a module itself multiplies, with their axes (input, output)."""
    from flax import nnx

    if isinstance(module, nnx.Linear):
        yield module.kernel, (-2,), (-1,)
    elif isinstance(module, nnx.LinearGeneral):
        n_in, n_out = len(module.in_features), len(module.out_features)
        yield module.kernel, tuple(range(-n_in - n_out, -n_out)), tuple(range(-n_out, 0))
    elif isinstance(module, nnx.Einsum):
        operands, result = module.einsum_str.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        axes = {letter: axis for axis, letter in enumerate(kernel, -len(kernel)) if letter != "."}
        summed = tuple(axis for x, axis in axes.items() if x in inputs and x not in result)
        made = tuple(axis for x, axis in axes.items() if x in result and x not in inputs)
        if summed and made:
            yield module.kernel, summed, made
    elif isinstance(module, nnx.LoRA):
        yield module.lora_a, (-2,), (-1,)
        yield module.lora_b, (-2,), (-1,)


# ------------------------------------------------------------------------------------- reporting


_of_a_part = contextvars.ContextVar("_of_a_part", default=False)


@contextlib.contextmanager
def of_a_part() -> Iterator[None]:
    """Disables the report inside: the counts of a part do not describe the whole model."""
    token = _of_a_part.set(True)
    try:
        yield
    finally:
        _of_a_part.reset(token)


def say_what_is_projected(
    shapes: dict[str, tuple[int, ...]],
    projected: Collection[str],
    *,
    kinds: Kinds,
    rank: int,
    chosen_here: bool,
) -> None:
    """Logs how much is projected, and what is not and why; only in the first process.

    It is a warning if the default selection excludes linear maps inside the blocks.

    Args:
      shapes: Shapes of all trained parameters, by path.
      projected: Paths of the projected parameters.
      kinds: Kinds of all parameters.
      rank: Rank of the subspaces.
      chosen_here: Whether the selection is the default, not one given by the user.
    """
    if not shapes or _of_a_part.get() or jax.process_index() != 0:
        return
    text, is_whole = summary(shapes, projected, kinds=kinds, rank=rank)
    logger.log(logging.WARNING if chosen_here and not is_whole else logging.INFO, text)


def summary(
    shapes: dict[str, tuple[int, ...]], projected: Collection[str], *, kinds: Kinds, rank: int
) -> tuple[str, bool]:
    """A text with the numbers of projected parameters, and what is not projected and why.

    Args:
      shapes: Shapes of all parameters, by path.
      projected: Paths of the projected parameters.
      kinds: Kinds of all parameters.
      rank: Rank of the subspaces.

    Returns:
      The text, and whether all linear maps inside the blocks are projected.
    """
    left = defaultdict(list)
    for name, shape in shapes.items():
        if name not in projected:
            left[kinds(name, shape)].append(name)
    entries = lambda names: sum(math.prod(shapes[name]) for name in names)
    inner = [name for kind in INNER for name in left[kind]]
    done, total = entries(projected), entries(shapes)
    narrow = sum(min(shapes[name]) <= rank for name in projected if len(shapes[name]) == 2)
    text = (
        f"{_count(len(projected), MATRIX)} in subspaces of rank {rank}: {_share(done, total)} of "
        f"{total:,} parameters, {_share(done, done + entries(inner))} of those in linear maps "
        "inside the blocks"
    )
    if narrow:
        text += f"; {narrow} of them no wider than the rank, where P saves nothing"
    parts = []
    for kind in (*INNER, CONVOLUTION, TABLE, HEAD, ROUTER, OUTSIDE, VECTOR):
        if names := left[kind]:
            part = f"{_count(len(names), kind)} ({entries(names):,} parameters"
            if kind in INNER:
                part += f", such as '{names[0]}' {shapes[names[0]]}"
            parts.append(part + (f": {REASONS[kind]})" if kind in REASONS else ")"))
    return text + (". At full rank: " + ", ".join(parts) if parts else ""), not inner


def _count(number: int, kind: str) -> str:
    return f"{number:,} {kind if number == 1 else PLURALS.get(kind, kind + 's')}"


def _share(part: int, whole: int) -> str:
    """A percentage that is 100 % or 0 % only if the share is all or nothing."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent if part in (0, whole) else min(max(percent, 0.1), 99.9):.3g} %"
