"""`fastidc convert|doctor`."""

from pathlib import Path
from typing import Literal


def convert(
    src: str,
    dst: str,
    /,
    layout: Literal["fastidc", "official", "openai"] | None = None,
    intra_layers: int | None = None,
    dtype: Literal["keep", "fp32", "official"] = "keep",
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another layout: fastidc, official or OpenAI.

    Example: fastidc convert runs/caption pytorch_model.bin.0

    Args:
        src: SRC, a fastidc run, an official file of either stage, an OpenAI CLIP file, open_clip:NAME/TAG or hub:OWNER/NAME.
        dst: DST, what to write: a folder (fastidc), *.bin* (official), *.pt or *.safetensors (openai).
        layout: The layout, where the name of DST does not tell it.
        intra_layers: Vision layers that see one image alone, for sources that do not say it; by default 9 of 12.
        dtype: Keep the source's, write fp32, or what the official code saves (fp16 and fp32).
        overwrite: Replace DST.
    """
    from fastidc.convert import convert

    print(convert(src, dst, layout=layout, intra_layers=intra_layers, dtype=dtype, overwrite=overwrite))


def doctor(data: Path | None = None, json: bool = False) -> None:
    """What this machine has, what serves each op, and what is missing costs.

    Example: fastidc doctor --data data/spot

    Args:
        data: Folder where a cache of images would lie; by default this one.
        json: Print JSON.
    """
    from fastidc.doctor import examine, text_of

    facts = examine(data)
    if json:
        import json as json_

        print(json_.dumps(facts, indent=2))
    else:
        print(text_of(facts))
