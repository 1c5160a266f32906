"""A small fine-tuned run with weights that tell images apart, and pairs to show it."""

from pathlib import Path

import worlds

from fastidc import checkpoint
from fastidc.describe import write_no_change
from fastidc.tokenizer import vocabulary_of

SENTENCES = ["nothing", "no change", "nothing has changed"]  # short ones, or drawn weights give them no share
CAPTIONS = ["the red cube left of the sphere moved", "the blue cube has been added", "the green ball is gone", *SENTENCES]
MAX_WORDS = 12


def run_folder(
    path: Path, sentences: list[str] | None = SENTENCES, calibration: dict | None = None, captioner: bool = True, seed: int = 4
) -> Path:
    """A run folder of a model with drawn weights, whose no_change.json holds ``sentences``, or which has none."""
    ids = vocabulary_of(CAPTIONS)
    config = worlds.SMALL.replace(vocabulary=ids, vocab_size=len(ids), captioner_layers=2 if captioner else 0, dropout=0.1)
    weights = checkpoint.from_official(worlds.official_state(config, "caption" if captioner else "adapt", seed))
    checkpoint.save(path, config, weights, {"recipe": {"max_words": MAX_WORDS}})
    if sentences is not None:
        write_no_change(path, sentences, calibration)
    return path


def image_pairs(folder: Path, count: int) -> list[tuple[Path, Path]]:
    """Pairs of noise, {i}.png and {i}_2.png."""
    return [
        tuple(worlds.noise_image(folder / f"{i}{tail}.png", 2 * i + side, (60, 50)) for side, tail in enumerate(("", "_2")))
        for i in range(count)
    ]
