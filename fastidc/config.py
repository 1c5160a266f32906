"""Frozen configurations and the named presets. Standard library only."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastidc.errors import FastidcError
from fastidc.safety import Safety

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PAD_ID = 0  # the official choice; in CLIP's vocabulary it is the token "!"
START_ID = 49406
END_ID = 49407


# (field, least, most): a config of a file may claim anything, and a model of that size would be built.
_LIMITS = (
    *((name, 1, 1 << 16) for name in ("image_size", "patch_size", "vision_width", "embed_dim", "context_length", "head_dim")),
    ("vocab_size", 1, 1 << 20),
    *((name, 1, 512) for name in ("vision_layers", "text_layers")),
    *((name, 0, 512) for name in ("intra_layers", "captioner_layers")),
)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a CLIP4IDC model (clip4idc.md 1 to 3). The defaults are ViT-B/32 with the paper's 9 + 3 split.

    The text tower, the captioner and the joint space share one width, ``embed_dim``, because the captioner is tied to the text
    tower's token and position tables; every OpenAI ViT CLIP has it so.
    """

    image_size: int = 224
    patch_size: int = 32
    vision_width: int = 768
    vision_layers: int = 12
    intra_layers: int = 9
    embed_dim: int = 512
    text_layers: int = 12
    vocab_size: int = 49408
    context_length: int = 77
    captioner_layers: int = 3  # 0 where there is no captioner (an adapted model before fine-tuning)
    head_dim: int = 64
    dropout: float = 0.1  # of the captioner; CLIP has none
    pair_input: Literal["concat", "difference"] = "concat"
    """What the inter layers read: "concat" = [before, after], the paper. "difference" = [before, after - before] is fastidc's own
    addition for training from random initialisation; it is not CLIP4IDC."""
    vocabulary: tuple[int, ...] | None = None
    """BPE ids that the token table holds, ascending, row by row; None means all of CLIP's (our addition, for `tiny`)."""

    def __post_init__(self) -> None:
        def refuse(sentence: str) -> None:
            raise FastidcError(f"model config: {sentence}")

        for name, least, most in _LIMITS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                refuse(f"{name} must be {'a positive integer' if least else '0 or more'}, got {value!r}.")
            if value > most:
                refuse(f"{name} is {value}, and no CLIP has more than {most:,}.")
        if self.image_size % self.patch_size:
            refuse(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        for name in ("vision_width", "embed_dim"):
            if getattr(self, name) % self.head_dim:
                refuse(f"{name} {getattr(self, name)} is not a multiple of head_dim {self.head_dim}.")
        if not 1 <= self.intra_layers <= self.vision_layers:
            refuse(
                f"intra_layers {self.intra_layers} lies outside the model; with {self.vision_layers} vision layers choose 1 to {self.vision_layers}."
            )
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            refuse(f"dropout must lie in [0, 1), got {self.dropout}.")
        if self.pair_input not in ("concat", "difference"):
            refuse(f'pair_input must be "concat" or "difference", got {self.pair_input!r}.')
        if self.vocabulary is not None:
            object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
            ids = self.vocabulary
            if (
                not all(type(i) is int for i in ids)
                or list(ids) != sorted(set(ids))
                or not {PAD_ID, START_ID, END_ID} <= set(ids)
                or ids[0] < 0
            ):
                refuse(f"vocabulary must be ascending BPE ids that include {PAD_ID}, {START_ID} and {END_ID}.")
            if self.vocab_size != len(ids):
                refuse(f"vocab_size {self.vocab_size} differs from the {len(ids)} ids of vocabulary.")

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: the class token and the patches."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def vision_heads(self) -> int:
        return self.vision_width // self.head_dim

    @property
    def text_heads(self) -> int:
        return self.embed_dim // self.head_dim

    @property
    def start_id(self) -> int:
        """Row of the start token in the token table."""
        return self.vocab_size - 2

    @property
    def end_id(self) -> int:
        """Row of the end token: the largest, which is how CLIP's text tower finds it."""
        return self.vocab_size - 1

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict, source: str = "model config") -> "ModelConfig":
        """Reads ``to_dict``'s output; raises FastidcError naming ``source`` and the field."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise FastidcError(f"{source}: unknown field {unknown[0]!r} in the model config; this file is from another version of fastidc.")
        try:
            return cls(**values)
        except TypeError as error:
            raise FastidcError(f"{source}: the model config does not fit: {error}.") from None
        except FastidcError as error:
            raise FastidcError(str(error).replace("model config", source, 1)) from None


@dataclass(frozen=True)
class Recipe:
    """How one stage trains. Rates are those of the new parameters; CLIP's own move at ``lr * coef_lr`` (clip4idc.md 5)."""

    epochs: int
    batch_size: int  # samples of all processes together; a sample is a sentence in adaptation, a scene in captioning
    lr: float
    coef_lr: float
    optimizer: Literal["bert_adam", "adamw", "muon"]  # the official one; ours where there are no pretrained weights: see train/optim.py
    schedule: Literal["warmup_cosine", "warmup_linear", "cosine"]
    betas: tuple[float, float]
    weight_decay: float
    eps: float = 1e-6
    warmup: float = 0.1  # share of all steps
    clip_norm: float = 1.0
    freeze_layers: int = 0  # -1 freezes nothing, 0 the stem and the tables, k also the first k blocks of both towers
    freeze_tokens: bool = True  # the tied token table; Spot-the-Diff's captioning trains it
    swap_distractor: float = 0.5  # adaptation: how often the distractor stands in for the before-image
    flip: float = 0.0  # how often a pair is mirrored, with "left" and "right" exchanged in its caption (our addition)
    augment: str = ""  # what else is done to training images, see `fastidc.data.augment.Augmentation.parse`; nothing, as in the paper
    captions_per_pair: int = 1  # of a pair's references that a captioning step learns from (more than one is our addition)
    max_words: int = 32
    seed: int = 42
    steps: int | None = None  # trains this long instead of ``epochs``
    accumulate: int = 1  # ``batch_size`` is made up of so many forward and backward passes
    micro_batch: int | None = None  # adaptation: activations of so many samples of a process at a time, for the loss of all of them
    select: Literal["val", "test", "last"] = "val"  # the split on which the kept epoch is best (R@1, CIDEr); or simply the last epoch
    patience: int | None = None  # stops after more than so many epochs in a row that are not the best so far
    gather_grad: Literal["full", "local"] = "full"  # see ops.info_nce
    token_mean: Literal["process", "global"] = "process"  # see train.objectives.Captioning


@dataclass(frozen=True)
class Preset:
    """A named pair of recipes and, where the model starts from nothing, its shape."""

    name: str
    adapt: Recipe
    finetune: Recipe
    model: ModelConfig | None = None
    restrict_vocabulary: bool = False  # keep only the BPE ids of the training captions
    about: str = field(default="", compare=False)


@dataclass(frozen=True)
class TrainOptions(Safety):
    """What a user sets for one stage, on the command line or in Python; None leaves the preset's value."""

    data: Path
    """Folder of a data set, or a .csv, .tsv or .jsonl table of pairs."""
    out: Path
    """Run folder to make: config.json, log.jsonl, model.safetensors, metrics.json."""
    dataset: Literal["auto", "clevr", "spot", "ier", "birds", "table", "folder"] = "auto"
    """What --data holds; auto recognises it."""
    images: Path | None = None
    """Folder of the images, where they do not lie beside the annotations."""
    empty: Literal["drop", "keep"] = "drop"
    """Empty sentences, of which Spot-the-Diff has 66: left out, or kept as captions as in the official code."""
    quarantine: Path | None = None
    """A file of `fastidc check --quarantine`, whose pairs are left out."""
    preset: str | None = None
    """Recipe: clevr, spot, ier, birds (official ones, for CLIP weights) or tiny (from scratch). By default that of the run given with --init,
    else the data set's own."""
    augment: str | None = None
    """Change training images at random, both of a pair alike, as in crop=0.8,brightness=0.2,contrast=0.2,saturation=0.2,noise=4,erase=0.25;
    off by default, as in the paper. Also same_colours=no."""
    init: str | None = None
    """Start from a fastidc run, an official pytorch_model.bin.*, an OpenAI CLIP file, open_clip:ViT-B-32-quickgelu/openai or
    hub:OWNER/NAME."""
    intra_layers: int | None = None
    """Vision layers that see one image alone; by default 9 of 12. A fastidc run knows its own."""
    epochs: int | None = None
    """Passes over the training split."""
    steps: int | None = None
    """Train for so many steps instead."""
    batch_size: int | None = None
    """Samples a step, of all processes together: sentences in adaptation, scenes in fine-tuning."""
    accumulate: int | None = None
    """Forward and backward passes that make up a step, each with a loss of its own."""
    micro_batch: int | None = None
    """Adaptation: hold the activations of so many samples of a process at a time; the contrastive loss and its gradient stay those of the
    whole batch, at the price of a second forward pass."""
    lr: float | None = None
    """Rate of the new parameters."""
    coef_lr: float | None = None
    """CLIP's own parameters train at lr * coef_lr. The official 0.001 belongs to fp16-official; with bf16, fp16 or fp32 try 0.03."""
    freeze_layers: int | None = None
    """-1 freezes nothing, 0 the patch stem and the tables, k also the first k blocks of both towers."""
    max_words: int | None = None
    """Longest caption in tokens, start and end included."""
    seed: int | None = None
    """Seed of every draw: initialisation, order, captions, dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "fp16-official"] = "auto"
    """bf16 or (with loss scaling, for GPUs before Ampere) fp16 products over fp32 masters, fp32, or the official fp16 weights; auto is what
    the hardware has."""
    select: Literal["val", "test", "last"] | None = None
    """Which epoch is kept: the best on val, the best on test (the official protocol), or the last."""
    gather_grad: Literal["full", "local"] | None = None
    """Adaptation with several processes: the gradient of one process with the whole batch, or the official one, divided by their number."""
    token_mean: Literal["process", "global"] | None = None
    """Fine-tuning with several processes: the mean over each process's tokens (official), or over all."""
    beams: int = 1
    """Fine-tuning: captions running at once where val and test are captioned; 1 is greedy, as officially."""
    length_penalty: float = 0.0
    """With --beams: captions compete by the sum of their log-probabilities over length ** this."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile around the captioner; auto compiles on CUDA. Dropout draws other masks than without."""
    graph: Literal["auto", "on", "off"] = "auto"
    """The whole training step as a CUDA graph for each shape of batch; auto does with one process, the official optimiser and bf16 or fp32.
    off trains step by step, with the same results but for rounding and dropout's draws."""
    fp8: bool = False
    """Products of the blocks in 8-bit floating point in training, where they gain from it (Ada, Hopper or newer, bf16); weights' gradients stay
    bf16. It gives other numbers than bf16 does."""
    fsdp: bool = False
    """Several processes: each holds a part of the parameters, gradients and moments (FSDP2), not all of them; for large towers."""
    tensorboard: bool = False
    """Also write losses, rates and scores for TensorBoard, into the run folder."""
    workers: int = 4
    """Threads that read images."""
    loader: Literal["auto", "pillow", "dali", "cache", "memory", "resident"] = "auto"
    """Where pixels come from: files decoded by Pillow or by DALI, or a cache (`fastidc cache build`) on the disk, in memory, or resident on the
    device. auto takes the cache that --cache names or that lies in the data folder, where it fits. Results are the same, but for DALI's on a GPU."""
    cache: Path | None = None
    """The cache; by default fastidc-cache-SIZE.bin in the data folder, SIZE being the model's image size."""
    overwrite: bool = False
    """Replace an earlier run in --out."""


_CLEVR_ADAPT = Recipe(
    epochs=12,
    batch_size=128,
    lr=1e-4,
    coef_lr=1e-3,
    optimizer="bert_adam",
    schedule="warmup_cosine",
    betas=(0.9, 0.98),
    weight_decay=0.2,
)
_CLEVR_FINETUNE = Recipe(
    epochs=50,
    batch_size=16,
    lr=1e-4,
    coef_lr=1e-3,
    optimizer="bert_adam",
    schedule="warmup_linear",
    betas=(0.9, 0.999),
    weight_decay=0.01,
    swap_distractor=0.0,
    seed=2021,
    patience=10,
)
# The official scripts for Spot-the-Diff; its captioner's stage trains the tied word table.
_SPOT_ADAPT = dataclasses.replace(_CLEVR_ADAPT, epochs=20)
_SPOT_FINETUNE = dataclasses.replace(_CLEVR_FINETUNE, freeze_tokens=False, seed=42)
_TINY_ADAPT = Recipe(
    epochs=1,
    steps=250,
    batch_size=32,
    lr=2e-3,
    coef_lr=1.0,
    optimizer="muon",
    schedule="cosine",
    betas=(0.9, 0.98),
    weight_decay=0.05,
    warmup=0.05,
    freeze_layers=-1,
    freeze_tokens=False,
    flip=0.5,
    select="last",
)
_TINY_FINETUNE = dataclasses.replace(_TINY_ADAPT, steps=600, batch_size=16, swap_distractor=0.0, captions_per_pair=6)

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("clevr", _CLEVR_ADAPT, _CLEVR_FINETUNE, about="the official CLEVR-Change recipe, for CLIP weights (give them with --init)"),
        Preset("spot", _SPOT_ADAPT, _SPOT_FINETUNE, about="the official Spot-the-Diff recipe, for CLIP weights"),
        Preset("ier", _SPOT_ADAPT, _SPOT_FINETUNE, about="Image-Editing-Request: no script was published, so Spot-the-Diff's recipe"),
        Preset("birds", _SPOT_ADAPT, _SPOT_FINETUNE, about="Birds-to-Words: not in the paper, so Spot-the-Diff's recipe"),
        Preset(
            "tiny",
            _TINY_ADAPT,
            _TINY_FINETUNE,
            model=ModelConfig(
                image_size=112,
                patch_size=16,
                vision_width=96,
                vision_layers=4,
                intra_layers=2,
                embed_dim=96,
                text_layers=2,
                context_length=40,
                captioner_layers=2,
                head_dim=32,
                dropout=0.0,  # minutes of training do not overfit, and drawing masks costs a tenth of a step on a CPU
                pair_input="difference",
            ),
            restrict_vocabulary=True,
            about="a small model from random initialisation, for the demo and for tests",
        ),
    )
}


def preset(name: str) -> Preset:
    """The preset called ``name``; FastidcError listing the known ones otherwise."""
    if name not in PRESETS:
        raise FastidcError(f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}.")
    return PRESETS[name]


def penalty_of(beams: int, length_penalty: float | None = None) -> float:
    """The length penalty of describing with ``beams``: 0.7 where none is given, for without one short captions win; one beam has no choice."""
    return (0.7 if beams > 1 else 0.0) if length_penalty is None else length_penalty
