"""The bench of what a snapshot costs."""

import csv

import pytest

from bench import saving


class Slow:
    """A clock that steps and saving move; a snapshot is written beside three steps, which are half as fast meanwhile."""

    def __init__(self):
        self.now, self.left, self.waited = 0.0, 0, 0

    def perf_counter(self) -> float:
        return self.now

    def captured(self, session) -> dict:
        self.now += 2.0
        return {}

    def start(self, number, tensors, state) -> None:
        self.left = 3

    @property
    def busy(self) -> bool:
        return self.left > 0

    def wait(self) -> None:
        self.waited += 1

    def step(self) -> None:
        self.now += 2.0 if self.left else 1.0
        self.left = max(0, self.left - 1)


def test_the_stall_is_the_copy_and_what_steps_beside_the_writer_lose(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(saving, "time", slow)
    monkeypatch.setattr(saving.progress, "captured", slow.captured)
    found = saving.laps(slow.step, None, slow, 2, lambda: None)
    assert found == [saving.Lap(steps=4, copied=2.0, written=6.0, stall=5.0)] * 2
    assert slow.waited == 2


@pytest.mark.parametrize(
    ("line", "sentence"), [(["--laps", "0"], "--laps must be at least 1, got 0."), (["--wrong"], "bench.saving --help")]
)
def test_refusals(capsys, line, sentence):
    assert saving.main(line) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.slow
def test_smoke(tmp_path, capsys):
    assert saving.main(["--smoke", "--device", "cpu", "--out", str(tmp_path), "--csv", str(tmp_path / "laps.csv")]) == 0
    assert "limit 5%" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "laps.csv").open()))
    assert len(rows) == 2
    assert all(int(row["bytes"]) > 1_000_000 and int(row["steps"]) >= saving.LEAST for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["laps.csv"]
