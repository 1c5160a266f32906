"""What a run writes of its steps: rows that are cut, a ledger that proves something, spikes; and what watches it."""

import json
import math
import time

import pytest
import torch
from runs import options, train, world

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc.data import loaders
from fastidc.errors import FastidcError
from fastidc.train import agreement
from fastidc.train.distributed import ALONE, World
from fastidc.train.ledger import Ledger, check_ledger
from fastidc.train.rows import Rows
from fastidc.train.steplog import Spikes, StepLog
from fastidc.train.watchdog import Watchdog


def test_a_spike_is_told_and_remembered(tmp_path):
    spikes = Spikes()
    draws = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert all(spikes.see(math.exp(0.1 * x)) is None for x in draws)
    assert spikes.see(math.nan) is None
    assert spikes.see(5.0) > 8
    assert spikes.see(1.1) is None
    path = tmp_path / "log.jsonl"
    log = StepLog(path, spikes=True)
    for step, x in enumerate(draws[:30], start=1):
        log.add({"step": step, "lr": [0.0]}, torch.tensor(math.exp(0.1 * x)), torch.tensor(1.0))
    log.close()
    log = StepLog(path, spikes=True, keep=30)
    log.add({"step": 31, "lr": [0.0]}, torch.tensor(9.0), torch.tensor(1.0))
    log.close()
    assert [step for step, _ in log.spikes] == [31], "it knows the losses from before"
    assert "spike" in json.loads(path.read_text().splitlines()[-1])


def test_rows_are_cut_where_a_run_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1, "é": 1}\n{"step": 2}\n{"step": 3}\nnothing\n{"step": 2')
    rows = Rows(path, keep=2)
    rows.add({"step": 3, "new": True})
    rows.close()
    assert path.read_text() == '{"step": 1, "é": 1}\n{"step": 2}\n{"step": 3, "new": true}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows.pop(2), "line 3: step 4 follows step 2"),
        (lambda rows: rows[1]["ids"].append("x"), "line 2: step 2 has 3 samples instead of 2"),
        (lambda rows: rows[1].update(ids=rows[0]["ids"]), "line 2: sample 'a' was read in step 1 already"),
        (lambda rows: rows[3].update(epoch=2), "line 4: epoch 2 follows epoch 0"),
        (lambda rows: rows[2].update(epoch=1), "line 3: epoch 0 ended after 2 of 3 steps"),
        (lambda rows: rows[3].update(epoch=0, ids=["p", "q"]), "line 4: sample 'p' is not in the training split"),
        (lambda rows: rows[0].pop("ids"), "line 1 is no step of a ledger"),
    ],
)
def test_a_ledger_that_proves_nothing(tmp_path, change, sentence):
    def written(rows: list[dict]):
        (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return check_ledger(tmp_path / "ledger.jsonl", 2, 3, "abcdef")

    epochs = ["ab", "cd", "ef", "fa", "bc"]
    rows = [{"step": i + 1, "epoch": i // 3, "ids": list(ids)} for i, ids in enumerate(epochs)]
    assert written(rows) == {"steps": 5, "epochs": 2, "samples": 10}
    change(rows)
    with pytest.raises(FastidcError, match=sentence):
        written(rows)


def test_the_ledger_says_what_was_read(tmp_path, monkeypatch):
    """Not what was planned: a loader that gives a sample twice is found out."""
    original = loaders.epoch_order
    monkeypatch.setattr(loaders, "epoch_order", lambda *args: original(*args) // 2 * 2)
    train("adapt", options(*world(tmp_path / "toy"), tmp_path / "out", preset="tiny", batch_size=4))
    with pytest.raises(FastidcError, match=r"was read in step \d already"):
        check_ledger(tmp_path / "out" / "ledger.jsonl", 4, 4)


def test_a_ledger_of_several_processes(tmp_path, monkeypatch):
    """The parts lie rank after rank, those of a step together."""
    monkeypatch.setattr(World, "gather_everywhere", lambda self, value: [value, [[f"{name}'" for name in ids] for ids in value]])
    ledger = Ledger(tmp_path / "ledger.jsonl", ALONE, flush_every=2)
    for step in (1, 2, 3):
        ledger.add(step, 0, [f"{step}a", f"{step}b"])
    ledger.close()
    rows = [json.loads(line)["ids"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert rows == [[f"{step}a", f"{step}b", f"{step}a'", f"{step}b'"] for step in (1, 2, 3)]


def test_a_watchdog_names_process_step_and_phase():
    said = []
    with Watchdog(0.1, World(1, 2), said.append) as dog:
        for step in range(5):
            dog.now("training", step)
            time.sleep(0.01)
        dog.now("reading", 7)
        time.sleep(0.4)
    assert 1 <= len(said) <= 3
    assert said[0].startswith("watchdog: process 1 of 2 has been reading at step 7 for 0 s")
    with Watchdog(None, ALONE, said.append) as dog:
        assert dog._thread is None


def test_one_process_agrees_with_itself():
    noticed = [0, 0]
    agreed = agreement.Agreement(ALONE, lambda: noticed)
    assert agreed.read() == [0, 0]
    noticed[1] = 3
    agreed.tell()
    assert agreed.read() == agreed.now() == [0, 3]
