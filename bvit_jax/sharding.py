"""Where arrays live: a mesh of devices with three axes, and one table from logical axes to mesh axes.

The mesh has the axes `data`, `expert` and `model`. Modules name the axes of their parameters and activations
(`batch`, `heads`, ...); `RULES` says over which mesh axes each is split, and is the only place that does.

- Images are split over `data` and `expert` together, so that no device idles, whatever the family.
- Rotated and low-rank experts are on every device; tokens never leave theirs. Stored experts are split over `expert`,
  and tokens travel (`bvit_jax.exchange`).
- `model` splits attention heads and the hidden channels of dense and stored FFNs. Rotations mix all channels, so layers
  whose experts are on every device split their images over `model` too.
- Large arrays of the optimiser (and, with `fsdp`, of the parameters) are split over whatever batch axes they do not
  use yet, where they divide: every device updates its part.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from bvit_jax import platforms
from bvit_jax.model_config import ModelConfig, require

DATA, EXPERT, MODEL = "data", "expert", "model"
BATCH_AXES = (DATA, EXPERT)
LARGE_BYTES = 2**26
"""Splitting the two moments of a smaller array would save less than 1 % of the smallest TPU's memory."""

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "rotated_batch": (DATA, EXPERT, MODEL),
    "experts": EXPERT,
    "heads": MODEL,
    "mlp": MODEL,
    **dict.fromkeys(("layers", "tokens", "embed", "head_dim", "pixels", "classes", "routes")),
    **dict.fromkeys(("rotations", "angles", "rank", "inputs", "outputs")),  # of experts on every device
}
"""Mesh axes of each logical axis; None for none."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to lay a mesh over the devices; `data` takes what the other axes leave.

    Attributes:
        expert: devices along `expert`; None for as many as divide both the stored experts and the devices left by
            `model`, and 1 for families without stored experts.
        model: devices along `model`.
        fsdp: split large parameters over the batch axes, not their optimiser state alone.
    """

    expert: int | None = None
    model: int = 1
    fsdp: bool = False


DEFAULT = Layout()


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and where arrays go on it.

    Attributes:
        mesh: its axes are `data`, `expert`, `model`.
        fsdp: as in `Layout`.
    """

    mesh: Mesh
    fsdp: bool = False

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Makes mesh, rules and platform known to the modules; for use around what is traced."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh), platforms.lowered_for(self.platform):
            yield

    @property
    def platform(self) -> str:
        """Of the devices: `cpu`, `tpu`, ..."""
        platform: str = self.mesh.devices.flat[0].platform
        return platform

    @property
    def batch(self) -> NamedSharding:
        """Splits the first axis over the batch axes."""
        return NamedSharding(self.mesh, split("batch"))

    @property
    def replicated(self) -> NamedSharding:
        """Keeps the whole array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def params(self, axes: Any, shapes: Any) -> Any:
        """Returns the sharding of every parameter.

        Args:
            axes: tree of PartitionSpecs of logical axes, one for each array (`vit.param_axes`).
            shapes: tree of the same structure, of arrays or their descriptions.
        """
        return self._shardings(axes, shapes, spread=self.fsdp)

    def moments(self, axes: Any, shapes: Any) -> Any:
        """Returns the sharding of an optimiser's copies of the parameters; arguments as in `params`."""
        return self._shardings(axes, shapes, spread=True)

    def _shardings(self, axes: Any, shapes: Any, spread: bool) -> Any:
        def place(logical: PartitionSpec, leaf: Any) -> NamedSharding:
            logical = PartitionSpec(*logical, *[None] * (leaf.ndim - len(logical)))
            spec = split(*logical)
            if spread and leaf.size * leaf.dtype.itemsize >= LARGE_BYTES:
                spec = _spread(spec, logical, leaf.shape, self.mesh)
            return NamedSharding(self.mesh, spec)

        return jax.tree.map(place, axes, shapes, is_leaf=lambda node: isinstance(node, PartitionSpec))

    def host_rows(self, batch_size: int) -> np.ndarray:
        """Returns the places in a batch that this process's devices hold, rising, int64."""
        places = np.arange(batch_size)
        parts = self.batch.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([places[part] for part in parts if part is not None]))

    def put_batch(self, arrays: Any, rows: np.ndarray, batch_size: int) -> Any:
        """Moves a batch to the devices, split along the first axis.

        Args:
            arrays: tree of host arrays that hold the places `rows` of the batch.
            rows: as `host_rows` gives them.
            batch_size: of the whole batch, over all processes.
        """

        def put(local: np.ndarray) -> jax.Array:
            def part(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(batch_size)
                first = int(np.searchsorted(rows, start))
                return local[first : first + stop - start]

            return jax.make_array_from_callback((batch_size, *local.shape[1:]), self.batch, part)

        return jax.tree.map(put, arrays)


def place(
    model: ModelConfig, batch_size: int, layout: Layout = DEFAULT, devices: Sequence[jax.Device] | None = None
) -> Placement:
    """Lays a mesh for a model over `devices`, all there are by default.

    Raises:
        ConfigError: as `mesh_shape`.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(model, batch_size, layout, len(devices))
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Placement(Mesh(grid, (DATA, EXPERT, MODEL), axis_types=(AxisType.Auto,) * 3), layout.fsdp)


def mesh_shape(model: ModelConfig, batch_size: int, layout: Layout, count: int) -> tuple[int, int, int]:
    """Returns the devices along data, expert and model for a model on `count` devices.

    Raises:
        ConfigError: if devices, experts, heads, hidden channels or images do not divide over the mesh.
    """
    along_model, expert = layout.model, layout.expert
    divides = along_model >= 1 and count % along_model == 0
    require(divides, "model_axis", along_model, f"a divisor of {count} devices")
    rest = count // along_model
    stored = model.stores_experts
    if expert is None:
        expert = math.gcd(model.num_experts, rest) if stored else 1
    wanted = f"a divisor of {count} devices" + (f" / model_axis {along_model}" if along_model > 1 else "")
    require(expert >= 1 and rest % expert == 0, "expert_axis", expert, wanted)
    if stored:
        experts = model.num_experts
        require(experts % expert == 0, "expert_axis", expert, f"a divisor of num_experts = {experts}")
    for name in ("num_heads", "d_ff"):
        size = getattr(model, name)
        require(size % along_model == 0, "model_axis", along_model, f"a divisor of {name} = {size}")
    # Heads and hidden channels are split over `model`, but tokens of experts that are on every device are too.
    parts = count if model.keeps_tokens else rest
    require(batch_size % parts == 0, "batch_size", batch_size, f"a multiple of the {parts} devices that share it out")
    return rest // expert, expert, along_model


def named(init: nn.initializers.Initializer, *axes: str) -> nn.initializers.Initializer:
    """Names the axes of the parameter that `init` draws."""
    return nn.with_logical_partitioning(init, axes)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Places an activation as the rules say of its logical axes, where a placement is active."""
    return x if active_mesh() is None else jax.lax.with_sharding_constraint(x, split(*axes))


def split(*axes: str | None) -> PartitionSpec:
    """Returns the mesh axes of logical ones."""
    return PartitionSpec(*[RULES[axis] if axis else None for axis in axes])


def active_mesh() -> AbstractMesh | None:
    """Returns the mesh of the placement that is active; None outside of any, or on a single device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.size == 1 or mesh.axis_names != (DATA, EXPERT, MODEL) else mesh


def _spread(spec: PartitionSpec, logical: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Splits the largest dimension that can be over the batch axes that are free; never the axis of scanned layers."""
    axes_of = [(entry,) if isinstance(entry, str) else entry or () for entry in spec]
    used = {axis for axes in axes_of for axis in axes if mesh.shape[axis] > 1}
    free = tuple(axis for axis in BATCH_AXES if axis not in used and mesh.shape[axis] > 1)
    parts = math.prod(mesh.shape[axis] for axis in free)
    whole = [i for i, axes in enumerate(axes_of) if used.isdisjoint(axes) and logical[i] != "layers"]
    able = [i for i in whole if free and shape[i] % parts == 0]
    if not able:
        return spec
    largest = max(able, key=lambda i: shape[i])
    return PartitionSpec(*[free if i == largest else entry for i, entry in enumerate(spec)])
