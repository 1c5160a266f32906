"""Writing weights in three layouts. A file appears whole or not at all: it is written aside, flushed and renamed."""

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastidc.checkpoint import names
from fastidc.checkpoint.read import CONFIG_FILE, FORMAT, WEIGHTS_FILE
from fastidc.config import ModelConfig
from fastidc.errors import FastidcError
from fastidc.files import aside, write_json


def write_config(folder: str | os.PathLike, config: ModelConfig, extra: Mapping | None = None) -> None:
    """Writes ``config.json``: the model's config and whatever else describes the run."""
    write_json(Path(folder) / CONFIG_FILE, {"format": FORMAT, "version": 1, "model": config.to_dict(), **(extra or {})})


def save(folder: str | os.PathLike, config: ModelConfig, weights: Mapping[str, Tensor], extra: Mapping | None = None) -> None:
    """Writes ``config.json`` and then ``model.safetensors`` into ``folder``, each aside and renamed."""
    write_config(folder, config, extra)
    _save_safetensors(Path(folder) / WEIGHTS_FILE, _own_storage(weights))


def save_official(path: str | os.PathLike, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Writes what the official trainer calls ``pytorch_model.bin.{epoch}``: a ``torch.save``d OrderedDict under official names, in the order
    of `names.official_keys`, each tensor contiguous with its own storage, but for the three alias keys of a captioning model, which share
    that of the ``clip.*`` tensors and so are stored once.

    weights: our names, any dtypes, which are kept (`names.official_dtypes` gives those of the official regime). Without a captioner it is
    a file of stage 1. The same weights give the same bytes under any file name. The official code reads its shapes from an OpenAI file, so a
    model of other shapes than ViT-B/32's needs one that fits (`save_openai`). FastidcError where this layout cannot express the model.
    """
    check_expressible(path, config, "official")
    keys = names.official_keys(config)
    absent = [key for key in keys if (name := names.our_name(key)[0]).startswith(names.PAIR_PARAMETERS) and name not in weights]
    if absent:
        raise FastidcError(
            f"{path}: an official checkpoint holds the pair parameters ({absent[0]} and {len(absent) - 1} more), which a CLIP lacks; "
            "adapt it first (`fastidc adapt --init`), or write the openai layout."
        )
    state = _foreign_state(path, weights, keys)
    with aside(path) as temporary, open(temporary, "xb") as file:
        torch.save(state, file)  # to an open file: given a name, torch writes that into the archive


def save_openai(
    path: str | os.PathLike, config: ModelConfig, weights: Mapping[str, Tensor], extras: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a plain CLIP state dict under OpenAI's names: safetensors where ``path`` ends so, else ``torch.save``d. Pair parameters and
    captioner are left out. extras: those of `names.OPENAI_EXTRAS` to write too; they follow ``logit_scale``, as buffers follow parameters.
    """
    check_expressible(path, config, "openai")
    clip = _foreign_state(path, weights, names.official_keys(config, pair=False))
    state: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in clip.items():
        state[key.removeprefix(names.CLIP_PREFIX)] = tensor
        if key == "clip.logit_scale":
            state.update(_own_storage(extras or {}))
    if Path(path).suffix == ".safetensors":
        _save_safetensors(Path(path), state)
    else:
        with aside(path) as temporary, open(temporary, "xb") as file:
            torch.save(state, file)


def check_expressible(path: str | os.PathLike, config: ModelConfig, layout: str) -> None:
    """FastidcError naming ``path`` where a foreign layout cannot say what ``config`` does."""
    if config.vocabulary is not None:
        raise FastidcError(
            f"{path}: the model's token table holds {config.vocab_size} of CLIP's BPE ids (field vocabulary), which the {layout} layout cannot "
            "express; keep the fastidc layout, or train with CLIP's whole vocabulary."
        )
    if config.head_dim != 64:
        raise FastidcError(
            f"{path}: the model has heads of head_dim {config.head_dim}, and the {layout} layout takes them for 64 wide (width // 64); "
            "keep the fastidc layout, or train with head_dim 64."
        )
    if layout == "official" and config.pair_input != "concat":
        raise FastidcError(
            f'{path}: the model has pair_input "{config.pair_input}", which official CLIP4IDC lacks; '
            'keep the fastidc layout, or train with pair_input "concat".'
        )


def _own_storage(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, contiguous, none a view of another: a file must depend on nothing but the values."""
    return {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in weights.items()}


def _foreign_state(path: str | os.PathLike, weights: Mapping[str, Tensor], keys: list[str]) -> OrderedDict[str, Tensor]:
    """``weights`` under the official ``keys``, in their order, aliases sharing storage."""
    try:
        own = _own_storage(names.to_official(weights, [key for key in keys if key not in names.ALIASES]))
    except KeyError as error:
        raise FastidcError(f"{path}: the weights lack tensor {error.args[0]}, which this layout holds; give the whole model.") from None
    return OrderedDict((key, own[names.ALIASES[key]].detach() if key in names.ALIASES else own[key]) for key in keys)


def _save_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with aside(path, (SafetensorError,)) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
