"""RELIABILITY.md names tests that exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_promise_names_a_test_that_is_there():
    rows = [line for line in (ROOT / "RELIABILITY.md").read_text().splitlines() if line.startswith("|") and "tests/" in line]
    assert len(rows) >= 20
    known: dict[str, set[str]] = {}
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            if file not in known:
                tree = ast.parse((ROOT / file).read_text())
                known[file] = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            assert not test or test in known[file], f"{file}::{test}"


def test_every_row_of_the_tables_names_one():
    for line in (ROOT / "RELIABILITY.md").read_text().splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| promise")):
            assert "`tests/" in line, line
