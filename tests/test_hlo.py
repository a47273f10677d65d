import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bvit_jax import hlo

# One tile, without padding: 8 x 128 floats, 4,096 bytes.
TILE = "f32[8,128]{1,0:T(8,128)}"
IN_VMEM = "f32[8,128]{1,0:T(8,128)S(1)}"
TABLE = "f32[80,128]{1,0:T(8,128)}"  # 10 tiles
SCALAR = "s32[]{:T(128)S(6)}"  # in neither memory


def computation(name, *ops):
    return "\n".join([f"%{name} (p: f32[]) -> f32[] {{", *(f"  {op}" for op in ops), "}", ""])


def program(*ops, called=(), chips=", num_partitions=8"):
    header = f"HloModule test, is_scheduled=true{chips}, frontend_attributes={{a=b}}\n\nFileNames\n1 file.py\n"
    return "\n".join([header, *called, "ENTRY " + computation("main", *ops)])


def read(*ops, called=(), **options):
    return hlo.read(program(*ops, called=called), **options)


def scoped(name):
    return f'metadata={{op_name="{name}" stack_frame_id=3}}, backend_config={{"calls=%none":["op_name=\\"no\\""]}}'


# Collectives.


def all_reduce(groups, array=TILE, name="r"):
    return f"%{name} = {array} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add, {scoped('f/sum')}"


ADD = computation("add", "%a = f32[] parameter(0)", "%b = f32[] parameter(1)", "ROOT %c = f32[] add(%a, %b)")
X = f"%x = {TILE} parameter(0)"


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{{0},{1,2,3}}", 3),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", 4),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", 8),
        ("mesh['a'=8] {'a':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_groups(groups, size):
    (found,) = read(X, all_reduce(groups), called=[ADD]).collectives
    assert found == hlo.Collective("all-reduce", 4096, 1, size, "f/sum")


@pytest.mark.parametrize("groups", ["{{0},{1}}", "[8,1]<=[8]", "mesh['axis_0'=8,'axis_1'=1] {'axis_1'}"])
def test_groups_of_one_move_nothing(groups):
    assert read(X, all_reduce(groups), called=[ADD]).collectives == ()


def test_all_chips_are_replicas_times_partitions():
    text = program(X, all_reduce("{}"), called=[ADD], chips=", replica_count=3, num_partitions=5")
    assert hlo.read(text).collectives[0].group == 15


@pytest.mark.parametrize(
    ("pairs", "count"), [("{{0,1},{1,0}}", 1), ("{{0,0},{1,2},{2,1}}", 1), ("{{0,0},{11,11}}", 0), ("{{1,11}}", 1)]
)
def test_permutations_that_stay_are_left_out(pairs, count):
    found = read(X, f"%p = {TILE} collective-permute(%x), channel_id=1, source_target_pairs={pairs}").collectives
    assert found == (hlo.Collective("collective-permute", 4096, 1, 2, ""),) * count


@pytest.mark.parametrize(
    ("result", "kind", "size"),
    [
        (TABLE, "all-gather", 40960),
        ("f32[2,128]{1,0:T(2,128)}", "reduce-scatter", 4096),
        (TILE, "all-to-all", 4096),
        (TILE, "collective-broadcast", 4096),
        # Without padding: 3 x 5 x 2 bytes are less than 4,096, 1,025 x 4 are more.
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", "reduce-scatter", 4096),
        ("f32[1025]{0:T(1024)}", "all-gather", 4100),
    ],
)
def test_payload_is_the_larger_side(result, kind, size):
    (found,) = read(X, f"%r = {result} {kind}(%x), channel_id=1, replica_groups={{{{0,1}}}}").collectives
    assert (found.kind, found.bytes, found.scope) == (kind, size, "")


def test_payload_of_a_ragged_exchange_is_without_the_buffer_that_it_fills():
    arrays = [X, f"%y = {TILE} parameter(1)", "%n = s32[2]{0:T(128)} parameter(2)"]
    op = f"%r = {TILE} ragged-all-to-all(%x, %y, %n, %n, %n, /*index=5*/%n), replica_groups={{{{0,1}}}}"
    assert read(*arrays, op).bytes_by_kind() == {"ragged-all-to-all": 4096}


def test_tuples_are_summed():
    # 4,096 + 5 x 4 + 7 x 1 + 3 x 2 bytes and 4 x 4 bits, twice a scalar of 4 bytes.
    kinds = [TILE, "f32[5]{0:T(128)}", "pred[7]{0:T(512)}", "bf16[3]{0:T(256)(128)(2,1)S(1)}"]
    kinds += ["s4[4]", "f32[]", "u32[]"]
    arrays = [f"%x{i} = {kind} parameter({i})" for i, kind in enumerate(kinds)]
    type_ = f"({', '.join(kinds[:5])}, /*index=5*/{', '.join(kinds[5:])})"
    op = f"%r = {type_} all-reduce(%x0, %x1, %x2, %x3, %x4, /*index=5*/%x5, %x6), replica_groups=[2,4]<=[8]"
    assert read(*arrays, op).bytes_by_kind() == {"all-reduce": 4096 + 20 + 7 + 6 + 2 + 8}


@pytest.mark.parametrize(
    ("kind", "type_", "size"),
    [
        ("all-reduce", f"({TILE}, {TILE})", 8192),
        ("all-gather", f"(({TILE}, {TILE}), ({TABLE}, {TABLE}))", 81920),
        ("collective-permute", f"(({TILE}, {TILE}), ({TILE}, {TILE}), u32[]{{:S(2)}}, u32[]{{:S(2)}})", 8192),
        ("reduce-scatter", f"(({TILE}, {TILE}), (f32[4,128], f32[4,128]), u32[])", 8192),
    ],
)
def test_starts_hold_operands_and_results(kind, type_, size):
    groups = "source_target_pairs={{0,1}}" if kind == "collective-permute" else "replica_groups={{0,1}}"
    start = f"%s = {type_} {kind}-start(%x, %y), channel_id=1, {groups}"
    found = read(X, f"%y = {TILE} parameter(1)", start, f"%d = ({TILE}, {TILE}) {kind}-done(%s)")
    assert found.bytes_by_kind() == {kind: size}
    # Operands and results in HBM, once.
    result = {"all-gather": 81920, "reduce-scatter": 4096}.get(kind, 8192)
    assert found.hbm_bytes == 8192 + result


def test_single_start():
    start = f"%s = ({TILE}, {IN_VMEM}, u32[]{{:S(2)}}) collective-permute-start(%x), source_target_pairs={{{{0,1}}}}"
    found = read(X, start, f"%d = {IN_VMEM} collective-permute-done(%s)")
    assert (found.bytes_by_kind(), found.hbm_bytes) == ({"collective-permute": 4096}, 4096)


def test_wrapped_in_an_asynchronous_computation():
    wrapped = computation("wrapped", X, f"ROOT %r = {TILE} all-to-all(%x), replica_groups={{{{0,1}}}}")
    start = f"%s = (({TILE}), {TILE}, u32[]) async-start(%x), calls=%wrapped"
    ends = [f"%u = (({TILE}), {TILE}, u32[]) async-update(%s)", f"%d = {TILE} async-done(%u)"]
    found = read(X, start, *ends, called=[wrapped])
    assert (found.bytes_by_kind(), found.hbm_bytes) == ({"all-to-all": 4096}, 8192)


def test_fused_with_slicing_is_a_reduce_scatter():
    slicing = "ROOT %d = f32[4,128]{1,0:T(4,128)} dynamic-slice(%r, %i, %i), dynamic_slice_sizes={4,128}"
    fused = computation("all-reduce-scatter.1", X, f"%i = {SCALAR} constant(0)", all_reduce("{{0,1}}"), slicing)
    fusion = "%f = f32[4,128]{1,0:T(4,128)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1"
    found = read(X, fusion, called=[ADD, fused])
    assert found.bytes_by_kind() == {"reduce-scatter": 4096}
    assert found.hbm_bytes == 4096 + 2048


def overlapped(channel="7", space=""):
    """A gather that starts in one fusion, goes on beside a product in the next, and ends in a third."""
    part, whole = f"f32[8,128]{{1,0:T(8,128){space}}}", f"f32[16,128]{{1,0:T(8,128){space}}}"
    gather = f"{whole} all-gather(%p), channel_id={channel}, replica_groups={{{{0,1}}}}, dimensions={{0}}"
    p, w = f"%p = {part} parameter(0)", f"%w = {whole} parameter(1)"
    beside = [f"%a = {TILE} parameter(2)", f"%n = {TILE} negate(%a)"]
    start = f'ROOT %c = ({part}, {whole}) custom-call(%g), custom_call_target="AsyncCollectiveStart"'
    go_on = f"ROOT %t = ({TILE}, {part}, {whole}, {whole}) tuple(%n, %p, %w, %g)"
    end = f'ROOT %c = {whole} custom-call(%p, %w, %g), custom_call_target="AsyncCollectiveDone"'
    called = [
        computation("one", p, f"%g = {gather}", start),
        computation("two", p, w, *beside, f"%g = {gather}", go_on),
        computation("three", p, w, f"%g = {gather}", end),
    ]
    ops = [
        f"%q = {part} parameter(0)",
        f"%z = {TILE} parameter(1)",
        f"%s = ({part}, {whole}) fusion(%q), kind=kCustom, calls=%one",
        f"%s0 = {part} get-tuple-element(%s), index=0",
        f"%s1 = {whole} get-tuple-element(%s), index=1",
        f"%m = ({TILE}, {part}, {whole}, {whole}) fusion(%s0, %s1, %z), kind=kOutput, calls=%two",
        f"%m1 = {part} get-tuple-element(%m), index=1",
        f"%m2 = {whole} get-tuple-element(%m), index=2",
        f"%d = {whole} fusion(%m1, %m2), kind=kCustom, calls=%three",
    ]
    return ops, called


def test_overlapped_with_fusions_counts_once():
    ops, called = overlapped()
    found = read(*ops, called=called)
    assert found.bytes_by_kind() == {"all-gather": 8192}
    # The gather reads 4,096 and writes 8,192 bytes; beside it 4,096 are negated.
    assert found.hbm_bytes == 4096 + 8192 + 2 * 4096
    ops, called = overlapped(space="S(1)")
    assert read(*ops, called=called).hbm_bytes == 2 * 4096


def test_one_channel_does_not_make_one_collective():
    # XLA splits all-reduces of a tuple into several with its channel; so may one of them be overlapped.
    ops, called = overlapped(channel="1")
    apart = [X, all_reduce("{{0,1}}"), all_reduce("{{0,1}}", name="again")]
    found = read(*ops, *apart, called=[ADD, *called])
    assert found.bytes_by_kind() == {"all-gather": 8192, "all-reduce": 2 * 4096}
    parts = [computation(name, X, all_reduce("{{0,1}}"), f"ROOT %n = {TILE} negate(%r)") for name in ("one", "two")]
    fusions = [f"%f{name} = {TILE} fusion(%x), calls=%{name}" for name in ("one", "two")]
    found = read(X, all_reduce("{{0,1}}"), *fusions, called=[ADD, *parts])
    assert found.bytes_by_kind() == {"all-reduce": 3 * 4096}


def test_bytes_by_kind_sums_over_executions():
    collectives = (
        hlo.Collective("all-reduce", 10, 3, 2, ""),
        hlo.Collective("all-gather", 5, 1, 2, ""),
        hlo.Collective("all-reduce", 1, 7, 4, ""),
    )
    assert hlo.Program(collectives, 0, 0, 0).bytes_by_kind() == {"all-reduce": 37, "all-gather": 5}


# Loops. A product of 2 x 3 by 3 x 5 is 60 operations; state in neither memory, so that no loop moves bytes of its own.

COUNT = "s32[]{:S(6)}"
DOT = "%d = f32[2,5]{1,0:S(1)} dot(%l, %r), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
FACTORS = ["%l = f32[2,3]{1,0:S(1)} constant({...})", "%r = f32[3,5]{1,0:S(1)} constant({...})"]


def loop(name="w", start="0", step="1", limit="7", test="direction=LT", inner=(DOT,), scope="jit(f)/while", place=1):
    """Returns the computations of a loop and its instructions; the counter is one of two elements of the state."""
    state = f"({COUNT}, {COUNT})"
    element = f"%i = {COUNT} get-tuple-element(%p), index={place}"
    other = f"%o = {COUNT} get-tuple-element(%p), index={1 - place}"
    p = f"%p = {state} parameter(0)"
    order = "%o, %n" if place else "%n, %o"
    # The root is not the last instruction of a schedule.
    condition = [p, element, f"%k = {COUNT} constant({limit})", f"ROOT %c = pred[]{{:S(6)}} compare(%i, %k), {test}"]
    body = [p, element, other, f"%copy = {COUNT} copy(%i)", f"%k = {COUNT} constant({step})"]
    body += [f"%n = {COUNT} add(%k, %copy)", f"ROOT %t = {state} tuple({order})", *FACTORS, *inner]
    before = [f"%{name}0 = {COUNT} constant({start})", f"%{name}1 = {COUNT} copy(%{name}0)"]
    before += [f"%{name}x = {COUNT} constant(55)"]
    order = f"%{name}x, %{name}1" if place else f"%{name}1, %{name}x"
    calls = f"condition=%cond_{name}, body=%body_{name}, {scoped(scope)}"
    run = [*before, f"%{name}2 = {state} tuple({order})", f"%{name} = {state} while(%{name}2), {calls}"]
    return [computation(f"cond_{name}", *condition), computation(f"body_{name}", *body)], run


def looped(rare="", at_most="", **changes):
    called, run = loop(**changes)
    return read(*run, called=called, rare=rare, at_most=at_most)


@pytest.mark.parametrize(
    ("start", "step", "limit", "times"),
    [
        *[("0", "1", "7", 7), ("3", "1", "10", 7), ("2", "3", "20", 6), ("2", "3", "21", 7)],
        *[("-4", "2", "0", 2), ("9", "1", "7", 0)],
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_iterations(start, step, limit, times, place):
    found = looped(start=start, step=step, limit=limit, place=place)
    assert (found.matmul_flops, found.open_loops) == (60 * times, 0)


@pytest.mark.parametrize(
    "change",
    [{"test": "direction=NE"}, {"limit": "7.5"}, {"limit": "true"}, {"start": "0.5"}, {"step": "inf"}],
)
def test_open_loops_count_once(change):
    found = looped(**change)
    assert (found.matmul_flops, found.open_loops) == (60, 1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("%k = s32[]{:S(6)} constant(7)", "%k = s32[]{:S(6)} get-tuple-element(%p), index=0"),  # limit from the state
        ("compare(%i, %k)", "compare(%k, %i)"),
        ("%n = s32[]{:S(6)} add(", "%n = s32[]{:S(6)} multiply("),
        ("add(%k, %copy)", "add(%copy, %copy)"),
        ("add(%k, %copy)", "add(%k, %o)"),
        ("%w1 = s32[]{:S(6)} copy(%w0)", "%w1 = s32[]{:S(6)} parameter(0)"),
        ("%w2 = (s32[]{:S(6)}, s32[]{:S(6)}) tuple(%wx, %w1)", "%w2 = (s32[]{:S(6)}, s32[]{:S(6)}) parameter(0)"),
        ("ROOT %t = (s32[]{:S(6)}, s32[]{:S(6)}) tuple(", "ROOT %t = (s32[]{:S(6)}, s32[]{:S(6)}) custom-call("),
    ],
)
def test_loops_of_another_form_are_open(old, new):
    called, run = loop()
    text = program(*run, called=called)
    assert text.count(old) == 1
    found = hlo.read(text.replace(old, new))
    assert (found.matmul_flops, found.open_loops) == (60, 1)


def test_nested_loops_multiply():
    collective = f"%g = {TABLE} all-gather(%x), channel_id=1, replica_groups={{{{0,1}}}}"
    reading = f"%y = {IN_VMEM} negate(%x)"
    inner_called, inner = loop("v", limit="3", inner=(DOT, X, collective, reading))
    called, run = loop(limit="5", inner=(*inner, DOT))
    found = read(*run, called=[*inner_called, *called])
    assert found.matmul_flops == 5 * (3 * 60 + 60)
    assert [one.times for one in found.collectives] == [15]
    assert found.bytes_by_kind() == {"all-gather": 15 * 40960}
    assert found.hbm_bytes == 15 * (4096 + 40960 + 4096)
    # An open loop in a closed one: once in the text, run as often as the outer one.
    inner_called, inner = loop("v", test="direction=NE")
    called, run = loop(limit="5", inner=inner)
    found = read(*run, called=[*inner_called, *called])
    assert (found.matmul_flops, found.open_loops) == (5 * 60, 1)


def test_conditions_of_loops_count_too():
    called, run = loop(limit="5")
    called[0] = called[0].replace("  ROOT", "\n".join(f"  {op}" for op in (*FACTORS, DOT)) + "\n  ROOT", 1)
    assert read(*run, called=called).matmul_flops == 5 * 120


@pytest.mark.parametrize(
    ("scope", "is_rare"),
    [
        ("jit(f)/overflow/while", True),
        ("overflow/while", True),
        ("jit(f)/jvp(overflow)/while", True),
        ("jit(f)/transpose(jvp(overflow))/while", True),
        ("jit(f)/while/body/overflow/again/while", True),
        ("jit(f)/overflows/while", False),
        ("jit(f)/no_overflow/while", False),
        ("jit(f)/over/flow/while", False),
    ],
)
def test_loops_of_rare_cases_are_left_out(scope, is_rare):
    expected = (0, 0) if is_rare else (60, 1)
    inner = (DOT, f"%g = {TABLE} all-gather(%x), channel_id=1, replica_groups={{{{0,1}}}}")
    found = looped("overflow", test="direction=NE", scope=scope, inner=(X, *inner))
    assert (found.matmul_flops, found.open_loops) == expected
    assert len(found.collectives) == (not is_rare)
    assert looped("overflow", scope=scope, limit="5").matmul_flops == (0 if is_rare else 300)
    assert looped(scope=scope, limit="5").matmul_flops == 300


def test_name_of_rare_cases():
    called, run = loop(scope="jit(f)/spill/while")
    assert read(*run, called=called, rare="spill").matmul_flops == 0
    assert read(*run, called=called, rare="while").matmul_flops == 0
    assert read(*run, called=called, rare="spil").matmul_flops == 420


@pytest.mark.parametrize(
    ("scope", "times"),
    [
        *[("jit(f)/tiles_at_most_4/while", 4), ("tiles_at_most_13/while", 13), ("jit(f)/tiles_at_most_0/while", 0)],
        ("jit(f)/jvp(tiles_at_most_4)/while", 4),
        ("jit(f)/transpose(jvp(tiles_at_most_4))/while", 4),
        ("jit(f)/while/body/tiles_at_most_4/again/while", 4),
        *[("jit(f)/while", None), ("jit(f)/at_most_4/while", None), ("jit(f)/no_tiles_at_most_4/while", None)],
    ],
)
def test_open_loops_of_scopes_that_say_so_are_taken_to_run_at_most_so_often(scope, times):
    inner = (DOT, X, f"%g = {TABLE} all-gather(%x), channel_id=1, replica_groups={{{{0,1}}}}")
    found = looped(at_most="tiles_at_most_", test="direction=NE", scope=scope, inner=inner)
    runs = 1 if times is None else times
    assert (found.matmul_flops, found.open_loops) == (60 * runs, int(times is None))
    assert [one.times for one in found.collectives] == [runs]
    # What the program says itself counts, whatever the scope does; and nothing is read where nothing is asked for.
    closed = looped(at_most="tiles_at_most_", scope=scope)
    assert (closed.matmul_flops, closed.open_loops) == (60 * 7, 0)
    silent = looped(test="direction=NE", scope=scope)
    assert (silent.matmul_flops, silent.open_loops) == (60, 1)


def test_loops_of_scopes_that_say_how_often_multiply():
    inner_called, inner = loop("v", test="direction=NE", scope="jit(f)/while/body/tiles_at_most_3/while")
    called, run = loop(test="direction=NE", scope="jit(f)/tiles_at_most_5/while", inner=(*inner, DOT))
    found = read(*run, called=[*inner_called, *called], at_most="tiles_at_most_")
    assert (found.matmul_flops, found.open_loops) == (5 * (3 * 60 + 60), 0)
    # In a closed loop, and beside a rare case.
    called, run = loop(limit="5", inner=inner)
    found = read(*run, called=[*inner_called, *called], at_most="tiles_at_most_")
    assert (found.matmul_flops, found.open_loops) == (5 * 3 * 60, 0)
    assert read(*run, called=[*inner_called, *called], at_most="tiles_at_most_", rare="body").matmul_flops == 0


# Branches and calls.


def test_conditional_counts_the_largest_of_each_figure():
    gather = f"%g = {TABLE} all-gather(%x), channel_id=1, replica_groups={{{{0,1}}}}"
    inner_called, inner = loop("v", test="direction=NE", inner=())
    called = [
        *inner_called,
        computation("flops", *FACTORS, DOT, f"ROOT %p = {TILE} parameter(0)"),
        computation("bytes", X, f"ROOT %g = {TABLE} broadcast(%x), dimensions={{}}"),
        computation("moves", X, *FACTORS, DOT, gather.replace(TABLE, IN_VMEM)),
        computation("open", *inner),
    ]
    ops = [f"%i = {SCALAR} parameter(0)", X]
    branches = "branch_computations={%flops, %bytes, %moves, %open}"
    found = read(*ops, f"%c = {TABLE} conditional(%i, %x, %x, %x, %x), {branches}", called=called)
    assert (found.matmul_flops, found.hbm_bytes, found.open_loops) == (60, 4096 + 40960, 1)
    assert found.bytes_by_kind() == {"all-gather": 4096}
    branches = "true_computation=%flops, false_computation=%bytes"
    found = read(*ops, f"%c = {TABLE} conditional(%i, %x, %x), {branches}", called=called)
    assert (found.matmul_flops, found.hbm_bytes) == (60, 4096 + 40960)


def test_calls():
    called = [computation("f", *FACTORS, DOT, X, f"ROOT %n = {TILE} negate(%x)")]
    ops = [X, *(f"%c{i} = {TILE} call(%x), to_apply=%f" for i in range(2))]
    found = read(*ops, called=called)
    assert (found.matmul_flops, found.hbm_bytes) == (2 * 60, 2 * 8192)


def test_reducers_and_comparators_are_not_calls():
    ops = [X, f"%z = {IN_VMEM} constant(0)", "%s = f32[]{:S(6)} reduce(%x, %z), dimensions={0,1}, to_apply=%product"]
    assert read(*ops, called=[computation("product", *FACTORS, DOT)]).matmul_flops == 0


# Traffic.


@pytest.mark.parametrize(
    ("operand", "result", "expected"),
    [
        (TILE, TILE, 8192),
        (TILE, IN_VMEM, 4096),
        (IN_VMEM, TILE, 4096),
        (IN_VMEM, IN_VMEM, 0),
        ("f32[8,128]{1,0:T(8,128)S(0)}", "f32[8,128]{1,0:T(8,128)S(5)}", 4096),
        # Padding: the last two dimensions of the order to 8 x 128, alone to 128 or 1,024; none without a tile.
        ("f32[3,9,65]{2,1,0:T(8,128)}", IN_VMEM, 3 * 16 * 128 * 4),
        ("f32[3,9,65]{2,0,1:T(8,128)}", IN_VMEM, 9 * 8 * 128 * 4),
        ("f32[3,9,65]{0,1,2:T(4,128)}", IN_VMEM, 65 * 12 * 128 * 4),
        ("bf16[9,65]{1,0:T(8,128)(2,1)}", IN_VMEM, 16 * 128 * 2),
        ("f32[5]{0:T(128)}", IN_VMEM, 128 * 4),
        ("s32[]{:T(128)}", IN_VMEM, 128 * 4),
        ("s8[1025]{0:T(1024)(128)(4,1)}", IN_VMEM, 2048),
        ("pred[3,9]{1,0}", IN_VMEM, 27),
        ("f32[3,9]", IN_VMEM, 108),
        ("s4[64,128]{1,0:T(64,128)(8,1)E(4)}", IN_VMEM, 4096),
        ("token[]", IN_VMEM, 0),
        (f"({TILE}, {IN_VMEM}, {TABLE})", IN_VMEM, 4096 + 40960),
        (IN_VMEM, f"({TILE}, {IN_VMEM}, /*index=2*/{TABLE})", 4096 + 40960),
    ],
)
def test_memories_and_padding(operand, result, expected):
    assert read(f"%a = {operand} parameter(0)", f"%b = {result} frobnicate(%a)").hbm_bytes == expected


@pytest.mark.parametrize(
    "op",
    [
        f"%f = {TILE} get-tuple-element(%t), index=0",
        f"%f = ({TILE}, {TABLE}) tuple(%x, %t)",
        f"%f = {TILE} bitcast(%x)",
        f"%f = ({TILE}) optimization-barrier(%t)",
        f"%f = {TILE} constant({{...}})",
        f"%f = {TILE} add-dependency(%x, %t)",
        "%f = token[] after-all(%x)",
        "%f = u32[] partition-id()",
        "%f = u32[] replica-id()",
        f'%f = {TILE} custom-call(), custom_call_target="AllocateBuffer"',
        f'%f = {TILE} custom-call(%x, %x), custom_call_target="ConcatBitcast"',
        f"%f = {TILE} copy-done(%t)",
    ],
)
def test_free_instructions(op):
    assert read(X, f"%t = ({TILE}, {TABLE}) parameter(1)", op).hbm_bytes == 0


INDEX = f"%i = {SCALAR} parameter(2)"
T = f"%t = {TABLE} parameter(1)"
N = "%n = s32[8]{0:T(128)} parameter(3)"


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (f"%f = {TILE} slice(%t), slice={{[0:8], [0:128]}}", 8192),
        (f"%f = {TILE} dynamic-slice(%t, %i, %i), dynamic_slice_sizes={{8,128}}", 8192),
        (f"%f = {IN_VMEM} dynamic-slice(%t, %i, %i), dynamic_slice_sizes={{8,128}}", 4096),
        (f"%f = {TILE} gather(%t, %n), offset_dims={{1}}", 8192 + 512),  # and the indices
        (f"%f = {TABLE} gather(%x, %n), offset_dims={{1}}", 4096 + 40960 + 512),  # no more than there is
        (f"%f = {TABLE} dynamic-update-slice(%t, %x, %i, %i)", 8192),
        (f"%f = {TABLE} scatter(%t, %n, %x), to_apply=%add", 8192 + 512),
        (f"%f = ({TABLE}, {TABLE}) scatter(%t, %t, %n, %x, %x), to_apply=%add", 2 * 8192 + 512),
        (f"%f = ({IN_VMEM}, {TILE}, u32[]{{:S(2)}}) copy-start(%x)", 4096),  # to VMEM: result, operand, context
        (f"%f = ({TILE}, {TILE}, u32[]{{:S(2)}}) copy-start(%x)", 8192),
        (f"%f = ({TILE}, {IN_VMEM}, u32[]{{:S(2)}}) copy-start(%v)", 4096),  # from VMEM
        (f"%f = (({TABLE}), {IN_VMEM}, s32[]{{:S(2)}}) slice-start(%t), slice={{[0:8], [0:128]}}", 4096),
        (f'%f = {TILE} custom-call(%x, %v, %t), custom_call_target="tpu_custom_call"', 4096 + 40960 + 4096),
        (f"%f = {TABLE} all-gather(%x), replica_groups={{{{0,1}}}}", 4096 + 40960),
        (f"%f = {TILE} add(%x, %v)", 8192),
        (f"%f = {IN_VMEM} concatenate(%v, %v, %v, %v, %v, /*index=5*/%x), dimensions={{0}}", 4096),
    ],
)
def test_traffic(op, expected):
    assert read(X, T, INDEX, N, f"%v = {IN_VMEM} parameter(4)", op, called=[ADD]).hbm_bytes == expected


def fused(*ops, result=IN_VMEM, called=()):
    """Returns the traffic of a fusion of a tile and a table in HBM, with an index."""
    names = [X, T, INDEX]
    fusion = f"%f = {result} fusion(%x, %t, %i), kind=kLoop, calls=%fused"
    return read(*names, fusion, called=[*called, computation("fused", *names, *ops)]).hbm_bytes


CUT = f"%s = {TILE} dynamic-slice(%t, %i, %i), dynamic_slice_sizes={{8,128}}"


def test_fusions_read_operands_and_write_results():
    assert fused(f"%n = {TILE} negate(%x)", f"ROOT %m = {IN_VMEM} multiply(%n, %n)") == 4096  # the table is not used
    assert fused(f"ROOT %m = {TILE} multiply(%x, %x)", result=TILE) == 2 * 4096
    both = f"ROOT %b = ({TILE}, {TABLE}) tuple(%n, %m)"
    ops = (f"%n = {TILE} negate(%x)", f"%m = {TABLE} negate(%t)", both)
    assert fused(*ops, result=f"({TILE}, {TABLE})") == 2 * (4096 + 40960)
    assert fused(*ops, result=f"({IN_VMEM}, {TABLE})") == 4096 + 2 * 40960


def test_fusions_read_of_operands_the_slices_that_they_take():
    add = f"ROOT %a = {IN_VMEM} add(%x, %s)"
    assert fused(CUT, add) == 2 * 4096
    assert fused(f"%b = {TABLE} bitcast(%t)", CUT.replace("(%t", "(%b"), add) == 2 * 4096
    assert fused(CUT, CUT.replace("%s", "%r"), add.replace("%x", "%r")) == 2 * 4096  # two slices
    assert fused(f"%s = {TILE} slice(%t), slice={{[0:8], [0:128]}}", add) == 2 * 4096
    assert fused(f"%s = {TILE} gather(%t, %i), offset_dims={{1}}", add) == 2 * 4096
    # Whole if anything else uses it, or if it only tells where to cut; never more than whole.
    assert fused(CUT, f"%n = {TABLE} negate(%t)", add) == 4096 + 40960
    assert fused(f"%s = {TILE} gather(%x, %t), offset_dims={{1}}", add) == 4096 + 40960
    many = [CUT.replace("%s", f"%s{i}") for i in range(11)]
    assert fused(*many, add.replace("%s", "%s3")) == 4096 + 40960
    assert fused(f"ROOT %b = {TABLE} bitcast(%t)") == 40960


def test_fusions_in_fusions():
    inner = computation("inner", T.replace("(1)", "(0)"), INDEX.replace("(2)", "(1)"), CUT.replace("%s", "ROOT %s", 1))
    nested = f"%s = {TILE} fusion(%t, %i), kind=kLoop, calls=%inner"
    assert fused(nested, f"ROOT %a = {IN_VMEM} add(%x, %s)", called=[inner]) == 2 * 4096
    dot = computation("inner", *FACTORS, f"ROOT {DOT}")
    nested = "%s = f32[2,5] fusion(), kind=kLoop, calls=%inner"
    outer = computation("outer", nested, f"ROOT %n = {TILE} negate(%s)")
    assert read(f"%f = {IN_VMEM} fusion(), kind=kOutput, calls=%outer", called=[dot, outer]).matmul_flops == 60


def test_fusions_that_update_in_place():
    update = f"ROOT %u = {TABLE} dynamic-update-slice(%t, %x, %i, %i)"
    assert fused(update, result=TABLE) == 2 * 4096
    assert fused(update.replace("ROOT ", ""), f"ROOT %b = {TABLE} bitcast(%u)", result=TABLE) == 2 * 4096
    assert fused(f"ROOT %u = {TABLE} scatter(%t, %i, %x), to_apply=%add", result=TABLE, called=[ADD]) == 2 * 4096
    # One of two results; the buffer also read in part, as in a sum into it.
    both = (update.replace("ROOT ", ""), f"%n = {TILE} negate(%x)", f"ROOT %b = ({TABLE}, {TILE}) tuple(%u, %n)")
    assert fused(*both, result=f"({TABLE}, {TILE})") == 3 * 4096
    into = (CUT, f"%a = {TILE} add(%x, %s)", update.replace("%x", "%a"))
    assert fused(*into, result=TABLE) == 3 * 4096
    # Elsewhere than as the target it is read whole.
    assert fused(update.replace("%x", "%t"), result=TABLE) == 2 * 40960


# Products.


def convolution(lhs, kernel, result, window, labels, extra=""):
    arrays = [f"%a = f32[{lhs}] parameter(0)", f"%b = f32[{kernel}] parameter(1)"]
    window = f"window={{{window}}}, " if window else ""
    op = f"%c = f32[{result}] convolution(%a, %b), {window}dim_labels={labels}{extra}, {scoped('f/conv')}"
    return read(*arrays, op).matmul_flops


@pytest.mark.parametrize(
    ("lhs", "kernel", "result", "window", "labels", "products"),
    [
        # Plain products: M x K by K x N, also transposed.
        ("2,3", "3,5", "2,5", "", "bf_io->bf", 2 * 3 * 5),
        ("3,2", "5,3", "2,5", "", "fb_oi->bf", 2 * 3 * 5),
        # 7 batches of 2 x 3 by 3 x 5; 2 x 3 by 4 matrices of 3 x 5, all but one of them on padding at each place.
        ("7,2,3", "7,3,5", "7,2,5", "size=7 stride=6 lhs_dilate=7", "0bf_0io->0bf", 7 * 2 * 3 * 5),
        ("2,1,3", "3,4,5", "2,4,5", "size=4 pad=3_3 rhs_reversal=1", "b0f_i0o->b0f", 4 * 2 * 3 * 5),
        # Batches in two dimensions, as attention has them: 4 x 3 of 5 x 2 by 2 x 6.
        ("4,5,3,2", "4,6,3,2", "4,3,5,6", "size=4x3 stride=3x2 lhs_dilate=4x3", "0b1f_0o1i->01bf", 12 * 5 * 2 * 6),
        # 3 x 6 by 6 x 5, summed over 8 images: a gradient of weights.
        ("8,6,3", "8,6,5", "3,5,1", "size=8", "0fb_0io->bf0", 8 * 3 * 6 * 5),
    ],
)
def test_products_written_as_convolutions(lhs, kernel, result, window, labels, products):
    assert convolution(lhs, kernel, result, window, labels) == 2 * products


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("stride", "apart", "dilation"), list(itertools.product((1, 2), (1, 3), (1, 2))))
@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 2), (-1, 1), (3, 0)])
def test_windows_against_counting(size, stride, apart, dilation, low, high):
    # A first dimension of 6 with the window, a second of 5 with a window of 2; real elements are ones.
    spread = np.zeros(5 * dilation + 1, bool)
    spread[::dilation] = True
    padded = np.concatenate([np.zeros(max(low, 0), bool), spread[max(-low, 0) :], np.zeros(high, bool)])
    reach = (size - 1) * apart + 1
    outputs = (len(padded) - reach) // stride + 1
    valid = sum(padded[out * stride + k * apart] for out in range(outputs) for k in range(size))
    window = f"size={size}x2 stride={stride}x1 pad={low}_{high}x0_1 lhs_dilate={dilation}x1 rhs_dilate={apart}x1"
    flops = convolution("4,6,5,3", f"{size},2,3,7", f"4,{outputs},5,7", window, "b01f_01io->b01f")
    assert flops == 2 * 4 * 7 * 3 * valid * (5 + 4)


def test_groups_of_features_and_batches():
    # Of 6 input features each of 2 groups sees 3, which is what the kernel says; of 8 images each output takes 4.
    flops = 2 * 4 * 10 * 3 * (5 + 4)
    window, labels = "size=2 pad=0_1", "b0f_0io->b0f"
    assert convolution("4,5,6", "2,3,10", "4,5,10", window, labels, ", feature_group_count=2") == flops
    assert convolution("8,5,3", "2,3,10", "4,5,10", window, labels, ", batch_group_count=2") == flops


def test_dots():
    ops = ["%a = f32[7,2,3,4] parameter(0)", "%b = f32[7,3,4,5] parameter(1)"]
    dims = "lhs_batch_dims={0}, lhs_contracting_dims={2,3}, rhs_batch_dims={0}, rhs_contracting_dims={1,2}"
    assert read(*ops, f"%d = f32[7,2,5] dot(%a, %b), {dims}").matmul_flops == 2 * 7 * 2 * 5 * 12


METADATA = ["%n = s32[1] parameter(0)", "%g = s32[17]{0:T(128)S(1)} parameter(1)"]


@pytest.mark.parametrize(
    ("operands", "result", "flops"),
    [
        # 24 rows in 4 groups, 3 features to 5; the gradients of rows and of weights.
        (("bf16[24,3]", "bf16[4,3,5]"), "bf16[24,5]", 2 * 24 * 3 * 5),
        (("bf16[24,5]", "bf16[4,5,3]"), "bf16[24,3]", 2 * 24 * 3 * 5),
        (("bf16[24,3]", "bf16[24,5]"), "bf16[4,3,5]", 2 * 24 * 3 * 5),
    ],
)
def test_ragged_dots(operands, result, flops):
    arrays = [f"%{name} = {kind} parameter({i})" for i, (name, kind) in enumerate(zip("ab", operands, strict=True), 2)]
    call = 'custom-call(%n, %g, %n, %a, %b), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[1]}'
    by_name = f"%ragged-dot-none.1 = {result} {call}, {scoped('f/other')}"
    by_scope = f"%c = {result} {call}, {scoped('jit(f)/ragged_dot_general/ragged-dot-none')}"
    other = f"%c = {result} {call}, {scoped('jit(f)/ragged_dot')}"
    for op, expected in ((by_name, flops), (by_scope, flops), (other, 0), (by_name.replace("tpu_custom", "a"), 0)):
        assert read(*METADATA, *arrays, op).matmul_flops == expected
    # Another kernel does not become one by what it reads.
    reader = f'%k = {result} custom-call(%ragged-dot-none.1), custom_call_target="tpu_custom_call"'
    assert read(*METADATA, *arrays, by_name, reader).matmul_flops == flops


def test_metadata_of_ragged_dots_are_no_products():
    call = "(s32[17], s32[1]) custom-call(%n)"
    op = f'%ragged-dot-metadata = {call}, custom_call_target="tpu_custom_call", {scoped("ragged-dot-metadata")}'
    assert read(*METADATA, op).matmul_flops == 0


def test_products_of_the_softmax_kernel():
    arrays = ["%s = f32[2,8,16,32] parameter(0)", "%v = f32[2,8,32,4] parameter(1)"]
    op = '%online-softmax.1 = f32[2,8,16,4] custom-call(%s, %v), custom_call_target="tpu_custom_call"'
    assert read(*arrays, op).matmul_flops == 2 * 2 * 8 * 16 * 32 * 4


# Real programs, for chips that need not be there.

ROWS, COLUMNS = 64, 256
PIECE = ROWS * COLUMNS * 4  # bytes of one chip's part


def make_mesh(chips=4):
    for name, value in {
        **{"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"},
        **{"TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
    }.items():
        os.environ.setdefault(name, value)
    topology = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu")
    return Mesh(np.array(topology.devices[:chips]), ("data",))


def shape(mesh, dims, spec=None, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec or PartitionSpec()))


def compiled(function, *shapes, **options):
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)  # without a TPU a program in the cache could not be read back
    try:
        return jax.jit(function, **options).lower(*shapes).compile()
    finally:
        jax.config.update(name, before)


RING = [(chip, (chip + 1) % 4) for chip in range(4)]
OPERATIONS = {
    "all-reduce": (lambda x: jax.lax.psum(x, "data"), PIECE),
    "all-gather": (lambda x: jax.lax.all_gather(x, "data", tiled=True), 4 * PIECE),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "data", tiled=True), PIECE),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True), PIECE),
    "collective-permute": (lambda x: jax.lax.ppermute(x, "data", RING), PIECE),
}


@pytest.mark.parametrize("kind", OPERATIONS)
@pytest.mark.parametrize("length", [0, 5])
def test_collectives_of_real_programs(kind, length):
    operation, size = OPERATIONS[kind]
    mesh = make_mesh()

    def step(x, _):
        moved = operation(jnp.sin(x))
        return jnp.resize(moved, x.shape) if moved.shape != x.shape else moved, None

    def function(x):
        return jax.lax.scan(step, x, length=length)[0] if length else operation(jnp.sin(x))

    spec = PartitionSpec("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    found = hlo.read(compiled(mapped, shape(mesh, (4 * ROWS, COLUMNS), spec)).as_text())
    assert found.bytes_by_kind() == {kind: size * max(length, 1)}
    (collective,) = found.collectives
    assert (collective.times, collective.group) == (max(length, 1), 2 if kind == "collective-permute" else 4)
    assert collective.scope.startswith("jit(function)/shard_map/")
    assert found.open_loops == 0


def mean_of_layers(weights, x):
    """A loop over layers; the gradient with respect to x of the first one is not left out of it."""
    return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0] ** 2).mean()


@pytest.mark.parametrize("layers", [3, 8])
def test_layers_of_a_real_step(layers):
    mesh = make_mesh()
    width, rows = 256, 512
    shapes = shape(mesh, (layers, width, width)), shape(mesh, (4 * rows, width), PartitionSpec("data"))
    whole = NamedSharding(mesh, PartitionSpec())
    found = hlo.read(compiled(jax.value_and_grad(mean_of_layers), *shapes, out_shardings=whole).as_text())
    # Forward, and for the gradients of weights and inputs; then gradients and the loss are summed over chips.
    assert found.matmul_flops == layers * 3 * 2 * rows * width * width
    assert found.bytes_by_kind() == {"all-reduce": layers * width * width * 4 + 4}
    assert found.open_loops == 0


def test_real_ragged_dot():
    mesh = make_mesh(1)
    shapes = [shape(mesh, dims) for dims in ((512, 128), (4, 128, 256))]
    text = compiled(jax.lax.ragged_dot, *shapes, shape(mesh, (4,), dtype=jnp.int32)).as_text()
    assert hlo.read(text).matmul_flops == 2 * 512 * 128 * 256


@pytest.mark.parametrize("name", ["overflow", "other"])
def test_real_scope_of_rare_cases(name):
    mesh = make_mesh(1)

    def function(weight, x):
        with jax.named_scope(name):
            return jax.lax.while_loop(lambda x: (x**2).sum() > 1, lambda x: jnp.tanh(x @ weight), x)

    text = compiled(function, shape(mesh, (128, 128)), shape(mesh, (256, 128))).as_text()
    found = hlo.read(text, rare="overflow")
    assert (found.matmul_flops, found.open_loops) == ((0, 0) if name == "overflow" else (2 * 256 * 128 * 128, 1))


def test_traffic_of_a_real_program_is_that_of_xla():
    mesh = make_mesh(1)
    program_ = compiled(lambda x, y: jnp.sin(x) + y, *[shape(mesh, (8, 65, 65))] * 2)
    # 65 x 8 x 65, as laid out, is 65 x 8 x 128 floats; two are read and one is written.
    assert hlo.read(program_.as_text()).hbm_bytes == 3 * 65 * 8 * 128 * 4 == program_.cost_analysis()["bytes accessed"]
    large = compiled(lambda x, w: jnp.tanh(x @ w), *[shape(mesh, (8192, 8192))] * 2)
    assert hlo.read(large.as_text()).hbm_bytes == 3 * 8192**2 * 4 == large.cost_analysis()["bytes accessed"]
    assert hlo.read(large.as_text()).matmul_flops == 2 * 8192**3 == large.cost_analysis()["flops"]


def test_a_pallas_kernel_counts_with_its_own_estimate():
    kernel = (
        '%k = f32[8,128]{1,0:T(8,128)} custom-call(%a), custom_call_target="tpu_custom_call", '
        'metadata={op_name="jit(f)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzv","cost_estimate":'
        '{"flops":"8388608","transcendentals":"0","bytes_accessed":"622592"}}}'
    )
    text = (
        "HloModule m\n\nENTRY %main (a: f32[8,128]) -> f32[8,128] {\n  %a = f32[8,128]{1,0:T(8,128)} parameter(0)\n"
        f"  ROOT {kernel}\n}}\n"
    )
    assert hlo.read(text).matmul_flops == 8388608
    silent = text.replace('"cost_estimate":{"flops":"8388608"', '"other":{"flops":"8388608"')
    assert hlo.read(silent).matmul_flops == 0
