"""A description as a picture, by matplotlib where it is installed."""

import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from fastidc.describe.description import Description
from fastidc.describe.pixels import to_pil
from fastidc.errors import FastidcError
from fastidc.files import aside


def figure(description: Description, out: str | os.PathLike | None = None, *, maps: tuple[Any, Any] | None = None):
    """before | after, with the caption below -> a `matplotlib.figure.Figure`, which knows nothing of pyplot.

    out: also written there, whole or not at all; the format is that of the name (.png, .svg, .pdf, ...). maps: one for the before-image, one
    for the after-image, [h, w] of any size, numbers from 0 up, either may be None; laid over the images, each pair on one scale.
    FastidcError where matplotlib is not installed, an image cannot be read, or ``out`` has no format that it writes.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FastidcError("a figure needs matplotlib, which is not installed: pip install matplotlib.") from None
    pictures = []
    for name, image in (("before", description.before), ("after", description.after)):
        try:
            pictures.append(to_pil(image, name).convert("RGB"))
        except OSError as error:
            raise FastidcError(f"{name}-image {image}: cannot be read for the figure ({error}).") from None
    drawn = Figure(figsize=(8, 4), layout="constrained")
    heats = [None if heat is None else np.asarray(heat, dtype=float) for heat in maps or (None, None)]
    peak = max((float(heat.max()) for heat in heats if heat is not None), default=0.0)
    for axes, name, picture, heat in zip(drawn.subplots(1, 2), ("before", "after"), pictures, heats, strict=True):
        width, height = picture.size
        axes.imshow(picture)
        if heat is not None:
            axes.imshow(
                heat,
                cmap="inferno",
                alpha=0.5,
                vmin=0,
                vmax=peak or 1,
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="bilinear",
            )
        axes.set_title(name)
        axes.set_axis_off()
    # a $ would begin a formula
    text = "\n".join([*textwrap.wrap(description.caption, 80), *textwrap.wrap(description.said(), 100)]).replace("$", r"\$")
    drawn.supxlabel(text, fontsize=11)
    if out is not None:
        _save(drawn, Path(out))
    return drawn


def check_format(out: str | os.PathLike) -> None:
    """FastidcError unless `figure` can write a file of this name; asks before a model is loaded."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FastidcError("a figure needs matplotlib, which is not installed: pip install matplotlib.") from None
    known, suffix = Figure().canvas.get_supported_filetypes(), Path(out).suffix[1:].lower()
    if suffix not in known:
        raise FastidcError(f"{out}: a figure's name ends in one of {', '.join(sorted(known))}.")


def _save(drawn, out: Path) -> None:
    check_format(out)
    with aside(out) as temporary:
        drawn.savefig(temporary, format=out.suffix[1:].lower(), dpi=150)
