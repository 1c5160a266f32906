"""The patch gather: backends against the reference, the kernel's arithmetic through its host build, the folded normalisation."""

import re

import compare
import pytest
import torch
from patches_host import launches, pictures  # noqa: F401 - a fixture
from torch.nn import functional as F

from fastidc import ops
from fastidc.config import CLIP_MEAN, CLIP_STD
from fastidc.model.layers import PatchEmbed
from fastidc.ops import _patches_cuda
from fastidc_kernels import _runtime
from fastidc_kernels import patches as kernels

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(32, 64, 96), (16, 32, 32), (14, 28, 42), (8, 16, 24), (5, 10, 15), (1, 2, 3), (3, 9, 3)]  # patch, height, width


def inputs(height: int, width: int, stored: int = 4, taken=(2, 0, 2, 3)):
    return torch.stack(pictures(*[(height, width)] * stored)), torch.tensor(taken)


def run(backend: str, *given, **more):
    """An op's backend by its name; "cuda" is the launcher on top of the host build."""
    if backend != "cuda":
        return ops.patches(*given, **more, backend=backend)
    images, index, size = given
    return _patches_cuda.patches(images, index, size, more.get("augmentation"), more.get("dtype", torch.bfloat16))


def test_reference_is_stated_with_loops():
    images, index = inputs(6, 4)
    got = ops.patches(images, index, 2, dtype=torch.float64, backend="reference")
    for k, which in enumerate(index):
        for n in range(6):
            y, x = n // 2 * 2, n % 2 * 2
            want = [images[which, y + i, x + j, c] for c in range(3) for i in range(2) for j in range(2)]
            assert got[k, n].tolist() == want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("patch", "height", "width"), SHAPES)
@pytest.mark.parametrize("backend", ["torch", "cuda"])
def test_backends_give_the_same_bits(launches, backend, patch, height, width, dtype):  # noqa: F811
    images, index = inputs(height, width)
    want = ops.patches(images, index, patch, dtype=torch.float64, backend="reference")
    got = run(backend, images, index, patch, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got.double(), want), "0 to 255 are exact in every dtype"


def test_every_level_in_every_dtype(launches):  # noqa: F811
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3).contiguous()
    for dtype in DTYPES:
        got = run("cuda", levels, torch.tensor([0]), 16, dtype=dtype)
        assert torch.equal(got.view(3, 256).double(), torch.arange(256.0).double().expand(3, 256))


def test_launches_fit_the_device(launches):  # noqa: F811
    images, index = inputs(448, 448, stored=1, taken=[0] * 3)
    for patch, name in ((32, "32"), (16, "16"), (14, "14"), (7, "any"), (28, "any")):
        run("cuda", images, index, patch)
        (seen, grid, block, shared) = launches.seen.pop()
        assert seen == f"patches_bf16_{name}"
        assert grid == (3 * 448 // patch,)
        assert block == (256,)
        assert shared >= 3 * patch * 448
        assert shared % 16 == 0
    assert launches.seen == []
    assert run("cuda", images, index[:0], 16).shape == (0, 784, 768)
    assert launches.seen == [], "nothing to do is no launch"


def test_an_index_that_is_none(launches):  # noqa: F811
    images, _ = inputs(8, 8)
    index = torch.tensor([1, 4, 0, -1, 2**40])
    got = run("cuda", images, index, 4)
    assert not got[[1, 3, 4]].any()
    assert torch.equal(got[[0, 2]], ops.patches(images, index[[0, 2]], 4))
    assert ops.take_faults() == ["The patch gather met an index that is none of its images', first at place 1 of its batch."]
    assert ops.take_faults() == []
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match="index must be from 0 to 3, got 4 at place 1"):
            ops.patches(images, index, 4, backend=backend)


def test_slices_and_narrow_indices(launches):  # noqa: F811
    """Images that begin anywhere, and int32: the same numbers as of dense int64 ones."""
    images, index = inputs(16, 16)
    want = ops.patches(images, index, 8, backend="reference")
    strided = torch.zeros(4, 16, 17, 3, dtype=torch.uint8)[:, :, 1:]
    strided.copy_(images)
    for backend in ("torch", "cuda"):
        assert torch.equal(run(backend, strided, index.int(), 8), want)
        assert torch.equal(run(backend, images, torch.stack([index, index], 1)[:, 0], 8), want)


def test_meta_and_compiled():
    images, index = inputs(16, 16)
    fake = _patches_cuda.patches_fwd(images.to("meta"), index.to("meta"), 8, None, torch.float16)
    assert (fake.shape, fake.dtype) == ((4, 4, 192), torch.float16)
    compiled = torch.compile(lambda x, i: 2 * ops.patches(x, i, 8), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(images, index), 2 * ops.patches(images, index, 8))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, i: (x.float(), i, 8), "images must be uint8 [I, H, W, 3], got torch.float32 [4, 16, 16, 3]"),
        (lambda x, i: (x.permute(0, 3, 1, 2), i, 8), "images must be uint8 [I, H, W, 3], got torch.uint8 [4, 3, 16, 16]"),
        (lambda x, i: (x, i, 5), "a whole number of patches of 5, got 16 x 16 pixels"),
        (lambda x, i: (x, i, 0), "a whole number of patches of 0"),
        (lambda x, i: (x, i.float(), 8), "index must be int32 or int64 [K] on cpu, where the images are, got torch.float32 [4] on cpu"),
        (lambda x, i: (x, i.view(2, 2), 8), "got torch.int64 [2, 2]"),
    ],
)
def test_refusals_are_sentences(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ops.patches(*change(*inputs(16, 16)))
    images, index = inputs(16, 16)
    with pytest.raises(ValueError, match="dtype must be a floating one"):
        ops.patches(images, index, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=re.escape("augmentation must be float32 [4, 15] on cpu, got torch.float32 [4, 3]")):
        ops.patches(images, index, 8, augmentation=torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"backend 'cuda' cannot serve this patches call: .*it runs on CUDA, not on cpu"):
        ops.patches(images, index, 8, backend="cuda")


def test_what_the_kernel_refuses(monkeypatch):
    from fastidc.ops._dispatch import Spec

    monkeypatch.setattr(_runtime, "missing", lambda package: None)
    spec = Spec("patches", "cuda", torch.bfloat16, False, 90, head_dim=3 * 32 * 224)
    assert _patches_cuda.unsupported(spec) == []
    assert "bytes at most" in " ".join(_patches_cuda.unsupported(spec._replace(head_dim=200_000)))
    assert "it writes bf16, fp16 and fp32, not float64." in _patches_cuda.unsupported(spec._replace(dtype=torch.float64))
    assert "compute capability 8.0" in " ".join(_patches_cuda.unsupported(spec._replace(arch=75)))
    monkeypatch.setattr(_runtime, "missing", lambda package: f"the package {package} is not installed.")
    assert _patches_cuda.unsupported(spec) == ["the package cupy is not installed."]


# ---- normalisation as part of the product


def embedding(patch: int = 8, size: int = 32, width: int = 24, mean: float = 0.02) -> PatchEmbed:
    torch.manual_seed(0)
    found = PatchEmbed(size, patch, width).double()
    with torch.no_grad():
        found.weight += mean * torch.randn(width, 3, 1, 1, dtype=torch.float64)  # as trained ones have
    for name, value in (("mean", CLIP_MEAN), ("std", CLIP_STD)):
        setattr(found, name, torch.tensor(value, dtype=torch.float64).view(3, 1, 1))
    return found


def projection(embed: PatchEmbed, images, dtype: torch.dtype):
    """What `PatchEmbed` multiplies, as it does it: images normalised, rounded to ``dtype``, times weights rounded to it."""
    normalised = torch.sub(images.permute(0, 3, 1, 2), embed.mean, alpha=255) / (255 * embed.std)
    return F.conv2d(normalised.to(dtype).double(), embed.weight.to(dtype).double(), stride=embed.patch_size).flatten(2).transpose(1, 2)


def test_folded_normalisation_is_exact():
    embed = embedding()
    images, index = inputs(32, 32)
    weight, bias, remainder = ops.fold_normalisation(embed.weight, CLIP_MEAN, CLIP_STD)
    assert not remainder.any()
    got = F.linear(ops.patches(images, index, 8, dtype=torch.float64), weight, bias)
    compare.assert_close(got, projection(embed, images[index], torch.float64), compare.FP64_MODEL)
    x = torch.cat([embed.class_token.expand(4, 1, -1), got], dim=1) + embed.position
    compare.assert_close(embed.norm(x), embed(images[index].permute(0, 3, 1, 2)), compare.FP64_MODEL, "the whole of PatchEmbed")


def test_folded_normalisation_rounds_no_worse():
    """With sums in fp32, as tensor cores have them, and the result rounded. Without the remainder it would be worse."""
    dtype, embed = torch.bfloat16, embedding(patch=16, size=64, width=256, mean=0)
    images, index = inputs(64, 64)
    images = (images // 4 + torch.tensor([30, 110, 190, 90]).view(4, 1, 1, 1)).to(torch.uint8)
    weight, bias, remainder = ops.fold_normalisation(embed.weight, CLIP_MEAN, CLIP_STD, dtype)
    assert weight.dtype == bias.dtype == dtype
    assert remainder.dtype == torch.float32
    got = F.linear(ops.patches(images, index, 16, dtype=torch.float32), weight.float(), bias.float()).to(dtype)
    want = projection(embed, images[index], torch.float64)
    unfolded = projection(embed, images[index], dtype).float().to(dtype)
    assert compare.relative_error(got + remainder, want) <= compare.relative_error(unfolded, want)


def test_folded_normalisation_has_gradients():
    embed = embedding(width=4, patch=2, size=4)
    weight = embed.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ops.fold_normalisation(w, CLIP_MEAN, CLIP_STD)[:2], weight)
    with pytest.raises(ValueError, match=re.escape("weight must be [C, 3, P, P]")):
        ops.fold_normalisation(weight.flatten(1), CLIP_MEAN, CLIP_STD)


def test_the_source_is_whole():
    """What NVRTC gets has its header inside, and every kernel that a launcher names."""
    source = kernels.source()
    assert '#include "' not in source
    assert "FASTIDC_BOTH uint32_t bf16_of" in source
    for suffix in kernels.SUFFIXES.values():
        for size in (*kernels.PATCH_SIZES, "any"):
            assert f"FASTIDC_PATCHES({suffix}_{size}," in source


def test_a_fatbin_of_another_source_is_not_loaded(tmp_path, monkeypatch):
    for name in ("patches.cu", "patches.cuh"):
        (tmp_path / name).write_bytes((kernels.FOLDER / name).read_bytes())
    monkeypatch.setattr(kernels, "FOLDER", tmp_path)
    assert kernels.fatbin() is None
    (tmp_path / "patches-0123456789abcdef.fatbin").write_bytes(b"")
    assert kernels.fatbin() is None
