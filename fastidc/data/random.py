"""Counter-based random numbers: every draw is a pure function of its keys.

A draw belongs to (seed, purpose, epoch, sample) and to nothing else, so the number of workers, the loader and a restart in the
middle of an epoch never change it, and there is no generator state to save.
"""

import hashlib

import numpy as np


def generator(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """A Philox stream that depends only on ``seed``, ``purpose`` and ``keys`` (epoch, sample id, ...), on any machine."""
    text = "\0".join([purpose, *(f"{type(key).__name__}:{key}" for key in keys)])
    digest = hashlib.blake2b(text.encode(), digest_size=16, key=int(seed).to_bytes(16, "little", signed=True)).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
