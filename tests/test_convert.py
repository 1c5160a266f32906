"""`fastidc convert`: there and back again in every direction, bit for bit; what is refused; and the goldens through a file of ours."""

import json
import os
from collections import OrderedDict

import compare
import golden
import pytest
import torch
import worlds
from safetensors.torch import load_file, save_file

from fastidc import checkpoint
from fastidc.cli import main
from fastidc.convert import convert, layout_of
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC

CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)
STAGE_1 = CONFIG.replace(captioner_layers=0)
EXTRAS = {"input_resolution": CONFIG.image_size, "context_length": CONFIG.context_length, "vocab_size": CONFIG.vocab_size}


def in_official_dtypes(state):
    return {key: t.half() if checkpoint.is_half_officially(checkpoint.our_name(key)[0]) else t for key, t in state.items()}


def official_file(path, stage):
    """As the official trainer leaves it: tied tensors, fp16 and fp32, the metadata that ``Module.state_dict`` hangs on."""
    state = in_official_dtypes(worlds.official_state(CONFIG, stage))
    state = OrderedDict(reversed((worlds.with_aliases(state) if stage == "caption" else state).items()))
    state._metadata = OrderedDict({"": {"version": 1}})
    torch.save(state, path)
    return state


def clip_file(path):
    state = in_official_dtypes(worlds.official_state(CONFIG, "clip"))
    state = {key.removeprefix("clip."): t for key, t in state.items()} | {k: torch.tensor(v) for k, v in EXTRAS.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return state


def loaded(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def assert_same(actual, expected):
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


def folder(path, config=CONFIG, extra=None):
    torch.manual_seed(0)
    checkpoint.save(path, config, dict(CLIP4IDC(config).named_parameters()), extra)
    return path


def model_field(path):
    return json.loads((path / "config.json").read_text())["model"]


@pytest.mark.parametrize("config", [CONFIG, STAGE_1], ids=["caption", "adapt"])
@pytest.mark.parametrize("intra_layers", [None, 1])
def test_folder_to_official_and_back(tmp_path, config, intra_layers):
    a = folder(tmp_path / "a", config.replace(intra_layers=intra_layers or config.intra_layers))
    there = convert(a, tmp_path / "pytorch_model.bin.3")
    assert there.layout == "official"
    assert there.tensors == len(checkpoint.official_keys(config)) == len(torch.load(there.out, weights_only=True))
    hint = "an official file does not say its split: read it with --intra-layers 1"
    assert there.notes == ((hint,) if intra_layers else ())
    convert(there.out, tmp_path / "b", intra_layers=intra_layers)
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (a / "model.safetensors").read_bytes()
    assert json.dumps(model_field(tmp_path / "b")) == json.dumps(model_field(a))
    convert(tmp_path / "b", tmp_path / "again.bin")
    assert (tmp_path / "again.bin").read_bytes() == there.out.read_bytes()


@pytest.mark.parametrize("stage", ["adapt", "caption"])
def test_official_to_folder_and_back(tmp_path, stage):
    state = official_file(tmp_path / "theirs.bin", stage)
    done = convert(tmp_path / "theirs.bin", tmp_path / "ours")
    halves = sum(t.dtype == torch.float16 for t in state.values())
    assert dict(done.dtypes)["float16"] == halves
    assert done.notes == ("intra_layers 2 of 3; the source does not say (--intra-layers)",)
    convert(tmp_path / "ours", tmp_path / "back.bin")
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert_same(back, state)
    if stage == "caption":
        for alias in ("embeddings.word_embeddings", "classifier.cls.predictions.decoder"):
            assert back[f"decoder.{alias}.weight"].data_ptr() == back["clip.token_embedding.weight"].data_ptr()
    convert(tmp_path / "theirs.bin", tmp_path / "direct.bin")
    assert (tmp_path / "direct.bin").read_bytes() == (tmp_path / "back.bin").read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_openai_to_folder_and_back(tmp_path, suffix):
    source = tmp_path / f"ViT{suffix}"
    state = clip_file(source)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / f"back{suffix}")
    assert_same(loaded(tmp_path / f"back{suffix}"), state)
    convert(source, tmp_path / f"direct{suffix}")
    assert (tmp_path / f"direct{suffix}").read_bytes() == (tmp_path / f"back{suffix}").read_bytes()
    other = tmp_path / ("other.pt" if suffix == ".safetensors" else "other.safetensors")
    convert(source, other)
    assert_same(loaded(other), state)


@pytest.mark.parametrize("asked", [{}, {"captioner_layers": 2, "intra_layers": 1, "pair_input": "difference"}])
def test_a_clip_in_a_folder_reads_as_the_clip_does(tmp_path, asked):
    """What a CLIP lacks is drawn at random, the same from the same seed."""
    clip_file(tmp_path / "ViT.pt")
    done = convert(tmp_path / "ViT.pt", tmp_path / "ours")
    assert "drawn at random when the folder is read: pair_encoder.before_embedding," in done.notes[0]
    assert not [name for name in load_file(tmp_path / "ours" / "model.safetensors") if "joint" in name or "inter" in name]
    models = []
    for source in ("ViT.pt", "ours"):
        torch.manual_seed(5)
        models.append(CLIP4IDC.from_pretrained(tmp_path / source, **asked))
    assert models[0].config == models[1].config
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.parametrize("source", ["ViT.pt", "ours"])
def test_a_clip_is_no_official_checkpoint(tmp_path, source):
    clip_file(tmp_path / "ViT.pt")
    convert(tmp_path / "ViT.pt", tmp_path / "ours")
    with pytest.raises(FastidcError, match=r"m\.bin: an official checkpoint holds the pair parameters .* adapt it first"):
        convert(tmp_path / source, tmp_path / "m.bin")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ViT.pt", "ours"]


def test_a_model_as_clip_loses_what_a_clip_lacks(tmp_path):
    a = folder(tmp_path / "a")
    done = convert(a, tmp_path / "new" / "clip.safetensors")
    assert done.notes == ("left out, as a CLIP does not have them: 5 pair parameters and 71 tensors of the captioner",)
    assert set(load_file(done.out)) == {key.removeprefix("clip.") for key in worlds.official_state(CONFIG, "clip")}
    assert torch.equal(load_file(done.out)["visual.proj"], load_file(a / "model.safetensors")["pair_encoder.projection"])


def test_unknown_keys_are_named(tmp_path):
    state = worlds.official_state(CONFIG, "adapt")
    strays = [f"clip.stray_{i}" for i in range(4)] + ["clip.visual.transformer.resblocks.0.ln_1.extra"]
    torch.save(state | dict.fromkeys(strays, torch.zeros(1)), tmp_path / "m.bin")
    done = convert(tmp_path / "m.bin", tmp_path / "out")
    assert done.notes[0] == ("left out, as no part of the model: 5 unknown keys (clip.stray_0, clip.stray_1, clip.stray_2 and 2 more)")


def test_dtypes(tmp_path):
    a = folder(tmp_path / "a")
    done = convert(a, tmp_path / "m.bin", dtype="official")
    assert done.aliases == 3
    halves = {key for key, t in torch.load(done.out, weights_only=True).items() if t.dtype == torch.float16}
    assert halves == {key for key, t in in_official_dtypes(worlds.official_state(CONFIG, "caption")).items() if t.dtype == torch.float16}
    assert set(convert(done.out, tmp_path / "b", dtype="fp32").dtypes) == {"float32"}
    weights = load_file(a / "model.safetensors")
    weights["text_encoder.projection"] *= 1e7
    checkpoint.save(a, CONFIG, weights)
    with pytest.raises(FastidcError, match=r"tensor text_encoder.projection has values beyond fp16's 65504"):
        convert(a, tmp_path / "n.bin", dtype="official")
    assert not (tmp_path / "n.bin").exists()


def test_a_run_keeps_what_its_config_says(tmp_path):
    a = folder(tmp_path / "a", extra={"preset": "spot", "run": {"steps": 3}})
    convert(a, tmp_path / "b", dtype="official")
    both = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert both[0] == both[1]


def test_what_a_probability_of_a_change_needs_goes_along(tmp_path):
    a = folder(tmp_path / "a")
    (a / "no_change.json").write_text('{"sentences": ["nothing"],  "calibration": null}')
    done = convert(a, tmp_path / "b", dtype="official")
    assert (tmp_path / "b" / "no_change.json").read_bytes() == (a / "no_change.json").read_bytes(), "to the byte"
    assert done.bytes == sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    convert(tmp_path / "b", tmp_path / "b", overwrite=True, dtype="fp32")  # onto itself
    assert (tmp_path / "b" / "no_change.json").read_bytes() == (a / "no_change.json").read_bytes()
    convert(a, tmp_path / "m.bin")
    convert(tmp_path / "m.bin", tmp_path / "b", overwrite=True)
    assert not (tmp_path / "b" / "no_change.json").exists(), "what another model was calibrated with does not stay"


def test_layout_by_name(tmp_path):
    names = {"x": "fastidc", "x.y/": "fastidc", "m.bin": "official", "pytorch_model.bin.12": "official", "a.pt": "openai"}
    for name, layout in (names | {"a.safetensors": "openai", "pytorch_model.bin.spot": "official", str(tmp_path): "fastidc"}).items():
        assert layout_of(name) == layout
    with pytest.raises(FastidcError, match=r"m\.binary: the name does not tell the layout; .* or give --layout"):
        layout_of("m.binary")


def test_what_exists_is_not_replaced(tmp_path):
    a = folder(tmp_path / "a")
    for name in ("m.bin", "b"):
        convert(a, tmp_path / name)
        with pytest.raises(FastidcError, match=rf"{name}: already exists; choose another DST, or add --overwrite"):
            convert(a, tmp_path / name)
        convert(a, tmp_path / name, overwrite=True, dtype="official")
        assert torch.float16 in {t.dtype for t in checkpoint.read(tmp_path / name, keep_dtype=True).weights.values()}
    convert(tmp_path / "b", tmp_path / "b", overwrite=True, dtype="fp32")  # onto itself
    assert {t.dtype for t in checkpoint.read(tmp_path / "b", keep_dtype=True).weights.values()} == {torch.float32}
    (tmp_path / "b" / "log.jsonl").write_text("")
    for out, options, sentence in (
        ("b", {}, "b: holds log.jsonl, which no conversion writes"),
        ("m.bin", {"layout": "fastidc"}, "m.bin: is a file, and a fastidc checkpoint is a folder"),
        ("b", {"layout": "official"}, "b: is a folder, and the official layout is a file"),
        ("c", {"layout": "hf"}, "unknown layout 'hf'; choose one of fastidc, official, openai"),
    ):
        with pytest.raises(FastidcError, match=sentence):
            convert(a, tmp_path / out, overwrite=True, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "m.bin"], "nothing else was left"


def test_a_failed_write_leaves_the_old_folder(tmp_path, monkeypatch):
    a, b = folder(tmp_path / "a"), folder(tmp_path / "b", STAGE_1)
    before = {p.name: p.read_bytes() for p in b.iterdir()}
    rename = os.rename

    def full(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(FastidcError, match=r"b cannot be written \(No space left on device\)"):
        convert(a, b, overwrite=True)
    with pytest.raises(FastidcError, match="cannot be written"):
        convert(a, tmp_path / "c")
    assert {p.name: p.read_bytes() for p in b.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_command_line(tmp_path, capsys):
    a = folder(tmp_path / "a")
    assert main(["convert", str(a), str(tmp_path / "deep" / "pytorch_model.bin.0"), "--dtype", "official"]) == 0
    size = (tmp_path / "deep" / "pytorch_model.bin.0").stat().st_size / 1e6
    said = capsys.readouterr().out
    assert f": official layout, 173 tensors (43 float16, 130 float32), 3 of them aliases, {size:.1f} MB" in said
    assert main(["convert", str(a), str(tmp_path / "deep" / "pytorch_model.bin.0")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent"), str(tmp_path / "x")]) == 2
    assert main(["convert", str(a), f"{tmp_path}/new.dir/", "--dtype", "fp32"]) == 0
    assert sorted(p.name for p in (tmp_path / "new.dir").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", [*golden.STAGES["adapt"], *golden.STAGES["caption"]])
def test_golden_through_an_official_file_of_ours(name, tmp_path):
    """The golden's weights, written by us in the official layout and read back, give the official code's outputs again."""
    g = golden.load(name)
    torch.save(g.weights, tmp_path / "theirs.bin")
    first = CLIP4IDC.from_pretrained(tmp_path / "theirs.bin", intra_layers=g.intra_layers)
    assert first.config.head_dim == 64, "as the official code takes it"
    checkpoint.save_official(tmp_path / "pytorch_model.bin.0", first.config, dict(first.named_parameters()))
    assert list(torch.load(tmp_path / "pytorch_model.bin.0", weights_only=True)) == list(g.weights)
    model = CLIP4IDC.from_pretrained(tmp_path / "pytorch_model.bin.0", intra_layers=g.intra_layers).eval()
    before, after = g.images.unbind(1)
    with torch.no_grad():
        embedding, tokens = model.encode_pair(before, after)
        if name in golden.STAGES["adapt"]:
            compare.assert_close(embedding, g["pair_embedding"], compare.GOLDEN_FORWARD, "pair_embedding")
            compare.assert_close(model.encode_text(g["input_ids"]), g["text_embedding"], compare.GOLDEN_FORWARD, "text_embedding")
            compare.assert_close(model.adaptation_loss(before, after, g["input_ids"]), g["loss"], compare.GOLDEN_FORWARD, "loss")
        else:
            compare.assert_close(tokens, g["visual_hidden"], compare.GOLDEN_FORWARD, "visual_hidden")
            loss = model.caption_loss(before, after, g["input_caption_ids"], g["output_caption_ids"])
            compare.assert_close(loss, g["loss"], compare.GOLDEN_FORWARD, "loss")
            assert model.generate(before, after, max_length=32, stop_early=False).tolist() == g["greedy_ids"].tolist()
