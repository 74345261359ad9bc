"""Batches that are encoded while the one before is computed with."""

import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fgrpo_jax.config import Config
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.run.experiment import Experiment, encode, encoded_ahead
from fgrpo_jax.run.sharding import make_mesh


@pytest.fixture
def experiment():
    return Experiment(Config(), None, {}, make_mesh(1, 1, 1), {})


def policy(encoded):
    """Queries are numbers, and no negative one can be encoded."""

    def numbers(examples):
        encoded.append(list(examples))
        if min(examples) < 0:
            raise DataError(f"query {min(examples)}")
        return {"x": np.array(examples, np.float32)}

    return SimpleNamespace(encode=numbers, blank={"x": np.zeros(1, np.float32)})


def test_every_batch_comes_as_if_encoded_in_its_turn(experiment):
    batches, encoded = [[1, 2], [3, 4], [5, 6]], []
    ours = policy(encoded)
    got = list(encoded_ahead(experiment, ours, iter(batches)))
    assert [examples for examples, _ in got] == batches == encoded
    for (_, query), batch in zip(got, batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, query, encode(experiment, ours, batch))
        assert isinstance(query["x"], jax.Array)
    assert list(encoded_ahead(experiment, ours, iter(()))) == []


def test_the_next_batch_is_encoded_while_one_is_computed_with(experiment):
    encoded, second = [], threading.Event()
    ours = policy(encoded)

    def encode(examples):
        if examples == [2]:
            second.set()
        return policy(encoded).encode(examples)

    coming = encoded_ahead(experiment, SimpleNamespace(encode=encode, blank=ours.blank), iter([[1], [2], [3]]))
    assert next(coming)[0] == [1]
    assert second.wait(timeout=60)  # nobody has asked for it
    assert [examples for examples, _ in coming] == [[2], [3]]


def test_a_batch_is_refused_in_its_turn_only(experiment):
    threads = set(threading.enumerate())
    coming = encoded_ahead(experiment, policy([]), iter([[1, 2], [3, -4], [5, 6]]))
    assert next(coming)[0] == [1, 2]
    assert set(threading.enumerate()) > threads
    with pytest.raises(DataError, match="query -4"):
        next(coming)
    assert set(threading.enumerate()) == threads


def test_what_cannot_be_read_is_refused_in_its_turn_and_one_batch_is_read_ahead(experiment):
    read = []

    def batches():
        for number in range(4):
            read.append(number)
            if number == 2:
                raise DataError("row 2")
            yield [number]

    coming = encoded_ahead(experiment, policy([]), batches())
    assert next(coming)[0] == [0]
    assert next(coming)[0] == [1]
    with pytest.raises(DataError, match="row 2"):
        next(coming)
    assert read == [0, 1, 2]
    other = encoded_ahead(experiment, policy(encoded := []), iter([[1], [2], [3]]))
    next(other)
    other.close()  # a run that is stopped waits for the batch that was begun, and for no other
    assert encoded == [[1], [2]]
