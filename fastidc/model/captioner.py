"""The captioner: a post-LN encoder over the pair's tokens and a decoder over words (clip4idc.md 3)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastidc.config import ModelConfig
from fastidc.model.layers import CrossAttention, Dropout, LayerNorm, Linear, SelfAttention, residual_stream
from fastidc.ops.gelu import gelu_linear
from fastidc.packed import PackedCaptions

_EPS = 1e-12


class FeedForward(nn.Module):
    """LN(dropout(fc2(gelu(fc1(x)))) + x) with the exact (erf) GELU."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)
        self.norm = LayerNorm(width, _EPS)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, branch: Tensor | None = None, norm: LayerNorm | None = None) -> Tensor:
        """Of x, or of norm(x + branch), which then is not kept."""
        hidden, x = (self.fc1(x), x) if norm is None else norm.through(self.fc1, x, branch)
        return self.norm.of_sum(x, self.dropout(gelu_linear(hidden, self.fc2.weight, self.fc2.bias, fp8_rows=self.fc2.fp8)))[0]


class EncoderLayer(nn.Module):
    """[B, M, E] -> [B, M, E]"""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = SelfAttention(width, heads, dropout=dropout, keeps_result=False)
        self.attention_norm = LayerNorm(width, _EPS)
        self.feed_forward = FeedForward(width, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x, self.dropout(self.attention(x)), self.attention_norm)


class DecoderLayer(nn.Module):
    """x [B*R, T, E], R captions a pair, reads memory [B, M, E] -> [B*R, T, E]. Or x [N, E], all words of packed captions -> [N, E]."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.attention = SelfAttention(width, heads, causal=True, dropout=dropout)
        self.attention_norm = LayerNorm(width, _EPS)
        self.cross = CrossAttention(width, heads, dropout=dropout)
        self.cross_norm = LayerNorm(width, _EPS)
        self.feed_forward = FeedForward(width, dropout)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, captions: PackedCaptions | None = None) -> Tensor:
        sequences = () if captions is None else (captions.text.cu_seqlens, captions.text.longest)
        x = self.attention_norm.of_sum(x, self.dropout(self.attention(x, *sequences)))[0]
        x = self.cross_norm.of_sum(x, self.dropout(self._ask(x, memory, captions)))[0]
        return self.feed_forward(x)

    def _ask(self, x: Tensor, memory: Tensor, captions: PackedCaptions | None) -> Tensor:
        """Cross attention. No query sees another here, so all captions of a pair ask its memory together and its keys and values are
        computed once; packed ones have their queries laid out for it, and the answers taken back before the projection."""
        cross = self.cross
        if captions is None:
            return cross(x.reshape(len(memory), -1, x.shape[-1]), memory).view_as(x)
        q = cross.q(x).index_select(0, captions.rows).view(len(memory), -1, x.shape[-1])
        return cross.out(cross.attend(q, memory).flatten(0, 1).index_select(0, captions.cells))

    def keys_and_values(self, encoded: Tensor) -> Tensor:
        """What `step` reads of a pair: encoded [B, M, E] -> [2, B, H, M, D]. Head by head, because a single query is bound by reading them:
        packed rows lie 4 KB apart, which takes a CPU twice as long."""
        return self.cross.kv(encoded).unflatten(-1, (2, self.cross.heads, -1)).permute(2, 0, 3, 1, 4).contiguous()

    def step(self, x: Tensor, cache: Tensor, position: int | Tensor, memory: Tensor) -> Tensor:
        """One position: x [B*R, 1, E], R captions a pair; cache [2, B*R, H, L, D] gets its keys and values at ``position``; memory
        [2, B, H, M, D]. A position that is a tensor, int64 [1], makes the step one program for all positions."""
        q, *own = self.attention.qkv(x).unflatten(-1, (3, self.attention.heads, -1)).permute(2, 0, 3, 1, 4)
        if isinstance(position, int):
            cache[0, :, :, position : position + 1], cache[1, :, :, position : position + 1] = own
            asked = _attend(q, cache[:, :, :, : position + 1])
        else:
            cache.index_copy_(3, position, torch.stack(own))
            asked = _attend(q, cache, torch.arange(cache.shape[3], device=cache.device)[None] <= position)
        x = self.attention_norm.of_sum(x, self.attention.out(asked))[0]
        q = self.cross.q(x).view(memory.shape[1], -1, x.shape[-1]).unflatten(-1, (self.cross.heads, -1)).transpose(1, 2)
        x = self.cross_norm.of_sum(x, self.cross.out(_attend(q, memory).view_as(x)))[0]
        return self.feed_forward(x)


def _attend(q: Tensor, kv: Tensor, seen: Tensor | None = None) -> Tensor:
    """q [B, H, Q, D], kv [2, B, H, L, D] -> [B, Q, H*D]; ``seen`` [1, L] where not every key is. Torch's own at any rate: with a query or a
    few there is no product worth a kernel of ours."""
    return F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=seen).transpose(1, 2).flatten(2)


class Captioner(nn.Module):
    """Tokens of a pair -> words. The word and position tables are the text tower's and come in as arguments, so they exist once."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, heads, dropout = config.embed_dim, config.text_heads, config.dropout
        self.embed_norm = LayerNorm(width, _EPS)
        self.dropout = Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, dropout) for _ in range(config.captioner_layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, heads, dropout) for _ in range(config.captioner_layers))
        self.head = Linear(width, width)
        self.head_norm = LayerNorm(width, _EPS)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 * (512 / width) ** 0.5)  # the official 0.02 at the official width
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, ids: Tensor | PackedCaptions, words: Tensor, positions: Tensor) -> Tensor:
        """What training runs: tokens [B, M, E] of pairs, ids [B*R, T] int of R captions each -> [B*R, T, E]; or packed captions, of which no row
        is padding -> [N, E]. See `encode` and `decode`."""
        return self.decode(ids, self.encode(tokens), words, positions)

    def encode(self, tokens: Tensor) -> list[Tensor]:
        """tokens [B, M, E] -> the output of every encoder layer: decoder layer i attends to encoder layer i."""
        memory = [residual_stream(tokens, self.head.weight.dtype)]
        for layer in self.encoder:
            memory.append(layer(memory[-1]))
        return memory[1:]

    def embed(self, ids: Tensor, words: Tensor, positions: Tensor) -> Tensor:
        """ids [..., T] int, words [V, E], positions [T, E] -> [..., T, E]"""
        return self.dropout(self.embed_norm(residual_stream(F.embedding(ids.long(), words) + positions, self.head.weight.dtype)))

    def decode(self, ids: Tensor | PackedCaptions, memory: list[Tensor], words: Tensor, positions: Tensor) -> Tensor:
        """ids [B*R, T] int, R captions of each of the B pairs in memory -> [B*R, T, E], ready for the product with the word table; or packed
        captions -> [N, E].

        Pad tokens come last in a caption, so the causal mask alone keeps them from every row that has a target.
        """
        if isinstance(ids, PackedCaptions):
            captions, text = ids, ids.text
            x = self.embed(text.ids, words, F.embedding(text.positions, positions))
        else:
            captions, x = None, self.embed(ids, words, positions[: ids.shape[1]])
        for layer, encoded in zip(self.decoder, memory, strict=True):
            x = layer(x, encoded, captions)
        return self.transform(x)

    def transform(self, x: Tensor) -> Tensor:
        """The masked-language-model head before its vocabulary product: [..., E] -> [..., E]"""
        return self.head_norm(F.gelu(self.head(x)))
