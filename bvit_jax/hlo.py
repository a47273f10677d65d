"""What a compiled TPU program costs one chip: matrix products, HBM traffic, collectives, loops counted as they run.

`read` takes an optimised and scheduled XLA program, the text of `jax.jit(f).lower(...).compile()`; XLA's own
`cost_analysis()` counts the body of a loop once. Nothing is measured, and no time is estimated.

- **Loops** whose counter goes from a constant in constant steps up to a constant (LT), as in `jax.lax.scan` and XLA's
  windowed products, run so often; others are open and count once. Of branches, each figure is the largest.
- **Matrix products** are convolutions (most products on TPUs), dots, and two kernels of XLA's own; places of a window
  on padding or dilation do not count. Pallas kernels count with the estimate that they bring, other custom calls none.
- **HBM traffic** is what instructions read and write there, padding of tiles included: fusions their operands and
  results once, slices what they yield, updates in place what they replace; prefetches to VMEM count on the HBM side.
- **Collectives** that run beside several fusions stand in each of them and count where they start. An all-reduce fused
  with its slicing (`all-reduce-scatter`) is a reduce-scatter.
"""

import dataclasses
import math
import re
from collections import Counter

_COLLECTIVE = re.compile("all-(reduce|gather|to-all)|reduce-scatter|ragged-all-to-all|collective-(permute|broadcast)")
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier", "partition-id"),
    *("replica-id", "after-all", "add-dependency", "AllocateBuffer", "ConcatBitcast"),
)
_OP = re.compile(
    r"\s+((?:ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\(((?:[^()]|\([^()]*\))*)\).*?)(?:, backend_config=(.*))?$"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([\d,]*):?([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|condition|body|to_apply|\w+_computations?)=(\{[^}]*\}|%[^\s,]+)")
_SCOPE = r'op_name="([^"]*)"'
_PRODUCT_KERNEL = re.compile(r'(?:^[^=]*|op_name="[^"]*)(?:ragged-dot|online-softmax)')


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: such as "all-reduce".
        bytes: payload of one execution on a chip: operands or results, whichever are more, without padding.
        times: executions a run of the program.
        group: chips that take part together; 2 for a permutation.
        scope: where it comes from, the `op_name` of its metadata; "" if it has none.
    """

    kind: str
    bytes: int
    times: int
    group: int
    scope: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What one run of a program costs one chip.

    Attributes:
        collectives: those that move anything between chips.
        matmul_flops: operations of matrix products, 2 a multiply-add.
        hbm_bytes: read from and written to HBM.
        open_loops: loops in the text whose number of iterations it does not give.
    """

    collectives: tuple[Collective, ...] = ()
    matmul_flops: int = 0
    hbm_bytes: int = 0
    open_loops: int = 0

    def bytes_by_kind(self) -> dict[str, int]:
        """Returns the payload of all executions, by kind of collective."""
        totals: Counter[str] = Counter()
        for collective in self.collectives:
            totals[collective.kind] += collective.bytes * collective.times
        return dict(totals)


def read(text: str, rare: str = "", at_most: str = "") -> Program:
    """Reads what one run of a compiled program costs one chip.

    Args:
        text: the program.
        rare: scope (`jax.named_scope`) of exceptional cases, whose loops are taken not to run: one component of the
            name of a loop, bare or in the brackets of a transformation, `jvp(overflow)`; "" for none.
        at_most: likewise, how a scope begins that goes on with a number: how often its loops run at most, and are taken
            to run where the program does not give a number itself; "" for none. Loops within those are not in them.
    """
    chips = math.prod(_numbers(" ".join(re.findall(r", (?:num_partitions|replica_count)=\d+", text))))
    computations: dict[str, dict[str, _Op]] = {}  # those called before their callers, the entry last
    started: set[str] = set()  # channels of collectives that run beside fusions
    for line in text.replace("replica_groups={}", f"replica_groups=[1,{chips}]<=").splitlines():
        if header := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", line):
            computations[place := header[1]] = {}
        elif parts := _OP.match(line):
            computations[place][parts[2]] = op = _instruction(place, parts, computations)
            for part in op.called[0] if op.opcode == "fusion" else ():
                channel = _first(r"channel_id=(\d+)", part.text)
                if channel and any(other.opcode == "AsyncCollectiveStart" for other in op.called[0]):
                    started.add(channel)
                elif channel in started:
                    part.opcode = "continued"
    return _cost(list(computations[place].values()), 1, (rare, at_most))


@dataclasses.dataclass(frozen=True)
class _Array:
    """Dimensions of an array, its bytes without and with padding, and whether it lies in HBM."""

    dims: list[int]
    nbytes: int
    padded: int
    in_hbm: bool


@dataclasses.dataclass(eq=False)
class _Op:
    """An instruction: its opcode (of a custom call, the target), text, arrays, their bytes, neighbours, and the
    operations that a Pallas kernel says it takes.
    """

    opcode: str
    text: str
    results: list[_Array]
    padded: int
    operands: list["_Op"]
    called: list[list["_Op"]]
    estimate: int
    users: list[tuple["_Op", int]] = dataclasses.field(default_factory=list)


def _first(pattern: str, text: str) -> str:
    """Returns the group of a pattern's first match, "" if there is none."""
    found = re.search(pattern, text)
    return found[1] if found else ""


def _numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _instruction(place: str, parts: re.Match[str], computations: dict[str, dict[str, _Op]]) -> _Op:
    """Returns an instruction; the start of an asynchronous one stands for the whole of it."""
    line, _, type_, opcode, arguments, backend = parts.groups(default="")
    estimate = int(_first(r'"cost_estimate":\{"flops":"(\d+)"', backend) or 0)
    operands = [computations[place][name] for name in re.findall(r"%([^\s,()]+)", arguments)]
    called = [name for names in _CALLED.findall(line) for name in re.findall(r"%([^\s,{}]+)", names)]
    results = [_array(*array) for array in _ARRAY.findall(type_)]
    if opcode.endswith("-start"):
        opcode, count = opcode.removesuffix("-start"), sum(len(operand.results) for operand in operands)
        # Of a copy (results, operands, context), of an all-reduce the results, of others (operands, results, context).
        results = results[:count] if opcode in ("copy", "all-reduce") else results[count : 2 * count]
    if opcode == "all-reduce" and place.startswith("all-reduce-scatter"):
        opcode = "reduce-scatter"
    opcode = _first(r'custom_call_target="([^"]*)"', line) or opcode
    root_last = [sorted(computations[name].values(), key=lambda op: op.text.startswith("ROOT")) for name in called]
    op = _Op(opcode, line, results, sum(array.padded for array in results), operands, root_last, estimate)
    for position, operand in enumerate(operands):
        operand.users.append((op, position))
    return op


def _array(dtype: str, shape: str, order: str, layout: str) -> _Array:
    dims, tile = _numbers(shape), _numbers(_first(r"T\(([\d,]+)\)", layout))
    # From the slowest dimension to the fastest; the tile pads the fastest.
    sizes = [1] * len(tile) + [dims[dim] for dim in reversed(_numbers(order))] if tile else dims
    sizes = [-(-size // unit) * unit for size, unit in zip(sizes, [1] * len(dims) + tile, strict=True)]
    bits = 8 if dtype == "pred" else int(_first(r"(\d+)", dtype) or 0)
    nbytes, padded = (-(-bits * math.prod(lengths) // 8) for lengths in (dims, sizes))
    return _Array(dims, nbytes, padded, _first(r"S\((\d+)\)", layout) in ("", "0"))


def _cost(computation: list[_Op], times: int, scopes: tuple[str, str]) -> Program:
    """Returns what so many runs of a computation cost."""
    parts = [Program()]
    for op in computation:
        if op.opcode == "while":
            rare, at_most = scopes
            names = re.findall(r"[^/();]+", _first(_SCOPE, op.text))
            if rare not in names:
                trips = _trips(op)
                if trips is None and at_most:
                    trips = _bound(names, at_most)
                parts += [_cost(part, times * (1 if trips is None else trips), scopes) for part in op.called]
                parts.append(Program(open_loops=int(trips is None)))
        elif op.opcode == "conditional":
            branches = [vars(_cost(branch, times, scopes)).values() for branch in op.called]
            collectives, *figures = zip(*branches, strict=True)
            most = max(collectives, key=lambda branch: sum(one.bytes * one.times for one in branch))
            parts.append(Program(most, *map(max, figures)))
        elif op.opcode in ("call", "async"):
            parts.append(_cost(op.called[0], times, scopes))
        elif op.opcode == "fusion":
            parts.append(dataclasses.replace(_cost(op.called[0], times, scopes), hbm_bytes=times * _traffic(op)))
        else:
            parts.append(Program(_collective(op, times), times * _flops(op), times * _traffic(op)))
    collectives, *figures = zip(*(vars(part).values() for part in parts), strict=True)
    return Program(sum(collectives, ()), *map(sum, figures))


def _trips(loop: _Op) -> int | None:
    """Returns the number of iterations of a loop, None if it is open."""
    (test, after), before = (part[-1] for part in loop.called), loop.operands[0]
    if "direction=LT" not in test.text or not before.opcode == after.opcode == "tuple":
        return None
    counter, limit = map(_known, test.operands)
    if not counter.startswith("index="):
        return None
    place = _numbers(counter)[0]
    raised, start = _source(after.operands[place]), _known(before.operands[place])
    numbers = [limit, start, *(known for known in map(_known, raised.operands) if known != counter)]
    if raised.opcode != "add" or len(numbers) != 3 or not all(number.lstrip("-").isdigit() for number in numbers):
        return None
    return max(-((int(start) - int(limit)) // int(numbers[2])), 0)


def _bound(names: list[str], at_most: str) -> int | None:
    """Returns how often a loop runs at most, by the scopes between it and the loop that it is in, if any."""
    own = names[:-1] if names[-1:] == ["while"] else names
    inner = own[len(own) - own[::-1].index("while") :] if "while" in own else own
    bounds = [re.fullmatch(rf"{at_most}(\d+)", name) for name in inner]
    return next((int(bound[1]) for bound in bounds if bound), None)


def _source(op: _Op) -> _Op:
    """Returns the instruction that makes a value, behind copies of it."""
    return _source(op.operands[0]) if op.opcode in ("bitcast", "copy", "convert") else op


def _known(op: _Op) -> str:
    """Returns the digits of a constant, or which element of a loop's state a value is; "" for others."""
    return _first(r"((?<= constant\()-?\d+(?=\))|(?<=, )index=\d+)", _source(op).text)


def _collective(op: _Op, times: int) -> tuple[Collective, ...]:
    """Returns the collective that an instruction is, if it is one and moves anything."""
    if not _COLLECTIVE.fullmatch(op.opcode) or (group := _group(op)) < 2:
        return ()
    # The second operand of a ragged one is the buffer that it fills.
    operands = op.operands[:1] if op.opcode == "ragged-all-to-all" else op.operands
    sent = sum(array.nbytes for operand in operands for array in operand.results)
    received = sum(array.nbytes for array in op.results)
    return (Collective(op.opcode, max(sent, received), times, group, _first(_SCOPE, op.text)),)


def _group(op: _Op) -> int:
    """Returns how many chips take part in a collective together."""
    if op.opcode == "collective-permute":
        return 2 if re.search(r"\{(\d+),(?!\1\})", _first(r"source_target_pairs=(\{.*?\}\})", op.text)) else 1
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", op.text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # of an axis or of a part of it, 'a':(before)size
        return math.prod(int(size or sizes[axis]) for axis, size in axes)
    if shape := _first(r"replica_groups=\[([\d,]+)\]<=", op.text):
        return _numbers(shape)[-1]
    return max(len(_numbers(chips)) for chips in _first(r"replica_groups=\{(.*?)\}\}", op.text).split("}"))


def _flops(op: _Op) -> int:
    """Returns the operations of a matrix product, 0 for other instructions."""
    if op.opcode == "convolution":
        return _convolution_flops(op)
    if op.opcode == "dot":
        lhs, contracted = op.operands[0].results[0].dims, _numbers(_first(r"lhs_contracting_dims=\{(.*?)\}", op.text))
        return 2 * math.prod(op.results[0].dims) * math.prod(lhs[dim] for dim in contracted)
    if op.opcode == "tpu_custom_call" and _PRODUCT_KERNEL.search(op.text):
        # (..., M, K) x (..., K, N), or, summed over rows, (M, K) x (M, N) -> (E, K, N); first come vectors of indices.
        matrices = [array.dims for operand in op.operands for array in operand.results if len(array.dims) > 1]
        return 2 * math.prod(matrices[0]) * op.results[0].dims[-1] if matrices else 0
    return op.estimate


def _convolution_flops(op: _Op) -> int:
    (lhs, kernel), result = (operand.results[0].dims for operand in op.operands), op.results[0].dims
    lhs_labels, kernel_labels, labels = re.split("_|->", _first(r"dim_labels=([^\s,]+)", op.text))
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", _first(r"window=\{([^}]*)\}", op.text)))
    flops = 2 * result[labels.index("b")] * result[labels.index("f")] * kernel[kernel_labels.index("i")]
    for dim in range(len(result) - 2):
        entries = {key: int(values.split("x")[dim].split("_")[0]) for key, values in window.items()}
        stride, dilation, apart = (entries.get(key, 1) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        real = range(0, (lhs[lhs_labels.index(str(dim))] - 1) * dilation + 1, dilation)
        starts = [kernel_place * apart - entries.get("pad", 0) for kernel_place in range(entries["size"])]
        steps = range(0, result[labels.index(str(dim))] * stride, stride)
        flops *= sum(start + step in real for start in starts for step in steps)
    return flops


def _traffic(op: _Op) -> int:
    """Returns the bytes that an instruction reads from HBM and writes there."""
    if op.opcode in _FREE or op.opcode.endswith(("-done", "-update")):
        return 0
    stored = [sum(array.padded for array in operand.results if array.in_hbm) for operand in op.operands]
    read_ = sum(min(size, _touched(op, position)) for position, size in enumerate(stored))
    return read_ + sum(size for array, size in zip(op.results, _written(op), strict=True) if array.in_hbm)


def _touched(op: _Op, position: int) -> int:
    """Returns the bytes that an instruction reads of one of its operands."""
    updated = {"dynamic-update-slice": 1, "scatter": len(op.results)}.get(op.opcode, 0)
    if position < updated or op.opcode in ("tuple", "continued", "AsyncCollectiveDone"):
        return 0
    if position == 0 and op.opcode in ("slice", "dynamic-slice", "gather"):
        return op.padded
    if op.opcode == "fusion" or (op.opcode == "bitcast" and op.users):
        inside = [part for part in op.called[0] if f" parameter({position})" in part.text] if op.called else [op]
        return sum(_touched(*use) for use in inside[0].users)
    return op.operands[position].padded


def _written(op: _Op) -> list[int]:
    """Returns the bytes that an instruction writes of each result; what is handed on within a fusion is not written."""
    if op.opcode in ("fusion", "bitcast"):
        return _written(op.called[0][-1] if op.called else op.operands[0])
    if op.opcode == "tuple":
        return [size for operand in op.operands for size in _written(operand)]
    if op.opcode in ("parameter", "continued", "AsyncCollectiveStart"):
        return [0] * len(op.results)
    updates = {"dynamic-update-slice": op.operands[1:2], "scatter": op.operands[-len(op.results) :]}
    return [array.padded for part in updates.get(op.opcode, [op]) for array in part.results]
