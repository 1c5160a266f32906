"""Counter-based random numbers: every draw is a pure function of its keys.

A draw belongs to (seed, purpose, epoch, sample) and to nothing else, so the number of workers, the loader and a restart in the
middle of an epoch never change it, and there is no generator state to save.
"""

import hashlib
import threading

import numpy as np

_own = threading.local()


def generator(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """A Philox stream that depends only on ``seed``, ``purpose`` and ``keys`` (epoch, sample id, ...), on any machine."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(seed, purpose, *keys), "little")))


def briefly(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """`generator`'s stream, until this thread asks for another one: a fifth of its cost, which a loader pays for every sample."""
    if not hasattr(_own, "stream"):
        _own.stream = np.random.Generator(np.random.Philox(key=0))
        _own.start = _own.stream.bit_generator.state
    _own.start["state"]["key"] = np.frombuffer(_key(seed, purpose, *keys), dtype="<u8").astype(np.uint64)
    _own.stream.bit_generator.state = _own.start
    return _own.stream


def _key(seed: int, purpose: str, *keys: int | str) -> bytes:
    text = "\0".join([purpose, *(f"{type(key).__name__}:{key}" for key in keys)])
    return hashlib.blake2b(text.encode(), digest_size=16, key=int(seed).to_bytes(16, "little", signed=True)).digest()
