"""Runs of half a second, each in a process of its own that a fault can hit, and what has to be true of what they leave."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import runs

from fastidc.errors import FastidcError
from fastidc.train import snapshot
from fastidc.train.ledger import check_ledger

ROOT = Path(__file__).resolve().parents[2]
USUAL = {
    "preset": "clevr", "lr": 1e-2, "coef_lr": 0.1, "epochs": 2, "device": "cpu", "precision": "fp32", "workers": 1, "seed": 5,
    "select": "val", "resume": "auto",
}  # fmt: skip
BATCH = {"adapt": 4, "finetune": 2}  # with either four steps an epoch
STEPS = 8


@dataclass
class Ended:
    """A process that has ended: its exit code (the signal's number below 0), what it said, and its notes (`server._takes_notes`)."""

    code: int
    said: str
    notes: list[str]

    def of(self, kind: str) -> list[int]:
        return [int(line.split()[1]) for line in self.notes if line.startswith(f"{kind} ")]


class Server:
    """The process that forks; see `tests.faults.server`."""

    def __init__(self, **environment: str):
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "tests.faults.server"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self._process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings | environment, **pipes)
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the server of forks did not start")

    def ask(self, **job):
        self._process.stdin.write(json.dumps(job) + "\n")
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(60)  # it has all the models of a long suite to let go of, beside others' work
        except subprocess.TimeoutExpired:
            self._process.kill()


@dataclass
class Running:
    server: Server
    pid: int
    log: Path
    notes_file: Path

    def notes(self) -> list[str]:
        return self.notes_file.read_text().splitlines() if self.notes_file.exists() else []

    def until(self, note: str, seconds: float = 60) -> bool:
        """Waits for a note; False where the process has ended before. (It stays to be waited for.)"""
        end = time.monotonic() + seconds
        while note not in self.notes():
            if time.monotonic() > end or _is_over(self.pid):
                return note in self.notes()
            time.sleep(0.002)
        return True

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)  # not waited for yet, so the number is nobody else's

    def wait(self, seconds: float = 120) -> Ended:
        code = self.server.ask(wait=self.pid, seconds=seconds)
        if code is None:
            self.send(signal.SIGKILL)
            self.server.ask(wait=self.pid, seconds=10)
            raise TimeoutError(f"a run hangs: {self.log.read_text(errors='replace')[-1000:]}")
        return Ended(code, self.log.read_text(errors="replace"), self.notes())


def _is_over(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@dataclass
class Toy:
    """A data set, a start and a folder for what is done with them; a context manager."""

    root: Path
    data: Path
    start: Path
    server: Server
    _alone: dict = field(default_factory=dict)
    _seconds: dict = field(default_factory=dict)
    _count: int = 0

    @classmethod
    def make(cls, **environment: str) -> "Toy":
        root = Path(tempfile.mkdtemp(prefix="faults-"))
        server = Server(**environment)  # before this process has threads of torch's
        return cls(root, *runs.world(root), server)

    def __enter__(self) -> "Toy":
        return self

    def __exit__(self, *exception) -> None:
        self.server.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def flags(self, stage: str, out: Path, **more) -> list[str]:
        values = {"data": self.data, "init": self.start, "out": out, **USUAL, "batch_size": BATCH[stage], **more}
        given = ((f"--{name.replace('_', '-')}", value) for name, value in values.items() if value is not None)
        return [stage, *(word for name, value in given for word in ([name] if value is True else [name, str(value)]))]

    def begin(self, arguments: list[str], prepare: list = (), **environment: str) -> Running:
        """prepare: [module, function, values] each, called in the new process before its run begins."""
        self._count += 1
        log, notes = self.root / f"{self._count}.log", self.root / f"{self._count}.notes"
        job = {"arguments": arguments, "log": str(log), "notes": str(notes), "prepare": list(prepare), "environment": environment}
        return Running(self.server, self.server.ask(**job), log, notes)

    def run(self, arguments: list[str], prepare: list = (), seconds: float = 120, **environment: str) -> Ended:
        return self.begin(arguments, prepare, **environment).wait(seconds)

    def well(self, arguments: list[str], prepare: list = (), seconds: float = 120) -> Ended:
        ended = self.run(arguments, prepare, seconds)
        assert ended.code == 0, f"exit code {ended.code}: {ended.said[-1500:]}"
        return ended

    def alone(self, stage: str, prepare: list = (), seconds: float = 120, **more) -> Path:
        """What nothing interrupted left; made once."""
        key = json.dumps([stage, list(prepare), more], sort_keys=True, default=str)
        if key not in self._alone:
            out = self.root / f"alone-{len(self._alone)}"
            self._alone[key] = out, self.well(self.flags(stage, out, **more), prepare, seconds)
        return self._alone[key][0]

    def seconds(self, stage: str) -> float:
        """That such a run takes from its fork to its end."""
        if stage not in self._seconds:
            self.alone(stage, save_every_steps=2)  # what only the first one does
            begun = time.monotonic()
            self.well(self.flags(stage, self.folder("timed"), save_every_steps=2))
            self._seconds[stage] = time.monotonic() - begun
        return self._seconds[stage]

    def folder(self, name: str) -> Path:
        out = self.root / name
        shutil.rmtree(out, ignore_errors=True)
        return out

    def check(self, out: Path, alone: Path, batch_size: int) -> None:
        """Every file is that of the run left alone, and the ledger proves that each sample was read once an epoch; ``out`` goes."""
        left, expected = (sorted(p.name for p in folder.iterdir()) for folder in (out, alone))
        assert left == expected, f"files {left} instead of {expected}"
        runs.check_same_run(out, alone)
        check_ledger(out / "ledger.jsonl", batch_size, STEPS // 2)
        shutil.rmtree(out)


def check_snapshots(out: Path) -> None:
    """Whatever has a snapshot's name is one."""
    for path in snapshot.found(out / snapshot.FOLDER):
        try:
            snapshot.read(path)
        except FastidcError as error:
            raise AssertionError(f"under its name a snapshot is whole: {error}") from None


def check_sentence(ended: Ended) -> None:
    """Exit code 2, and one sentence of ours without a traceback."""
    assert "Traceback" not in ended.said, ended.said[-1500:]
    assert ended.code == 2, f"exit code {ended.code}: {ended.said[-1500:]}"
    last = [line for line in ended.said.replace("\r", "\n").splitlines() if line.startswith("fastidc: ")]
    assert last, f"no sentence: {ended.said[-1500:]}"
    assert last[-1].endswith((".", ".)")), last[-1]


_shared: list[Toy] = []


def shared() -> Toy:
    """One for all faults of this process."""
    import atexit

    if not _shared:
        _shared.append(Toy.make())
        atexit.register(_shared[0].__exit__)
    return _shared[0]
