"""JAX: the mesh of devices for a run, and batches sharded over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from launch.trainer.cli import UsageError
from launch.trainer.options import Options

if TYPE_CHECKING:
    from jax.sharding import Mesh


def make_mesh(
    options: Options, processes: int = 1, devices: Sequence[Any] | None = None
) -> Mesh | None:
    """The mesh for the options, over the devices of all processes; None: one device.

    Args:
        options: Checked options.
        processes: Number of processes that train together.
        devices: Devices of all processes; None: those that JAX finds.

    Raises:
        UsageError: The sizes do not fit the devices, the processes or the batch.
    """
    import jax

    from osd_jax import sharding
    from osd_jax.llama.partition import batch_sharding

    devices = devices or jax.devices()
    try:
        asked = options.devices.mesh or ("fsdp=-1" if options.devices.fsdp else "data=-1")
        sizes = sharding.parse_mesh("data=1" if options.devices.single_gpu else asked)
        product = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
        if processes == 1 and 0 < product < len(devices):
            devices = devices[:product]
        mesh = sharding.make_mesh(**sizes, devices=devices)
    except ValueError as error:
        raise UsageError(f"--mesh: {error}") from None
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    over_data = {
        "compress_gradients": "gradients are reduced",
        "shard_over_data": "weights and state are split",
    }
    for name, what in over_data.items():
        if getattr(options.devices, name) and mesh.shape["data"] == 1:
            raise UsageError(
                f"--{name}: {what} over the mesh's data axis, which has one device here; leave it "
                "out, or use --mesh data=-1 on several devices"
            )
    if mesh.size == 1:
        return None
    readers: dict[Any, set[int]] = {}  # part of the batch -> processes that hold it
    layout: dict[Any, Any] = dict(batch_sharding(mesh).devices_indices_map((1, shards, 1)))
    for device, (_, rows, _) in layout.items():
        readers.setdefault(rows.start or 0, set()).add(device.process_index)
    if any(len(of) > 1 for of in readers.values()) or shards % processes:
        raise UsageError(
            f"--mesh: tensor={mesh.shape['tensor']} splits a row of the batch over several of the "
            f"{processes} processes, and each reads its own rows; use at most "
            f"tensor={len(devices) // processes}, the devices of a process"
        )
    each = shards // processes
    if options.data.batch_size % each:
        raise UsageError(
            f"--batch_size: {options.data.batch_size} rows are not divisible by {each}, the data "
            f"x fsdp parts of the mesh ({mesh_text(mesh)}) in a process; use "
            f"{each * max(1, round(options.data.batch_size / each))}, or another --mesh"
        )
    return mesh


def mesh_text(mesh: Mesh) -> str:
    """A mesh in the format of `--mesh`: "data=2,fsdp=4", without axes of size one."""
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)


def global_batch(mesh: Mesh | None, batch: Mapping[str, Any]) -> Any:
    """Arrays sharded over the mesh, from the rows that each process has read.

    Args:
        mesh: From `make_mesh`.
        batch: This process's rows: (K, B, S) for an update, (B, S) for an evaluation.
    """
    if mesh is None:
        return batch
    import jax

    from osd_jax.llama.partition import batch_sharding

    def laid_out(rows: Any) -> jax.Array:
        spec = batch_sharding(mesh).spec[3 - rows.ndim :]
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.make_array_from_process_local_data(sharding, rows)

    return {name: laid_out(rows) for name, rows in batch.items()}
