"""Every source that `from_pretrained` reads, and what it refuses."""

import json

import compare
import pytest
import torch
import worlds
from safetensors.torch import save_file

from fastidc import checkpoint
from fastidc.errors import FastidcError
from fastidc.model.clip4idc import CLIP4IDC

CONFIG = worlds.SMALL.replace(head_dim=64, vision_width=128)


def openai_state(config=CONFIG, dtype=torch.float32):
    return {key.removeprefix("clip."): t for key, t in worlds.official_state(config, "clip", dtype=dtype).items()} | {
        "input_resolution": torch.tensor(config.image_size),
        "context_length": torch.tensor(config.context_length),
        "vocab_size": torch.tensor(config.vocab_size),
    }


def weights_of(model):
    return dict(model.named_parameters())


def test_official_caption_file_round_trips_every_key(tmp_path):
    state = worlds.with_aliases(worlds.official_state(CONFIG, "caption"))
    torch.save(state, tmp_path / "pytorch_model.bin.7")
    model = CLIP4IDC.from_pretrained(tmp_path / "pytorch_model.bin.7", intra_layers=2)
    assert model.config == CONFIG
    back = checkpoint.to_official(weights_of(model), list(state))
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_alias_keys_may_be_missing_and_win_where_present(tmp_path):
    state = worlds.official_state(CONFIG, "caption")
    torch.save(state, tmp_path / "a.bin")
    assert torch.equal(CLIP4IDC.from_pretrained(tmp_path / "a.bin").text_encoder.token_embedding, state["clip.token_embedding.weight"])
    state["decoder.embeddings.word_embeddings.weight"] = state["clip.token_embedding.weight"] + 1
    torch.save(state, tmp_path / "b.bin")
    tied = CLIP4IDC.from_pretrained(tmp_path / "b.bin").text_encoder.token_embedding
    assert torch.equal(tied, state["decoder.embeddings.word_embeddings.weight"])


def test_fp16_files_become_fp32(tmp_path):
    state = worlds.official_state(CONFIG, "adapt", dtype=torch.float16)
    torch.save(state, tmp_path / "pytorch_model.bin.0")
    model = CLIP4IDC.from_pretrained(tmp_path / "pytorch_model.bin.0")
    assert model.captioner is None
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.pair_encoder.projection, state["clip.visual.proj"].float())


def test_dtypes_are_kept_where_asked(tmp_path):
    state = worlds.official_state(CONFIG, "caption")
    ours = checkpoint.from_official(state)
    mixed = checkpoint.official_dtypes(ours)
    assert {t.dtype for t in mixed.values()} == {torch.float16, torch.float32}
    checkpoint.save_official(tmp_path / "m.bin", CONFIG, mixed)
    checkpoint.save(tmp_path / "m", CONFIG, mixed)
    for source in ("m.bin", "m"):
        kept = checkpoint.read(tmp_path / source, keep_dtype=True).weights
        assert {name: t.dtype for name, t in kept.items()} == {name: t.dtype for name, t in mixed.items()}
        assert {t.dtype for t in checkpoint.read(tmp_path / source).weights.values()} == {torch.float32}


def test_adapted_file_gets_a_fresh_captioner_where_asked(tmp_path):
    torch.save(worlds.official_state(CONFIG, "adapt"), tmp_path / "pytorch_model.bin.0")
    model = CLIP4IDC.from_pretrained(tmp_path / "pytorch_model.bin.0", captioner_layers=3)
    assert len(model.captioner.decoder) == 3
    assert model.captioner.head.weight.std().item() == pytest.approx(0.02 * (512 / 64) ** 0.5, rel=0.1), (
        "the official 0.02 at the official width"
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_openai_state_dict(tmp_path, suffix):
    state, path = openai_state(), tmp_path / f"ViT-B-32{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = CLIP4IDC.from_pretrained(path)
    assert torch.equal(model.pair_encoder.blocks[1].attention.qkv.weight, state["visual.transformer.resblocks.1.attn.in_proj_weight"])
    fresh = model.pair_encoder
    assert torch.equal(fresh.inter_norm.weight, torch.ones(128))
    assert fresh.joint_position.std().item() == pytest.approx(128**-0.5, rel=0.1)


def test_openai_torchscript_archive(tmp_path):
    """OpenAI's own downloads are TorchScript archives."""

    class Archive(torch.nn.Module):
        def __init__(self, state):
            super().__init__()
            for key, value in state.items():
                *path, leaf = key.split(".")
                module = self
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                module.register_buffer(leaf, value)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    state = openai_state()
    torch.jit.script(Archive(state)).save(str(tmp_path / "ViT-B-32.pt"))
    model = CLIP4IDC.from_pretrained(tmp_path / "ViT-B-32.pt")
    assert torch.equal(model.text_encoder.projection, state["text_projection"])


def test_fastidc_folder_round_trip(tmp_path):
    config = CONFIG.replace(pair_input="difference", dropout=0.2)
    model = CLIP4IDC(config)
    checkpoint.save(tmp_path / "run", config, weights_of(model), {"preset": "tiny"})
    again = CLIP4IDC.from_pretrained(tmp_path / "run")
    assert again.config == config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(FastidcError, match=r"config.json: the model has intra_layers 2, which is part of it; 1 was asked for"):
        CLIP4IDC.from_pretrained(tmp_path / "run", intra_layers=1)


def test_restricted_vocabulary_survives_the_round_trip(tmp_path):
    config = CONFIG.replace(vocabulary=(0, 5, 9, 49406, 49407), vocab_size=5)
    checkpoint.save(tmp_path, config, weights_of(CLIP4IDC(config)))
    assert CLIP4IDC.from_pretrained(tmp_path).config.vocabulary == (0, 5, 9, 49406, 49407)


class Gadget:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_refusals(tmp_path, capsys):
    state = worlds.official_state(CONFIG, "caption")

    def refused(name, value, sentence, **options):
        path = tmp_path / name
        if isinstance(value, bytes):
            path.write_bytes(value)
        else:
            torch.save(value, path)
        with pytest.raises(FastidcError, match=sentence) as caught:
            CLIP4IDC.from_pretrained(path, **options)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    block = "clip.visual.transformer.resblocks.1"
    lacking = {k: v for k, v in state.items() if not k.startswith(f"{block}.ln_1")}
    refused("missing.bin", lacking, rf"tensor {block}.ln_1.weight is missing \(2 in all\)")
    bare = {k.removeprefix("clip."): v for k, v in openai_state().items() if not k.startswith("visual.transformer.resblocks.1.ln_1")}
    refused("missing.pt", bare, r"tensor visual.transformer.resblocks.1.ln_1.weight is missing \(2 in all\)")
    refused(
        "shape.bin",
        state | {"clip.visual.proj": torch.zeros(128, 63)},
        r"tensor clip.visual.proj has shape \[128, 63\], the model needs \[128, 64\]",
    )
    refused("scale.bin", state | {"clip.logit_scale": torch.ones(1)}, r"tensor clip.logit_scale has shape \[1\], the model needs \[\]")
    words = "decoder.embeddings.word_embeddings.weight"
    refused("alias.bin", state | {words: torch.zeros(3)}, rf"tensor {words} has shape \[3\], 2 dimensions were expected")
    part = {k: v for k, v in state.items() if k != "decoder.encoder.layer.0.slf_attn.att.key.weight"}
    refused("part.bin", part, r"tensor decoder.encoder.layer.0.slf_attn.att.key.weight is missing \(1 in all\)")
    keys = [f"decoder.decoder.layer.1.enc_attn.att.{part}.bias" for part in ("query", "key", "value")]
    refused("parts.bin", state | {keys[2]: torch.zeros(3)}, rf"tensor {keys[2]} has shape \[3\], where {keys[1]} has \[64\]")
    packed = state | {key: torch.zeros(7) for key in keys[1:]}
    refused("packed.bin", packed, rf"tensor {keys[1]} has shape \[7\], the model needs \[64\]")
    headless = {k: v for k, v in state.items() if ".layer." not in k}
    refused("headless.bin", headless, r"tensor decoder.encoder.layer.0.slf_attn.att.query.weight is missing")
    refused("3d.bin", state | {"clip.visual.conv2.weight": torch.zeros(1)}, r"tensor clip.visual.conv2.weight is that of --linear_patch 3d")
    refused("resnet.pt", {"visual.layer1.0.conv1.weight": torch.zeros(1)}, "this is a ResNet CLIP")
    refused(
        "other.pt", {"layer.weight": torch.zeros(1)}, "tensor visual.conv1.weight is missing; this is not a ViT CLIP or CLIP4IDC checkpoint"
    )
    refused("split.bin", state, "intra_layers 4 lies outside the model; with 3 vision layers choose 1 to 3", intra_layers=4)
    refused("gadget.bin", {"clip.visual.proj": Gadget()}, "cannot be read as a checkpoint")
    refused("garbage.bin", b"<html>not found</html>", "cannot be read as a checkpoint")
    refused("empty.bin", b"", "cannot be read as a checkpoint")
    refused("cut.safetensors", b"\x10\x00\x00\x00", "cannot be read as a checkpoint")
    refused("list.bin", [torch.zeros(1)], "not a state dict")
    refused("layers.bin", state, "the captioner has 2 layers; 3 were asked for", captioner_layers=3)
    assert "ran" not in capsys.readouterr().out


def test_folder_refusals(tmp_path):
    with pytest.raises(FastidcError, match="no such checkpoint"):
        CLIP4IDC.from_pretrained(tmp_path / "absent")
    with pytest.raises(FastidcError, match=r"no config.json in this folder"):
        CLIP4IDC.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(FastidcError, match=r"config.json: cannot be read as JSON"):
        CLIP4IDC.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": {}}))
    with pytest.raises(FastidcError, match="not a fastidc config"):
        CLIP4IDC.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "fastidc", "model": {"depth": 3}}))
    with pytest.raises(FastidcError, match=r"field model\.captioner_layers is missing"):
        CLIP4IDC.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"format": "fastidc", "model": CONFIG.to_dict() | {"depth": 3}}))
    with pytest.raises(FastidcError, match="unknown field 'depth'"):
        CLIP4IDC.from_pretrained(tmp_path)


def test_a_cut_published_tower_is_no_smaller_model(tmp_path):
    config = CONFIG.replace(vision_width=768, vision_layers=11, intra_layers=9)
    torch.save(openai_state(config), tmp_path / "cut.pt")
    with pytest.raises(FastidcError, match=r"cut\.pt: 11 of the 12 layers that a CLIP of width 768 has"):
        CLIP4IDC.from_pretrained(tmp_path / "cut.pt")


def test_open_clip_names():
    pytest.importorskip("open_clip", reason="install open_clip_torch to read its weights")
    with pytest.raises(FastidcError, match="use open_clip:ViT-B-32-quickgelu/openai"):
        CLIP4IDC.from_pretrained("open_clip:ViT-B-32/openai")
    with pytest.raises(FastidcError, match="open_clip knows no model 'ViT-Q-7'"):
        CLIP4IDC.from_pretrained("open_clip:ViT-Q-7/openai")
    with pytest.raises(FastidcError, match="RN50-quickgelu has no vision transformer"):
        CLIP4IDC.from_pretrained("open_clip:RN50-quickgelu/openai")


def test_open_clip_text_embeddings(tmp_path):
    """A random open_clip ViT-B-32-quickgelu in OpenAI's layout gives open_clip's own text embeddings, and its intra features too."""
    open_clip = pytest.importorskip("open_clip", reason="install open_clip_torch to read its weights")
    torch.manual_seed(0)
    theirs = open_clip.create_model("ViT-B-32-quickgelu").eval()
    torch.save(theirs.state_dict(), tmp_path / "ViT-B-32.pt")
    ours = CLIP4IDC.from_pretrained(tmp_path / "ViT-B-32.pt", intra_layers=12).eval()
    ids = open_clip.get_tokenizer("ViT-B-32-quickgelu")(["the small red cube turned green", "nothing has changed"])
    with torch.no_grad():
        compare.assert_close(ours.encode_text(ids), theirs.encode_text(ids), 1e-5)
        images = torch.randn(2, 3, 224, 224)
        class_token = ours.pair_encoder.norm(ours.pair_encoder.intra(images)[:, 0]) @ ours.pair_encoder.projection
        compare.assert_close(class_token, theirs.encode_image(images), 1e-5)
