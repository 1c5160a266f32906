"""Embeddings kept in a file, with what they were made of and by, so that neither can change unnoticed."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastidc.describe.loading import Ready, digest_of
from fastidc.errors import FastidcError
from fastidc.files import aside

FORMAT = "fastidc-search"
_AGAIN = "make the index again with --save"


def fingerprint(ready: Ready) -> str:
    """Of everything that an embedding depends on: both towers' weights, their shape, the longest caption, the precision."""
    shape = {name: value for name, value in ready.model.config.to_dict().items() if name not in ("captioner_layers", "dropout")}
    about = json.dumps([shape, ready.max_words, str(ready.autocast_dtype)])
    return digest_of(about, ready.model.pair_encoder, ready.model.text_encoder)


@dataclass(frozen=True)
class Entry:
    """What a row of the embeddings is of: a pair with its images, or a sentence."""

    name: str  # a pair's id, or the sentence
    before: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Index:
    """Embeddings [N, E] fp32 of N pairs or N captions."""

    kind: str  # "pairs" or "captions"
    entries: list[Entry]
    embeddings: Tensor
    model: str  # `fingerprint`
    files: dict[str, tuple[int, int]]  # path -> size in bytes and time of change in ns

    def save(self, path: Path) -> None:
        """Writes ``path``, whole or not at all."""
        about = {"format": FORMAT, "version": 1, "kind": self.kind, "model": self.model, "files": self.files}
        about["entries"] = [asdict(entry) for entry in self.entries]
        packed = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        with aside(path) as temporary, open(temporary, "xb") as file:
            np.savez(file, embeddings=self.embeddings.numpy(), about=packed)

    @classmethod
    def load(cls, path: Path, kind: str) -> "Index":
        """FastidcError for a file that is absent, damaged, something else, or an index of another ``kind``."""
        try:
            with np.load(path, allow_pickle=False) as held:
                embeddings, about = held["embeddings"], json.loads(held["about"].tobytes())
            entries = [Entry(**entry) for entry in about["entries"]]
            files = {name: (int(size), int(changed)) for name, (size, changed) in about["files"].items()}
            index = cls(str(about["kind"]), entries, torch.from_numpy(embeddings), str(about["model"]), files)
            fits = about["format"] == FORMAT and about["version"] == 1 and embeddings.dtype == np.float32
            if not fits or embeddings.ndim != 2 or len(embeddings) != len(entries):
                raise ValueError("its parts do not fit together")
        except FileNotFoundError:
            raise FastidcError(f"{path}: no such index; {_AGAIN}.") from None
        except Exception as error:  # a zip, NumPy's format and JSON each have their own ways of being damaged
            raise FastidcError(f"{path}: not an index of fastidc search ({type(error).__name__}: {error}); {_AGAIN}.") from None
        if index.kind != kind:
            raise FastidcError(f"{path}: holds {index.kind}, and {kind} are searched; name an index of {kind}.")
        return index

    def check(self, path: Path, ready: Ready) -> None:
        """FastidcError unless the index at ``path`` was made by this model, and its files are as they were."""
        if self.model != fingerprint(ready):
            raise FastidcError(
                f"{path}: was made by another model than {ready.source}, or in another precision; name that model, or {_AGAIN}."
            )
        for name, stamp in self.files.items():
            now = stamp_of(name)
            if now != stamp:
                raise FastidcError(f"{path}: {name} {'is gone' if now is None else 'has changed'} since the index was made; {_AGAIN}.")


def stamp_of(path: str | os.PathLike) -> tuple[int, int] | None:
    """Size and time of change of a file, None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def stamps(paths: Sequence[str | os.PathLike]) -> dict[str, tuple[int, int]]:
    """`Index.files` of ``paths``; taken before they are read, so that one which changes meanwhile is noticed."""
    found = {os.fspath(path): stamp_of(path) for path in paths}
    return {path: stamp for path, stamp in found.items() if stamp is not None}
