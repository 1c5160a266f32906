"""The probability that anything changed: what the captioner leaves when every sentence for "nothing did" has had its share."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.checkpoint import NO_CHANGE_FILE
from fastidc.data.images import Pixels
from fastidc.data.loaders import ahead, in_order
from fastidc.data.records import PairRecord, read_json
from fastidc.errors import FastidcError
from fastidc.evaluate.probability import Calibration, calibrate
from fastidc.files import write_json
from fastidc.packed import caption_lengths
from fastidc.tokenizer import Tokenizer

ROWS = 1 << 14  # words of sentences that pass the decoder at a time
LOGITS = 1 << 24  # numbers of the vocabulary product that exist at a time


def no_change_sentences(records: Iterable[PairRecord]) -> list[str]:
    """The distinct sentences of ``records`` that say that nothing changed, in order of first appearance."""
    return list(dict.fromkeys(text for record in records for text in record.no_change_captions if text.strip()))


@dataclass(frozen=True)
class NoChange:
    """What a model's run folder holds in ``no_change.json``."""

    sentences: tuple[str, ...]
    calibration: Mapping | None = None
    """"scale" and "shift" of `fastidc.evaluate.probability`, the "split" and number of "pairs" they were fitted on."""

    @classmethod
    def of_run(cls, folder: str | os.PathLike) -> "NoChange | None":
        """Of a run folder, None where it has no such file; FastidcError where the file is damaged."""
        path = Path(folder) / NO_CHANGE_FILE
        if not path.is_file():
            return None
        values = read_json(path)
        sentences = values.get("sentences") if isinstance(values, dict) else None
        if not isinstance(sentences, list) or not all(isinstance(text, str) for text in sentences):
            raise FastidcError(f"{path}: field 'sentences' must be a list of sentences; fine-tune again, or delete the file.")
        calibration = values.get("calibration")
        numbers = [calibration.get(name) for name in ("scale", "shift")] if isinstance(calibration, dict) else []
        if calibration is not None and not (numbers and all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers)):
            raise FastidcError(
                f"{path}: field 'calibration' must be null or hold the numbers 'scale' and 'shift'; fine-tune again, or delete the file."
            )
        return cls(tuple(sentences), calibration)

    def calibrated(self, p: float) -> float:
        """``p`` as `change_probability` gives it -> the calibrated one, or itself without a calibration."""
        if self.calibration is None:
            return p
        return float(Calibration(self.calibration["scale"], self.calibration["shift"])(p))


def write_no_change(folder: str | os.PathLike, sentences: Sequence[str], calibration: Mapping | None = None) -> Path:
    """Writes ``no_change.json`` of a run folder, whole or not at all."""
    return write_json(Path(folder) / NO_CHANGE_FILE, {"sentences": list(sentences), "calibration": calibration})


class Sentences:
    """Sentences as the captioner is taught them, each once: two that have the same tokens would be counted twice.

    max_words: as in training, which cuts them there. FastidcError where there are none.
    """

    def __init__(self, tokenizer: Tokenizer, sentences: Sequence[str], max_words: int):
        rows = dict.fromkeys((tuple(x), tuple(y)) for x, y in (tokenizer.caption(text, max_words) for text in sentences))
        if not rows:
            raise FastidcError("there are no sentences to score; the probability of a change needs those of no change.")
        length = max(len(inputs) for inputs, _ in rows)
        inputs, targets = ([list(row) + [0] * (length - len(row)) for row in side] for side in zip(*rows, strict=True))
        self.inputs, self.targets = torch.tensor(inputs), torch.tensor(targets)  # int64 [S, T]
        self.lengths = caption_lengths(self.targets)  # the pad id is also a word, so its place and not its number tells a pad

    def __len__(self) -> int:
        return len(self.inputs)


def sentence_log_probs(model, tokens: Tensor, sentences: Sentences) -> Tensor:
    """log p(sentence | pair), its end token included: tokens [B, M, E] of pairs (`CLIP4IDC.encode_batch`) -> [B, S] float64, natural logarithm.

    Teacher-forced: a pair's tokens pass the captioner's encoder once, whatever the number of sentences; sentences go `ROWS` words at a time,
    their vocabulary product in fp32 (or the tokens' own float64), `LOGITS` numbers at a time. The model must be in evaluation mode.
    """
    captioner, text = model.captioner, model.text_encoder
    memory, pairs = captioner.encode(tokens), len(tokens)
    out = torch.empty(pairs, len(sentences), dtype=torch.float64, device=tokens.device)
    step = max(1, ROWS // (pairs * sentences.inputs.shape[1]))
    for first in range(0, len(sentences), step):
        part = slice(first, first + step)
        lengths = sentences.lengths[part]
        longest = int(lengths.max())
        real = torch.arange(longest) < lengths[:, None]
        # on the host, which knows the lengths: a mask on the device would have to be waited for
        made = (
            sentences.inputs[part, :longest],
            sentences.targets[part, :longest][real],
            real.flatten().nonzero()[:, 0],
            real.nonzero()[:, 0],
        )
        inputs, targets, places, owner = (x.to(tokens.device, non_blocking=True) for x in made)
        x = captioner.decode(inputs.repeat(pairs, 1), memory, text.token_embedding, text.position)
        x = x.view(pairs, inputs.numel(), -1).index_select(1, places)  # [B, words, E]
        found = _word_log_probs(x.flatten(0, 1), targets.repeat(pairs), text.token_embedding, captioner.head_bias)
        sums = torch.zeros(pairs, len(lengths), dtype=torch.float64, device=tokens.device)
        out[:, part] = sums.scatter_add(1, owner.expand(pairs, -1), found.double().view(pairs, -1))
    return out


def _word_log_probs(x: Tensor, targets: Tensor, words: Tensor, bias: Tensor) -> Tensor:
    """x [N, E], targets [N], words [V, E], bias [V] -> log-probability of each target, [N], in fp32 or more."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    parts = []
    with torch.autocast(x.device.type, enabled=False):
        words, bias = words.to(dtype), bias.to(dtype)
        for rows, target in zip(*(y.split(max(1, LOGITS // len(words))) for y in (x.to(dtype), targets)), strict=True):
            logits = F.linear(rows, words, bias)
            parts.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(parts)


def change_probability(log_probs: Tensor) -> Tensor:
    """log p of every no-change sentence [B, S] -> 1 - their sum, [B], not calibrated. Near 1 and near 0 nothing is lost to rounding that the
    logarithms still hold."""
    return -torch.expm1(log_probs.double().logsumexp(1).clamp(max=0))


@torch.no_grad()
def change_probabilities(
    model,
    tokenizer: Tokenizer,
    records: Sequence[PairRecord],
    images: Pixels,
    no_change: NoChange | Sequence[str],
    *,
    max_words: int,
    batch_size: int = 64,
    bar=None,
) -> dict[str, float]:
    """image_id -> probability that the pair changed, for every pair of ``records``, ordered as `fastidc.evaluate.predict.references_of`.

    no_change: sentences, or with them a calibration, which is then applied. The model must be in evaluation mode.
    """
    known = no_change if isinstance(no_change, NoChange) else NoChange(tuple(no_change))
    sentences = Sentences(tokenizer, known.sentences, max_words)
    device = model.logit_scale.device
    change, none = {}, {}
    for batch in ahead(in_order(records, images, batch_size, pinned=device.type == "cuda")):
        tokens = model.encode_batch(batch.images.to(device, non_blocking=True))[1]
        found = change_probability(sentence_log_probs(model, tokens.flatten(0, 1), sentences)).view(tokens.shape[:2])
        for name, row in zip(batch.ids, found.tolist(), strict=True):
            change[name] = known.calibrated(row[0])
            if len(row) > 1:
                none[f"{name}_n"] = known.calibrated(row[1])
        if bar is not None:
            bar.update(found.numel())
    return change | none


def fit_change_probability(probabilities: Mapping[str, float], records: Sequence[PairRecord]) -> dict | None:
    """The calibration for `NoChange`, from `change_probabilities` without one over ``records`` of val: a change pair is one, its distractor pair
    none.

    None where the split has only one of the two kinds, from which nothing can be learnt.
    """
    labels = {record.id: 1 for record in records} | {record.no_change_id: 0 for record in records if record.distractor is not None}
    if set(labels.values()) != {0, 1}:
        return None
    fitted = calibrate([probabilities[name] for name in labels], list(labels.values()))
    return {"scale": fitted.scale, "shift": fitted.shift, "split": "val", "pairs": len(labels)}


def write_change_probabilities(folder: str | os.PathLike, split: str, probabilities: Mapping[str, float]) -> Path:
    """Writes ``change_<split>.json``, {image_id: p}, whole or not at all; `fastidc evaluate` judges it. Give it probabilities without a
    calibration: it fits one on val itself, to say what that is worth."""
    return write_json(Path(folder) / f"change_{split}.json", dict(probabilities))
