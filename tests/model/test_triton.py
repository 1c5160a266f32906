"""The model on the Triton kernels: the official outputs, packed captions, and nothing moved around attention."""

from collections import Counter

import compare
import pytest
import test_golden
import torch
import worlds
from torch.utils._python_dispatch import TorchDispatchMode

from fastidc.data.loaders import PairBatch
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import Block, CrossAttention, SelfAttention
from fastidc.packed import PackedText
from fastidc.train.objectives import Adaptation

pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")

CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", test_golden.ADAPT)
def test_golden_adapt(name, tmp_path, triton):
    test_golden.test_golden_adapt_model(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", test_golden.CAPTION)
def test_golden_caption(name, tmp_path, triton):
    test_golden.test_golden_caption_model(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", test_golden.CAPTION[:1])
def test_golden_greedy(name, tmp_path, triton):
    test_golden.test_golden_greedy_model(name, tmp_path)


# ---- packed captions


def captions() -> list[list[int]]:
    g = torch.Generator().manual_seed(4)
    words = [torch.randint(1, CONFIG.vocab_size - 2, (n,), generator=g).tolist() for n in (7, 0, 3, 12)]
    return [[CONFIG.start_id, *row, CONFIG.end_id] for row in words]


@pytest.mark.parametrize("backend", ["sdpa", "torch", "reference", "triton"])
def test_packed_text_is_padded_text(backend, monkeypatch):
    """Embeddings and every gradient of the tower, padding being whatever follows the end token."""
    monkeypatch.setenv("FASTIDC_BACKEND", f"attention={backend}")
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG).double()
    text = PackedText.of(captions())
    assert torch.equal(PackedText.from_padded(text.padded(20)).ids, text.ids)
    found = {}
    for name, given in (("packed", text), ("padded", text.padded()), ("more padding", text.padded(20))):
        model.zero_grad()
        embedding = model.encode_text(given)
        (embedding * torch.linspace(-1, 1, embedding.numel(), dtype=torch.float64).view_as(embedding)).sum().backward()
        found[name] = embedding.detach(), {n: p.grad.clone() for n, p in model.text_encoder.named_parameters()}
    for name in ("padded", "more padding"):
        compare.assert_close(found["packed"][0], found[name][0], compare.FP64_MODEL, name)
        for key, want in found[name][1].items():
            compare.assert_close(found["packed"][1][key], want, 1e-8 if "qkv.bias" in key else compare.FP64_MODEL, f"{name}: {key}")


def test_a_batch_s_captions_are_packed():
    """The trained entry computes only tokens that are there."""
    model = CLIP4IDC(CONFIG)
    text = PackedText.of(captions())
    seen = []
    model.text_encoder.blocks[0].mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    images = torch.zeros(4, 2, CONFIG.image_size, CONFIG.image_size, 3, dtype=torch.uint8)
    model(PairBatch(images, list("abcd"), text=text), (Adaptation(),))
    assert seen == [(sum(len(row) for row in captions()), CONFIG.embed_dim)]


def test_sentences_for_wrong_captions():
    with pytest.raises(FastidcError, match="caption 1 has no tokens"):
        PackedText.of([[1, 2], []])
    model = CLIP4IDC(CONFIG)
    with pytest.raises(FastidcError, match=f"captions of 99 tokens exceed the model's {CONFIG.context_length} positions"):
        model.encode_text(PackedText.of([[1] * 99]))


# ---- nothing moves around attention


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


MOVES = ("transpose", "permute", "clone", "contiguous", "copy_", "_to_copy", "cat", "stack", "reshape", "index", "slice_backward")


def dispatched(call) -> Counter:
    with Dispatched() as mode:
        call()
    return mode.names


def test_nothing_moves_around_attention(triton):
    """Forward and backward on meta tensors: projections, one operator of ours each way, and no transpose or copy."""
    x, memory = (torch.zeros(4, n, 128, device="meta", requires_grad=True) for n in (50, 100))
    rows = torch.zeros(40, 128, device="meta", requires_grad=True)
    ends = torch.zeros(5, dtype=torch.int32, device="meta")
    with torch.device("meta"):
        attend, causal, cross = SelfAttention(128, 2), SelfAttention(128, 2, causal=True), CrossAttention(128, 2)
    for name, call in {
        "self": lambda: attend(x).sum().backward(),
        "packed": lambda: causal(rows, ends, 32).sum().backward(),
        "cross": lambda: cross(x, memory).sum().backward(),
    }.items():
        names = dispatched(call)
        kind = "cross" if name == "cross" else "self"
        assert names[f"fastidc::{kind}_attention_fwd"] == names[f"fastidc::{kind}_attention_bwd"] == 1
        moved = {op: count for op, count in names.items() if any(op == f"aten::{move}" for move in MOVES)}
        assert not moved, f"{name}: {moved}"


def test_what_sdpa_moves_is_seen(monkeypatch):
    """The test above can fail: torch's layout has to be turned round."""
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=sdpa")
    with torch.device("meta"):
        block = Block(128, 2)
    assert dispatched(lambda: block(torch.zeros(4, 50, 128, device="meta")))["aten::transpose"] >= 3
