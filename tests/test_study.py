"""One metric over several runs: values of x, seeds, differences; and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from fgrpo_jax.config import ConfigError
from fgrpo_jax.evaluation.evaluate import resampled_means
from fgrpo_jax.evaluation.study import study

QUERIES = 40


@pytest.fixture
def runs(tmp_path):
    """Widths 4 and 8, two seeds each; the scores of each method and seed."""
    rng, scores = np.random.default_rng(0), {}
    for width in (4, 8):
        for seed in (0, 1):
            folder = tmp_path / f"w{width}s{seed}"
            (folder / "eval" / "test").mkdir(parents=True)
            config = {"network": {"hidden_size": width, "dtype": "float32"}, "cutoffs": [1, 3]}
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "eval" / "test" / "metrics.json").write_text(
                json.dumps(
                    {"parameters": {"a": 100 * width}, "flops": {"a": 1e6 * width}, "methods": {"a": {}, "b": {}}}
                )
            )
            found = {method: rng.random(QUERIES) for method in "ab"}
            scores[width, seed] = found
            rows = [
                {"query_id": f"q{q}", "methods": {m: {"metrics": {"ndcg@5": x[q]}} for m, x in found.items()}}
                for q in rng.permutation(QUERIES)
            ]
            (folder / "eval" / "test" / "per_query.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return [str(tmp_path / f"w{width}s{seed}") for width in (4, 8) for seed in (0, 1)], scores


def test_seeds_are_joined_and_values_compared(runs):
    folders, scores = runs
    text = study(tuple(folders), ("a", "b"), x="network.hidden_size")
    lines = text.splitlines()
    assert lines[0] == f"ndcg@5, percent, {QUERIES} queries" and len(lines) == 6
    a = {width: 100 * np.array([scores[width, seed]["a"] for seed in (0, 1)]) for width in (4, 8)}
    assert f"{a[4].mean():.1f} ±{a[4].mean(1).std(ddof=1):.1f}" in lines[2] and lines[2].split()[:3] == ["4", "a", "2"]
    ids = sorted(range(QUERIES), key=lambda q: f"q{q}")
    difference = (a[8].mean(0) - a[4].mean(0))[ids]
    low, high = np.percentile(resampled_means(difference[:, None], 2000, 0), (2.5, 97.5))
    assert lines[3].endswith(f"{difference.mean():+.2f} [{low:+.2f}, {high:+.2f}]")


def test_parameters_and_names_of_runs_and_a_plot(runs, tmp_path):
    folders, _ = runs
    picture = tmp_path / "plot.png"
    lines = study(tuple(folders), ("a",), x="parameters", plot=str(picture)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["400", "800"]
    assert [line.split()[0] for line in study(tuple(folders), ("a",), x="flops").splitlines()[2:]] == [
        "4000000.0",
        "8000000.0",
    ]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert [line.split()[0] for line in study(tuple(folders), ("a",)).splitlines()[2:]] == [
        "w4s0", "w4s1", "w8s0", "w8s1"
    ]  # fmt: skip


def test_a_method_of_some_runs_and_a_number_of_a_list(runs, tmp_path):
    folders, _ = runs
    path = Path(folders[0]) / "eval" / "test" / "per_query.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps({**row, "methods": {"a": row["methods"]["a"]}}) for row in rows))
    path.with_name("metrics.json").write_text(json.dumps({"methods": {"a": {}}}))
    lines = study(tuple(folders[:3]), ("a", "b"), x="cutoffs.1", plot=str(tmp_path / "plot.svg")).splitlines()
    assert [line.split()[:3] for line in lines[2:4]] == [["3", "a", "3"], ["3", "b", "2"]]
    said = f"note: {folders[0]} and {folders[2]} count as seeds of one cutoffs.1, and differ in network.hidden_size"
    assert said in lines and len(lines) == 6
    assert not any("note" in line for line in study(tuple(folders), ("a",), x="network.hidden_size").splitlines())


def test_methods_of_other_queries_share_no_table(runs):
    """Each method's runs agree, and the two methods' do not."""
    folders, _ = runs
    for folder, method in zip(folders, "aabb", strict=True):
        path = Path(folder) / "eval" / "test" / "per_query.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{"query_id": f"{method}{row['query_id']}", "methods": {method: row["methods"][method]}} for row in rows]
        path.write_text("\n".join(map(json.dumps, rows)))
        path.with_name("metrics.json").write_text(json.dumps({"methods": {method: {}}}))
    with pytest.raises(
        ConfigError, match="w4s0:a and .*w8s0:b were not evaluated on the same queries .40 and 40; 80 of"
    ):
        study(tuple(folders), ("a", "b"), x="network.hidden_size")
    assert "40 queries" in study(tuple(folders), ("a",), x="network.hidden_size")


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"x": "network.width"}, "x='network.width' is no field of .*config.json"),
        ({"x": "network.hidden_size", "plot": "p.pdf"}, "a plot, 'p.pdf', must end in .svg or .png"),
        ({"x": "network.dtype", "plot": "p.png"}, "x='network.dtype' is no number in these runs"),
        ({"x": "cutoffs", "plot": "p.png"}, "x='cutoffs' is no number"),
        ({"x": "network", "plot": "p.png"}, "x='network' is no number"),
        ({"x": "parameters", "methods": ("b",)}, "knows no number of parameters of 'b', only of a"),
        ({"x": "flops", "methods": ("b",)}, "knows no number of flops of 'b', only of a"),
        ({"methods": ("c",)}, "has no method 'c', only a, b"),
        ({"metric": "ndcg@9"}, "has no ndcg@9, only ndcg@5"),
        ({"split": "validation"}, "give RUN_DIR:METHOD of an evaluated run"),
        ({"methods": ()}, "give --runs and --methods"),
    ],
)
def test_what_is_refused(runs, tmp_path, monkeypatch, fields, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        study(tuple(runs[0]), **{"methods": ("a",)} | fields)
    assert not (tmp_path / "p.png").exists()


def test_runs_on_other_queries_are_refused(runs):
    path = f"{runs[0][3]}/eval/test/per_query.jsonl"
    with open(path) as file:
        lines = file.read().splitlines()
    with open(path, "w") as file:
        file.write("\n".join(lines[1:]))
    with pytest.raises(
        ConfigError, match="w4s0:a and .*w8s1:a were not evaluated on the same queries .40 and 39; 1 of"
    ):
        study(tuple(runs[0]), ("a",))
