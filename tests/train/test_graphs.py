"""The captured step: that replays read what a step is given, and that buckets, buffers and packing change no number.

On a CPU a graph is its step run on the buffers; tests/test_gpu.py captures.
"""

import copy
from dataclasses import replace

import pytest
import torch
import worlds

from fastidc.config import PRESETS, Recipe
from fastidc.data.loaders import PairBatch
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.packed import PackedText
from fastidc.train import graphs
from fastidc.train.distributed import ALONE
from fastidc.train.engine import Trainer
from fastidc.train.graphs import StepGraphs, mapped, shape_of, tensors_of
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision
from fastidc.train.shadows import Shadows

CPU = torch.device("cpu")
CONFIG = worlds.SMALL.replace(dropout=0.0)
SAMPLES = 4


def recipe(stage: str) -> Recipe:
    return replace(getattr(PRESETS["clevr"], stage), lr=1e-3, coef_lr=0.1)


def batch(stage: str, seed: int, words: tuple[int, int] = (4, 12)) -> PairBatch:
    """Noise, and captions of so many tokens."""
    g = torch.Generator().manual_seed(seed)
    pairs = 1 if stage == "adapt" else 2
    images = torch.randint(0, 256, (SAMPLES, 1 + pairs, CONFIG.image_size, CONFIG.image_size, 3), generator=g, dtype=torch.uint8)
    lengths = torch.randint(*words, (SAMPLES * pairs,), generator=g).tolist()
    rows = [[CONFIG.start_id, *torch.randint(1, 100, (n - 2,), generator=g).tolist(), CONFIG.end_id] for n in lengths]
    names = [str(i) for i in range(SAMPLES)]
    if stage == "adapt":
        return PairBatch(images, names, text=PackedText.of(rows))
    ids = PackedText.of(rows).padded()
    inputs = torch.where(ids == CONFIG.end_id, 0, ids)[:, :-1].view(SAMPLES, pairs, 1, -1)
    return PairBatch(images, names, input_ids=inputs, target_ids=ids[:, 1:].reshape(SAMPLES, pairs, 1, -1))


def trainer(
    stage: str,
    *,
    graphed: bool,
    micro_batch: int | None = None,
    instead=None,
    device: torch.device = CPU,
    precision: str = "fp32",
    dropout: float = 0.0,
) -> Trainer:
    torch.manual_seed(0)
    model = CLIP4IDC(CONFIG.replace(captioner_layers=0) if stage == "adapt" else CONFIG.replace(dropout=dropout)).train().to(device)
    optimizer = Optimizer(model, stage, recipe(stage), 30)
    if precision == "bf16":
        model.shadows = Shadows(model, stage, torch.bfloat16, half_gradients=device.type == "cuda" and micro_batch is None)
    task = objectives(stage, recipe(stage), ALONE)
    how = {"graphs": graphed, "instead": instead}
    return Trainer(model, task, optimizer, ALONE, device, Precision(precision, device.type), micro_batch, **how)


def weights(trained: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trained.optimizer.parameters])


@pytest.mark.parametrize(
    ("stage", "batches", "micro_batch"), [("adapt", 1, None), ("adapt", 2, 2), ("finetune", 1, None), ("finetune", 2, None)]
)
def test_a_captured_run_is_the_eager_one(stage, batches, micro_batch):
    """Several shapes in turn, accumulation and chunks included: losses, norms and weights of twelve steps."""
    captured, eager = (trainer(stage, graphed=graphed, micro_batch=micro_batch) for graphed in (True, False))
    start = weights(eager)
    for step in range(12):
        given = [batch(stage, 100 * step + i, (4, 9) if step % 2 else (9, 14)) for i in range(batches)]
        (loss, norm), (loss_eager, norm_eager) = captured.step(given), eager.step(given)
        assert float(loss) == pytest.approx(float(loss_eager), rel=5e-6)
        assert float(norm) == pytest.approx(float(norm_eager), rel=2e-5)
    assert 2 <= captured.graphs.captured <= 4, "one for each of few shapes"
    moved = (weights(eager) - start).norm()
    assert moved > 0
    assert (weights(captured) - weights(eager)).norm() <= 5e-6 * weights(eager).norm()
    assert (weights(captured) - weights(eager)).norm() <= 2e-3 * moved
    assert captured.optimizer.steps == eager.optimizer.steps == 12


def test_a_replay_reads_what_it_is_given():
    """Not the batch of its capture; and what a step has returned, later steps leave alone."""
    run = StepGraphs(lambda ready: (ready[0][0].images.double().mean().clone(),), CPU)
    given = [((replace(batch("adapt", seed), text=None),),) for seed in range(5)]
    found = [run(ready)[0] for ready in given]
    assert run.captured == 1
    assert found == [ready[0][0].images.double().mean() for ready in given]


def test_shapes_and_tensors():
    one, other = batch("adapt", 0), batch("adapt", 1)
    assert shape_of(((one,),)) == shape_of(((replace(one, images=one.images + 1, ids=["other"] * SAMPLES),),))
    assert shape_of(((one,),)) != shape_of(((replace(one, images=one.images[:2]),),))
    assert shape_of(((replace(one, text=one.text.filled(64, 16)),),)) != shape_of(((replace(one, text=one.text.filled(64, 24)),),))
    assert len(list(tensors_of((one, other)))) == 8
    assert all(a is not b and torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(mapped(torch.clone, one)), strict=True))


def test_weights_written_between_replays():
    """What stands in for them in half precision follows, though a replay asks nobody."""
    run = trainer("adapt", graphed=True, precision="bf16")
    given = batch("adapt", 0, (12, 14))
    for _ in range(3):
        run.step([given])
    with torch.no_grad():
        next(iter(run.model.pair_encoder.blocks)).attention.qkv.weight.add_(1)
    refreshed = []
    original = run.model.shadows.refresh
    run.model.shadows.refresh = lambda: refreshed.append(original())
    run.graphs._graphs = dict.fromkeys(run.graphs._graphs)
    run.graphs = lambda ready: refreshed.append("replay") or (torch.zeros(()), torch.zeros(()))
    run.step([given])
    assert refreshed == [None, "replay"]


def test_moments_that_moved():
    """A graph writes to where they were."""
    run = trainer("adapt", graphed=True)
    for _ in range(3):
        run.step([batch("adapt", 0, (12, 14))])
    assert len(run.graphs._graphs) == 1
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()), "itself")
    run.step([batch("adapt", 0, (12, 14))])
    assert run.graphs.captured == 2, "captured anew, after an eager step"


def test_no_memory_beside_the_graphs():
    """They go, and the step is made again."""
    said, full = [], []

    def step(ready):
        if full and len(ready[0]) == 5:
            full.clear()
            raise torch.OutOfMemoryError("no memory")
        return (ready[0].sum(),)

    run = StepGraphs(step, CPU, warm_up=1, instead=said.append)
    run((torch.ones(2),))
    full.append(True)
    assert float(run((torch.ones(5),))[0]) == 5
    assert not run._graphs
    assert "ran out of memory" in said[0]
    wanted = StepGraphs(step, CPU, warm_up=1)
    wanted((torch.ones(2),))
    full.append(True)
    with pytest.raises(FastidcError, match="ran out of memory beside those that CUDA graphs keep; train with --graph off"):
        wanted((torch.ones(5),))
    full.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        StepGraphs(step, CPU)((torch.ones(5),))


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    run = StepGraphs(lambda ready: (ready[0].sum(),), CPU, warm_up=1)
    for size in (1, 2, 3, 2, 3):
        assert float(run((torch.ones(size),))[0]) == size
    assert run.captured == 3
    run((torch.ones(1),))
    assert run.captured == 4, "it had been dropped, and is eager once more"


def test_an_eager_step_precedes_every_capture():
    """The optimiser's tables are made by it: see `fastidc.ops.BertAdamStep`."""
    said = []
    run = StepGraphs(lambda ready: (said.append(len(ready[0])) or ready[0].sum(),), CPU)
    run._capture = lambda ready: said.append(("captured", len(ready[0]))) or (lambda given: (given[0].sum(),))
    for size in (1, 2, 1, 2):
        run((torch.ones(size),))
    assert said == [1, 2, 1, ("captured", 1), 2, ("captured", 2)]


def test_a_step_that_cannot_be_captured():
    """A sentence, after which every step is eager; or an error, where graphs were asked for."""

    def refuse(ready):
        raise FastidcError("The training step cannot be captured as a CUDA graph (a reason); train with --graph off.")

    said: list[str] = []
    run, wanted, eager = (
        trainer("adapt", graphed=graphed, instead=instead) for graphed, instead in ((True, said.append), (True, None), (False, None))
    )
    for one in (run, wanted):
        one.graphs._capture = refuse
    for seed in range(4):
        given = [batch("adapt", seed, (12, 14))]
        assert float(run.step(given)[0]) == pytest.approx(float(eager.step(given)[0]), rel=5e-6)
    assert len(said) == 1
    assert said[0].endswith("train with --graph off. It goes on without.")
    kept = trainer("adapt", graphed=True, instead=said.append)
    for p in kept.optimizer.parameters:
        p.grad = torch.ones_like(p)
    kept.graphs.instead("A sentence.")
    assert all(p.grad is None for p in kept.optimizer.parameters), "what was captured of them was never computed"
    wanted.step([batch("adapt", 0, (12, 14))])
    with pytest.raises(FastidcError, match="cannot be captured"):
        wanted.step([batch("adapt", 1, (12, 14))])


def test_chunks_of_a_step_are_alike():
    run = trainer("adapt", graphed=True, micro_batch=2)
    for seed in range(5):
        (chunks, *others) = run.ready([batch("adapt", seed, (4, 16)), batch("adapt", 50 + seed, (14, 20))])
        assert len({shape_of(chunk) for part in (chunks, *others) for chunk in part}) == 1


@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_few_shapes_come_up(stage):
    """Of twenty batches of a kind."""
    run = trainer(stage, graphed=True)
    keys = {shape_of(run.ready([batch(stage, seed, (6, 14))])) for seed in range(20)}
    assert len(keys) <= 4
    plain = trainer(stage, graphed=False)
    assert len({shape_of(plain.ready([batch(stage, seed, (6, 14))])) for seed in range(20)}) > 6


def test_everything_else_stays_as_it_was():
    """A deep copy of a trained model has no graph of its own, and evaluation none at all."""
    run = trainer("adapt", graphed=True)
    for seed in range(3):
        run.step([batch("adapt", seed)])
    again = copy.deepcopy(run.model).eval()
    text = batch("adapt", 9).text
    assert torch.equal(again.encode_text(text), run.model.eval().encode_text(text))


# ---- on a device


@pytest.fixture
def full_precision():
    """fp32 products are fp32, and sums have one order, so that an eager run can be compared."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("stage", "batches", "micro_batch"), [("adapt", 1, None), ("adapt", 2, 2), ("finetune", 1, None), ("finetune", 2, None)]
)
def test_captured(stage, batches, micro_batch, precision, full_precision):
    """Twelve steps replayed are twelve eager ones."""
    cuda = {"device": torch.device("cuda"), "precision": precision, "micro_batch": micro_batch}
    captured, eager = (trainer(stage, graphed=graphed, **cuda) for graphed in (True, False))
    limit = 1e-4 if precision == "fp32" else 2e-2
    start = weights(eager)
    for step in range(12):
        given = [batch(stage, 100 * step + i, (4, 9) if step % 2 else (9, 14)) for i in range(batches)]
        (loss, norm), (loss_eager, norm_eager) = captured.step(given), eager.step(given)
        assert float(loss) == pytest.approx(float(loss_eager), rel=limit)
        assert float(norm) == pytest.approx(float(norm_eager), rel=5 * limit)
    assert 2 <= captured.graphs.captured <= 4
    moved = (weights(eager) - start).norm()
    assert (weights(captured) - weights(eager)).norm() <= (0.01 if precision == "fp32" else 0.2) * moved


@pytest.mark.gpu
def test_replays_draw_new_masks():
    run = trainer("finetune", graphed=True, device=torch.device("cuda"), precision="bf16", dropout=0.3)
    run.optimizer.base_lrs = [0.0 for _ in run.optimizer.base_lrs]
    losses = [float(run.step([batch("finetune", 0)])[0]) for _ in range(6)]
    assert run.graphs.captured == 1
    assert len(set(losses)) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_a_step_asks_the_device_nothing(stage):
    """An eager one; what waits could not be captured."""
    run = trainer(stage, graphed=False, device=torch.device("cuda"), precision="bf16", dropout=0.3)
    ready = [run.ready([batch(stage, seed)]) for seed in range(3)]
    run.run(ready[0])
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for one in ready[1:]:
            run.run(one)
    finally:
        torch.cuda.set_sync_debug_mode("default")
