"""From a file to named tensors, without running code from it: safetensors, or ``torch.load(weights_only=True)``.

OpenAI's own downloads are TorchScript archives, which ``weights_only`` cannot read; they go through ``torch.jit.load``, which holds no
pickled Python.
"""

import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from fastidc.errors import FastidcError


def load_file(path: Path) -> dict[str, Tensor]:
    """The named tensors of any checkpoint file, on the CPU; ``module.`` of wrapped models is taken off. FastidcError if it holds none."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                is_torchscript = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if is_torchscript:
                with warnings.catch_warnings():  # torch announces the end of torch.jit, which is no news to a reader of old files
                    warnings.simplefilter("ignore", FutureWarning)
                    return dict(torch.jit.load(path, map_location="cpu").state_dict())
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # every reader has its own exceptions for a damaged or a foreign file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FastidcError(
            f"{path}: cannot be read as a checkpoint ({reason[:200]}); is the file whole? Fetch or write it again."
        ) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise FastidcError(f"{path}: not a state dict; a dictionary of named tensors was expected.")
    return {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}


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
