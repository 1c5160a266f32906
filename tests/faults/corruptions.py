"""Snapshots spoilt at random: none may be loaded as if nothing had happened, and what is said names the file."""

import hashlib
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fastidc.config import ModelConfig, preset
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.train import progress, snapshot
from fastidc.train.distributed import World
from fastidc.train.optim import Optimizer

STEP = 3
SHAPE = {"image_size": 32, "patch_size": 16, "vision_width": 16, "vision_layers": 1, "intra_layers": 1, "embed_dim": 16, "text_layers": 1}
CONFIG = ModelConfig(**SHAPE, vocab_size=12, context_length=8, captioner_layers=0, head_dim=16)


def session(seed: int) -> Any:
    """What `progress` asks of a session: a model of some thousand weights that has made `STEP` steps."""
    torch.manual_seed(seed)
    model, recipe = CLIP4IDC(CONFIG), preset("clevr").adapt
    optimizer = Optimizer(model, "adapt", recipe, 10)
    for _ in range(STEP):
        for p in optimizer.parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return SimpleNamespace(model=model, optimizer=optimizer, recipe=recipe, world=World(), device=torch.device("cpu"))


def whole(folder: Path, seed: int = 0) -> Path:
    """A snapshot of `session`, as a run writes it."""
    of = session(seed)
    known = progress.Progress(progress.Place(1, 2), best={"epoch": 0, "score": 0.5, "criterion": "CIDEr"}, seconds=1.5)
    best = folder / "best"
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(3)}, best)
    return snapshot.write(folder / "whole", STEP, progress.captured(of), known.state(of, {"stage": "adapt"}), best)


def taken_up(path: Path, into: Any) -> snapshot.Snapshot:
    """As a run takes a snapshot up, as far as what it says of itself decides; FastidcError for one that is not whole."""
    said: list[str] = []
    found = snapshot.newest(path.parent, said.append)
    if found is None:
        assert len(said) == 1, said
        raise FastidcError(said[0])
    progress.Progress.of(found.state, str(found.path))
    progress.put_back(into, found.tensors, found.state, str(found.path))
    progress.put_back_random(into, found.tensors["random"], found.state)
    return found


def run(seed: int, count: int) -> dict:
    """Spoils ``count`` copies of a snapshot and takes each up. -> {"cases", "refused", "harmless", "silent", "crashed", "unnamed", "kinds"}: harmless
    are changes of nothing (a blank of the manifest); the lists ``silent`` (loaded though something else), ``crashed`` (another error than FastidcError) and
    ``unnamed`` (a sentence without the snapshot and its file) must be empty."""
    draw = random.Random(seed)
    out: dict[str, Any] = {"cases": count, "refused": 0, "harmless": 0, "silent": [], "crashed": [], "unnamed": []}
    kinds: Counter[str] = Counter()
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as made:
        good = whole(Path(made))
        expected, into = snapshot.read(good), session(1)
        for number in range(count):
            path = Path(made) / "spoilt" / good.name
            shutil.copytree(good, path)
            kind = draw.choice(list(DAMAGES))
            what = f"{kind}: {DAMAGES[kind](path, draw)} (seed {seed}, case {number})"
            kinds[kind] += 1
            try:
                found = taken_up(path, into)
            except FastidcError as error:
                out["refused"] += 1
                text = str(error)
                if str(path) not in text or "\n" in text or not _names_it(text):
                    out["unnamed"].append(f"{what}: {text}")
            except Exception as error:
                out["crashed"].append(f"{what}: {type(error).__name__}: {error}")
            else:
                same = found.state == expected.state and _same(found.tensors, expected.tensors)
                same = same and (path / snapshot.BEST).read_bytes() == (good / snapshot.BEST).read_bytes()
                out["harmless" if same else "silent"] = out["harmless"] + 1 if same else [*out["silent"], what]
            shutil.rmtree(path.parent)
    return out | {"kinds": dict(sorted(kinds.items()))}


def _names_it(text: str) -> bool:
    """Whether a sentence says which file, or which tensor or field of it."""
    named = (".safetensors", ".json", "tensor ", "field ", "moment", "of step", "version", " is torch.", "is missing", "loss scaling")
    return any(name in text for name in named)


def _same(one: dict, other: dict) -> bool:
    return {file: set(values) for file, values in one.items()} == {file: set(values) for file, values in other.items()} and all(
        torch.equal(x, other[file][name]) and x.dtype == other[file][name].dtype
        for file, values in one.items()
        for name, x in values.items()
    )


# Damage that nobody has covered up. Each function spoils the snapshot in ``path`` and says what it did.


def _bytes(change: Callable[[bytearray, random.Random], None]) -> Callable[[Path, random.Random], str]:
    def damage(path: Path, draw: random.Random) -> str:
        file = draw.choice(sorted(path.iterdir()))
        data = bytearray(file.read_bytes())
        change(data, draw)
        file.write_bytes(data)
        return file.name

    return damage


def _flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.choice((0, draw.randrange(len(data)), len(data) - 1)) :]


def _grow(data: bytearray, draw: random.Random) -> None:
    data += draw.randbytes(draw.randint(1, 50))


def _zero(data: bytearray, draw: random.Random) -> None:
    at = draw.randrange(len(data))
    part = data[at : at + 512]  # a sector
    data[at : at + 512] = bytes(len(part)) if any(part) else b"\1" * len(part)


def _moved(data: bytearray, draw: random.Random) -> None:
    at, length = draw.randrange(len(data)), draw.randint(1, 64)
    data[at:at] = data[at : at + length]


def _swap(path: Path, draw: random.Random) -> str:
    one, other = draw.sample(sorted(path.iterdir()), 2)
    held = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(held)
    return f"{one.name} and {other.name}"


def _instead(path: Path, draw: random.Random) -> str:
    """Nothing, a folder, a pipe, or a link in a file's place."""
    file = draw.choice(sorted(path.iterdir()))
    held = file.read_bytes()
    file.unlink()
    other = draw.choice(("nothing", "folder", "pipe", "link", "loop"))
    if other == "folder":
        file.mkdir()
    elif other == "pipe":
        os.mkfifo(file)
    elif other == "link" and file.name != snapshot.MANIFEST:  # a manifest may be one: what it says is verified
        (path / ".moved").write_bytes(held)
        file.symlink_to(path / ".moved")
    elif other == "loop":
        file.symlink_to(file)
    return f"{other} for {file.name}"


def _edited(path: Path, draw: random.Random) -> str:
    """Another value of the manifest."""
    manifest = json.loads((path / snapshot.MANIFEST).read_text())
    files = manifest["files"]
    name = draw.choice(sorted(files))
    values: list[Any] = [None, "", "x", -1, 0, 4, 1.5, 10**300, True, [], {}, [1], {"a": 1}, "../x", "\0", "\ud800"]
    place: dict
    place, key = draw.choice(
        [(manifest, k) for k in manifest]
        + [(files, name), (files[name], "bytes"), (files[name], "sha256"), (files, draw.choice(["x", "../x", "", "a/b", "\0"]))]
    )
    value = draw.choice([other for other in values if other != place.get(key)])
    if (value is True and place.get(key) == 1) or (place is files and key not in files and value == {}):
        value = "x"
    if draw.random() < 0.2 and key in place:
        del place[key]
        value = "gone"
    else:
        place[key] = value
    (path / snapshot.MANIFEST).write_text(json.dumps(manifest))
    return f"manifest's {key!r} {str(value)[:30]!r}"


def _no_json(path: Path, draw: random.Random) -> str:
    text = draw.choice(
        [b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\xff\xfe{\0}\0", b"NaN", b'{"files": ' + b"9" * 5000 + b"}"]
    )
    (path / snapshot.MANIFEST).write_bytes(text)
    return f"manifest {text[:10]!r}"


# Damage under a manifest that was made to fit it.


def _sealed(path: Path) -> None:
    manifest = json.loads((path / snapshot.MANIFEST).read_text())
    for file in path.iterdir():
        if file.name != snapshot.MANIFEST:
            data = file.read_bytes()
            manifest["files"][file.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"] = {name: facts for name, facts in manifest["files"].items() if (path / name).exists()}
    (path / snapshot.MANIFEST).write_text(json.dumps(manifest))


def _other_tensor(path: Path, draw: random.Random) -> str:
    """A tensor of another shape or type, gone, or under another name."""
    file = path / f"{draw.choice(('weights', 'optimizer', 'random'))}.safetensors"
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    name = draw.choice(sorted(tensors))
    x = tensors.pop(name)
    how = draw.choice(("wider", "flat", "half", "whole numbers", "gone", "renamed", "empty", "of nobody"))
    if how == "wider":
        tensors[name] = torch.cat([x.reshape(-1), x.reshape(-1)])
    elif how == "flat":
        tensors[name] = x.reshape(1, *x.shape)
    elif how == "half":
        tensors[name] = x.to(torch.bfloat16)
    elif how == "whole numbers":
        tensors[name] = x.to(torch.int32)
    elif how == "renamed":
        tensors[f"{name}x"] = x
    elif how == "empty":
        tensors[name] = x.reshape(-1)[:0]
    elif how == "of nobody":
        tensors |= {name: x, f"other.{name}": x.clone()}
    save_file(tensors, file)
    _sealed(path)
    return f"{name} of {file.name} {how}"


def _lying_header(path: Path, draw: random.Random) -> str:
    """A safetensors file whose header says something else."""
    file = path / f"{draw.choice(('weights', 'optimizer', 'random'))}.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    table = json.loads(data[8 : 8 + length])
    name = draw.choice(sorted(table))
    key, value = draw.choice(
        [("data_offsets", [0, 1 << 40]), ("data_offsets", [-4, 0]), ("shape", [1 << 40]), ("shape", "x"), ("dtype", "F3"), ("dtype", None)]
    )
    table[name][key] = value
    header = json.dumps(table).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    _sealed(path)
    return f"{key} {value} of {name} in {file.name}"


def _other_state(path: Path, draw: random.Random) -> str:
    """A field of the state gone, or of another type."""
    state = json.loads((path / snapshot.STATE).read_text())
    field = draw.choice(sorted(set(state) - {"identity"}))  # which `identity.check_same` compares with the run's own
    value = draw.choice([-1, "x", [], [1], {"a": 1}, 1e400, -0.5, 10**30, "gone"])
    if value == "gone":
        del state[field]
    else:
        state[field] = value
    (path / snapshot.STATE).write_text(json.dumps(state))
    _sealed(path)
    return f"state's {field} {value!r}"


def _no_file(path: Path, draw: random.Random) -> str:
    file = path / draw.choice(("weights.safetensors", "optimizer.safetensors", "random.safetensors", snapshot.STATE))
    file.unlink()
    _sealed(path)
    return file.name


DAMAGES: dict[str, Callable[[Path, random.Random], str]] = {
    "flip": _bytes(_flip),
    "cut": _bytes(_cut),
    "grow": _bytes(_grow),
    "zero": _bytes(_zero),
    "twice": _bytes(_moved),
    "swap": _swap,
    "instead": _instead,
    "edited": _edited,
    "no json": _no_json,
    "other tensor": _other_tensor,
    "lying header": _lying_header,
    "other state": _other_state,
    "no file": _no_file,
}
