"""Several processes: how they begin, and how all end when one is gone."""

import pytest

from fgrpo_jax.config import ConfigError
from fgrpo_jax.processes import initialize_distributed


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FGRPO_COORDINATOR": "a:1"}, "without FGRPO_NUM_PROCESSES, FGRPO_PROCESS_ID"),
        ({"FGRPO_DISTRIBUTED": "yes"}, "only value is 'auto'"),
        ({"FGRPO_DISTRIBUTED": "auto", "FGRPO_PROCESS_ID": "0"}, "unset FGRPO_PROCESS_ID"),
        ({"FGRPO_COORDINATOR": "a:1", "FGRPO_NUM_PROCESSES": "2", "FGRPO_PROCESS_ID": "2"}, "from 0 to"),
        (
            {"FGRPO_COORDINATOR": "a:1", "FGRPO_NUM_PROCESSES": "two", "FGRPO_PROCESS_ID": "1"},
            "whole numbers",
        ),
    ],
)
def test_half_set_environments_are_refused(environ, message):
    with pytest.raises(ConfigError, match=message):
        initialize_distributed(environ)


def test_alone_without_variables():
    assert initialize_distributed({}) is False
