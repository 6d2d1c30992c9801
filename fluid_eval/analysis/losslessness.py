"""Does a decoder write what greedy AR writes with the same weights? `fluid-eval audit`; the rules are in docs/audit.md.

Legend: n places, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders import engine_for
from fluid_model.decoders.sampling import nucleus
from fluid_model.engine.records import Generation, Request
from fluid_model.forward.backbone import Backbone
from fluid_model.forward.kv_cache import KVCache
from fluid_model.settings import ArSettings, DecoderSettings, FluidSettings

from ..running.lm_eval_model import Ids
from ..running.worker import load_for
from .reopen import Stored, Text, open_stored

Verdict = Literal["identical", "numerical near-tie", "algorithmic"]
"""Of greedy text. Sampled text: no difference found, undecided, or different."""
FAULTS = ("algorithmic", "different")
"""Verdicts that are no rounding."""
Write = Callable[[Checkpoint, Sequence[Request]], Iterable[Generation]]
"""How the decoder under audit answers."""
END = "(end)"
ROWS = 16
CONTEXT = 60
"""Characters of a divergence's context that are told."""
NOISE_TEXTS, NOISE_PLACES = 8, 32
"""Texts, and places of each, over which rounding is measured."""
NOISE_SHAPES = ((1, 1), (4, 8))
"""Rows and slots of the cached forwards that are held against a plain one."""
BINS, LEAST_P = 20, 0.001
"""Of the distribution test: bins, and the probability below which it fails."""
RARE, ENOUGH = 1e-4, 2000
"""Of the distribution test: the chance, at most, of what counts as rare; the tokens from which on it clears a run."""


@dataclass(frozen=True)
class Divergence:
    """Where a text first leaves AR's.

    place: in the answer, from 0.  forward: that wrote it, None where not recorded.  margin: likeliest minus second
    likeliest token there, nats, in the run's dtype; margin_recheck: in the recheck's.  agrees_in_recheck: whether
    decoder and AR write the same there, both run again in the recheck's dtype.
    """

    key: str
    place: int
    forward: int | None
    context: str
    ours: str
    theirs: str
    margin: float
    margin_recheck: float
    agrees_in_recheck: bool
    verdict: Verdict


def audit_run(folder: Path) -> dict[str, Any]:
    """Audit a finished run; see `audit`. Raises ConfigError if it cannot be opened."""
    stored = open_stored(folder)
    decoder = stored.spec.decoder

    def write(checkpoint: Checkpoint, requests: Sequence[Request]) -> Iterable[Generation]:
        return engine_for(checkpoint, decoder, ROWS).generate(requests)

    return {
        "model": stored.spec.model.path,
        "decoder": stored.spec.to_dict()["decoder"],
        **audit(stored.texts, stored.checkpoint, decoder, write, lambda: precise(stored)),
    }


def precise(stored: Stored) -> Checkpoint:
    """A run's model in the next wider dtype: float32, or float64 where the run is in float32 already."""
    if stored.checkpoint.backbone.dtype == torch.float32:
        return in_float64(load_for(stored.spec))
    return load_for(replace(stored.spec, model=replace(stored.spec.model, dtype="float32")))


def in_float64(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights in float64; the checkpoint given is used up. Norms stay float32 in transformers' own forward,
    which rounds each slot alike whatever stands beside it.
    """
    head = None if checkpoint.head is None else checkpoint.head.double()
    backbone = Backbone(checkpoint.model.double())
    backbone.explicit = None  # transformers' own forward rounds least
    return replace(checkpoint, backbone=backbone, head=head)


def audit(
    texts: Sequence[Text], checkpoint: Checkpoint, decoder: DecoderSettings, write: Write,
    wider: Callable[[], Checkpoint],
) -> dict[str, Any]:  # fmt: skip
    """What audit.json holds of texts that `write` wrote.

    wider: the same weights in a dtype that rounds less, asked for where texts differ.  Greedy text is judged token by
    token; sampled text by its distribution, and what is told of tokens is against AR with the same random numbers.
    """
    theirs = {answer.key: answer.ids for answer in _ar(checkpoint, decoder, texts)}
    parted = {t.key: place for t in texts if (place := parting(t, theirs[t.key])) is not None}
    lengths = {t.key: len(t.ids) + t.ended for t in texts}
    told: dict[str, Any] = {
        "verdict": "identical",
        "promises": promises(decoder),
        "n": len(texts),
        "identical": len(texts) - len(parted),
        "tokens": sum(lengths.values()),
        "agreeing_tokens": sum(parted.get(key, length) for key, length in lengths.items()),
        "dtype": _name(checkpoint),
        "recheck": None,
        "tolerance": None,
        "divergences": [],
        "distribution": None,
    }
    if decoder.temperature > 0:
        found = distribution(texts, checkpoint, decoder)
        sound = "no difference found" if found["n"] >= ENOUGH else "undecided"
        return {**told, "verdict": sound if found["ok"] else "different", "distribution": found}
    if not parted:
        return told
    judge = Judge(checkpoint, wider(), [t for t in texts if t.key in parted], theirs)
    divergences = judge.judge(decoder, write)
    worst = any(each.verdict == "algorithmic" for each in divergences)
    return {
        **told,
        "verdict": "algorithmic" if worst else "numerical near-tie",
        "recheck": _name(judge.wide),
        "tolerance": judge.tolerance,
        "divergences": [asdict(each) for each in divergences],
    }


def promises(decoder: DecoderSettings) -> bool:
    """Whether a decoder claims to write AR's text."""
    return isinstance(decoder, ArSettings) or (isinstance(decoder, FluidSettings) and decoder.verify)


def parting(text: Text, theirs: Ids) -> int | None:
    """The first place where a text is not AR's, its end included; None if there is none."""
    end = (None,) if text.ended else ()
    pairs = zip((*text.ids, *end), (*theirs, None), strict=False)
    return next((place for place, (ours, other) in enumerate(pairs) if ours != other), None)


class Judge:
    """Texts that differ from AR's: by rounding, or by what the decoder does?"""

    def __init__(self, narrow: Checkpoint, wide: Checkpoint, texts: Sequence[Text], theirs: Mapping[str, Ids]) -> None:
        self.narrow, self.wide, self.texts, self.theirs = narrow, wide, texts, theirs
        self.tolerance = self._tolerance(narrow, texts, theirs)

    def judge(self, decoder: DecoderSettings, write: Write) -> list[Divergence]:
        """One verdict a text."""
        answers = {a.key: a for a in write(self.wide, [_request(t) for t in self.texts])}
        again = [replace(t, ids=answers[t.key].ids, ended=answers[t.key].finish == "eos") for t in self.texts]
        theirs = {a.key: a.ids for a in _ar(self.wide, decoder, again)}
        tolerance = self._tolerance(self.wide, again, theirs)
        found = []
        for text, retold in zip(self.texts, again, strict=True):
            where, other = parting(text, self.theirs[text.key]), parting(retold, theirs[text.key])
            assert where is not None
            logits = _plain(self.narrow, (*text.prompt, *text.ids[:where]), 1)[0]
            wide = _plain(self.wide, (*text.prompt, *text.ids[:where]), 1)[0]
            close = self._gap(self.narrow, logits, text, self.theirs, where) <= self.tolerance
            if other is not None:  # it parts in the wider dtype too: there the tie must be closer still
                beyond = _plain(self.wide, (*retold.prompt, *retold.ids[:other]), 1)[0]
                close = close and self._gap(self.wide, beyond, retold, theirs, other) <= tolerance
            found.append(
                Divergence(
                    key=text.key,
                    place=where,
                    forward=text.written[where] if where < len(text.written) else None,
                    context=self._text(text.ids[:where])[-CONTEXT:],
                    ours=self._token(text.ids, where),
                    theirs=self._token(self.theirs[text.key], where),
                    margin=_margin(logits),
                    margin_recheck=_margin(wide),
                    agrees_in_recheck=other is None,
                    verdict="numerical near-tie" if close else "algorithmic",
                )
            )
        return found

    def _gap(self, checkpoint: Checkpoint, logits: Tensor, text: Text, theirs: Mapping[str, Ids], place: int) -> float:
        """How far the less likely of both choices is below the likeliest token, nats. logits: (V,)."""
        ends = torch.tensor(checkpoint.end_ids, device=logits.device)
        said = [logits[ids[place]] if place < len(ids) else logits[ends].max() for ids in (text.ids, theirs[text.key])]
        return float(logits.max() - torch.stack(said).min())

    def _tolerance(self, checkpoint: Checkpoint, texts: Sequence[Text], theirs: Mapping[str, Ids]) -> float:
        """By rounding, as measured on what both agree on."""
        some = texts[:NOISE_TEXTS]
        return tolerance(checkpoint, [(t.prompt, t.ids[: parting(t, theirs[t.key])]) for t in some])

    def _text(self, ids: Ids) -> str:
        text: str = self.narrow.tokenizer.decode(ids)
        return text

    def _token(self, ids: Ids, place: int) -> str:
        return self._text(ids[place : place + 1]) if place < len(ids) else END


def tolerance(checkpoint: Checkpoint, texts: Iterable[tuple[Ids, Ids]]) -> float:
    """Nats by which rounding can turn one choice into another: twice the most it moves a logit (two may move) over
    these (prompt, answer).
    """
    return 2 * max((rounding(checkpoint, *each) for each in texts), default=0.0)


@torch.inference_mode()
def rounding(checkpoint: Checkpoint, prompt: Ids, answer: Ids) -> float:
    """The most by which a logit of the two likeliest tokens differs between one plain forward and cached ones of other
    shapes, over an answer's last places; at least a unit in the last place of the largest, nats.
    """
    ids, backbone = (*prompt, *answer), checkpoint.backbone
    tail = min(NOISE_PLACES, len(answer) + 1, len(ids))
    plain = _plain(checkpoint, ids, tail)  # (n, V)
    best, which = plain.topk(2)
    unit = max(torch.finfo(backbone.dtype).eps, torch.finfo(plain.dtype).eps)
    moved = unit * float(best.abs().max())
    for rows, width in NOISE_SHAPES:
        cache, start, hidden = KVCache(rows, len(ids)), 0, []
        while start < len(ids):
            stop = min(start + width, len(ids)) if start else max(1, len(ids) - tail)
            fed = torch.tensor([ids[start:stop]] * rows, device=backbone.device)
            reading = cache.set_write_positions(0, [start] * rows, stop - start, backbone.device)
            hidden.append(backbone.forward(fed, reading, cache)[0])
            start = stop
        cached = backbone.logits(torch.cat(hidden)[-tail:])
        moved = max(moved, float((cached.gather(1, which) - best).abs().max()))
    return moved


@torch.inference_mode()
def distribution(
    texts: Sequence[Text], checkpoint: Checkpoint, decoder: DecoderSettings, seed: int = 0
) -> dict[str, Any]:
    """Whether sampled tokens come from the model's own distribution: chi-square over their randomised ranks, and how
    many are tokens that it hardly ever says, which no bin of the former shows.

    Each token's place in the distribution function of its plain forward, after temperature and nucleus, the likeliest
    first, is uniform where it was drawn from it.  (Rosenblatt 1952)  n: tokens, ends included.  rare: tokens where one
    as unlikely comes with a chance below RARE.  p: the smaller of both tests, times two.
    """
    from scipy.stats import binomtest, chisquare

    heat, top_p = decoder.temperature, getattr(decoder, "top_p", 1.0)
    slack = tolerance(checkpoint, [(text.prompt, text.ids) for text in texts[:NOISE_TEXTS]]) / heat
    random, counts, rare = torch.Generator().manual_seed(seed), torch.zeros(BINS), 0
    for text in texts:
        count = len(text.ids) + text.ended
        if not count:
            continue
        logits = _plain(checkpoint, (*text.prompt, *text.ids), len(text.ids) + 1)[:count].cpu()  # (n, V)
        scaled = logits / heat
        probabilities, order = nucleus(scaled, top_p)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        said = list(text.ids)
        if text.ended:  # which of the tokens that end a text it was is not stored: as likely as each is to be drawn
            kept = torch.empty_like(scaled[-1]).scatter(0, order[-1], probabilities[-1])
            ends = torch.tensor(checkpoint.end_ids)
            chances = kept[ends] if kept[ends].any() else scaled[-1, ends].softmax(-1)
            said.append(int(ends[chances.multinomial(1, generator=random)]))
        rank = (order == torch.tensor(said)[:, None]).int().argmax(-1, keepdim=True)
        inside = torch.rand(count, 1, generator=random)
        place = (probabilities.cumsum(-1) - probabilities).gather(1, rank) + inside * probabilities.gather(1, rank)
        counts += torch.histc(place.clamp(0, 1), BINS, 0, 1)
        rare += int((tail(scaled.gather(1, order), rank, top_p, slack) < RARE).sum())
    n = int(counts.sum())
    ranks = chisquare(counts.double().numpy()) if n else None
    p_ranks = float(ranks.pvalue) if ranks else 1.0
    p_rare = float(binomtest(rare, n, RARE, alternative="greater").pvalue) if n else 1.0
    p = min(1.0, 2 * min(p_ranks, p_rare))
    return {
        "n": n, "statistic": float(ranks.statistic) if ranks else 0.0, "dof": BINS - 1, "p_ranks": p_ranks,
        "rare": rare, "rare_below": RARE, "p_rare": p_rare, "p": p, "enough": ENOUGH, "ok": p >= LEAST_P,
    }  # fmt: skip


def tail(scaled: Tensor, rank: Tensor, top_p: float, slack: float) -> Tensor:
    """Chance, at most, that nucleus sampling says a token no likelier than this one; 0 outside the nucleus.

    scaled: (n, V) logits over the temperature, falling.  rank: (n, 1) the token's.  slack: nats by which rounding may
    have moved two logits against each other where the token was drawn; all doubt goes to the token.  Returns (n,).
    """
    logs = scaled.double().log_softmax(-1)
    nothing = logs.new_zeros(len(logs), 1)
    ahead = torch.searchsorted(-logs, -(logs + slack))  # of each: the tokens that are likelier whatever rounding did
    before = torch.cat([nothing, logs.exp().cumsum(-1)], -1).gather(1, ahead)
    before = before / (before + (1 - before).clamp(min=0) * math.exp(slack))
    kept = logs.exp().masked_fill(before >= top_p, 0.0)
    sums = torch.cat([nothing, kept.cumsum(-1)], -1)
    below = (sums[:, -1:] - sums.gather(1, ahead.gather(1, rank))) * math.exp(slack) / top_p
    return below.clamp(max=1).masked_fill(kept.gather(1, rank) == 0, 0.0)[:, 0]


@torch.inference_mode()
def _plain(checkpoint: Checkpoint, ids: Ids, count: int) -> Tensor:
    """(count, V) logits at the last places of a row read at once by transformers' own forward, without a cache."""
    row = torch.tensor([ids], device=checkpoint.backbone.device)
    hidden = checkpoint.model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -count:]
    return checkpoint.backbone.logits(hidden)


def _margin(logits: Tensor) -> float:
    """Likeliest minus second likeliest. logits: (V,)."""
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


def _ar(checkpoint: Checkpoint, decoder: DecoderSettings, texts: Sequence[Text]) -> Iterable[Generation]:
    """AR's answers, as far as these texts go."""
    settings = ArSettings(decoder.temperature, getattr(decoder, "top_p", 1.0))
    return engine_for(checkpoint, settings, ROWS).generate([_request(text) for text in texts])


def _request(text: Text) -> Request:
    """As many tokens as it wrote, its end included. Stop strings need not be looked for: it has ended where it did."""
    return Request(text.key, text.prompt, max(1, len(text.ids) + text.ended), seed=text.seed)


def _name(checkpoint: Checkpoint) -> str:
    return str(checkpoint.backbone.dtype).removeprefix("torch.")
