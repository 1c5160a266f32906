"""The CUDA C++ kernels where they belong: values, streams, captured graphs, registration."""

import pytest
import torch
from patches_host import pictures
from test_augmentation import ALL, drawn
from test_squash import SIZES, by_pillow

from fastidc import ops
from fastidc.ops import _patches_cuda
from fastidc_kernels import _runtime

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_runtime.missing("cupy") is not None, reason="the kernel is launched by CuPy: install cupy-cuda12x or cupy-cuda13x"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def inputs(height: int = 224, width: int = 224, stored: int = 5, taken=(4, 0, 2, 2, 3)):
    return torch.stack(pictures(*[(height, width)] * stored)), torch.tensor(taken)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("patch", "height", "width"), [(32, 224, 224), (16, 224, 224), (14, 224, 224), (14, 28, 42), (8, 16, 24), (3, 9, 3), (32, 64, 1024)]
)
def test_values(patch, height, width, dtype):
    images, index = inputs(height, width)
    want = ops.patches(images, index, patch, dtype=dtype)
    got = ops.patches(images.cuda(), index.cuda(), patch, dtype=dtype, backend="cuda")
    assert torch.equal(got.cpu(), want)
    inside = torch.zeros(images.numel() + 1, dtype=torch.uint8, device="cuda")[1:].view(
        images.shape
    )  # no address of it is a multiple of 16
    inside.copy_(images)
    assert torch.equal(ops.patches(inside, index.cuda(), patch, dtype=dtype, backend="cuda").cpu(), want)


def test_augmentation_is_within_a_level():
    images, index = inputs(taken=(4, 0, 2, 2, 3, 1))
    parameters = drawn(ALL, 6, 224)
    want = ops.patches(images, index, 32, augmentation=parameters).float()
    got = ops.patches(images.cuda(), index.cuda(), 32, augmentation=parameters.cuda(), backend="cuda").cpu().float()
    assert (got - want).abs().max() <= 1
    assert (got != want).double().mean() < 1e-4


def test_faults():
    images, _ = inputs()
    index = torch.tensor([0, 9, -1, 1], device="cuda")
    got = ops.patches(images.cuda(), index, 32, backend="cuda")
    assert not got[1:3].any()
    assert ops.take_faults() == ["The patch gather met an index that is none of its images', first at place 1 of its batch."]


def test_squash_is_pillow():
    given = [x.cuda() for x in pictures(*SIZES)]
    given += [pictures((333, 444))[0].permute(2, 0, 1).contiguous().cuda().permute(1, 2, 0)]
    got = ops.squash(given, 224, backend="cuda").cpu()
    for picture, found in zip(given, got, strict=True):
        assert torch.equal(found, by_pillow(picture.cpu(), 224))


def test_another_stream_and_a_captured_graph():
    images, index = (x.cuda() for x in inputs())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever launches elsewhere reads before this is over
        images.copy_(255 - images)
        got = ops.patches(images, index, 32, backend="cuda")
    stream.synchronize()
    assert torch.equal(got, ops.patches(images, index, 32, backend="torch"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.patches(images, index, 32, backend="cuda")
    index.copy_(torch.tensor([1, 1, 0, 3, 2]))
    graph.replay()
    assert torch.equal(captured, ops.patches(images, index, 32, backend="torch"))


def test_opcheck():
    images, index = (x.cuda() for x in inputs(32, 32))
    torch.library.opcheck(_patches_cuda.patches_fwd, (images, index, 8, None, torch.bfloat16))
    torch.library.opcheck(_patches_cuda.squash_fwd, ([images[0], images[1]], 16, [False, True]))
