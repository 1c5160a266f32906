"""Groups that use one store one after the other, as torchrun's attempts do."""

import threading
import time
from datetime import timedelta

import pytest
from torch import distributed as dist

from fastidc.train.meeting import meet

SIZE = 3


def group(store, late: int = 0, patience: float = 20.0) -> list[dist.Store]:
    """What each of `SIZE` processes gets; the process ``late`` comes after the others."""
    got: list = [None] * SIZE

    def come(rank: int) -> None:
        time.sleep(0.2 * (rank == late))
        got[rank] = meet(store, rank, SIZE, timedelta(seconds=patience))

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return got


@pytest.mark.parametrize("late", range(SIZE))
def test_a_group_does_not_see_what_an_earlier_one_wrote(late):
    store = dist.HashStore()
    for number in range(3):
        ranks = group(store, late)
        assert not any(each.check(["address"]) for each in ranks)
        ranks[0].set("address", str(number))
        assert [each.get("address").decode() for each in ranks] == [str(number)] * SIZE


def test_an_attempt_that_failed_half_way_leaves_nothing():
    """Its first process has proposed a name, its second one has answered and died; the third one never came."""
    store = dist.HashStore()
    with pytest.raises(dist.DistError):
        meet(store, 0, SIZE, timedelta(seconds=0.2))
    with pytest.raises(dist.DistStoreError, match="process 1 of 3 has waited"):
        meet(store, 1, SIZE, timedelta(seconds=0.2))
    first, *others = group(store)
    first.set("address", "here")
    assert all(each.get("address") == b"here" for each in others)
