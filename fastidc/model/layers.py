"""The pieces of both towers and of the captioner."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastidc import ops
from fastidc.config import CLIP_MEAN, CLIP_STD
from fastidc.ops.layer_norm import layer_norm_linear
from fastidc.ops.quick_gelu import quick_gelu_linear, sums_bias


def residual_stream(x: Tensor, weights: torch.dtype) -> Tensor:
    """x in the dtype that autocast computes in, else in that of the block stack's weights: its residual stream is kept in it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights)


def take_rows(x: Tensor, rows: list[int]) -> Tensor:
    """x[:, rows] of [B, L, C], without an index tensor that would have to travel to the device."""
    return torch.stack([x[:, row] for row in rows], dim=1)


class LayerNorm(nn.Module):
    """weight, bias [C]; statistics in fp32."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)

    def of_sum(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """x + branch, or x where there is none, [..., C]: normalised, and as it is."""
        if branch is None:
            return self(x), x
        return ops.layer_norm(branch, self.weight, self.bias, residual=x, eps=self.eps)

    def of_sum_through(self, linear: nn.Linear, x: Tensor, branch: Tensor | None, *, bias: bool = True) -> tuple[Tensor, Tensor]:
        """`of_sum`, the normalised sum multiplied by ``linear``, with its bias or without."""
        x, residual = (x, None) if branch is None else (branch, x)
        weights = (self.weight, self.bias, linear.weight, linear.bias if bias else None)
        return layer_norm_linear(x, *weights, residual=residual, eps=self.eps)


class SelfAttention(nn.Module):
    """[B, L, C] -> [B, L, C]; queries, keys and values from one projection. Or [T, C], sequences end to end: see `fastidc.ops.self_attention`."""

    def __init__(self, width: int, heads: int, causal: bool = False, dropout: float = 0.0):
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        return self.attend(self.qkv(x), cu_seqlens, max_seqlen)

    def attend(self, qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """`forward` from the projection [..., 3C] on."""
        dropout = self.dropout if self.training else 0.0
        sequences = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return self.out(ops.self_attention(qkv, self.heads, causal=self.causal, dropout_p=dropout, **sequences))

    def at(self, x: Tensor, queries: Tensor) -> Tensor:
        """The rows of ``forward(x)`` that belong to ``queries`` [B, Q, C], themselves rows of x; not for causal attention or dropout."""
        width = x.shape[-1]
        q = F.linear(queries, self.qkv.weight[:width], self.qkv.bias[:width])
        kv = F.linear(x, self.qkv.weight[width:], self.qkv.bias[width:])
        return self.out(ops.cross_attention(q, kv, self.heads))


class CrossAttention(nn.Module):
    """x [B, Lq, C] reads memory [B, Lk, C] -> [B, Lq, C]."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return self.out(ops.cross_attention(self.q(x), self.kv(memory), self.heads, dropout_p=dropout))


class MLP(nn.Module):
    """CLIP's, with the norm before it: [..., C] -> [..., 4C] -> QuickGELU -> [..., C]."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, branch: Tensor | None, norm: LayerNorm) -> tuple[Tensor, Tensor]:
        """The MLP of norm(x + branch), and x + branch."""
        apart = sums_bias(x)
        hidden, x = norm.of_sum_through(self.fc1, x, branch, bias=not apart)
        return quick_gelu_linear(hidden, self.fc1.bias if apart else None, self.fc2.weight, self.fc2.bias), x


class Block(nn.Module):
    """CLIP's pre-LN residual block over [B, L, C], or [T, C] as `SelfAttention` has it.

    The residual stream is handed on as a sum that nobody has added up yet, (x, branch): the norm that reads it next adds, in its own pass over
    memory. See `residual_blocks`.
    """

    def __init__(self, width: int, heads: int, causal: bool = False):
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal)
        self.mlp_norm = LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + branch, or x where there is none -> the same after this block, again as (x, branch)."""
        qkv, x = self.attention_norm.of_sum_through(self.attention.qkv, x, branch)
        branch, x = self.mlp(x, self.attention.attend(qkv, cu_seqlens, max_seqlen), self.mlp_norm)
        return x, branch

    def at(self, x: Tensor, branch: Tensor | None, rows: list[int]) -> Tensor:
        """Those ``rows`` of what `forward` gives, added up, computing queries, projection and MLP for them alone -> [B, len(rows), C]."""
        normed, x = self.attention_norm.of_sum(x, branch)
        branch, x = self.mlp(take_rows(x, rows), self.attention.at(normed, take_rows(normed, rows)), self.mlp_norm)
        return x + branch


def residual_blocks(
    blocks: Iterable[Block], x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """x through ``blocks``, one after the other -> (x, branch), their sum being the result; no branch where there is no block."""
    branch = None
    for block in blocks:
        x, branch = block(x, branch, cu_seqlens, max_seqlen)
    return x, branch


def added(x: Tensor, branch: Tensor | None) -> Tensor:
    """x + branch, or x where there is none."""
    return x if branch is None else x + branch


class PatchEmbed(nn.Module):
    """Images -> class token and patches, with positions and ``ln_pre`` (clip4idc.md 1.1, steps 1 to 4)."""

    def __init__(self, image_size: int, patch_size: int, width: int):
        super().__init__()
        self.image_size, self.patch_size = image_size, patch_size
        scale = width**-0.5
        self.weight = nn.Parameter(torch.randn(width, 3, patch_size, patch_size) * (3 * patch_size**2) ** -0.5)
        self.class_token = nn.Parameter(scale * torch.randn(width))
        self.position = nn.Parameter(scale * torch.randn((image_size // patch_size) ** 2 + 1, width))
        self.norm = LayerNorm(width)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W], uint8 in [0, 255] or floating and already normalised -> [N, n+1, C]."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be [N, 3, {self.image_size}, {self.image_size}], got {list(images.shape)}.")
        if not images.dtype.is_floating_point:
            images = (images.to(self.mean.dtype) / 255 - self.mean) / self.std
        size, side = self.patch_size, self.image_size // self.patch_size
        patches = images.unflatten(3, (side, size)).unflatten(2, (side, size))  # [N, 3, side, size, side, size]
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), side * side, -1)  # [N, n, 3*P*P]
        x = F.linear(patches.to(self.weight.dtype), self.weight.flatten(1))
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + self.position.to(x.dtype)
        return self.norm(residual_stream(x, self.weight.dtype))
