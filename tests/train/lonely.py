"""One of two processes of a run; the one named dies in the middle. test_contrast.py starts both."""

import os
import signal
import sys

import torch
from torch import distributed as dist

from fastidc.errors import FastidcError
from fastidc.train.distributed import processes, speaks

DIES = int(sys.argv[1])
try:
    with processes("cpu") as (world, _):
        for step in range(100):
            if world.rank == DIES and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            dist.all_reduce(torch.ones(4))
except FastidcError as error:
    if speaks(error):
        print(error, file=sys.stderr)
    sys.exit(2)
