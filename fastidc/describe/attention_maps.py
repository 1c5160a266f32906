"""What the class tokens look at: the paper's figures 3 to 5, for any grid of patches."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.describe.loading import load
from fastidc.describe.pixels import Image, to_pixels
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import Block, added


@dataclass(frozen=True)
class Maps:
    """Of one pair, [g, g] fp32 each with g x g patches (or of B pairs, [B, g, g]), row by row as the patches lie in the image.

    Every map is mean over heads of softmax(q k^T / sqrt(d)) with a class token's q, the patches' part of it. The softmax runs over all that
    the token attends to, itself included, so a map's sum is below 1 by what falls on class tokens and, in the inter layer, on the other
    image. `inter_before` and `inter_after` belong to one row of probabilities and are what the paper draws.
    """

    intra_before: Tensor  # last intra layer: the before-image's class token over its own patches
    intra_after: Tensor  # last intra layer: the after-image's class token over its own patches
    inter_before: Tensor  # last inter layer: the before-image's class token (row 0 of the pair) over the before-image's patches
    inter_after: Tensor  # last inter layer: the same token over the after-image's patches
    inter_before_from_after: Tensor  # last inter layer: the after-image's class token (row n+1) over the before-image's patches
    inter_after_from_after: Tensor  # last inter layer: the same token over the after-image's patches

    def __getitem__(self, row: int) -> "Maps":
        """The maps of pair ``row`` of a batch."""
        return Maps(*(getattr(self, field.name)[row] for field in fields(self)))

    @property
    def layers(self) -> tuple[tuple[str, Tensor, Tensor], ...]:
        """(name, map over the before-image, map over the after-image) of what the paper draws."""
        return ("last intra layer", self.intra_before, self.intra_after), ("last inter layer", self.inter_before, self.inter_after)


def class_token_probabilities(block: Block, x: Tensor, branch: Tensor | None, rows: slice) -> Tensor:
    """softmax(q k^T / sqrt(d)) of those ``rows`` of what goes into ``block`` -> [B, rows, heads, L].

    x, branch: as `Block.forward` takes them, [B, L, C]. From the block's own norm and qkv weights, in fp32 or, where x or the weights are,
    fp64; autocast has no say in it.
    """
    norm, attention = block.attention_norm, block.attention
    x = added(x, branch)
    dtype = torch.promote_types(torch.promote_types(x.dtype, attention.qkv.weight.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        x = F.layer_norm(x.to(dtype), norm.weight.shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)
        width = x.shape[-1]
        weight, bias = attention.qkv.weight.to(dtype), attention.qkv.bias.to(dtype)
        q = F.linear(x[:, rows], weight[:width], bias[:width]).unflatten(-1, (attention.heads, -1))  # [B, R, H, D]
        k = F.linear(x, weight[width : 2 * width], bias[width : 2 * width]).unflatten(-1, (attention.heads, -1))
        return (torch.einsum("brhd,blhd->brhl", q, k) / q.shape[-1] ** 0.5).softmax(dim=-1)


@contextmanager
def _listening(block: Block, rows: slice, found: list[Tensor]) -> Iterator[None]:
    """Every call of ``block`` inside adds its `class_token_probabilities`; what it computes is not touched."""

    def note(_: Block, inputs: tuple) -> None:
        found.append(class_token_probabilities(block, inputs[0], inputs[1] if len(inputs) > 1 else None, rows))

    handle = block.register_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def encode_with_maps(model: CLIP4IDC, images: Tensor) -> tuple[Tensor, Maps]:
    """images uint8 [B, 2, S, S, 3] on the model's device, before first -> embedding [B, E] and the maps of B pairs.

    FastidcError for a model whose layers are all intra, which has no map of a pair.
    """
    config = model.config
    if config.intra_layers == config.vision_layers:
        raise FastidcError(
            f"attention maps of a pair need an inter layer, and this model has none: all its {config.vision_layers} layers see one image."
        )
    tokens, side = config.image_tokens, config.image_size // config.patch_size
    blocks, intra, inter = model.pair_encoder.blocks, [], []
    with ExitStack() as stack:
        stack.enter_context(_listening(blocks[config.intra_layers - 1], slice(0, 1), intra))
        stack.enter_context(_listening(blocks[-1], slice(0, None, tokens), inter))
        embedding, _ = model.encode_batch(images)  # with all tokens: only so does the last block run as a whole
    alone = intra[0].mean(dim=2)[:, 0, 1:].unflatten(0, (len(images), 2)).unflatten(-1, (side, side))  # [B, image, g, g]
    pair = inter[0].mean(dim=2).unflatten(-1, (2, tokens))[..., 1:].unflatten(-1, (side, side))  # [B, class token, image, g, g]
    maps = (alone[:, 0], alone[:, 1], pair[:, 0, 0], pair[:, 0, 1], pair[:, 1, 0], pair[:, 1, 1])
    return embedding[:, 0], Maps(*(each.float().cpu() for each in maps))


def attention_maps(model: Any, before: Image, after: Image) -> Maps:
    """Where the class tokens of a pair look, in the last intra and the last inter layer (paper, figures 3 to 5; clip4idc.md 9).

    model: as `fastidc.describe.loading.load` takes it, with a captioner or without, or a `fastidc.Describer`. before, after: a path, a PIL
    image or a uint8 array each, as there, squashed to the model's size. The model's fast path stays as it is: probabilities are made
    again from the two layers' inputs. With ``pair_input="difference"`` the after-image's tokens in the inter layer are those of the
    difference. FastidcError for an image that cannot be read and a model without an inter layer.
    """
    ready = load(getattr(model, "ready", model))
    pixels = [to_pixels(image, ready.model.config.image_size, name) for name, image in (("before", before), ("after", after))]
    with ready.asked():
        return encode_with_maps(ready.model, torch.from_numpy(np.stack(pixels))[None].to(ready.device))[1][0]
