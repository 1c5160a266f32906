"""Processes that are to be one group find each other in a store that may still know an earlier group's addresses.

torchrun keeps one store for all of its attempts: after a restart a process that comes early reads where a dead one listened, and is refused.
So every group gets a prefix of its own. The count of restarts cannot be that prefix, because torchrun's agents on several nodes count differently.
"""

import time
import uuid
from datetime import timedelta

from torch import distributed as dist

_NOW = "fastidc/group"
_PAUSE = 0.02  # seconds between two looks


def meet(store: dist.Store, rank: int, size: int, patience: timedelta) -> dist.Store:
    """``store`` under a prefix that the ``size`` processes which call this now have in common, and nobody before or after them.

    The first one proposes a name, the others answer with one of their own, and where the first has all answers it shows them: an answer that a
    process does not find there was another's, so the name is an old one. DistStoreError where not all have come in time.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    if rank == 0:
        store.set(_NOW, mine)
        answers = [_answer(mine, other) for other in range(1, size)]
        store.wait(answers, patience)
        store.set(f"{_NOW}/{mine}", b" ".join(store.get(answer) for answer in answers))
        return dist.PrefixStore(f"{_NOW}/{mine}", store)
    told = None
    while time.monotonic() < until:
        store.wait([_NOW], patience)
        name = store.get(_NOW).decode()
        if name != told:
            store.set(_answer(name, rank), mine)
            told = name
        if store.check([f"{_NOW}/{name}"]) and mine.encode() in store.get(f"{_NOW}/{name}").split():
            return dist.PrefixStore(f"{_NOW}/{name}", store)
        time.sleep(_PAUSE)
    raise dist.DistStoreError(f"process {rank} of {size} has waited for the first one for {patience}.")


def _answer(name: str, rank: int) -> str:
    return f"{_NOW}/{name}/{rank}"
