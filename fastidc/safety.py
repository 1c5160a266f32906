"""What a user sets about interruptions, broken numbers and bad images. Standard library only.

A run that goes on ends as if it had not been interrupted: on a CPU to the last bit. ``resume`` "auto" begins anew where there is no snapshot, "none"
refuses an ``out`` that holds something, and a path is that of a snapshot, or of the run that it belongs to.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Safety:
    """When a run saves itself, what it goes on from, and what it does where something fails."""

    save_every_steps: int | None = None
    """Save a snapshot every so many steps, besides those by the clock."""
    save_every_minutes: float = 10.0
    """Save a snapshot after so many minutes, at the next step or the end of an epoch; 0 turns the clock off."""
    keep: int = 2
    """Snapshots that stay, the newest ones. They lie in RUN/snapshots until the run is finished."""
    resume: str = "none"
    """auto goes on from the newest whole snapshot in --out, if any; or PATH."""
    on_save_error: Literal["stop", "continue"] = "stop"
    """Where a snapshot cannot be written (a full disk): stop with exit code 2, or go on and try again at the next one."""
    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """Where a loss or its gradient is not finite: stop, or, after --nonfinite-steps in a row, go back to the last snapshot with half the rate. Such
    a step is left out; on a GPU Muon and AdamW cannot leave it out without --precision fp16, and no snapshot is taken after it."""
    nonfinite_steps: int = 3
    """With --on-nonfinite rollback: so many steps in a row that are not finite."""
    on_bad_data: str = "raise"
    """Where an image is missing or cannot be decoded: raise ends the run; skip looks at all images first, in full, and leaves their pairs out; limit:N is
    skip, but ends the run where there are more than N bad pairs. RUN/left_out.json names them."""
    preemption_signal: str | None = None
    """A signal besides SIGTERM and SIGINT at which to finish the step, save and end, such as SIGUSR1 (Slurm's --signal); the exit code is 75."""
    watchdog: float | None = None
    """Say which process is where when a step, a batch or a score takes more than so many seconds."""
