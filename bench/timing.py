"""Clocks, what is done around a timed call, and the ceilings of the device. Small on purpose: this is the part to distrust.

A clock has ``ready()`` before a call, ``mark()`` between its parts, ``settle()`` after all calls and ``elapsed(a, b)`` in milliseconds.
"""

import gc
import time
from statistics import median

import torch

from bench.roofline import Ceilings

CYCLES = 2.0e9  # a second of the device's clock, roughly: the head start need not be exact
LONGEST_LEAD = 0.005  # seconds


class EventClock:
    """CUDA events: the device's own time between two points of its queue.

    ``lead`` seconds of idling on the device come before every call, so that the host has queued the whole call when its first kernel
    starts; what is measured then is kernels and not launches. With lead 0 a call that the host cannot feed fast enough shows it.
    """

    def __init__(self, lead: float):
        self.cycles = int(min(lead, LONGEST_LEAD) * CYCLES)

    def ready(self) -> None:
        if self.cycles:
            torch.cuda._sleep(self.cycles)

    def mark(self):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def settle(self) -> None:
        torch.cuda.synchronize()

    def elapsed(self, a, b) -> float:
        return a.elapsed_time(b)


class WallClock:
    """The host's clock, from idle to idle: for CPUs, and for whole steps with all that their host does."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def ready(self) -> None:
        self.settle()

    def mark(self) -> float:
        self.settle()
        return time.perf_counter()

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def elapsed(self, a: float, b: float) -> float:
        return (b - a) * 1e3


def host_seconds(call) -> float:
    """How long the host takes to queue ``call()``; the device may still be at work."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def copies_needed(size: int, free: int, cache: int) -> int:
    """How many copies of ``size`` bytes of inputs to rotate: more than four times the last cache, within a fifth of the free memory."""
    return max(1, min(4 * cache // max(size, 1) + 1, free // 5 // max(size, 1), 1024))


def copies_for(size: int, device: str) -> int:
    if device != "cuda":
        return 1
    cache = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20)
    return copies_needed(size, torch.cuda.mem_get_info()[0], cache)


def release(device: str) -> None:
    """Gives back what was let go of: models and their schedules are cycles, and their memory lies in blocks of other sizes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def allocated_mb(device: str) -> float:
    return torch.cuda.memory_allocated() / 1e6 if device == "cuda" else 0.0


def peak_mb(call) -> float:
    """Megabytes that ``call()`` held at its worst beyond what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def _median_seconds(call, repetitions: int) -> float:
    for _ in range(3):
        call()
    clock, marks = EventClock(0), []
    for _ in range(repetitions):
        start = clock.mark()
        call()
        marks.append((start, clock.mark()))
    clock.settle()
    return median(clock.elapsed(a, b) for a, b in marks) / 1e3


def ceilings() -> Ceilings:
    """What this device reaches here and now; its clocks and its temperature are part of it."""
    measured = Ceilings(flops=_product_rate(), bytes=_copy_rate())
    torch.cuda.empty_cache()
    return measured


def _copy_rate() -> float:
    """Bytes read and written a second, of 2 GiB."""
    source = torch.randn(1 << 30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _median_seconds(lambda: target.copy_(source), 15)


def _product_rate() -> float:
    """FLOPs a second of an 8192^3 bf16 product; random data, because zeros draw less power and run faster."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return 2 * 8192**3 / _median_seconds(lambda: torch.mm(a, b, out=out), 15)
