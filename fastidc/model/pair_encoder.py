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
        self.blocks = nn.ModuleList(Block(width, config.vision_heads) for _ in range(config.vision_layers))
        self.before_embedding = nn.Parameter(scale * torch.randn(width))
        self.after_embedding = nn.Parameter(scale * torch.randn(width))
        self.joint_position = nn.Parameter(scale * torch.randn(2 * config.image_tokens, width))
        self.inter_norm = LayerNorm(width)  # `ln_mid`, which the paper's equations omit
        self.norm = LayerNorm(width)
        self.projection = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def intra(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] (uint8, or normalised) -> [N, n+1, C]; an image that several pairs share is encoded once."""
        return added(*residual_blocks(self.blocks[: self.intra_layers], self.patch_embed(images)))

    def inter(self, before: Tensor, after: Tensor) -> Tensor:
        """before, after [B, n+1, C] from `intra` -> [B, 2(n+1), C]; rows 0 and n+1 are the two class tokens."""
        return added(*residual_blocks(self.blocks[self.intra_layers :], self._join(before, after)))

    def inter_class_tokens(self, before: Tensor, after: Tensor) -> Tensor:
        """Rows 0 and n+1 of `inter` -> [B, 2, C]: the last block computes nothing for the other rows, which only the captioner reads."""
        blocks, rows = self.blocks[self.intra_layers :], [0, before.shape[1]]
        x, branch = residual_blocks(blocks[:-1], self._join(before, after))
        return blocks[-1].at(x, branch, rows) if blocks else take_rows(x, rows)

    def _join(self, before: Tensor, after: Tensor) -> Tensor:
        if self.difference:
            after = after - before
        dtype = before.dtype
        x = torch.cat([before + self.before_embedding.to(dtype), after + self.after_embedding.to(dtype)], dim=1)
        return self.inter_norm(x + self.joint_position.to(dtype))

    def pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, M, C] from `inter` (or, with M = 2, from `inter_class_tokens`) -> embedding [B, E], the mean of both projected class tokens,
        and tokens [B, M, E]."""
        x = self.norm(x)
        tokens = x @ self.projection.to(x.dtype)
        return (tokens[:, 0] + tokens[:, tokens.shape[1] // 2]) / 2, tokens
