"""What each of two processes does for test_processes.py; torchrun starts it. Arguments: data, CLIP, adapted checkpoint, decoder, out."""

import functools
import json
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from fastidc import ops
from fastidc.data.loaders import PairLoader
from fastidc.errors import FastidcError
from fastidc.evaluate import background
from fastidc.evaluate.captions import CaptionScorer
from fastidc.train import examiner
from fastidc.train.distributed import World, processes
from fastidc.train.official import main

RETRIEVAL = (
    "--do_train --datatype clevr --batch_size 8 --lr 1e-3 --coef_lr 1e-2 --intra_num_hidden_layers 2 --device cpu --precision fp32 --seed 3"
)


def loss_inputs() -> list[torch.Tensor]:
    """text [8, 6], pair [8, 6] and logit_scale []."""
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(8, 6, generator=g, dtype=torch.float64),
        torch.randn(8, 6, generator=g, dtype=torch.float64),
        torch.tensor(1.5).double(),
    ]


def gradients(world: World) -> dict[str, list]:
    """The loss and the averaged gradients of info_nce over both processes, as DistributedDataParallel would average them."""
    out = {}
    for mode in ("full", "local"):
        text, pair, scale = loss_inputs()
        weight = torch.eye(6, dtype=torch.float64, requires_grad=True)  # a tower of one matrix
        scale.requires_grad_()
        rows = slice(4 * world.rank, 4 * world.rank + 4)
        loss = ops.info_nce(text[rows] @ weight, pair[rows] @ weight, scale, group=world.group, gather_grad=mode)
        loss.backward()
        out[mode] = [world.mean(x).tolist() for x in (loss.detach(), weight.grad, scale.grad)]
    return out


def talk(world: World) -> list:
    """`World`'s few methods; every process gets the same answers."""
    items = list(range(7))
    rows = torch.arange(14.0).view(7, 2)
    together = world.gather_rows(rows[world.rank :: world.size])
    assert (together is None) == (world.rank != 0)
    assert together is None or torch.equal(together, rows)
    big = torch.zeros(4000, 256)  # 4 MB; row by row it was 16 GB, because every row took all of them with it
    world.gather_rows(big)
    said = [world.gather(world.share(items)), world.broadcast(f"from {world.rank}"), world.on_main(lambda: world.rank)]
    try:
        world.on_main(lambda: (_ for _ in ()).throw(FastidcError("refused on the first")))
    except FastidcError as error:
        said.append(str(error))
    try:
        world.on_main(lambda: 1 // 0)
    except (FastidcError, ZeroDivisionError) as error:
        said.append(type(error).__name__)
    return said


def watch_samples(seen: dict) -> None:
    """Notes which samples this process reads."""
    original = PairLoader._collate

    def collate(self, samples, images, epoch):
        seen.setdefault("ids", []).append([sample.id for sample in samples])
        return original(self, samples, images, epoch)

    PairLoader._collate = collate


def run() -> None:
    data, clip, adapted, decoder, out = map(Path, sys.argv[1:])
    background.CaptionScorer = functools.partial(CaptionScorer, meteor=False)
    with processes("cpu") as (world, _):  # torchrun's store allows one group a process, so every run below uses this one
        facts: dict = {"gradients": gradients(world), "talk": talk(world)}
        seen: dict = {}
        watch_samples(seen)
        common = [*RETRIEVAL.split(), "--data_path", str(data)]
        start = ["--pretrained_clip_name", str(clip)]
        codes = [main([*common, *start, "--epochs", "3", "--gather-grad", "full", "--output_dir", str(out / "retrieval")])]
        facts["ids"] = seen.pop("ids")
        codes.append(main([*common, *start, "--epochs", "1", "--output_dir", str(out / "local")]))
        caption = [*common, "--task_type", "caption", "--init_model", str(adapted), "--decoder_model", str(decoder)]
        codes.append(main([*caption, "--epochs", "7", "--token-mean", "global", "--output_dir", str(out / "caption")]))
        codes.append(main([*common, *start, "--batch_size", "7", "--output_dir", str(out / "ragged")]))
        # only the first process scores: what it finds must stop both
        examiner.CaptionScorer = Worse
        codes.append(main([*caption, "--epochs", "40", "--output_dir", str(out / "stopped")]))
        facts["codes"] = codes
    facts["initialised"] = dist.is_initialized()
    (out / f"rank{world.rank}.json").write_text(json.dumps(facts))


class Worse(CaptionScorer):
    """Every epoch scores less than the one before."""

    scores = iter(range(1000, 0, -1))

    def score(self, hypotheses):
        return {
            **dict.fromkeys(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"), 0.0),
            "METEOR": None,
            "CIDEr": next(self.scores) / 1000,
        }

    def by_subset(self, hypotheses, types=None):
        return {"overall": self.score(hypotheses) | {"pairs": len(hypotheses), "METEOR_reason": "none"}}


if __name__ == "__main__":
    run()
