"""What a model says about one pair."""

import base64
import html
import io
import os
from dataclasses import dataclass
from typing import Any

from fastidc.describe.pixels import to_pil

_SHOWN = 320  # pixels of an image's longer side on a page


@dataclass(frozen=True)
class Description:
    """The caption of a pair, and how sure the model is of it."""

    caption: str
    ids: tuple[int, ...]  # rows of the model's token table, the end token included
    log_prob: float  # natural logarithm of the caption's probability, its end token included, without any length penalty
    p_change: float | None  # probability that anything changed, 0 to 1; None where it cannot be told
    p_change_reason: str | None  # why it cannot be told
    before: Any  # as it was given
    after: Any

    @property
    def text(self) -> str:
        """The caption."""
        return self.caption

    def facts(self) -> dict[str, Any]:
        """What a row of JSON says of it: caption, log_prob, p_change."""
        return {"caption": self.caption, "log_prob": self.log_prob, "p_change": self.p_change}

    def said(self) -> str:
        """The figures in one line: "p(change) 0.973, log-probability -2.31"."""
        change = f"p(change) {self.p_change:.3f}" if self.p_change is not None else f"p(change) unknown: {self.p_change_reason}"
        return f"{change}; log-probability {self.log_prob:.2f}"

    def __str__(self) -> str:
        return self.caption

    def _repr_html_(self) -> str:
        """The pair side by side over its caption. Colours are the page's own, so it reads on light and dark ones."""
        cells = "".join(
            f'<figure style="margin:0"><div>{_picture(image, name)}</div>'
            f'<figcaption style="font-size:85%;opacity:.7">{name}{_file(image)}</figcaption></figure>'
            for name, image in (("before", self.before), ("after", self.after))
        )
        return (
            '<div style="color:inherit;background:transparent;font-family:sans-serif">'
            f'<div style="display:flex;flex-wrap:wrap;gap:12px">{cells}</div>'
            f'<p style="margin:.5em 0 0;font-size:110%">{html.escape(self.caption)}</p>'
            f'<p style="margin:0;font-size:85%;opacity:.7">{html.escape(self.said())}</p></div>'
        )


def _file(image: Any) -> str:
    return ": " + html.escape(os.path.basename(os.fsdecode(image))) if isinstance(image, (str, os.PathLike)) else ""


def _picture(image: Any, name: str) -> str:
    try:
        picture = to_pil(image, name).convert("RGB")
        picture.thumbnail((_SHOWN, _SHOWN))
        file = io.BytesIO()
        picture.save(file, "PNG")
    except Exception as error:  # a notebook is opened again when files have gone; the caption is still worth showing
        return f"<em>{html.escape(f'the image cannot be shown ({error})')}</em>"
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="{name}" style="max-width:100%" src="data:image/png;base64,{data}">'
