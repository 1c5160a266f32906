"""`fastidc convert`: one model in another layout, without losing a bit of what that layout can hold."""

import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastidc import checkpoint
from fastidc.config import ModelConfig
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC

LAYOUTS = ("fastidc", "official", "openai")
DTYPES = ("keep", "fp32", "official")
_OURS = (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, checkpoint.NO_CHANGE_FILE)


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    layout: checkpoint.Layout
    out: Path
    tensors: int
    aliases: int
    """How many of ``tensors`` are a second name of another, and stored once."""
    bytes: int
    dtypes: Mapping[str, int]
    """dtype -> number of tensors, e.g. {"float16": 195, "float32": 248}."""
    notes: tuple[str, ...]
    """Sentences: what was left out, and what the reader of the new file has to say."""

    def __str__(self) -> str:
        dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(self.dtypes.items()))
        aliases = f", {self.aliases} of them aliases" if self.aliases else ""
        first = f"wrote {self.out}: {self.layout} layout, {self.tensors} tensors ({dtypes}){aliases}, {self.bytes / 1e6:.1f} MB"
        return "\n".join((first, *self.notes))


def convert(
    source: str | os.PathLike,
    out: str | os.PathLike,
    *,
    layout: checkpoint.Layout | None = None,
    intra_layers: int | None = None,
    dtype: Literal["keep", "fp32", "official"] = "keep",
    overwrite: bool = False,
) -> Conversion:
    """Writes the model in ``source`` (whatever `CLIP4IDC.from_pretrained` reads) to ``out`` in ``layout``, by default the one that its name
    speaks of: ``*.bin*`` official, ``*.pt`` and ``*.safetensors`` openai, a folder fastidc.

    intra_layers: the split, for sources that do not say theirs. dtype: "keep" writes what the source has, "fp32" fp32 alone, "official"
    the official regime (`checkpoint.official_dtypes`). A fastidc folder's no_change.json goes with it into another. A CLIP becomes a fastidc folder that still lacks what a CLIP lacks, and reads as the
    CLIP does. FastidcError where ``out`` exists (and not ``overwrite``) or where a layout cannot express the model; nothing is then written.
    """
    for name, value, known in (("layout", layout, (None, *LAYOUTS)), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise FastidcError(f"unknown {name} {value!r}; choose one of {', '.join(k for k in known if k)}.")
    layout = layout or layout_of(out)
    out = Path(out)
    if layout == "fastidc":
        check_free_folder(out, overwrite)
    else:
        _check_free_file(out, layout, overwrite)
    read = checkpoint.read(source, intra_layers=intra_layers, keep_dtype=True)
    shapes = _shapes(read.config)
    checkpoint.check_fit(shapes, read.weights, read.source, read.fresh, read.foreign)
    weights = _cast({name: read.weights[name] for name in shapes if name in read.weights}, dtype, read.source)

    notes = _left_out(read, [name for name in read.weights if name not in shapes])
    if layout == "fastidc":
        fresh = [part for part in read.fresh if any(name.startswith(part) and name not in weights for name in shapes)]
        _write_folder(out, read, weights, fresh)
        written = weights
        if fresh:
            notes.append(f"not in {source}, drawn at random when the folder is read: {', '.join(part.rstrip('.') for part in fresh)}")
        if read.layout != "fastidc" and intra_layers is None:
            notes.append(
                f"intra_layers {read.config.intra_layers} of {read.config.vision_layers}; the source does not say (--intra-layers)"
            )
    elif layout == "official":
        checkpoint.save_official(out, read.config, weights)
        written = checkpoint.to_official(weights, checkpoint.official_keys(read.config))
        notes += _not_in_official(read)
    else:
        checkpoint.save_openai(out, read.config, weights, read.extras)
        written = checkpoint.to_official(weights, checkpoint.official_keys(read.config, pair=False)) | dict(read.extras)
        pair = sum(name.startswith(checkpoint.PAIR_PARAMETERS) for name in weights)
        captioner = sum(name.startswith("captioner.") for name in weights)
        if pair or captioner:
            notes.append(f"left out, as a CLIP does not have them: {pair} pair parameters and {captioner} tensors of the captioner")
    files = [path for name in _OURS if (path := out / name).is_file()] if layout == "fastidc" else [out]
    return Conversion(
        layout,
        out,
        tensors=len(written),
        aliases=3 if layout == "official" and read.config.captioner_layers else 0,
        bytes=sum(file.stat().st_size for file in files),
        dtypes=Counter(str(t.dtype).removeprefix("torch.") for t in written.values()),
        notes=tuple(notes),
    )


def layout_of(out: str | os.PathLike) -> checkpoint.Layout:
    """The layout that the name ``out`` speaks of; FastidcError where it speaks of none."""
    text, path = os.fspath(out), Path(out)
    if text.endswith(("/", os.sep)) or path.is_dir():
        return "fastidc"
    if re.search(r"\.bin(\.|$)", path.name):
        return "official"
    if path.suffix in (".pt", ".safetensors"):
        return "openai"
    if not path.suffix:
        return "fastidc"
    raise FastidcError(
        f"{out}: the name does not tell the layout; end it in / (fastidc), .bin (official), .pt or .safetensors, or give --layout."
    )


def check_free_folder(out: Path, overwrite: bool, ours: Sequence[str] = _OURS, writer: str = "conversion") -> None:
    """Refuses a folder that may not be replaced: it is, where asked for, but only if it holds nothing beside ``ours``, never a run's logs."""
    if not out.exists():
        return
    if not out.is_dir():
        raise FastidcError(f"{out}: is a file, and a fastidc checkpoint is a folder; choose another DST.")
    held = sorted(path.name for path in out.iterdir())
    if others := [name for name in held if name not in ours]:
        raise FastidcError(f"{out}: holds {others[0]}, which no {writer} writes, and is not replaced; choose another DST.")
    if held and not overwrite:
        raise FastidcError(f"{out}: already exists; choose another DST, or add --overwrite.")


def _check_free_file(out: Path, layout: str, overwrite: bool) -> None:
    if not out.exists():
        return
    if out.is_dir():
        raise FastidcError(f"{out}: is a folder, and the {layout} layout is a file; choose another DST.")
    if not overwrite:
        raise FastidcError(f"{out}: already exists; choose another DST, or add --overwrite.")


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in CLIP4IDC(config).named_parameters()}


def _cast(weights: dict[str, Tensor], dtype: str, source: str) -> dict[str, Tensor]:
    if dtype == "keep":
        return weights
    if dtype == "fp32":
        return {name: tensor.float() for name, tensor in weights.items()}
    cast = checkpoint.official_dtypes(weights)
    for name, tensor in cast.items():
        if tensor.isinf().any() and not weights[name].isinf().any():
            raise FastidcError(f"{source}: tensor {name} has values beyond fp16's 65504; use --dtype keep or fp32.")
    return cast


def _left_out(read: checkpoint.Read, ours: list[str]) -> list[str]:
    """A sentence on the source's tensors that belong to no model of ours."""
    keys = [*read.unknown, *(read.foreign.get(name, (name, 1))[0] for name in ours)]
    if not keys:
        return []
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return [f"left out, as no part of the model: {len(keys)} unknown {'keys' if len(keys) > 1 else 'key'} ({', '.join(keys[:3])}{more})"]


def _not_in_official(read: checkpoint.Read) -> list[str]:
    config, notes = read.config, []
    if read.layout == "fastidc" and config.intra_layers != checkpoint.default_intra_layers(config.vision_layers):
        notes.append(f"an official file does not say its split: read it with --intra-layers {config.intra_layers}")
    if config.captioner_layers and config.dropout != ModelConfig.dropout:
        notes.append(f"an official file does not say its dropout: {config.dropout} becomes {ModelConfig.dropout}")
    return notes


def _write_folder(out: Path, read: checkpoint.Read, weights: Mapping[str, Tensor], fresh: list[str]) -> None:
    """Both files in a folder aside, with the source's ``no_change.json`` where it has one, which then takes the place of ``out``."""
    extra = dict(read.facts)
    if fresh:
        extra["fresh"] = fresh
    if read.extras:
        extra["clip_extras"] = {key: {"dtype": str(t.dtype).removeprefix("torch."), "value": t.tolist()} for key, t in read.extras.items()}
    with folder_aside(out) as aside:
        checkpoint.save(aside, read.config, weights, extra)
        if read.folder is not None and (read.folder / checkpoint.NO_CHANGE_FILE).is_file():
            shutil.copyfile(read.folder / checkpoint.NO_CHANGE_FILE, aside / checkpoint.NO_CHANGE_FILE)


@contextmanager
def folder_aside(out: str | os.PathLike) -> Iterator[Path]:
    """A folder beside ``out`` to make and fill, which takes ``out``'s place when the block ends well and else disappears. FastidcError, naming
    ``out``, where that cannot be written; what was there is then there still."""
    home = Path(os.path.realpath(out))  # a link stays a link
    mark = f"{os.getpid()}.{secrets.token_hex(4)}"
    aside, old = home.with_name(f".{home.name}.{mark}.tmp"), home.with_name(f".{home.name}.{mark}.old")
    try:
        try:
            yield aside
        except FastidcError as error:
            raise FastidcError(str(error).replace(str(aside), str(out))) from None
        if home.exists():
            os.rename(home, old)
        os.rename(aside, home)
    except OSError as error:
        with suppress(OSError):
            os.rename(old, home)
        raise FastidcError(
            f"{out} cannot be written ({error.strerror or error}); choose a folder with room that you may write to."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if home.exists():  # else the old one is all that is left
            shutil.rmtree(old, ignore_errors=True)
