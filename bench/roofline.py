"""Floors: the least time that an op or a whole step can take, from the bytes that it must move and the FLOPs that it must do.

1 multiply-add = 2 FLOP. Every kernel reads each input once and writes each output once; activations have ``size`` bytes (2: bf16). A GEMM's
backward is twice its forward. A step is a list of kernels that do not overlap: its floor is the sum over them of the larger of the two
times; "ideal" is the larger of the two sums. Weights' bytes are shared by a large batch and left out; the optimiser stands apart.
The arithmetic is fastidc's: what the result needs (packed captions, two tokens out of the last inter layer), with pointwise work fused.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from fastidc.config import ModelConfig

WORDS = 14  # tokens of a caption, start and end included: an assumption about CLEVR-Change, a parameter everywhere


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches at best. The default was measured on an H200; a run measures its own (`bench.timing.ceilings`)."""

    flops: float = 790e12  # per second, dense bf16 products
    bytes: float = 4.3e12  # per second, read and written, in a copy on the device


H200 = Ceilings()


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of one kernel."""

    flops: float = 0.0
    bytes: float = 0.0

    def seconds(self, ceilings: Ceilings = H200) -> float:
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bytes)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.bytes * factor)


@dataclass(frozen=True)
class Floor:
    """Kernels of a forward and of its backward pass."""

    forward: tuple[Work, ...]
    backward: tuple[Work, ...] = ()

    def seconds(self, mode: str, ceilings: Ceilings = H200) -> float:
        """mode: "fwd", "bwd", or anything else for both."""
        parts = {"fwd": self.forward, "bwd": self.backward}.get(mode, self.forward + self.backward)
        return sum(work.seconds(ceilings) for work in parts)

    def total(self) -> Work:
        return sum(self.forward + self.backward, Work())

    def ideal(self, ceilings: Ceilings = H200) -> float:
        """Seconds, were bytes and FLOPs of all kernels to overlap perfectly."""
        return self.total().seconds(ceilings)

    def times(self, factor: float) -> "Floor":
        return Floor(tuple(w * factor for w in self.forward), tuple(w * factor for w in self.backward))


def join(floors: Iterable[Floor]) -> Floor:
    floors = list(floors)
    return Floor(tuple(w for f in floors for w in f.forward), tuple(w for f in floors for w in f.backward))


def _thirds(flops: float, bytes_: float) -> Floor:
    """A forward and a backward of twice its cost, from the cost of both."""
    whole = Work(flops, bytes_)
    return Floor((whole * (1 / 3),), (whole * (2 / 3),))


# ---- single ops


def attention(
    sequences: float, queries: float, heads: int, head_dim: int = 64, *, keys: float | None = None, causal=False, size=2
) -> Floor:
    """Q, K, V in, O and a fp32 log-sum-exp out; back: Q, K, V, dO and the log-sum-exp in, dQ, dK, dV out. O is not read again, because a
    whole row fits one tile. The backward has five products where the forward has two."""
    keys, width = keys or queries, heads * head_dim
    flops = sequences * 4 * queries * keys * width * (0.5 if causal else 1)
    statistics = sequences * queries * heads * 4
    q, kv = sequences * queries * width * size, sequences * 2 * keys * width * size
    return Floor((Work(flops, 2 * q + kv + statistics),), (Work(2.5 * flops, 3 * q + 2 * kv + statistics),))


def info_nce(batch: int, width: int, size: int = 2) -> Floor:
    """Unit 2 B B D: the scores once; back: the scores again and two gradient products. No score reaches memory."""
    unit, rows = 2.0 * batch * batch * width, 2 * batch * width * size
    return Floor((Work(unit, rows),), (Work(3 * unit, 2 * rows),))


def linear_cross_entropy(tokens: int, vocabulary: int, width: int, *, trained: bool, bias: bool = True, size: int = 2) -> Floor:
    """Unit 2 N V D. The loss needs one; with dX two, from one pass; the bias gradient one more over a frozen table; a trained table four."""
    unit = 2.0 * tokens * vocabulary * width
    total = 4 if trained else 3 if bias else 2
    rows, table = tokens * width * size, vocabulary * width * size
    return Floor((Work(unit, rows + table),), (Work((total - 1) * unit, rows + (table if trained else 0)),))


def layer_norm(rows: int, width: int, *, residual: bool, size: int = 2) -> Floor:
    """x (and the residual) in, y (and the sum) out; back: dy, the sum (and its gradient) in, dx out, which is the residual's gradient too."""
    tensor = rows * width * size
    return Floor((Work(0, tensor * (4 if residual else 2)),), (Work(0, tensor * (4 if residual else 3)),))


def patches(images: int, image_size: int, patch_size: int, size: int = 2) -> Floor:
    """uint8 pixels in, one row a patch out."""
    pixels = images * 3 * (image_size // patch_size * patch_size) ** 2
    return Floor((Work(0, pixels * (1 + size)),))


def optimizer(parameters: float) -> Floor:
    """Parameter, gradient and two moments in, parameter and moments out, fp32."""
    return Floor((Work(0, parameters * 28),))


# ---- whole steps


def block(tokens: float, length: float, width: int, *, causal: bool = False, queries: float | None = None) -> Floor:
    """A pre-LN block over ``tokens`` in sequences of ``length``. queries: tokens that anyone still reads (of the last layer); None means all.

    The residual add and LayerNorm share a kernel, QuickGELU rides on the products beside it, LayerNorm's first half on the block before.
    """
    read = tokens if queries is None else queries
    share = read / tokens
    square, t, q = 2.0 * width * width, tokens * width * 2, read * width * 2  # FLOPs of a product per token; bytes of a bf16 tensor
    attend = tokens / length * 4 * length * length * width * (0.5 if causal else 1) * share
    qkv = square * (2 * tokens + read)
    forward = (
        Work(0, t),  # the normalised copy
        Work(qkv, t + 2 * t + q),
        Work(attend, 2 * t + 2 * q),
        Work(square * read, 4 * q),  # out projection, residual, ln_2
        Work(4 * square * read, 9 * q),  # fc1, which keeps what its backward needs
        Work(4 * square * read, 6 * q),  # fc2, residual
    )
    backward = (
        Work(4 * square * read, 9 * q),  # fc2: to the activation, through it
        Work(4 * square * read, 5 * q),
        Work(4 * square * read, 5 * q),  # fc1
        Work(4 * square * read, 5 * q),
        Work(0, 4 * q),  # ln_2 and residual
        Work(square * read, 2 * q),  # out projection
        Work(square * read, 2 * q),
        Work(2.5 * attend, 4 * t + 3 * q),
        Work(qkv, 4 * t),
        Work(qkv, 4 * t),
        Work(0, 4 * t),  # ln_1 and residual
    )
    return Floor(forward, backward)


def vision(config: ModelConfig, *, images: int = 2, pairs: int = 1, class_tokens_only: bool = False, stem: bool = True) -> Floor:
    """Both stages of the image tower. class_tokens_only: two tokens a pair leave the last layer; stem=False: its tokens are cached."""
    length, width, out = config.image_tokens, config.vision_width, 2 if class_tokens_only else 2 * config.image_tokens
    single, joint = images * length, pairs * 2 * length
    inter = config.vision_layers - config.intra_layers
    parts = []
    if stem:
        flops = 2.0 * images * (length - 1) * 3 * config.patch_size**2 * width
        parts.append(Floor((Work(flops, images * (3 * config.image_size**2 + length * width * 2)),)))
    parts.append(Floor((Work(0, single * width * 4),)))
    parts += [block(single, length, width)] * config.intra_layers
    parts.append(_thirds(0, joint * width * 12))  # before and after embeddings, joint positions, ln_mid
    parts += [block(joint, 2 * length, width, queries=2.0 * pairs if class_tokens_only and i == inter - 1 else None) for i in range(inter)]
    parts.append(_thirds(6.0 * pairs * out * width * config.embed_dim, pairs * out * (8 * width + 6 * config.embed_dim)))
    return join(parts)


def text(config: ModelConfig, words: float = WORDS) -> Floor:
    """One packed caption; only the end token leaves the last layer."""
    width, last = config.embed_dim, config.text_layers - 1
    blocks = [block(words, words, width, causal=True, queries=1.0 if i == last else None) for i in range(config.text_layers)]
    return join([*blocks, _thirds(6.0 * width * width, words * width * 12)])


def captioner(config: ModelConfig, words: float = WORDS, *, trained_table: bool = False) -> Floor:
    """One caption over one pair's tokens: encoder, decoder and the loss over the vocabulary."""
    d, layers, memory = config.embed_dim, config.captioner_layers, 2 * config.image_tokens
    linears = layers * (memory * 24.0 + words * 28.0 + memory * 4.0) * d * d
    attend = layers * d * (4.0 * memory * memory + 2.0 * words * words + 4.0 * words * memory)
    vocabulary = linear_cross_entropy(words, config.vocab_size, d, trained=trained_table).total()
    return join(
        [
            _thirds(3 * linears, layers * (memory + 1.4 * words) * d * 150),
            Floor((Work(attend, layers * (memory + 2 * words) * d * 10),), (Work(2.5 * attend, layers * (memory + 2 * words) * d * 24),)),
            _thirds(6.0 * words * d * d, words * d * 24),
            _thirds(vocabulary.flops, words * d * 6),  # the table's bytes are shared by the batch
        ]
    )


def adaptation(config: ModelConfig) -> Floor:
    """One pair with its caption; the loss itself is below a thousandth of it at any batch that fits (performance.md 1.3)."""
    return join([vision(config, class_tokens_only=True), text(config)])


def captioning(config: ModelConfig, *, pairs: int = 1, stem: bool = False, trained_table: bool = False) -> Floor:
    """One sample: the before-image, ``pairs`` images beside it, one caption each. The frozen stem's tokens come from a cache by default."""
    return join([vision(config, images=1 + pairs, pairs=pairs, stem=stem), *[captioner(config, trained_table=trained_table)] * pairs])


def generation(config: ModelConfig, batch: int, steps: int = 32) -> Floor:
    """Greedy captions of ``batch`` pairs: towers and encoder once, then ``steps`` steps, each of which reads the weights and the caches."""
    d, layers, memory = config.embed_dim, config.captioner_layers, 2 * config.image_tokens
    encode = Work(batch * layers * d * (28.0 * memory * d + 4.0 * memory * memory))
    weights = layers * 16 * d * d + d * d + config.vocab_size * d
    flops = batch * (layers * 28.0 * d * d + 2.0 * d * config.vocab_size + 2.0 * d * d)
    step = Work(flops, 2 * weights + batch * layers * (memory + steps / 2) * 4 * d)
    towers = Floor(vision(config).forward).times(batch)
    return Floor((*towers.forward, encode, *[step] * steps))
