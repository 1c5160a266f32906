"""Both peers compute what fastidc computes, and peer A what the official code computed."""

import os

import compare
import golden
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from worlds import official_state

from bench.peers import idiomatic, official_style, ours
from fastidc import checkpoint
from fastidc.config import START_ID, ModelConfig, Recipe
from fastidc.data.loaders import PairBatch
from fastidc.packed import PackedText

CONFIG = ModelConfig(
    image_size=48,
    patch_size=16,
    vision_width=128,
    vision_layers=3,
    intra_layers=2,
    embed_dim=128,
    text_layers=2,
    vocab_size=120,
    context_length=36,
    captioner_layers=2,
    dropout=0.0,
)
STATE = official_state(CONFIG, "caption")
STAGES = ("adapt", "finetune")
FP32 = {ours: {"precision": "fp32"}, official_style: {"towers": torch.float32}, idiomatic: {"precision": "fp32"}}


def build(peer, stage, **options):
    return peer.build(CONFIG, STATE, stage, "cpu", **FP32[peer], **options)


def captions(shape, seed, longest=9):
    """Words of different lengths, as [start, words, end, 0...] and as inputs and targets, int64 [*shape, longest + 2] and one shorter."""
    g = torch.Generator().manual_seed(seed)
    text = torch.zeros(*shape, longest + 2, dtype=torch.long)
    for row in text.view(-1, longest + 2):
        length = int(torch.randint(2, longest + 1, (), generator=g))
        row[0], row[length + 1] = CONFIG.start_id, CONFIG.end_id
        row[1 : length + 1] = torch.randint(1, CONFIG.start_id, (length,), generator=g)
    return text, text[..., :-1].masked_fill(text[..., :-1] == CONFIG.end_id, 0), text[..., 1:]


def clevr_batch(stage, count=3) -> PairBatch:
    kinds = {"adapt": 1, "finetune": 2}[stage]
    g = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, kinds + 1, CONFIG.image_size, CONFIG.image_size, 3), generator=g, dtype=torch.uint8)
    names = [str(i) for i in range(count)]
    if stage == "adapt":
        return PairBatch(images, names, text=PackedText.from_padded(captions((count,), 1)[0]))
    _, inputs, targets = captions((count, kinds, 1), 2)
    return PairBatch(images, names, input_ids=inputs, target_ids=targets)


def gradients(stepper) -> dict[str, torch.Tensor]:
    """Under official names, whatever names the stepper has."""
    found = {name: p.grad for name, p in stepper.model.named_parameters() if p.grad is not None}
    if any(name.startswith("clip.") for name in found):
        return found
    # a packed projection's parts stand side by side; a name whose tensor has no gradient is left out
    return checkpoint.to_official(found, [k for k in STATE if checkpoint.our_name(k)[0] in found])


@pytest.mark.parametrize("stage", STAGES)
def test_peers_losses_and_gradients(stage):
    batch, steppers = clevr_batch(stage), {peer: build(peer, stage) for peer in FP32}
    losses = {peer: stepper.forward_backward(batch) for peer, stepper in steppers.items()}
    expected = {name: float(grad.double().norm()) for name, grad in gradients(steppers[official_style]).items()}
    assert len(expected) > 50
    for peer in (ours, idiomatic):
        compare.assert_close(losses[peer], losses[official_style], compare.GOLDEN_TRAIN_LOSS, f"{peer.__name__} loss")
        found = gradients(steppers[peer])
        assert set(found) == set(expected), "the peers train other parameters"
        compare.assert_grad_norms(found, expected)


def test_peers_greedy_ids():
    batch = clevr_batch("finetune")
    raw = build(ours, "finetune", stop_early=False).generate(batch)
    assert raw.shape == (3, 2, 32)
    for peer in (official_style, idiomatic):
        assert build(peer, "finetune").generate(batch).tolist() == raw.tolist(), peer.__name__


def test_a_compiled_decoder_is_one_graph(monkeypatch):
    """Traced whole, with its caches at fixed addresses: the same words, also of a second batch and of a batch of another size."""
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: compiled(function, backend=backend, **options))
    eager, traced = (idiomatic.build(CONFIG, STATE, "finetune", "cpu", c, precision="fp32") for c in (False, True))
    for count, steps in ((3, 1), (3, 1), (2, 2)):
        batch = clevr_batch("finetune", count)
        assert traced.generate(batch, 8).tolist() == eager.generate(batch, 8).tolist()
        assert len(graphs) == steps, "one graph a batch size"
        assert traced.model.cache.caches[0].shape[1] == 2 * count


@pytest.mark.parametrize(
    ("stage", "without"),
    [
        ("adapt", {"all_tokens": True, "backends": "attention=torch"}),
        ("adapt", {"all_words": True}),
        ("adapt", {"packed": False}),
        ("finetune", {"packed": False}),
        ("finetune", {"text_tower": True}),
    ],
)
def test_ours_without_a_feature_computes_the_same(stage, without):
    """What the waterfall takes away costs time and changes no result."""
    batch = clevr_batch(stage)
    whole, other = build(ours, stage), build(ours, stage, **without)
    flops = []
    for stepper in (whole, other):
        with FlopCounterMode(display=False) as counter:
            stepper.loss = stepper.forward_backward(batch)
        flops.append(counter.get_total_flops())
    compare.assert_close(other.loss, whole.loss, compare.GOLDEN_TRAIN_LOSS, "loss")
    compare.assert_grad_norms(gradients(other), {name: float(grad.double().norm()) for name, grad in gradients(whole).items()})
    assert flops[1] > flops[0]


def test_pairs_that_share_nothing():
    batch = clevr_batch("finetune")
    pairs = ours.independent(batch)
    assert pairs.images.shape == (6, 2, CONFIG.image_size, CONFIG.image_size, 3)
    assert pairs.input_ids.shape == pairs.target_ids.shape == (6, 1, 1, batch.input_ids.shape[-1])
    for number in range(6):
        sample, kind = divmod(number, 2)
        assert torch.equal(pairs.images[number], batch.images[sample, [0, kind + 1]])
        assert torch.equal(pairs.target_ids[number, 0], batch.target_ids[sample, kind])


def test_backends_of_a_stepper_are_chosen_while_it_runs(monkeypatch):
    monkeypatch.delenv("FASTIDC_BACKEND", raising=False)
    with pytest.raises(ValueError, match="attention has no backend 'flight'"):
        build(ours, "adapt", backends="attention=flight").step(clevr_batch("adapt"))
    assert "FASTIDC_BACKEND" not in os.environ


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("peer", list(FP32))
def test_step_is_its_halves(peer, stage):
    batch, whole, halves = clevr_batch(stage), build(peer, stage, total_steps=20), build(peer, stage, total_steps=20)
    ready = halves.prepare(batch)
    for _ in range(3):  # the first step of a warm-up has rate 0
        a, b = whole.step(batch), halves.forward_backward(ready)
        halves.optimizer_step()
        assert a.item() == b.item()
    for (name, p), q in zip(whole.model.named_parameters(), halves.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert a.item() != build(peer, stage).forward_backward(batch).item()


@pytest.mark.parametrize("stage", STAGES)
def test_a_trains_as_we_do(stage):
    """A's optimiser, tensor by tensor, and ours over lists, both BertAdam."""
    batch, a, b = clevr_batch(stage), build(official_style, stage, total_steps=20), build(ours, stage, total_steps=20)
    for _ in range(4):
        compare.assert_close(a.step(batch), b.step(batch), compare.GOLDEN_TRAIN_LOSS, "loss")
    after = dict(a.model.named_parameters())
    own = dict(b.model.named_parameters())
    for name, tensor in checkpoint.to_official(own, [k for k in STATE if k in after]).items():
        compare.assert_close(after[name], tensor, compare.GOLDEN_TRAIN_AFTER, name)


def test_official_precision_runs():
    """fp16 towers with fp16 moments, an fp32 captioner."""
    stepper = official_style.build(CONFIG, STATE, "finetune", "cpu")
    assert stepper.step(clevr_batch("finetune")).isfinite()
    dtypes = {name: p.dtype for name, p in stepper.model.named_parameters()}
    for name, dtype in dtypes.items():
        assert (dtype == torch.float16) == checkpoint.is_half_officially(checkpoint.our_name(name)[0]), name


def official_stepper(g, stage):
    c = g.meta["config"]
    config = ModelConfig(
        **{k: c[k] for k in ("image_size", "patch_size", "vision_width", "intra_layers", "embed_dim", "text_layers", "context_length")},
        vision_layers=c["vision_layers"],
        captioner_layers=c["captioner_layers"] if stage == "finetune" else 0,
        dropout=0.0,
    )
    stepper = official_style.build(config, g.weights, stage, "cpu", towers=torch.float32)
    before, after = g.images.split(1, dim=1)
    captions = () if stage == "adapt" else ((g["input_caption_ids"].long(), g["decoder_mask"].long(), g["output_caption_ids"].long()),)
    return stepper, official_style.Inputs(g["input_ids"].long(), before, (after,), captions)


GOLDENS = [
    ("adapt", "adapt_small", 6),
    *(pytest.param("adapt", name, 6, marks=pytest.mark.slow) for name in golden.STAGES["adapt"] if name != "adapt_small"),
    pytest.param("finetune", "caption_small", 1, marks=pytest.mark.slow),
    *(pytest.param("finetune", name, 6, marks=pytest.mark.slow) for name in golden.STAGES["caption"]),
]


@pytest.mark.parametrize(("stage", "name", "steps"), GOLDENS)
def test_golden_peer_a(stage, name, steps):
    """Loss, gradients, steps of the optimiser and the greedy ids of the official code itself."""
    g = golden.load(name)
    stepper, inputs = official_stepper(g, stage)
    if stage == "finetune":
        ids = stepper.model.eval().greedy(inputs.ids, inputs.before, inputs.others[0], START_ID, g["greedy_ids"].shape[1])
        assert ids.tolist() == g["greedy_ids"].tolist()
    o = g.meta["optimizer"]
    r = o["recipes"]["adapt" if stage == "adapt" else "caption"]
    recipe = Recipe(
        epochs=1,
        batch_size=1,
        lr=o["lr"],
        coef_lr=o["coef_lr"],
        optimizer="bert_adam",
        schedule=r["schedule"],
        betas=(r["b1"], r["b2"]),
        eps=r["e"],
        weight_decay=r["weight_decay"],
    )
    stepper.optimizer = official_style.BertAdam(official_style.parameter_groups(stepper.model, stage, recipe), recipe, o["t_total"])
    for step in range(steps):
        loss = stepper.forward_backward(inputs)
        compare.assert_close(loss, g["train/losses"][step], compare.GOLDEN_TRAIN_LOSS, f"loss {step}")
        if step == 0:
            found = {n: p.grad for n, p in stepper.model.named_parameters() if p.grad is not None}
            compare.assert_grad_norms(found, {n: v for n, v in g.grad_norms.items() if n in found})
        stepper.optimizer_step()
    after = stepper.model.state_dict() if steps == o["steps"] else {}
    for key in after.keys() & g.after.keys():
        compare.assert_close(after[key], g.after[key], compare.GOLDEN_TRAIN_AFTER, key)
