"""Differences by a field of the configuration, of pairs of runs that have queries of their own."""

import json

import numpy as np
import pytest

from fgrpo_jax.config import ConfigError
from fgrpo_jax.evaluation.evaluate import resampled_means
from fgrpo_jax.evaluation.gains import compare

# pool, noise: the first is the base.
WORLDS = {"base0": (80, 0.0), "base1": (80, 0.0), "small": (40, 0.0), "noisy": (80, 0.5), "both": (40, 0.5)}


@pytest.fixture
def runs(tmp_path):
    """Runs of four worlds, the base with two seeds; {run: {method: scores}}, by the order of query ids."""
    rng, scores = np.random.default_rng(0), {}
    for name, (pool, noise) in WORLDS.items():
        folder = tmp_path / name
        (folder / "eval" / "test").mkdir(parents=True)
        (folder / "config.json").write_text(
            json.dumps({"data": {"pool": pool, "noise": noise, "buckets": [pool]}, "seed": name[-1]})
        )
        logged = [{"stage": "sft", "step": 1}, {"stage": "rl", "step": 0, "eval/ndcg@5": 0.5}]
        logged += [{"stage": "rl", "step": step, "dead_groups/slate": step / pool} for step in (10, 20)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, logged)))
        scores[name] = {method: rng.random(20 if pool == 80 else 30) for method in ("rl", "sft")}
        rows = [
            {
                "query_id": f"{pool}-{q:02}",
                "methods": {m: {"metrics": {"ndcg@5": x[q]}} for m, x in scores[name].items()},
            }
            for q in rng.permutation(20 if pool == 80 else 30)
        ]
        (folder / "eval" / "test" / "per_query.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path, scores


def entries(folder, names, method):
    return tuple(f"{folder / name}:{method}" for name in names)


def test_every_pair_on_its_own_queries_by_what_differs_from_the_base(runs):
    folder, scores = runs
    a, b = (entries(folder, WORLDS, method) for method in ("rl", "sft"))
    text = compare(a, b + a, ("data.pool", "data.noise"), str(folder / "base0"), ("sft", "itself"))
    _, pools, noise, notes = (part.splitlines() for part in text.split("\n\n"))
    told = "note: {0}/{1} differs from {0}/base0 in data.buckets too"
    assert notes == [told.format(folder, name) for name in ("small", "both")]
    assert [line.split()[0] for line in pools] == ["data.pool", "40", "80"]  # in order, and "both" in no panel
    assert [line.split()[:4] for line in noise[1:]] == [["0.0", "2", "12", "%"], ["0.5", "1", "12", "%"]]
    assert pools[1].split()[1:4] == ["1", "25", "%"]

    less = 100 * (scores["small"]["rl"] - scores["small"]["sft"])
    low, high = np.percentile(resampled_means(less[:, None], 2000, 0), (2.5, 97.5))
    assert f"{100 * scores['small']['rl'].mean():.1f}   {less.mean():+.1f} [{low:+.1f}, {high:+.1f}]" in pools[1]
    seeds = [100 * (scores[name]["rl"] - scores[name]["sft"]).mean() for name in ("base0", "base1")]
    assert f"{np.mean(seeds):+.1f} ±{np.std(seeds, ddof=1):.1f} [" in pools[2]
    assert pools[2].endswith("+0.0 ±0.0 [+0.0, +0.0]")


@pytest.mark.parametrize("kind, start", [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_plot_is_the_same_again(runs, kind, start):
    folder, _ = runs
    a, b = (entries(folder, WORLDS, method) for method in ("rl", "sft"))
    pictures = [folder / f"{n}.{kind}" for n in range(2)]
    for picture in pictures:
        compare(a, b, ("data.pool", "data.noise"), str(folder / "base0"), plot=str(picture))
    assert pictures[0].read_bytes() == pictures[1].read_bytes() and pictures[0].read_bytes().startswith(start)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b": ()}, "1 of --a, 0 of --b and 1 --names"),
        ({"by": ()}, "give a list as long as a for each"),
        ({"by": ("data.x",)}, "by='data.x' is no field of"),
        (
            {"a": ("both:rl",), "b": ("both:sft",), "by": ("data.pool", "data.noise")},
            "no run of a differs from .*base0 in this one alone",
        ),
        ({"a": ("base0",), "b": ("base0:sft",)}, "give RUN_DIR:METHOD"),
        ({"a": ("none:rl",)}, "none is not a run directory: it holds no config.json"),
        (
            {"b": ("small:sft",)},
            "base0:rl and .*small:sft were not evaluated on the same queries .20 and 30; 50 of one",
        ),
        ({"a": ("base0:x",)}, "has no method 'x', only rl, sft"),
        ({"plot": "gains.pdf"}, "a plot, 'gains.pdf', must end in .svg or .png"),
    ],
)
def test_what_is_refused(runs, change, message):
    folder, _ = runs
    options = {"a": ("base0:rl",), "b": ("base0:sft",), "by": ("data.pool",)} | change
    for side in ("a", "b"):
        options[side] = tuple(f"{folder}/{entry}" for entry in options[side])
    with pytest.raises(ConfigError, match=message):
        compare(base=str(folder / "base0"), **options)


def test_seeds_are_of_the_same_queries(runs):
    folder, _ = runs
    path = folder / "base1" / "eval" / "test" / "per_query.jsonl"
    path.write_text(path.read_text().replace('"query_id": "80-', '"query_id": "81-'))
    with pytest.raises(
        ConfigError, match="base0:rl and .*base1:rl were not evaluated on the same queries .20 and 20; 40 of one alone"
    ):
        compare(
            *(entries(folder, ("base0", "base1"), method) for method in ("rl", "sft")),
            ("data.pool",),
            str(folder / "base0"),
        )
