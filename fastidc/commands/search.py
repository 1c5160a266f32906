"""`fastidc search`: pairs by a sentence, or sentences by a pair."""

from pathlib import Path
from typing import Any, Literal

from fastidc.commands.caption import check_image, chosen_model, say
from fastidc.errors import FastidcError


def search(
    query: str | None = None,
    /,
    *,
    pairs: Path | None = None,
    captions: Path | None = None,
    before: Path | None = None,
    after: Path | None = None,
    model: str | None = None,
    top: int = 10,
    json: bool = False,
    save: Path | None = None,
    index: Path | None = None,
    split: Literal["all", "train", "val", "test"] = "all",
    images: Path | None = None,
    batch_size: int = 64,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> int:
    """Rank pairs by a sentence, or the captions of a file by a pair.

    Example: fastidc search "the red ball moved" --pairs DATA --save data.npz

    Exit codes: 0 all well, 1 some pairs left out, 2 bad input, 130 interrupted.

    Args:
        query: QUERY, a sentence.
        pairs: Folder, table or data set to search, as in fastidc caption.
        captions: Sentences to search: .txt, one a line, or a .json list.
        before: With --after, the pair to look for.
        after: The pair's other image.
        model: Adapted run; else $FASTIDC_MODEL or runs/demo/adapt.
        top: How many to show.
        json: Print a JSON list.
        save: Keep the embeddings here (.npz).
        index: Search what --save kept.
        split: Of a data set's pairs.
        images: Folder of the images.
        batch_size: Pairs at a time.
        device: Where to run.
    """
    if top < 1:
        raise FastidcError(f"--top must be at least 1, got {top}.")
    if (before is None) != (after is None):
        raise FastidcError("--before and --after make a pair; give both.")
    if (query is None) == (before is None):
        raise FastidcError('one thing is looked for: a sentence, "the red ball moved", or a pair, --before A --after B.')
    kind, source = ("pairs", pairs) if before is None else ("captions", captions)
    if (source is None) == (index is None):
        raise FastidcError(f"what is searched? Give --{kind}, or --index that --save made of it, one of the two.")
    if index is not None and save is not None:
        raise FastidcError("--save keeps what --pairs or --captions give, and --index is kept already; leave one of them out.")
    if save is not None and save.suffix.lower() != ".npz":
        raise FastidcError(f"{save}: an index's name ends in .npz.")
    if (other := captions if kind == "pairs" else pairs) is not None:
        say(f"{other} is not searched: {'a sentence looks for pairs' if kind == 'pairs' else 'a pair looks for captions'}.")

    from fastidc.describe.index import Index, fingerprint
    from fastidc.describe.loading import load
    from fastidc.describe.search import embed_pairs, embed_query, rank

    held = Index.load(index, kind) if index is not None else None
    made = _Pairs(source, split, images) if kind == "pairs" and held is None else _Captions(source) if held is None else None
    for path in (before, after):
        if path is not None:
            check_image(path)
    ready = load(chosen_model(model, "search"), device)
    wanted = embed_query(ready, query) if before is None else embed_pairs(ready, [(before, after)], workers=2)[0]
    left_out = 0
    if held is not None:
        held.check(index, ready)
    else:
        entries, embeddings, left_out = made.embed(ready, batch_size)
        held = Index(kind, entries, embeddings, fingerprint(ready) if save is not None else "", made.files)
        if save is not None:
            held.save(save)
            say(f"wrote {save}: {len(entries):,} {kind}.")
    _show(kind, [(held.entries[i], score) for i, score in rank(wanted, held.embeddings, top)], json)
    if left_out:
        say(f"{left_out:,} pairs are left out.")
    return int(left_out > 0)


class _Pairs:
    """Pairs to search."""

    def __init__(self, source: Path, split: str, images: Path | None):
        from fastidc.describe.index import stamps
        from fastidc.describe.pairs import Pair, read_pairs

        found = read_pairs(source, split, images, say)
        self.pairs = [pair for pair in found if isinstance(pair, Pair)]
        self.bad_rows = [row for row in found if not isinstance(row, Pair)]
        self.files = stamps([path.absolute() for pair in self.pairs for path in (pair.before, pair.after)])

    def embed(self, ready, batch_size: int) -> tuple[list, Any, int]:
        import sys

        from tqdm import tqdm

        from fastidc.describe.index import Entry
        from fastidc.describe.search import embed_pairs

        left_out: dict[int, FastidcError] = {}
        with tqdm(total=len(self.pairs), desc="embed", unit="pair", file=sys.stderr) as bar:
            found = embed_pairs(
                ready, ((pair.before, pair.after) for pair in self.pairs), batch_size=batch_size, left_out=left_out, bar=bar
            )
        for name, error in [*self.bad_rows, *((self.pairs[number].id, error) for number, error in left_out.items())]:
            say(f"{name} is left out: {error}")
        kept = [pair for number, pair in enumerate(self.pairs) if number not in left_out]
        if not kept:
            raise FastidcError("none of the pairs can be read, so there is nothing to search.")
        entries = [Entry(pair.id, str(pair.before), str(pair.after)) for pair in kept]
        used = {str(path.absolute()) for pair in kept for path in (pair.before, pair.after)}
        self.files = {name: stamp for name, stamp in self.files.items() if name in used}
        return entries, found, len(left_out) + len(self.bad_rows)


class _Captions:
    """Sentences to search, each once, in the order of the file."""

    def __init__(self, source: Path):
        from fastidc.describe.index import stamps

        self.files = stamps([source.absolute()])
        self.sentences = _sentences(source)

    def embed(self, ready, batch_size: int) -> tuple[list, Any, int]:
        from fastidc.describe.index import Entry
        from fastidc.describe.search import embed_texts

        return [Entry(sentence) for sentence in self.sentences], embed_texts(ready, self.sentences), 0


def _sentences(path: Path) -> list[str]:
    from fastidc.data.datasets.base import read_json, sentences_of

    if path.suffix.lower() == ".json":
        found = sentences_of(read_json(path), str(path), "[]")
    else:
        try:
            found = path.read_text(encoding="utf-8-sig").split("\n")
        except FileNotFoundError:
            raise FastidcError(f"{path}: no such file of captions.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise FastidcError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    found = list(dict.fromkeys(text.strip() for text in found if text.strip()))
    if not found:
        raise FastidcError(f"{path}: has no sentences to search; write one a line.")
    return found


def _show(kind: str, found: list, json: bool) -> None:
    from fastidc.describe.stream import line_of

    rows = []
    for place, (entry, score) in enumerate(found, 1):
        what = {"id": entry.name, "before": entry.before, "after": entry.after} if kind == "pairs" else {"caption": entry.name}
        rows.append({"rank": place, "score": score, **what})
    if json:
        print("[" + ",\n ".join(map(line_of, rows)) + "]")
        return
    for row in rows:
        name = f"{row['id']}  {row['before']}  {row['after']}" if kind == "pairs" else row["caption"]
        print(f"{row['rank']:>3}  {row['score']:.4f}  {name}")
