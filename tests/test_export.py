"""What `python -m fgrpo_jax.export` writes, and what it is told that it cannot; more in test_serving and test_moved."""

import shutil

import pytest

from fgrpo_jax.config import ConfigError
from fgrpo_jax.export import export


def test_the_last_finished_stage_is_the_default(ranked_runs, tmp_path, capsys):
    run = ranked_runs["llm"].run_dir
    export(run, str(tmp_path / "out"))
    export(run, str(tmp_path / "sft"), "sft")
    assert f"wrote {tmp_path / 'out'}: sft of {run}" in capsys.readouterr().out
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "sft")]
    assert same[0] == same[1]


@pytest.mark.parametrize(
    "system, options, message",
    [
        ("llm", {"stage": "rl"}, r"stage='rl' is not finished in .*: choose one that is \(sft\)"),
        ("llm", {"stage": "rl", "form": "gguf"}, "form='gguf': this run has only model"),
        ("ranker", {}, "is of a ranker, which has no form for other programs: rank with it"),
        ("ranker", {"stage": "rl", "form": "adapter"}, "is of a ranker, which has no form for other programs"),
    ],
)
def test_what_is_refused(ranked_runs, tmp_path, system, options, message):
    with pytest.raises(ConfigError, match=message):
        export(ranked_runs[system].run_dir, str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_finished_stage_is_refused(ranked_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(ranked_runs["llm"].run_dir, run)
    (run / "sft" / "done.json").unlink()
    for stage, message in (("", "has no finished stage yet: let train.py run to its end"), ("sft", "(none yet)")):
        with pytest.raises(ConfigError) as error:
            export(str(run), str(tmp_path / "out"), stage)
        assert message in str(error.value)
