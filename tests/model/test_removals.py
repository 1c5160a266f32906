"""Work that nobody reads is not done: each removal leaves the loss and every gradient as they are, and takes away the products that arithmetic
says, counted by torch.

Products are of rows with matrices, 2 floating-point operations a multiplication, and a backward pass has twice those of its forward pass.
"""

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import compare
import pytest
import torch
import worlds
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastidc import ops
from fastidc.config import PRESETS
from fastidc.data.loaders import PairBatch
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.model.layers import added, residual_blocks
from fastidc.ops import _linear_cross_entropy_triton
from fastidc.ops.linear_cross_entropy import _in_chunks as in_chunks
from fastidc.packed import PackedText
from fastidc.train.objectives import Adaptation, Captioning
from fastidc.train.optim import parameter_groups

CONFIG = worlds.SMALL.replace(text_layers=3, vocab_size=101, dropout=0.0)
C, E, M = CONFIG.vision_width, CONFIG.embed_dim, CONFIG.image_tokens
PIXELS = 3 * CONFIG.patch_size**2  # of a patch
BATCH, LONGEST = 3, 9
PRECISIONS = pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 5e-6)], ids=["fp64", "fp32"])


@pytest.fixture(autouse=True)
def _counted(monkeypatch):
    """Attention as batched products, which torch counts."""
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=torch")


def build(dtype: torch.dtype = torch.float64, **changes) -> CLIP4IDC:
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG.replace(**changes)).to(dtype).train()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


def padded(seed: int = 0) -> Tensor:
    """ids [B, LONGEST] with start, words, end and pads; one has LONGEST tokens, one the start and end token alone."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, CONFIG.vocab_size - 2, (BATCH, LONGEST), generator=g)
    ids[:, 0] = CONFIG.start_id
    for row, length in zip(ids, (LONGEST, 2, 6), strict=True):
        row[length - 1], row[length:] = CONFIG.end_id, 0
    return ids


def images(count: int) -> Tensor:
    size = CONFIG.image_size
    return torch.randint(0, 256, (BATCH, count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def captions() -> tuple[Tensor, Tensor]:
    """input_ids and target_ids [B, 2, 1, LONGEST]."""
    inputs = torch.stack([padded(2), padded(3)], dim=1)[:, :, None]
    return inputs, F.pad(inputs[..., 1:], (0, 1))


def captioning() -> PairBatch:
    inputs, targets = captions()
    return PairBatch(images(3), list("abc"), input_ids=inputs, target_ids=targets)


def measured(model: CLIP4IDC, loss_of) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients by name, and the operations of both passes."""
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as counter:
        loss = loss_of()
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, counter.get_total_flops()


def assert_same(found: tuple, want: tuple, limit: float) -> None:
    """Loss and every gradient, the latter against the norm of all."""
    compare.assert_close(found[0], want[0], limit, "loss")
    assert found[1].keys() == want[1].keys()
    scale = torch.stack([g.norm() for g in want[1].values()]).norm()
    assert scale > 0
    for name, g in want[1].items():
        assert (found[1][name] - g).norm() <= limit * scale, name


def attention(sequences: int, length: int, width: int) -> int:
    """Operations of attention itself in a forward pass: scores and their product with the values."""
    return 4 * sequences * length**2 * width


@PRECISIONS
def test_captioning_runs_no_text_tower(dtype, limit):
    model, batch, ids = build(dtype), captioning(), padded()
    calls = []
    model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    found = measured(model, lambda: model(batch, [Captioning()])["caption"])
    assert not calls
    alone = measured(model, lambda: model.encode_text(ids).sum())[2]
    want = measured(model, lambda: model(batch, [Captioning()])["caption"] + 0 * model.encode_text(ids).sum())
    dead = [name for name in want[1] if name not in found[1]]
    assert dead
    for name in dead:
        assert name.startswith(("text_encoder.blocks.", "text_encoder.norm.", "text_encoder.projection"))
        assert not want[1].pop(name).any()
    assert_same(found, want, limit)
    assert want[2] - found[2] == alone > 0


@PRECISIONS
def test_the_before_image_is_encoded_once(dtype, limit):
    """For both of its pairs."""
    model, pixels, given = build(dtype), images(3), captions()
    found = measured(model, lambda: model.token_losses(model.encode_batch(pixels)[1], *given).sum())

    def apart() -> Tensor:
        return torch.cat([model.encode_batch(pixels[:, [0, k]])[1] for k in (1, 2)], dim=1)

    want = measured(model, lambda: model.token_losses(apart(), *given).sum())
    assert_same(found, want, limit)
    stem = 4 * (M - 1) * PIXELS * C  # forward and its weight's gradient: no pixel wants one
    blocks = CONFIG.intra_layers * 3 * (24 * M * C**2 + attention(1, M, C))
    assert want[2] - found[2] == BATCH * (stem + blocks)


@PRECISIONS
@pytest.mark.parametrize("intra_layers", [1, 2])
def test_the_last_inter_layer_for_class_tokens_alone(dtype, limit, intra_layers):
    model, batch = build(dtype, intra_layers=intra_layers), PairBatch(images(2), list("abc"), PackedText.from_padded(padded()))
    found, want = (measured(model, lambda r=r: model(batch, [Adaptation(reads_tokens=r)])["info_nce"]) for r in (False, True))
    assert_same(found, want, limit)
    # a row that is not computed: its query, its projection, the MLP, its scores and their product, and the pair encoder's projection
    assert want[2] - found[2] == 3 * BATCH * (2 * M - 2) * (20 * C**2 + 4 * 2 * M * C + 2 * C * E)


def every_row(model: CLIP4IDC, text: Tensor | PackedText) -> Tensor:
    """`encode_text` with all layers for all rows."""
    tower, packed = model.text_encoder, isinstance(text, PackedText)
    ids = text.ids if packed else text
    x = F.embedding(ids, tower.token_embedding) + (tower.position[text.positions] if packed else tower.position[: ids.shape[1]])
    x = added(*residual_blocks(tower.blocks, x, *((text.cu_seqlens, text.longest) if packed else ())))
    end = x[text.ends] if packed else x[torch.arange(len(ids)), ids.argmax(dim=-1)]
    return tower.norm(end) @ tower.projection


@PRECISIONS
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("kind", ["packed", "padded", "filled"])
def test_the_last_text_layer_for_end_tokens_alone(dtype, limit, layers, kind):
    model = build(dtype, text_layers=layers)
    text = padded() if kind == "padded" else PackedText.from_padded(padded())
    if kind == "filled":
        text = text.filled(32, 12)
    rows = text.numel() if kind == "padded" else len(text.ids)
    pair = torch.randn(BATCH, E, dtype=dtype, generator=torch.Generator().manual_seed(4))
    found = measured(model, lambda: ops.info_nce(model.encode_text(text), pair, model.logit_scale))
    want = measured(model, lambda: ops.info_nce(every_row(model, text), pair, model.logit_scale))
    assert_same(found, want, limit)
    assert want[2] - found[2] == 3 * (rows - BATCH) * 20 * E**2


@PRECISIONS
def test_packed_captions(dtype, limit):
    """No pad passes the text tower."""
    model, ids = build(dtype), padded()
    text, pair = PackedText.from_padded(ids), torch.randn(BATCH, E, dtype=dtype, generator=torch.Generator().manual_seed(4))
    found, want = (measured(model, lambda t=t: ops.info_nce(model.encode_text(t), pair, model.logit_scale)) for t in (text, ids))
    assert_same(found, want, limit)
    pads = ids.numel() - len(text.ids)
    whole = (CONFIG.text_layers - 1) * 24 * E**2  # and of the last layer keys and values
    assert want[2] - found[2] == 3 * pads * (whole + 4 * E**2)


# ---- what does not train


def freeze(model: CLIP4IDC, stage: str, layers: int) -> None:
    parameter_groups(model, stage, replace(getattr(PRESETS["clevr"], stage), freeze_layers=layers))


@contextmanager
def kept_in(modules: dict):
    """Yields {name: tensors kept for the backward pass while that module's forward pass ran}."""
    inside, kept = [], dict.fromkeys(modules, 0)

    def pack(x: Tensor) -> Tensor:
        for name in inside:
            kept[name] += 1
        return x

    hooks = []
    for name, module in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept
    for hook in hooks:
        hook.remove()


@PRECISIONS
@pytest.mark.parametrize("frozen", [1, 2])
def test_no_backward_below_the_first_layer_that_trains(dtype, limit, frozen):
    """Of a frozen block there is no product backward, neither for weights nor for data, and nothing is kept; the rest is as it was."""
    model, text = build(dtype), PackedText.from_padded(padded())
    batch = PairBatch(images(2), list("abc"), text)
    flops, results = {}, {}
    for layers in (0, frozen):
        freeze(model, "adapt", layers)
        model.zero_grad(set_to_none=True)
        below = {"patch_embed": model.pair_encoder.patch_embed}
        for tower in (model.pair_encoder, model.text_encoder):
            below |= {f"{type(tower).__name__} {i}": block for i, block in enumerate(tower.blocks[:layers])}
        with kept_in(below) as kept:
            loss = model(batch, [Adaptation()])["info_nce"]
        assert kept == dict.fromkeys(below, 0)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[layers] = counter.get_total_flops()
        results[layers] = (loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert results[frozen][1].keys() == trains
    results[0] = (results[0][0], {n: g for n, g in results[0][1].items() if n in trains})
    assert_same(results[frozen], results[0], limit)
    vision = 2 * BATCH * 24 * M * C**2 + attention(2 * BATCH, M, C)
    words = 24 * len(text.ids) * E**2 + attention(BATCH, text.longest, E)
    assert flops[0] - flops[frozen] == 2 * frozen * (vision + words)


@pytest.mark.parametrize("kind", ["packed", pytest.param("padded", marks=pytest.mark.slow)])
def test_the_same_on_the_kernels(kind, monkeypatch):
    """Of LayerNorm and QuickGELU."""
    pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")
    monkeypatch.setenv("FASTIDC_BACKEND", "attention=torch,layer_norm=triton,quick_gelu=triton")
    test_the_last_text_layer_for_end_tokens_alone(torch.float64, 1e-10, 1, kind)
    if kind == "packed":
        test_no_backward_below_the_first_layer_that_trains(torch.float64, 1e-10, 1)


def test_what_is_kept_is_seen():
    """The test above can fail."""
    model = build()
    freeze(model, "adapt", 0)
    with kept_in({"first": model.pair_encoder.blocks[0]}) as kept:
        model.encode_batch(images(2))
    assert kept["first"] > 5


class _Dispatched(TorchDispatchMode):
    """What was dispatched, with arguments and results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func.name().split(".")[0], args, out))
        return out

    def results(self, *names: str) -> list:
        return [out for name, _, out in self.calls if name in names]


@PRECISIONS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_gradient_of_frozen_matrices(dtype, limit, backend, monkeypatch):
    """CLEVR's captioning trains neither the word table nor the patch stem: no product has the shape of one, and the loss makes no gradient of the
    table. The others' gradients are those that it would have beside them."""
    if backend == "triton":
        pytest.importorskip("triton", reason="the kernels are written in Triton: install the package triton")
    monkeypatch.setenv("FASTIDC_BACKEND", f"attention=torch,linear_cross_entropy={backend}")
    model, batch = build(dtype), captioning()
    table, stem = (CONFIG.vocab_size, E), (C, PIXELS)
    products, results, launched = {}, {}, []
    launch = _linear_cross_entropy_triton._kernels().linear_cross_entropy_bwd if backend == "triton" else None
    for trains in (True, False):
        freeze(model, "finetune", 0)
        for p in (model.text_encoder.token_embedding, model.pair_encoder.patch_embed.weight):
            p.requires_grad_(trains)
        model.zero_grad(set_to_none=True)
        with _Dispatched() as mode:
            loss = model(batch, [Captioning()])["caption"]
            if launch is None:
                loss.backward()
            else:
                kernels = _linear_cross_entropy_triton._kernels()
                with mock.patch.object(
                    kernels, "linear_cross_entropy_bwd", side_effect=lambda *a: launched.append(launch(*a)) or launched[-1]
                ):
                    loss.backward()
        made = mode.results("aten::mm", "aten::addmm", "aten::bmm", "aten::embedding_dense_backward")
        products[trains] = {tuple(sorted(out.shape[-2:])) for out in made}
        # what the loss hands on of the table's shape
        of_loss = mode.results("fastidc::linear_cross_entropy_chunked", "fastidc::linear_cross_entropy_bwd")
        assert of_loss
        assert any(part.shape == table for out in of_loss for part in out) == trains
        results[trains] = (loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert tuple(sorted(stem)) in products[True]
    assert not {tuple(sorted(stem)), tuple(sorted(table))} & products[False]
    if launch is not None:
        assert [words is None for words, _ in launched] == [False] * 2 + [True] * 2, "no launch for the table"
    others = {n: g for n, g in results[True][1].items() if n in results[False][1]}
    assert len(others) == len(results[True][1]) - 2
    assert_same(results[False], (results[True][0], others), limit)


def test_the_loss_multiplies_nothing_for_a_frozen_table():
    """Inside the torch backend, whose products are in an op of its own: scores and the rows' gradient, and for a table that trains one more."""
    g = torch.Generator().manual_seed(0)
    rows, width, words = 6, 16, 40
    x, table, bias = (torch.randn(*size, generator=g) for size in ((rows, width), (words, width), (words,)))
    targets = torch.randint(1, words, (rows,), generator=g)
    for of_weight, count in ((False, 2), (True, 3)):
        with FlopCounterMode(display=False) as counter:
            in_chunks(x, table, bias, targets, 0, True, of_weight, True)
        assert counter.get_total_flops() == count * 2 * rows * width * words
