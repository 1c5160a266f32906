"""The captioner: a post-LN encoder over the pair's tokens and a decoder over words (clip4idc.md 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastidc import ops
from fastidc.config import ModelConfig
from fastidc.model.layers import CrossAttention, LayerNorm, SelfAttention, residual_stream

_EPS = 1e-12


class FeedForward(nn.Module):
    """LN(dropout(fc2(gelu(fc1(x)))) + x) with the exact (erf) GELU."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.norm = LayerNorm(width, _EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.dropout(self.fc2(F.gelu(self.fc1(x)))) + x)


class EncoderLayer(nn.Module):
    """[B, M, E] -> [B, M, E]"""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = SelfAttention(width, heads, dropout=dropout)
        self.attention_norm = LayerNorm(width, _EPS)
        self.feed_forward = FeedForward(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attention_norm(self.dropout(self.attention(x)) + x))


class DecoderLayer(nn.Module):
    """x [B*R, T, E], R captions a pair, reads memory [B, M, E] -> [B*R, T, E]"""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = SelfAttention(width, heads, causal=True, dropout=dropout)
        self.attention_norm = LayerNorm(width, _EPS)
        self.cross = CrossAttention(width, heads, dropout=dropout)
        self.cross_norm = LayerNorm(width, _EPS)
        self.feed_forward = FeedForward(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.attention_norm(self.dropout(self.attention(x)) + x)
        # no query sees another here, so all captions of a pair ask its memory together and its keys and values are computed once
        asked = self.cross(x.reshape(len(memory), -1, x.shape[-1]), memory).view_as(x)
        x = self.cross_norm(self.dropout(asked) + x)
        return self.feed_forward(x)

    def step(self, x: Tensor, cache: Tensor, position: int, memory_kv: Tensor) -> Tensor:
        """One position: x [B, 1, E]; cache [B, L, 2E] gets its keys and values at ``position``; memory_kv [B, M, 2E]."""
        q, kv = self.attention.qkv(x).split([x.shape[-1], 2 * x.shape[-1]], dim=-1)
        cache[:, position : position + 1] = kv
        heads = self.attention.heads
        x = self.attention_norm(self.attention.out(ops.cross_attention(q, cache[:, : position + 1], heads)) + x)
        x = self.cross_norm(self.cross.out(ops.cross_attention(self.cross.q(x), memory_kv, heads)) + x)
        return self.feed_forward(x)


class Captioner(nn.Module):
    """Tokens of a pair -> words. The word and position tables are the text tower's and come in as arguments, so they exist once."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, heads, dropout = config.embed_dim, config.text_heads, config.dropout
        self.embed_norm = LayerNorm(width, _EPS)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(config.captioner_layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(config.captioner_layers))
        self.head = nn.Linear(width, width)
        self.head_norm = LayerNorm(width, _EPS)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 * (512 / width) ** 0.5)  # the official 0.02 at the official width
                nn.init.zeros_(module.bias)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """tokens [B, M, E] -> the output of every encoder layer: decoder layer i attends to encoder layer i."""
        memory = [residual_stream(tokens, self.head.weight.dtype)]
        for layer in self.encoder:
            memory.append(layer(memory[-1]))
        return memory[1:]

    def embed(self, ids: Tensor, words: Tensor, positions: Tensor) -> Tensor:
        """ids [B, T] int, words [V, E], positions [T, E] -> [B, T, E]"""
        return self.dropout(self.embed_norm(residual_stream(F.embedding(ids.long(), words) + positions, self.head.weight.dtype)))

    def decode(self, ids: Tensor, memory: list[Tensor], words: Tensor, positions: Tensor) -> Tensor:
        """ids [B*R, T] int, R captions of each of the B pairs in memory -> [B*R, T, E], ready for the product with the word table.

        Pad tokens come last in a caption, so the causal mask alone keeps them from every row that has a target.
        """
        x = self.embed(ids, words, positions[: ids.shape[1]])
        for layer, encoded in zip(self.decoder, memory, strict=True):
            x = layer(x, encoded)
        return self.transform(x)

    def transform(self, x: Tensor) -> Tensor:
        """The masked-language-model head before its vocabulary product: [..., E] -> [..., E]"""
        return self.head_norm(F.gelu(self.head(x)))
