"""The benchmark: what it writes, and its FLOPs against a count token by token."""

import json

import jax
import numpy as np
import pytest
from helpers import quick_jit

from fgrpo_jax.bench import ceilings, flops, measure
from fgrpo_jax.bench import command as bench
from fgrpo_jax.bench.flops import Shape
from fgrpo_jax.models import decoder

HYBRID = {"pattern": (decoder.DELTA, decoder.FULL), "delta": (2, 4, 3, 5, 4), "attention_gate": True}
SHAPE = Shape(batch=2, prompt=8, group=2, length=3)


def counted(spec, shape):
    """FLOPs of one forward pass: every token of every layer in turn, every key it sees."""
    total = 0

    def product(rows, columns):
        nonlocal total
        total += 2 * rows * columns

    def recurrent_token(only_state):
        keys, values, key_width, value_width, _ = spec.delta
        for _ in range(keys):
            product(spec.hidden_size, key_width)
        for _ in range(values):
            product(spec.hidden_size, value_width)
            product(spec.hidden_size, 2)  # decay and rate
            for _ in range(2 if only_state else 3):  # what the state says of the key, what is added; the query
                product(key_width, value_width)
        if only_state:
            return
        for _ in range(keys):
            product(spec.hidden_size, key_width)
        for _ in range(2 * values):  # gate, output
            product(spec.hidden_size, value_width)
        for _ in range(3):
            product(spec.hidden_size, spec.mlp_size)

    def token(layer, keys, only_keys_values=False):
        if decoder.layer_kinds(spec)[layer] == decoder.DELTA:
            return recurrent_token(only_keys_values)
        keys = min(keys, spec.window) if decoder.layer_kinds(spec)[layer] == decoder.LOCAL else keys
        for _ in range(2):
            product(spec.hidden_size, spec.num_kv_heads * spec.head_dim)
        if only_keys_values:
            return
        for _ in range(3 if spec.attention_gate else 2):  # queries and their gates, output
            product(spec.hidden_size, spec.num_heads * spec.head_dim)
        for _ in range(3):
            product(spec.hidden_size, spec.mlp_size)
        for _ in range(2 * keys * spec.num_heads):  # scores, values
            product(1, spec.head_dim)

    for _ in range(shape.batch):
        for layer in range(spec.num_layers):
            for s in range(shape.prompt):
                token(layer, s + 1, only_keys_values=layer == spec.num_layers - 1)
            for _ in range(shape.group):
                for t in range(shape.length):
                    token(layer, shape.prompt - 1 + t + 1)
        for _ in range(shape.group * shape.length):
            product(spec.hidden_size, spec.vocab_size)
    return total


@pytest.mark.parametrize("shape", [SHAPE, flops.repeated(SHAPE), Shape(1, 1, 1, 1)])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kinds", [{}, {"pattern": (decoder.LOCAL, decoder.FULL), "window": 4}, HYBRID])
def test_flops_are_those_counted_token_by_token(spec, shape, layers, kinds):
    spec = spec._replace(num_layers=layers, **kinds)
    assert flops.rollout_flops(spec, shape) == counted(spec, shape)
    assert flops.update_flops(spec, shape) == 3 * counted(spec, shape)


def test_the_issue_s_workload():
    """W1: 160 to 185 GFLOP an update, and 4.98 times as many with repeated prompts."""
    spec, shape = measure.WORKLOADS["w1"]
    update = flops.update_flops(spec, shape)
    assert 160e9 < update < 185e9
    assert flops.update_flops(spec, flops.repeated(shape)) / update == pytest.approx(4.98, rel=0.05)


def test_a_decoding_step_reads_weights_and_caches(spec):
    read = flops.decode_step_bytes(spec, SHAPE)
    assert flops.decode_step_bytes(spec._replace(dtype="bfloat16"), SHAPE) == read / 2
    layers = bench.decoder.param_table(spec)["layers"]
    weights = 4 * sum(np.prod(p.shape) for name, p in layers.items() if "norm" not in name)
    assert read > weights + 4 * spec.vocab_size * spec.hidden_size
    near = spec._replace(pattern=(decoder.FULL, decoder.LOCAL), window=5)  # one of three layers, 5 of 8 prompt tokens
    per_token = 4 * 2 * spec.num_kv_heads * spec.head_dim
    assert read - flops.decode_step_bytes(near, SHAPE) == SHAPE.batch * (8 - 5) * per_token


def test_it_writes_what_it_measures(spec, tmp_path, monkeypatch, capsys):
    """On a tiny workload, with a scan of one point."""
    monkeypatch.setattr(measure, "jit", quick_jit)
    monkeypatch.setitem(bench.WORKLOADS, "w1", (spec, SHAPE))
    monkeypatch.setattr(ceilings, "ceilings", lambda dtype: (100.0, 10.0))
    path = tmp_path / "bench.json"
    assert bench.main(["--repeats", "2", "--no-keep-memory", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    for side in ("shared", "repeated"):
        for name in ("rollout", "update", "total"):
            row = found[side][name]
            assert set(row) == {"median", "min", "n"} and row["n"] == 2
            assert 0 < row["min"] <= row["median"]
        assert set(found[side]["compile_s"]) == {"prefill", "products", "rollout", "update"}
        assert found[side]["update_temporary_gib"] > 0
    assert found["decode_products_s"] == pytest.approx(
        (found["shared"]["products"]["median"] - found["shared"]["prefill"]["median"]) / SHAPE.length
    )
    assert found["matmul_gflops"] == 100 and found["peak_gib"] > 0
    share = found["update_gflop"] / found["shared"]["update"]["median"] / 100
    assert found["update_share"] == pytest.approx(share)
    assert found["flop_ratio"] > 1.4
    out = capsys.readouterr().out
    assert "repeated / shared update" in out and "tokens/s sampled" in out
    row = found["shape"] | {"gflop": 1.0} | found
    assert len(bench.scan_line(row)) == len(bench.SCAN_HEAD)
    later = row | {"prompt": 16, "gflop": 2.0}
    assert bench.growth([row, later])[-1].endswith("update 1.00 times, FLOPs 2.00 times: 0.50")
    bench.draw([row, later], str(tmp_path / "scan.png"))
    assert (tmp_path / "scan.png").stat().st_size > 5000


def test_sizes_of_a_workload_can_be_set(monkeypatch):
    given = ["--workload", "qwen3-0.6b", "--layers", "6", "--batch", "1", "--prompt", "1024", "--length", "32"]
    args, spec, shape = bench.parse(given)
    qwen, theirs = bench.WORKLOADS["qwen3-0.6b"]
    assert args.workload == "qwen3-0.6b" and shape == theirs._replace(batch=1, prompt=1024, length=32)
    assert spec == qwen._replace(num_layers=6, dtype="float32")
    assert bench.as_computed_here(spec) == spec._replace(attention="blocks", rows_first=True)
    monkeypatch.setattr(bench, "attention_of", lambda model: model.attention)  # as where the kernels run
    assert [bench.as_computed_here(spec, kind).attention for kind in ("auto", "blocks")] == ["auto", "blocks"]
    _, spec, shape = bench.parse(["--preset", "gpu"])
    assert (spec, shape) == (qwen._replace(dtype="bfloat16"), theirs)


def test_rates_are_those_of_all_products_and_copies_of_a_program(monkeypatch):
    results = []

    def timed(fn, x):
        results.append(np.asarray(fn(x)))
        return [9.0, 2.0, 0.5, 1.0][(len(results) - 1) % 4], jax.numpy.asarray(results[-1])

    monkeypatch.setattr(ceilings, "timed", timed)
    assert ceilings.copy_gbytes(40, 3) == 2 * 40 * 3 / 0.5 / 1e9 and ceilings.copy_gbytes(40, 1) == 2 * 40 / 0.5 / 1e9
    assert [x.tolist() for x in results] == [[n] * 10 for n in (3, 6, 9, 12, 1, 2, 3, 4)]
    results.clear()
    rates = [ceilings.matmul_gflops("float32", 8, count) for count in (3, 1)]
    assert rates == [2 * 8**3 * count / 0.5 / 1e9 for count in (3, 1)]
    np.testing.assert_allclose(results[0], results[6], rtol=1e-5, atol=1e-6)  # x^4 by one call, and by three
    monkeypatch.setattr(ceilings.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(ceilings, "matmul_gflops", lambda *given: given)
    monkeypatch.setattr(ceilings, "copy_gbytes", lambda *given: given)
    assert ceilings.ceilings("bfloat16") == (("bfloat16", 8192, 16), (2**30, 16))


def test_kernels_are_refused_where_they_do_not_run(capsys, monkeypatch):
    monkeypatch.setattr(bench, "keep_memory", lambda: None)  # of the process that runs all tests
    assert bench.main(["--workload", "default", "--attention", "flash"]) == 2
    assert "error: model.attention='flash' needs an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, said",
    [
        (["--layers", "0"], "argument --layers: 0 is not positive"),
        (["--group", "two"], "argument --group: invalid"),
        (["--scan", "--prompt", "3"], "--scan goes down to a quarter"),
        (["--scan", "--group", "1"], "--scan goes down to a quarter"),
        (["--png", "scan.pdf"], "--png: a plot, 'scan.pdf', must end in .svg or .png"),
    ],
)
def test_sizes_that_make_no_sense(given, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench.parse(given)
    assert said in capsys.readouterr().err


def test_all_rollouts_have_all_their_tokens(spec, monkeypatch):
    """Also where a token is the end of a transcript elsewhere: nothing ends these."""
    monkeypatch.setattr(measure, "jit", quick_jit)
    programs = measure.build(spec, SHAPE, SHAPE.batch, parts=())
    assert not programs.parts and set(programs.compile_s) == {"rollout", "update"}
    rollout = programs.rollout(programs.state.params, programs.batch.query, jax.random.key(0))
    assert rollout.actions.shape == (2, 2, 3)
    assert (rollout.logp < 0).all() and len(np.unique(rollout.actions)) > 3


def test_repeated_prompts_are_those_shared(spec):
    """The reference reads the same prompts, G times each."""
    once = measure.make_query(spec, SHAPE, 2).prompt
    often = measure.make_query(spec, flops.repeated(SHAPE), 2).prompt
    np.testing.assert_array_equal(np.repeat(once, SHAPE.group, 0), often)


def test_two_rounds_of_warm_up_are_dropped(monkeypatch):
    """A clock that counts calls: rollouts take 0, 2, 4, 6 seconds, updates 1, 3, 5, 7."""
    calls = iter(range(100))
    monkeypatch.setattr(measure, "timed", lambda fn, *args: (next(calls), fn(*args)))
    batch = measure.Batch(None, None, None, None, None)
    state = measure.TrainState(None, None, None)
    programs = measure.Programs(lambda *_: None, lambda state, _: (state, None), {}, state, batch, {})
    found = measure.measure(programs, 2)
    assert found["rollout"] == {"median": 5, "min": 4, "n": 2}
    assert found["update"]["min"] == 5 and found["total"] == {"median": 11, "min": 9, "n": 2}
