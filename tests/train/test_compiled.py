"""torch.compile around the captioner: when, the same numbers, one graph a bucket, and what is said of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worlds
from torch._dynamo.utils import counters
from tqdm import tqdm

from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC
from fastidc.packed import PackedCaptions
from fastidc.train.compiled import compile_captioner, refusals_as_sentences, shown_in

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Graphs are kept by function, whatever model they were made for."""
    torch._dynamo.reset()
    counters.clear()


def small(dropout: float) -> tuple[CLIP4IDC, torch.Tensor]:
    torch.manual_seed(0)
    model = CLIP4IDC(worlds.SMALL.replace(dropout=dropout, captioner_layers=1)).train()
    return model, torch.randn(2, 2, 2 * worlds.SMALL.image_tokens, worlds.SMALL.embed_dim)


def losses(model: CLIP4IDC, tokens: torch.Tensor, length: int) -> list[torch.Tensor]:
    """The loss of captions of ``length`` tokens, and every gradient."""
    ids = torch.randint(1, worlds.SMALL.vocab_size, (2, 2, 1, length), generator=torch.Generator().manual_seed(length))
    loss = model.token_losses(tokens, ids, ids.roll(-1)).sum()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.captioner.parameters()))]


def test_the_same_numbers_and_one_graph_a_bucket():
    model, tokens = small(0.0)
    lengths = (5, 7, 8, 9, 7, 12, 5)
    want = [losses(model, tokens, length) for length in lengths]
    names = ["loss", *(name for name, _ in model.captioner.named_parameters())]
    compile_captioner(model, backend="aot_eager")
    counters.clear()
    for length, given in zip(lengths, want, strict=True):
        total = sum(float(x.norm()) ** 2 for x in given[1:]) ** 0.5
        for name, a, b in zip(names, losses(model, tokens, length), given, strict=True):
            assert float((a - b).norm()) <= 5e-6 * max(float(b.norm()), 1e-2 * total), f"{name} at {length}"
    assert counters["stats"]["unique_graphs"] == 2  # 8 and 16 tokens, however often
    assert not counters["graph_break"]


def test_packed_captions_of_any_number_of_words_are_one_graph():
    model, tokens = small(0.0)
    ids = torch.randint(1, worlds.SMALL.vocab_size, (2, 2, 1, 12), generator=torch.Generator().manual_seed(0))
    want = model.token_losses(tokens, ids, ids.roll(-1))
    compile_captioner(model, backend="aot_eager")
    counters.clear()
    for kinds in ((32, 32), (64, 32), (64, 96)):
        captions = PackedCaptions.of(ids, ids.roll(-1), kinds, 16)
        assert torch.allclose(model.packed_token_losses(tokens, captions), want, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_more_sizes_than_are_allowed():
    """More of them than torch allows by itself; past the limit, a sentence."""
    model, tokens = small(0.0)
    compile_captioner(model, backend="eager")
    assert torch._dynamo.config.recompile_limit >= 64

    def run(pairs: int) -> None:
        ids = torch.ones(pairs, 1, 1, 5, dtype=torch.long)
        model.token_losses(tokens[:1, :1].expand(pairs, -1, -1, -1), ids, ids)

    sentence = r"torch.compile cannot compile the captioner .*; train with --compile off"
    with torch._dynamo.config.patch(recompile_limit=1):
        run(1)
        with pytest.raises(FastidcError, match=sentence), refusals_as_sentences():
            run(2)


def test_dropout_is_inside():
    model, tokens = small(0.5)
    compile_captioner(model, backend="aot_eager")
    torch.manual_seed(1)
    first, second = (losses(model, tokens, 5)[0] for _ in range(2))
    torch.manual_seed(1)
    assert first == losses(model, tokens, 5)[0]
    assert first != second
    model.eval()
    assert losses(model, tokens, 5)[0] == losses(model, tokens, 5)[0]


def test_a_compiler_that_fails_is_a_sentence():
    def fails(graph, inputs):
        raise RuntimeError("no compiler on this machine")

    model, tokens = small(0.0)
    compile_captioner(model, backend=fails)
    with pytest.raises(FastidcError, match=r"torch.compile cannot compile the captioner .*no compiler.*; train with --compile off"), refusals_as_sentences():  # fmt: skip
        losses(model, tokens, 5)


def test_the_progress_bar_says_what_takes_so_long(monkeypatch):
    model, tokens = small(0.0)
    compile_captioner(model, backend="aot_eager")
    said: list[str] = []
    with open(os.devnull, "w") as nowhere, tqdm(desc="finetune", file=nowhere) as bar:
        monkeypatch.setattr(bar, "set_description", said.append)
        with shown_in(bar, True):
            losses(model, tokens, 5)
    assert said[0] == "finetune, compiling"
    assert said[-1].startswith("finetune (compiled in ")


@pytest.mark.slow
def test_a_compiled_run_is_the_uncompiled_one_and_its_graphs_are_kept(clevr, tmp_path):
    """`fastidc finetune --compile on`, twice, and without: losses alike; the second time the graphs come from the cache."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    script = "import sys; from fastidc.cli import main; from torch._dynamo.utils import counters; code = main(); "
    script += "print('made', counters['inductor']['fxgraph_cache_miss']); sys.exit(code)"
    flags = f"finetune --data {clevr} --preset tiny --steps 3 --batch-size 4 --device cpu --precision fp32 --workers 1 --out"

    def run(name: str, choice: str) -> tuple[list[float], int]:
        command = [sys.executable, "-c", script, *flags.split(), str(tmp_path / name), "--compile", choice]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("compiled in" in done.stderr) == (choice == "on")
        rows = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows], int(done.stdout.rsplit("made", 1)[1])

    eager, compiled, again = run("eager", "off"), run("compiled", "on"), run("again", "on")
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4)
    assert again[0] == pytest.approx(compiled[0], rel=1e-5)
    assert compiled[1] > 0
    assert again[1] == 0
