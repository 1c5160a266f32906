"""Images in the memory of the device: picked where they are read, and what is to be done to them beside; all the same pixels."""

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import worlds

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

from fastidc import CLIP4IDC, ops
from fastidc.config import preset
from fastidc.data import resident
from fastidc.data.augment import Augmentation, mirrored, unchanged
from fastidc.data.cache import Cache
from fastidc.data.cache_build import build
from fastidc.data.images import ImageStore
from fastidc.data.loaders import PairLoader, distinct_images, in_order
from fastidc.data.records import all_captions, load_records
from fastidc.data.resident import ResidentImages
from fastidc.data.sources import CachedImages
from fastidc.errors import FastidcError
from fastidc.picked import Picked, Store
from fastidc.tokenizer import Tokenizer, vocabulary_of
from fastidc.train.distributed import ALONE
from fastidc.train.engine import Trainer
from fastidc.train.graphs import StepGraphs, shape_of, tensors_of
from fastidc.train.objectives import objectives
from fastidc.train.optim import Optimizer
from fastidc.train.precision import Precision

CPU = torch.device("cpu")
RECIPE = dataclasses.replace(preset("clevr").finetune, batch_size=4, seed=5)
SIZE = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = worlds.clevr_tree(tmp_path_factory.mktemp("world") / "data", {"train": list(range(10)), "val": [20], "test": [30, 31, 32]})
    records = load_records(folder)
    paths = distinct_images(records.values())
    cache = Cache(build(paths, folder, folder / "cache.bin", SIZE).path)
    return records, paths, cache, cache.rows(folder, paths)


def loader(world, source, recipe=RECIPE, stage="finetune", workers=2):
    return PairLoader(stage, world[0]["train"], Tokenizer(), source, recipe, workers)


def seen(images):
    """What a model reads of a batch's images: uint8 values [N, n, 3*P*P]."""
    pixels, index, augmentation = images.flat() if isinstance(images, Picked) else (images.flatten(0, 1), None, None)
    return ops.patches(pixels, index, 4, augmentation=augmentation, dtype=torch.float32)


@pytest.mark.parametrize(
    "augment", ["", "crop=0.5,brightness=0.4,saturation=0.3,noise=9,erase=0.6,same_colours=no"], ids=["plain", "augmented"]
)
@pytest.mark.parametrize("stage", ["adapt", "finetune"])
def test_batches_are_those_of_other_sources(world, stage, augment):
    """Same samples, same words, same pixels where the model reads them, mirrored ones too."""
    _, paths, cache, rows = world
    recipe = dataclasses.replace(getattr(preset("clevr"), stage), batch_size=4, seed=5, flip=0.5, augment=augment)
    sources = [ResidentImages(cache, rows, CPU), CachedImages(cache, rows), ImageStore(SIZE)]
    changed = 0
    for epoch in (0, 1):
        for batch, *others in zip(*(loader(world, source, recipe, stage).epoch(epoch) for source in sources), strict=True):
            assert isinstance(batch.images, Picked)
            assert batch.images.shape == (*others[0].images.shape[:2], SIZE, SIZE, 3)
            assert not isinstance(others[0].images, Picked) or augment
            for other in others:
                assert other.ids == batch.ids
                assert torch.equal(seen(other.images), seen(batch.images))
                assert batch.text is None or torch.equal(batch.text.ids, other.text.ids)
                assert batch.input_ids is None or torch.equal(batch.input_ids, other.input_ids)
            plain = dataclasses.replace(batch.images, augmentation=None)
            changed += int((seen(plain) != seen(batch.images)).flatten(1).any(1).sum())
    assert changed > 0
    draws = [next(iter(loader(world, sources[0], recipe, stage).epoch(epoch))).images.augmentation for epoch in (0, 1)]
    assert not augment or not torch.equal(*draws), "drawn anew in every epoch"
    assert {row for row in ResidentImages(cache, rows, CPU)._index.values()} == set(range(len(paths)))


def test_a_source_for_evaluation(world):
    records, _, cache, rows = world
    ours = in_order(records["test"], ResidentImages(cache, rows, CPU), 2)
    for batch, other in zip(ours, in_order(records["test"], ImageStore(SIZE), 2), strict=True):
        assert batch.ids == other.ids
        assert torch.equal(seen(batch.images), seen(other.images))


def test_only_the_images_of_a_run_are_held(world, monkeypatch):
    records, _, cache, rows = world
    monkeypatch.setattr(resident, "_PART", 4 * resident.bytes_of(1, SIZE))  # three parts
    few = {path: rows[path] for path in distinct_images([records["test"]])}
    source = ResidentImages(cache, few, CPU)
    assert len(source.store.pixels) == len(few) == 9
    for path in few:
        assert torch.equal(torch.from_numpy(source[path].copy()), torch.from_numpy(cache.pixels[rows[path]].copy()))
    with (
        ThreadPoolExecutor(1) as pool,
        pytest.raises(FastidcError, match=r"x.png: is not among the images that cache in the memory of cpu"),
    ):
        source.start([[Path("x.png")]], pool)


def test_what_does_not_fit_is_refused(world, monkeypatch):
    _, _, cache, rows = world
    needed = resident.bytes_of(len(rows), SIZE)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * needed - 1)
    with pytest.raises(
        FastidcError, match=r"cache.bin: 42 images are 0.0 GB, more than 50% of the 0.0 GB that are free on cpu; .*--loader memory"
    ):
        ResidentImages(cache, rows, CPU)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2 * needed)
    ResidentImages(cache, rows, CPU)


@pytest.mark.parametrize("augment", ["", "crop=0.6,noise=5"], ids=["plain", "augmented"])
def test_a_model_reads_them_alike(world, augment):
    """Embedding and tokens from a store, from pixels, and from normalised images."""
    _, _, cache, rows = world
    model = CLIP4IDC(worlds.SMALL.replace(image_size=SIZE, patch_size=4)).double().eval()
    recipe = dataclasses.replace(RECIPE, augment=augment)
    batches = [next(iter(loader(world, source, recipe).epoch(0))) for source in (ResidentImages(cache, rows, CPU), ImageStore(SIZE))]
    store, pixels = (model.encode_batch(batch.images) for batch in batches)
    assert all(torch.equal(a, b) for a, b in zip(store, pixels, strict=True))
    whole = seen(batches[0].images).view(12, 4, 4, 3, 4, 4).permute(0, 3, 1, 4, 2, 5).reshape(4, 3, 3, SIZE, SIZE).double()
    embed = model.pair_encoder.patch_embed
    before, after, distractor = ((whole / 255 - embed.mean.double()) / embed.std.double()).unbind(1)
    for k, image in enumerate((after, distractor)):
        embedding, tokens = model.encode_pair(before, image)
        assert torch.allclose(store[0][:, k], embedding, rtol=0, atol=1e-6)  # mean and std are kept in fp32
        assert torch.allclose(store[1][:, k], tokens, rtol=0, atol=1e-6)


def test_a_frozen_stem_is_folded_once_and_anew_when_written(world):
    model = CLIP4IDC(worlds.SMALL).eval()
    embed = model.pair_encoder.patch_embed
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    assert embed.folded(torch.float32) is not embed.folded(torch.float32), "a stem that trains is folded in every step"
    want = embed(images)
    embed.weight.requires_grad_(False)
    assert torch.equal(embed(images), want)
    first = embed.folded(torch.float32)
    assert embed.folded(torch.float32) is first
    address = first.weight.data_ptr()
    with torch.no_grad():
        embed.weight.mul_(2)
    assert not torch.equal(embed(images), want)
    assert embed.folded(torch.float32).weight.data_ptr() == address, "a captured step reads it there"
    assert torch.equal(embed.folded(torch.float32).weight, ops.fold_normalisation(embed.weight, embed.mean, embed.std).weight)
    other = embed.folded(torch.bfloat16)
    assert other.weight.dtype == torch.bfloat16
    assert embed.folded(torch.float32).weight.data_ptr() == address, "each dtype has its own: evaluation in another moves nothing"
    with torch.no_grad():
        embed.weight.mul_(0.5)
    embed.refold()
    assert torch.equal(other.weight, ops.fold_normalisation(embed.weight, embed.mean, embed.std, torch.bfloat16).weight)
    assert embed(images).equal(want)


def test_a_fold_first_asked_for_in_inference_can_be_written():
    embed = CLIP4IDC(worlds.SMALL).pair_encoder.patch_embed.requires_grad_(False)
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.inference_mode():
        before = embed(images).clone()
    with torch.no_grad():
        embed.weight.mul_(2)
    assert not embed(images).equal(before)


def test_the_remainder_of_the_bias_reaches_the_positions():
    """In bf16 a bias of 64 is off by up to 0.25, alike in every patch: most of that must be gone from their mean."""
    torch.manual_seed(0)
    embed = CLIP4IDC(worlds.SMALL).pair_encoder.patch_embed.requires_grad_(False)
    embed.norm = torch.nn.Identity()
    embed.weight.add_(0.05)
    embed.position.zero_()
    images = torch.randint(90, 110, (8, 3, 48, 48), dtype=torch.uint8)
    normalised = (images.double() / 255 - embed.mean.double()) / embed.std.double()
    want = copy.deepcopy(embed).double()(normalised)
    with torch.autocast("cpu", torch.bfloat16):
        got = embed(images).double()
    remainder = embed.folded(torch.bfloat16).remainder
    assert remainder.abs().mean() > 0.05
    assert (got - want)[:, 1:].mean((0, 1)).abs().mean() < 0.3 * remainder.abs().mean()


def test_gradients_of_a_stem_that_trains():
    model = CLIP4IDC(worlds.SMALL).double()
    embed = model.pair_encoder.patch_embed
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    normalised = (images.double() / 255 - embed.mean.double()) / embed.std.double()
    for given in (images, normalised):
        embed.zero_grad()
        embed(given).square().sum().backward()
        if given is images:
            want = {name: p.grad.clone() for name, p in embed.named_parameters()}
    for name, p in embed.named_parameters():
        assert torch.allclose(p.grad, want[name], rtol=1e-9, atol=1e-9), name


def test_fp16_is_normalised_first():
    """Folded weights lie below fp16's least normal number: a product of them would be wrong by percents."""
    model = CLIP4IDC(worlds.SMALL)
    embed = model.pair_encoder.patch_embed
    images = torch.randint(0, 256, (3, 3, 48, 48), dtype=torch.uint8)
    want = embed(images)
    with torch.autocast("cpu", torch.float16):
        got = embed(images)
    assert (got - want).abs().max() < 0.02 * want.abs().max()
    with pytest.raises(ValueError, match="normalise the patches instead"):
        ops.fold_normalisation(embed.weight, embed.mean, embed.std, torch.float16)


# ---- batches, chunks and graphs


def test_a_store_stays_where_it_is():
    pixels = torch.zeros(5, SIZE, SIZE, 3, dtype=torch.uint8)
    store = Store(pixels)
    picked = Picked(store, torch.tensor([[0, 1], [4, 2], [3, 3]]), torch.from_numpy(unchanged(3, 2, SIZE)))
    assert picked.shape == (3, 2, SIZE, SIZE, 3)
    assert len(picked[1:]) == 2
    assert torch.equal(picked[1:].index, picked.index[1:])
    assert picked.to("cpu").source is store
    assert all(x is not pixels for x in tensors_of(picked))
    assert shape_of(picked) == shape_of(picked[:]) != shape_of(Picked(Store(pixels), picked.index, picked.augmentation))
    own = Picked(torch.zeros(3, 2, SIZE, SIZE, 3, dtype=torch.uint8), None, picked.augmentation)
    assert own[:2].shape == (2, 2, SIZE, SIZE, 3)
    for wrong in ((pixels[None],), (pixels,)):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            Store(wrong[0].float())
    with pytest.raises(ValueError, match="need an index"):
        Picked(store)
    with pytest.raises(ValueError, match="need an index"):
        Picked(own.source, picked.index)


def test_a_graph_reads_the_store_in_place():
    store = Store(torch.randint(0, 256, (5, SIZE, SIZE, 3), dtype=torch.uint8))
    pointers = []

    def run(ready):
        (images,) = ready
        pointers.append((images.flat()[0].data_ptr(), images.index.data_ptr()))
        return (seen(images).sum((1, 2)),)

    graph = StepGraphs(run, CPU)
    for rows in ([0, 1], [2, 3], [4, 0], [1, 1]):
        picked = Picked(store, torch.tensor([rows]))
        assert torch.equal(graph((picked,))[0], store.pixels[rows].float().sum((1, 2, 3)))
    assert {a for a, _ in pointers} == {store.pixels.data_ptr()}
    assert graph.captured == 1
    assert pointers[2][1] == pointers[3][1], "later batches are read from one buffer"


# ---- what is drawn


def test_mirroring_is_one_of_the_things_that_are_drawn():
    images = torch.randint(0, 256, (4, 12, 12, 3), dtype=torch.uint8)
    flipped = torch.from_numpy(mirrored(unchanged(4, 1, 12)[:, 0], 12))
    assert torch.equal(ops.patches(images, None, 4, augmentation=flipped), ops.patches(images.flip(2), None, 4))
    nothing = torch.from_numpy(unchanged(4, 1, 12)[:, 0])
    assert torch.equal(ops.patches(images, None, 4, augmentation=nothing), ops.patches(images, None, 4))
    drawn = Augmentation(crop=0.5, erase=1.0).draw(0, 0, "a", 4, 12)
    straight, turned = (
        ops.patches(images, None, 12, augmentation=torch.from_numpy(x), dtype=torch.float32).view(4, 3, 12, 12)
        for x in (drawn, mirrored(drawn, 12))
    )
    assert (straight.flip(3) - turned).abs().max() <= 1


def test_what_is_drawn_for_a_sample_depends_on_nothing_else(world):
    _, _, cache, rows = world
    found = {}
    for batch_size, workers in ((4, 1), (2, 3)):
        recipe = dataclasses.replace(RECIPE, batch_size=batch_size, augment="crop=0.5,noise=3", flip=0.5)
        for batch in loader(world, ResidentImages(cache, rows, CPU), recipe, workers=workers).epoch(3):
            for name, parameters in zip(batch.ids, batch.images.augmentation, strict=True):
                assert torch.equal(found.setdefault(name, parameters), parameters)
    assert len(found) == 10
    assert len({tuple(x.flatten().tolist()) for x in found.values()}) == 10
    assert all(torch.equal(x[0, :4], x[k, :4]) for x in found.values() for k in (1, 2)), "images of a pair are cut alike"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("crop", "--augment: 'crop' needs a number"),
        ("crop=a", "--augment: 'crop=a' needs a number"),
        ("zoom=1", "--augment: 'zoom=1' is none of crop, brightness"),
        ("crop=0.5,crop=0.6", "'crop=0.6' is none of .*each once"),
        ("same_colours=maybe", "needs yes or no"),
        ("noise=300", "--augment: noise must be from 0 to 255"),
        ("crop=nan", "--augment: crop must be from 0.05 to 1"),
    ],
)
def test_a_flag_that_says_nothing_is_refused(text, sentence):
    with pytest.raises(FastidcError, match=sentence):
        Augmentation.parse(text)


def test_a_flag_says_what_is_drawn():
    assert Augmentation.parse("") == Augmentation()
    assert not Augmentation.parse(" ")
    said = Augmentation.parse("crop=0.8, brightness=0.2,contrast=0.1,saturation=0.3,noise=4,erase=0.25,erase-area=0.1,same-colours=no")
    assert said == Augmentation(0.8, 0.2, 0.1, 0.3, 4, 0.25, 0.1, False)


@pytest.mark.parametrize("device", [CPU, pytest.param(torch.device("cuda:0"), marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("augment", ["", "crop=0.6,noise=5"], ids=["plain", "augmented"])
def test_captured_steps_read_the_store(world, augment, device):
    """Losses of a run from a store on the device, captured, from pixels that travel, and eager."""
    _, _, cache, rows = world
    losses = []
    words = vocabulary_of(all_captions(world[0]["train"]))
    config = worlds.SMALL.replace(image_size=SIZE, patch_size=4, dropout=0.0, vocabulary=words, vocab_size=len(words))
    for resident_, graph in ((True, True), (False, True), (True, False)):
        torch.manual_seed(0)
        model = CLIP4IDC(config).to(device)
        recipe = dataclasses.replace(RECIPE, augment=augment, flip=0.5, lr=1e-3)
        source = ResidentImages(cache, rows, device) if resident_ else CachedImages(cache, rows)
        optimizer = Optimizer(model, "finetune", recipe, 20)
        trainer = Trainer(
            model, objectives("finetune", recipe, ALONE), optimizer, ALONE, device, Precision("fp32", device.type), graphs=graph
        )
        batches = PairLoader("finetune", world[0]["train"], Tokenizer.of(config), source, recipe, pinned=device.type == "cuda")
        losses.append([float(trainer.step([batch])[0]) for epoch in range(4) for batch in batches.epoch(epoch)])
    assert losses[0] == losses[1]
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[2]), rtol=1e-5)
