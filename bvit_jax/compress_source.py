"""A trained model with its calibration images: what the methods of compression start from and what they return.

Axes: I inputs, O outputs, n rows of calibration inputs.
"""

import contextlib
import dataclasses
import functools
import math
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from bvit_jax import calibration, compensation, encoding, factors, storage
from bvit_jax.calibration import FlatParams, LinearMap, Seen
from bvit_jax.compensation import Moments
from bvit_jax.model_config import ModelConfig
from bvit_jax.storage import Storage

ROWS_AN_INPUT = 2
"""Rows that an expert's map is to see for each of its inputs; one that is sent fewer tokens sees others as well."""
_BLOCK = 8192
"""Rows that are made float64 at a time."""


@dataclasses.dataclass(frozen=True)
class MapRow:
    """What became of one linear map.

    Attributes:
        path, expert: of the map.
        layer: of the model.
        inputs, outputs: channels.
        rank: of its factors, min(inputs, outputs) if it is kept whole; None where there are none.
        numbers: that are stored of it.
        output_error: norm of the change in its outputs on calibration images, as stored, over that of the outputs; of
            an expert on the rows that it is calibrated on (`ROWS_AN_INPUT`).
    """

    path: str
    layer: int
    expert: int | None
    inputs: int
    outputs: int
    rank: int | None
    numbers: int
    output_error: float


@dataclasses.dataclass(frozen=True, eq=False)
class Compressed:
    """A model that is ready to be stored.

    Attributes:
        params: as `vit.init_params`.
        storage: number formats and reductions.
        scales: of weights that are rounded already, as `encoding.encode` takes them.
        maps: its linear maps; none where experts are merged.
    """

    params: Any
    storage: Storage
    scales: dict[str, np.ndarray]
    maps: tuple[MapRow, ...]


class Source:
    """A trained model with its calibration images; what several methods need of it is worked out once.

    Attributes:
        model: as trained.
        maps: its linear maps.
        trained: its parameters.
        used: likewise, as the model uses them: what training rounds is rounded.
        images: uint8 (B, H, W, c).
        shared_seconds: that each part took which several methods share, by name.
        aside_seconds: that were spent on such parts, and on the report, in all.
    """

    def __init__(self, model: ModelConfig, params: Any, images_BxHxWxc: np.ndarray) -> None:
        self.model = model
        self.maps = calibration.maps(model)
        self.trained = calibration.flat(params)
        self.used = self.stored(params, storage.as_trained(model))
        self.images = images_BxHxWxc
        self.shared_seconds: dict[str, float] = {}
        self.aside_seconds = 0.0

    def stored(self, params: Any, formats: Storage, scales: dict[str, np.ndarray] | None = None) -> FlatParams:
        """Returns parameters as a file of these formats holds them."""
        return calibration.flat(encoding.as_stored(params, self.model, formats, scales))

    @contextlib.contextmanager
    def aside(self, part: str) -> Iterator[None]:
        """Takes the time of a part that several methods share, or of the report."""
        start = time.perf_counter()
        yield
        self.shared_seconds[part] = time.perf_counter() - start
        self.aside_seconds += self.shared_seconds[part]

    @functools.cached_property
    def moments(self) -> dict[LinearMap, np.ndarray]:
        """X^T X of the inputs of every map, float64 (I, I)."""
        found: dict[LinearMap, np.ndarray] = {}
        with self.aside("moments"):
            walk = calibration.Walk(self.model, self.used, self.images)
            for layer in calibration.layers(self.model):
                seen, shared = walk.see(layer), dict[str, np.ndarray]()
                for wanted in calibration.maps_of(self.model, layer):
                    if wanted.expert is not None or wanted.inputs not in shared:
                        x_nxI = seen.inputs(wanted, self.used, places(seen, wanted))
                        shared[wanted.inputs] = _squared(x_nxI)
                    found[wanted] = shared[wanted.inputs]
                walk.step(layer)
        return found

    @functools.cached_property
    def plain_spectra(self) -> tuple[factors.Spectrum, ...]:
        """The spectrum of every map by its weights alone."""
        with self.aside("plain_spectra"):
            return tuple(factors.plain(wanted.of(self.used).astype(np.float64)) for wanted in self.maps)

    @functools.cached_property
    def aware_spectra(self) -> tuple[factors.Spectrum, ...]:
        """The spectrum of every map by its outputs on calibration images."""
        weights = [(self.moments[wanted], wanted.of(self.used).astype(np.float64)) for wanted in self.maps]
        with self.aside("aware_spectra"):
            return tuple(factors.activation_aware(w_IxO, c_IxI) for c_IxI, w_IxO in weights)

    def copy(self) -> FlatParams:
        """Returns a copy of the parameters as trained, to be changed."""
        return {path: leaf.copy() for path, leaf in self.trained.items()}

    def front_to_back(self, formats: Storage, fit: Callable[[LinearMap, Moments], np.ndarray]) -> None:
        """Goes from map to map with the inputs that the maps before it, compressed, give.

        Args:
            formats: that all that is no map is rounded to.
            fit: takes a map and the moments of its inputs, in the original (X) and in the compressed model (X^);
                returns what it becomes, (I, O).
        """
        of_maps = {wanted.path for wanted in self.maps}
        rounded = self.stored(encoding.nest(iter(self.trained.items())), formats)
        changed = {path: (self.used[path] if path in of_maps else leaf).copy() for path, leaf in rounded.items()}
        original = calibration.Walk(self.model, self.used, self.images)
        compressed = calibration.Walk(self.model, changed, self.images)
        for layer in calibration.layers(self.model):
            seen, maps = original.see(layer), calibration.maps_of(self.model, layer)
            for stage in dict.fromkeys(wanted.inputs for wanted in maps):
                own = compressed.see(layer)
                for wanted in maps:
                    if wanted.inputs == stage:
                        rows = places(own, wanted)
                        x_nxI = seen.inputs(wanted, self.used, rows)
                        own_nxI = own.inputs(wanted, changed, rows)
                        wanted.put(changed, fit(wanted, _paired(x_nxI, own_nxI)))
            original.step(layer)
            compressed.step(layer)

    def finished(
        self,
        changed: FlatParams,
        formats: Storage,
        ranks: Sequence[int] | None = None,
        kept: Sequence[int] | None = None,
        scales: dict[str, np.ndarray] | None = None,
    ) -> Compressed:
        """Puts a result together, and measures the errors of the maps as they will be stored.

        Args:
            changed: the parameters, compressed.
            formats: that they are to be stored in.
            ranks: of the maps, if these are factors.
            kept: numbers that are stored of each map; all if left out.
            scales: as in `Compressed`.
        """
        moments, params, rows = self.moments, encoding.nest(iter(changed.items())), []
        with self.aside("report"):
            stored = self.stored(params, formats, scales)
            for index, wanted in enumerate(self.maps):
                w_IxO, approx_IxO = (wanted.of(of).astype(np.float64) for of in (self.used, stored))
                row = MapRow(
                    path=wanted.path,
                    layer=wanted.layer,
                    expert=wanted.expert,
                    inputs=wanted.shape[0],
                    outputs=wanted.shape[1],
                    rank=None if ranks is None else ranks[index],
                    numbers=math.prod(wanted.shape) if kept is None else kept[index],
                    output_error=factors.output_error(w_IxO, approx_IxO, moments[wanted]),
                )
                rows.append(row)
        return Compressed(params, formats, scales or {}, tuple(rows))


def places(seen: Seen, wanted: LinearMap) -> np.ndarray | None:
    """Returns the rows that an expert's map is calibrated on: its own, and others spread evenly where those are few."""
    if wanted.expert is None:
        return None
    own, every = seen.places(wanted.expert), len(seen.rows["ffn"])
    missing = min(ROWS_AN_INPUT * wanted.shape[0], every) - len(own)
    if missing <= 0:
        return own
    others = np.setdiff1d(np.arange(every), own)
    return np.concatenate([own, others[np.linspace(0, len(others) - 1, missing).astype(int)]])


def _squared(x_nxI: np.ndarray) -> np.ndarray:
    blocks = (x_nxI[start : start + _BLOCK].astype(np.float64) for start in range(0, len(x_nxI), _BLOCK))
    return functools.reduce(operator.add, (block.T @ block for block in blocks))


def _paired(x_nxI: np.ndarray, own_nxI: np.ndarray) -> Moments:
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(x_nxI), _BLOCK)]
    return functools.reduce(
        operator.add, (compensation.paired_moments(x_nxI[block], own_nxI[block]) for block in blocks)
    )
