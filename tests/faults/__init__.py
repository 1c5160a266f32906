"""What interrupts, breaks or fills up a run, often and by seed: `python -m tests.faults`."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parents[1]
for _part in (_TESTS.parent / "kernels", _TESTS.parent, _TESTS, _TESTS / "train", _TESTS / "data"):
    if str(_part) not in sys.path:
        sys.path.insert(0, str(_part))

at_end: list = []
"""Called in a forked run when it is over, however it ended but for a signal."""
