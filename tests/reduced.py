"""Models with reduced parameters, for tests: what each reduction says is made of parameters drawn at random."""

import dataclasses
import itertools
from typing import Any

import numpy as np

from bvit_jax import components, encoding, storage
from bvit_jax.model_config import ModelConfig
from bvit_jax.precision import is_packed
from bvit_jax.reductions import OF_EXPERTS, Reductions
from bvit_jax.storage import Storage
from tests.conftest import make_config

# One patch; matrices of 4 x 4, 4 x 6 and 6 x 4 alone, so that few programs are compiled.
SMALL = {"d_model": 4, "d_ff": 6, "num_heads": 2, "patch_size": 8, "num_experts": 3, "num_stages": 2, "num_layers": 2}
SMALL |= {"top_k": 2, "rank": 1}
FAMILIES = {
    "dense": ("dense", "separate"),
    "standard": ("standard", "separate"),
    "ternary": ("ternary", "separate"),
    "butterfly": ("butterfly", "reference"),  # it has a kernel beside its prototype
    "low_rank": ("low_rank", "separate"),
}
FORMATS: tuple[Any, ...] = ("float32", "bfloat16", "int8", "int4", "int2")
# Integers are not pruned, and only experts that are stored are merged.
CASES = [
    *(("factored", family, name) for family in FAMILIES for name in FORMATS),
    *(("pruned", family, name) for family in FAMILIES for name in FORMATS[:2]),
    *(("merged", family, name) for family in ("standard", "ternary") for name in FORMATS),
]
GROUPS = ((0, 1, 0), (0, 1, 1))
FFN = "segment_0/block_0/ffn"


def config_of(family: str) -> Any:
    kind, form = FAMILIES[family]
    fields = SMALL | {"family": kind, "form": form}
    return make_config("butterfly,3", **{f"model__{name}": value for name, value in fields.items()})


def matrices(path: str, leaf: np.ndarray) -> np.ndarray:
    """Returns the matrices of a kernel, (n, I, O); heads count as channels."""
    if path.endswith(("query/kernel", "key/kernel", "value/kernel")):
        return leaf.reshape(len(leaf), leaf.shape[1], -1)
    if path.endswith("attention/out/kernel"):
        return leaf.reshape(len(leaf), -1, leaf.shape[-1])
    return leaf.reshape(-1, *leaf.shape[-2:])


def reduced(model: ModelConfig, kind: str, name: Any) -> tuple[dict[str, np.ndarray], Storage]:
    """Draws parameters by path that are reduced, and says how; `name` is the format of experts and backbone."""
    rng = np.random.default_rng(0)
    leaves = {
        path: np.asarray(rng.normal(size=shape) / 3 + path.endswith("norm/scale"), np.float32)
        for path, shape in storage.param_shapes(model)
    }
    stored_as = Storage(experts=name, backbone=name, ends="float32")
    encodings = {each.path: each.encoding for each in storage.layout(model, stored_as)}
    kernels = [path for path in leaves if path.startswith("segment_") and path.endswith("kernel")]
    kernels = [path for path in kernels if components.component_of(path) != "router"]
    if kind == "factored":
        found = Reductions(ranks=tuple((path, _factored(path, leaves)) for path in kernels))
    elif kind == "pruned":
        floats = [path for path in kernels if encodings[path] in ("float32", "bfloat16")]
        shares = itertools.cycle((0.5, 1.0, 0.0))
        found = Reductions(kept=tuple((path, _pruned(path, leaves, next(shares), rng)) for path in floats))
    else:
        found = Reductions(groups=((FFN, GROUPS),))
        for path in (f"{FFN}/{each}" for each in OF_EXPERTS):
            leaves[path] = np.stack(
                [
                    layer[[groups.index(group) for group in groups]]
                    for layer, groups in zip(leaves[path], GROUPS, strict=True)
                ]
            )
    assert found != Reductions()
    assert kind != "pruned" or not any(is_packed(encodings[path]) for path, _ in found.kept)
    return leaves, dataclasses.replace(stored_as, reductions=found)


def _factored(path: str, leaves: dict[str, np.ndarray]) -> tuple[int, ...]:
    """Leaves the kernel's matrices ranks 1, all, 0, 1 ... and returns them."""
    found = matrices(path, leaves[path]).astype(np.float64)
    ranks = tuple(rank for rank, _ in zip(itertools.cycle((1, 4, 0)), found, strict=False))
    truncated = []
    for w_IxO, rank in zip(found, ranks, strict=True):
        left, values, right = np.linalg.svd(w_IxO, full_matrices=False)
        truncated.append(w_IxO if rank == 4 else left[:, :rank] * values[:rank] @ right[:rank])
    leaves[path] = np.stack(truncated).reshape(leaves[path].shape).astype(np.float32)
    return ranks


def _pruned(path: str, leaves: dict[str, np.ndarray], share: float, rng: np.random.Generator) -> int:
    kept = rng.permutation(leaves[path].size).reshape(leaves[path].shape) < share * leaves[path].size
    leaves[path] = leaves[path] * kept
    return int(kept.sum())


def tree_of(leaves: dict[str, np.ndarray]) -> Any:
    return encoding.nest(iter(leaves.items()))
