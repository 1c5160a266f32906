"""The model on the kernels of LayerNorm and QuickGELU is the model on torch's: losses and every gradient, and how residual sums travel."""

import compare
import pytest
import test_golden
import test_model
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastidc.model.layers import Block, added, residual_blocks
from fastidc.packed import PackedText

pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")

KERNELS = "layer_norm=triton,quick_gelu=triton"


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.setenv("FASTIDC_BACKEND", KERNELS)


def test_model_is_the_reference(tmp_path, kernels):
    """Loss and every gradient of both stages in float64."""
    test_model.test_model_is_the_reference(tmp_path, 2)


@pytest.mark.slow
def test_adaptation_computes_class_tokens_alone(tmp_path, kernels):
    test_model.test_adaptation_computes_class_tokens_alone(tmp_path, 2)


def test_greedy_is_the_reference_s(tmp_path, kernels):
    test_model.test_own_golden_greedy(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", test_golden.ADAPT)
def test_golden_adapt(name, tmp_path, kernels):
    test_golden.test_golden_adapt_model(name, tmp_path)


def test_packed_text(tmp_path, monkeypatch):
    model, _ = test_model.build(tmp_path)
    text = PackedText.from_padded(test_model.inputs()[1][:, :-1])
    want = model.encode_text(text)
    monkeypatch.setenv("FASTIDC_BACKEND", KERNELS)
    compare.assert_close(model.encode_text(text), want, compare.FP64_MODEL)


def test_frozen_blocks_and_norms(tmp_path, monkeypatch):
    """What wants no gradient gets none, and what does gets the same."""
    model, _ = test_model.build(tmp_path)
    images, ids = test_model.inputs()
    for name, p in model.named_parameters():
        p.requires_grad = "blocks.1" in name and ("norm.bias" not in name) and "fc2" not in name
    found = {}
    for chosen in ("", KERNELS):
        monkeypatch.setenv("FASTIDC_BACKEND", chosen)
        model.zero_grad(set_to_none=True)
        model.adaptation_loss(*images.unbind(1), ids).backward()
        found[chosen] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found[""].keys() == found[KERNELS].keys()
    assert found[""]
    scale = torch.stack([g.norm() for g in found[""].values()]).norm()
    for name, want in found[""].items():
        assert (found[KERNELS][name] - want).norm() <= compare.FP64_MODEL * scale, name


def test_bf16_autocast(tmp_path, monkeypatch):
    """The loss in bf16 is as near to the exact one as torch's is, and gradients arrive in the parameters' dtype."""
    model, _ = test_model.build(tmp_path)
    model = model.float()
    images, ids = test_model.inputs()
    before, after = images.float().unbind(1)
    exact = model.adaptation_loss(before, after, ids).item()
    monkeypatch.setenv("FASTIDC_BACKEND", KERNELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.adaptation_loss(before, after, ids)
    loss.backward()
    assert abs(loss.item() - exact) < 0.02 * exact
    assert all(p.grad is None or (p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all())) for p in model.parameters())


# ---- the residual stream as a sum


def test_blocks_hand_on_a_sum(monkeypatch):
    """x + branch of the last block is what adding up after every branch gives."""
    torch.manual_seed(0)
    blocks = [Block(64, 2).double() for _ in range(3)]
    x = want = torch.randn(2, 5, 64, dtype=torch.float64)
    for block in blocks:
        want = want + block.attention(block.attention_norm(want))
        want = want + block.mlp(want, None, block.mlp_norm)[0]
    for chosen in ("", KERNELS):
        monkeypatch.setenv("FASTIDC_BACKEND", chosen)
        compare.assert_close(added(*residual_blocks(blocks, x)), want, 1e-12)
        rows = blocks[2].at(*residual_blocks(blocks[:2], x), slice(0, None, 3))
        compare.assert_close(added(*rows), want[:, [0, 3]], 1e-12)
    assert added(*residual_blocks([], x)) is x


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().split(".")[0])
        return func(*args, **(kwargs or {}))


def test_a_block_in_few_operators(monkeypatch):
    """Between its products and attention, forward, a block has four operators, all of them ours; none adds, casts or copies."""
    monkeypatch.setenv("FASTIDC_BACKEND", f"attention=triton,{KERNELS}")
    with torch.device("meta"):
        block = Block(128, 2)
        x, branch = (torch.zeros(4, 50, 128, requires_grad=True) for _ in range(2))
    with Dispatched() as forward:
        y, z = block(x, branch)
    work = [name for name in forward.names if not name.startswith(("aten::view", "aten::_unsafe_view", "aten::t", "aten::detach"))]
    products = ("aten::addmm", "aten::mm", "aten::linear")
    assert [name for name in work if name not in products] == [
        "fastidc::layer_norm_fwd",
        "fastidc::self_attention_fwd",
        "fastidc::layer_norm_fwd",
        "fastidc::quick_gelu_fwd",
    ]
    with Dispatched() as backward:
        torch.autograd.grad([y, z], [x, *block.parameters()], [torch.zeros_like(y), torch.zeros_like(z)])
    assert not {"aten::add", "aten::_to_copy", "aten::clone"} & set(backward.names)
    assert backward.names.count("aten::sum") == 3, "the biases of the projection, of attention's output and of fc2"
