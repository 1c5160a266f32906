"""How the work is cut: pure functions from what is known of a call to block sizes and warps.

Not measured on a GPU yet. Until it is, the tables come from `python -m bench.tiles`, which compiles every way to cut a kernel and applies a
rule to registers, shared memory and programs a multiprocessor, the worst of Triton 3.6 and 3.9 for Hopper; every candidate is in
bench/tables/attention-sm_*.csv.
"""

from dataclasses import dataclass

LONGEST = 128  # tokens that one tile holds
HEAD_DIMS = (16, 32, 64, 128)


@dataclass(frozen=True)
class AttentionTile:
    """``blocks`` blocks of ``block_q`` queries against ``block_k`` keys, which hold the whole sequence; ``heads`` heads a program."""

    block_q: int
    blocks: int
    block_k: int
    warps: int
    stages: int = 1
    heads: int = 1


def attention(
    query_length: int, key_length: int, head_dim: int, item_bytes: int, dropout: bool, backward: bool, arch: int
) -> AttentionTile:
    """The tile of the one-tile kernels. item_bytes: 2 for fp16 and bf16, 4 for fp32, 8 in the interpreter; arch: ten times the compute
    capability, 90 for Hopper."""
    queries, keys = power_of_two(query_length), power_of_two(key_length)
    if item_bytes > 2:
        # no tensor cores: products are unrolled into single multiplications, and a small block keeps the code and the registers few
        block, warps = 16, 4 if keys <= 32 else 8
    else:
        chip, key = 90 if arch >= 90 else 80, ("bwd" if backward else "fwd", max(head_dim, 32), keys)
        block, warps = _ATTENTION[chip][key]
        if dropout:
            block, warps = _WITH_DROPOUT[chip].get(key, (block, warps))
    block = min(block, queries)
    return AttentionTile(block, queries // block, keys, warps)


def power_of_two(length: int) -> int:
    """The smallest power of two that holds ``length`` and is no less than 16, the least that a tensor core takes."""
    return max(16, 1 << (length - 1).bit_length())


# architecture -> (pass, head size, keys) -> (queries a block, warps)
_ATTENTION = {
    90: {
        ("fwd", 32, 16): (16, 1),
        ("fwd", 32, 32): (32, 1),
        ("fwd", 32, 64): (64, 4),
        ("fwd", 32, 128): (64, 4),
        ("fwd", 64, 16): (16, 1),
        ("fwd", 64, 32): (32, 1),
        ("fwd", 64, 64): (64, 4),
        ("fwd", 64, 128): (64, 4),
        ("fwd", 128, 16): (16, 1),
        ("fwd", 128, 32): (32, 2),
        ("fwd", 128, 64): (64, 4),
        ("fwd", 128, 128): (32, 8),
        ("bwd", 32, 16): (16, 1),
        ("bwd", 32, 32): (32, 2),
        ("bwd", 32, 64): (16, 2),
        ("bwd", 32, 128): (16, 4),
        ("bwd", 64, 16): (16, 1),
        ("bwd", 64, 32): (32, 2),
        ("bwd", 64, 64): (64, 4),
        ("bwd", 64, 128): (16, 8),
        ("bwd", 128, 16): (16, 2),
        ("bwd", 128, 32): (32, 4),
        ("bwd", 128, 64): (64, 4),
        ("bwd", 128, 128): (32, 8),
    },
    80: {
        ("fwd", 32, 16): (16, 1),
        ("fwd", 32, 32): (32, 1),
        ("fwd", 32, 64): (64, 2),
        ("fwd", 32, 128): (64, 2),
        ("fwd", 64, 16): (16, 1),
        ("fwd", 64, 32): (32, 1),
        ("fwd", 64, 64): (64, 4),
        ("fwd", 64, 128): (64, 2),
        ("fwd", 128, 16): (16, 1),
        ("fwd", 128, 32): (32, 2),
        ("fwd", 128, 64): (64, 4),
        ("fwd", 128, 128): (64, 8),
        ("bwd", 32, 16): (16, 1),
        ("bwd", 32, 32): (32, 2),
        ("bwd", 32, 64): (16, 2),
        ("bwd", 32, 128): (16, 2),
        ("bwd", 64, 16): (16, 1),
        ("bwd", 64, 32): (32, 4),
        ("bwd", 64, 64): (32, 4),
        ("bwd", 64, 128): (32, 4),
        ("bwd", 128, 16): (16, 2),
        ("bwd", 128, 32): (32, 8),
        ("bwd", 128, 64): (32, 4),
        ("bwd", 128, 128): (64, 8),
    },
}
# where the best with dropout is another
_WITH_DROPOUT = {
    90: {
        ("fwd", 32, 64): (64, 2),
        ("fwd", 32, 128): (32, 2),
        ("bwd", 32, 32): (32, 1),
        ("bwd", 32, 64): (16, 4),
        ("bwd", 64, 64): (16, 4),
        ("bwd", 64, 128): (16, 4),
    },
    80: {
        ("bwd", 32, 32): (32, 1),
        ("bwd", 32, 128): (32, 4),
        ("bwd", 64, 64): (16, 2),
        ("bwd", 64, 128): (64, 8),
        ("bwd", 128, 128): (16, 4),
    },
}


# ---- InfoNCE

WIDEST = 1024  # numbers of a vector


@dataclass(frozen=True)
class InfoNCETile:
    """``rows`` vectors of one side a program, ``columns`` of the other at a time; forward, ``piece`` numbers of each at a time."""

    rows: int
    columns: int
    warps: int
    stages: int
    piece: int = 0


def halves(width: int) -> tuple[int, int]:
    """Two powers of two, the second one 0 where it is not needed, that together hold a vector of ``width`` numbers. Above 256 there are always
    two, because the backward pass keeps them in registers and finishes one after the other."""
    whole = power_of_two(width)
    if whole == width or whole == 16:
        return (whole, 0) if whole <= 256 else (whole // 2, whole // 2)
    tail = power_of_two(width - whole // 2)
    return (whole, 0) if tail == whole // 2 and whole <= 256 else (whole // 2, tail)


def info_nce_fwd(count: int, width: int, item_bytes: int, arch: int) -> InfoNCETile:
    """The forward tile where the shorter side of S has ``count`` vectors of ``width`` numbers; the rest as in `attention`. Few vectors get small
    tiles, so that there are programs for all multiprocessors; many get tiles that read each vector seldom."""
    if item_bytes > 2:
        return InfoNCETile(32, 32, 8, 1, 32)
    if count <= 512:
        return InfoNCETile(32, 32, 4, 3, 128)
    if count <= 2048 or width < 64:
        return InfoNCETile(64, 64, 4, 4, 64)
    return InfoNCETile(128, 128, 8, 4 if arch >= 90 else 3, 64)


def info_nce_bwd(count: int, width: int, item_bytes: int, arch: int) -> InfoNCETile:
    """The backward tile where the longer side has ``count`` vectors; the rest as in `info_nce_fwd`. A gradient stays in registers, and they
    bound the rows: the most that the compiler serves without a spill."""
    if item_bytes > 2:
        return InfoNCETile(16, 16, 8, 1)
    if count <= 2048 or (arch < 90 and width > 256 and width != 512):
        return InfoNCETile(16, 32, 4, 3 if arch >= 90 else 2) if width <= 512 else InfoNCETile(16, 32, 8, 2)
    if arch < 90:
        return InfoNCETile(32, 32, 4 if width <= 256 else 8, 2)
    if width > 512:
        return InfoNCETile(32, 32 if width <= 768 else 16, 8, 2)
    return InfoNCETile(64, 32, 4 if width <= 128 else 8, 2)


def info_nce_steps(rows: int, columns: int, tile: InfoNCETile) -> int:
    """Blocks of columns that one forward program walks: as many as leave about eight programs to each of a large GPU's multiprocessors."""
    blocks = -(-rows // tile.rows) * -(-columns // tile.columns)
    return max(1, min(16, blocks // 1024))


# ---- linear cross entropy


@dataclass(frozen=True)
class LinearCrossEntropyTile:
    """``rows`` rows against ``words`` words at a time; where the gradient of the bias is alone, ``piece`` numbers of each at a time."""

    rows: int
    words: int
    warps: int
    stages: int
    piece: int = 0


def linear_cross_entropy_pieces(width: int) -> tuple[int, int]:
    """How many pieces of how many numbers hold a row of ``width``: a program keeps the gradient of one piece in registers."""
    piece = min(256, power_of_two(width))
    return -(-width // piece), piece


def linear_cross_entropy_packed(width: int) -> int:
    """Rows that one program brings to their places."""
    pieces, piece = linear_cross_entropy_pieces(width)
    return max(1, min(32, 8192 // power_of_two(pieces * piece)))


def linear_cross_entropy(part: str, width: int, item_bytes: int, arch: int) -> LinearCrossEntropyTile:
    """The tile of ``part``: "fwd" (statistics and the rows' gradient), "loss" (statistics alone), "bwd" (words' and bias's gradients) or
    "bwd_bias"; the rest as in `attention`. What stays in a program for its loop, rows forward and words backward, fills shared memory."""
    if item_bytes > 2:
        return LinearCrossEntropyTile(16, 16, 8, 1, 32)
    if part == "bwd_bias":
        return LinearCrossEntropyTile(128, 256 if arch >= 90 or width > 64 else 128, 8, 3, 64)
    backward = part == "bwd"
    if arch >= 90:
        own, other, warps = (128, 64, 8) if width <= 256 else (128, 32, 8) if width <= 512 else (64, 32, 4) if width <= 768 else (64, 16, 4)
    else:
        own, other, warps = (32, 32, 4) if width > 512 else (64, 16, 4) if backward else (64, 32, 4)
    rows, words = (other, own) if backward else (own, other)
    return LinearCrossEntropyTile(rows, words, warps, 2)


def linear_cross_entropy_steps(programs: int, vocabulary: int, tile: LinearCrossEntropyTile, processors: int) -> int:
    """Tiles of words that one forward program walks, where ``programs`` of them would walk the whole vocabulary. It is cut in as many parts as
    leave the fewest multiprocessors idle in the last round, in at least two rounds and at most 32 parts."""
    tiles = -(-vocabulary // tile.words)
    least = max(1, min(32, -(-2 * processors // programs)))
    rounds = {parts: -(-programs * parts // processors) / parts for parts in range(least, min(2 * least, 32) + 1)}
    return -(-tiles // min(rounds, key=rounds.__getitem__))


# ---- LayerNorm and QuickGELU


@dataclass(frozen=True)
class RowsTile:
    """``rows`` rows of ``columns`` numbers at a time; ``programs`` to a multiprocessor where a fixed number of them share out all rows."""

    rows: int
    columns: int
    warps: int = 4
    stages: int = 1
    programs: int = 0


SUM_OF_PARTS = RowsTile(64, 32)


def layer_norm(width: int, backward: bool) -> RowsTile:
    """Whole rows of ``width`` numbers: forward 32 numbers a thread, backward 16, where there are two or three tensors to read and sums to keep, so
    that all programs are on the chip at once, with more bytes under way than its memory's latency asks for (26 KB a multiprocessor)."""
    columns = power_of_two(width)
    return RowsTile(max(1, min(32, (2048 if backward else 4096) // columns)), columns, programs=4)


def quick_gelu(width: int, backward: bool) -> RowsTile:
    """Strips of at most 1024 columns, as `layer_norm` otherwise."""
    tile = layer_norm(min(width, 1024), backward)
    return RowsTile(tile.rows, tile.columns, programs=8)


def row_programs(rows: int, tile: RowsTile, across: int, processors: int) -> int:
    """Programs that share out ``rows`` in the backward pass, where tiles lie ``across`` side by side: no more than all multiprocessors hold at once,
    nor than there are blocks of rows. Each leaves one part of a sum over rows."""
    return min(-(-rows // tile.rows), max(1, tile.programs * processors // across))


# ---- BertAdam


@dataclass(frozen=True)
class BertAdamTile:
    """``chunk`` elements a program, ``block`` at a time in the update and ``norm_block`` where squares are summed."""

    chunk: int
    block: int
    norm_block: int
    warps: int


def bert_adam(arch: int) -> BertAdamTile:
    """A chunk is long enough to make up for looking up where it is, and leaves 146 million parameters 16 or more programs to each place of a
    large GPU. In a block a thread has four 128-bit loads of every operand under way while summing squares, and two in the update, whose four
    operands share the registers."""
    return BertAdamTile(chunk=8192, block=1024, norm_block=2048, warps=4)
