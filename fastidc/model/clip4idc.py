"""CLIP4IDC: the only place where the towers, the captioner and the losses meet."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastidc import checkpoint, generate, ops
from fastidc.config import PAD_ID, ModelConfig
from fastidc.errors import FastidcError
from fastidc.model.captioner import Captioner
from fastidc.model.pair_encoder import PairEncoder
from fastidc.model.text_encoder import TextEncoder
from fastidc.packed import PackedCaptions, PackedText
from fastidc.picked import Picked


class CLIP4IDC(nn.Module):
    """A pair encoder, CLIP's text tower and, where ``config.captioner_layers`` > 0, a captioner.

    Images are uint8 [0, 255] or floating and already normalised with CLIP's mean and std, [B, 3, H, W].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.pair_encoder = PairEncoder(config)
        self.text_encoder = TextEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592600369327783))  # ln(1 / 0.07), as CLIP starts
        self.captioner = Captioner(config) if config.captioner_layers else None
        self.caption_bucket: Callable[[int, int], int] | None = None
        """Where the captioner is compiled: (a batch's length, positions) -> the length that padded captions are filled up to
        (`fastidc.train.compiled`)."""
        self.shadows: Any = None
        """Where weights are kept in half precision too: what stands in for them while `forward` runs (`fastidc.train.shadows.Shadows`)."""

    @classmethod
    def from_pretrained(
        cls, source: Any, intra_layers: int | None = None, captioner_layers: int | None = None, pair_input: str | None = None
    ) -> "CLIP4IDC":
        """The model in ``source``: a fastidc folder, an official ``pytorch_model.bin.*`` of either stage, an OpenAI CLIP state dict
        (.pt, .safetensors), ``"open_clip:ViT-B-32-quickgelu/openai"``, or a `ModelConfig` (random initialisation).

        intra_layers: 9 of 12 by default; a fastidc folder knows its own, an official file does not. captioner_layers: what the source
        has by default; a captioner that it lacks is initialised at random. FastidcError names the file and the tensor that does not fit.
        """
        if isinstance(source, ModelConfig):
            changes = {"intra_layers": intra_layers, "captioner_layers": captioner_layers, "pair_input": pair_input}
            return cls(source.replace(**{k: v for k, v in changes.items() if v is not None}))
        read = checkpoint.read(source, intra_layers=intra_layers, captioner_layers=captioner_layers, pair_input=pair_input)
        model = cls(read.config)
        model.load_weights(read.weights, read.source, read.fresh, read.foreign)
        return model

    def drop_captioner(self) -> None:
        """Leaves the model without a captioner, as adaptation trains and saves it."""
        self.captioner = None
        self.config = self.config.replace(captioner_layers=0)

    def load_weights(
        self, weights: Mapping[str, Tensor], source: str, fresh: Sequence[str] = (), foreign: Mapping[str, tuple[str, int]] | None = None
    ) -> None:
        """Copies ``weights`` (our names) in; every parameter must be there with its shape, but for those whose names start with one of
        ``fresh``, which may be absent as a whole and then keep their initial values. ``foreign``: see `checkpoint.check_fit`."""
        own = dict(self.named_parameters())
        checkpoint.check_fit({name: tuple(p.shape) for name, p in own.items()}, weights, source, fresh, foreign)
        with torch.no_grad():
            for name, parameter in own.items():
                if name in weights:
                    parameter.copy_(weights[name])

    def forward(self, batch: Any, objectives: Sequence[Any]) -> dict[str, Tensor]:
        """The trained entry, the one to wrap: a `fastidc.data.PairBatch` and objectives -> {objective.name: scalar loss}.

        Every image of the batch passes intra once and every pair inter once, whatever the number of objectives that read them.
        """
        with nullcontext() if self.shadows is None else self.shadows.standing_in():
            encoded = self.encode_batch(batch.images, with_tokens=any(objective.reads_tokens for objective in objectives))
            return {objective.name: objective.loss(self, batch, encoded) for objective in objectives}

    def _factor(self, p: Tensor) -> Tensor:
        """p as a product reads it that is no module's own: its shadow where `forward` has them."""
        return p if self.shadows is None else self.shadows.stand_in(p)

    def encode_batch(self, images: Tensor | Picked, with_tokens: bool = True) -> tuple[Tensor, Tensor]:
        """images [B, K, H, W, 3] uint8, or as many picked ones, before first -> embedding [B, K-1, E], tokens [B, K-1, 2(n+1), E] of (before, image k).

        Without ``with_tokens`` only the two class tokens of each pair are computed, tokens [B, K-1, 2, E]; the embedding is the same.
        """
        batch, count = images.shape[:2]
        encoder = self.pair_encoder
        pixels, *picked = images.flat() if isinstance(images, Picked) else (images.flatten(0, 1),)
        features = encoder.intra(pixels.permute(0, 3, 1, 2), *picked).unflatten(0, (batch, count))
        before = features[:, :1].expand(-1, count - 1, -1, -1).flatten(0, 1)
        inter = encoder.inter if with_tokens else encoder.inter_class_tokens
        embedding, tokens = encoder.pool(inter(before, features[:, 1:].flatten(0, 1)))
        return embedding.unflatten(0, (batch, count - 1)), tokens.unflatten(0, (batch, count - 1))

    def encode_pair(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """before, after [B, 3, H, W] -> embedding [B, E], not normalised, and tokens [B, 2(n+1), E]."""
        if before.shape != after.shape or before.dtype != after.dtype:
            raise ValueError(f"before {list(before.shape)} {before.dtype} and after {list(after.shape)} {after.dtype} must be alike.")
        first, second = self.pair_encoder.intra(torch.cat([before, after])).chunk(2)
        return self.pair_encoder.pool(self.pair_encoder.inter(first, second))

    def encode_text(self, text: Tensor | PackedText) -> Tensor:
        """ids [B, L] int with an end token in every row, or the captions packed, which saves the padding -> [B, E], not normalised."""
        self._check_length(text.longest if isinstance(text, PackedText) else text.shape[1])
        return self.text_encoder(text)

    def similarity(self, text: Tensor, pair: Tensor) -> Tensor:
        """exp(logit_scale) cos: text [T, E], pair [P, E] -> [T, P] fp32."""
        return self.logit_scale.exp() * F.normalize(text.float(), dim=-1) @ F.normalize(pair.float(), dim=-1).T

    def text_pair_loss(self, embedding: Tensor, text: Tensor | PackedText, *, group: Any = None, gather_grad: Any = "full") -> Tensor:
        """embedding [B, E] of pairs, their captions as in `encode_text` -> symmetric InfoNCE (paper eq. 6 to 8), over the rows of all ranks of
        ``group`` where one is given; see `fastidc.ops.info_nce`."""
        pair = embedding if group is None else ops.start_gather(embedding, group)  # they travel while the text tower runs
        return ops.info_nce(self.encode_text(text), pair, self.logit_scale, group=group, gather_grad=gather_grad)

    def token_losses(self, tokens: Tensor, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """tokens [B, P, M, E] of P kinds of pair, input_ids and target_ids [B, P, R, T], R captions a pair -> [P]: for each kind the mean
        cross entropy over its targets that are not the pad id 0. All kinds pass the captioner together."""
        x = self._decode(tokens.flatten(0, 1), input_ids.flatten(0, 2)).unflatten(0, input_ids.shape[:3])
        words, bias = self.text_encoder.token_embedding, self._captioner.head_bias
        kinds = zip(x.unbind(1), target_ids.unbind(1), strict=True)
        return torch.stack(
            [ops.linear_cross_entropy(rows.flatten(0, 2), self._factor(words), bias, targets.flatten()) for rows, targets in kinds]
        )

    def packed_token_losses(self, tokens: Tensor, captions: PackedCaptions) -> Tensor:
        """`token_losses` without a row of padding: tokens [B, P, M, E] -> [P]."""
        text = self.text_encoder
        self._check_length(captions.text.longest)
        if self.caption_bucket is not None:
            captions.mark_dynamic()
        x = self._captioner(tokens.flatten(0, 1), captions, text.token_embedding, text.position)
        kinds = zip(x.split(captions.kinds), captions.targets.split(captions.kinds), strict=True)
        words, bias = text.token_embedding, self._captioner.head_bias
        return torch.stack([ops.linear_cross_entropy(rows, self._factor(words), bias, targets) for rows, targets in kinds])

    def adaptation_loss(self, before: Tensor, after: Tensor, ids: Tensor | PackedText) -> Tensor:
        """before, after [B, 3, H, W], ids [B, L] or packed -> scalar."""
        return self.text_pair_loss(self.encode_pair(before, after)[0], ids)

    def caption_loss(self, before: Tensor, after: Tensor, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """before, after [B, 3, H, W]; input_ids [B, T] from the start token on, target_ids [B, T] one ahead, both padded with 0 -> scalar,
        the mean over the non-pad targets."""
        return self.token_losses(self.encode_pair(before, after)[1][:, None], input_ids[:, None, None], target_ids[:, None, None])[0]

    def caption_logits(self, before: Tensor, after: Tensor, input_ids: Tensor) -> Tensor:
        """-> [B, T, V]. For tests and tools; training never builds it. Rows of pad tokens have no meaning."""
        x = self._decode(self.encode_pair(before, after)[1], input_ids)
        return F.linear(x, self.text_encoder.token_embedding, self._captioner.head_bias)

    @torch.no_grad()
    def generate(
        self,
        before: Tensor,
        after: Tensor,
        max_length: int = 32,
        beams: int = 1,
        *,
        length_penalty: float = 0.0,
        stop_early: bool = True,
        graphs: bool | None = None,
        compiled: bool = False,
    ) -> Tensor:
        """before, after [B, 3, H, W] -> ids [B, max_length] int64 of the captions, zero after the end token.

        One beam is greedy decoding, of which ``stop_early=False`` keeps the official evaluation's raw steps; otherwise see
        `generate_from_tokens`. Switches to evaluation mode for the call.
        """
        self.check_decoding(len(before), max_length, beams, length_penalty, stop_early)  # before the towers run
        how = {"length_penalty": length_penalty, "stop_early": stop_early, "graphs": graphs, "compiled": compiled}
        training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            return self.generate_from_tokens(self.encode_pair(before, after)[1], max_length, beams, **how)[0]
        finally:
            for module in training:
                module.training = True

    def generate_from_tokens(
        self,
        tokens: Tensor,
        max_length: int = 32,
        beams: int = 1,
        *,
        length_penalty: float = 0.0,
        stop_early: bool = True,
        graphs: bool | None = None,
        compiled: bool = False,
        empty: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """tokens [B, M, E] -> ids [B, max_length] int64 and the log-probability of each [B, max_length] fp32, zero after the end token.

        With ``beams`` > 1 the caption of the best sum of log-probabilities / length ** ``length_penalty`` that beam search finds (see
        `fastidc.generate.beams`). ``graphs``: in buckets of the batch size, each a few CUDA graphs, by default on CUDA; ``compiled``: the
        step through torch.compile; neither changes what is decoded. ``empty=False``: no caption is without a word. FastidcError says what cannot be decoded so. The model must be in
        evaluation mode.
        """
        self.check_decoding(len(tokens), max_length, beams, length_penalty, stop_early)
        text, config = self.text_encoder, self.config
        decoder = generate.Decoder(self._captioner, text.token_embedding, text.position, config.start_id, config.end_id)
        how = {"length_penalty": length_penalty, "stop_early": stop_early, "graphs": graphs, "compiled": compiled, "empty": empty}
        return generate.decode(decoder, tokens, max_length, beams=beams, **how)

    def check_decoding(self, pairs: int, max_length: int, beams: int = 1, length_penalty: float = 0.0, stop_early: bool = True) -> None:
        """FastidcError says what `generate_from_tokens` cannot do of it."""
        _ = self._captioner
        text = self.text_encoder
        generate.check(pairs, max_length, beams, length_penalty, stop_early, len(text.position), len(text.token_embedding))

    @property
    def _captioner(self) -> Captioner:
        if self.captioner is None:
            raise FastidcError("this model has no captioner: it is an adapted model; fine-tune it first (`fastidc finetune --init RUN`).")
        return self.captioner

    def _check_length(self, length: int) -> None:
        if length > self.config.context_length:
            raise FastidcError(f"captions of {length} tokens exceed the model's {self.config.context_length} positions; lower max_words.")

    def _decode(self, tokens: Tensor, ids: Tensor) -> Tensor:
        captioner, text, length = self._captioner, self.text_encoder, ids.shape[1]
        self._check_length(length)
        if self.caption_bucket is not None:
            ids = F.pad(ids, (0, self.caption_bucket(length, len(text.position)) - length), value=PAD_ID)
        return captioner(tokens, ids, text.token_embedding, text.position)[:, :length]
