"""Slow, obvious references in NumPy float64; each follows the documented rule, none the library's code.

Matrices W are those of y = W x. Parameters are nested dicts of arrays named as in the library.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray


def float64(tree: Any) -> Any:
    """Copies a nested dict of arrays to NumPy float64."""
    if isinstance(tree, Mapping):
        return {name: float64(value) for name, value in tree.items()}
    return np.array(tree, np.float64)


def finite_difference(function: Callable[[], float], array: Array, index: tuple[int, ...], step: float = 1e-5) -> float:
    """Central difference of `function` as one element of `array`, which it reads, is moved."""
    kept = array[index]
    array[index] = kept + step
    above = function()
    array[index] = kept - step
    below = function()
    array[index] = kept
    return (above - below) / (2 * step)


# Rotations


def stage_pairs(dim: int, num_stages: int, order: str) -> list[list[tuple[int, int]]]:
    """Lists the channel pairs (i, j), i < j, of each stage, by rising i."""
    power, odd = 1, dim
    while odd % 2 == 0:
        power, odd = power * 2, odd // 2
    stages = []
    distances = []
    distance = dim // 2
    while distance >= odd and dim > odd:
        distances.append(distance if order == "descending" else dim // 2 // distance)
        if distance == odd:
            break
        distance //= 2
    for h in distances:
        stages.append([(i, i + h) for i in range(dim) if (i // h) % 2 == 0])
    bits = math.ceil(math.log2(odd))
    for bit in reversed(range(bits)) if order == "descending" else range(bits):
        pairs = []
        for position in range(odd):
            partner = position ^ (1 << bit)
            if position < partner < odd:
                for other in range(power):
                    if order == "descending":
                        pairs.append((other * odd + position, other * odd + partner))
                    else:
                        pairs.append((position * power + other, partner * power + other))
        stages.append(sorted(pairs))
    return stages[:num_stages]


def count_angles(dim: int, num_stages: int, order: str) -> int:
    return sum(len(pairs) for pairs in stage_pairs(dim, num_stages, order))


def rotation_matrix(dim: int, num_stages: int, order: str, angles: Array) -> Array:
    """Multiplies one Givens matrix a pair."""
    matrix = np.eye(dim)
    remaining = list(angles)
    for pairs in stage_pairs(dim, num_stages, order):
        for i, j in pairs:
            angle = remaining.pop(0)
            givens = np.eye(dim)
            givens[i, i] = givens[j, j] = math.cos(angle)
            givens[i, j] = -math.sin(angle)
            givens[j, i] = math.sin(angle)
            matrix = givens @ matrix
    assert not remaining
    return matrix


def stage_matrices(dim: int, num_stages: int, order: str, angles: Array) -> list[tuple[Array, Array, Array]]:
    """The matrix of each stage, and the first and second channels of its pairs."""
    stages, start = [], 0
    for pairs in stage_pairs(dim, num_stages, order):
        i, j = np.array(pairs).T
        angle = angles[start : start + len(pairs)]
        matrix = np.eye(dim)
        matrix[i, i] = matrix[j, j] = np.cos(angle)
        matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
        stages.append((matrix, i, j))
        start += len(pairs)
    assert start == len(angles)
    return stages


def rotate_back_propagated(
    x_RxD: Array, num_stages: int, order: str, angles: Array, inverse: bool
) -> tuple[Array, Callable[[Array], tuple[Array, Array]]]:
    """Rows turned by dense stages, and what gives from their cotangents those of the rows and of the angles."""
    stages = stage_matrices(x_RxD.shape[1], num_stages, order, angles)
    kept = []
    for matrix, _, _ in reversed(stages) if inverse else stages:
        kept.append(x_RxD)
        x_RxD = x_RxD @ (matrix if inverse else matrix.T)

    def pull(dy_RxD: Array) -> tuple[Array, Array]:
        d_angles = []
        for (matrix, i, j), x in zip(stages if inverse else stages[::-1], reversed(kept), strict=True):
            d_matrix = x.T @ dy_RxD if inverse else dy_RxD.T @ x
            cos, sin = matrix[i, i], matrix[j, i]
            d_angles.append(cos * (d_matrix[j, i] - d_matrix[i, j]) - sin * (d_matrix[i, i] + d_matrix[j, j]))
            dy_RxD = dy_RxD @ (matrix.T if inverse else matrix)
        return dy_RxD, np.concatenate([np.zeros(0), *(d_angles if inverse else d_angles[::-1])])

    return x_RxD, pull


# Ternary quantiser


def ternarise(w_IxO: Array, kind: str) -> tuple[Array, Array]:
    """Trits (inputs, outputs) and the scale of each output."""
    inputs, outputs = w_IxO.shape
    trits = np.zeros((inputs, outputs))
    scale_O = np.zeros(outputs)
    for o in range(outputs):
        members = [(i, o) for i in range(inputs)]
        if kind == "tensor":
            members = [(i, p) for i in range(inputs) for p in range(outputs)]
        scale_O[o] = max(sum(abs(w_IxO[member]) for member in members) / len(members), 1e-5)
        for i in range(inputs):
            trits[i, o] = min(max(round(w_IxO[i, o] / scale_O[o]), -1), 1)
    return trits, scale_O


def quantise(w_IxO: Array, kind: str) -> Array:
    trits, scale_O = ternarise(w_IxO, kind)
    return trits * scale_O[None, :]


# Routing and losses


def softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def route(logits_E: Array, top_k: int) -> tuple[list[int], list[float]]:
    """Experts of one token by falling logit, and their gates."""
    probs = softmax(logits_E)
    experts = sorted(range(len(logits_E)), key=lambda e: (-logits_E[e], e))[:top_k]
    total = 1.0 if top_k == 1 else sum(probs[e] for e in experts)
    return experts, [probs[e] / total for e in experts]


def cross_entropy(logits_BxC: Array, labels_B: Array, label_smoothing: float) -> Array:
    losses = []
    for logits, label in zip(logits_BxC, labels_B, strict=True):
        classes = len(logits)
        target = np.full(classes, label_smoothing / classes)
        target[label] += 1 - label_smoothing
        losses.append(-sum(target[c] * math.log(softmax(logits)[c]) for c in range(classes)))
    return np.array(losses)


def load_balance(probs_BxTxE: Array, experts_BxTxK: Array, weight_B: Array) -> float:
    num_experts = probs_BxTxE.shape[-1]
    share, mean, tokens = np.zeros(num_experts), np.zeros(num_experts), 0.0
    for b, weight in enumerate(weight_B):
        for t in range(probs_BxTxE.shape[1]):
            tokens += weight
            mean += weight * probs_BxTxE[b, t]
            for expert in experts_BxTxK[b, t]:
                share[expert] += weight
    return num_experts * float(np.dot(share / share.sum(), mean / tokens))


def router_z(logits_BxTxE: Array, weight_B: Array) -> float:
    total = sum(
        weight * math.log(np.exp(token).sum()) ** 2
        for weight, example in zip(weight_B, logits_BxTxE, strict=True)
        for token in example
    )
    return total / (sum(weight_B) * logits_BxTxE.shape[1])


def entropy(probs_BxTxE: Array, weight_B: Array) -> float:
    total = sum(
        -weight * p * math.log(p)
        for weight, example in zip(weight_B, probs_BxTxE, strict=True)
        for token in example
        for p in token
        if p > 0
    )
    return total / (sum(weight_B) * probs_BxTxE.shape[1])


def spatial_smoothness(probs_BxPxE: Array, grid: tuple[int, int], weight_B: Array) -> float:
    rows, columns = grid
    total, neighbours = 0.0, 0.0
    for weight, p in zip(weight_B, probs_BxPxE, strict=True):
        for row in range(rows):
            for column in range(columns):
                for other_row, other_column in ((row, column + 1), (row + 1, column)):
                    if other_row < rows and other_column < columns:
                        here, there = row * columns + column, other_row * columns + other_column
                        total += weight * sum((p[here] - p[there]) ** 2)
                        neighbours += weight
    return total / neighbours if neighbours else 0.0


class Report(NamedTuple):
    """The fields of `RouterReport`."""

    load_balance: float
    router_z: float
    smoothness: float
    assignments_E: Array
    entropy: float


def report(logits_BxTxE: Array, top_k: int, grid: tuple[int, int], weight_B: Array) -> Report:
    probs = np.array([[softmax(token) for token in example] for example in logits_BxTxE])
    experts = np.array([[route(token, top_k)[0] for token in example] for example in logits_BxTxE])
    assignments = np.zeros(logits_BxTxE.shape[-1])
    for weight, example in zip(weight_B, experts, strict=True):
        for expert in example.flatten():
            assignments[expert] += weight
    return Report(
        load_balance(probs, experts, weight_B),
        router_z(logits_BxTxE, weight_B),
        spatial_smoothness(probs[:, 1:], grid, weight_B),
        assignments,
        entropy(probs, weight_B),
    )


# Feed-forward layers, token by token


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_slope(x: Array) -> Array:
    tanh = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    inner = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * inner


def dense_mlp(params: Any, x_BxTxD: Array) -> Array:
    def token(x: Array) -> Array:
        h = gelu(params["up"]["kernel"].T @ x + params["up"]["bias"])
        return params["down"]["kernel"].T @ h + params["down"]["bias"]

    return _by_token(token, x_BxTxD)


def standard_moe(params: Any, x_BxTxD: Array, top_k: int) -> Array:
    def token(x: Array) -> Array:
        y = np.zeros_like(x)
        for expert, gate in zip(*route(params["router"]["kernel"].T @ x, top_k), strict=True):
            h = gelu(params["up_kernel"][expert].T @ x + params["up_bias"][expert])
            y += gate * (params["down_kernel"][expert].T @ h + params["down_bias"][expert])
        return y

    return _by_token(token, x_BxTxD)


def butterfly_moe(params: Any, x_BxTxD: Array, *, form: str, top_k: int, num_stages: int, order: str) -> Array:
    """The prototypes in `params` are taken as they are, so quantise them first.

    separate: W_i = B(phi_i) W_q B(theta_i)^T, up and down; tied: down is W_i^T; reference: B(theta_i) W_q B(phi_i).
    A rotation without angles is left out.
    """

    def rotation(name: str, expert: int, dim: int) -> Array:
        if name not in params:
            return np.eye(dim)
        return rotation_matrix(dim, min(num_stages, math.ceil(math.log2(dim))), order, params[name][expert])

    def rotated(prefix: str, expert: int) -> Array:
        w_q = params[f"{prefix}prototype"].T
        outputs, inputs = w_q.shape
        theta, phi = f"{prefix}theta_angles", f"{prefix}phi_angles"
        if form == "reference":
            return rotation(theta, expert, outputs) @ w_q @ rotation(phi, expert, inputs)
        return rotation(phi, expert, outputs) @ w_q @ rotation(theta, expert, inputs).T

    experts = range(params["router"]["kernel"].shape[1])
    if form == "separate":
        up, down = [rotated("up_", e) for e in experts], [rotated("down_", e) for e in experts]
    else:
        up = [rotated("", e) for e in experts]
        down = [w.T for w in up]

    def token(x: Array) -> Array:
        chosen = list(zip(*route(params["router"]["kernel"].T @ x, top_k), strict=True))
        if form == "reference":
            h = sum(gate * (up[e] @ x) for e, gate in chosen)
            return params["projection"]["kernel"].T @ h + params["projection"]["bias"]
        return sum(gate * (down[e] @ gelu(up[e] @ x + params["up_bias"]) + params["down_bias"]) for e, gate in chosen)

    return _by_token(token, x_BxTxD)


def low_rank_moe(params: Any, x_BxTxD: Array, top_k: int) -> Array:
    """Every expert's own dense matrices W_i = W + U_i V_i, token by token."""

    def matrix(side: str, expert: int) -> Array:
        return params[f"{side}_kernel"] + params[f"{side}_left"][expert] @ params[f"{side}_right"][expert]

    def token(x: Array) -> Array:
        y = np.zeros_like(x)
        for expert, gate in zip(*route(params["router"]["kernel"].T @ x, top_k), strict=True):
            h = gelu(matrix("up", expert).T @ x + params["up_bias"])
            y += gate * (matrix("down", expert).T @ h + params["down_bias"])
        return y

    return _by_token(token, x_BxTxD)


class Side(NamedTuple):
    """One of the four rotations of a rotated FFN: the name of its angles, depth, order, and whether it turns back."""

    name: str
    num_stages: int
    order: str
    inverse: bool


def rotated_ffn(
    sides: list[Side], x_TxD: Array, expert_TxK: Array, angles: dict[str, Array], weights: list[Array], dy_TxKxD: Array
) -> tuple[Array, Array, dict[str, Array], list[Array]]:
    """Outputs (T, K, D) of each token's experts, and gradients of tokens, angles (E, A) and weights.

    Weights are up (D, F) and down (F, D), to be multiplied from the right, and their biases: up, bias, down, bias.
    """
    up, up_bias, down, down_bias = weights
    y_TxKxD, dx_TxD = np.zeros_like(dy_TxKxD), np.zeros_like(x_TxD)
    d_angles = {name: np.zeros_like(table) for name, table in angles.items()}
    d_weights = [np.zeros_like(array) for array in weights]
    for expert in sorted(set(expert_TxK.flatten().tolist())):
        token, choice = np.nonzero(expert_TxK == expert)

        def turn(side: Side, x: Array, expert: int = expert) -> tuple[Array, Callable[[Array], Array]]:
            _, num_stages, order, inverse = side
            y, pull = rotate_back_propagated(x, num_stages, order, angles[side.name][expert], inverse)

            def pull_rows(d_outputs: Array) -> Array:
                d_inputs, d = pull(d_outputs)
                d_angles[side.name][expert] += d
                return d_inputs

            return y, pull_rows

        u, pull_u = turn(sides[0], x_TxD[token])
        h, pull_h = turn(sides[1], u @ up)
        v, pull_v = turn(sides[2], gelu(h + up_bias))
        y, pull_y = turn(sides[3], v @ down)
        y_TxKxD[token, choice] = y + down_bias
        dy = dy_TxKxD[token, choice]
        dz = pull_y(dy)
        dh = pull_v(dz @ down.T) * gelu_slope(h + up_bias)
        dg = pull_h(dh)
        np.add.at(dx_TxD, token, pull_u(dg @ up.T))
        for total, part in zip(d_weights, (u.T @ dg, dh.sum(axis=0), v.T @ dz, dy.sum(axis=0)), strict=True):
            total += part
    return y_TxKxD, dx_TxD, d_angles, d_weights


def rotated_product(
    sides: tuple[Side, Side],
    x_RxD: Array,
    expert_R: Array,
    angles: dict[str, Array],
    weights: list[Array],
    dy_RxO: Array,
) -> tuple[Array, Array, dict[str, Array], list[Array]]:
    """Outputs (R, O) of y = B_after(B_before(x) W) + b by the rotations of each row's expert, and gradients.

    Weights are W (D, O), to be multiplied from the right, and b.
    """
    before, after = sides
    y_RxO, dx_RxD = np.zeros_like(dy_RxO), np.zeros_like(x_RxD)
    d_angles = {name: np.zeros_like(table) for name, table in angles.items()}
    d_weights = [np.zeros_like(array) for array in weights]
    for expert in sorted(set(expert_R.tolist())):
        own = expert_R == expert
        u, pull_u = rotate_back_propagated(x_RxD[own], *before[1:3], angles[before.name][expert], before.inverse)
        y, pull_y = rotate_back_propagated(u @ weights[0], *after[1:3], angles[after.name][expert], after.inverse)
        y_RxO[own] = y + weights[1]
        dh, d_after = pull_y(dy_RxO[own])
        dx_RxD[own], d_before = pull_u(dh @ weights[0].T)
        d_angles[before.name][expert] += d_before
        d_angles[after.name][expert] += d_after
        d_weights[0] += u.T @ dh
        d_weights[1] += dy_RxO[own].sum(axis=0)
    return y_RxO, dx_RxD, d_angles, d_weights


def _by_token(function: Callable[[Array], Array], x_BxTxD: Array) -> Array:
    return np.array([[function(token) for token in example] for example in x_BxTxD])


# Packed numbers


GROUPS = {16: (1, 2), 8: (1, 1), 6: (4, 3), 4: (2, 1), 2: (4, 1)}  # bits: (codes, bytes) of a group


def pack_trits(trits: list[int]) -> list[int]:
    """Bytes of trits, five a byte, the first one lowest; the last byte is filled up with the digit 0."""
    digits = [trit + 1 for trit in trits]
    return [sum(digit * 3**place for place, digit in enumerate(digits[i : i + 5])) for i in range(0, len(digits), 5)]


def pack_codes(codes: list[int], bits: int) -> list[int]:
    """Bytes of codes, the first one in the lowest bits; the last group is filled up with zeros."""
    count, width = GROUPS[bits]
    packed: list[int] = []
    for start in range(0, len(codes), count):
        word = sum(code << (bits * place) for place, code in enumerate(codes[start : start + count]))
        packed += word.to_bytes(width, "little")
    return packed


def on_circle(difference: Array) -> Array:
    """The same angle between -pi and pi."""
    return np.angle(np.exp(1j * np.asarray(difference, np.float64)))


def round_angle(angle: float, bits: int) -> float:
    """The nearest of 2^bits steps of the circle, from -pi to under pi; 32 bits change nothing."""
    if bits == 32:
        return angle
    step = 2 * math.pi / 2**bits
    return step * ((round(angle / step) + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1))


def round_angles(angles: Array, bits: int) -> Array:
    return np.array([round_angle(float(angle), bits) for angle in angles.reshape(-1)]).reshape(angles.shape)


# Number formats


def bfloat16(value: float) -> float:
    """The nearest number with 8 significant bits, halves to even."""
    if value == 0:
        return 0.0
    fraction, exponent = math.frexp(value)  # 0.5 <= |fraction| < 1
    return math.ldexp(round(fraction * 2**8), exponent - 8)


def integers(w_IxO: Array, precision: str) -> tuple[Array, Array]:
    """The integers (inputs, outputs) of a packed precision and the scale of each output."""
    if precision == "ternary":
        return ternarise(w_IxO, "row")
    inputs, outputs = w_IxO.shape
    integers, scale_O = np.zeros((inputs, outputs)), np.zeros(outputs)
    top = {"int8": 127, "int4": 7, "int2": 2}[precision]
    for o in range(outputs):
        scale_O[o] = max(*(abs(w_IxO[i, o]) for i in range(inputs)), 1e-5) / top
        for i in range(inputs):
            ratio = w_IxO[i, o] / scale_O[o]
            if precision == "int2":
                integers[i, o] = min(max(math.floor(ratio), -2), 1)
            else:
                integers[i, o] = min(max(round(ratio), -top), top)
    return integers, scale_O


def round_matrix(w_IxO: Array, precision: str, kind: str = "row") -> Array:
    """A matrix as stored in a precision; `kind` is that of ternary scales."""
    if precision == "float32":
        return w_IxO
    if precision == "bfloat16":
        return np.array([[bfloat16(value) for value in row] for row in w_IxO])
    if precision == "ternary":
        return quantise(w_IxO, kind)
    levels, scale_O = integers(w_IxO, precision)
    return (levels + 0.5 if precision == "int2" else levels) * scale_O[None, :]


def round_matrices(w: Array, precision: str, kind: str = "row") -> Array:
    """Matrices (..., inputs, outputs), one by one."""
    if w.ndim == 2:
        return round_matrix(w, precision, kind)
    return np.array([round_matrices(part, precision, kind) for part in w])
