"""Plans for slices of a pod: their closed forms against programs compiled here, and what is printed."""

import json

import jax
import pytest
from helpers import quick_jit, run_on_8_devices

from fgrpo_jax.bench import bounds, compiled, hlo, measure, plan
from fgrpo_jax.bench import command as bench
from fgrpo_jax.bench.bounds import Plan
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.config import ConfigError
from fgrpo_jax.models import decoder

QWEN = measure.WORKLOADS["qwen3-4b"][0]._replace(dtype="bfloat16")
SHAPE = Shape(batch=64, prompt=2048, group=8, length=64)


@pytest.mark.parametrize(
    ("name", "size", "ici"),
    [
        ("v5e:4x4", 16, 100),
        ("v5e:8x16", 128, 150),
        ("v5e:16x16", 256, 200),
        ("v5p:4x4x4", 64, 600),
        ("v5p:2x2x4", 16, 400),
    ],
)
def test_slices(name, size, ici):
    """A corner has one link along a side that does not close to a ring."""
    where = bounds.parse_slice(name)
    assert where.size == size and where.ici_gbytes == pytest.approx(ici)


@pytest.mark.parametrize("name", ["v5e", "v5e:", "v5e:4x", "v5e:4x0", "h100:8", "v5e:-4x4"])
def test_slices_unknown(name):
    with pytest.raises(ConfigError, match=f"--topology {name}: give a chip of v5e, v5p and its sides"):
        bounds.parse_slice(name)


def test_every_split_without_remainder():
    plans = list(bounds.plans(QWEN, SHAPE, 16))
    assert len(set(plans)) == len(plans)
    assert {plan[:3] for plan in plans if plan.tensor == 8} == {(1, 2, 8), (2, 1, 8)}
    assert not any(plan.tensor == 16 for plan in plans)  # of 8 key/value heads
    assert {plan.microbatches for plan in plans if plan[:3] == (1, 16, 1)} == {1, 2, 4}
    assert not list(bounds.plans(QWEN, SHAPE._replace(batch=3), 64))


def test_what_a_chip_keeps():
    """Parameters and two moments in float32; weights of a rollout in bfloat16."""
    params = decoder.num_params(QWEN)
    one, split, heads = (
        bounds.memory(QWEN, SHAPE, Plan(*sizes)) for sizes in ((16, 1, 1, 1), (1, 16, 1, 1), (1, 4, 4, 1))
    )
    assert one["state"] == 12 * params and one["rollout"] == split["rollout"] > 2 * params
    assert split["state"] == pytest.approx(12 * params / 16, rel=0.01) == pytest.approx(heads["state"], rel=0.01)
    assert heads["rollout"] < split["rollout"] / 2
    assert bounds.memory(QWEN._replace(remat=True), SHAPE, Plan(1, 16, 1, 1))["update"] < split["update"] / 3


def test_what_moves_at_least_is_what_programs_move():
    """Programs of eight CPU devices. XLA may gather once for both passes or microbatches; it never moves less."""
    out = run_on_8_devices("""
        import jax
        from fgrpo_jax.bench import bounds, compiled, hlo
        from fgrpo_jax.bench.bounds import Plan
        from fgrpo_jax.bench.flops import Shape
        from fgrpo_jax.models.decoder import DecoderSpec
        from fgrpo_jax.run.sharding import make_mesh
        spec = DecoderSpec(vocab_size=64, hidden_size=16, num_layers=3, num_heads=8, num_kv_heads=4, head_dim=8,
                           mlp_size=48, attention="blocks")
        shape = Shape(batch=16, prompt=32, group=2, length=8)
        for sizes in ((2, 4, 1, 1), (2, 2, 2, 1)):
            plan = Plan(*sizes)
            least = bounds.traffic(spec, shape, plan)
            programs = compiled.lowered(spec, shape, make_mesh(*sizes[:3]), plan.microbatches)
            for name, program in programs.items():
                found = hlo.collectives(program.compile().as_text())
                moved, far = compiled.exchanged(found, plan, least[name])
                for key, bytes_moved in least[name].items():
                    if "tensor" not in key[1]:
                        assert bytes_moved <= moved[key] < 1.01 * bytes_moved + 500, (plan, name, key, moved, least)
                if plan.tensor > 1:  # XLA CPU sums the gradients of several products' input one by one
                    least_summed = least[name]["all-reduce", "tensor"]
                    assert 0.95 * least_summed < moved["all-reduce", "tensor"] < 2 * least_summed, (name, moved, least)
        print("fine")
    """)
    assert out == ["fine"]


def test_every_microbatch_scatters_its_gradient():
    plan = Plan(1, 16, 1, 4)
    once, often = (bounds.traffic(QWEN, SHAPE, plan, n)["update"] for n in (1, 4))
    assert often.pop(("reduce-scatter", "fsdp")) == 4 * once.pop(("reduce-scatter", "fsdp")) and once == often
    where = bounds.parse_slice("v5e:4x4")
    rollout = sum(bounds.traffic(QWEN, SHAPE, plan)["rollout"].values())
    moved = rollout + sum(bounds.traffic(QWEN, SHAPE, plan, 4)["update"].values())
    assert bounds.estimate(QWEN, SHAPE, plan, where).ici_s == pytest.approx(moved / 100e9)


def gather(shape="f32[8]", axes=(0, 1), size=1000, times=2):
    return hlo.Collective("all-gather", "g", shape, size, axes, times, (), False, "jit(f)/all_gather")


def test_what_moves_too_much_is_named():
    plan = Plan(2, 2, 2, 1)
    both = [gather(axes=(0, 2)), gather("f32[4]", axes=(0, 2), times=1), gather(axes=(0, 1, 4, 5), times=1)]
    moved, far = compiled.exchanged(both, plan, {("all-gather", "fsdp"): 1200.0, ("all-reduce", "data+tensor"): 500})
    assert moved == {("all-gather", "fsdp"): 1500, ("all-gather", "data+tensor"): 750}
    assert far == ((both[2], 750),)
    with pytest.raises(ValueError, match="all-gather g runs in a loop of unknown length"):
        compiled.exchanged([gather(times=None)], plan, {})


def test_the_command(spec, tmp_path, monkeypatch, capsys):
    """On one chip, whose place this CPU takes; from the command line to what is written."""
    monkeypatch.setitem(measure.WORKLOADS, "w1", (spec._replace(attention="blocks"), Shape(2, 8, 2, 3)))
    monkeypatch.setattr(compiled, "devices_of", lambda name: jax.devices()[:1])
    monkeypatch.setattr(compiled, "jit", quick_jit)
    path = tmp_path / "plan.json"
    given = ["plan", "--topology", "v5e:1x1", "--workload", "w1", "--batch", "4", "--json", str(path)]
    assert bench.main([*given, "--mesh", "1,1,1", "--microbatches", "2"]) == 0
    out = capsys.readouterr().out
    assert "v5e:1x1: 1 chips of 15.75 GiB" in out and "data 1 x fsdp 1 x tensor 1, 4 microbatches" in out
    assert "data 1 x fsdp 1 x tensor 1, 2 microbatches (compiled in" in out
    assert "of these: --mesh.data 1 --mesh.fsdp 1 --mesh.tensor 1 --rl.microbatches 2" in out
    found = json.loads(path.read_text())
    assert found["shape"]["batch"] == 4 and found["spec"]["dtype"] == "bfloat16" and len(found["estimates"]) == 3
    (one,) = found["compiled"]
    assert one["plan"]["microbatches"] == 2 and not one["refused"]
    update = one["programs"]["update"]
    state = 3 * 4 * decoder.num_params(spec)
    assert state <= update["arguments"] < update["memory"] and update["moved"] == {}
    assert one["programs"]["rollout"]["resident"] == pytest.approx(state * 2 / 3, abs=1)
    assert one["chip_s"] == pytest.approx(sum(max(times) for times in one["phases"].values()))


def test_what_does_not_fit_is_said(spec, monkeypatch, capsys):
    monkeypatch.setitem(measure.WORKLOADS, "w1", (spec, Shape(2, 8, 2, 3)))
    monkeypatch.setattr(compiled, "devices_of", lambda name: [])
    full = compiled.Program(1.0, 2**35)
    refused = compiled.Program(1.0, 0, refused="Ran out of memory on HBM")

    def report(spec, shape, plan, where, devices):
        programs = {"rollout": full if plan.microbatches == 1 else refused, "update": refused}
        least = {"rollout": {}, "update": {}}
        return compiled.Report(plan, programs, least, {}, where)

    monkeypatch.setattr(compiled, "report", report)
    for parts, said in (
        ("1", "rollout: 32.0 GiB with the optimizer's state"),
        ("2", "rollout: Ran out of memory on HBM"),
    ):
        given = ["--topology", "v5e:1x1", "--workload", "w1", "--batch", "2", "--microbatches", parts]
        assert bench.main(["plan", *given]) == 0
        out = capsys.readouterr().out
        assert f"does not fit: {said}" in out
        assert "none of these fits" in out and "of these: --mesh" not in out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--topology", "v5x:4x4"], "give a chip of v5e, v5p"),
        (["--topology", "v5e:4x4", "--mesh", "4x4"], "--mesh 4x4: give data,fsdp,tensor, as 1,16,4"),
        (["--topology", "v5e:4x4", "--mesh", "1,1,16"], "--mesh 1,1,16: data x fsdp x tensor must be the 16 chips"),
        (["--topology", "v5e:4x4", "--mesh", "1,16,1", "--microbatches", "3"], "with 3 microbatches: data x fsdp"),
    ],
)
def test_what_cannot_be_planned_is_refused(given, said, capsys):
    assert bench.main(["plan", *given]) == 2
    assert said in capsys.readouterr().err


def test_closed_forms_alone(capsys):
    """The best of a slice by them seem to fit, and are not all of one mesh."""
    assert bench.main(["plan", "--topology", "v5e:8x8", "--workload", "qwen3-4b", "--compile", "0"]) == 0
    assert "of these" not in (out := capsys.readouterr().out) and "data 1 x fsdp 16 x tensor 4" in out
    where = bounds.parse_slice("v5e:8x8")
    ranks = bounds.ranked(QWEN, SHAPE, where)
    assert ranks[0].gib < 16 < ranks[-1].gib
    again = bounds.estimate(QWEN._replace(remat=True), SHAPE, ranks[0].plan, where)
    assert again.chip_s > ranks[0].chip_s and again.gib < ranks[0].gib
    plans = plan.chosen(plan.parse(["--topology", "v5e:8x8"]), QWEN, SHAPE, where, ranks)
    assert len({plan[:3] for plan in plans}) == len(plans) == 2


def test_a_program_of_tpus():
    """As their compiler writes it: a loop without a note of its length, reduce-scatters fused."""
    pytest.importorskip("libtpu", reason="TPU's compiler is not installed: pip install libtpu")
    out = run_on_8_devices("""
        import jax, jax.numpy as jnp
        from jax.sharding import NamedSharding, PartitionSpec as P
        from fgrpo_jax.bench import compiled, hlo
        from fgrpo_jax.run.sharding import make_mesh
        mesh = make_mesh(4, 4, 1, compiled.devices_of("v5e:4x4"))

        def f(x):
            turn = lambda _, x: jax.lax.psum(jnp.sin(x), "data")
            return jax.lax.psum_scatter(jax.lax.fori_loop(0, 5, turn, x), "fsdp", tiled=True)

        f = jax.shard_map(f, mesh=mesh, in_specs=P(), out_specs=P("fsdp"), check_vma=False)
        x = jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=NamedSharding(mesh, P()))
        for c in hlo.collectives(jax.jit(f).lower(x).compile().as_text()):
            if c.kind != "collective-permute":
                print(c.kind, c.times, len(c.group))
    """)
    assert out == ["all-reduce", "5", "4", "reduce-scatter", "1", "4"]
