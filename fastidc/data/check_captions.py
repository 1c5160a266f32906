"""Looking at sentences and at pairs as their annotations state them, and counting."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from fastidc.data.datasets.base import SPLITS, Annotations, Entry
from fastidc.data.datasets.flaws import Collector, Flaw, Where
from fastidc.errors import FastidcError
from fastidc.tokenizer import Tokenizer

TOKENS = (32, 77)
"""Lengths whose truncated share is told: the official --max_words, and CLIP's own."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffd\ud800-\udfff]")
_SHOWN = 40


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "...")


def _entries(annotations: Annotations) -> Iterator[tuple[str, Entry]]:
    return ((split, entry) for split in SPLITS for entry in annotations[split])


def check_captions(annotations: Annotations, max_words: int, sink: Collector, progress: bool = True) -> dict[str, Any]:
    """Tells ``sink`` of sentences with odd characters or longer than ``max_words`` tokens, of ids that meet, and of pairs without a distractor
    among those that have one. Returns the counts that `fastidc check` prints."""
    for _, entry in _entries(annotations):
        for text in dict.fromkeys((*entry.captions, *entry.no_change_captions)):
            _characters(entry, text, sink)
        _characters(entry, entry.id, sink, "the id")
        if not any(text.strip() for text in entry.captions):
            what, fix = "has no sentence that is not empty", "write one; --empty drop, the default, leaves the pair out"
            sink(Flaw("captions-none", entry.where, what, fix, id=entry.id, level="note"))
    _ids_that_meet(annotations, sink)
    _distractors(annotations, sink)
    return _counts(annotations) | _lengths(annotations, max_words, sink, progress)


def _characters(entry: Entry, text: str, sink: Collector, name: str = "the sentence") -> None:
    found = sorted(set(_CONTROL.findall(text)))
    if not found:
        return
    signs = ", ".join(f"U+{ord(sign):04X}" for sign in found)
    half = any("\ud800" <= sign <= "\udfff" for sign in found)
    what = f"has {signs} in {name} {_shown(text)}"
    if half:
        sink(Flaw("characters", entry.where, f"{what}, half a character, which no file can hold", "write it anew", id=entry.id))
    else:
        fix = "the text was decoded wrongly: write it anew" if "\ufffd" in found else "take it out"
        sink(Flaw("characters", entry.where, what, fix, id=entry.id, level="note"))


def _ids_that_meet(annotations: Annotations, sink: Collector) -> None:
    """A distractor pair is called "<id>_n", which may be another pair's name; on a disk that knows no capitals ids that differ in nothing else meet."""
    ids = {entry.id for _, entry in _entries(annotations)}
    for _, entry in _entries(annotations):
        if entry.distractor is not None and f"{entry.id}_n" in ids:
            what = f"has a distractor pair, which is called {entry.id + '_n'!r} as another pair is"
            sink(Flaw("duplicate", entry.where, what, "rename one of them", id=entry.id))


def _distractors(annotations: Annotations, sink: Collector) -> None:
    having = [entry for _, entry in _entries(annotations) if entry.distractor is not None]
    lacking = [entry for _, entry in _entries(annotations) if entry.distractor is None]
    if having and lacking:
        few, word = (lacking, "no") if len(lacking) <= len(having) else (having, "a")
        for entry in few:
            what = f"has {word} distractor, unlike {max(len(having), len(lacking)):,} other pairs"
            sink(Flaw("distractor", entry.where, what, "give one to all pairs or to none", field="distractor", id=entry.id))


def _counts(annotations: Annotations) -> dict[str, Any]:
    splits, types = {}, Counter()
    for split in SPLITS:
        entries = annotations[split]
        texts = [text for entry in entries for text in entry.captions]
        splits[split] = {
            "pairs": len(entries),
            "sentences": len(texts),
            "empty": sum(not text.strip() for text in texts),
            "no_change_sentences": sum(len(entry.no_change_captions) for entry in entries),
        }
        types.update(entry.type for entry in entries if entry.type is not None)
    return {"splits": splits, "types": dict(types.most_common())}


def _lengths(annotations: Annotations, max_words: int, sink: Collector, progress: bool) -> dict[str, Any]:
    """Words, tokens and how many sentences are longer than a model reads. A sentence takes its tokens, a start and an end."""
    uses = Counter(text for _, entry in _entries(annotations) for text in (*entry.captions, *entry.no_change_captions) if text.strip())
    words = {text: re.findall(r"\w+(?:'\w+)*", text.lower()) for text in uses}
    out: dict[str, Any] = {
        "vocabulary": {"words": len({word for found in words.values() for word in found})},
        "longest_words": max(map(len, words.values()), default=0),
    }
    tokenizer, known, lengths = Tokenizer(), set(), {}
    try:
        for text in tqdm(uses, desc="check sentences", unit="sentence", leave=False, delay=1, disable=not progress):
            rows = tokenizer.encode(text)
            known.update(rows)
            lengths[text] = len(rows) + 2
    except FastidcError as error:  # without open_clip
        return out | {"tokens": None, "tokens_reason": str(error)}
    total = sum(uses.values())
    out["vocabulary"]["tokens"] = len(known)
    out["longest_tokens"] = max(lengths.values(), default=0)
    limits = sorted({*TOKENS, max_words})
    out["truncated"] = {str(most): sum(uses[t] for t, n in lengths.items() if n > most) / max(total, 1) for most in limits}
    for _, entry in _entries(annotations):
        for text in dict.fromkeys((*entry.captions, *entry.no_change_captions)):
            if lengths.get(text, 0) > max_words:
                what = f"has a sentence of {lengths[text]} tokens, {_shown(text)}"
                fix = f"shorten it, or raise --max-words: what exceeds {max_words} is cut off"
                sink(Flaw("sentence-long", entry.where, what, fix, id=entry.id, level="note"))
    return out


def check_splits(annotations: Annotations, images: Mapping[str, list], root: Where, sink: Collector) -> None:
    """Tells ``sink`` of empty splits and of images that are in more than one. ``images``: split -> the images of its pairs."""
    for split in SPLITS:
        if not annotations[split]:
            what = f"has no pairs of {split}" + (", so nothing can be trained" if split == "train" else "")
            sink(Flaw("split-empty", root, what, "see whether that is meant", level="note"))
    for index, first in enumerate(SPLITS):
        for second in SPLITS[index + 1 :]:
            both = set(images[first]) & set(images[second])
            if both:
                what = f"has {len(both):,} images in both {first} and {second}, such as {min(both)}"
                sink(Flaw("split-shared", root, what, "scores of the one profit from the other: keep them in one", level="note"))
