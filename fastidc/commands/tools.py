"""`fastidc convert|doctor`."""

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
    """Write a checkpoint in another layout: fastidc folder, official pytorch_model.bin.*, or OpenAI CLIP.

    Args:
        src: SRC, a fastidc run, an official file of either stage, an OpenAI CLIP file, or open_clip:NAME/TAG.
        dst: DST, what to write: a folder (fastidc), *.bin* (official), *.pt or *.safetensors (openai).
        layout: The layout, where the name of DST does not tell it.
        intra_layers: Vision layers that see one image alone, for sources that do not say it; by default 9 of 12.
        dtype: Keep the source's, write fp32, or what the official code saves (fp16 and fp32).
        overwrite: Replace DST.
    """
    from fastidc.convert import convert

    print(convert(src, dst, layout=layout, intra_layers=intra_layers, dtype=dtype, overwrite=overwrite))


def doctor() -> None:
    """What this machine has, which backend serves each op and why the others do not, and what each absence costs."""
    from fastidc.doctor import report

    print(report())
