"""CLIP4IDC on one page: the official model in plain PyTorch, official parameter names, official order of operations.

``w`` is a state dict keyed like an official ``pytorch_model.bin``; every shape is read from it (clip4idc.md 1 to 4). Dropout is left
out: this is the function that the goldens were computed from, in whatever precision ``w`` has.
"""

import re

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attention, causal_mask
from .info_nce import info_nce
from .layer_norm import layer_norm
from .quick_gelu import quick_gelu

Weights = dict[str, Tensor]
HEAD_DIM = 64


def _norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return layer_norm(x, w[name + ".weight"], w[name + ".bias"], eps=eps)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def _layers(w: Weights, prefix: str) -> list[str]:
    """["<prefix>.0", "<prefix>.1", ...] in order."""
    found = {int(m[1]) for key in w if (m := re.match(re.escape(prefix) + r"\.(\d+)\.", key))}
    return [f"{prefix}.{i}" for i in sorted(found)]


def _clip_block(w: Weights, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Pre-LN residual block of CLIP: [B, L, C] -> [B, L, C]."""
    q, k, v = F.linear(_norm(w, name + ".ln_1", x), w[name + ".attn.in_proj_weight"], w[name + ".attn.in_proj_bias"]).chunk(3, dim=-1)
    x = x + _linear(w, name + ".attn.out_proj", attention(q, k, v, x.shape[-1] // HEAD_DIM, mask))
    return x + _linear(w, name + ".mlp.c_proj", quick_gelu(_linear(w, name + ".mlp.c_fc", _norm(w, name + ".ln_2", x))))


def encode_pair(w: Weights, images: Tensor, intra_layers: int) -> tuple[Tensor, Tensor]:
    """images [B, 2, 3, H, W], normalised, before then after -> embedding [B, E], hidden [B, 2(n+1), E] (clip4idc.md 1.1)."""
    batch = len(images)
    x = F.conv2d(images.flatten(0, 1), w["clip.visual.conv1.weight"], stride=w["clip.visual.conv1.weight"].shape[-1])
    x = x.flatten(2).transpose(1, 2)  # [2B, n, C], patches row by row
    x = torch.cat([w["clip.visual.class_embedding"].expand(2 * batch, 1, -1), x], dim=1) + w["clip.visual.positional_embedding"]
    x = _norm(w, "clip.visual.ln_pre", x)
    blocks = _layers(w, "clip.visual.transformer.resblocks")
    for name in blocks[:intra_layers]:
        x = _clip_block(w, name, x)
    x = x.unflatten(0, (batch, 2))
    x = torch.cat([x[:, 0] + w["clip.visual.bef_embedding"], x[:, 1] + w["clip.visual.aft_embedding"]], dim=1)
    x = _norm(w, "clip.visual.ln_mid", x + w["clip.visual.joint_positional_embedding"])
    for name in blocks[intra_layers:]:
        x = _clip_block(w, name, x)
    hidden = _norm(w, "clip.visual.ln_post", x) @ w["clip.visual.proj"]
    return (hidden[:, 0] + hidden[:, hidden.shape[1] // 2]) / 2, hidden


def encode_text(w: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, L] int -> embedding [B, E] at the end token (the largest id), hidden [B, L, E] (clip4idc.md 2)."""
    x = w["clip.token_embedding.weight"][ids.long()] + w["clip.positional_embedding"][: ids.shape[1]]
    for name in _layers(w, "clip.transformer.resblocks"):
        x = _clip_block(w, name, x, causal_mask(ids.shape[1], x.dtype, x.device))
    hidden = _norm(w, "clip.ln_final", x) @ w["clip.text_projection"]
    return hidden[torch.arange(len(ids)), ids.argmax(dim=-1)], hidden


def adaptation_loss(w: Weights, images: Tensor, ids: Tensor, intra_layers: int) -> Tensor:
    """Mean of the two InfoNCE directions over the batch (clip4idc.md 4)."""
    return info_nce(encode_text(w, ids)[0], encode_pair(w, images, intra_layers)[0], w["clip.logit_scale"])


def _bert_attention(w: Weights, name: str, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
    """Post-LN attention: LN(dense(attention(x, memory)) + x), [B, L, E] -> [B, L, E]."""
    q, k, v = (_linear(w, f"{name}.att.{part}", y) for part, y in (("query", x), ("key", memory), ("value", memory)))
    y = _linear(w, name + ".output.dense", attention(q, k, v, x.shape[-1] // HEAD_DIM, mask))
    return _norm(w, name + ".output.LayerNorm", y + x, eps=1e-12)


def _bert_mlp(w: Weights, name: str, x: Tensor) -> Tensor:
    y = _linear(w, name + ".output.dense", F.gelu(_linear(w, name + ".intermediate.dense", x)))
    return _norm(w, name + ".output.LayerNorm", y + x, eps=1e-12)


def caption_memory(w: Weights, hidden: Tensor) -> list[Tensor]:
    """hidden [B, M, E] -> the output of every encoder layer, because decoder layer i attends to encoder layer i (clip4idc.md 3)."""
    memory = []
    for name in _layers(w, "decoder.encoder.layer"):
        hidden = _bert_mlp(w, name, _bert_attention(w, name + ".slf_attn", hidden, hidden))
        memory.append(hidden)
    return memory


def caption_logits(w: Weights, memory: list[Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """memory from `caption_memory`, ids [B, T] int from the start token on, mask [B, T] 1 for real tokens -> logits [B, T, V]."""
    x = w["decoder.embeddings.word_embeddings.weight"][ids.long()] + w["decoder.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = _norm(w, "decoder.embeddings.LayerNorm", x, eps=1e-12)
    future = torch.ones(ids.shape[1], ids.shape[1], device=x.device).triu(1)
    hide = ((1 - mask[:, None, None, :].to(x.dtype)) + future > 0).to(x.dtype) * -10000.0  # [B, 1, T, T]
    for name, encoded in zip(_layers(w, "decoder.decoder.layer"), memory, strict=True):
        x = _bert_attention(w, name + ".slf_attn", x, x, hide)
        x = _bert_mlp(w, name, _bert_attention(w, name + ".enc_attn", x, encoded))
    head = "decoder.classifier.cls.predictions"
    x = _norm(w, head + ".transform.LayerNorm", F.gelu(_linear(w, head + ".transform.dense", x)), eps=1e-12)
    return F.linear(x, w[head + ".decoder.weight"], w[head + ".bias"])


def caption_loss(w: Weights, images: Tensor, input_ids: Tensor, mask: Tensor, target_ids: Tensor, intra_layers: int) -> Tensor:
    """Cross entropy, mean over the targets that are not the pad id 0."""
    logits = caption_logits(w, caption_memory(w, encode_pair(w, images, intra_layers)[1]), input_ids, mask)
    return F.cross_entropy(logits.flatten(0, 1), target_ids.flatten().long(), ignore_index=0)


@torch.no_grad()
def greedy(w: Weights, images: Tensor, intra_layers: int, start_id: int, steps: int = 32) -> Tensor:
    """Always ``steps`` arg-max steps without a cache, as the official evaluation does -> ids [B, steps] int."""
    memory = caption_memory(w, encode_pair(w, images, intra_layers)[1])
    ids = torch.full((len(images), 1), start_id, dtype=torch.long, device=images.device)
    for _ in range(steps):
        logits = caption_logits(w, memory, ids, torch.ones_like(ids))
        ids = torch.cat([ids, logits[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    return ids[:, 1:]
