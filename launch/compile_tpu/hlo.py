"""Reads the communication between devices of a compiled program from its HLO text.

The text is `jax.jit(f).lower(...).compile().as_text()`. Its shapes are those of one device's shard.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

OPS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One array of one collective operation.

    Attributes:
      op: One of `OPS`. An asynchronous pair (`all-gather-start`, `-done`) counts as one operation.
      dtype: In HLO's notation: f32, bf16, s8, pred.
      shape: Shape of the result on one device (on a TPU, of a reduce-scatter's operand).
      bytes: Bytes of the whole array that is communicated: the result of an all-gather, the operand
        of a reduce-scatter, and what an all-reduce, all-to-all or permutation reads and returns.
      group: Number of devices that participate together.
      times: How often it runs per run of the program: the product of the trip counts of the loops
        around it; a loop of unknown length counts once.
      branches: Number of conditionals around it: if this is not 0, it may not run at all.
      name: The JAX operation from which it stems, if the compiler kept that.
    """

    op: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    group: int
    times: int
    branches: int
    name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends, over all `times`, with the usual ring algorithms."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.op, share)
        return self.times * self.bytes * factor


# A computation starts at the left margin: `ENTRY %main (arg: f32[2]) -> f32[2] {`.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
# `%name = f32[2,3] all-reduce(%operand), ...`, or a tuple of types, or of tuples of them.
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>\((?:[^()]|\([^()]*\))*\)|\S+)"
    r" (?P<op>[a-z][\w\-]*)\((?P<rest>.*)$"
)
_LAYOUT = re.compile(r"(?<=\])\{[^{}]*\}")  # f32[2,3]{1,0:T(8,128)}: contains parentheses
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,<=]*)\]")
_CALLED = re.compile(
    r"\b(to_apply|calls|body|condition|true_computation|false_computation"
    r"|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_LOOPS = ("body", "condition")
_BRANCHES = ("true_computation", "false_computation", "branch_computations")


def collectives(text: str) -> list[Collective]:
    """Every collective operation of a compiled program, one entry per communicated array.

    Operations on groups of one device are omitted: they communicate nothing.

    Args:
      text: Text of an optimized module, from `compile().as_text()`.

    Raises:
      ValueError: The text has no entry computation, so it is not an HLO module.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> collectives(jax.jit(jnp.sum).lower(jnp.ones(8)).compile().as_text())
      []
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError(
            f"this text of {len(text)} characters has no ENTRY computation: expected an HLO "
            "module, as from jax.jit(f).lower(...).compile().as_text()"
        )
    found: list[Collective] = []
    in_parts: dict[Any, list[list[Collective]]] = defaultdict(list)

    def visit(name: str, scope: str, times: int, branches: int) -> None:
        for line in computations.get(name, ()):
            if (match := _INSTRUCTION.match(_LAYOUT.sub("", line))) is None:
                continue
            op, rest = match["op"], match["rest"]
            if op.removesuffix("-start") in OPS:
                # On a TPU a reduce-scatter is a fusion around an all-reduce.
                scatters = name.startswith("all-reduce-scatter")
                arrays = list(_read(op, match["type"], rest, times, branches, scatters))
                # A reduce-scatter's fusion is the whole operation, and several share a channel.
                is_part = name != scope and not scatters
                channel = re.search(r"channel_id=\d+", rest) if is_part else None
                if channel and arrays:
                    kind = tuple((array.op, array.dtype, array.shape) for array in arrays)
                    in_parts[channel[0], kind].append(arrays)
                else:
                    found.extend(arrays)
                continue  # its callee only adds two numbers
            called = {kind: re.findall(r"[\w.\-]+", names) for kind, names in _CALLED.findall(rest)}
            for kind, names in called.items():
                runs = times
                if kind in _LOOPS:
                    runs *= _trip_count(rest, *(computations.get(called[k][0], ()) for k in _LOOPS))
                for one in names:
                    inner = scope if kind == "calls" else one
                    visit(one, inner, runs, branches + (kind in _BRANCHES))

    visit(entry, entry, 1, 0)
    # On a TPU the start, the middle and the end of one asynchronous operation are fusions with its
    # channel and arrays. Those in a loop that it overlaps are parts of it too; each trip does not
    # repeat it.
    for parts in in_parts.values():
        fewest = min(parts, key=lambda arrays: arrays[0].times)
        found.extend(fewest)
    return found


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """(name -> lines, name of the entry)."""
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _trip_count(rest: str, body: Iterable[str], condition: Iterable[str]) -> int:
    """The compiler's trip count, else that of `for (i = 0; i < n; i += step)`, else 1.

    The loop of a collective matmul takes two of its steps in one run of the body, so `step` is 2.
    """
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
        return int(match[1])
    ends, steps = _definitions(condition), _definitions(body)
    operands = re.match(r"pred\[\]\S* compare\((\S+), (\S+)\), direction=LT", ends.get("ROOT", ""))
    if operands is None or (end := _constant(ends, operands[2])) is None:
        return 1
    index = re.search(r"index=(\d+)", ends[operands[1]])
    state = re.search(r" tuple\((.*?)\)", steps.get("ROOT", ""))
    if index is None or state is None:
        return end
    counter = re.findall(r"%[\w.\-]+", state[1])[int(index[1])]
    added = re.search(r" add\(\S+, (\S+?)\)", steps.get(counter, ""))
    step = _constant(steps, added[1]) if added else 1
    return -(-end // (step or 1))


def _definitions(lines: Iterable[str]) -> dict[str, str]:
    """(name -> type, operation and operands) of a computation's instructions, and of "ROOT"."""
    found = {}
    for line in lines:
        if match := re.match(r"\s+(ROOT )?(%?[\w.\-]+) = (.*)", _LAYOUT.sub("", line)):
            found[match[2]] = match[3]
            if match[1]:
                found["ROOT"] = match[3]
    return found


def _constant(definitions: dict[str, str], name: str) -> int | None:
    match = re.match(r"[su]32\[\] constant\((\d+)\)", definitions.get(name, ""))
    return int(match[1]) if match else None


def _read(
    op: str, result: str, rest: str, times: int, branches: int, scatters: bool
) -> Iterator[Collective]:
    base, group = op.removesuffix("-start"), _group_size(rest)
    arrays = [(dtype, _shape(dims)) for dtype, dims in _ARRAY.findall(result)]
    if op == "all-gather-start":  # ((operands), (results)), then contexts
        arrays = [a for a in arrays if a[1]]
        arrays = arrays[len(arrays) // 2 :]
    elif op == "collective-permute-start":  # (operand, result, contexts)
        arrays = arrays[1:2]
    if base == "all-to-all" and len(arrays) > 1:  # one slice per member
        (dtype, shape), *_ = arrays
        arrays = [(dtype, (len(arrays), *shape))]
    name = re.search(r'op_name="([^"]*)"', rest)
    for dtype, shape in arrays if group > 1 else ():
        size = math.ceil(math.prod(shape) * _bits(dtype) / 8)
        yield Collective(
            op="reduce-scatter" if scatters else base,
            dtype=dtype,
            shape=shape,
            bytes=size * (group if base == "reduce-scatter" else 1),
            group=group,
            times=times,
            branches=branches,
            name=name[1] if name else "",
        )


def _shape(dims: str) -> tuple[int, ...]:
    return tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)


def _bits(dtype: str) -> int:
    """f32 -> 32, bf16 -> 16, f8e4m3fn -> 8, pred -> 8."""
    digits = re.match(r"[a-z]+(\d+)", dtype)
    return int(digits[1]) if digits else 8


def _group_size(rest: str) -> int:
    """Number of devices in one replica group, for each of HLO's notations of groups."""
    if match := re.search(r"source_target_pairs=\{(.*?)\}\}?(?:,|\s|$)", rest):
        pairs = re.findall(r"\{?(\d+),(\d+)", match[1])
        return 2 if any(a != b for a, b in pairs) else 1
    # mesh['a'=2,'b'=4], device_ids=(...) {'b'}: over the axes named last, or parts of them 'b':(1)2
    if match := re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", rest):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        used = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in used)
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(match[2])
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return match[1].count(",") + 1
    # replica_groups={} means all devices, whose number the instruction does not contain
    raise ValueError(f"no replica groups in a supported notation: {rest[:300]}")
