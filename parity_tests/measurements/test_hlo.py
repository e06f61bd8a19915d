"""The parser of collectives, on text that JAX compiles here and on lines in other notations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from launch.compile_tpu.hlo import Collective, collectives

FLOAT = 4


def compiled_text(function: Callable[..., Any], *args: Any) -> str:
    """Of a function on each device of a mesh (2, 4), ("a", "b"), of arguments split over both."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")), check_vma=False
    )
    return jax.jit(mapped).lower(*args).compile().as_text()


def read(function: Callable[..., Any], *args: Any) -> list[Collective]:
    return collectives(compiled_text(function, *args))


X = jax.ShapeDtypeStruct((64, 3), jnp.float32)  # (8, 3) on each of 8 devices


@pytest.mark.parametrize(
    ("function", "op", "shape", "whole", "group", "sent"),
    [
        (
            lambda x: x + jax.lax.all_gather(x, "b").sum(0),
            "all-gather", (4, 8, 3), 4 * 24, 4, 3 / 4,
        ),
        (lambda x: jax.lax.psum(x, "a"), "all-reduce", (8, 3), 24, 2, 1.0),
        (lambda x: jax.lax.psum(x, ("a", "b")), "all-reduce", (8, 3), 24, 8, 7 / 4),
        (
            lambda x: jax.lax.psum_scatter(x, "b", tiled=True),
            "reduce-scatter", (2, 3), 24, 4, 3 / 4,
        ),
        (
            lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True),
            "all-to-all", None, 24, 4, 3 / 4,
        ),
        (
            lambda x: jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]),
            "collective-permute", (8, 3), 24, 2, 1.0,
        ),
    ],
)  # fmt: skip
def test_each_operation(
    function: Any, op: str, shape: tuple[int, ...] | None, whole: int, group: int, sent: float
) -> None:
    (one,) = read(function, X)
    assert (one.op, one.dtype, one.group, one.times, one.branches) == (op, "f32", group, 1, 0)
    assert one.bytes == whole * FLOAT
    assert one.sent == pytest.approx(sent * whole * FLOAT)
    # XLA may transpose what it gathers
    assert shape is None or sorted(one.shape) == sorted(shape)


def test_loops_multiply_and_conditionals_are_counted() -> None:
    def body(carry: jax.Array, _: Any) -> Any:
        def inner(carry: jax.Array, _: Any) -> Any:
            return jnp.sin(jax.lax.psum(carry, "a")), None

        return jax.lax.scan(inner, jnp.cos(carry), length=3)[0], None

    def function(x: jax.Array) -> jax.Array:
        x = jax.lax.scan(body, x, length=5)[0]
        reduced = lambda x: jax.lax.psum(x, "b")
        return jax.lax.cond(jax.lax.psum(x.sum(), ("a", "b")) > 0, reduced, jnp.sin, x)

    found = {(one.group, one.times, one.branches): one for one in read(function, X)}
    assert sorted(found) == [(2, 15, 0), (4, 1, 1), (8, 1, 0)]
    assert found[2, 15, 0].sent == 15 * 24 * FLOAT
    assert "psum" in found[4, 1, 1].name


def test_a_loop_of_unknown_length_counts_once() -> None:
    def function(x: jax.Array) -> jax.Array:
        going = lambda x: jax.lax.psum(x.sum(), ("a", "b")) < 1
        return jax.lax.while_loop(going, lambda x: x + jax.lax.psum(x, "b"), x)

    assert {one.times for one in read(function, X)} == {1}


def test_a_tuple_is_an_entry_for_each_array() -> None:
    def function(x: jax.Array) -> Any:
        return jax.lax.psum((x, x[:2].astype(jnp.bfloat16).astype(jnp.float32) * x[2:4]), "b")

    found = read(function, X)
    assert sorted(one.bytes for one in found) == [6 * FLOAT, 24 * FLOAT]
    assert sum(one.sent for one in found) == pytest.approx(2 * 3 / 4 * 30 * FLOAT)


def test_one_device_exchanges_nothing() -> None:
    assert collectives(jax.jit(jnp.sin).lower(jnp.ones(3)).compile().as_text()) == []


def line(text: str) -> Collective:
    module = f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {text}\n}}\n"
    (one,) = collectives(module)
    return one


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # asynchronous, with a TPU's layouts
        (
            "%s = (bf16[2,128]{1,0:T(8,128)(2,1)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) "
            "all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}",
            ("all-gather", "bf16", (8, 128), 2048, 4),
        ),
        (
            "%s = f32[16]{0:T(128)} all-reduce-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, "
            "to_apply=%add",
            ("all-reduce", "f32", (16,), 64, 4),
        ),
        (
            "ROOT %s = (f32[4]{0}, f32[4]{0}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", "f32", (4,), 16, 2),
        ),
        # a mesh and its axes, or a part of one
        (
            "%s = pred[] all-reduce(%p), replica_groups=mesh['x'=2,'y'=4], "
            "device_ids=([2,4]T(1,0)) {'y'}, to_apply=%and",
            ("all-reduce", "pred", (), 1, 4),
        ),
        (
            "%s = s8[6]{0} all-reduce(%p), replica_groups=mesh['x'=2,'y'=4] {'x','y':(1)2}, "
            "to_apply=%add",
            ("all-reduce", "s8", (6,), 6, 4),
        ),
        # slices of an all-to-all
        (
            "%s = (f32[1,3]{1,0}, f32[1,3]{1,0}) all-to-all(%p, %q), replica_groups={{0,1}}",
            ("all-to-all", "f32", (2, 1, 3), 24, 2),
        ),
    ],
)
def test_other_forms(text: str, expected: tuple[Any, ...]) -> None:
    one = line(text)
    assert (one.op, one.dtype, one.shape, one.bytes, one.group) == expected


def test_groups_of_one_exchange_nothing() -> None:
    operation = "  %s = f32[8] all-reduce(%p), replica_groups={{0},{1}}"
    assert collectives(f"ENTRY %m (p: f32[8]) -> f32[8] {{\n{operation}\n}}") == []


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("not HLO")


def test_unknown_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="replica groups"):
        line("%s = f32[8] all-reduce(%p), replica_groups=unheard_of")


TPU = """HloModule tpu

%async_start.1 (p.1: bf16[4,8]) -> (bf16[4,8], bf16[8,8]) {
  %all-gather.1 = bf16[8,8]{1,0:T(8,128)} all-gather(%p.1), channel_id=7, replica_groups=[1,2]<=[2]
  ROOT %custom-call.1 = (bf16[4,8], bf16[8,8]) custom-call(%all-gather.1)
}

%async_done.1 (p.2: bf16[4,8]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0:T(8,128)} all-gather(%p.2), channel_id=7, replica_groups=[1,2]<=[2]
  ROOT %custom-call.2 = bf16[8,8] custom-call(%all-gather.2)
}

%all-reduce-scatter.1 (p.3: f32[8,8]) -> f32[4,8] {
  %all-reduce.1 = f32[8,8] all-reduce(%p.3), channel_id=9, replica_groups=[1,2]<=[2], to_apply=%add
  ROOT %dynamic-slice.1 = f32[4,8] dynamic-slice(%all-reduce.1)
}

%condition (p.4: (s32[], bf16[4,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(24)
  %get-tuple-element.1 = s32[] get-tuple-element(%p.4), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%body (p.5: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %fusion.1 = (bf16[4,8], bf16[8,8]) fusion(%p.5), kind=kCustom, calls=%async_start.1
  %fusion.2 = bf16[8,8] fusion(%fusion.1), kind=kCustom, calls=%async_done.1
  %fusion.3 = f32[4,8] fusion(%fusion.2), kind=kCustom, calls=%all-reduce-scatter.1
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {
  %while.1 = (s32[], bf16[4,8]) while(%tuple), condition=%condition, body=%body
}
"""


def test_a_tpus_fusions_and_loops() -> None:
    """In libtpu's notation: one operation in several fusions, and loops without a trip count."""
    gather, scatter = sorted(collectives(TPU), key=lambda c: c.op)
    assert (gather.op, gather.bytes, gather.times) == ("all-gather", 128, 24)
    assert (scatter.op, scatter.bytes, scatter.times) == ("reduce-scatter", 256, 24)
    assert scatter.sent == 24 * 128


def test_reduce_scatters_that_share_a_channel_all_count() -> None:
    """In the loop, and after it with the same shape."""
    start = TPU.index("%all-reduce-scatter.1 (")
    again = TPU[start : TPU.index("%condition (")].replace("scatter.1 ", "scatter.2 ")
    call = "\n  %fusion.4 = f32[8,8] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.2\n}"
    text = TPU.replace("%condition (", again + "%condition (", 1)
    text = text.replace("body=%body\n}", "body=%body" + call)
    found = [c for c in collectives(text) if c.op == "reduce-scatter"]
    assert sorted((c.bytes, c.times) for c in found) == [(256, 1), (256, 24)]


@pytest.mark.parametrize(
    ("end", "step", "times"),
    [("u32[]{:T(128)}", 2, 4), ("s32[]", 2, 4), ("u32[]", 3, 3), ("u32[]", 1, 8)],
)
def test_the_loop_of_a_collective_matmul(end: str, step: int, times: int) -> None:
    """It counts in u32, and its body takes several steps at once."""
    text = f"""HloModule windowed

%condition (p.1: (bf16[4,8], u32[])) -> pred[] {{
  %constant.1 = {end} constant(8)
  %get-tuple-element.1 = {end} get-tuple-element(%p.1), index=1
  ROOT %lt.1 = pred[]{{:T(512)}} compare(%get-tuple-element.1, %constant.1), direction=LT
}}

%body (p.2: (bf16[4,8], u32[])) -> (bf16[4,8], u32[]) {{
  %constant.2 = {end} constant({step})
  %x.1 = bf16[4,8]{{1,0:T(8,128)(2,1)}} get-tuple-element(%p.2), index=0
  %get-tuple-element.2 = {end} get-tuple-element(%p.2), index=1
  %add.1 = {end} add(%get-tuple-element.2, %constant.2), metadata={{op_name="window"}}
  %permute.1 = bf16[4,8] collective-permute(%x.1), source_target_pairs={{{{0,1}},{{1,0}}}}
  ROOT %tuple.1 = (bf16[4,8], u32[]{{:T(128)}}) tuple(%permute.1, /*index=1*/%add.1)
}}

ENTRY %main (p: bf16[4,8]) -> bf16[4,8] {{
  %while.1 = (bf16[4,8], u32[]) while(%tuple), condition=%condition, body=%body
}}
"""
    (permute,) = collectives(text)
    assert (permute.op, permute.times) == ("collective-permute", times)


def test_parts_of_an_operation_in_a_loop_count_once() -> None:
    """It starts before the loop and continues within it, under one channel."""
    start = "  %fusion.0 = (bf16[4,8], bf16[8,8]) fusion(%p), kind=kCustom, calls=%async_start.1\n"
    text = TPU.replace("  %while.1", start + "  %while.1")
    gather = next(c for c in collectives(text) if c.op == "all-gather")
    assert (gather.bytes, gather.times) == (128, 1)
