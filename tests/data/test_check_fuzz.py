"""Annotations spoilt at random: the check never fails, misses nothing that the reader refuses, and its quarantine always makes the rest readable."""

import json
import random

import pytest
from check_cases import WORLDS

from fastidc.data.check import check
from fastidc.data.records import load_records
from fastidc.errors import FastidcError
from tests.faults.spoiling import spoilt, spoilt_text


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
