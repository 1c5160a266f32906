"""Self-attention and the projection after it, with nothing kept between them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastidc.ops._attention_triton import new_seed, self_attention_bwd, self_attention_fwd
from fastidc.ops.attention import Call, _as_autocast, _spec, op, self_attention
from fastidc.ops.fp8_linear import autocast_dtype, fp8_linear_bwd, fp8_linear_fwd, in_fp8, linear
from fastidc.ops.layer_norm import as_product


def self_attention_linear(
    qkv: Tensor, num_heads: int, weight: Tensor, bias: Tensor | None, *, dropout_p: float = 0.0, fp8_rows: int | None = None
) -> Tensor:
    """F.linear(self_attention(qkv), weight, bias): qkv [B, L, 3*H*D], weight [N, H*D], bias [N] or None -> [B, L, N]. Neither causal nor packed;
    errors are `fastidc.ops.self_attention`'s.

    Where the kernels serve, attention's result, which the weight's gradient reads, is made once more from the projections, which attention's own
    backward pass keeps and reads anyway: a launch more, and a tenth less of what a block keeps. Not within torch.compile, which decides
    itself what it keeps. ``fp8_rows``: see `fastidc.ops.fp8_linear.in_fp8`.
    """
    wanted = torch.is_grad_enabled() and weight.requires_grad
    if wanted and not torch.compiler.is_compiling() and qkv.dim() == 3 and (autocast_dtype(qkv) or qkv.dtype) == qkv.dtype:
        length, width = qkv.shape[1], qkv.shape[2] // 3
        if op.serving(_spec(Call(num_heads, dropout_p=dropout_p), qkv, width, length, length, True), "auto") == "triton":
            seed = new_seed(qkv.device) if dropout_p else None
            return _AttentionLinear.apply(
                _as_autocast(qkv), num_heads, *as_product(qkv, weight, bias), dropout_p, seed, in_fp8(qkv, fp8_rows)
            )
    return linear(self_attention(qkv, num_heads, dropout_p=dropout_p), weight, bias, fp8_rows)


class _AttentionLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads, weight, bias, dropout_p, seed, fp8):
        ctx.attention, ctx.fp8 = (num_heads, False, None, 0, dropout_p), fp8
        ctx.save_for_backward(qkv, weight, seed)
        return (fp8_linear_fwd if fp8 else F.linear)(self_attention_fwd(qkv, *ctx.attention, seed), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        qkv, weight, seed = ctx.saved_tensors
        of_qkv, _, of_weight, of_bias, *_ = ctx.needs_input_grad
        rows, dqkv, dweight = grad.reshape(-1, grad.shape[-1]), None, None
        if of_weight:
            dweight = rows.T @ self_attention_fwd(qkv, *ctx.attention, seed).flatten(0, 1)
        if of_qkv:
            upstream = fp8_linear_bwd(rows, weight) if ctx.fp8 else rows @ weight
            dqkv = self_attention_bwd(upstream.view(*qkv.shape[:2], -1), qkv, *ctx.attention, seed)
        return dqkv, None, dweight, rows.sum(0) if of_bias else None, None, None, None
