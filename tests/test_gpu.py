"""What only a CUDA device can answer (`pytest -m gpu`): the CPU's results on it, every precision, a whole training step."""

import compare
import golden
import pytest
import torch
import worlds

from fastidc import ops
from fastidc.config import PRESETS
from fastidc.data.loaders import PairBatch
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.ops import _dispatch
from fastidc.packed import PackedText
from fastidc.train.distributed import ALONE
from fastidc.train.engine import Trainer
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer
from fastidc.train.precision import PRECISIONS, Precision, choose_precision

pytestmark = pytest.mark.gpu
CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 products are fp32, so that the CPU's tolerances hold."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def batch_for(stage: str, size: int = 4) -> PairBatch:
    g = torch.Generator().manual_seed(1)
    pairs = 1 if stage == "adapt" else 2
    images = torch.randint(0, 256, (size, 1 + pairs, 48, 48, 3), generator=g, dtype=torch.uint8)
    ids = torch.randint(1, 100, (size, pairs, 1, 8), generator=g)
    ids[..., -1] = CONFIG.end_id
    names = [str(i) for i in range(size)]
    if stage == "adapt":
        return PairBatch(images, names, text=PackedText.from_padded(ids[:, 0, 0]))
    return PairBatch(images, names, input_ids=ids, target_ids=ids)


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in golden.STAGES.items() for name in names])
def test_goldens_hold_on_the_device(stage, name, tmp_path):
    g = golden.load(name)
    torch.save(g.weights, tmp_path / "pytorch_model.bin.0")
    model = CLIP4IDC.from_pretrained(tmp_path / "pytorch_model.bin.0", intra_layers=g.intra_layers).eval().cuda()
    before, after = g.images.cuda().unbind(1)
    if stage == "adapt":
        loss = model.adaptation_loss(before, after, g["input_ids"].cuda())
    else:
        loss = model.caption_loss(before, after, g["input_caption_ids"].cuda(), g["output_caption_ids"].cuda())
        assert torch.equal(model.generate(before, after, stop_early=False).cpu(), g["greedy_ids"].long())
    compare.assert_close(loss.cpu(), g["loss"], compare.GOLDEN_FORWARD, "loss")


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_a_training_step_in_every_precision(stage, name):
    """Three steps; the first loss is the CPU's in fp32 to the precision's own rounding."""
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG.replace(dropout=0.0))
    batch, precision = batch_for(stage), Precision(name, "cuda")
    task = objectives(stage, getattr(PRESETS["clevr"], stage), ALONE)
    with torch.no_grad():
        want = float(sum(model(batch, task).values()))
    model.cuda()
    precision.prepare(model)
    optimizer = Optimizer(model, stage, getattr(PRESETS["clevr"], stage), 10, precision.scaler())
    trainer = Trainer(model, task, optimizer, ALONE, torch.device("cuda"), precision)
    losses = [float(trainer.step([batch])[0]) for _ in range(3)]
    assert losses[0] == pytest.approx(want, rel=1e-4 if name == "fp32" else 2e-2)
    assert all(loss == loss and abs(loss) < 100 for loss in losses)
    for inner in optimizer.inner:
        assert all(state["first_moment"].dtype == p.dtype for p, state in inner.state.items())


def test_auto_is_what_the_hardware_has():
    capability = torch.cuda.get_device_capability()
    expected = "bf16" if capability >= (8, 0) else "fp16" if capability >= (7, 0) else "fp32"
    assert choose_precision("auto", torch.device("cuda")).name == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_backends_on_the_device(dtype, causal):
    """Every backend that serves, against float64, no worse than twice honest PyTorch in the same dtype."""
    g = torch.Generator().manual_seed(2)
    qkv = torch.randn(6, 50, 3 * 4 * 64, generator=g).cuda().to(dtype)
    exact = ops.self_attention(qkv.double(), 4, causal=causal, backend="reference")
    plain = compare.relative_error(ops.self_attention(qkv, 4, causal=causal, backend="torch"), exact)
    spec = _dispatch.Spec("attention", "cuda", dtype, False, head_dim=64, query_length=50, key_length=50, causal=causal)
    served = [b.name for b in _dispatch.OPS["attention"].backends.values() if not b.unsupported(spec)]
    assert "sdpa" in served
    for name in served:
        error = compare.relative_error(ops.self_attention(qkv, 4, causal=causal, backend=name), exact)
        assert error <= 2 * plain + 1e-6, f"{name}: {error:.2e}, honest PyTorch {plain:.2e}"


def test_fp16_bert_adam_gives_the_cpu_s_bits():
    """fp16-official is defined by its roundings; where a GPU rounded otherwise it would be a third optimiser."""
    g = torch.Generator().manual_seed(3)
    start = [(torch.randn(s, generator=g) * 0.02).half() for s in ((64, 32), (129,))]
    grads = [[(torch.randn(p.shape, generator=g) * 10.0 ** (step % 4 - 5)).half() for p in start] for step in range(40)]
    ends = {}
    for device in ("cpu", "cuda"):
        params = [p.clone().to(device) for p in start]
        m, v = ([torch.zeros_like(p) for p in params] for _ in range(2))
        for step in range(40):
            ops.bert_adam(params, [x.to(device) for x in grads[step]], m, v, 1e-7, betas=(0.9, 0.98), weight_decay=0.2)
        ends[device] = [p.cpu() for p in params]
    for a, b in zip(ends["cpu"], ends["cuda"], strict=True):
        assert (a != b).double().mean() < 0.02


# ---- decoding


def captioning_model(ends: float = 5.0) -> tuple[CLIP4IDC, torch.Tensor]:
    """A model that says different words of different pairs, in fp64 so that no rounding decides between them, and tokens of 70 pairs."""
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG).double().eval()
    with torch.no_grad():
        for p in model.captioner.parameters():
            p.mul_(3)
        model.text_encoder.token_embedding.mul_(20)
        model.text_encoder.position.mul_(100)
        model.captioner.head_bias[CONFIG.end_id] += ends
    return model.cuda(), torch.randn(70, 19, CONFIG.embed_dim, dtype=torch.float64, device="cuda")


def assert_same(found, expected, what=""):
    assert torch.equal(found[0], expected[0]), what
    torch.testing.assert_close(found[1], expected[1])


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("beams", [1, 3])
def test_captured_decoding_is_eager_decoding(beams, compiled):
    """Across the borders of buckets, larger batches before smaller ones, every bucket captured once and used again."""
    model, tokens = captioning_model()
    for size in (70, 64, 5, 3, 4, 1, 70, 3):
        expected = model.generate_from_tokens(tokens[:size], 20, beams, graphs=False)
        found = model.generate_from_tokens(tokens[:size], 20, beams, compiled=compiled)
        assert_same(found, expected, f"{size} pairs")
        assert_same([x[:1] for x in found], model.generate_from_tokens(tokens[:1], 20, beams, graphs=False))
        tokens = tokens.roll(7, 0)
    assert (found[0] != 0).sum(1).unique().numel() > 1, "captions of one length would show little"
    if beams == 1:
        raw = {"max_length": 20, "stop_early": False}
        assert_same(model.generate_from_tokens(tokens, **raw), model.generate_from_tokens(tokens, graphs=False, **raw))


@torch.no_grad()
def test_captured_decoding_reads_the_weights_of_the_moment():
    """Changed in place they are read by the graph that there is; put elsewhere they get another."""
    from fastidc.generate import plan

    model, tokens = captioning_model()
    model.generate_from_tokens(tokens, 20)
    plans = plan._PLANS[model.captioner][1]
    (first,) = plans.values()
    model.captioner.head.weight.mul_(-1)
    assert_same(model.generate_from_tokens(tokens, 20), model.generate_from_tokens(tokens, 20, graphs=False))
    assert list(plan._PLANS[model.captioner][1].values()) == [first]
    model.captioner.head.weight.data = model.captioner.head.weight * -1
    assert_same(model.generate_from_tokens(tokens, 20), model.generate_from_tokens(tokens, 20, graphs=False))
    assert first not in plan._PLANS[model.captioner][1].values()


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_captured_decoding_under_autocast(beams):
    """The same kernels on the same numbers: bit for bit, in the context that captured and in a later one, weights changed between."""
    model, tokens = captioning_model()
    model, tokens = model.float(), tokens[:64].float()
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            for _ in range(2):
                expected = model.generate_from_tokens(tokens, 20, beams, graphs=False)
                found = model.generate_from_tokens(tokens, 20, beams)
                assert torch.equal(found[0], expected[0])
                assert torch.equal(found[1], expected[1])
        model.captioner.head.weight.mul_(-1)
        model.text_encoder.token_embedding.mul_(0.9)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_captured_decoding_never_waits_for_the_device_but_for_the_flag(beams):
    model, tokens = captioning_model()
    expected = model.generate_from_tokens(tokens, 20, beams)
    try:
        torch.cuda.set_sync_debug_mode("error")  # events are waited for apart from it
        found = model.generate_from_tokens(tokens, 20, beams)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(found, expected)
