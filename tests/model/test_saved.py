"""Bytes that a training step of ViT-B/32 keeps for its backward pass, in bf16, by tensors without data."""

import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from bench import count
from bench.peers import ours
from fastidc.config import ModelConfig
from fastidc.ops import _dispatch

pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORDS = 14  # of a caption, start and end included
KERNELS = "attention=triton,layer_norm=triton,quick_gelu=triton"
TORCH = "attention=triton,layer_norm=torch,quick_gelu=torch"


def kept(stage: str, samples: int, backends: str) -> int:
    """Bytes of all memory, but for parameters, that autograd holds when the forward pass has ended."""
    attention = _dispatch.OPS["attention"].backends  # whose kernels the interpreter refuses in bf16; without data nothing of them runs
    anywhere = mock.patch.dict(attention, triton=replace(attention["triton"], unsupported=lambda spec: []))
    _dispatch.forget()
    with anywhere, mock.patch.dict(os.environ, FASTIDC_BACKEND=backends), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        stepper = ours.build(ModelConfig(), None, stage, DEVICE, compiling="off", graph="off")
        ((batch,),) = count.without_data(lambda: stepper.prepare(count.random_batch(ModelConfig(), stage, samples, DEVICE, WORDS)))
        given = [p.untyped_storage()._cdata for p in stepper.model.parameters()]
        storages = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storages[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that no other gets its place
            return x

        stepper.model.train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), stepper.precision.autocast():
            held = stepper.model(batch, stepper.trainer.objectives)
        assert all(loss.requires_grad for loss in held.values())
    _dispatch.forget()
    return sum(storage.nbytes() for place, storage in storages.items() if place not in given)


def megabytes(stage: str, backends: str) -> float:
    """Of one more pair; what does not grow with the batch, such as weights in bf16, drops out. A captioning sample of CLEVR has two pairs."""
    pairs = {"adapt": 1, "finetune": 2}[stage]
    return (kept(stage, 4, backends) - kept(stage, 2, backends)) / (2 * pairs) / 1e6


@pytest.mark.parametrize(
    ("stage", "backends", "ceiling"),
    [
        pytest.param("adapt", KERNELS, 18.91, id="adapt-kernels"),
        pytest.param("finetune", KERNELS, 19.78, id="finetune-kernels"),
        pytest.param("adapt", TORCH, 34.22, id="adapt-torch", marks=pytest.mark.slow),
        pytest.param("finetune", TORCH, 33.30, id="finetune-torch", marks=pytest.mark.slow),
    ],
)
def test_bytes_a_pair(stage, backends, ceiling):
    """Measured on 2026-11-21; lower these, never raise. Captioning's are of the captioner as it is without torch.compile.

    Of its 19.8 MB 14.9 are the pair encoder's: the MLP's 4C before QuickGELU 6.0, queries, keys and values 4.5, the sums that norms read 3.3,
    attention's results in the intra layers 1.0. The captioner's 4.9: attention's projections 1.7, the MLP's 4E before GELU 1.4, the sums that
    norms read 0.8, rows that products read 0.7, dropout's masks 0.4.
    """
    assert megabytes(stage, backends) <= ceiling
