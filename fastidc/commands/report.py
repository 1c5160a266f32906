"""`fastidc report`: a run on one page."""

from pathlib import Path
from typing import Literal

from fastidc.errors import FastidcError


def report(
    run_dir: Path,
    /,
    *,
    data: Path | None = None,
    out: Path | None = None,
    pairs: int = 400,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resamples: int = 1000,
) -> None:
    """A run as one HTML page: curves, scores, and pairs with captions and maps.

    It needs no network and no other file.

    Example: fastidc report runs/finetune --out report.html

    Args:
        run_dir: RUN_DIR, the folder of `fastidc adapt` or `fastidc finetune`.
        data: The data, where they are not where the run had them.
        out: The page; RUN_DIR/report.html by default.
        pairs: Pairs of the test split to show; all pictures stay below 20 MB.
        device: Where the model runs, for the attention maps.
        resamples: Of the bootstrap over pairs; 0 leaves the intervals out.
    """
    from fastidc.commands.caption import say
    from fastidc.report import write_run_report

    for flag, value, least in (("--pairs", pairs, 1), ("--resamples", resamples, 0)):
        if value < least:
            raise FastidcError(f"{flag} must be at least {least}, got {value}.")
    if out is not None and out.is_dir():
        raise FastidcError(f"{out}: a folder; --out names a file, as in --out {out / 'report.html'}.")
    path = write_run_report(run_dir, out, data=data, pairs=pairs, device=device, resamples=resamples, say=say)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
