"""METEOR's table without what no sentence can match: the same alignments, made once."""

import gzip
import os
import random
import sys
import threading
import time

import pytest

from fastidc.evaluate import paraphrases
from fastidc.evaluate.java import Meteor
from fastidc.evaluate.paraphrases import StoppedError, table_for, words_of
from fastidc.evaluate.ptb import ptb_regex

ENTRIES = [
    ("0.5", "car", "automobile"),
    ("0.25", "car", "the car 's"),
    ("0.125", "can not", "cannot"),
    ("0.5", "left-hand", "left"),
    ("0.5", "caf\u00e9", "car"),
    ("0.75", ",", "car"),
]


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    path = tmp_path / "table.gz"
    path.write_bytes(gzip.compress("".join("\n".join(entry) + "\n" for entry in ENTRIES).encode()))
    return path


def kept(path) -> list[tuple[str, ...]]:
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    return list(zip(lines[::3], lines[1::3], lines[2::3], strict=True))


def test_an_entry_stays_where_all_its_runs_are_known(table):
    assert kept(table_for(words_of(["The automobile's left", "a CAR", "a hand"]), table)) == [ENTRIES[number] for number in (0, 1, 3, 4, 5)]
    assert kept(table_for(words_of(["I cannot", "can", "not"]), table)) == [ENTRIES[2]]
    assert kept(table_for(frozenset(), table)) == []


def test_words_are_what_normalisation_may_make():
    assert words_of(["The U.S. car's", "a 1,000"]) == {"the", "u", "s", "us", "car", "cars", "a", "1", "000", "1000"}
    long = ".".join("ab" for _ in range(5000))
    assert max(map(len, words_of([long]))) <= paraphrases._LONGEST + 2


@pytest.mark.parametrize("size", [7, 20, 1 << 22])
def test_blocks_end_anywhere(table, monkeypatch, size):
    monkeypatch.setattr(paraphrases, "_BLOCK", size)
    lines = b"".join(paraphrases._kept(str(table), frozenset([b"car", b"automobile"])))
    assert lines == "0.5\ncar\nautomobile\n0.5\ncaf\u00e9\ncar\n0.75\n,\ncar\n".encode()


def test_it_is_made_once_and_the_last_ones_stay(table, monkeypatch):
    monkeypatch.setattr(paraphrases, "_KEPT", 2)
    first = table_for(frozenset(["car"]), table)
    made = first.stat().st_ino
    assert table_for(frozenset(["car"]), table).stat().st_ino == made
    second = table_for(frozenset(["left"]), table)
    os.utime(second, (1, 1))
    third = table_for(frozenset(["can"]), table)
    assert [path.exists() for path in (first, second, third)] == [True, False, True]
    assert not list(first.parent.glob(".*"))


def test_where_it_cannot_be_made_the_whole_table_serves(table, monkeypatch):
    table.parent.joinpath("a cache").write_text("a file")
    assert table_for(frozenset(["car"]), table) == table
    monkeypatch.setenv("XDG_CACHE_HOME", str(table.parent / "another"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert table_for(frozenset(["car"]), table) == table
    table.write_bytes(b"no gzip")
    monkeypatch.undo()
    assert table_for(frozenset(["car"]), table) == table


def test_nobody_waits_for_it(table, monkeypatch):
    stop = threading.Event()
    endless = table.with_name("endless")
    endless.write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(endless))
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(StoppedError):
        table_for(frozenset(["car"]), table, stop)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_alignments_are_those_of_the_whole_table(java, real_sentences):
    """Real sentences, whose words have many paraphrases, and made ones with what normalisation takes apart; captions are other sentences."""
    draw = random.Random(0)
    words = [
        "can't",
        "cannot",
        "U.S.",
        "e.g.",
        "left-hand",
        "1,000",
        "3.5",
        "it's",
        "``",
        "caf\u00e9",
        "gonna",
        "&amp;",
        "o'clock",
        "$",
        "50%",
        "the car",
        "automobile",
    ]
    sentences = draw.sample(real_sentences, 1500) + [" ".join(draw.choices(words, k=6)) for _ in range(500)]
    sentences = [ptb_regex(sentence) if number % 2 else " ".join(sentence.lower().split()) for number, sentence in enumerate(sentences)]
    captions = [draw.choice(sentences) if number % 2 else f"{sentence} {draw.choice(words)}" for number, sentence in enumerate(sentences)]
    given = [[sentence] for sentence in sentences], captions
    with Meteor() as whole, Meteor(words_of([*sentences, *captions])) as small:
        assert small.segments(*given) == whole.segments(*given)
    with Meteor(words_of(["unrelated"])) as wrong, Meteor() as whole:
        assert wrong.segments(*given) != whole.segments(*given), "the table does matter"
