"""From a file to named tensors, without running code from it: safetensors, or ``torch.load(weights_only=True)``.

OpenAI's own downloads are TorchScript archives, which ``weights_only`` cannot read and ``torch.jit.load`` would run; `archives` reads them.
"""

import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from fastidc.checkpoint.archives import LEGACY_PICKLES, check_members, check_pickles, is_torchscript, read_torchscript
from fastidc.checkpoint.header import check_room, damaged, load_safetensors
from fastidc.errors import FastidcError


def load_file(path: Path) -> dict[str, Tensor]:
    """The named tensors of any checkpoint file, on the CPU; ``module.`` of wrapped models is taken off. FastidcError if it holds none, or if it
    is damaged, claims more than it can hold, or could be read by running code of its own alone."""
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        state = _unpacked(path)
    except FastidcError:
        raise
    except UnpicklingError as error:
        raise _unpickled(path, str(error)) from None
    except Exception as error:  # every reader has its own exceptions for a damaged or a foreign file
        raise damaged(path, " ".join(str(error).split()) or type(error).__name__) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise FastidcError(f"{path}: not a state dict; a dictionary of named tensors was expected.")
    tensors = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        _check_tensor(path, key, tensor)
    check_room(path, sum(tensor.nbytes for tensor in tensors.values()))  # many may share one storage
    return tensors


def _unpacked(path: Path) -> object:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            check_pickles(path, file, LEGACY_PICKLES)
        return _loaded(path)
    with zipfile.ZipFile(path) as archive:
        check_members(path, archive)
        if is_torchscript(archive):
            return read_torchscript(path, archive)
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as file:
                    check_pickles(path, file)
    return _loaded(path)


def _loaded(path: Path) -> object:
    with warnings.catch_warnings():  # of what it finds odd in an archive: it is whole, or it is refused
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _unpickled(path: Path, said: str) -> FastidcError:
    """For what ``weights_only`` refuses: a file that holds more than tensors, or no pickle of torch's. Its own words advise to run the code."""
    found = re.search(r"GLOBAL +([\w.]+)", said) or re.search(r"[Uu]nsupported class +([\w.]+)", said)
    if found is None:
        return damaged(path, "it is nothing that torch.save writes")
    return FastidcError(
        f"{path}: cannot be read as a checkpoint without running code of its own ({found[1][:80]} is no tensor); where you trust whoever made it, "
        "load it with torch yourself, and save its state dict with safetensors.torch.save_file."
    )


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    """FastidcError unless the tensor is plain numbers that the file holds, each of them once."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_complex():
        raise damaged(path, f"tensor {key[:80]} is sparse, quantised, complex, or without numbers")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise damaged(path, f"tensor {key[:80]} of shape {list(tensor.shape)} has more numbers than the file holds of it")


def open_clip_state(source: str) -> dict[str, Tensor]:
    """The state dict of ``open_clip:NAME/TAG``; FastidcError for a name that CLIP4IDC cannot start from."""
    name, _, tag = source.removeprefix("open_clip:").partition("/")
    try:
        import open_clip
    except ImportError as error:
        raise FastidcError(f"{source}: open_clip cannot be imported ({error}); pip install open_clip_torch.") from None
    if name not in open_clip.list_models():
        raise FastidcError(f"{source}: open_clip knows no model {name!r}; give for example open_clip:ViT-B-32-quickgelu/openai.")
    model_config = open_clip.get_model_config(name)
    if not isinstance(model_config.get("vision_cfg", {}).get("layers"), int):
        raise FastidcError(
            f"{source}: {name} has no vision transformer (a ResNet?); CLIP4IDC splits one, so give a ViT such as ViT-B-32-quickgelu."
        )
    if not model_config.get("quick_gelu"):
        raise FastidcError(
            f"{source}: {name} computes GELU where OpenAI's weights and CLIP4IDC need QuickGELU; use open_clip:{name}-quickgelu/{tag or 'openai'}."
        )
    try:
        model = open_clip.create_model(name, pretrained=tag or None)
    except Exception as error:
        raise FastidcError(f"{source}: open_clip could not load it ({str(error).splitlines()[0][:200]}).") from None
    return model.state_dict()
