"""FP8 in a model: which products, when, for whom, and how far the gradients move."""

import pytest
import torch
import worlds
from torch.utils._python_dispatch import TorchDispatchMode

from fastidc.config import ModelConfig
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import Linear
from fastidc.ops.fp8_linear import LEAST_ROWS
from fastidc.packed import PackedText
from fastidc.train.compiled import compile_captioner
from fastidc.train.fp8 import enable_fp8, refusals

CPU = torch.device("cpu")
KERNELS = "layer_norm=triton,quick_gelu=triton"
TOWER = ("attention.qkv", "attention.out", "mlp.fc1", "mlp.fc2")


def small(captioner: bool = False) -> CLIP4IDC:
    torch.manual_seed(0)
    return CLIP4IDC(worlds.SMALL.replace(dropout=0.0, captioner_layers=2 if captioner else 0)).train()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    size = worlds.SMALL.image_size
    before, after = torch.randn(2, 3, 3, size, size, generator=draw)
    ids = torch.randint(1, worlds.SMALL.vocab_size - 2, (3, 9), generator=draw)
    ids[:, 0], ids[:, -1] = worlds.SMALL.start_id, worlds.SMALL.end_id
    return before, after, ids


def loss_and_gradients(model: CLIP4IDC, precision=torch.bfloat16) -> tuple[float, dict[str, torch.Tensor]]:
    """Of adaptation or, with a captioner, of captioning."""
    before, after, ids = inputs()
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32):
        if model.captioner is None:
            loss = model.adaptation_loss(before, after, PackedText.from_padded(ids))
        else:
            loss = model.caption_loss(before, after, ids, ids.roll(-1, 1))
    if loss.requires_grad:
        loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Products(TorchDispatchMode):
    """Counts products in FP8, forward and backward."""

    def __init__(self):
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.forward += "fp8_linear_fwd" in func.name()
        self.backward += "fp8_linear_bwd" in func.name()
        return func(*args, **(kwargs or {}))


def counted(model: CLIP4IDC, **how) -> tuple[int, int]:
    with Products() as found:
        loss_and_gradients(model, **how)
    return found.forward, found.backward


# ---- which products


def test_layers_of_blocks_and_captioner():
    model = small(captioner=True)
    assert enable_fp8(model, everything=True) == 5 * 4 + 2 * 4 + 2 * 7 + 1  # blocks of both towers, encoder and decoder layers, head
    chosen = [name for name, module in model.named_modules() if getattr(module, "fp8_rows", None) is not None]
    assert all(name.endswith((*TOWER, "cross.q", "cross.kv", "cross.out", "fc1", "fc2", "captioner.head")) for name in chosen)


def test_frozen_layers_and_odd_widths_stay():
    model = small()
    for p in model.pair_encoder.blocks[0].parameters():
        p.requires_grad = False
    assert enable_fp8(model, everything=True) == 4 * 4
    odd = CLIP4IDC(worlds.SMALL.replace(embed_dim=24, head_dim=8, captioner_layers=1))
    assert enable_fp8(odd, everything=True) == 3 * 4


@pytest.mark.parametrize("backends", ["", pytest.param(KERNELS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("captioner", [False, True])
def test_every_product_runs_in_fp8(captioner, backends, monkeypatch):
    """In its own op and inside those of LayerNorm and QuickGELU, forward and backward, the last block's queries apart from keys and values."""
    if backends:
        pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")
    monkeypatch.setenv("FASTIDC_BACKEND", backends)
    model = small(captioner)
    layers = enable_fp8(model, everything=True)
    forward, backward = counted(model)
    if captioner:
        assert forward == backward == layers - 2 * 4  # no text tower
    else:
        # queries apart from keys and values in a tower's last block
        assert layers < forward == backward <= layers + 2


def test_layers_that_gain():
    """Of ViT-B/32: qkv, fc1 and fc2 of the image tower alone."""
    with torch.device("meta"):
        model = CLIP4IDC(ModelConfig())
    assert enable_fp8(model) == 3 * 12
    layers = {name: module.fp8_rows for name, module in model.named_modules() if getattr(module, "fp8_rows", None) is not None}
    assert set(layers.values()) == {LEAST_ROWS}
    assert all(name.startswith("pair_encoder.blocks.") and name.endswith((".qkv", ".fc1", ".fc2")) for name in layers)
    assert enable_fp8(small()) == 0


# ---- when


def test_off_is_off():
    """Nothing is in FP8 without the call, in evaluation, in another precision, for few rows, or in another model."""
    model, other = small(), small()
    assert counted(model) == (0, 0)
    enable_fp8(model, everything=True)
    assert counted(other) == (0, 0)
    assert counted(model, precision=torch.float32) == (0, 0)
    assert counted(model, precision=torch.float16) == (0, 0)
    assert counted(model)[0] > 0
    for module in model.modules():
        if isinstance(module, Linear) and module.fp8_rows is not None:
            module.fp8_rows = LEAST_ROWS
    assert counted(model) == (0, 0), "no product here has so many rows"
    enable_fp8(model, everything=True)
    model.eval()
    assert counted(model) == (0, 0)
    assert loss_and_gradients(model)[0] == loss_and_gradients(other.eval())[0]
    assert Linear(16, 16).fp8 is None


def test_weights_in_half_precision():
    """A module's weights may be replaced by bf16 tensors that are no leaves."""
    model = small()
    enable_fp8(model, everything=True)
    want, _ = loss_and_gradients(model)
    half = {name: p.to(torch.bfloat16) for name, p in model.named_parameters() if ".blocks." in name and p.dim() == 2}
    before, after, ids = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shadowed = _Loss(model)
        loss = torch.func.functional_call(shadowed, {f"model.{name}": p for name, p in half.items()}, (before, after, PackedText.from_padded(ids)))  # fmt: skip
    assert float(loss.detach()) == want
    loss.backward()
    assert all(model.get_parameter(name).grad.dtype == torch.float32 for name in half)


class _Loss(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *given):
        return self.model.adaptation_loss(*given)


# ---- how far


@pytest.mark.parametrize("backends", ["", pytest.param(KERNELS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("captioner", [False, True])
def test_gradients_point_the_same_way(captioner, backends, monkeypatch):
    if backends:
        pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")
    monkeypatch.setenv("FASTIDC_BACKEND", backends)
    model = small(captioner)
    exact, _ = loss_and_gradients(model, torch.float32)
    bf16, plain = loss_and_gradients(model)
    enable_fp8(model, everything=True)
    fp8, rounded = loss_and_gradients(model)
    assert plain.keys() == rounded.keys()
    assert all(rounded[name].dtype == torch.float32 and bool(rounded[name].isfinite().all()) for name in rounded)
    assert abs(fp8 - exact) < 0.05 * exact
    assert fp8 != bf16
    a, b = (torch.cat([grads[name].flatten() for name in plain]) for grads in (plain, rounded))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.95
    assert 0.9 < float(b.norm() / a.norm()) < 1.1


@pytest.mark.slow
def test_the_compiled_captioner_has_it():
    """In one graph, with the numbers of without."""
    torch._dynamo.reset()
    model = small(captioner=True)
    enable_fp8(model, everything=True)
    want, grads = loss_and_gradients(model)
    compile_captioner(model, backend="aot_eager")
    got, compiled = loss_and_gradients(model)
    assert abs(got - want) < 2e-3 * want
    a, b = (torch.cat([found[name].flatten() for name in grads]) for found in (grads, compiled))
    assert float((a - b).norm() / a.norm()) < 0.05
    torch._dynamo.reset()


# ---- who may not


@pytest.mark.parametrize(
    ("device", "precision", "fsdp", "sentences"),
    [
        ("cpu", "bf16", False, ["FP8 products need a CUDA device of compute capability 8.9 or higher"]),
        ("cpu", "fp32", True, ["FP8 products need a CUDA device", "this run multiplies in fp32", "not tried with --fsdp"]),
        ("mps", "bf16", False, ["FP8 products are for CUDA, not for mps"]),
    ],
)
def test_refusals(device, precision, fsdp, sentences):
    found = refusals(torch.device(device), precision, fsdp)
    assert len(found) == len(sentences)
    assert all(part in sentence for part, sentence in zip(sentences, found, strict=True))


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)])
def test_refusals_by_capability(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    found = refusals(torch.device("cuda"), "bf16")
    assert bool(found) == refused
    assert not refused or "has 8.0" in found[0]


def test_a_cpu_for_tests():
    assert refusals(CPU, "bf16", on_cpu=True) == []
