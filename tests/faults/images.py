"""Image files, bad ones of every kind and good ones spoilt at random: Pillow's loader, DALI's (on the CPU) and a cache give the same pixels or the
same sentence, which names the file."""

import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import bad_images
import numpy as np

from fastidc.data.cache import Cache
from fastidc.data.cache_build import build
from fastidc.data.images import ImageStore, Pixels
from fastidc.data.limits import shown
from fastidc.data.patience import Pool
from fastidc.errors import FastidcError
from tests.faults.spoiling import spoilt_bytes
from tests.faults.tally import Tally

SIZE = 32


def run(seed: int, count: int) -> dict:
    """``count`` files by three ways of reading: those of `bad_images`, and after them spoilt ones, case n by seed n."""
    tally = Tally("images", seed, count)
    with tempfile.TemporaryDirectory() as made, Pool(1) as pool, warnings.catch_warnings():
        warnings.simplefilter("error")  # none may be heard
        files, sources = list(bad_images.make(Path(made) / "images").values()), _sources()
        whole = [path.read_bytes() for path in files if path.name in bad_images.GOOD]
        for case in tally.seeds():
            path = files[case] if case < len(files) else _spoilt(Path(made) / f"{case}.img", whole, random.Random(case))
            with tally.case(case):
                verdicts = {name: _said(_read, source, path, pool) for name, source in sources.items()}
                verdicts["cache"] = _said(_cached, path, Path(made))
                first = verdicts["pillow"]
                for name, verdict in verdicts.items():
                    assert np.array_equal(verdict, first), f"{path.name}: {name} says {_brief(verdict)}, and Pillow {_brief(first)}"
                if isinstance(first, str):
                    assert first.startswith(shown(path)), first
                tally.add("refused" if isinstance(first, str) else "read")
    return tally.result()


def _sources() -> dict:
    from fastidc.data.dali import DaliImages

    return {"pillow": ImageStore(SIZE, max_bytes=0), "dali": DaliImages(SIZE, "cpu", threads=1)}


def _spoilt(path: Path, whole: list[bytes], draw: random.Random) -> Path:
    path.write_bytes(spoilt_bytes(draw.choice(whole), draw, draw.choice(whole)))
    return path


def _read(source: Pixels, path: Path, pool: Pool) -> np.ndarray:
    return source.start([[path]], pool)()[0, 0].numpy()


def _cached(path: Path, folder: Path) -> np.ndarray:
    out = folder / "one.bin"
    out.unlink(missing_ok=True)
    build([path], folder, out, SIZE, 1, report=lambda sentence: None, progress=False)
    return np.array(Cache(out).pixels[0])


def _said(read: Callable[..., np.ndarray], *given) -> np.ndarray | str:
    """Pixels, or the sentence as far as every reader has it: a cache adds how to go on with its build."""
    try:
        return read(*given)
    except FastidcError as refusal:
        return str(refusal).partition(";")[0].rstrip(".")


def _brief(verdict) -> str:
    return verdict if isinstance(verdict, str) else "pixels"
