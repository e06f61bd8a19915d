"""Pytrees of parameters of any kind: their boxes, their paths and their names.

Optax accepts any pytree: dicts, `flax.nnx` states, dataclasses, tuples, modules, with None or
`optax.MaskedNode` for a hidden leaf. Leaves are identified by their path, a tuple of plain keys.
The text of a path is a name for messages, and two paths can have the same text.
"""

from __future__ import annotations

import collections
import functools
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

KeyPath = tuple[Any, ...]  # as returned by `jax.tree_util.tree_flatten_with_path`
Path = tuple[Hashable, ...]
IsLeaf = Callable[[Any], bool]


def is_box(x: Any) -> bool:
    """Whether `x` is a container of one array with metadata, such as `nnx.Param`.

    This does not import Flax: if nothing has imported it, no such box exists.
    """
    kinds = (("flax.nnx", "Variable"), ("flax.core.meta", "AxisMetadata"))
    loaded = ((sys.modules.get(module), name) for module, name in kinds)
    return isinstance(x, tuple(getattr(module, name) for module, name in loaded if module))


def unboxed(tree: Any) -> Any:
    """The tree with each box replaced by its content.

    `nnx.Optimizer` passes boxes to `init` and bare arrays to `update`; the metadata of a box
    describes the axes of its parameter, which bases, sketches and codes do not have.

    Example:
      >>> from flax import nnx
      >>> unboxed({"kernel": nnx.Param(2.0), "bias": None})
      {'bias': None, 'kernel': 2.0}
    """

    def open_box(x: Any) -> Any:
        if not is_box(x):
            return x
        (content,) = jax.tree.leaves(x, is_leaf=lambda inside: inside is not x)
        return unboxed(content)

    return jax.tree.map(open_box, tree, is_leaf=is_box)


def boxed_like(like: Any, tree: Any) -> Any:
    """Puts the leaves of an unboxed tree into the boxes of `like`, which has the same leaves."""
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(tree))


def path_name(path: KeyPath) -> str:
    """A key path as text, such as `layers/attention/query`: a name for messages, not a key."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def path_of(path: KeyPath) -> Path:
    """A key path as plain keys, the same for a dict, a dataclass and a module with equal names.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_flatten_with_path({"mlp": [1.0]})[0]
      >>> path_of(path)
      ('mlp', 0)
    """
    return tuple(_plain(key) for key in path)


def _plain(key: Any) -> Hashable:
    match key:
        case jax.tree_util.DictKey(key=plain) | jax.tree_util.FlattenedIndexKey(key=plain):
            return plain
        case jax.tree_util.SequenceKey(idx=plain) | jax.tree_util.GetAttrKey(name=plain):
            return plain
    return key


def flatten(tree: Any, is_leaf: IsLeaf | None = None) -> list[tuple[KeyPath, Any]]:
    """The leaves of a tree, each with its key path."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]


def by_path(tree: Any, is_leaf: IsLeaf | None = None) -> dict[Path, Any]:
    """The leaves of a tree by their paths.

    Raises:
      ValueError: A container gives the same key to two of its children.
    """
    leaves = flatten(tree, is_leaf)
    found = {path_of(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        counts = collections.Counter(path_of(path) for path, _ in leaves)
        twice = next(path for path, _ in leaves if counts[path_of(path)] > 1)
        raise ValueError(
            f"two leaves have the path {jax.tree_util.keystr(twice)}: a container registered with "
            "register_pytree_with_keys must give each of its children a unique key"
        )
    return found


def names(paths: Sequence[KeyPath]) -> list[str]:
    """The text of each path, or its individual keys if another path has the same text.

    Example:
      >>> import jax
      >>> tree = {"mlp": {"a/b": 1}, "mlp/a": {"b": 2}, "norm": 3}
      >>> names([path for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]])
      ["['mlp']['a/b']", "['mlp/a']['b']", 'norm']
    """
    having: dict[str, set[Path]] = collections.defaultdict(set)
    for path in paths:
        having[path_name(path)].add(path_of(path))
    is_alone = lambda path: len(having[path_name(path)]) == 1
    return [path_name(path) if is_alone(path) else jax.tree_util.keystr(path) for path in paths]


def paths_by_name(tree: Any) -> dict[str, KeyPath]:
    """The key paths of a tree's leaves, without its boxes, by the names that `names` gives them."""
    paths = [path for path, _ in flatten(unboxed(tree))]
    return dict(zip(names(paths), paths, strict=True))


def promotes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Runs the function under JAX's standard dtype promotion, whatever the caller has set.

    `jax_numpy_dtype_promotion="strict"` is meant to find mistakes of a caller. The dtypes inside an
    optimizer are its own, and some of Optax's rules, such as Adam, fail under "strict".
    """

    @functools.wraps(function)
    def promoting(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return promoting


def unzip(tree: Any, pairs: Any) -> tuple[Any, Any]:
    """A tree like `tree` with a pair at each leaf -> a pair of trees."""
    first, second = (jax.tree.map(lambda _, x, i=i: x[i], tree, pairs) for i in range(2))
    return first, second


def traced_once(
    function: Callable[..., Any], *, static_argnums: int | tuple[int, ...] = ()
) -> Callable[..., Any]:
    """Traces `function` once for all leaves of equal shapes, dtypes and static arguments.

    A model without stacked layers has hundreds of matrices of a few shapes, and tracing the same
    steps for each of them takes most of the time before a program is compiled. The steps are copied
    into the caller's (`inline`), since XLA shards other programs if they are calls. Without tracers
    among the arguments `function` runs as it is, because a new function would compile again.

    Args:
      function: Trees of arrays -> a tree of arrays. It runs for the first of equal leaves only. It
        may read values of the trace that it is made in, so it must not outlive it.
      static_argnums: As in `jax.jit`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> traces = []
      >>> double = traced_once(lambda x: traces.append(x.shape) or 2 * x)
      >>> doubled = jax.jit(lambda xs: [double(x) for x in xs])([jnp.ones(3)] * 4)
      >>> len(doubled), traces
      (4, [(3,)])
    """
    shared = jax.jit(function, static_argnums=static_argnums, inline=True)

    def once(*args: Any) -> Any:
        is_traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
        return (shared if is_traced else function)(*args)

    return once
