"""Spoilt files of every kind, see `faults.fuzz`."""

import pytest

from fastidc.errors import FastidcError
from tests.faults import fuzz


def judge(found: dict) -> None:
    assert found["crashed"] == []
    assert found["unnamed"] == []
    assert found["refused"] + found["read"] == found["cases"]
    assert found["refused"] > 0.5 * found["cases"], "the dice must have spoilt something"
    assert found["slowest"][0] < 20


def test_spoilt_files_are_read_or_refused():
    judge(fuzz.run(0, 400))


@pytest.mark.slow
def test_five_thousand_spoilt_files_are_read_or_refused():
    found = fuzz.run(1, 5000)
    judge(found)
    assert len(found["kinds"]) > 25


def test_what_is_no_sentence_is_seen(monkeypatch):
    def crashes(*args, **kwargs):
        raise KeyError("x")

    def says_nothing(*args, **kwargs):
        raise FastidcError("something is wrong.")

    for reader, field in ((crashes, "crashed"), (says_nothing, "unnamed")):
        monkeypatch.setattr(fuzz, "load_file", reader)
        assert fuzz.run(0, 60)[field], field
