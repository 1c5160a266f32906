"""Annotations spoilt at random: the check never fails, misses nothing that the reader refuses, and its quarantine always makes the rest readable."""

import json
import random

import pytest
from check_cases import WORLDS

from fastidc.data.check import check
from fastidc.data.records import load_records
from fastidc.errors import FastidcError

JUNK = [
    None,
    True,
    -1,
    3,
    10**30,
    1.5,
    float("nan"),
    "",
    " ",
    "x",
    "../../x",
    "\ud800",
    "a\u2028b",
    "\x00",
    [],
    {},
    ["x"],
    [1],
    [""],
    {"a": 1},
    "word " * 90,
]


def spoilt(value, rng):
    """``value`` with one thing in it another one, gone, twice, or of another name."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        action = rng.random()
        if action < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if action < 0.2:
            return {(f"{k}x" if k == key else k): v for k, v in value.items()}
        return value | {key: spoilt(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.85:
        index = rng.randrange(len(value))
        action = rng.random()
        if action < 0.1:
            return value[:index] + value[index + 1 :]
        if action < 0.25:
            return [*value, value[index]]
        return [*value[:index], spoilt(value[index], rng), *value[index + 1 :]]
    return rng.choice(JUNK)


def spoilt_text(text, rng):
    """A table or JSON with some of its characters others, or gone."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice(["", ",", '"', "\n", "\t", "{", "\u2028", "\x00", "é", "p"]) + text[place + rng.randint(0, 2) :]
    return text


def refusal_of(run, *args) -> str:
    """The sentence that it ends with; empty where it ends well."""
    try:
        run(*args)
    except FastidcError as error:
        return str(error)
    return ""


def judge(tree, kind):
    if refusal_of(check, tree, kind, None, "none"):  # its header tells it from any other table
        assert kind == "birds"
        assert refusal_of(load_records, tree, kind)
        return 2
    findings = check(tree, kind, how="none", progress=False)
    refused = refusal_of(load_records, tree, kind)
    assert not refused or findings.code, f"the reader refuses what the check passes: {refused}"
    assert "\n" not in refused
    if findings.code == 1:
        records = load_records(tree, kind, quarantine=findings.write_quarantine(tree / "bad.json"))
        bad = findings.bad_pairs()
        assert not [record.id for part in records.values() for record in part if record.id in bad]
        (tree / "bad.json").unlink()
    return findings.code


@pytest.mark.parametrize("kind", WORLDS)
def test_spoilt_annotations(tmp_path, kind):
    tree = WORLDS[kind](tmp_path / "own")
    files = [path for path in sorted(tree.iterdir()) if path.suffix in (".json", ".csv", ".tsv")]
    rng, codes = random.Random(kind), set()
    for _ in range(40):
        path = rng.choice(files)
        whole = path.read_text()
        if path.suffix == ".json" and rng.random() < 0.8:
            path.write_text(json.dumps(spoilt(json.loads(whole), rng)))
        else:
            path.write_text(spoilt_text(whole, rng), encoding="utf-8", errors="surrogatepass")
        codes.add(judge(tree, kind))
        path.write_text(whole)
    assert codes >= {1, 2}, "the dice must have made pairs bad, and sets unreadable"
