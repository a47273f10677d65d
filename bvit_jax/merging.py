"""Fewer experts from a stored mixture: those that do alike are grouped, and each group is averaged into one expert.

Groups come of agglomerative clustering with average linkage of what the experts put out for the same tokens, as in
HC-SMoE. Experts y_i and y_j, (tokens, D), are

    ||y_i - y_j||^2 / (||y_i||^2 + ||y_j||^2)

apart: 0 if equal, 1 if orthogonal, 2 if opposite, and 1 - cosine if of equal size. The cosine alone would call experts
alike that differ in size, which an average does not keep; the distance alone would call all small experts alike.

The hidden units of an expert can be in any order, so that those of a group are first brought into the order of its most
used expert, by the assignment that leaves the least squared distance between the weights of units (incoming, bias and
outgoing), as in M-SMoE. Experts are then averaged by how much they are used.

References:
    Chen et al., "Retraining-Free Merging of Sparse MoE via Hierarchical Clustering" (HC-SMoE), arXiv 2410.08589.
    Li et al., "Merge, Then Compress" (M-SMoE), arXiv 2310.01334.

Axes: E experts, M merged experts, N tokens, D d_model, F d_ff.
"""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import linear_sum_assignment

_SHAPES = {"up_kernel": "EDF", "up_bias": "EF", "down_kernel": "EFD", "down_bias": "ED"}
_HIDDEN_AXIS = {"up_kernel": 1, "up_bias": 0, "down_kernel": 0}
"""Axis of the hidden units in the parameters of one expert."""


def groups(outputs_ExNxD: np.ndarray, number: int) -> np.ndarray:
    """Returns which experts go together.

    Args:
        outputs_ExNxD: what each expert puts out for the same tokens, without gates (`moe.expert_outputs`, whose axes
            are in another order).
        number: of groups, from 1 to E.

    Returns:
        int64 (E,), group of each expert; groups are numbered from 0 in order of their first experts, so that with E of
        them each expert has its own number.

    Raises:
        ValueError: for outputs of another rank or not finite, or a number out of range.
    """
    if outputs_ExNxD.ndim != 3 or not len(outputs_ExNxD):
        raise ValueError(f"outputs have axes (experts, tokens, d_model); found shape {outputs_ExNxD.shape}")
    if not np.isfinite(outputs_ExNxD).all():
        raise ValueError("outputs of experts are finite; found nan or inf")
    experts = len(outputs_ExNxD)
    if not 1 <= number <= experts:
        raise ValueError(f"{experts} experts make from 1 to {experts} groups; found {number}")
    if number == experts:
        return np.arange(experts)
    from sklearn.cluster import AgglomerativeClustering  # slow to import, and few compressions merge

    clustering = AgglomerativeClustering(n_clusters=number, metric="precomputed", linkage="average")
    cluster_E = clustering.fit(_distances(outputs_ExNxD)).labels_
    _, first_M, sorted_E = np.unique(cluster_E, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first_M))[sorted_E]


def _distances(outputs_ExNxD: np.ndarray) -> np.ndarray:
    """Returns how far experts are apart, (E, E), 0 to 2."""
    flat = outputs_ExNxD.reshape(len(outputs_ExNxD), -1).astype(np.float64)
    gram_ExE = flat @ flat.T
    energy_ExE = gram_ExE.diagonal()[:, None] + gram_ExE.diagonal()[None, :]
    # Experts that put out nothing are all alike.
    return np.maximum(energy_ExE - 2 * gram_ExE, 0) / np.where(energy_ExE > 0, energy_ExE, 1)


def merged(params: Mapping[str, np.ndarray], group_E: np.ndarray, weight_E: np.ndarray) -> dict[str, np.ndarray]:
    """Merges the experts of each group into one; the router is left to the caller.

    Args:
        params: of stored experts: `up_kernel` (E, D, F), `up_bias` (E, F), `down_kernel` (E, F, D), `down_bias` (E, D).
        group_E: as `groups` returns it.
        weight_E: how much each expert is used, such as how many tokens it got; within a group in which none is used
            all count the same.

    Returns:
        The parameters of M experts, in the order of the groups and of the dtypes given. An expert alone in its group
        stays as it is, to the bit, and so do equal ones, whatever the order of their hidden units.

    Raises:
        ValueError: for parameters, groups or weights that do not fit.
    """
    _check(params, group_E, weight_E)
    by_group = [_merge(params, np.flatnonzero(group_E == group), weight_E) for group in range(group_E.max() + 1)]
    return {name: np.stack([one[name] for one in by_group]).astype(params[name].dtype) for name in _SHAPES}


def _merge(params: Mapping[str, np.ndarray], members: np.ndarray, weight_E: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the parameters of one merged expert, float64."""
    weights = weight_E[members].astype(np.float64)
    shares = weights / weights.sum() if weights.any() else np.full(len(members), 1 / len(members))
    most_used = members[shares.argmax()]
    onto = _expert(params, most_used)
    total = dict(onto)
    for member, share in zip(members, shares, strict=True):
        if member != most_used:
            aligned = _aligned(_expert(params, member), onto)
            # Differences are added up, as those of equal experts are exactly 0.
            total = {name: total[name] + share * (aligned[name] - onto[name]) for name in _SHAPES}
    return total


def _expert(params: Mapping[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    return {name: params[name][index].astype(np.float64) for name in _SHAPES}


def _aligned(expert: Mapping[str, np.ndarray], onto: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns an expert with its hidden units in the order of those of `onto` that they are closest to."""
    # Squared distances add up to a constant less twice the inner products.
    _, unit_F = linear_sum_assignment(_units(onto) @ _units(expert).T, maximize=True)
    return {**expert, **{name: expert[name].take(unit_F, axis) for name, axis in _HIDDEN_AXIS.items()}}


def _units(expert: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the weights of each hidden unit, (F, 2 D + 1)."""
    return np.concatenate([expert["up_kernel"].T, expert["up_bias"][:, None], expert["down_kernel"]], axis=1)


def _check(params: Mapping[str, np.ndarray], group_E: np.ndarray, weight_E: np.ndarray) -> None:
    if set(params) != set(_SHAPES):
        raise ValueError(f"stored experts have parameters {', '.join(_SHAPES)}; found {', '.join(sorted(params))}")
    if params["up_kernel"].ndim != 3 or not params["up_kernel"].size:
        raise ValueError(f"up_kernel has axes (experts, d_model, d_ff); found shape {params['up_kernel'].shape}")
    sizes = dict(zip("EDF", params["up_kernel"].shape, strict=True))
    for name, axes in _SHAPES.items():
        shape = tuple(sizes[axis] for axis in axes)
        if params[name].shape != shape:
            raise ValueError(
                f"{name} beside up_kernel {params['up_kernel'].shape} is {shape}; found {params[name].shape}"
            )
        if not np.isfinite(params[name]).all():
            raise ValueError(f"parameters are finite; found nan or inf in {name}")
    experts = sizes["E"]
    is_integer = np.issubdtype(group_E.dtype, np.integer)
    if group_E.shape != (experts,) or not is_integer or set(group_E) != set(range(group_E.max() + 1)):
        raise ValueError(f"groups of {experts} experts are ({experts},), numbered from 0 without gaps; found {group_E}")
    if weight_E.shape != (experts,) or not np.isfinite(weight_E).all() or (weight_E < 0).any():
        raise ValueError(f"weights of {experts} experts are ({experts},), finite and not negative; found {weight_E}")
