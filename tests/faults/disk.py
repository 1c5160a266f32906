"""Disks that fail at the k-th call to them: full, broken, read-only, over a quota, slow, gone; by a library before libc's (shim.c), and a real small
file system where one may be mounted. A run stops with one sentence, or goes on where it may; what it had saved is whole, and it goes on to the
same bits when the disk is well."""

import ctypes
import json
import os
import random
import resource
import shutil
import subprocess
from pathlib import Path

from safetensors.torch import load_file

import tests.faults
from fastidc.data.cache import Cache
from tests.faults.tally import Tally
from tests.faults.toy import BATCH, Ended, Toy, check_sentence, check_snapshots

KINDS = ("full", "io", "read-only", "quota", "slow", "vanished")
SITES = {
    "snapshots": "/snapshots/",
    "log": "/log.jsonl",
    "ledger": "/ledger.jsonl",
    "scores": "/scores.jsonl",
    "metrics": "metrics.json",
    "model": "model.safetensors",
    "config": "config.json",
    "captions": "hyp_test.json",
    "anything": "",
    "cache": "",
}  # what a path holds after that of the run folder; of temporary files too
EVERY = 3


def arm(root: str, needle: str, kind: int, at: int) -> None:
    ctypes.CDLL(None).faults_arm(root.encode(), needle.encode(), kind, ctypes.c_long(at))


def count_into(file: str) -> None:
    tests.faults.at_end.append(lambda: Path(file).write_text(str(ctypes.CDLL(None).faults_count())))


def limit(size: int) -> None:
    """No file may have more bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def check_whole(out: Path) -> None:
    """No file under its own name is half a file."""
    check_snapshots(out)
    for path in out.glob("*.json"):
        json.loads(path.read_text())
    for path in out.glob("*.safetensors"):
        load_file(path)


class Disk:
    """The toy with the shim before its libc."""

    def __init__(self) -> None:
        self.library = Path(os.environ.get("TMPDIR", "/tmp")) / f"faults-{os.getpid()}.so"
        source = Path(__file__).with_name("shim.c")
        command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(self.library), str(source), "-ldl"]
        subprocess.run(command, check=True, capture_output=True)
        self.toy = Toy.make(LD_PRELOAD=str(self.library))
        self._counts: dict[str, int] = {}

    def close(self) -> None:
        self.toy.__exit__()
        self.library.unlink()

    def line(self, site: str, out: Path, **more) -> list[str]:
        if site == "cache":
            return ["cache", "build", "--data", str(self.toy.data), "--out", str(out / "cache.bin"), "--size", "32"]
        return self.toy.flags("finetune", out, save_every_steps=EVERY, **more)

    def alone(self) -> Path:
        return self.toy.alone("finetune", save_every_steps=EVERY)

    def calls(self, site: str) -> int:
        """That are made to the disk when nothing is wrong."""
        if site not in self._counts:
            out, file = self.toy.folder("counted"), self.toy.root / "count"
            prepare = [[__name__, "arm", {"root": str(out), "needle": SITES[site], "kind": 0, "at": 0}]]
            self.toy.well(self.line(site, out), [*prepare, [__name__, "count_into", {"file": str(file)}]])
            self._counts[site] = int(file.read_text())
            assert self._counts[site] > 0, site
        return self._counts[site]

    def check_end(self, site: str, out: Path) -> None:
        """The same command ends well now, and leaves what it leaves on a disk that is well."""
        self.toy.well(self.line(site, out))
        if site == "cache":
            expected = self.toy.root / "cache"
            if not expected.exists():
                self.toy.well(self.line(site, expected))
            left, meant = ({p.name: _pixels(p) for p in folder.iterdir()} for folder in (out, expected))
            assert left == meant, f"{sorted(left)} instead of {sorted(meant)}"
            shutil.rmtree(out)
        else:
            self.toy.check(out, self.alone(), BATCH["finetune"])


def _pixels(file: Path) -> tuple[list, bytes]:
    """Of a cache, all but the time at which it was built."""
    found = Cache(file)
    return found.entries, found.pixels.tobytes()


def check_stopped(tally: Tally, ended: Ended, out: Path, may_end: bool) -> None:
    if ended.code == 0 and may_end:
        tally.add("went on to the end")
        return
    check_sentence(ended)
    named = [line for line in ended.said.splitlines() if line.startswith("fastidc: ")][-1]
    assert str(out.parent) in named, f"names no file: {named}"
    tally.add("stopped with a sentence")


def strike(disk: Disk, tally: Tally, seed: int) -> None:
    draw = random.Random(f"disk {seed}")
    kind = seed % len(KINDS)
    site = draw.choice(list(SITES))
    at = draw.randint(1, disk.calls(site))
    goes_on = draw.random() < 0.3 and site != "cache"
    name = f"{KINDS[kind]} at call {at} of {disk.calls(site)} to {site}"
    disk.toy.alone("finetune", save_every_steps=EVERY)
    out = disk.toy.folder(f"disk-{seed}")
    gone = out.with_name(f"{out.name}.gone")
    prepare = [[__name__, "arm", {"root": str(out), "needle": SITES[site], "kind": kind, "at": at}]]
    try:
        ended = disk.toy.run(disk.line(site, out, **({"on_save_error": "continue"} if goes_on else {})), prepare)
        tally.add(KINDS[kind])
        if KINDS[kind] == "slow":
            assert ended.code == 0, f"exit code {ended.code}: {ended.said[-1500:]}"
        else:
            check_stopped(tally, ended, out, may_end=KINDS[kind] != "vanished" or not gone.exists() or site == "cache")
        if gone.exists():
            assert not out.exists() or not any(out.iterdir()), f"it went on in a new folder: {sorted(p.name for p in out.iterdir())}"
            shutil.rmtree(out, ignore_errors=True)
            gone.rename(out)
        if out.exists():
            check_whole(out)
        disk.check_end(site, out)
    except Exception as error:
        raise AssertionError(f"{name}{', which it may go on after' if goes_on else ''}: {str(error) or repr(error)}") from error


def small(disk: Disk, tally: Tally, seed: int) -> None:
    """A real file system that is too small; where none may be mounted, a limit on every file's size."""
    draw = random.Random(f"small {seed}")
    disk.toy.alone("finetune", save_every_steps=EVERY)
    most = sum(p.stat().st_size for p in disk.alone().iterdir()) >> 10
    out = disk.toy.folder(f"small-{seed}")
    place = disk.toy.folder(f"mount-{seed}")
    place.mkdir()
    size = draw.randint(most // 8, 4 * most)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(place)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        if mounted:
            out = place / "run"
        prepare = [] if mounted else [[__name__, "limit", {"size": size << 9}]]
        ended = disk.toy.run(disk.line("anything", out), prepare)
        tally.add("mounted" if mounted else "limited")
        check_stopped(tally, ended, out, may_end=True)
        if out.exists():
            check_whole(out)
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], capture_output=True, check=True)
        disk.check_end("anything", out)
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], capture_output=True, check=True)


def run(seed: int, count: int) -> dict:
    tally = Tally("disk", seed, count)
    try:
        disk = Disk()
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        tally.failures.append({"seed": seed, "what": f"no C compiler to make shim.c: {error}"})
        return tally.result()
    try:
        for number in tally.seeds():
            with tally.case(number):
                (small if number % 10 == 9 else strike)(disk, tally, number)
    finally:
        disk.close()
    return tally.result()
