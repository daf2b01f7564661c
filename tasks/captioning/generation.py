"""Captions by beam search, on plain tensors: pictures in, token ids and scores out.

BEiT-3 is no left-to-right decoder; it is asked to fill in a mask. The input is `<s>, known tokens, <mask>`, what the
model predicts at `<mask>` is the next token, and the next input has that token in its place and a new `<mask>` behind
it. A text position sees the picture and earlier text alone, so what was computed for the known tokens stays right; only
the keys and values of the `<mask>` itself are dropped.

What makes it fast: a picture is computed once, and its keys and values are held once for all beams; those of the text
lie behind them at the place where they were computed and are never moved when beams change parents, as a mask says
which of them belong to the history of which beam; beams are tensors, and the device is waited for now and then only.

The rules of the search (which hypothesis counts, when a picture is done) are those of the released model's code, so
its captions come out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from beit3.model.encoder import BEiT3, EncoderLayer, is_plain_linear

MIN_TOKENS = 4  # of `max_tokens`: room for one token of a caption
KEEP = 0.75  # when at most this share of the pictures is still open, the others are taken out of the batch


@dataclass(frozen=True)
class Captions:
    """The best captions of each picture, the best first.

    Attributes:
        token_ids: (B, N, max_tokens - 3) int64, without `<s>` and `</s>`, filled up with `pad_id`.
        lengths: (B, N) int64, tokens of each.
        scores: (B, N) fp32, see `generate`; -inf where the search came upon fewer than N captions.
    """

    token_ids: Tensor
    lengths: Tensor
    scores: Tensor

    def all(self) -> list[list[tuple[list[int], float]]]:
        """Token ids and score of the captions of each picture, the best first. Waits for the device."""
        found = zip(self.token_ids.tolist(), self.lengths.tolist(), self.scores.tolist(), strict=True)
        return [
            [(ids[:length], score) for ids, length, score in zip(*of_picture, strict=True) if score > -math.inf]
            for of_picture in found
        ]

    def best(self) -> list[list[int]]:
        """The token ids of the best caption of each picture. Waits for the device."""
        pairs = zip(self.token_ids[:, 0].tolist(), self.lengths[:, 0].tolist(), strict=True)
        return [ids[:length] for ids, length in pairs]


@torch.no_grad()
def generate(
    model: Any,
    images: Tensor,
    *,
    mask_id: int,
    num_beams: int = 3,
    length_penalty: float = 0.6,
    max_tokens: int = 32,
    bos_id: int = BOS_ID,
    eos_id: int = EOS_ID,
    pad_id: int = PAD_ID,
    num_return: int = 1,
) -> Captions:
    """Caption pictures.

    The search goes on from the `num_beams` most likely beginnings of each picture. The 3 * num_beams most likely
    continuations are walked in order; `</s>` closes a caption, others are kept until num_beams are. A caption of n
    tokens has the score (sum of log-probabilities, `</s>` included) / (n + 2) ** length_penalty; at the length limit
    every continuation closes like `</s>`. A picture is done when no open beginning can beat its captions any more, as
    the released code judges it: when its worst caption kept has at least the score that the step's best continuation
    would have at max_tokens - 1.

    Args:
        model: a module with `beit3` (an encoder) and `mlm_head`, in any dtype, or under autocast. Drop path never
            applies.
        images: (B, 3, H, H) in [-1, 1].
        num_beams: 1 is greedy search.
        length_penalty: above 0 favours longer captions.
        max_tokens: `num_max_bpe_tokens` of training; a caption has at most max_tokens - 3 tokens.
        num_return: captions per picture, at most num_beams. The released code knows 1 alone; with more, the search
            goes on until that many are sure.

    A caption does not depend on the other pictures of the batch, rounding apart.

    Raises:
        ValueError: a number is out of its range.
    """
    _check(num_beams, max_tokens, num_return, model.beit3.config.vocab_size)
    batch, longest, device = images.shape[0], max_tokens - 3, images.device
    decoder = _Decoder(model, images, num_beams, max_tokens - 1, mask_id)
    beams = _Beams.start(batch, longest, bos_id, pad_id, device)
    results = finished = _Finished.start(batch, num_return, longest, pad_id, device)
    rows = torch.arange(batch, device=device)  # which pictures `beams` and `finished` are about
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    ask_every = _ask_every(device)
    for length in range(longest + 1):  # tokens that each open caption has
        # 3 * num_beams, as in the released code. It is enough: each beam has one `</s>`, so at least 2 * num_beams of
        # them are other tokens.
        candidates = _best_candidates(beams.sums, decoder.step(beams.newest, beams.parents), 3 * num_beams)
        # Judged before this step's captions are added, again as in the released code.
        done = done | (finished.scores[:, -1] >= candidates.sums[:, 0] / (max_tokens - 1) ** length_penalty)
        closing = _first_of_each_beam(candidates) if length == longest else _closes(candidates, eos_id, num_beams)
        scores = candidates.sums / (length + 2) ** length_penalty
        # Pictures that are done stay in the batch for a while; what their beams close no longer counts.
        scores = scores.masked_fill(~closing | done[:, None], -torch.inf)  # (B, C)
        finished = finished.merge(beams.tokens.gather(1, _as_index(candidates.beams, beams.tokens)), length, scores)
        if length == longest:
            break
        beams = beams.extend(candidates, eos_id, num_beams, length)
        if length % ask_every == 0:
            still_open = (~done).nonzero().squeeze(1)
            if len(still_open) == 0:
                break
            # Taking pictures out copies the keys and values of those that stay, so it is done when it is worth it.
            if len(still_open) <= KEEP * len(done):
                results = results.with_rows(rows, finished)
                rows, done = rows[still_open], done[still_open]
                beams, finished = beams.keep(still_open), finished.keep(still_open)
                decoder.keep(still_open)
    results = results.with_rows(rows, finished)
    return Captions(results.tokens, results.lengths, results.scores)


def _ask_every(device: torch.device) -> int:
    """Steps between two looks at which pictures are done: a look is free on a CPU and waits for any other device."""
    return 1 if device.type == "cpu" else 4


def _check(num_beams: int, max_tokens: int, num_return: int, vocab_size: int) -> None:
    problems = []
    if max_tokens < MIN_TOKENS:
        problems.append(f"max_tokens is {max_tokens}, at least {MIN_TOKENS} are needed: <s>, a token, <mask> and </s>")
    if not 1 <= num_beams <= vocab_size // 3:
        problems.append(f"num_beams is {num_beams}, wanted 1 … a third of the vocabulary of {vocab_size}")
    if not 1 <= num_return <= num_beams:
        problems.append(f"num_return is {num_return}, wanted 1 … num_beams, which is {num_beams}")
    if problems:
        raise ValueError("; ".join(problems))


def _as_index(rows: Tensor, like: Tensor) -> Tensor:
    """Numbers of rows (B, K) as an index for `like.gather(1, …)`, like (B, N, …) → (B, K, …)."""
    extra = like.shape[2:]
    return rows.reshape(*rows.shape, *(1 for _ in extra)).expand(*rows.shape, *extra)


@dataclass(frozen=True)
class _Candidates:
    """The best continuations of each picture's beams, the best first: (B, C) each."""

    sums: Tensor  # log-probability of the whole, fp32
    beams: Tensor  # the beam it continues
    tokens: Tensor  # by this token


def _best_candidates(sums: Tensor, logits: Tensor, count: int) -> _Candidates:
    """The `count` best of beams x vocabulary. sums: (B, K) fp32. logits: (B, K, V) fp32."""
    # The best of all are among the best of each beam, so the whole log-softmax need not be written out.
    values, tokens = logits.topk(count, dim=-1)  # (B, K, C)
    log_probabilities = values - logits.logsumexp(dim=-1, keepdim=True)
    best, index = (sums[:, :, None] + log_probabilities).flatten(1).topk(count, dim=-1)  # (B, C)
    return _Candidates(best, index // count, tokens.flatten(1).gather(1, index))


def _closes(candidates: _Candidates, eos_id: int, num_beams: int) -> Tensor:
    """(B, C), True where `</s>` is come upon before num_beams others are kept."""
    is_end = candidates.tokens == eos_id
    return is_end & ((~is_end).cumsum(dim=1) < num_beams)


def _first_of_each_beam(candidates: _Candidates) -> Tensor:
    """(B, C), True for the best candidate of a beam: at the limit all of them close to the same caption."""
    same_beam = candidates.beams[:, :, None] == candidates.beams[:, None, :]  # (B, C, C)
    return ~same_beam.tril(diagonal=-1).any(dim=-1)


@dataclass(frozen=True)
class _Beams:
    """The K open captions of each picture; at first one, `<s>`."""

    tokens: Tensor  # (B, K, L), filled up with padding
    sums: Tensor  # (B, K) fp32, log-probability
    newest: Tensor  # (B, K), the last token of each
    parents: Tensor | None  # (B, K), the beam of the step before that each goes on from

    @classmethod
    def start(cls, batch: int, longest: int, bos_id: int, pad_id: int, device: torch.device) -> _Beams:
        return cls(
            torch.full((batch, 1, longest), pad_id, device=device),
            torch.zeros((batch, 1), device=device),
            torch.full((batch, 1), bos_id, device=device),
            None,
        )

    def extend(self, candidates: _Candidates, eos_id: int, count: int, length: int) -> _Beams:
        """The first `count` candidates that are not `</s>`; length: tokens of each caption so far."""
        # A stable sort puts `</s>` last and leaves the others in their order: the first are the best that go on.
        chosen = (candidates.tokens == eos_id).to(torch.uint8).sort(dim=1, stable=True).indices[:, :count]  # (B, K)
        parents, newest = candidates.beams.gather(1, chosen), candidates.tokens.gather(1, chosen)
        tokens = self.tokens.gather(1, _as_index(parents, self.tokens))
        tokens[:, :, length] = newest
        return _Beams(tokens, candidates.sums.gather(1, chosen), newest, parents)

    def keep(self, rows: Tensor) -> _Beams:
        """Those of some pictures."""
        assert self.parents is not None, "nothing is done before the first step"
        return _Beams(self.tokens[rows], self.sums[rows], self.newest[rows], self.parents[rows])


@dataclass(frozen=True)
class _Finished:
    """The best closed captions of each picture, the best first; -inf where there is none yet."""

    tokens: Tensor  # (B, N, L), filled up with padding
    lengths: Tensor  # (B, N)
    scores: Tensor  # (B, N) fp32

    @classmethod
    def start(cls, batch: int, count: int, length: int, pad_id: int, device: torch.device) -> _Finished:
        return cls(
            torch.full((batch, count, length), pad_id, device=device),
            torch.zeros((batch, count), dtype=torch.int64, device=device),
            torch.full((batch, count), -torch.inf, device=device),
        )

    def merge(self, tokens: Tensor, length: int, scores: Tensor) -> _Finished:
        """With more captions, all of this length: tokens (B, C, L), scores (B, C)."""
        every_score = torch.cat([self.scores, scores], dim=1)  # (B, N + C)
        # Stable: of two equal scores the caption that was found first stays in front.
        order = every_score.sort(dim=1, descending=True, stable=True).indices[:, : self.scores.shape[1]]
        every_tokens = torch.cat([self.tokens, tokens], dim=1)
        every_length = torch.cat([self.lengths, torch.full_like(scores, length, dtype=torch.int64)], dim=1)
        return _Finished(
            every_tokens.gather(1, _as_index(order, every_tokens)),
            every_length.gather(1, order),
            every_score.gather(1, order),
        )

    def keep(self, rows: Tensor) -> _Finished:
        """Those of some pictures."""
        return _Finished(self.tokens[rows], self.lengths[rows], self.scores[rows])

    def with_rows(self, rows: Tensor, other: _Finished) -> _Finished:
        """With the captions of the pictures `rows` replaced by `other`."""
        return _Finished(
            self.tokens.index_copy(0, rows, other.tokens),
            self.lengths.index_copy(0, rows, other.lengths),
            self.scores.index_copy(0, rows, other.scores),
        )


class _Decoder:
    """The model as a predictor of the next token of K beams of each picture (one at the first step).

    Keys and values of a layer lie in one buffer (B, heads, P+1 + L*K, D): first those of the picture, then for each of
    the L positions of the text K places, one for each beam ("slots"). What is written stays where it is. When a beam
    goes on from another one, only its row of `history` (B, K, L, K) changes, which says for each beam and position in
    which slot the beam's own token lies, True at one slot of each position.
    """

    def __init__(self, model: Any, images: Tensor, num_beams: int, length: int, mask_id: int) -> None:
        self.num_beams, self.mask_id = num_beams, mask_id
        self.encoder: BEiT3 = model.beit3
        self.layers: list[EncoderLayer] = list(model.beit3.encoder.layers)
        self.image_keys = self.encoder.config.patches + 1
        self.keys, self.values = self._encode(images, text_entries=length * num_beams)
        # One beam at the first step, `<s>`; the first `parents` make K of it.
        self.history = torch.zeros((images.shape[0], 1, length, num_beams), dtype=torch.bool, device=images.device)
        self.position = 0  # of the newest known token
        self.projections = [_text_projection(layer, images.device) for layer in self.layers]
        self.head = _fp32_head(model.mlm_head)

    def keep(self, rows: Tensor) -> None:
        """Go on with these pictures only."""
        self.history = self.history[rows]
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                buffers[layer] = buffer[rows]

    def _encode(self, images: Tensor, text_entries: int) -> tuple[list[Tensor], list[Tensor]]:
        """Buffers of keys and values of each layer, the picture's filled in: (B, heads, P+1 + text entries, D) each."""
        # The class token has the dtype of the weights; a layer may be something else that has no weight.
        x = self.encoder.embed_image(images.to(self.encoder.vision_embed.cls_token.dtype))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for layer in self.layers:
            normed = layer.self_attn_layer_norm.A(x)
            # Of the last layer only keys and values are wanted.
            q, k, v = layer.self_attn.project("A", normed, rows=0 if layer is self.layers[-1] else None)
            for buffers, part in ((keys, k), (values, v)):
                # Room for all steps at once, with heads before positions as attention reads them: nothing is moved.
                # Zeros, since attention multiplies slots that are not written yet by 0, and 0 times NaN is NaN.
                batch, positions, heads, size = part.shape
                buffers.append(part.new_zeros(batch, heads, positions + text_entries, size))
                buffers[-1][:, :, :positions] = part.transpose(1, 2)
            if layer is not self.layers[-1]:
                x = _finish_layer(layer, "A", x, layer.self_attn.attend(q, k, v, None))
        return keys, values

    def step(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """Logits of the token behind `tokens`.

        Args:
            tokens: (B, K), the newest token of each beam. parents: (B, K), the beams of the step before that the
                beams go on from; None at the first step.

        Returns:
            (B, K, V) fp32.
        """
        beams = tokens.shape[1]
        if parents is not None:
            # A beam takes over what its parent knows of the past: (B, K before, L, slots) → (B, K, L, slots).
            self.history = self.history.gather(1, _as_index(parents, self.history))
        attend = self._attend()
        # Keys and values of the newest token are not known yet, and the `<mask>` behind it is what predicts.
        pairs = torch.stack([tokens, torch.full_like(tokens, self.mask_id)], dim=2)  # (B, K, 2)
        x = self.encoder.embed_text(pairs.flatten(0, 1), None, first_position=self.position)  # (B*K, 2, W)
        # The newest tokens of all beams, then all masks, in one row: (B, 2*K, W). So beams share the picture's keys.
        x = x.unflatten(0, (-1, beams)).transpose(1, 2).flatten(1, 2)
        for layer, projection, keys, values in zip(self.layers, self.projections, self.keys, self.values, strict=True):
            normed = layer.self_attn_layer_norm.B(x)
            q, k, v = layer.self_attn.project("B", normed, joint=projection)  # (B, 2*K, heads, D)
            if layer is self.layers[-1]:  # a token's own output is of no use any more
                x, q, attend = x[:, beams:], q[:, beams:], attend[:, :, beams:]
            attended = layer.self_attn.attend(q, self._store(keys, k), self._store(values, v), attend)
            x = _finish_layer(layer, "B", x, attended)
        self.position += 1
        return self._logits(x)

    def _store(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write keys or values (B, 2*K, heads, D) of newest tokens and masks into a layer's buffer.

        Returns:
            All entries so far: (B, P+1 + (position+2)*slots, heads, D).
        """
        # `unflatten` and slices are views, so this writes into the buffer itself. Tokens go to `position`, masks to the
        # position behind, where the next step's tokens replace them.
        places = buffer[:, :, self.image_keys :].unflatten(2, (-1, self.num_beams))  # (B, heads, L, slots, D)
        now = slice(self.position, self.position + 2)
        places[:, :, now, : new.shape[1] // 2] = new.transpose(1, 2).unflatten(2, (2, -1))
        return buffer[:, :, : self.image_keys + (self.position + 2) * self.num_beams].transpose(1, 2)

    def _attend(self) -> Tensor:
        """(B, 1, 2*K, P+1 + (position+2)*slots), True = may attend; rows are the newest tokens, then the masks."""
        beams = self.history.shape[1]
        # Beam k writes into slot k: (K, slots).
        own = torch.eye(beams, self.num_beams, dtype=torch.bool, device=self.history.device)
        self.history[:, :, self.position] = own
        # A token does not see the mask behind it: `history` is still False there. A mask sees what its token sees, and
        # itself.
        of_tokens = self.history[:, :, : self.position + 2]  # (B, K, positions, slots)
        of_masks = of_tokens.clone()
        of_masks[:, :, self.position + 1] = own
        text = torch.cat([of_tokens, of_masks], dim=1).flatten(2)  # (B, 2*K, positions*slots)
        return F.pad(text, (self.image_keys, 0), value=True).unsqueeze(1)

    def _logits(self, x: Tensor) -> Tensor:
        """(B, K, W) out of the last layer → (B, K, V) fp32."""
        if self.encoder.config.final_norm:
            x = self.encoder.encoder.layer_norm.B(x)
        if isinstance(self.head, nn.Module):
            return self.head(x).float()
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), *self.head)


def _finish_layer(layer: EncoderLayer, expert: str, x: Tensor, attended: Tensor) -> Tensor:
    """What follows attention in a layer, without drop path: x and attended values (B, N, W) → (B, N, W)."""
    x = x + layer.self_attn.output(expert, attended)
    return x + getattr(layer.ffn, expert)(x, getattr(layer.final_layer_norm, expert))


def _text_projection(layer: EncoderLayer, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Weight (3*W, W) and bias (3*W,) of q, k and v of the text in one, made once and not at every step.

    None where their modules must be called, see `Attention.joint_projection`.
    """
    joint = layer.self_attn.joint_projection("B")
    if joint is None or not torch.is_autocast_enabled(device.type):
        return joint
    # Autocast remembers what it casts only where gradients are wanted, so it would cast these at every step.
    weight, bias = (part.to(torch.get_autocast_dtype(device.type)) for part in joint)
    return weight, bias


def _fp32_head(head: nn.Module) -> tuple[Tensor, Tensor] | nn.Module:
    """Weight (V, W) and bias (V,) in fp32; the module itself where it must be called, for instance an adapter.

    In bf16 a logit of 10 is rounded to a sixteenth, and ties would decide which token comes next.
    """
    return (head.weight.float(), head.bias.float()) if is_plain_linear(head) else head
