"""Which parameters are projected: selected by their names (the default) or by the model's modules.

By name: the matrices inside numbered blocks, such as `model.layers.0.self_attn.q_proj.weight` and
`h.3.mlp.c_fc.weight`, and any matrix with `attn`, `attention` or `mlp` in its name; but not
embeddings, tables (of positions, of states), heads and the routers of experts. A stack of experts
is a stack of matrices. A LoRA factor is treated like any other matrix; if its shorter side is at
most the rank, P saves nothing, and the log says so.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from osd_torch.layout import SubspaceDimensionNumbers
from osd_torch.sharding import is_first_process

Select = Callable[[str, Tensor], bool]

logger = logging.getLogger("osd_torch")

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
REASONS = {ARRAY: _ASK, CONVOLUTION: _ASK}

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
_ROUTER_CLASS = re.compile(r"Router|(TopK|M[oO][eE])Gate")
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
        names: Names of all parameters of the model, including those that are not trained: a
            parameter named `gate` is a router if experts are next to it.

    Example:
        >>> import torch
        >>> from osd_torch.selection import Kinds
        >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(16, 2, 32), 1)
        >>> kinds = Kinds(name for name, _ in model.named_parameters())
        >>> for name, param in model.named_parameters():
        ...     if kinds.selects(name, param):
        ...         print(name)
        layers.0.self_attn.in_proj_weight
        layers.0.self_attn.out_proj.weight
        layers.0.linear1.weight
        layers.0.linear2.weight
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._beside: dict[tuple[str, ...], set[str]] = defaultdict(set)
        for name in names:
            parts = components(name)
            for end, part in enumerate(parts):
                self._beside[tuple(parts[:end])].add(_snake(part))

    def __call__(self, name: str, shape: Sequence[int]) -> str:
        """`MATRIX` for a parameter projected by default; otherwise the reason why it is not.

        Args:
            name: Name of the parameter.
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
        return _kind_of_array(words, shape, matrix=MATRIX)

    def selects(self, name: str, param: Tensor) -> bool:
        """The default selection; see the module's docstring."""
        kind = self(name, param.shape)
        return kind == MATRIX or (kind == EXPERTS and param.ndim == 3)

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
    if len(shape) > 3 or any(word.startswith("conv") or "_conv" in word for word in words):
        return CONVOLUTION
    if any("expert" in word or "moe" in word for word in words):
        return EXPERTS
    return ARRAY if matrix == MATRIX else OUTSIDE


def dimension_numbers_of(
    name: str, shapes: Mapping[str, Sequence[int]]
) -> SubspaceDimensionNumbers | None:
    """The axes of a parameter's matrices, by its name and the shapes beside it; None: a matrix.

    A convolution kernel is (output, input, ...). A stack of experts is (experts, output, input), or
    (experts, input, output) if its bias or the other projection of the experts has such a shape.

    Args:
        name: Name of the parameter.
        shapes: Shapes of all parameters of the model, by name.

    Raises:
        ValueError: The parameter has another shape.

    Example:
        >>> shapes = {"experts.gate_up_proj": (4, 16, 96), "experts.down_proj": (4, 48, 16)}
        >>> dimension_numbers_of("experts.down_proj", shapes)
        SubspaceDimensionNumbers(reduction_axis=1, output_axis=2, parts=1)
    """
    shape = tuple(shapes[name])
    if len(shape) <= 2:  # a vector is refused as what it is
        return None
    kind = _kind_of_array([_snake(part) for part in components(name)], shape, matrix=MATRIX)
    if kind == CONVOLUTION:
        return SubspaceDimensionNumbers(tuple(range(1, len(shape))), 0)
    if kind != EXPERTS or len(shape) != 3:
        raise ValueError(
            f"parameter '{name}' of shape {shape} is selected, but nothing says which of its axes "
            "form matrices: give dimension_numbers=SubspaceDimensionNumbers(reduction_axis, "
            "output_axis)"
        )
    return SubspaceDimensionNumbers(*((1, 2) if _is_turned(name, shapes) else (2, 1)))


def _is_turned(name: str, shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a stack of experts is (experts, input, output)."""
    _, first, second = shapes[name]
    bias = tuple(shapes.get(f"{name}_bias", ()))[1:]
    if bias and first != second:
        return bias == (second,)
    start = name.rpartition(".")[0]
    up, down = (tuple(shapes.get(f"{start}.{x}", ())) for x in ("gate_up_proj", "down_proj"))
    if len(up) != 3 or len(down) != 3:
        return False
    return up[1] == down[2] and up[2] != down[1]


# ---------------------------------------------------------------------------------- by modules


def select_linear(model: torch.nn.Module) -> Select:
    """Selects the weights of a model's linear layers, whatever their names.

    It selects the weights of `torch.nn.Linear` and of its subclasses, of transformers' `Conv1D`,
    and of the projections in `torch.nn.MultiheadAttention`, and stacks of experts. It excludes
    weights that are shared with an embedding, output heads (`get_output_embeddings()`, the modules
    of a transformers model outside its `base_model`, and modules with the name of a head) and
    routers of experts.

    Parameters are identified by identity: the model may be wrapped (`DistributedDataParallel`,
    `torch.compile`) or sharded (`fully_shard`), before or after this call.

    Args:
        model: The model, or a wrapper of it.

    Returns:
        (name, parameter) -> whether it is projected, for `make_optimizer(select=...)`. It raises
        ValueError for a parameter that does not belong to the model.

    Raises:
        ValueError: `model` is not a module.

    Example:
        >>> import torch, osd_torch
        >>> model = torch.nn.Sequential(torch.nn.Embedding(10, 24), torch.nn.Linear(24, 16))
        >>> optimizer = osd_torch.make_optimizer(
        ...     model.named_parameters(), "galore_adamw", "continuous", lr=0.01, rank=4,
        ...     select=osd_torch.select_linear(model))
        >>> optimizer.param_groups[0]["param_names"]
        ['1.weight']
    """
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: expected a torch.nn.Module, the one whose "
            "named_parameters() the optimizer receives"
        )
    return LinearSelection(model)


class LinearSelection:
    """The selection that `select_linear` returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self._find()

    def _find(self) -> None:
        # Keeps references to the parameters, so that no other object reuses their ids.
        self._params = list(self.model.parameters())
        self._known = {id(param) for param in self._params}
        self._chosen = _linear_weights(self.model)

    def __call__(self, name: str, param: Tensor) -> bool:
        """Whether the parameter is projected."""
        if id(param) not in self._known:
            self._find()  # `fully_shard` has replaced the parameters of the modules
        if id(param) not in self._known:
            raise ValueError(
                f"parameter '{name}' does not belong to the model given to select_linear: pass "
                "the model whose named_parameters() the optimizer receives"
            )
        return id(param) in self._chosen


def _linear_weights(model: torch.nn.Module) -> set[int]:
    """The ids of the parameters that `select_linear` selects."""
    kinds = Kinds(name for name, _ in model.named_parameters())
    on_top = _outside_base_models(model)
    chosen = set()
    routers: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        if _ROUTER_CLASS.search(type(module).__name__):
            routers.append(f"{path}.")
        for name, weight in _weights(module):
            full_name = f"{path}.{name}" if path else name
            kind = kinds(full_name, weight.shape)
            is_left = kind in (HEAD, ROUTER) or full_name.startswith(tuple(routers))
            if weight.ndim == 2 and not is_left and (kind == MATRIX or id(weight) not in on_top):
                chosen.add(id(weight))
    for name, param in model.named_parameters():
        if param.ndim == 3 and kinds(name, param.shape) == EXPERTS:
            chosen.add(id(param))
    return chosen - _embeddings_and_heads(model)


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The matrices with which a module itself multiplies."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # not imported: no such module
    linear: tuple[type, ...] = (torch.nn.Linear,)
    linear += (transformers.Conv1D,) if transformers else ()
    if isinstance(module, torch.nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    elif isinstance(module, linear):
        names = ["weight", "parametrizations.weight.original"]
    else:
        return
    for name in names:
        with contextlib.suppress(AttributeError):
            weight = module.get_parameter(name)
            if isinstance(weight, Tensor):
                yield name, weight


def _embeddings_and_heads(model: torch.nn.Module) -> set[int]:
    """The ids of the parameters of embeddings and output heads, according to the modules."""
    left: set[int] = set()
    for module in model.modules():
        if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
            left.add(id(module.weight))
        for method in ("get_input_embeddings", "get_output_embeddings"):
            # Some models of transformers raise if they do not have one.
            with contextlib.suppress(Exception):
                left.update(map(id, getattr(module, method)().parameters()))
    return left


def _outside_base_models(model: torch.nn.Module) -> set[int]:
    """The ids of the parameters of transformers models outside their `base_model`."""
    on_top: set[int] = set()
    for module in model.modules():
        base = getattr(module, "base_model", None)
        if hasattr(module, "base_model_prefix") and isinstance(base, torch.nn.Module):
            inside = {id(param) for param in base.parameters()}
            on_top.update(id(param) for param in module.parameters() if id(param) not in inside)
    return on_top


# ----------------------------------------------------------------------------------- reporting


def say_what_is_projected(
    named: Sequence[tuple[str, Tensor]],
    projected: Collection[str],
    *,
    kinds: Kinds,
    rank: int,
    chosen_here: bool,
) -> None:
    """Logs how much is projected, and what is not and why; only in the first process.

    It is a warning if the default selection excludes linear maps inside the blocks.

    Args:
        named: All trained parameters.
        projected: Names of the projected parameters.
        kinds: Kinds of all parameters.
        rank: Rank of the subspaces.
        chosen_here: Whether the selection is the default, not one given by the user.
    """
    if not named or not is_first_process():
        return
    shapes = {name: tuple(param.shape) for name, param in named}
    text, is_whole = summary(shapes, projected, kinds=kinds, rank=rank)
    logger.log(logging.WARNING if chosen_here and not is_whole else logging.INFO, text)


def summary(
    shapes: dict[str, tuple[int, ...]], projected: Collection[str], *, kinds: Kinds, rank: int
) -> tuple[str, bool]:
    """A text with the numbers of projected parameters, and what is not projected and why.

    Args:
        shapes: Shapes of all parameters, by name.
        projected: Names of the projected parameters.
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
    flat = [name for name in projected if len(shapes[name]) == 2]
    others = [kinds(name, shapes[name]) for name in projected if len(shapes[name]) > 2]
    counts = [_count(len(flat), MATRIX)] if flat or not others else []
    counts += [_count(others.count(kind), kind) for kind in sorted(set(others))]
    text = (
        f"{' and '.join(counts)} in subspaces of rank {rank}: {_share(done, total)} of "
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
