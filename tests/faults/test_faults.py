"""The short form of every fault: `pytest -m faults`, also part of `make test-slow`. The long one is `python -m tests.faults --long`."""

import pytest

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from tests.faults.__main__ import FAULTS, run

pytestmark = [pytest.mark.slow, pytest.mark.faults]


# of `compiled` nothing: where nothing is cached yet the compiler takes minutes
@pytest.mark.parametrize("name", [name for name in FAULTS if name != "compiled"])
def test_a_fault(name):
    result = run(name, 0, FAULTS[name][3])
    assert not result["failures"], f"`python -m tests.faults --only {name} --seed SEED --count 1`: {result['failures']}"
    assert result["done"] == result["asked"]


def test_a_fault_that_is_not_survived(monkeypatch, tmp_path):
    """The suite itself can fail: what does not come back to the same bits is told with its seed."""
    from tests.faults import kills, toy

    monkeypatch.setattr(toy.runs, "check_same_run", lambda got, expected: (_ for _ in ()).throw(AssertionError("other bits")))
    result = kills.run(3, 1)
    assert result["passed"] == 0
    assert result["failures"][0]["seed"] == 3
    assert "other bits" in result["failures"][0]["what"]
