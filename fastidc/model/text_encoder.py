"""CLIP's text tower."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastidc.config import ModelConfig
from fastidc.model.layers import Block, LayerNorm, residual_blocks, residual_stream
from fastidc.packed import PackedText


class TextEncoder(nn.Module):
    """Causal pre-LN transformer; the caption's embedding is read at its end token (clip4idc.md 2).

    It owns the token and position tables, which the captioner shares.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.embed_dim
        self.token_embedding = nn.Parameter(0.02 * torch.randn(config.vocab_size, width))
        self.position = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, causal=True) for _ in range(config.text_layers))
        self.norm = LayerNorm(width)
        self.projection = nn.Parameter(width**-0.5 * torch.randn(width, width))

    def forward(self, text: Tensor | PackedText) -> Tensor:
        """Captions -> [B, E], not normalised. Packed, or [B, L] int padded with anything after the end token, the largest id."""
        packed = isinstance(text, PackedText)
        ids = (text.ids if packed else text).long()
        position = F.embedding(text.positions, self.position) if packed else self.position[: ids.shape[1]]
        dtype = self.projection.dtype  # half where the tower's weights are: both tables are fp32 then, and rounded before they are added
        x = residual_stream(F.embedding(ids, self.token_embedding).to(dtype) + position.to(dtype), dtype)  # [T, E] or [B, L, E]
        sequences = (text.cu_seqlens, text.longest) if packed else ()
        ends = text.ends if packed else torch.arange(0, ids.numel(), ids.shape[1], device=ids.device) + ids.argmax(dim=-1)
        x, branch = residual_blocks(self.blocks[:-1], x, *sequences)
        x, branch = self.blocks[-1].at(x, branch, ends, *sequences)  # nobody reads its other rows
        end = self.norm.of_sum(x, branch)[0]
        return end @ self.projection.to(end.dtype)
