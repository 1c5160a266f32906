"""The pieces of both towers and of the captioner."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from fastidc import ops
from fastidc.config import CLIP_MEAN, CLIP_STD
from fastidc.ops.attention_linear import self_attention_linear
from fastidc.ops.fp8_linear import linear
from fastidc.ops.layer_norm import as_product, layer_norm_linear
from fastidc.ops.post_norm import post_norm_linear
from fastidc.ops.quick_gelu import quick_gelu_linear, sums_bias


def residual_stream(x: Tensor, weights: torch.dtype) -> Tensor:
    """x in the dtype that autocast computes in, else in that of the block stack's weights: its residual stream is kept in it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights)


def state_of(p: Tensor) -> tuple[int, int]:
    """What changes when anybody writes to p: torch's operators count, as do our optimisers."""
    return p._version, 0 if isinstance(p, FakeTensor) else p.data_ptr()


def take_rows(x: Tensor, rows: slice | Tensor) -> Tensor:
    """A slice of each sequence of [B, L, C], a view; or those rows [S] int of all sequences end to end, [T, C] or [B, L, C] -> [S, C]."""
    return x[:, rows] if isinstance(rows, slice) else x.flatten(0, -2).index_select(0, rows)


class Linear(nn.Linear):
    """nn.Linear, whose product runs in FP8 in training where `fastidc.train.fp8.enable_fp8` has set ``fp8_rows``."""

    fp8_rows: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.fp8)

    @property
    def fp8(self) -> int | None:
        """See `fastidc.ops.fp8_linear.in_fp8`: so many rows run in FP8 now, or None do."""
        return self.fp8_rows if self.training else None


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

    def of_sum_through(self, linear: Linear, x: Tensor, branch: Tensor | None, *, bias: bool = True) -> tuple[Tensor, Tensor]:
        """`of_sum`, the normalised sum multiplied by ``linear``, with its bias or without."""
        x, residual = (x, None) if branch is None else (branch, x)
        weights = (self.weight, self.bias, linear.weight, linear.bias if bias else None)
        return layer_norm_linear(x, *weights, residual=residual, eps=self.eps, fp8_rows=linear.fp8)

    def of_sum_times(
        self, weight: Tensor, bias: Tensor | None, x: Tensor, branch: Tensor | None, fp8_rows: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """`of_sum_through` with the weights of the product, [D, C] and [D] in the dtype that it is computed in."""
        x, residual = (x, None) if branch is None else (branch, x)
        return layer_norm_linear(x, self.weight, self.bias, weight, bias, residual=residual, eps=self.eps, fp8_rows=fp8_rows)

    def through(self, linear: Linear, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """x + branch, normalised: multiplied by ``linear``, and as it is."""
        weights = (self.weight, self.bias, linear.weight, linear.bias)
        return post_norm_linear(branch, *weights, residual=x, eps=self.eps, fp8_rows=linear.fp8)


class Dropout(nn.Dropout):
    """nn.Dropout that keeps a byte an element for its backward pass on a CPU too, and has one operator there."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, True)[0] if self.training and self.p else x


class SelfAttention(nn.Module):
    """[B, L, C] -> [B, L, C]; queries, keys and values from one projection. Or [T, C], sequences end to end: see `fastidc.ops.self_attention`.
    Without ``keeps_result`` (not for causal attention) less is kept for the backward pass: see `self_attention_linear`."""

    def __init__(self, width: int, heads: int, causal: bool = False, dropout: float = 0.0, keeps_result: bool = True):
        super().__init__()
        self.heads, self.causal, self.dropout, self.keeps_result = heads, causal, dropout, keeps_result
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        return self.attend(self.qkv(x), cu_seqlens, max_seqlen)

    def attend(self, qkv: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None) -> Tensor:
        """`forward` from the projection [..., 3C] on."""
        dropout = self.dropout if self.training else 0.0
        if not self.keeps_result:
            return self_attention_linear(qkv, self.heads, self.out.weight, self.out.bias, dropout_p=dropout, fp8_rows=self.out.fp8)
        sequences = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        return self.out(ops.self_attention(qkv, self.heads, causal=self.causal, dropout_p=dropout, **sequences))

    def weights_apart(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of the queries, and those of keys and values, as a product with x takes them. One split: its gradient is one copy."""
        width = self.out.in_features
        weight, bias = as_product(x, self.qkv.weight, self.qkv.bias)
        return list(zip(weight.split([width, 2 * width]), bias.split([width, 2 * width]), strict=True))

    def attend_at(
        self, q: Tensor, kv: Tensor, rows: slice | Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> Tensor:
        """Those ``rows`` of `attend`, of which alone there are queries; not for dropout. A slice is for attention that is not causal."""
        if isinstance(rows, slice):
            return self.out(ops.cross_attention(q, kv, self.heads))
        # attention waits for memory: a query of zeros for every other row costs less than keys and values laid out for one query each
        spread = q.new_zeros(kv.shape[:-1].numel(), q.shape[-1]).index_add_(0, rows, q).view(*kv.shape[:-1], q.shape[-1])
        sequences = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        asked = ops.self_attention(torch.cat([spread, kv], dim=-1), self.heads, causal=self.causal, **sequences)
        return self.out(take_rows(asked, rows))


class CrossAttention(nn.Module):
    """x [B, Lq, C] reads memory [B, Lk, C] -> [B, Lq, C]."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.out(self.attend(self.q(x), memory))

    def attend(self, q: Tensor, memory: Tensor) -> Tensor:
        """`forward` between its first projection and its last: q [B, Lq, C] -> [B, Lq, C]."""
        return ops.cross_attention(q, self.kv(memory), self.heads, dropout_p=self.dropout if self.training else 0.0)


class MLP(nn.Module):
    """CLIP's, with the norm before it: [..., C] -> [..., 4C] -> QuickGELU -> [..., C]."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor, branch: Tensor | None, norm: LayerNorm) -> tuple[Tensor, Tensor]:
        """The MLP of norm(x + branch), and x + branch."""
        apart = sums_bias(x)
        hidden, x = norm.of_sum_through(self.fc1, x, branch, bias=not apart)
        return quick_gelu_linear(hidden, self.fc1.bias if apart else None, self.fc2.weight, self.fc2.bias, fp8_rows=self.fc2.fp8), x


class Block(nn.Module):
    """CLIP's pre-LN residual block over [B, L, C], or [T, C] as `SelfAttention` has it.

    The residual stream is handed on as a sum that nobody has added up yet, (x, branch): the norm that reads it next adds, in its own pass over
    memory. See `residual_blocks`.
    """

    def __init__(self, width: int, heads: int, causal: bool = False, keeps_result: bool = True):
        super().__init__()
        self.attention_norm = LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal, keeps_result=keeps_result)
        self.mlp_norm = LayerNorm(width)
        self.mlp = MLP(width)

    def forward(
        self, x: Tensor, branch: Tensor | None = None, cu_seqlens: Tensor | None = None, max_seqlen: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """x + branch, or x where there is none -> the same after this block, again as (x, branch)."""
        qkv, x = self.attention_norm.of_sum_through(self.attention.qkv, x, branch)
        branch, x = self.mlp(x, self.attention.attend(qkv, cu_seqlens, max_seqlen), self.mlp_norm)
        return x, branch

    def at(
        self,
        x: Tensor,
        branch: Tensor | None,
        rows: slice | Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Those ``rows`` (see `take_rows`) of what `forward` gives, computing queries, projection and MLP for them alone."""
        queries, keys_and_values = self.attention.weights_apart(x)
        fp8 = self.attention.qkv.fp8
        kv, x = self.attention_norm.of_sum_times(*keys_and_values, x, branch, fp8)
        x = take_rows(x, rows)
        q, _ = self.attention_norm.of_sum_times(
            *queries, x, None, fp8
        )  # normalised once more: the rows are few, and none of all is kept for it
        branch, x = self.mlp(x, self.attention.attend_at(q, kv, rows, cu_seqlens, max_seqlen), self.mlp_norm)
        return x, branch


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
        self._folded: dict[tuple, tuple] = {}  # (dtype, device) -> what `folded` was made of, and itself

    def forward(self, images: Tensor, index: Tensor | None = None, augmentation: Tensor | None = None) -> Tensor:
        """images [N, 3, H, W], floating and already normalised -> [N, n+1, C]. Or uint8 in [0, 255], [I, 3, H, W], of which ``index`` picks N and
        ``augmentation`` changes them as `fastidc.ops.patches` does; where pixels lie as stored images have them, [I, H, W, 3] beneath a
        permutation, they are read once, and written as patches only."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images must be [N, 3, {self.image_size}, {self.image_size}], got {list(images.shape)}.")
        if not images.dtype.is_floating_point:
            return self._of_pixels(images.permute(0, 2, 3, 1), index, augmentation)
        size, side = self.patch_size, self.image_size // self.patch_size
        patches = images.unflatten(3, (side, size)).unflatten(2, (side, size))  # [N, 3, side, size, side, size]
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(len(images), side * side, -1)  # [N, n, 3*P*P]
        return self._embedded(patches.to(self.weight.dtype), self.weight.flatten(1))

    def _of_pixels(self, images: Tensor, index: Tensor | None, augmentation: Tensor | None) -> Tensor:
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        if dtype == torch.float16:  # which cannot hold the folded weights
            patches = ops.patches(images, index, self.patch_size, augmentation=augmentation, dtype=torch.float32)
            normal = torch.sub(patches.unflatten(2, (3, -1)), self.mean.flatten(1), alpha=255) / (255 * self.std.flatten(1))
            return self._embedded(normal.flatten(2).to(dtype), self.weight.flatten(1))
        patches = ops.patches(images, index, self.patch_size, augmentation=augmentation, dtype=dtype)
        return self._embedded(patches, *self.folded(dtype))

    def folded(self, dtype: torch.dtype) -> "ops.Folded":
        """The weight with the normalisation in it, see `fastidc.ops.fold_normalisation`. Of a frozen stem it is made once and, where someone has
        written the weight since, once more in place, since a captured step reads it at its address."""
        if self.weight.requires_grad or self.weight.is_inference():
            return ops.fold_normalisation(self.weight, self.mean, self.std, dtype)
        key, state = (dtype, self.weight.device), state_of(self.weight)
        seen, kept = self._folded.get(key, (None, None))
        if kept is None or seen != state:
            with torch.inference_mode(False), torch.no_grad():  # what is kept must be writable, whoever asked first
                made = ops.fold_normalisation(self.weight.detach(), self.mean, self.std, dtype)
                if kept is not None and type(kept.weight) is type(made.weight):
                    torch._foreach_copy_(list(kept), list(made))
                    made = kept
            self._folded[key] = state, made
        return self._folded[key][1]

    def refold(self) -> None:
        """Brings up to date what `folded` keeps, for a replay, which would not notice that somebody has written the weight."""
        for dtype, device in list(self._folded):
            if device == self.weight.device and not self.weight.requires_grad:
                self.folded(dtype)

    def _embedded(self, patches: Tensor, weight: Tensor, bias: Tensor | None = None, remainder: Tensor | None = None) -> Tensor:
        """patches [N, n, 3*P*P] and weight [C, 3*P*P]; ``remainder`` [C] of the bias -> [N, n+1, C]."""
        x, position = F.linear(patches, weight, bias), self.position
        if remainder is not None:
            position = torch.cat([position[:1], position[1:] + remainder])
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1) + position.to(x.dtype)
        return self.norm(residual_stream(x, self.weight.dtype))
