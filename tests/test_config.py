"""Configurations: files, flags, JSON, and their fingerprints."""

import functools
import json
import operator

import pytest
from tiny import ROOT, changed

import train
from fgrpo_jax.config import Config, ConfigError
from fgrpo_jax.config_files import absent, differences, fingerprint, from_json, load_file, to_json
from fgrpo_jax.run.command import parse_training
from fgrpo_jax.run.experiment import KNOWN
from fgrpo_jax.run.validation import check_evaluation

DEFAULT = load_file(ROOT / "configs" / "synthetic.py")


def test_a_file_and_flags():
    assert parse_training([], "") == DEFAULT
    path = str(ROOT / "configs" / "lastfm.py")
    found = parse_training([path, "--rl.optim.learning-rate", "3e-6", "--rl.credit.terms", "slate", "f1", "2"], "")
    expected = changed(load_file(path), {"rl.optim.learning_rate": 3e-6, "rl.credit.terms": (("slate", "f1", 2.0),)})
    assert found == expected
    assert list(differences(load_file(path), found).values()) == [
        f"rl.optim.learning_rate: {load_file(path).rl.optim.learning_rate} -> 3e-06",
        f"rl.credit.terms: {load_file(path).rl.credit.terms} -> (('slate', 'f1', 2.0),)",
    ]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rl.optim.learning-rat", "1"], "--rl.optim.learning-rate"),  # "Perhaps you meant"
        (["--sft.steps", "abc"], "--sft.steps"),
        (["--rl.credit.normalise", "std"], "none"),
        (["--rl.steps", "2.5"], "--rl.steps"),
    ],
)
def test_flags_that_do_not_exist_or_do_not_fit(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no config file at .*configs/synthetic.py"),
        ("x = 1", "defines no get_config"),
        ("def get_config():\n    return 3", r"get_config\(\) returned int, not a Config"),
        ("from fgrpo_jax.config import *\ndef get_config():\n    return Config(sed=1)", "unexpected keyword .*'sed'"),
        (
            "from fgrpo_jax.config import *\ndef get_config():\n    return Config(seed='one', keep_memory=1)",
            "seed='one' must be of type int\n  - keep_memory=1 must be of type bool",
        ),
    ],
)
def test_files_that_are_no_configuration(text, message, tmp_path, capsys):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    assert train.main([str(path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(err)


def test_json_of_another_version():
    """A field that is new has its default, of the stage it belongs to; one that is gone is named."""
    config = changed(Config(), {"rl.steps": 7, "sft.optim.b1": 0.5})
    value = json.loads(to_json(config))
    assert absent(to_json(config)) == []
    for path in ("seed", "rl.batch_queries", "sft.source", "sft.optim.eps", "mesh"):
        *parents, name = path.split(".")
        del functools.reduce(operator.getitem, parents, value)[name]
    assert from_json(json.dumps(value)) == config and config.sft.source != config.rl.source
    assert absent(json.dumps(value)) == ["seed", "mesh", "sft.source", "sft.optim.eps", "rl.batch_queries"]
    value["rl"] |= {"batch": 64}
    value["sed"] = 1
    with pytest.raises(ConfigError, match="unknown field.s. sed, rl.batch: take them out of it, or use the version"):
        from_json(json.dumps(value))
    text = to_json(DEFAULT)
    for broken in ("{", "3", text.replace('"mesh": {', '"mesh": 3, "other": {')):
        with pytest.raises(ConfigError):
            from_json(broken)


def test_the_world_that_was_called_synthetic_has_another_name_now():
    old = json.loads(to_json(Config()))
    del old["data"]["synthetic"]
    assert from_json(json.dumps(old)).data.name == "next_item"
    assert from_json(to_json(Config())).data.name == "synthetic"


def test_words_of_documents_gave_way_to_tokens_of_texts():
    """Runs that cut nothing are read; those that did saw other prompts than they would now."""
    old = json.loads(to_json(Config()))
    old["data"]["ir"]["document_words"] = 0
    assert from_json(json.dumps(old)) == Config()
    old["data"]["ir"]["document_words"] = 40
    with pytest.raises(ConfigError, match="document_words=40 is of an earlier version; .*use the version that wrote"):
        from_json(json.dumps(old))


def test_evaluations_may_change_less():
    check_evaluation(changed(DEFAULT, {"eval.versus": "other.rl"}), KNOWN)  # known only once the runs are read
    with pytest.raises(ConfigError, match="'als' is not one of"):
        check_evaluation(changed(DEFAULT, {"eval.baselines": ("als",)}), KNOWN)


def test_fingerprints_do_not_depend_on_the_order_of_names():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert isinstance(Config(), Config)
