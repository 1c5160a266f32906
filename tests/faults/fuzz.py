"""Small whole files of every kind that fastidc reads, spoilt in bytes and in structure: each is read or refused by a FastidcError that names it."""

import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fastidc import checkpoint
from fastidc.checkpoint.load import load_file
from fastidc.config import ModelConfig
from fastidc.data import quarantine
from fastidc.data.datasets.base import SPLITS
from fastidc.data.datasets.flaws import Collector
from fastidc.data.records import load_records, parse, recognise
from fastidc.describe.index import Entry, Index
from fastidc.describe.no_change import NoChange, write_no_change
from fastidc.describe.pairs import read_pairs, stream_pairs
from fastidc.errors import FastidcError
from tests.faults.spoiling import spoilt_bytes, spoilt_deeply

TESTS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Target:
    """A file, whole, and what reads it. names: what a refusal must hold, one of them."""

    name: str
    path: Path
    content: bytes
    read: Callable[[], Any]
    names: tuple[str, ...]

    def spoilt(self, rng: random.Random, other: bytes) -> bytes:
        if self.path.suffix in (".json", ".jsonl") and rng.random() < 0.5:
            lines = self.content.splitlines() if self.path.suffix == ".jsonl" else [self.content]
            at = rng.randrange(len(lines))
            lines[at] = json.dumps(spoilt_deeply(json.loads(lines[at]), rng)).encode()
            return b"\n".join(lines)
        return spoilt_bytes(self.content, rng, other)


def run(seed: int, count: int) -> dict:
    """Spoils ``count`` files and reads each. -> {"cases", "refused", "read", "crashed", "unnamed", "slowest", "kinds"}: ``crashed`` (an error that is no
    FastidcError) and ``unnamed`` (a sentence without the file, or of several lines) must be empty; ``slowest`` is (seconds, what)."""
    rng = random.Random(seed)
    out: dict[str, Any] = {"cases": count, "refused": 0, "read": 0, "crashed": [], "unnamed": [], "slowest": (0.0, "")}
    kinds: Counter[str] = Counter()
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shared) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of what it reads
        targets = list(_targets(Path(made)))
        for number in range(count):
            target, other = rng.choice(targets), rng.choice(targets)
            data = target.spoilt(rng, other.content)
            target.path.write_bytes(data)
            what = f"{target.name} (seed {seed}, case {number})"
            started = time.perf_counter()
            try:
                target.read()
                out["read"] += 1
            except FastidcError as error:
                out["refused"] += 1
                text = str(error)
                if not any(name in text for name in target.names) or "\n" in text or len(text) > 3000:
                    out["unnamed"].append(f"{what}: {text[:400]!r}: {data[:100]!r}")
            except Exception as error:
                out["crashed"].append(f"{what}: {type(error).__name__}: {str(error)[:300]}: {data[:100]!r}")
            out["slowest"] = max(out["slowest"], (round(time.perf_counter() - started, 3), what))
            kinds[target.name] += 1
            target.path.write_bytes(target.content)
    return out | {"kinds": dict(sorted(kinds.items()))}


def _targets(root: Path) -> Iterator[Target]:
    yield from _data_sets(root)
    yield from _pairs(root)
    yield from _beside_a_model(root)
    yield from _models(root)


def _read_set(tree: Path, kind: str) -> None:
    """As training reads it and, where that refuses it, as the check does, which goes on after every flaw."""
    try:
        load_records(tree, kind)
    except FastidcError:
        sink = Collector()
        try:
            recognise(tree)
            _, parsed = parse(tree, kind, None, None, sink)
        except FastidcError:
            raise
        finally:
            quarantine.fingerprint_of(path for path in tree.iterdir() if path.is_file())
        for entry in (entry for split in SPLITS for entry in parsed.annotations[split]):
            for field in entry.names:
                with sink.spare(entry.id):
                    parsed.find(entry, field)
        for flaw in parsed.left():
            sink(flaw)
        raise


def _data_sets(root: Path) -> Iterator[Target]:
    sys.path += [str(folder) for folder in (TESTS, TESTS / "data") if str(folder) not in sys.path]
    import bad_annotations

    for kind, make in bad_annotations.MAKERS.items():
        tree = make(root / kind)
        dataset = bad_annotations.DATASET.get(kind, kind)
        for path in sorted(path for path in tree.iterdir() if path.suffix in (".json", ".csv", ".tsv", ".jsonl")):
            # a spoilt table may make its readers name an image, a text or the folder
            yield Target(
                f"{kind}/{path.name}", path, path.read_bytes(), lambda tree=tree, kind=dataset: _read_set(tree, kind), (str(tree),)
            )
    tree = bad_annotations.MAKERS["folder"](root / "texts")
    for path in (tree / "captions.json", tree / "splits.json"):
        path.unlink()
    for name in ("10", "7", "5"):
        (tree / f"{name}.txt").write_text("a car left\nit is gone\n")
    path = tree / "7.txt"
    yield Target("folder/7.txt", path, path.read_bytes(), lambda: _read_set(tree, "folder"), (str(tree),))
    table = bad_annotations.MAKERS["folder"](root / "captions")
    (table / "captions.json").unlink()
    (table / "splits.json").unlink()
    path = table / "captions.csv"
    path.write_text("id,caption,split\n10,a car,train\n7,gone,val\n5,a dog,test\n")
    yield Target("folder/captions.csv", path, path.read_bytes(), lambda: _read_set(table, "folder"), (str(table),))


def _pairs(root: Path) -> Iterator[Target]:
    """What `fastidc caption` reads; rows that fit nobody are rows, and no error."""
    (root / "pairs").mkdir()
    text = "id,before,after\np,p1.png,p2.png\nq,q1.png,q2.png\n"
    lines = '{"id": "p", "before": "p1.png", "after": "p2.png"}\n{"before": "q1.png", "after": "q2.png"}\n'
    for name, content in (("t.csv", text), ("t.tsv", text.replace(",", "\t")), ("t.jsonl", lines)):
        path = root / "pairs" / name
        path.write_text(content)
        yield Target(f"pairs/{name}", path, content.encode(), lambda path=path: read_pairs(path), (name,))
    path = root / "pairs" / "stream.jsonl"
    path.write_text(lines)

    def stream() -> None:
        with path.open("rb") as file:
            list(stream_pairs(file))

    yield Target("pairs/stream", path, lines.encode(), stream, ("standard input",))


SMALL = {"image_size": 32, "patch_size": 16, "vision_width": 16, "vision_layers": 1, "intra_layers": 1, "embed_dim": 16, "text_layers": 1}


def _beside_a_model(root: Path) -> Iterator[Target]:
    """Files of JSON that fastidc writes itself, and a search index."""
    folder = root / "run"
    config = ModelConfig(**SMALL, vocab_size=12, context_length=8, captioner_layers=0, head_dim=16)
    checkpoint.save(folder, config, {"logit_scale": torch.ones(())}, {"preset": "tiny", "recipe": {"epochs": 2}})
    path = folder / "config.json"

    def model() -> None:
        read = checkpoint.read(folder)
        checkpoint.check_fit({"logit_scale": ()}, read.weights, read.source)

    yield Target("run/config.json", path, path.read_bytes(), model, ("config.json", "model.safetensors"))
    path = write_no_change(folder, ["nothing changed"], {"scale": 1.0, "shift": 0.5, "split": "val", "pairs": 3})
    yield Target("run/no_change.json", path, path.read_bytes(), lambda: NoChange.of_run(folder), ("no_change.json",))
    path = quarantine.write(
        root / "q.json", "table", root, "0f", {"p": [("image-missing", "p.png is missing")], "\npairs.csv: line 3": [("json", "x")]}
    )
    yield Target("quarantine", path, path.read_bytes(), lambda: quarantine.read(root / "q.json"), ("q.json",))
    index = root / "index.npz"
    Index("pairs", [Entry("p", "a.png", "b.png")], torch.ones(1, 4), "0f", {"a.png": (1, 2)}).save(index)
    yield Target("index", index, index.read_bytes(), lambda: Index.load(index, "pairs"), ("index.npz",))


class _Archive(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def _models(root: Path) -> Iterator[Target]:
    folder = root / "models"
    folder.mkdir()
    state = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2).half(), "n": torch.tensor(3)}
    (folder / "m.safetensors").write_bytes(save(state))
    torch.save(state, folder / "zip.pt")
    torch.save({"state_dict": state}, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(_Archive()).save(str(folder / "script.pt"))
    for path in sorted(folder.iterdir()):
        yield Target(f"models/{path.name}", path, path.read_bytes(), lambda path=path: load_file(path), (path.name,))
