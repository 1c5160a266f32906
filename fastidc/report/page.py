"""One self-contained HTML page: what stands on it, and writing it. It asks no server for anything, and its policy forbids it to."""

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastidc.files import write_text
from fastidc.report.curves import Chart
from fastidc.report.thumbnails import Thumbnail

TEMPLATE, STYLE, SCRIPT = "report.html.j2", "style.css.j2", "script.js.j2"


@dataclass(frozen=True)
class Cell:
    """A number as text, and the interval around it where there is one."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]  # name, one cell for each column but the first
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Card:
    """A pair of the gallery. type: "" where nobody knows it. right: None where nobody judged the caption. score: the caption's own CIDEr
    times 100. map: what the model looked at."""

    id: str
    before: Thumbnail
    after: Thumbnail
    references: Sequence[str]
    type: str = ""
    caption: str | None = None
    p_change: float | None = None
    score: float | None = None
    right: bool | None = None
    map: Thumbnail | None = None


@dataclass(frozen=True)
class Hit:
    """A pair that a sentence found: ``card``, its number in the gallery from 0."""

    card: int
    id: str
    cosine: float
    right: bool
    picture: Thumbnail


@dataclass(frozen=True)
class Query:
    """A sentence, its own pair's rank from 1 among the gallery's pairs, and the nearest of them."""

    text: str
    rank: int
    hits: Sequence[Hit]


@dataclass(frozen=True)
class Page:
    """Whatever is empty is left out."""

    title: str
    notes: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()
    charts: Sequence[Chart] = ()
    scores: Table | None = None
    paper: Sequence[str] = ()  # tables as text, see `fastidc.evaluate.paper`
    others: Sequence[tuple[str, str]] = ()  # further figures
    queries: Sequence[Query] = ()
    query_note: str = ""
    cards: Sequence[Card] = ()
    gallery_note: str = ""
    legend: Sequence[str] = ()  # below the gallery's heading: what maps and judgements mean


def render(page: Page) -> str:
    """The page as HTML; everything in it that is not ours (captions, ids, paths, notes) is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.lstrip_blocks = True
    script = environment.get_template(SCRIPT).render()
    judged = [card.right for card in page.cards if card.right is not None]
    return environment.get_template(TEMPLATE).render(
        page=page,
        charts=[Markup(chart.svg) for chart in page.charts],  # drawn by us, its texts escaped there
        style=Markup(environment.get_template(STYLE).render()),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
        types=sorted(Counter(card.type for card in page.cards if card.type).items()),
        right=sum(judged),
        judged=len(judged),
        scored=any(card.score is not None for card in page.cards),
        probable=any(card.p_change is not None for card in page.cards),
        mapped=any(card.map is not None for card in page.cards),
    )


def write_page(path: str | os.PathLike[str], page: Page) -> Path:
    """Writes `render` of ``page``, whole or not at all; missing folders are made. FastidcError where that fails."""
    return write_text(path, render(page))
