"""Five ways of holding numbers, and the official fp16 regime against a plain re-statement (clip4idc.md 5.4)."""

import dataclasses
import json
import math
import struct

import pytest
import torch
import worlds
from torch.nn import functional as F

from fastidc import checkpoint, ops
from fastidc.config import PRESETS, TrainOptions
from fastidc.data.records import all_captions, load_records
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.tokenizer import vocabulary_of
from fastidc.train.optim import Optimizer
from fastidc.train.precision import PRECISIONS, Precision, choose_precision
from fastidc.train.run import train
from fastidc.train.steplog import MOST_SKIPPED, StepLog

CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)


def half(x: float) -> float:
    """x rounded to fp16, by the definition of the format and not by torch: 10 bits of fraction, smallest step 2^-24."""
    if x == 0 or not math.isfinite(x):
        return x
    step = 2.0 ** max(math.frexp(abs(x))[1] - 11, -24)
    return round(x / step) * step  # round() is to even, as fp16 does


def test_the_restatement_of_fp16_is_fp16():
    g = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=g, dtype=torch.float64) * 10.0 ** torch.randint(-9, 4, (2000,), generator=g)
    assert [half(v) for v in values.tolist()] == values.half().double().tolist()


def single(x: float) -> float:
    """x rounded to fp32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def official_fp16_step(p, g, m, v, lr, b1, b2, eps, decay):
    """One element, one BertAdam step: what is stored is fp16, every operation computes in fp32, factors are fp32."""

    def times(x: float, factor: float) -> float:
        return single(x * single(factor))

    m = half(half(times(m, b1)) + half(times(g, 1 - b1)))
    v = half(single(half(times(v, b2)) + times(single(g * g), 1 - b2)))
    u = half(single(m / half(single(half(math.sqrt(v)) + single(eps)))))
    if decay:
        u = half(u + half(times(p, decay)))
    return half(p - half(times(u, lr))), m, v


@pytest.mark.parametrize(("betas", "decay"), [((0.9, 0.98), 0.2), ((0.9, 0.999), 0.0)])
def test_bert_adam_in_fp16_is_the_restatement(betas, decay):
    g = torch.Generator().manual_seed(1)
    shape, lr, eps = (40,), 1e-7, 1e-6
    p = (torch.randn(shape, generator=g) * 0.02).half()
    m, v = torch.zeros(shape).half(), torch.zeros(shape).half()
    start = p.double()
    want = [(a, 0.0, 0.0) for a in start.tolist()]
    for step in range(60):
        scale = 10.0 ** (-5 + step % 4)  # 1e-5 to 1e-2: below and above what survives in the second moment
        grad = (torch.randn(shape, generator=g) * scale).half()
        grad_norm = float(grad.double().norm())
        assert grad_norm < 1, "or the clip would take part"
        want = [
            official_fp16_step(*state[:1], x, *state[1:], lr, *betas, eps, decay)
            for state, x in zip(want, grad.double().tolist(), strict=True)
        ]
        ops.bert_adam([p], [grad.clone()], [m], [v], lr, betas=betas, eps=eps, weight_decay=decay)
    for name, got, column in (("p", p, 0), ("m", m, 1), ("v", v, 2)):
        expected = torch.tensor([state[column] for state in want], dtype=torch.float64)
        # float32 arithmetic inside an operation may round a tie the other way: units of the last place of fp16, in few elements
        difference = (got.double() - expected).abs()
        unit = torch.tensor([2.0 ** max(math.frexp(abs(x) or 1e-30)[1] - 11, -24) for x in expected.tolist()], dtype=torch.float64)
        moved = (expected - start).abs() if name == "p" else 0
        assert (difference <= 2 * unit + 1e-3 * moved).all(), name
        assert (difference > 0).double().mean() <= 0.05, name


def test_the_second_moment_underflows_and_the_update_is_m_over_eps():
    """|g| = 1e-4 in fp16: (1 - b2) g^2 = 2e-10 rounds to 0, and u = m / fp16(1e-6); in fp32 the same step is Adam's."""
    g = torch.full((64,), 1e-4)
    moved = {}
    for dtype in (torch.float16, torch.float32):
        p, m, v = (torch.zeros(64, dtype=dtype) for _ in range(3))
        for _ in range(200):
            ops.bert_adam([p], [g.to(dtype)], [m], [v], 1e-7, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
        moved[dtype] = -float(p.double().mean())
        assert (v == 0).all() == (dtype == torch.float16)
    # momentum SGD on the gradient at lr / fp16(eps) = 0.0987: 200 steps of about 1e-4 each
    assert moved[torch.float16] == pytest.approx(200 * 1e-4 * 0.0987, rel=0.15)
    assert moved[torch.float32] == pytest.approx(200 * 1e-7, rel=0.15)
    assert moved[torch.float16] > 50 * moved[torch.float32]


@pytest.mark.parametrize("stage", [pytest.param("adapt", marks=pytest.mark.slow), "finetune"])
def test_mixed_dtypes_step_together(stage):
    """fp16 matrices and fp32 norms in one optimiser: states have their parameters' dtypes, and official shapes give the official halves."""
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG)
    Precision("fp16-official", "cpu").prepare(model)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float16} == {n for n in dtypes if checkpoint.is_half_officially(n)}
    assert not any(name.startswith("captioner.") and dtype == torch.float16 for name, dtype in dtypes.items())
    recipe = getattr(PRESETS["clevr"], stage)
    optimizer = Optimizer(model, stage, recipe, 100)
    before, after = torch.randint(0, 256, (2, 4, 3, 48, 48), dtype=torch.uint8)
    ids = torch.randint(1, 100, (4, 8))
    ids[:, -1] = CONFIG.end_id
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(30):
        loss = model.adaptation_loss(before, after, ids) if stage == "adapt" else model.caption_loss(before, after, ids, ids)
        loss.backward()
        assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for inner in optimizer.inner:
        for p, state in inner.state.items():
            assert state["first_moment"].dtype == state["second_moment"].dtype == p.dtype
    block = "pair_encoder.blocks.0.attention.qkv.weight"
    assert (dict(model.named_parameters())[block] != start[block]).any()


def test_fp16_official_forward_is_the_rounded_model():
    """The fp16 towers give what fp32 towers with the same rounded weights give, to fp16 rounding; the captioner is fp32 either way."""
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG).eval()
    Precision("fp16-official", "cpu").prepare(model)
    wide = CLIP4IDC(CONFIG).eval()
    wide.load_weights({n: p.detach().float() for n, p in model.named_parameters()}, "test")
    before, after = torch.randint(0, 256, (2, 4, 3, 48, 48), dtype=torch.uint8)
    ids = torch.randint(1, 100, (4, 8))
    ids[:, -1] = CONFIG.end_id
    with torch.no_grad():
        for got, want in zip(
            (*model.encode_pair(before, after), model.encode_text(ids)),
            (*wide.encode_pair(before, after), wide.encode_text(ids)),
            strict=True,
        ):
            assert got.dtype == torch.float16
            assert F.cosine_similarity(got.float().flatten(), want.flatten(), dim=0) > 0.9999
        assert model.caption_logits(before, after, ids).dtype == torch.float32
        assert model.caption_loss(before, after, ids, ids).item() == pytest.approx(
            wide.caption_loss(before, after, ids, ids).item(), rel=1e-2
        )
        assert model.generate(before, after, max_length=4).shape == (4, 4)


def test_fp16_scales_the_loss_and_leaves_out_a_step_with_an_overflow():
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG)
    precision = Precision("fp16", "cpu")
    precision.prepare(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    scaler = precision.scaler()
    optimizer = Optimizer(model, "adapt", dataclasses.replace(PRESETS["clevr"].adapt, warmup=0.0), 100, scaler)
    before, after = torch.randint(0, 256, (2, 4, 3, 48, 48), dtype=torch.uint8)
    ids = torch.randint(1, 100, (4, 8))
    ids[:, -1] = CONFIG.end_id

    def step(spoil: bool) -> tuple[float, bool]:
        weights = [p.detach().clone() for p in optimizer.parameters]
        with precision.autocast():
            loss = model.adaptation_loss(before, after, ids)
        scaler.scale(loss).backward()
        if spoil:
            optimizer.parameters[0].grad.fill_(math.inf)
        norm = float(optimizer.step())
        return norm, any((a != b).any() for a, b in zip(weights, optimizer.parameters, strict=True))

    factor = scaler.get_scale()
    norm, moved = step(spoil=False)
    assert moved
    assert math.isfinite(norm)
    norm, moved = step(spoil=True)
    assert not moved
    assert not math.isfinite(norm)
    assert scaler.get_scale() < factor
    assert step(spoil=False)[1]


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_stops_every_optimiser_of_the_step(bad):
    """Muon and AdamW share a step: what is not finite in one's gradient reaches the other's through the clip."""
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG)
    scaler = Precision("fp16", "cpu").scaler()
    optimizer = Optimizer(model, "adapt", PRESETS["tiny"].adapt, 100, scaler)
    assert len(optimizer.inner) == 2
    before, after = torch.randint(0, 256, (2, 4, 3, 48, 48), dtype=torch.uint8)
    ids = torch.randint(1, 100, (4, 8))
    ids[:, -1] = CONFIG.end_id
    scaler.scale(model.adaptation_loss(before, after, ids)).backward()
    model.pair_encoder.blocks[0].mlp.fc1.weight.grad[0, 0] = bad
    weights, factor = [p.detach().clone() for p in optimizer.parameters], scaler.get_scale()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, optimizer.parameters, strict=True))
    assert scaler.get_scale() < factor


def test_a_run_that_skips_every_step_ends_with_a_sentence(tmp_path):
    log = StepLog(tmp_path / "log.jsonl")
    with pytest.raises(FastidcError, match=f"not finite at step {MOST_SKIPPED}"):  # noqa: PT012
        for step in range(1, 60):
            log.add({"step": step, "lr": [1.0], "scaled": True}, torch.tensor(1.0), torch.tensor(math.inf))
    log = StepLog(tmp_path / "log.jsonl")
    for step in range(1, 120):  # a skipped step now and then is how the scaler finds its factor
        log.add({"step": step, "lr": [1.0], "scaled": True}, torch.tensor(1.0), torch.tensor(math.inf if step % 3 else 1.0))
    log.close()


def test_unscaled_gradients_are_those_without_scaling():
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG)
    before, after = torch.randint(0, 256, (2, 4, 3, 48, 48), dtype=torch.uint8)
    ids = torch.randint(1, 100, (4, 8))
    ids[:, -1] = CONFIG.end_id
    norms = []
    for precision in (Precision("fp32", "cpu"), Precision("fp16", "cpu")):
        scaler = precision.scaler()
        optimizer = Optimizer(model, "adapt", dataclasses.replace(PRESETS["clevr"].adapt, lr=0.0), 10, scaler)
        with precision.autocast():
            loss = model.adaptation_loss(before, after, ids)
        scaler.scale(loss).backward()
        norms.append(float(optimizer.step()))
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_choice_and_advice():
    cpu = torch.device("cpu")
    for name in PRECISIONS:
        assert choose_precision(name, cpu).name == name
    assert choose_precision("auto", cpu).name in ("bf16", "fp32")
    with pytest.raises(FastidcError, match="unknown precision 'half'; choose one of auto, bf16, fp16, fp32, fp16-official"):
        choose_precision("half", cpu)
    assert Precision("fp16-official", "cpu").advice(1e-7) is None
    assert "--coef_lr 0.03" in Precision("bf16", "cpu").advice(1e-7)
    assert Precision("bf16", "cpu").advice(3e-6) is None


@pytest.mark.slow
def test_a_captioner_in_bf16_learns_as_in_fp32(clevr, tmp_path, no_java):
    """200 steps on mini CLEVR-Change from one initialisation: the mean loss within 1%, every stretch of 25 steps within 4%. The preset's model for
    pictures of a quarter of its tokens, because a CPU without bf16 units emulates every product."""
    words = vocabulary_of(all_captions(load_records(clevr)["train"]))
    config = PRESETS["tiny"].model.replace(image_size=64, vocabulary=words, vocab_size=len(words), captioner_layers=0)
    torch.manual_seed(0)
    checkpoint.save(tmp_path / "start", config, dict(CLIP4IDC(config).named_parameters()), {"preset": "tiny"})

    def losses(precision: str) -> torch.Tensor:
        options = TrainOptions(
            data=clevr,
            out=tmp_path / precision,
            init=str(tmp_path / "start"),
            steps=200,
            batch_size=4,
            precision=precision,
            device="cpu",
            workers=1,
        )
        train("finetune", options)
        rows = (tmp_path / precision / "log.jsonl").read_text().splitlines()
        return torch.tensor([json.loads(row)["loss"] for row in rows])

    single, half = losses("fp32"), losses("bf16")
    assert single[:25].mean() > 2 * single[-25:].mean(), "it learns"
    assert float(half.mean() / single.mean()) == pytest.approx(1, abs=0.01)
    for a, b in zip(half.view(-1, 25).mean(1).tolist(), single.view(-1, 25).mean(1).tolist(), strict=True):
        assert a == pytest.approx(b, rel=0.04)
