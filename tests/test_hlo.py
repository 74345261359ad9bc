"""What the reader of compiled programs counts: on programs compiled here, and on text as other compilers write it."""

import pytest
from helpers import run_on_8_devices

from fgrpo_jax.bench import hlo

ADD = "%sum (a: f32[], b: f32[]) -> f32[] {\n  ROOT %r = f32[] add(%a, %b)\n}\n"


def program(entry, before="", devices=8):
    lines = "\n".join(f"  {line}" for line in entry)
    return (
        f"HloModule m, num_partitions={devices}\n\n{ADD}{before}ENTRY %main (p: f32[16]) -> f32[16] {{\n{lines}\n}}\n"
    )


def loop(start, step, limit, inside, direction="LT"):
    """A while loop as TPU programs hold them: no note of how often it runs."""
    return f"""
%body (q: (s32[], f32[16])) -> (s32[], f32[16]) {{
  %q = (s32[]{{:T(128)}}, f32[16]{{0:T(128)S(1)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%q), index=0
  %x = f32[16]{{0:T(128)}} get-tuple-element(%q), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  {inside}
  ROOT %out = (s32[], f32[16]) tuple(%next, %y)
}}

%test (q.1: (s32[], f32[16])) -> pred[] {{
  %q.1 = (s32[], f32[16]) parameter(0)
  %i.1 = s32[] get-tuple-element(%q.1), index=0
  %limit = s32[] constant({limit})
  ROOT %less = pred[] compare(%i.1, %limit), direction={direction}
}}
""", [
        "%p = f32[16]{0} parameter(0)",
        f"%zero = s32[] constant({start})",
        "%first = s32[] copy(%zero)",
        "%in = (s32[], f32[16]) tuple(%first, %p)",
        '%w = (s32[], f32[16]) while(%in), condition=%test, body=%body, metadata={op_name="jit(f)/while"}',
        "ROOT %o = f32[16] get-tuple-element(%w), index=1",
    ]  # fmt: skip


REDUCE = "%y = f32[16] all-reduce(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum"


def test_of_a_program_compiled_here():
    """Loops within loops, a loop without end known, branches, and every kind, by the bytes of one device."""
    out = run_on_8_devices("""
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, PartitionSpec as P
        from fgrpo_jax.bench.hlo import collectives
        mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
        lax = jax.lax

        def f(x, n):
            inner = lambda _, x: lax.psum(x, "b") * 0.5
            outer = lambda _, x: lax.psum(lax.fori_loop(0, 3, inner, x), "a") * 2
            x = lax.all_gather(lax.fori_loop(0, 5, outer, x), "a", tiled=True)
            x = lax.psum_scatter(x, "a", tiled=True)
            x = lax.ppermute(x, "a", [(i, (i + 1) % 4) for i in range(4)])
            x = lax.cond(n > 0, lambda x: lax.psum(x, "b") + 1, lambda x: x, x)
            turn = lambda c: (c[0] + 1, lax.all_to_all(c[1], "a", 0, 0, tiled=True))
            return lax.while_loop(lambda c: c[0] < n, turn, (0, x))[1]

        f = jax.shard_map(f, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=False)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        text = jax.jit(f).lower(jax.ShapeDtypeStruct((16, 8), jnp.float32), number).compile().as_text()
        found = collectives(text)
        for c in found:
            print(c.kind, c.bytes, len(c.group), c.times, len(c.loops), c.conditional, int(c.traffic))
        assert "psum" in found[0].op_name and [loop.trips for loop in found[0].loops] == [5, 3]
        assert found[1].group == (0, 2, 4, 6) and found[-1].loops[0].trips is None
        assert [c.times for c in collectives(text, unknown_trips=7)] == [15, 5, 1, 1, 1, 1, 7]
    """)
    part, all_parts = 4 * 8 * 4, 4 * 4 * 8 * 4  # bytes
    rows = [
        ("all-reduce", part, 2, 15, 2, False, part),
        ("all-reduce", part, 4, 5, 1, False, 2 * part * 3 // 4),
        ("all-gather", all_parts, 4, 1, 0, False, 3 * part),
        ("reduce-scatter", all_parts, 4, 1, 0, False, 3 * part),
        ("collective-permute", part, 2, 1, 0, False, part),
        ("all-reduce", part, 2, 1, 0, True, part),
        ("all-to-all", part, 4, None, 1, False, part * 3 // 4),
    ]
    assert out == [str(cell) for row in rows for cell in row]


@pytest.mark.parametrize(
    ("start", "step", "limit", "trips"), [(0, 1, 12, 12), (0, 2, 7, 4), (3, 5, 14, 3), (5, 1, 5, 0)]
)
def test_loops_are_counted_by_their_counter(start, step, limit, trips):
    before, entry = loop(start, step, limit, REDUCE)
    (found,) = hlo.collectives(program(entry, before))
    assert found.times == trips and found.loops == (hlo.Loop("w", trips, "jit(f)/while"),)
    assert (found.kind, found.bytes, found.group) == ("all-reduce", 64, (0, 1))


def test_loops_that_end_otherwise_are_not_guessed():
    before, entry = loop(0, 1, 9, REDUCE, direction="NE")
    assert hlo.collectives(program(entry, before))[0].times is None
    assert hlo.collectives(program(entry, before), unknown_trips=64)[0].times == 64
    doubled = before.replace("%next = s32[] add(%i, %step)", "%next = s32[] multiply(%i, %step)")
    assert hlo.collectives(program(entry, doubled.replace("=NE", "=LT")))[0].times is None


def test_a_condition_is_tested_once_more_than_its_loop_runs():
    before, entry = loop(0, 1, 12, "%y = f32[16] copy(%x)")
    inside = "  %seen = s32[] all-reduce(%i.1), replica_groups={}, to_apply=%sum\n  %limit ="
    (found,) = hlo.collectives(program(entry, before.replace("  %limit =", inside)))
    assert found.times == 13 and found.group == tuple(range(8))


def test_what_is_started_and_awaited_is_counted_once():
    before = """
%asynchronous (a.1: f32[16]) -> f32[4] {
  %a.1 = f32[16] parameter(0)
  ROOT %rs = f32[4] reduce-scatter(%a.1), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
}
"""
    entry = [
        "%p = f32[16]{0} parameter(0)",
        "%ag = (f32[16]{0}, f32[32]{0}) all-gather-start(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}",
        "%b = bf16[64]{0} custom-call(%p)",
        "%agd = f32[32]{0} all-gather-done(%ag)",
        "%cp = (f32[16], f32[16], u32[]{:S(2)}, u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,0}}",
        "%cpd = f32[16] collective-permute-done(%cp)",
        "%ar = (f32[16], bf16[64]) all-reduce-start(%p, %b), replica_groups={}, to_apply=%sum",
        "%ard = (f32[16], bf16[64]) all-reduce-done(%ar)",
        "%rss = ((f32[16]), f32[4], u32[]) async-start(%p), calls=%asynchronous",
        "%rsd = f32[4] async-done(%rss), calls=%asynchronous",
    ]
    found = hlo.collectives(program(entry, before))
    assert [(c.kind, c.bytes, c.group) for c in found] == [
        ("all-gather", 128, (0, 4)),
        ("collective-permute", 64, (0, 1)),
        ("all-reduce", 64 + 128, tuple(range(8))),
        ("reduce-scatter", 64, (0, 1, 2, 3)),
    ]


def test_pieces_of_one_collective_are_counted_once():
    """TPU runs some in pieces, each fused with other work."""

    def piece(number):
        return f"""
%async_collective_fusion.{number} (a.{number}: f32[16]) -> f32[64] {{
  %a.{number} = f32[16] parameter(0)
  ROOT %ag.{number} = f32[64] all-gather(%a.{number}), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {{'axis_1'}}, dimensions={{0}}, frontend_attributes={{chain_id="0"}}
}}
"""

    calls = [f"%f.{n} = f32[64] fusion(%p), kind=kOutput, calls=%async_collective_fusion.{n}" for n in (1, 2)]
    entry = ["%p = f32[16]{0} parameter(0)", *calls]
    (found,) = hlo.collectives(program(entry, piece(1) + piece(2)))
    assert (found.kind, found.bytes, found.group) == ("all-gather", 256, (0, 1, 2, 3))


@pytest.mark.parametrize(
    "devices, group",
    [
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", (0, 4)),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2], device_ids=([2,2,2]T(2,1,0)) {'axis_0'}", (0, 1)),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0', 'axis_1'}", (0, 4, 1, 5, 2, 6, 3, 7)),
    ],
)
def test_devices_named_by_axes(devices, group):
    entry = ["%p = f32[16]{0} parameter(0)", f"%a = f32[16] all-reduce(%p), replica_groups={devices}, to_apply=%sum"]
    (found,) = hlo.collectives(program(entry))
    assert found.group == group


def test_a_fused_reduce_scatter_is_one():
    """An all-reduce and the slice of it, in one: TPU's way where devices of a group are neighbours."""
    before = """
%all-reduce-scatter.3 (a.1: f32[16]) -> f32[4] {
  %a.1 = f32[16] parameter(0)
  %ar = f32[16] all-reduce(%a.1), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  %zero = u32[] constant(0)
  ROOT %mine = f32[4] dynamic-slice(%ar, %zero), dynamic_slice_sizes={4}
}
"""
    entry = ["%p = f32[16]{0} parameter(0)", "%f = f32[4] fusion(%p), kind=kCustom, calls=%all-reduce-scatter.3"]
    (found,) = hlo.collectives(program(entry, before))
    assert (found.kind, found.bytes, found.traffic) == ("reduce-scatter", 64, 48)


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("module @jit_f {}")
    entry = ["%p = f32[16]{0} parameter(0)", "%a = f32[16] all-reduce(%p), replica_groups=new[8], to_apply=%sum"]
    with pytest.raises(ValueError, match="all-reduce a: devices in a notation unknown here.*new"):
        hlo.collectives(program(entry))
