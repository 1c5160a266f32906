"""The command line, in which the second of two processes is killed after step 5 of torchrun's first attempt.

In the second attempt the first process comes late, so the other one looks for it where it was before.
"""

import os
import signal
import sys
import time

from resumed import at_step
from runs import main

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGKILL))
if os.environ["RANK"] == "0" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
    time.sleep(3)
sys.exit(main(sys.argv[1:]))
