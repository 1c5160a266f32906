"""A description as a picture, by matplotlib where it is installed."""

import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from fastidc.describe.attention_maps import Maps
from fastidc.describe.description import Description
from fastidc.describe.overlay import upsampled
from fastidc.describe.pixels import to_pil
from fastidc.errors import FastidcError
from fastidc.files import aside

_WIDTH = 8  # inches


def figure(description: Description, out: str | os.PathLike | None = None, *, maps: Maps | tuple[Any, Any] | None = None):
    """before | after, with the caption and p(change) below -> a `matplotlib.figure.Figure`, which knows nothing of pyplot.

    out: also written there, whole or not at all; the format is that of the name (.png, .svg, .pdf, ...). maps: those of `attention_maps`, a
    row below the pictures for the last intra layer and one for the last inter layer; or one for the before-image and one for the
    after-image, [h, w] of any size, numbers from 0 up, either may be None, laid over the pictures themselves. Maps are brought to the
    picture's own size by bicubic interpolation, and the two of a row are on one scale, from 0 to the larger one's peak.
    FastidcError where matplotlib is not installed, an image cannot be read, or ``out`` has no format that it writes.
    """
    Figure = _figure_class()
    pictures = []
    for name, image in (("before", description.before), ("after", description.after)):
        try:
            pictures.append(to_pil(image, name).convert("RGB"))
        except FastidcError as error:
            raise FastidcError(f"the {name}-image has gone: {error}") from None
    rows: list[tuple[str, Any, Any]] = [("", *(maps or (None, None)))] if not isinstance(maps, Maps) else [("", None, None), *maps.layers]
    drawn = Figure(figsize=(_WIDTH, _height(pictures, len(rows))), layout="constrained")
    for (layer, *row), line in zip(rows, drawn.subplots(len(rows), 2, squeeze=False), strict=True):
        heats = [None if heat is None else np.asarray(heat, dtype=float) for heat in row]
        peak = max((float(heat.max()) for heat in heats if heat is not None), default=0.0)
        for axes, name, picture, heat in zip(line, ("before", "after"), pictures, heats, strict=True):
            width, height = picture.size
            axes.imshow(picture)
            if heat is not None:
                shown = upsampled(heat, picture.size)
                axes.imshow(shown, cmap="inferno", alpha=0.55, vmin=0, vmax=peak or 1, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            axes.set_title(f"{name}, {layer}" if layer else name, fontsize=10 if layer else None)
            axes.set_axis_off()
    # a $ would begin a formula
    text = "\n".join([*textwrap.wrap(description.caption, 80), *textwrap.wrap(description.said(), 100)]).replace("$", r"\$")
    drawn.supxlabel(text, fontsize=11)
    if out is not None:
        _save(drawn, Path(out))
    return drawn


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FastidcError("a figure needs matplotlib, which is not installed: pip install matplotlib.") from None
    return Figure


def _height(pictures: list, rows: int) -> float:
    """Inches: what a row of the wider-than-tall or taller-than-wide pictures needs, within reason, and the lines below."""
    shape = max(picture.height / picture.width for picture in pictures)
    return rows * (_WIDTH / 2 * min(max(shape, 0.3), 2.0) + 0.3) + 0.7


def check_format(out: str | os.PathLike) -> None:
    """FastidcError unless `figure` can write a file of this name; asks before a model is loaded."""
    known, suffix = _figure_class()().canvas.get_supported_filetypes(), Path(out).suffix[1:].lower()
    if suffix not in known:
        raise FastidcError(f"{out}: a figure's name ends in one of {', '.join(sorted(known))}.")


def _save(drawn, out: Path) -> None:
    check_format(out)
    with aside(out) as temporary:
        drawn.savefig(temporary, format=out.suffix[1:].lower(), dpi=150)
