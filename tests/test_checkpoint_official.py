"""The official layout as we write it: names, order, dtypes, bytes, and what it cannot hold."""

import pickletools
import zipfile
from collections import OrderedDict

import golden
import pytest
import torch
import worlds

from fastidc import checkpoint
from fastidc.config import ModelConfig
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC

CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)


def test_official_fp16_tensors_are_those_of_the_specification():
    """195 tensors, 125,836,288 elements in fp16; 25,520,897 (stage 1) and 47,904,257 in fp32, aliases once (clip4idc.md 1.3)."""
    for layers, single in ((0, 25_520_897), (3, 47_904_257)):
        config = ModelConfig(captioner_layers=layers)
        with torch.device("meta"):
            cast = checkpoint.official_dtypes(dict(CLIP4IDC(config).named_parameters()))
        keys = checkpoint.official_keys(config)
        assert len(keys) == (443 if layers else 307)
        assert len(checkpoint.official_keys(config, pair=False)) == 302
        written = checkpoint.to_official(cast, keys)
        halves = [key for key, t in written.items() if t.dtype == torch.float16]
        assert len(halves) == 195
        assert all(checkpoint.is_half_officially(checkpoint.our_name(key)[0]) for key in halves)
        assert sum(t.numel() for t in cast.values() if t.dtype == torch.float16) == 125_836_288
        assert sum(t.numel() for t in cast.values() if t.dtype == torch.float32) == single


def test_official_files_are_what_the_official_code_loads(tmp_path):
    """An OrderedDict of plain tensors: no view, aliases stored once, nothing pickled that torch 1.7 does not know; bytes by values alone."""
    weights = dict(CLIP4IDC(CONFIG).named_parameters())
    for name in ("pytorch_model.bin.0", "other.bin"):
        checkpoint.save_official(tmp_path / name, CONFIG, weights)
    assert (tmp_path / "pytorch_model.bin.0").read_bytes() == (tmp_path / "other.bin").read_bytes()
    state = torch.load(tmp_path / "other.bin", weights_only=True)
    assert type(state) is OrderedDict
    assert set(state) == set(worlds.with_aliases(worlds.official_state(CONFIG, "caption")))
    for key, tensor in state.items():
        assert type(tensor) is torch.Tensor
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, key
    stored = {t.data_ptr() for t in state.values()}
    assert len(stored) == len(state) - 3
    assert state["decoder.classifier.cls.predictions.decoder.weight"].data_ptr() == state["clip.token_embedding.weight"].data_ptr()
    with zipfile.ZipFile(tmp_path / "other.bin") as archive:
        code = archive.read("archive/data.pkl")
    named = {arg for op, arg, _ in pickletools.genops(code) if op.name == "GLOBAL"}
    assert named == {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}


@pytest.mark.parametrize("name", [*golden.STAGES["adapt"], *golden.STAGES["caption"]])
def test_golden_keys_in_their_order(name):
    """The order of our official files is that of the official model's own state dict."""
    g = golden.load(name)
    shape = g.meta["config"]
    layers = shape["captioner_layers"] if name in golden.STAGES["caption"] else 0
    config = CONFIG.replace(vision_layers=shape["vision_layers"], intra_layers=1, text_layers=shape["text_layers"], captioner_layers=layers)
    assert checkpoint.official_keys(config) == list(g.meta["keys"])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocabulary": (0, 5, 9, 49406, 49407), "vocab_size": 5}, r"holds 5 of CLIP's BPE ids \(field vocabulary\)"),
        ({"pair_input": "difference"}, 'the model has pair_input "difference"'),
        ({"head_dim": 32}, "heads of head_dim 32"),
    ],
)
def test_official_layout_refuses_what_it_cannot_express(tmp_path, changes, sentence):
    config = CONFIG.replace(**changes)
    with pytest.raises(FastidcError, match=rf"m\.bin: .*{sentence}"):
        checkpoint.save_official(tmp_path / "m.bin", config, dict(CLIP4IDC(config).named_parameters()))
    assert not list(tmp_path.iterdir())


def test_unwritable_places_are_sentences(tmp_path):
    weights = dict(CLIP4IDC(CONFIG).named_parameters())
    (tmp_path / "file").write_text("")
    for write in (checkpoint.save_official, checkpoint.save_openai):
        with pytest.raises(FastidcError, match=r"m\.bin cannot be written \(.+\); choose a folder"):
            write(tmp_path / "file" / "m.bin", CONFIG, weights)
        (tmp_path / "d" / "m.bin").mkdir(parents=True, exist_ok=True)
        with pytest.raises(FastidcError, match=r"m\.bin cannot be written"):
            write(tmp_path / "d" / "m.bin", CONFIG, weights)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["m.bin"], "what was written aside is gone"
    del weights["text_encoder.projection"]
    with pytest.raises(FastidcError, match=r"the weights lack tensor text_encoder\.projection"):
        checkpoint.save_official(tmp_path / "m.bin", CONFIG, weights)
