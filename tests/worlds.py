"""Small data sets and models for tests."""

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastidc.config import ModelConfig

# The released no-change sentences, stated here apart from the grammar that they check (data_evaluation.md 2.2).
NO_CHANGE = [
    "no change was made",
    "there is no change",
    "the two scenes seem identical",
    "the scene is the same as before",
    "the scene remains the same",
    "nothing has changed",
    "nothing was modified",
    "no change has occurred",
    "there is no difference",
]
SMALL = ModelConfig(
    image_size=48,
    patch_size=16,
    vision_width=64,
    vision_layers=3,
    intra_layers=2,
    embed_dim=64,
    text_layers=2,
    vocab_size=120,
    context_length=24,
    captioner_layers=2,
    head_dim=32,
)


def clevr_tree(root: Path, splits: dict[str, list[int]], seed: int = 0) -> Path:
    """CLEVR-Change's file tree with noise for images and two true-looking sentences a scene."""
    rng = np.random.default_rng(seed)
    change, no_change = {}, {}
    for folder in ("images", "sc_images", "nsc_images"):
        (root / folder).mkdir(parents=True)
    for number in (n for ids in splits.values() for n in ids):
        for folder, kind in (("images", "default"), ("sc_images", "semantic"), ("nsc_images", "nonsemantic")):
            pixels = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
            Image.fromarray(pixels).save(root / folder / f"CLEVR_{kind}_{number:06d}.png")
        key = f"CLEVR_default_{number:06d}.png"
        colour = ("red", "blue", "green")[number % 3]
        change[key] = [f"the {colour} cube left of the sphere moved", f"the {colour} cube has been added"]
        no_change[key] = ["nothing has changed", "there is no difference"]
    for name, value in (("splits", splits), ("change_captions", change), ("no_change_captions", no_change)):
        (root / f"{name}.json").write_text(json.dumps(value))
    types = {"color": [f"{n:06d}.png" for ids in splits.values() for n in ids]}
    (root / "type_mapping.json").write_text(json.dumps(types))
    return root


def official_state(config: ModelConfig, stage: str, seed: int = 0, dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random weights under official names, in the shapes of ``config``; no alias keys. stage: "clip", "adapt" or "caption"."""
    g = torch.Generator().manual_seed(seed)
    c, e, p = config.vision_width, config.embed_dim, config.patch_size

    def linear(name, out, inp):
        return {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes = {
        "clip.visual.conv1.weight": (c, 3, p, p),
        "clip.visual.class_embedding": (c,),
        "clip.visual.positional_embedding": (config.image_tokens, c),
        "clip.visual.proj": (c, e),
        "clip.token_embedding.weight": (config.vocab_size, e),
        "clip.positional_embedding": (config.context_length, e),
        "clip.text_projection": (e, e),
        "clip.logit_scale": (),
    }
    for name in ("ln_pre", "ln_post"):
        shapes |= norm(f"clip.visual.{name}", c)
    shapes |= norm("clip.ln_final", e)
    for tower, width, layers in (("clip.visual", c, config.vision_layers), ("clip", e, config.text_layers)):
        for i in range(layers):
            block = f"{tower}.transformer.resblocks.{i}"
            shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            shapes |= linear(f"{block}.attn.out_proj", width, width)
            shapes |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
            shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
    if stage != "clip":
        shapes |= {"clip.visual.joint_positional_embedding": (2 * config.image_tokens, c)}
        shapes |= {f"clip.visual.{name}_embedding": (c,) for name in ("bef", "aft")} | norm("clip.visual.ln_mid", c)
    if stage == "caption":
        shapes |= norm("decoder.embeddings.LayerNorm", e)
        for half, attentions in (("encoder", ("slf",)), ("decoder", ("slf", "enc"))):
            for i in range(config.captioner_layers):
                layer = f"decoder.{half}.layer.{i}"
                for kind in attentions:
                    for part in ("query", "key", "value"):
                        shapes |= linear(f"{layer}.{kind}_attn.att.{part}", e, e)
                    shapes |= linear(f"{layer}.{kind}_attn.output.dense", e, e) | norm(f"{layer}.{kind}_attn.output.LayerNorm", e)
                shapes |= linear(f"{layer}.intermediate.dense", 4 * e, e) | linear(f"{layer}.output.dense", e, 4 * e)
                shapes |= norm(f"{layer}.output.LayerNorm", e)
        head = "decoder.classifier.cls.predictions"
        shapes |= {f"{head}.bias": (config.vocab_size,)} | linear(f"{head}.transform.dense", e, e) | norm(f"{head}.transform.LayerNorm", e)

    def draw(name, shape):
        noise = torch.randn(shape, generator=g)
        if name.endswith("logit_scale"):
            return torch.tensor(2.0)
        if "ln_" in name or "LayerNorm" in name:
            return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
        return noise * (0.1 if len(shape) < 2 else shape[-1] ** -0.5 if name.endswith("weight") else 0.1)

    return {name: draw(name, shape).to(dtype) for name, shape in shapes.items()}


def with_aliases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The three keys that an official captioning checkpoint holds twice."""
    return state | {
        "decoder.embeddings.word_embeddings.weight": state["clip.token_embedding.weight"],
        "decoder.classifier.cls.predictions.decoder.weight": state["clip.token_embedding.weight"],
        "decoder.embeddings.position_embeddings.weight": state["clip.positional_embedding"],
    }


def noise_image(path: Path, seed: int = 0, size: tuple[int, int] = (14, 10)) -> Path:
    """Noise of ``size`` (width, height) in the format of the path's extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return path


def spot_tree(root: Path, splits: dict[str, list[tuple[str, list[str]]]], prefix: str = "", folder: str = "") -> Path:
    """Spot-the-Diff: {split: [(img_id, sentences)]} into {prefix}{split}.json in ``folder`` of ``root``, images into resized_images/."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split, entries in splits.items():
        for number, _ in entries:
            for tail in ("", "_2"):
                noise_image(root / "resized_images" / f"{number}{tail}.png")
        table = [{"img_id": number, "sentences": sentences} for number, sentences in entries]
        (root / folder / f"{prefix}{split}.json").write_text(json.dumps(table))
    return root


def ier_tree(root: Path, splits: dict[str, list[tuple[str, str, str, list[str]]]], folder: str = "") -> Path:
    """Image-Editing-Request: {split: [(uid, before, after, sentences)]} into {split}.json in ``folder``, images into images/ of ``root``."""
    (root / folder).mkdir(parents=True, exist_ok=True)
    for split, entries in splits.items():
        for _, *names, _ in entries:
            for name in names:
                noise_image(root / "images" / name)
        table = [{"uid": uid, "img0": before, "img1": after, "sents": sentences} for uid, before, after, sentences in entries]
        (root / folder / f"{split}.json").write_text(json.dumps(table))
    return root


def birds_tree(root: Path, rows: list[tuple[str, str, str, str]]) -> Path:
    """Birds-to-Words: (photo, photo, split, description) rows into its .tsv, photographs as images/{photo}.jpg."""
    fields = [f"img{side}{field}" for side in (1, 2) for field in ("ObservationURL", "ImgURL", "Species", "Selection")]
    lines = ["\t".join([*fields, "split", "annN", "description"])]
    for i, (*photos, split, description) in enumerate(rows):
        sides = []
        for photo in photos:
            noise_image(root / "images" / f"{photo}.jpg")
            url = f"https://static.inaturalist.org/photos/{photo}/large.jpg?14{i}"
            sides += [f"http://www.inaturalist.org/observations/{i}", url, "Passer domesticus", "visual"]
        lines.append("\t".join([*sides, split, "1", description]))
    (root / "birds-to-words-v1.0.tsv").write_text("\n".join(lines) + "\n")
    return root


def table_file(path: Path, rows: list[dict], images: tuple[str, ...] = ("before", "after", "distractor")) -> Path:
    """A .csv, .tsv or .jsonl of ``rows``, its columns those of the first, with the images that ``images`` fields name beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in rows:
        for field in images:
            if row.get(field):
                noise_image(path.parent / row[field])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def pair_folder(root: Path, captions: dict[str, list[str]], extension: str = "png") -> Path:
    """A folder of pairs: {id}.png, {id}_2.png and captions.json."""
    for number in captions:
        for tail in ("", "_2"):
            noise_image(root / f"{number}{tail}.{extension}")
    (root / "captions.json").write_text(json.dumps(captions))
    return root


DROP_IN = ModelConfig(
    image_size=64, patch_size=32, vision_width=64, vision_layers=3, intra_layers=2, embed_dim=64, text_layers=1, context_length=40
)


def clip_file(path: Path, config: ModelConfig = DROP_IN, seed: int = 0) -> Path:
    """A CLIP in OpenAI's layout with CLIP's whole vocabulary, small enough to train in a test."""
    torch.save({key.removeprefix("clip."): value for key, value in official_state(config, "clip", seed).items()}, path)
    return path


def decoder_folder(path: Path, dropout: float, layers: int = 3) -> Path:
    """An official ``decoder_config.json``, what ``--decoder_model`` names."""
    path.mkdir(parents=True)
    values = {"num_decoder_layers": layers, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout, "hidden_act": "gelu"}
    (path / "decoder_config.json").write_text(json.dumps(values))
    return path
