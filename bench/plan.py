"""What `bench.device` runs, in the order of its value, and how long each part is expected to take.

PREDICTED seconds on an H200 (nothing was timed on one yet; correct them by summary.md of the first run). They sum to less than nine minutes:

    part                   s   why
    machine               12   a process starts in about 8 s (torch from a cold disk, a CUDA context, the ceilings), and the first is the slowest
    tests                 50   goldens, every precision, three training steps of tiny models and twelve captured ones; first kernels
    train_step           250   4 cases: start 8, weights 3, two float64 truths 3, gates of 33 variants 16, builds 12; torch.compile 2 x 45 for adapt and
                               2 x 30 for finetune, 2 x 5 for its shallow gate, and 2 x 10 for our captioner; timing 14 + 14 at the paper's batches, which
                               alone have a bar for every feature, and 6 + 4 at the large ones
    largest               40   2 stages x 3 variants: about 8 trial steps of up to 0.5 s, 8 timed ones, and a build
    attention             68   10 shapes at 1,024 pairs: start 8, 3 each for gate, warm-up and 20 to 200 laps; FlexAttention compiled for 5 of them, 6 each
    linear_cross_entropy  22   2 cases: start 8, and 7 each, of which 4 compile
    info_nce              28   2 cases: start 8, and 10 each, of which 8 compile
    generate              40   1 case: start 8, weights 3, gates 5, A's 32 steps without a cache 8 x 0.5, two CUDA graphs 2 x 8
    small                 26   start 8 for all three, the optimiser 6, LayerNorm 2 x 4, patches 4; steps fed by a loader, products and the loader have their place in small-rest
                         536

The parts that end in "-rest" are the same families without a choice of cases; they get what is left, and go on in the next call with --resume.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 1.5  # a part may take so many times what was predicted, as long as the later ones keep their least


@dataclass(frozen=True)
class Part:
    """One process. ``seconds``: predicted; ``least``: seconds below which it is not begun, which earlier parts leave to it."""

    name: str
    command: tuple[str, ...]
    seconds: float
    least: float = 20
    rows: bool = True  # bench families, which write rows
    rest: bool = False  # takes what is left, and has nothing left to it
    always: bool = False  # also in a call that resumes after it was done


def box(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds that ``part`` may take of those that are ``left``."""
    reserved = sum(other.least for other in later if not other.rest)
    return left if part.rest else max(part.least, min(left - reserved, PATIENCE * part.seconds))


_KERNEL_TESTS = (
    *(f"tests/ops/test_{op}_calls.py" for op in ("bert_adam", "info_nce", "linear_cross_entropy")),
    "tests/ops/test_patches_gpu.py",
    *(f"tests/ops/test_attention{part}.py" for part in ("", "_memory", "_dropout", "_calls")),
)
_PYTEST = ("-m", "pytest", "-m", "gpu", "-rA", "--tb=short", "-p", "no:cacheprovider")
_LONG = ("intra B/16 L=197 H=12", "inter B/16 L=394 H=12", "intra L/14 L=257 H=16", "inter L/14 L=514 H=16")  # the libraries' own ground
_STEPS = ("B/32 adapt B=128", "B/32 finetune B=16", "B/32 adapt B=1024", "B/32 finetune B=256")
_SMALL = ("optimizer", "layer_norm", "patches", "feeding", "products", "loader")
_SMALL_CASES = ("adapt B/32", "B/32 M=102400 ", "B/32 P=32 224x224 K=2048")


def parts(cpu: bool) -> list[Part]:
    """``cpu`` is a rehearsal without a GPU, with tiny shapes and every case."""

    def bench(
        name: str, families: tuple[str, ...], seconds: float, least: float, only: Sequence[str] = (), skip: Sequence[str] = ()
    ) -> Part:
        chosen = [word for flag, values in (("--only", only), ("--skip", skip)) for value in values for word in (flag, value)]
        return Part(name, ("-m", "bench", *families, *(("--smoke",) if cpu else chosen)), seconds, least)

    def rest(*families: str) -> Part:
        smoke = ("--smoke",) if cpu else ()
        return Part(f"{families[0] if len(families) == 1 else 'small'}-rest", ("-m", "bench", *families, *smoke), 600, 25, rest=True)

    return [
        Part("machine", ("-c", _MACHINE), 12, 10, rows=False, always=True),
        Part("tests", (*_PYTEST, "tests/test_gpu.py", "tests/train/test_graphs.py", "tests/data/test_resident.py"), 50, 20, rows=False),
        bench("train_step", ("train_step",), 250, 80, _STEPS),
        bench("largest", ("train_step",), 40, 20, ("B=max",)),
        bench("attention", ("attention",), 68, 40, ("n=1024",), tuple(f"{name} n=1024::flex_attention" for name in _LONG)),
        bench("linear_cross_entropy", ("linear_cross_entropy",), 22, 15, ("frozen N=14336", "trained N=14336")),
        bench("info_nce", ("info_nce",), 28, 18, ("B=1024 D=512", "B=16384 D=512")),
        bench("generate", ("generate",), 40, 25, ("B/32 b=64 ",), ("B/32 b=64 32 steps::fastidc compiled",)),
        bench("small", _SMALL[:3], 26, 25, _SMALL_CASES),
        # the gates of the families have seen the paper's shapes; this is every other one, at a second or two of compiling each
        Part("kernel-tests", (*_PYTEST, *_KERNEL_TESTS), 200, 30, rows=False, rest=True),
        rest("train_step"),
        rest("attention"),
        rest("generate"),
        rest("linear_cross_entropy"),
        rest("info_nce"),
        rest(*_SMALL),
        Part("aot", ("-m", "bench.aot", "--arch", "sm_90"), 120, 20, rows=False, rest=True),
    ]


# A process of its own, because a broken driver must not take the others with it.
_MACHINE = """
import json, platform, sys
import torch
from bench import machine, timing
out = {"python": sys.version.split()[0], "platform": platform.platform(), "torch": torch.__version__, "cuda": torch.version.cuda}
for name in ("triton", "cupy-cuda12x", "cupy-cuda13x", "open_clip_torch", "xformers", "nvidia-dali-cuda130", "liger-kernel", "cut-cross-entropy", "inf-cl", "pytest"):
    out[name] = machine.version(name)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    out |= {"device": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "multiprocessors": p.multi_processor_count, "capability": f"{p.major}.{p.minor}"}
    c = timing.ceilings()
    out |= {"copy_gbs": round(c.bytes / 1e9), "matmul_tflops": round(c.flops / 1e12, 1)}
else:
    out["device"] = "no CUDA device"
print("MACHINE " + json.dumps(out))
"""
