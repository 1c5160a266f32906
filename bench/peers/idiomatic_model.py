"""Peer B's modules: CLIP4IDC as one would write it today from PyTorch's own parts.

Every pair is encoded by itself, so the before-image of a scene is encoded once for each of its pairs. The parameters have fastidc's names,
so that `checkpoint.from_official` makes a state dict for it.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers.stepper import Stage
from fastidc.config import CLIP_MEAN, CLIP_STD, PAD_ID, ModelConfig


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, C] -> q, k, v, each [B, H, L, D]"""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, cache: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """x [B, 1, C] at ``position`` [1]; cache [2, B, H, T, D]; mask [1, T], true up to the position"""
        q, k, v = self.split(x)
        cache.index_copy_(3, position, torch.stack([k, v]).to(cache.dtype))
        y = F.scaled_dot_product_attention(q, cache[0].to(q.dtype), cache[1].to(q.dtype), attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        return self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, *memory, dropout_p=self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PatchEmbed(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, self.patch_size = config.vision_width, config.patch_size
        self.weight = nn.Parameter(0.02 * torch.randn(width, 3, self.patch_size, self.patch_size))
        self.class_token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.position = nn.Parameter(width**-0.5 * torch.randn(config.image_tokens, width))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> [N, n+1, C]"""
        x = (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        x = F.conv2d(x, self.weight, stride=self.patch_size).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        return self.norm(x + self.position)


class PairEncoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width, scale, self.intra_layers = config.vision_width, config.vision_width**-0.5, config.intra_layers
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(width, config.vision_heads) for _ in range(config.vision_layers))
        self.before_embedding = nn.Parameter(scale * torch.randn(width))
        self.after_embedding = nn.Parameter(scale * torch.randn(width))
        self.joint_position = nn.Parameter(scale * torch.randn(2 * config.image_tokens, width))
        self.inter_norm = nn.LayerNorm(width)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Parameter(scale * torch.randn(width, config.embed_dim))

    def forward(self, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, 2, H, W, 3] -> embedding [N, E], tokens [N, 2(n+1), E]"""
        x = self.patch_embed(pairs.flatten(0, 1))
        for block in self.blocks[: self.intra_layers]:
            x = block(x)
        x = x.unflatten(0, (-1, 2))
        x = torch.cat([x[:, 0] + self.before_embedding, x[:, 1] + self.after_embedding], dim=1)
        x = self.inter_norm(x + self.joint_position)
        for block in self.blocks[self.intra_layers :]:
            x = block(x)
        tokens = self.norm(x) @ self.projection
        return (tokens[:, 0] + tokens[:, tokens.shape[1] // 2]) / 2, tokens


class TextEncoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.embed_dim
        self.token_embedding = nn.Parameter(0.02 * torch.randn(config.vocab_size, width))
        self.position = nn.Parameter(0.01 * torch.randn(config.context_length, width))
        self.blocks = nn.ModuleList(Block(width, config.text_heads, causal=True) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Parameter(width**-0.5 * torch.randn(width, width))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] -> [B, E]"""
        x = F.embedding(ids, self.token_embedding) + self.position[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[torch.arange(len(x), device=x.device), ids.argmax(dim=-1)] @ self.projection


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout(self.fc2(F.gelu(self.fc1(x)))))


class CaptionerLayer(nn.Module):
    """Encoder layer, or with ``cross`` decoder layer; post-LN"""

    def __init__(self, config: ModelConfig, cross: bool):
        super().__init__()
        width, heads, dropout = config.embed_dim, config.text_heads, config.dropout
        self.attention = SelfAttention(width, heads, causal=cross, dropout=dropout)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        if cross:
            self.cross = CrossAttention(width, heads, dropout)
            self.cross_norm = nn.LayerNorm(width, eps=1e-12)
        self.feed_forward = FeedForward(width, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None, step: tuple | None = None) -> Tensor:
        y = self.attention(x) if step is None else self.attention.step(x, *step)
        x = self.attention_norm(x + self.dropout(y))
        if memory is not None:
            x = self.cross_norm(x + self.dropout(self.cross(x, memory)))
        return self.feed_forward(x)


class Captioner(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.embed_dim
        self.embed_norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(CaptionerLayer(config, cross=False) for _ in range(config.captioner_layers))
        self.decoder = nn.ModuleList(CaptionerLayer(config, cross=True) for _ in range(config.captioner_layers))
        self.head = nn.Linear(width, width)
        self.head_norm = nn.LayerNorm(width, eps=1e-12)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def memory(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every decoder layer, each from the encoder layer of its number"""
        memory = []
        for encoder, decoder in zip(self.encoder, self.decoder, strict=True):
            tokens = encoder(tokens)
            memory.append(decoder.cross.memory(tokens))
        return memory

    def forward(self, ids: Tensor, memory: list, words: Tensor, positions: Tensor, steps: list | None = None) -> Tensor:
        """ids [N, T], positions [T, E] -> logits [N, T, V]; ``steps``, a layer's each, where T is one of a cached sequence"""
        x = self.dropout(self.embed_norm(F.embedding(ids, words) + positions))
        for i, layer in enumerate(self.decoder):
            x = layer(x, memory[i], None if steps is None else steps[i])
        return F.linear(self.head_norm(F.gelu(self.head(x))), words, self.head_bias)


class Model(nn.Module):
    def __init__(self, config: ModelConfig, stage: Stage):
        super().__init__()
        self.config = config
        self.pair_encoder = PairEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.captioner = Captioner(config) if stage == "finetune" else None
        self.compiled_next_words: Callable | None = None
        self.cache = StaticCache()

    def pairs(self, images: Tensor) -> Tensor:
        """[B, K, H, W, 3] -> [B * (K-1), 2, H, W, 3]: the before-image with each of the others"""
        before = images[:, :1].expand_as(images[:, 1:])
        return torch.stack([before, images[:, 1:]], dim=2).flatten(0, 1)

    def contrastive_loss(self, images: Tensor, ids: Tensor) -> Tensor:
        pair = F.normalize(self.pair_encoder(self.pairs(images[:, :2]))[0], dim=-1)
        text = F.normalize(self.text_encoder(ids), dim=-1)
        scale, labels = self.logit_scale.exp(), torch.arange(len(text), device=text.device)
        return (F.cross_entropy(scale * pair @ text.T, labels) + F.cross_entropy(scale * text @ pair.T, labels)) / 2

    def caption_loss(self, images: Tensor, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """input_ids, target_ids [B, P, T] -> the sum over the kinds of pair of their mean cross entropies"""
        tokens = self.pair_encoder(self.pairs(images))[1]
        text, ids = self.text_encoder, input_ids.flatten(0, 1)
        logits = self.captioner(ids, self.captioner.memory(tokens), text.token_embedding, text.position[: ids.shape[1]])
        kinds = zip(logits.unflatten(0, input_ids.shape[:2]).unbind(1), target_ids.unbind(1), strict=True)
        return sum(F.cross_entropy(x.flatten(0, 1), t.flatten(), ignore_index=PAD_ID) for x, t in kinds)

    def next_words(self, words: Tensor, place: Tensor, memory: list[tuple[Tensor, Tensor]], caches: list[Tensor]) -> Tensor:
        """words [N, 1] at ``place`` [1] -> the best ones after them, [N, 1]; their keys and values go into ``caches``"""
        text, mask = self.text_encoder, (torch.arange(caches[0].shape[3], device=words.device) <= place)[None]
        steps = [(cache, place, mask) for cache in caches]
        return self.captioner(words, memory, text.token_embedding, text.position.index_select(0, place), steps)[:, -1:].argmax(-1)

    @torch.no_grad()
    def generate(self, images: Tensor, max_length: int) -> Tensor:
        """-> [B * P, max_length]"""
        memory, caches = self.cache.hold(self.captioner.memory(self.pair_encoder(self.pairs(images))[1]), max_length)
        places = torch.arange(max_length, device=images.device)
        words = torch.full((len(caches[0][0]), 1), self.config.start_id, device=images.device)
        out = []
        for i in range(max_length):
            if self.compiled_next_words is None:
                words = self.next_words(words, places[i : i + 1], memory, caches)
            else:
                torch.compiler.cudagraph_mark_step_begin()
                words = self.compiled_next_words(
                    words, places[i : i + 1].clone(), memory, caches
                ).clone()  # the graph overwrites its output
            out.append(words)
        return torch.cat(out, dim=1)


class StaticCache:
    """Keys and values at fixed addresses, as a CUDA graph needs them; made anew where the batch has another shape."""

    def __init__(self):
        self.memory: list[tuple[Tensor, Tensor]] = []
        self.caches: list[Tensor] = []

    def hold(self, memory: list[tuple[Tensor, Tensor]], length: int) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        """``memory`` copied in, with caches [2, N, H, length, D] of every layer; what they hold from before lies behind the mask"""
        batch, heads, _, dim = memory[0][0].shape
        if not self.caches or self.caches[0].shape != (2, batch, heads, length, dim) or self.memory[0][0].shape != memory[0][0].shape:
            self.memory = [(k.clone(), v.clone()) for k, v in memory]
            self.caches = [k.new_zeros(2, batch, heads, length, dim) for k, _ in memory]
            for tensor in (*self.caches, *(t for pair in self.memory for t in pair)):
                torch._dynamo.mark_static_address(tensor)
        for kept, new in zip(self.memory, memory, strict=True):
            kept[0].copy_(new[0])
            kept[1].copy_(new[1])
        return self.memory, self.caches
