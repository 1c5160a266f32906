"""`fastidc export --program`: greedy captions of a `torch.export` program are those of `CLIP4IDC.generate`, with torch alone."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

pytest.importorskip("open_clip", reason="the tokenizer needs the package open_clip_torch: install it")

import worlds
from describe.cases import CAPTIONS, image_pairs, run_folder

from fastidc import CLIP4IDC, Describer, Tokenizer, checkpoint
from fastidc.config import END_ID, START_ID
from fastidc.errors import FastidcError
from fastidc.share import export_program
from fastidc.tokenizer import vocabulary_of

MAX_WORDS = 9

# Bytes of unknown words, an accent cut in two by the BPE, the pad, the ends.
SENTENCES = ("the red cube's gone, isn't it?", "la boîte à café n'est plus là", "猫が 2 匹", "wow! nothing after this", "")
NOTHING_OF_OURS = """
import sys
for name in ("fastidc", "fastidc_kernels", "open_clip", "safetensors"):
    sys.modules[name] = None
import torch
extra = {"example.py": ""}
torch.export.load(sys.argv[1], extra_files=extra)
exec(compile(extra["example.py"], "example.py", "exec"))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """As small as a model can be, because what takes time is the number of its operators."""
    path, ids = tmp_path_factory.mktemp("runs") / "run", vocabulary_of(CAPTIONS)
    shape = {"vision_layers": 2, "intra_layers": 1, "text_layers": 1, "captioner_layers": 1, "pair_input": "difference"}
    config = worlds.SMALL.replace(vocabulary=ids, vocab_size=len(ids), **shape)
    weights = checkpoint.from_official(worlds.official_state(config, "caption", 4))
    checkpoint.save(path, config, weights, {"recipe": {"max_words": MAX_WORDS}})
    return path


@pytest.fixture(scope="module")
def program(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("programs") / "captions.pt2"
    export_program(run, out)
    return out


def pairs(count, size, seed=0):
    return torch.randint(0, 256, (2, count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_same_ids_for_any_batch(run, program):
    extra = dict.fromkeys(("metadata.json", "vocabulary.json"), "")
    loaded = torch.export.load(program, extra_files=extra).module()
    model = CLIP4IDC.from_pretrained(run)
    ended = set()
    for count in (1, 2, 16):
        before, after = pairs(count, model.config.image_size, count)
        expected = model.generate(before, after, MAX_WORDS)
        with torch.no_grad():
            assert torch.equal(loaded(before, after), expected)
        ended |= {bool((row == model.config.end_id).any()) for row in expected}
    assert ended == {True, False}, "captions that end and captions that are cut"
    metadata, vocabulary = (json.loads(extra[name]) for name in ("metadata.json", "vocabulary.json"))
    config = model.config
    shown = {"image_size": config.image_size, "max_words": MAX_WORDS, "start_id": config.start_id, "end_id": config.end_id}
    assert {key: metadata[key] for key in shown} == shown
    assert len(vocabulary) == config.vocab_size


def test_the_archive_holds_no_code_and_no_path(program):
    with zipfile.ZipFile(program) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    assert not [name for name, data in held.items() if os.path.dirname(__file__).encode() in data or b"fastidc/share" in data]
    assert b"fastidc::" not in held[next(name for name in held if name.endswith("models/model.json"))], "operators of torch alone"


@pytest.mark.parametrize("restricted", [True, False])
def test_vocabulary_writes_what_the_tokenizer_does(restricted):
    whole = Tokenizer()
    ids = [whole.encode(text) for text in SENTENCES]
    rows = tuple(sorted({0, START_ID, END_ID}.union(*ids))) if restricted else None
    tokenizer = Tokenizer(rows)
    words = tokenizer.words()
    assert len(words) == (len(rows) if restricted else END_ID + 1)
    for text in SENTENCES:
        row = [tokenizer.start, *tokenizer.encode(text), tokenizer.end, 0, 0]
        written = b"".join(words[i] for i in row[: row.index(tokenizer.end)]).decode("utf-8", "replace")
        assert " ".join(written.split("!")[0].split()) == tokenizer.decode(row)


@pytest.mark.slow
def test_whatever_the_environment_asks_for(run, tmp_path, monkeypatch):
    """A kernel of ours would be an operator that torch does not know."""
    monkeypatch.setenv("FASTIDC_BACKEND", "layer_norm=triton,attention=triton")
    export_program(run, tmp_path / "x.pt2", max_words=4)
    assert os.environ["FASTIDC_BACKEND"] == "layer_norm=triton,attention=triton"
    assert torch.export.load(tmp_path / "x.pt2").module()(*pairs(2, 48)).shape == (2, 4)


def test_refusals_leave_nothing(run, tmp_path):
    adapted = run_folder(tmp_path / "adapted", captioner=False)
    (tmp_path / "there.pt2").write_bytes(b"old")
    (tmp_path / "folder.pt2").mkdir()
    for source, name, options, sentence in (
        (run, "x.onnx", {}, r"x\.onnx: a program's name ends in \.pt2"),
        (run, "there.pt2", {}, "already exists; choose another DST, or add --overwrite"),
        (run, "folder.pt2", {"overwrite": True}, "is a folder, and a program is a file"),
        (run, "x.pt2", {"max_words": 99}, "max_words is 99; from 3"),
        (adapted, "x.pt2", {}, "this model has no captioner"),
        (tmp_path / "absent", "x.pt2", {}, "absent: no such checkpoint"),
    ):
        with pytest.raises(FastidcError, match=sentence):
            export_program(source, tmp_path / name, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapted", "folder.pt2", "there.pt2"]
    assert (tmp_path / "there.pt2").read_bytes() == b"old"


@pytest.mark.slow
def test_a_whole_model(tmp_path):
    """Several layers, each of which reads a memory of its own, [before, after], and captions of many lengths."""
    run = run_folder(tmp_path / "run")
    export_program(run, tmp_path / "x.pt2")
    model = CLIP4IDC.from_pretrained(run)
    before, after = pairs(16, model.config.image_size)
    expected = model.generate(before, after, 12)
    assert len({int((row != 0).sum()) for row in expected}) > 2, "captions of several lengths"
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "x.pt2").module()(before, after), expected)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_a_fresh_process_without_fastidc(run, program, tmp_path, count):
    """The script in the archive, run where nothing of ours can be imported."""
    images = image_pairs(tmp_path, count)
    line = [sys.executable, "-c", NOTHING_OF_OURS, str(program), *(str(path) for pair in images for path in pair)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [found.caption for found in Describer(run, "cpu", beams=1).many(images)]
