"""Attention maps: against the specification in fp64, against the attention that really ran, and as a user asks for them."""

import numpy as np
import pytest
import torch
import worlds
from compare import FP32_MODEL, FP32_OP, FP64_MODEL, assert_close
from PIL import Image
from torch.nn import functional as F

from fastidc import CLIP4IDC, FastidcError, checkpoint
from fastidc.config import CLIP_MEAN, CLIP_STD, ModelConfig
from fastidc.describe.attention_maps import Maps, attention_maps, class_token_probabilities, encode_with_maps
from fastidc.model.layers import SelfAttention, added
from fastidc.reference import clip4idc as reference
from fastidc.reference.layer_norm import layer_norm

GRIDS = [(48, 16), (56, 8), (56, 4)]  # 3x3, 7x7, 14x14 patches
NAMES = ("intra_before", "intra_after", "inter_before", "inter_after", "inter_before_from_after", "inter_after_from_after")


def config(image_size=48, patch_size=16, **changes) -> ModelConfig:
    size = {"image_size": image_size, "patch_size": patch_size, "vision_width": 128, "head_dim": 64}
    return worlds.SMALL.replace(vision_layers=4, captioner_layers=0, vocabulary=None, **size, **changes)


def built(settings: ModelConfig, dtype=torch.float32):
    state = worlds.official_state(settings, "adapt", 3, torch.float64)
    for name in state:
        if name.endswith("attn.in_proj_weight"):
            state[name] *= 1.5  # drawn weights look everywhere alike; maps that are flat would test nothing
    model = CLIP4IDC(settings).to(dtype).eval()
    model.load_weights(checkpoint.from_official({key: value.to(dtype) for key, value in state.items()}), "drawn")
    return model, state


def pixels(settings: ModelConfig, pairs: int = 2) -> torch.Tensor:
    size = settings.image_size
    return torch.randint(0, 256, (pairs, 2, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def specified(state: dict, settings: ModelConfig, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The maps in fp64 by the reference's blocks, a probability at a time."""
    batch, tokens, side = len(images), settings.image_tokens, settings.image_size // settings.patch_size
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    x = (images.permute(0, 1, 4, 2, 3).double() / 255 - mean) / std
    x = F.conv2d(x.flatten(0, 1), state["clip.visual.conv1.weight"], stride=settings.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([state["clip.visual.class_embedding"].expand(2 * batch, 1, -1), x], dim=1) + state["clip.visual.positional_embedding"]
    x = reference._norm(state, "clip.visual.ln_pre", x)
    maps = {}
    for i in range(settings.vision_layers):
        name = f"clip.visual.transformer.resblocks.{i}"
        if i == settings.intra_layers:
            before, after = x.unflatten(0, (batch, 2)).unbind(1)
            after = after - before if settings.pair_input == "difference" else after
            x = torch.cat([before + state["clip.visual.bef_embedding"], after + state["clip.visual.aft_embedding"]], dim=1)
            x = reference._norm(state, "clip.visual.ln_mid", x + state["clip.visual.joint_positional_embedding"])
        if i in (settings.intra_layers - 1, settings.vision_layers - 1):
            normal = layer_norm(x, state[name + ".ln_1.weight"], state[name + ".ln_1.bias"])
            q, k, _ = F.linear(normal, state[name + ".attn.in_proj_weight"], state[name + ".attn.in_proj_bias"]).chunk(3, dim=-1)
            total = torch.zeros(len(x), x.shape[1], x.shape[1], dtype=torch.float64)
            for head in range(settings.vision_heads):
                part = slice(64 * head, 64 * head + 64)
                scores = torch.stack([(q[:, t, None, part] * k[..., part]).sum(-1) for t in range(x.shape[1])], dim=1) / 8.0
                total += scores.exp() / scores.exp().sum(-1, keepdim=True)
            if i < settings.intra_layers:
                rows = (total / settings.vision_heads)[:, 0, 1:].reshape(batch, 2, side, side)
                maps |= {"intra_before": rows[:, 0], "intra_after": rows[:, 1]}
            else:
                for row, tail in ((0, ""), (tokens, "_from_after")):
                    mean_row = total[:, row] / settings.vision_heads
                    maps[f"inter_before{tail}"] = mean_row[:, 1:tokens].reshape(batch, side, side)
                    maps[f"inter_after{tail}"] = mean_row[:, tokens + 1 :].reshape(batch, side, side)
        x = reference._clip_block(state, name, x)
    return maps


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP32_OP), (torch.float32, FP32_MODEL)])  # handed out in fp32 either way
@pytest.mark.parametrize("pair_input", ["concat", "difference"])
@pytest.mark.parametrize(("image_size", "patch_size"), GRIDS)
def test_maps_are_those_of_the_specification(image_size, patch_size, pair_input, dtype, tolerance):
    settings = config(image_size, patch_size, pair_input=pair_input)
    model, state = built(settings, dtype)
    images = pixels(settings)
    embedding, maps = encode_with_maps(model, images)
    expected, side = specified(state, settings, images), image_size // patch_size
    for name in NAMES:
        got = getattr(maps, name)
        assert (got.shape, got.dtype) == ((2, side, side), torch.float32)
        assert_close(got, expected[name], tolerance, name)
        assert float(got.flatten(1).std(1).min()) > 0.1 / side**2, "a flat map would be any row's"
    for parts in (("intra_before",), ("intra_after",), ("inter_before", "inter_after"), NAMES[4:]):
        total = sum(getattr(maps, name).sum((1, 2)) for name in parts)
        assert bool((total < 1).all() and (total > 0).all())
    assert torch.equal(embedding, model.encode_batch(images)[0][:, 0]), "listening changes nothing"
    assert all(not block._forward_pre_hooks for block in model.pair_encoder.blocks)


@pytest.mark.parametrize("pair_input", ["concat", "difference"])
@pytest.mark.parametrize(("image_size", "patch_size"), GRIDS)
def test_probabilities_give_the_attention_that_ran(image_size, patch_size, pair_input, monkeypatch):
    settings = config(image_size, patch_size, pair_input=pair_input)
    model, _ = built(settings, torch.float64)
    ran, inputs, attend = {}, {}, SelfAttention.attend

    def recorded(self, *arguments):
        ran[self] = attend(self, *arguments)
        return ran[self]

    monkeypatch.setattr(SelfAttention, "attend", recorded)
    blocks = model.pair_encoder.blocks
    hooks = [block.register_forward_pre_hook(lambda block, given: inputs.__setitem__(block, given[:2])) for block in blocks]
    with torch.no_grad():
        model.encode_batch(pixels(settings))
        for block in (blocks[settings.intra_layers - 1], blocks[-1]):
            probabilities = class_token_probabilities(block, *inputs[block], slice(None))
            assert probabilities.dtype == torch.float64
            values = block.attention.qkv(block.attention_norm(added(*inputs[block])))[..., 2 * settings.vision_width :]
            heads = values.unflatten(-1, (settings.vision_heads, -1))
            output = block.attention.out(torch.einsum("brhl,blhd->brhd", probabilities, heads).flatten(2))
            assert_close(output, ran[block.attention], FP64_MODEL)
    for hook in hooks:
        hook.remove()


def test_half_precision_and_autocast_have_no_say_in_the_softmax():
    model, _ = built(config())
    block, x = model.pair_encoder.blocks[0], torch.randn(2, 10, 128)
    expected = class_token_probabilities(block, x, None, slice(0, 1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(class_token_probabilities(block, x, None, slice(0, 1)), expected)
    assert class_token_probabilities(block.bfloat16(), x.bfloat16(), None, slice(0, 1)).dtype == torch.float32


def test_a_pair_of_any_image(tmp_path):
    settings = config(56, 8)
    model, _ = built(settings)
    paths = [worlds.noise_image(tmp_path / f"{i}.png", i, (90, 40)) for i in range(2)]
    maps = attention_maps(model, *paths)
    assert all(getattr(maps, name).shape == (7, 7) for name in NAMES)
    squashed = np.stack([np.asarray(Image.open(path).resize((56, 56), Image.Resampling.BICUBIC)) for path in paths])
    again = encode_with_maps(model, torch.from_numpy(squashed)[None])[1][0]
    assert all(torch.equal(getattr(maps, name), getattr(again, name)) for name in NAMES)
    other = attention_maps(model, paths[1], Image.open(paths[0]))
    assert torch.equal(other.intra_before, maps.intra_after), "an intra map belongs to its image"
    assert not torch.equal(other.inter_before, maps.inter_after)
    assert isinstance(maps, Maps)
    assert [name for name, *_ in maps.layers] == ["last intra layer", "last inter layer"]


def test_what_has_no_map_is_a_sentence(tmp_path):
    model, _ = built(config(intra_layers=4))
    path = worlds.noise_image(tmp_path / "0.png")
    with pytest.raises(FastidcError, match="need an inter layer"):
        attention_maps(model, path, path)
    model, _ = built(config())
    with pytest.raises(FastidcError, match=r"gone\.png"):
        attention_maps(model, path, tmp_path / "gone.png")
