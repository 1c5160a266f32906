"""The command line, in which the second of two processes is killed after step 5 of torchrun's first attempt."""

import os
import signal
import sys

from resumed import at_step
from runs import main

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
sys.exit(main(sys.argv[1:]))
