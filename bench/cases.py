"""The only place with shapes: the paper's first, then those of larger towers, and a tiny list of every family for ``--smoke``.

``Scale``: "paper" is every size, for a GPU; "cpu" the smallest size of every shape; "smoke" the tiny list.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastidc.config import ModelConfig

Scale = Literal["paper", "cpu", "smoke"]
CAPTION = (10, 18)  # tokens of a packed caption, start and end included, drawn evenly: 14 on average

B32 = ModelConfig()
B16 = ModelConfig(patch_size=16)
L14 = ModelConfig(patch_size=14, vision_width=1024, vision_layers=24, intra_layers=18, embed_dim=768)
TINY = ModelConfig(
    image_size=32,
    patch_size=16,
    vision_width=64,
    vision_layers=2,
    intra_layers=1,
    embed_dim=64,
    text_layers=1,
    vocab_size=64,
    context_length=40,
    captioner_layers=1,
)


def sized(sizes: tuple[int, ...], scale: Scale) -> tuple[int, ...]:
    return sizes if scale == "paper" else (min(sizes),)


@dataclass(frozen=True)
class AttentionShape:
    """``sequences`` of ``length`` a pair. keys: cross-attention over so many; ragged: packed captions of at most ``length`` tokens."""

    name: str
    length: int
    heads: int
    sizes: tuple[int, ...]  # pairs
    sequences: int = 1
    causal: bool = False
    dropout: float = 0.0
    keys: int | None = None
    ragged: bool = False
    head_dim: int = 64


# By value: the size at which the device is busy for every shape, then the paper's, then those that show how it scales.
_PAIRS = (1024, 128, 64, 512, 16, 4096)
_FEWER = (1024, 64, 256, 16)
ATTENTION = (
    AttentionShape("intra B/32", 50, 12, _PAIRS, sequences=2),
    AttentionShape("inter B/32", 100, 12, _PAIRS),
    AttentionShape("text", 32, 8, _PAIRS, causal=True),
    AttentionShape("text packed", 32, 8, _PAIRS, causal=True, ragged=True),
    AttentionShape("caption encoder", 100, 8, _PAIRS, dropout=0.1),
    AttentionShape("caption cross", 32, 8, _PAIRS, keys=100),
    AttentionShape("intra B/16", 197, 12, _FEWER, sequences=2),
    AttentionShape("inter B/16", 394, 12, _FEWER),
    AttentionShape("intra L/14", 257, 16, _FEWER, sequences=2),
    AttentionShape("inter L/14", 514, 16, _FEWER),
)
ATTENTION_SMOKE = (
    AttentionShape("intra", 10, 2, (3,), sequences=2, head_dim=16),
    AttentionShape("text", 8, 2, (3,), causal=True, head_dim=16),
    AttentionShape("text packed", 18, 2, (3,), causal=True, ragged=True, head_dim=16),
    AttentionShape("caption encoder", 12, 2, (3,), dropout=0.1, head_dim=16),
    AttentionShape("caption cross", 6, 2, (3,), keys=12, head_dim=16),
)

# (batch, width, with gradients)
INFO_NCE = (
    *((batch, 512, True) for batch in (128, 512, 1024, 4096, 16384, 65536)),
    (262144, 512, False),
    *((batch, 768, True) for batch in (128, 1024, 16384)),
)
INFO_NCE_CPU = ((128, 512, True), (512, 512, True), (128, 768, True))
INFO_NCE_SMOKE = ((8, 16, True), (8, 16, False))


@dataclass(frozen=True)
class VocabularyShape:
    """``rows`` of width ``width``, of which the share ``real`` has a target (the others hold the pad id); trained: the table wants its gradient."""

    name: str
    rows: int
    trained: bool
    bias: bool = True
    real: float = 1.0
    width: int = 512
    vocabulary: int = 49408


VOCABULARY = tuple(
    VocabularyShape(f"{'trained' if trained else 'frozen'} N={rows}", rows, trained)
    for rows in (224, 1792, 14336, 57344)
    for trained in (False, True)
) + (
    VocabularyShape("frozen padded N=32768", 32768, False, real=14 / 32),
    VocabularyShape("frozen no bias N=14336", 14336, False, bias=False),
    VocabularyShape("trained no bias N=14336", 14336, True, bias=False),
)
VOCABULARY_CPU = VOCABULARY[:2]
VOCABULARY_SMOKE = tuple(
    VocabularyShape(f"{'trained' if trained else 'frozen'}{'' if bias else ' no bias'}", 6, trained, bias, real, 16, 40)
    for trained, bias, real in ((False, True, 1.0), (True, True, 0.5), (True, False, 1.0))
)

# (name, rows, width, with residual): a block's own is with residual
LAYER_NORM = tuple(
    (name, pairs * tokens, width, residual)
    for name, tokens, width in (("B/32", 100, 768), ("text", 14, 512), ("B/16", 394, 768), ("L/14", 514, 1024))
    for pairs in (16, 128, 1024)
    for residual in (True, False)
)
LAYER_NORM_CPU = LAYER_NORM[:2]
LAYER_NORM_SMOKE = (("tiny", 12, 32, True), ("tiny", 12, 32, False))

# (name, rows, numbers summed, numbers out): tokens of B = 128 and 1,024 pairs, and of their captions packed
PRODUCTS = tuple(
    (f"{tower} {layer}", rows, inner * width, outer * width)
    for tower, width, sizes in (("B/32", 768, (12800, 102400)), ("text", 512, (1792, 14336)))
    for rows in sizes
    for layer, inner, outer in (("qkv", 1, 3), ("out", 1, 1), ("fc1", 1, 4), ("fc2", 4, 1))
)
PRODUCTS_CPU = (("text out", 448, 512, 512),)
PRODUCTS_SMOKE = (("tiny", 24, 32, 48),)

# (name, patch size, images gathered, each of them once, so that a call reads as many bytes as its inputs have)
PATCHES = tuple((name, patch, images) for name, patch in (("B/32", 32), ("B/16", 16), ("L/14", 14)) for images in (32, 256, 2048))
PATCHES_CPU = (("B/32", 32, 8),)
PATCHES_SMOKE = (("tiny", 16, 3),)

# (format, images in a call, width, height): CLEVR-Change is PNG 480x320
LOADER = (("png", 256, 480, 320), ("jpeg", 256, 480, 320))
LOADER_CPU = (("png", 16, 480, 320), ("jpeg", 16, 480, 320))
LOADER_SMOKE = (("png", 3, 48, 32), ("jpeg", 3, 48, 32))


@dataclass(frozen=True)
class FeedingShape:
    """``samples`` a step; a cache of ``images`` at least."""

    name: str
    config: ModelConfig
    stage: Literal["adapt", "finetune"]
    samples: int
    images: int


FEEDING = tuple(FeedingShape("B/32", B32, stage, samples, 24_576) for stage, samples in (("adapt", 1024), ("finetune", 256)))
FEEDING_CPU = (FeedingShape("B/32", B32, "adapt", 8, 512),)
FEEDING_SMOKE = tuple(FeedingShape("tiny", TINY, stage, 2, 64) for stage in ("adapt", "finetune"))

OPTIMIZER = (("adapt B/32", B32, "adapt"), ("finetune B/32", B32, "finetune"), ("adapt L/14", L14, "adapt"))
OPTIMIZER_CPU = OPTIMIZER[:1]
OPTIMIZER_SMOKE = (("tiny", TINY, "finetune"),)


@dataclass(frozen=True)
class StepShape:
    """samples: None is the largest batch that fits; waterfall: with a variant for every feature of fastidc."""

    name: str
    config: ModelConfig
    stage: Literal["adapt", "finetune"]
    samples: int | None
    waterfall: bool = False


_MODELS = (("B/32", B32), ("B/16", B16), ("L/14", L14))
# The paper's batches first, then one large one of each stage: a run that is cut short has answered what matters most.
TRAIN_STEP = (
    *(StepShape("B/32", B32, stage, n, n <= 128) for stage, n in (("adapt", 128), ("finetune", 16), ("adapt", 1024), ("finetune", 256))),
    *(StepShape("B/32", B32, stage, None) for stage in ("adapt", "finetune")),
    *(StepShape("B/32", B32, stage, n) for stage, n in (("adapt", 64), ("finetune", 64), ("adapt", 512), ("finetune", 1024))),
    *(StepShape(name, config, stage, n) for name, config in _MODELS[1:] for stage, n in (("adapt", 64), ("finetune", 16), ("adapt", 128))),
)
TRAIN_STEP_CPU = (
    *(StepShape("B/32", B32, stage, n) for stage, n in (("adapt", 2), ("finetune", 1))),
    *(StepShape("B/32", B32, stage, 16, True) for stage in ("adapt", "finetune")),
)
TRAIN_STEP_SMOKE = tuple(StepShape("tiny", TINY, stage, n, n is not None) for n in (2, None) for stage in ("adapt", "finetune"))


class GenerateShape(NamedTuple):
    """``towers=False``: from the pairs' tokens on, so that the loop is seen by itself."""

    name: str
    config: ModelConfig
    pairs: int
    towers: bool = True


GENERATE = (
    *(GenerateShape(name, config, pairs) for name, config in _MODELS for pairs in ((1, 64, 1024) if name == "B/32" else (1, 64))),
    GenerateShape("B/32 loop", B32, 64, towers=False),
)
# On a CPU 32 pairs as well: with 2 every step waits for its weights to come from memory, whatever it computes.
GENERATE_CPU = (
    GenerateShape("B/32", B32, 2),
    GenerateShape("B/32", B32, 32),
    GenerateShape("B/32 loop", B32, 32, towers=False),
)
GENERATE_SMOKE = (GenerateShape("tiny", TINY, 2), GenerateShape("tiny loop", TINY, 2, towers=False))
STEPS = {"paper": 32, "cpu": 32, "smoke": 5}  # words generated


def of(family: str, scale: Scale) -> tuple:
    """The shapes of ``family`` at ``scale``."""
    name = family.upper()
    everything = globals()
    suffix = {"paper": "", "cpu": "_CPU", "smoke": "_SMOKE"}[scale]
    return everything.get(name + suffix, everything[name])
