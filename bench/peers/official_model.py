"""Peer A's modules: the official towers and captioner, operator by operator, under the official parameter names (clip4idc.md 1 to 3).

Nothing is fused, shared or skipped that the official modules do not fuse, share or skip.
"""

import math

import torch
from torch import Tensor, nn

from fastidc.config import ModelConfig


class LayerNormFp32(nn.LayerNorm):
    """The towers': always computed in fp32, with a cast on either side."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.type(torch.float32)).type(x.dtype)


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class TowerBlock(nn.Module):
    """Pre-LN block, [L, N, C] -> [L, N, C]: sequence first, as nn.MultiheadAttention has it by default."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = LayerNormFp32(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = LayerNormFp32(width)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        y, mask = self.ln_1(x), None
        if self.causal:  # made anew in every layer of every pass, on the host, and copied
            mask = torch.zeros(len(x), len(x), device="cpu").fill_(-math.inf).triu_(1).to(dtype=y.dtype, device=y.device)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width: int, layers: int, heads: int, causal: bool):
        super().__init__()
        self.resblocks = nn.Sequential(*(TowerBlock(width, heads, causal) for _ in range(layers)))


class Visual(nn.Module):
    """Images, the two of a pair one after the other -> tokens of both (clip4idc.md 1.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, scale, tokens = config.vision_width, config.vision_width**-0.5, config.image_tokens
        self.intra = config.intra_layers
        self.conv1 = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(tokens, width))
        self.ln_pre = LayerNormFp32(width)
        self.joint_positional_embedding = nn.Parameter(scale * torch.randn(2 * tokens, width))
        self.bef_embedding = nn.Parameter(scale * torch.randn(width))
        self.aft_embedding = nn.Parameter(scale * torch.randn(width))
        self.ln_mid = LayerNormFp32(width)
        self.transformer = Tower(width, config.vision_layers, config.vision_heads, causal=False)
        self.ln_post = LayerNormFp32(width)
        self.proj = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """[2B, 3, H, W] -> [B, 2(n+1), C]"""
        x = self.conv1(images)
        x = x.reshape(*x.shape[:2], -1).permute(0, 2, 1)
        first = self.class_embedding.to(x.dtype) + torch.zeros(len(x), 1, x.shape[-1], dtype=x.dtype, device=x.device)
        x = self.ln_pre(torch.cat([first, x], dim=1) + self.positional_embedding.to(x.dtype)).permute(1, 0, 2)
        for block in self.transformer.resblocks[: self.intra]:
            x = block(x)
        x = x.permute(1, 0, 2)
        x = x.view(len(x) // 2, 2, *x.shape[1:])
        x = torch.cat([x[:, 0] + self.bef_embedding.to(x.dtype), x[:, 1] + self.aft_embedding.to(x.dtype)], dim=1)
        x = self.ln_mid(x + self.joint_positional_embedding.to(x.dtype)).permute(1, 0, 2)
        for block in self.transformer.resblocks[self.intra :]:
            x = block(x)
        return x.permute(1, 0, 2)


class Clip(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.embed_dim
        self.image_tokens = config.image_tokens
        self.visual = Visual(config)
        self.transformer = Tower(width, config.text_layers, config.text_heads, causal=True)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.ln_final = LayerNormFp32(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.logit_scale = nn.Parameter(torch.tensor(2.6592600369327783))

    def convert(self, dtype: torch.dtype) -> None:
        """Matrices, their biases and both projections in ``dtype``; norms, tables and embeddings stay fp32."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)
        for parameter in (self.text_projection, self.visual.proj):
            parameter.data = parameter.data.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.visual.conv1.weight.dtype

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[2B, 3, H, W] -> embedding [B, 1, E] and hidden [B, 2(n+1), E], fp32"""
        hidden = self.visual.ln_post(self.visual(images.type(self.dtype))) @ self.visual.proj
        pooled = torch.cat([hidden[:, 0].unsqueeze(1), hidden[:, self.image_tokens].unsqueeze(1)], 1).mean(1)
        pooled, hidden = pooled.float(), hidden.float()
        return pooled.view(len(pooled), -1, pooled.shape[-1]), hidden

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L] -> embedding [B, 1, E] at the end token, and hidden [B, L, E], fp32"""
        x = self.token_embedding(ids).type(self.dtype)
        x = (x + self.positional_embedding[: x.shape[1], :].type(self.dtype)).permute(1, 0, 2)
        for block in self.transformer.resblocks:
            x = block(x)
        hidden = self.ln_final(x.permute(1, 0, 2)).type(self.dtype) @ self.text_projection
        pooled = hidden[torch.arange(len(hidden)), ids.argmax(dim=-1)]
        pooled, hidden = pooled.float(), hidden.float()
        return pooled.view(len(pooled), -1, pooled.shape[-1]), hidden


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, spelled out: five operators."""
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


class LayerNormSpelled(nn.Module):
    """The captioner's: ten operators, eps inside the root."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + 1e-12)) + self.bias


class AddNorm(nn.Module):
    """LN(dropout(dense(x)) + residual)"""

    def __init__(self, inner: int, width: int, dropout: float):
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = LayerNormSpelled(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class Heads(nn.Module):
    """Attention from separate projections, the scores in memory."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.split(linear(y)) for linear, y in ((self.query, x), (self.key, memory), (self.value, memory)))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1]) + mask
        context = torch.matmul(self.dropout(scores.softmax(dim=-1)), v)
        return context.permute(0, 2, 1, 3).contiguous().view(x.shape)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.att = Heads(width, heads, dropout)
        self.output = AddNorm(width, width, dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        return self.output(self.att(x, memory, mask), x)


class Layer(nn.Module):
    """Self-attention, in the decoder cross-attention, then the feed-forward part; all post-LN."""

    def __init__(self, width: int, heads: int, dropout: float, cross: bool):
        super().__init__()
        self.slf_attn = Attention(width, heads, dropout)
        if cross:
            self.enc_attn = Attention(width, heads, dropout)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = AddNorm(4 * width, width, dropout)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None = None, memory_mask: Tensor | None = None) -> Tensor:
        x = self.slf_attn(x, x, mask)
        if memory is not None:
            x = self.enc_attn(x, memory, memory_mask)
        return self.output(gelu(self.intermediate["dense"](x)), x)


class Stack(nn.Module):
    def __init__(self, config: ModelConfig, cross: bool):
        super().__init__()
        self.layer = nn.ModuleList(
            Layer(config.embed_dim, config.text_heads, config.dropout, cross) for _ in range(config.captioner_layers)
        )


class Embeddings(nn.Module):
    def __init__(self, words: Tensor, positions: Tensor, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(*words.shape, _weight=words)
        self.position_embeddings = nn.Embedding(*positions.shape, _weight=positions)
        self.word_embeddings.weight, self.position_embeddings.weight = words, positions  # the text tower's own parameters
        self.LayerNorm = LayerNormSpelled(words.shape[1])
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], dtype=torch.long, device=ids.device).unsqueeze(0).expand_as(ids)
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + self.position_embeddings(places)))


class Predictions(nn.Module):
    """The masked-language-model head over the tied word table."""

    def __init__(self, words: Tensor):
        super().__init__()
        width = words.shape[1]
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": LayerNormSpelled(width)})
        self.decoder = nn.Linear(width, len(words), bias=False, device="meta")
        self.decoder.weight = words
        self.bias = nn.Parameter(torch.zeros(len(words)))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform["LayerNorm"](gelu(self.transform["dense"](x)))) + self.bias


class Captioner(nn.Module):
    """Words of a caption and tokens of its pair -> logits; the encoder runs in every call."""

    def __init__(self, config: ModelConfig, words: nn.Parameter, positions: nn.Parameter):
        super().__init__()
        self.embeddings = Embeddings(words, positions, config.dropout)
        self.decoder = Stack(config, cross=True)
        self.encoder = Stack(config, cross=False)
        self.classifier = nn.ModuleDict({"cls": nn.ModuleDict({"predictions": Predictions(words)})})
        for name, parameter in self.named_parameters():
            if ".dense." in name or ".att." in name:
                nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, tokens: Tensor, mask: Tensor, token_mask: Tensor) -> Tensor:
        """ids, mask [B, T] int, tokens [B, M, E], token_mask [B, M] int -> logits [B, T, V]"""
        x = self.embeddings(ids)
        see_tokens = (1.0 - token_mask.unsqueeze(1).unsqueeze(2).to(dtype=x.dtype)) * -10000.0
        see_words = mask.unsqueeze(1).unsqueeze(2).to(dtype=x.dtype)
        later = torch.triu(torch.ones((ids.shape[1], ids.shape[1]), device=x.device, dtype=x.dtype), diagonal=1)
        later = later.unsqueeze(0).expand(len(ids), -1, -1).unsqueeze(1)
        see_words = ((1.0 - see_words) + later).gt(0).to(dtype=x.dtype) * -10000.0
        memory = []
        for layer in self.encoder.layer:
            tokens = layer(tokens, see_tokens)
            memory.append(tokens)
        for layer, encoded in zip(self.decoder.layer, memory, strict=True):
            x = layer(x, see_words, encoded, see_tokens)
        return self.classifier["cls"]["predictions"](x)
