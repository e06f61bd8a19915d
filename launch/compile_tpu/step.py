"""Compiles the train step for a TPU slice, and parses the compiler's report."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from launch.trainer import keywords
from launch.trainer.cli import UsageError, user_errors
from launch.trainer.jax_step import (
    attention_on,
    make_step,
    refuse_torch_only,
    weights_dtype,
)
from launch.trainer.mesh import make_mesh, mesh_text
from launch.trainer.options import Options

if TYPE_CHECKING:
    import jax

GIB = 2**30
IN_BRANCH = " (in a branch)"

KINDS = ("v5e", "v5p", "v6e")
# The compiler's messages for a program that is too large, early or late: bytes needed and
# available.
_REFUSALS = (
    r"HLO temporaries \(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)",
    r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm",
)


@dataclasses.dataclass(frozen=True)
class Report:
    """The compiler's report on a train step; bytes and operations are per chip.

    Attributes:
        topology: "v6e:4x4".
        chips: Number of chips.
        mesh: The mesh's axes longer than 1, in the format of `--mesh`; empty for one chip.
        fits: Whether the compiler accepts it.
        memory: Bytes available to a program.
        arguments: Bytes of weights, optimizer state and batch; the new ones replace them.
        temporaries: Bytes of everything else, as laid out by the compiler.
        peak: Largest number of bytes alive at a time, including arguments, which determines whether
            the compiler accepts a step. For a step that does not fit: the bytes that it would use
            according to the compiler; the two above are then None.
        code: Bytes of the program itself.
        product_flops: Floating-point operations of the step's matrix products, by their shapes; a
            step that recomputes activations counts them again.
        collectives: By kind ("all-reduce"): how many run in a step, and the bytes that a chip
            sends. Those inside a branch, such as the one that sets P first, are counted separately.
        seconds: Compilation time.
        reason: Why it does not fit, in the compiler's words.
    """

    topology: str
    chips: int
    mesh: str
    fits: bool
    memory: float
    arguments: int | None
    temporaries: int | None
    peak: float
    code: int | None
    product_flops: float
    collectives: dict[str, dict[str, float]]
    seconds: float
    reason: str | None = None

    def text(self) -> str:
        """A report for people."""
        chips = f"{self.chips} chip" + "s" * (self.chips > 1)
        lines = [f"{self.topology}: {chips}" + f" ({self.mesh})" * bool(self.mesh)]

        def row(what: str, value: str) -> None:
            lines.append(f"  {what:<38}{value:>12}")

        gib = lambda size: f"{size / GIB:,.2f} GiB"
        if self.arguments is not None and self.temporaries is not None:
            row("weights, optimizer state and batch", gib(self.arguments))
            row("temporaries, as laid out", gib(self.temporaries))
        row("peak", gib(self.peak))
        row("a program may have", gib(self.memory))
        row("matrix products of a step", f"{self.product_flops / 1e12:,.2f} TFLOP")
        for kind, found in self.collectives.items():
            row(f"{kind}, {found['count']:,.0f} a step", f"{found['bytes_sent'] / 1e6:,.1f} MB")
        if self.fits:
            left = gib(self.memory - self.peak)
            lines.append(f"It fits, with {left} to spare. Compiled in {self.seconds:.0f} s.")
        else:
            lines.append(f"It does not fit: {self.reason}")
        return "\n".join(lines)


def compile_step(topology: str, argv: Sequence[str]) -> Report:
    """Compiles the step that launch.train_jax would run with these flags on a slice.

    Args:
        topology: "v6e:4x4".
        argv: The flags.

    Raises:
        UsageError: The topology or flags are invalid, or the compiler is not installed.
    """
    options = Options.parse(argv, prog="python -m launch.compile_tpu")
    devices = find_topology(topology)

    import jax
    import jax.numpy as jnp

    from launch.compile_tpu.hlo import collectives
    from osd_jax import llama
    from osd_jax.llama.partition import batch_sharding
    from osd_jax.llama.train import init_state, learning_rate_schedule, train_state_sharding

    processes = len({device.process_index for device in devices})
    with tempfile.TemporaryDirectory() as nowhere:  # avoids conflicts with earlier runs
        options = options.replace(run_dir=nowhere, save_dir=None)
        options = options.check(processes)
    refuse_torch_only(options)
    mesh = make_mesh(options, processes, devices)
    with user_errors():
        config = llama.LlamaConfig.from_hf_dict({"model_type": "llama", **options.model.config()})
        schedule = learning_rate_schedule(
            options.optimizer.scheduler, **keywords.schedule_options(options)
        )
        attention = attention_on("tpu", options, config)
        tx, train_step = make_step(options, config, schedule, mesh, attention)

    dtype = weights_dtype(options, "tpu")
    like = jax.eval_shape(
        lambda: init_state(
            jax.tree.map(lambda x: x.astype(dtype), llama.init(config, options.run.seed)), tx
        )
    )
    one = jax.sharding.SingleDeviceSharding(devices[0])
    rows = jax.ShapeDtypeStruct(
        (
            options.data.gradient_accumulation,
            options.data.batch_size * processes,
            options.data.max_length,
        ),
        jnp.int32,
        sharding=batch_sharding(mesh) if mesh else one,
    )
    batch = {"tokens": rows, "mask": rows.update(dtype=jnp.bool)}
    if options.data.separate_documents:
        batch["segments"] = rows
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()) if mesh else one
    layout = (
        train_state_sharding(
            tx, like.params, mesh, options.devices.shard_over_data, options.devices.per_layer
        )
        if mesh
        else jax.tree.map(lambda _: one, like)
    )
    state = jax.tree.map(lambda x, to: x.update(sharding=to), like, layout)
    measure = jax.ShapeDtypeStruct((), jnp.bool, sharding=whole)

    started = time.monotonic()
    traced: Any = train_step.trace(state, batch, measure)  # type: ignore[attr-defined]
    about: dict[str, Any] = {
        "topology": topology,
        "chips": len(devices),
        "mesh": mesh_text(mesh) if mesh else "",
        "memory": memory_granted(devices[0]),
        "product_flops": product_flops(traced.jaxpr.jaxpr) / (mesh.size if mesh else 1),
    }
    try:
        with warnings.catch_warnings():
            # A cache of compiled programs is only valid for this machine's devices.
            warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := refusal(error)) is None:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise UsageError(f"the TPU compiler failed for another reason: {reason}") from error
        return Report(
            **about,
            fits=False,
            arguments=None,
            temporaries=None,
            peak=refused.needed,
            code=None,
            collectives={},
            seconds=time.monotonic() - started,
            reason=refused.words,
        )
    memory = compiled.memory_analysis()
    counts: Counter[str] = Counter()
    sent: defaultdict[str, float] = defaultdict(float)
    for found in collectives(compiled.as_text()):
        kind = found.op + IN_BRANCH * bool(found.branches)
        counts[kind] += found.times
        sent[kind] += found.sent
    return Report(
        **about,
        fits=True,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives={kind: {"count": counts[kind], "bytes_sent": sent[kind]} for kind in counts},
        seconds=time.monotonic() - started,
    )


def find_topology(name: str) -> list[jax.Device]:
    """The chips of a slice, according to the compiler.

    Args:
        name: "v6e:4x4".

    Raises:
        UsageError: There is no such slice, or no TPU compiler.
    """
    kind, _, sizes = name.partition(":")
    if kind not in KINDS or not re.fullmatch(r"\d+(x\d+){1,2}", sizes):
        raise UsageError(
            f"--topology: {name!r} is not a slice; expected one of {', '.join(KINDS)} and its "
            "sizes, as in v6e:4x4 or v5p:2x2x1"
        )
    # Before JAX starts: there is no TPU, and this process only needs the CPU. Several processes may
    # compile at the same time, and messages about a missing TPU are irrelevant.
    for variable, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": f"{kind}-1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }.items():
        os.environ.setdefault(variable, value)
    import jax
    from jax.experimental import topologies

    alone = set(sizes.split("x")) == {"1"}
    more = {"chips_per_host_bounds": (1, 1, 1)} if alone else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        remedy = "choose other sizes, such as 1x1, 2x2 or 4x4, for v5p 2x2x1 or 2x2x2"
        if importlib.util.find_spec("libtpu") is None:
            remedy = 'install the compiler: pip install -e ".[jax,tpu]"'
        raise UsageError(
            f"--topology: the TPU compiler does not know {name} ({reason}); {remedy}"
        ) from None
    return list(found.devices)


class Refusal(NamedTuple):
    """The compiler's rejection of a program that is too large: bytes, and its message."""

    needed: float
    granted: float
    words: str


def refusal(error: Exception) -> Refusal | None:
    """Parses the compiler's rejection; None if it has another cause."""
    for pattern in _REFUSALS:
        if match := re.search(pattern, str(error)):
            needed, granted = (
                float(x[:-1]) * 1024 ** ("KMGT".index(x[-1]) + 1) for x in match.groups()
            )
            return Refusal(needed, granted, match[0])
    return None


def memory_granted(chip: jax.Device) -> float:
    """Bytes of a chip that the compiler grants a program, which only a rejection reports."""
    import jax
    import jax.numpy as jnp

    where = jax.sharding.SingleDeviceSharding(chip)
    too_large = jax.ShapeDtypeStruct((2**20, 2**20), jnp.float32, sharding=where)
    try:
        jax.jit(lambda x: x + 1).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := refusal(error)) is not None:
            return refused.granted
        raise
    raise AssertionError(f"{chip} accepted an array of 4 TiB")


def product_flops(jaxpr: Any) -> float:
    """Floating-point operations of the matrix products in a traced function, 2 m k n each.

    The compiler's own count counts a loop's body once. Of several branches the most expensive
    counts, and of a Pallas kernel all blocks, also those that it skips. A function that runs on
    each device (`shard_map`) counts once for each.

    Args:
        jaxpr: From `jax.jit(f).trace(...)`: `.jaxpr.jaxpr`.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [product_flops(getattr(j, "jaxpr", j)) for j in _inner(equation.params)]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * depth * equation.outvars[0].aval.size
        elif equation.primitive.name == "cond":
            total += max(inner, default=0)
        else:
            times = equation.params.get("length", 1)
            if equation.primitive.name == "pallas_call":
                times = math.prod(equation.params["grid_mapping"].grid)
            if equation.primitive.name == "shard_map":
                sizes = equation.params["mesh"].shape
                # `newly_manual_axes`; `manual_axes` in other versions of JAX.
                names = (x for key, x in equation.params.items() if key.endswith("manual_axes"))
                times = math.prod(sizes[name] for name in next(names))
            total += sum(inner) * times
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The traced functions among an equation's parameters."""
    import jax
    import jax.extend.core

    kinds = (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, kinds))
    return [x for x in leaves if isinstance(x, kinds)]
