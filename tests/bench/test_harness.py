"""The measuring instrument itself: gate, rows of what cannot run, ratios, the CUDA arithmetic with a clock of the test's own, CSV."""

import csv
import dataclasses
import io
import weakref

import pytest
import torch

from bench import harness, table, timing
from bench.case import Case, MissingError, Variant
from bench.gate import Gate
from bench.harness import Settings, measure
from bench.roofline import Ceilings, Floor, Work

FAST = Settings(
    seconds=0.0, least=4, most=4, warm_up=1, baselines=("plain",), facts={"device": "test", "commit": "abc", "date": "2026-01-01"}
)


def square(x, y):
    return (x * x * y).sum(-1)


CASE = Case(
    family="toy",
    name="square",
    shape={},
    device="cpu",
    dtype=torch.float32,
    make_inputs=lambda device, dtype, seed: {
        name: torch.randn(8, 5, generator=torch.Generator().manual_seed(seed + i), dtype=dtype) for i, name in enumerate("xy")
    },
    exact=square,
    plain=square,
    outputs=((8,),),
    gradients=("x", "y"),
    floor=Floor((Work(0, 2e6),), (Work(4e6, 0),)),
    items=("rows", 8),
)


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return square(x, y)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return 2 * x * y * grad[:, None], 0.99 * x * x * grad[:, None]


def explode(x, y):
    raise RuntimeError("no kernel image is available\nlong explanation")


def missing(case):
    raise MissingError("toykit has no squares.")


PLAIN = Variant("plain", lambda case: square)


def rows_of(*variants, case=CASE, settings=FAST):
    return measure(case, [PLAIN, *variants], settings)


def test_red_gate_prints_no_time():
    (row,) = (r for r in rows_of(Variant("ours", lambda case: lambda x, y: _WrongGradient.apply(x, y))) if r.variant == "ours")
    assert (row.status, row.worst) == ("wrong", "d y")
    assert row.error == pytest.approx(0.01, rel=1e-3)
    assert row.limit < 1e-5
    assert row.ms is row.ratio is row.percent_of_floor is None
    assert "d y is off by 1.00e-02" in table.lines([row])[0]


@pytest.mark.parametrize(
    "bad", [lambda x, y: square(x, y) * float("nan"), lambda x, y: square(x, y)[:4], lambda x, y: square(x, y)[:, None]]
)
def test_nan_and_shapes_are_wrong(bad):
    (row,) = (r for r in rows_of(Variant("bad", lambda case: bad)) if r.variant == "bad")
    assert row.status in ("wrong", "crashed")
    assert row.ratio is None


def test_what_cannot_run_is_a_sentence():
    rows = rows_of(
        Variant("absent", lambda case: square, needs=("surely_not_installed.at_all",)),
        Variant("older", missing),
        Variant("picky", lambda case: square, lambda case: ["it takes cubes only."]),
        Variant("broken", lambda case: explode),
        Variant("jitted", lambda case: square, compiled=True),
        Variant("unwanted", lambda case: square),
        settings=dataclasses.replace(FAST, skip=("unwanted",)),
    )
    found = {row.variant: (row.status, row.note) for row in rows if row.variant != "plain"}
    assert found == {
        "absent": ("missing", "surely_not_installed.at_all is not installed."),
        "older": ("missing", "toykit has no squares."),
        "picky": ("unsupported", "it takes cubes only."),
        "broken": ("crashed", "RuntimeError: no kernel image is available."),
        "jitted": ("unsupported", harness.COMPILED_ON_CPU),
        "unwanted": ("skipped", "left out by --skip."),
    }
    assert [row.mode for row in rows if row.variant == "plain"] == ["fwd", "bwd", "both"]


def test_cpu_reports_ratios_and_nothing_else():
    rows = rows_of(Variant("twice", lambda case: square, ours=True))
    assert {(row.variant, row.mode) for row in rows} == {(v, m) for v in ("plain", "twice") for m in ("fwd", "bwd", "both")}
    for row in rows:
        assert row.baseline == "plain"
        assert row.ratio_p20 <= row.ratio <= row.ratio_p80
        assert row.ms is row.rate is row.peak_mb is row.percent_of_floor is None
        assert row.repetitions == 4
        if row.variant == "plain":
            assert row.ratio == row.ratio_p20 == row.ratio_p80 == 1


def test_no_ratio_without_its_baseline():
    rows = measure(CASE, [PLAIN], dataclasses.replace(FAST, baselines=("peer",)))
    assert {row.note for row in rows} == {"no ratio, because the baseline peer has no time."}
    assert all(row.ratio is None for row in rows)


class _Clock:
    """Every mark is 1 ms after the last one."""

    now = 0.0

    def ready(self):
        _Clock.now += 100

    def mark(self):
        _Clock.now += 1
        return _Clock.now

    def settle(self): ...

    def elapsed(self, a, b):
        return b - a


def test_cuda_rows(monkeypatch):
    """The CUDA path with a clock, a memory meter and a device check of the test's own; tensors stay on the CPU."""
    monkeypatch.setattr(timing, "EventClock", lambda lead: _Clock())
    monkeypatch.setattr(timing, "WallClock", lambda device: _Clock())
    monkeypatch.setattr(timing, "peak_mb", lambda call: (call(), 12.0)[1])
    monkeypatch.setattr(timing, "host_seconds", lambda call: (call(), 0.001)[1])
    monkeypatch.setattr(timing, "copies_for", lambda size, device: 3)
    monkeypatch.setattr(harness, "check_device", lambda *arguments: None)

    case = dataclasses.replace(CASE, device="cuda", make_inputs=lambda device, dtype, seed: CASE.make_inputs("cpu", dtype, seed))
    ones = [torch.ones(8)]
    monkeypatch.setattr("bench.gate.cotangents", lambda case: ones)
    monkeypatch.setattr("bench.harness.cotangents", lambda case: ones)
    settings = dataclasses.replace(FAST, ceilings=Ceilings(flops=1e10, bytes=1e10))
    rows = {row.mode: row for row in measure(case, [PLAIN], settings)}
    assert (rows["fwd"].ms, rows["bwd"].ms, rows["both"].ms) == (1, 1, 2)
    assert [rows[mode].percent_of_floor for mode in ("fwd", "bwd", "both")] == pytest.approx([20, 40, 30])
    assert (rows["both"].rate, rows["both"].unit, rows["both"].peak_mb) == (pytest.approx(4000), "rows", 12.0)
    assert rows["fwd"].rate is None
    assert rows["fwd"].copy_gbs == pytest.approx(10)


def test_variants_that_do_not_fit_together_live_one_after_another(monkeypatch):
    """Each is gone before the next is built; ratios are of the laps that they made apart, a sample, where each chose its batch."""
    monkeypatch.setattr(timing, "WallClock", lambda device: _Clock())
    alive = weakref.WeakSet()

    class Step:
        def __init__(self, batch):
            assert not alive, "another one still lives"
            alive.add(self)
            self.batch = batch

        def __call__(self, x, y):
            return square(x, y)

    case = dataclasses.replace(CASE, alone=True)
    variants = [Variant("plain", lambda case: Step(4)), Variant("ours", lambda case: Step(12))]
    rows = measure(case, variants, dataclasses.replace(FAST, least=3, most=9))
    found = {(row.variant, row.status, row.repetitions, row.batch, row.ratio) for row in rows}
    assert found == {("plain", "ok", 3, 4, 1), ("ours", "ok", 3, 12, 3)}


def test_gate_samples_rows():
    """With independent rows the truth is worked out for some, the variant runs all, and a fault in the last row is seen."""
    case = dataclasses.replace(CASE, per_row=("x", "y"), gate_rows=3)
    assert Gate(case).rows.tolist() == [0, 4, 7]

    def last_wrong(x, y):
        return square(x, y) * torch.tensor([1.0] * 7 + [1.5])

    assert not Gate(case).judge(PLAIN, last_wrong).passed
    assert Gate(case).judge(PLAIN, square).passed


def test_gate_follows_a_variants_layout():
    """A variant may hold its inputs otherwise; outputs and gradients are taken back before they are compared."""

    def adapt(case, inputs, upstream):
        return {name: value.T.contiguous() for name, value in inputs.items()}, upstream

    def restore(case, tensor):
        return tensor.T if tensor.dim() == 2 else tensor

    rows = rows_of(Variant("columns", lambda case: lambda x, y: (x * x * y).sum(0), adapt=adapt, restore=restore))
    assert {row.status for row in rows} == {"ok"}


@pytest.mark.parametrize(
    ("size", "free", "copies"), [(1 << 20, 80 << 30, 201), (1 << 30, 80 << 30, 1), (100, 80 << 30, 1024), (30 << 20, 60 << 20, 1)]
)
def test_inputs_rotate_over_four_caches(size, free, copies):
    assert timing.copies_needed(size, free, 50 << 20) == copies


def test_csv(tmp_path):
    rows = rows_of(Variant("absent", lambda case: square, needs=("surely_not_installed",)))
    read = list(csv.DictReader(io.StringIO(table.csv_text(rows))))
    assert list(read[0]) == table.COLUMNS
    assert {"family", "case", "variant", "mode", "dtype", "device", "ms", "ms_p20", "ms_p80", "ratio", "percent_of_floor"} <= set(read[0])
    assert {"peak_mb", "error", "limit", "status", "commit", "torch", "triton", "date"} <= set(read[0])
    assert read[0]["commit"] == "abc"
    assert {row["status"] for row in read} == {"ok", "missing"}
    first, second = (table.write_csv(rows, tmp_path) for _ in range(2))
    assert [p.relative_to(tmp_path).as_posix() for p in (first, second)] == ["test/2026-01-01-toy.csv", "test/2026-01-01-toy-2.csv"]
