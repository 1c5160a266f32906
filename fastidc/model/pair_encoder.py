"""CLIP's vision tower split into intra layers (each image alone) and inter layers (both images together)."""

import torch
from torch import Tensor, nn

from fastidc.config import ModelConfig
from fastidc.model.layers import Block, LayerNorm, PatchEmbed, added, residual_blocks, take_rows


class PairEncoder(nn.Module):
    """intra once per image, inter once per pair, pool (paper section 3; clip4idc.md 1.1). Knows no loss and no caption."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, scale = config.vision_width, config.vision_width**-0.5
        self.intra_layers = config.intra_layers
        self.difference = config.pair_input == "difference"
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, width)
        # an inter layer has two images' tokens for every pair: there memory goes, and what is least dear to make again is not kept
        keeps = (layer < config.intra_layers for layer in range(config.vision_layers))
        self.blocks = nn.ModuleList(Block(width, config.vision_heads, keeps_result=kept) for kept in keeps)
        self.before_embedding = nn.Parameter(scale * torch.randn(width))
        self.after_embedding = nn.Parameter(scale * torch.randn(width))
        self.joint_position = nn.Parameter(scale * torch.randn(2 * config.image_tokens, width))
        self.inter_norm = LayerNorm(width)  # `ln_mid`, which the paper's equations omit
        self.norm = LayerNorm(width)
        self.projection = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def intra(self, images: Tensor, index: Tensor | None = None, augmentation: Tensor | None = None) -> Tensor:
        """images [N, 3, H, W] (uint8, or normalised) -> [N, n+1, C]; an image that several pairs share is encoded once. ``index`` and
        ``augmentation`` of uint8 images as `PatchEmbed` takes them."""
        return added(*residual_blocks(self.blocks[: self.intra_layers], self.patch_embed(images, index, augmentation)))

    def inter(self, before: Tensor, after: Tensor) -> Tensor:
        """before, after [B, n+1, C] from `intra` -> [B, 2(n+1), C]; rows 0 and n+1 are the two class tokens."""
        return added(*residual_blocks(self.blocks[self.intra_layers :], self._join(before, after)))

    def inter_class_tokens(self, before: Tensor, after: Tensor) -> Tensor:
        """Rows 0 and n+1 of `inter` -> [B, 2, C]: the last block computes nothing for the other rows, which only the captioner reads."""
        blocks, rows = self.blocks[self.intra_layers :], slice(0, None, before.shape[1])
        x, branch = residual_blocks(blocks[:-1], self._join(before, after))
        return added(*blocks[-1].at(x, branch, rows)) if blocks else take_rows(x, rows)

    def _join(self, before: Tensor, after: Tensor) -> Tensor:
        if self.difference:
            after = after - before
        # what is added to every pair is added up before: a pass less over all of them, each way
        images = torch.stack([self.before_embedding, self.after_embedding])[:, None]
        position = (self.joint_position.unflatten(0, (2, -1)) + images).flatten(0, 1)
        return self.inter_norm(torch.cat([before, after], dim=1) + position.to(before.dtype))

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, C] from `inter` (or, with M = 2, from `inter_class_tokens`) -> embedding [B, E], the mean of both projected class tokens,
        and tokens [B, M, E]."""
        tokens, _ = self.norm.of_sum_times(self.projection.T.to(x.dtype), None, x, None)
        return tokens[:, :: tokens.shape[1] // 2].mean(dim=1), tokens
