"""Where a run begins: in a new folder, or where an earlier one ended."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastidc import checkpoint
from fastidc.config import TrainOptions
from fastidc.data.bad_data import most_of
from fastidc.data.records import read_json
from fastidc.errors import FastidcError
from fastidc.files import aside, exclusive
from fastidc.train import snapshot
from fastidc.train.ledger import LEDGER_FILE
from fastidc.train.signals import check_signal

LOG_FILE, SCORES_FILE, METRICS_FILE = "log.jsonl", "scores.jsonl", "metrics.json"
LOCK_FILE = ".lock"  # of the process that writes here


def check_safety(options: TrainOptions) -> None:
    """FastidcError where what a user wants of snapshots cannot be."""
    for field, least in (("save_every_steps", 1), ("keep", 1), ("nonfinite_steps", 1), ("save_every_minutes", 0)):
        value = getattr(options, field)
        if value is not None and not value >= least:
            raise FastidcError(f"--{field.replace('_', '-')} must be at least {least}, got {value}.")
    if options.watchdog is not None and not options.watchdog > 0:
        raise FastidcError(f"--watchdog must be a number of seconds above 0, got {options.watchdog}.")
    most_of(options.on_bad_data)
    if options.preemption_signal is not None:
        check_signal(options.preemption_signal)


def wanted(options: TrainOptions) -> str:
    """``options.resume``; processes that torchrun started again go on by themselves."""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")
    return "auto" if again and options.resume == "none" else options.resume


def is_finished(out: Path) -> bool:
    """Whether ``out`` holds a run that has ended: its metrics are what it writes last."""
    return all((out / name).is_file() for name in (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, METRICS_FILE))


def finished_metrics(out: Path, stage: str, asked: Mapping[str, Any]) -> dict | None:
    """The metrics of the finished run in ``out``, None where there is none; FastidcError where it is one of the other stage, or its recipe has
    other values than those ``asked`` for, None being no value."""
    if not is_finished(out):
        return None
    config = checkpoint.read_config(out)
    recipe = config.get("recipe") or {}
    theirs, mine = {"stage": config.get("stage"), **recipe}, {"stage": stage, **{k: v for k, v in asked.items() if v is not None}}
    for field, value in mine.items():
        if theirs.get(field) != value:
            raise FastidcError(
                f"{out}: holds a finished run with {field} {theirs.get(field)}, and this one has {value}; choose another --out."
            )
    _tidy(out)
    return read_json(out / METRICS_FILE)


def _tidy(out: Path) -> None:
    """Takes away what a kill has left of a finished run besides its files; not where another process is just about to, or nobody can."""
    if (out / LOCK_FILE).exists() or (out / snapshot.FOLDER).exists():
        with suppress(FastidcError, OSError), exclusive(out / LOCK_FILE, str(out), lenient=True):
            snapshot.clear(out / snapshot.FOLDER)
            _sweep(out)


@dataclass
class Start:
    """What to go on from: a verified snapshot, and the run folder that it is of."""

    snapshot: snapshot.Snapshot
    run: Path


def find(resume: str, out: Path, say: Callable[[str], None]) -> Start | None:
    """What ``--resume`` means for ``--out``: None where a run begins anew. FastidcError where a path holds nothing to go on from, and where not one
    of several snapshots is whole."""
    if resume == "none":
        return None
    path = out if resume == "auto" else Path(resume)
    if (path / snapshot.MANIFEST).is_file():
        return Start(snapshot.read(path), path.resolve().parent.parent)
    folder = path / snapshot.FOLDER
    if (found := snapshot.newest(folder, say)) is not None:
        return Start(found, path)
    if snapshot.found(folder):
        raise FastidcError(
            f"{folder}: holds no whole snapshot to go on from; begin anew in another --out, or add --overwrite --resume none."
        )
    if resume != "auto":
        raise FastidcError(f"{path}: holds no snapshot; --resume takes a snapshot, a run that was interrupted, auto or none.")
    return None


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Keeps other runs out of the folder ``out`` while the block runs; it is made where it is not there. FastidcError where another run has it.
    What a killed run leaves of its lock holds nothing."""
    if out.exists() and not out.is_dir():
        yield  # `prepare_folder` says so
        return
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _no_folder(out, error) from None
    try:
        with exclusive(out / LOCK_FILE, str(out), lenient=True):
            yield
    finally:
        if is_new:
            with suppress(OSError):  # something is in it
                out.rmdir()


def _no_folder(out: Path, error: OSError) -> FastidcError:
    return FastidcError(f"{out}: the run folder cannot be made ({error.strerror or error}); choose another --out.")


def prepare_folder(out: Path, overwrite: bool, resume: str = "none") -> None:
    """Makes ``out``; refuses one that already holds something, unless it may be replaced, and one that cannot be made. With ``resume`` auto a run
    that ended before its first snapshot is replaced; there must be none."""
    try:
        _prepare_folder(out, overwrite, resume)
    except OSError as error:
        raise _no_folder(out, error) from None


def check_folder(out: Path, overwrite: bool, resume: str = "none") -> bool:
    """Whether there is an earlier run in ``out`` to be taken away; FastidcError where `prepare_folder` would refuse."""
    if out.exists() and (not out.is_dir() or any(_of_somebody(out))):
        is_run = out.is_dir() and (out / checkpoint.CONFIG_FILE).is_file()
        interrupted = is_run and not is_finished(out)
        if not overwrite and not (resume == "auto" and interrupted):
            if interrupted and snapshot.found(out / snapshot.FOLDER):
                raise FastidcError(f"{out}: holds an interrupted run; go on with --resume auto, choose another --out, or add --overwrite.")
            if interrupted:
                raise FastidcError(
                    f"{out}: holds a run that ended before its first snapshot; choose another --out, or begin it anew with --resume auto or --overwrite."
                )
            raise FastidcError(f"{out}: already exists and is not empty; choose another --out, or add --overwrite.")
        if not is_run:
            raise FastidcError(f"{out}: --overwrite replaces a fastidc run, and this is none; choose another --out.")
        return True
    return False


def _prepare_folder(out: Path, overwrite: bool, resume: str) -> None:
    if check_folder(out, overwrite, resume):
        for path in (path for path in out.iterdir() if path.name != LOCK_FILE):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    _sweep(out)


def _sweep(out: Path) -> None:
    for path in out.iterdir():
        if _is_half_written(path):
            path.unlink(missing_ok=True)


def _of_somebody(out: Path) -> list[Path]:
    """What is in ``out`` besides the lock and what a kill left of a file that was being written."""
    return [path for path in out.iterdir() if path.name != LOCK_FILE and not _is_half_written(path)]


def _is_half_written(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")


def take_over(start: Start, out: Path) -> None:
    """Makes ``out`` what it was at the snapshot, as far as files go: the best epoch's weights are again those of then, later snapshots are set
    aside. A snapshot of another run goes on in ``out`` with that one's log and ledger."""
    step = start.snapshot.state["step"]
    if start.run.resolve() != out.resolve():
        for name in (LOG_FILE, SCORES_FILE, LEDGER_FILE):
            if (start.run / name).is_file():
                _copy(start.run / name, out / name)
    best = start.snapshot.path / snapshot.BEST
    if best.is_file():
        _copy(best, out / checkpoint.WEIGHTS_FILE)
    else:  # of an epoch that is yet to come
        (out / checkpoint.WEIGHTS_FILE).unlink(missing_ok=True)
    snapshot.sweep(out / snapshot.FOLDER)
    snapshot.set_aside(out / snapshot.FOLDER, step)
    _sweep(out)


def _copy(file: Path, to: Path) -> None:
    with aside(to) as temporary:
        shutil.copyfile(file, temporary)
