"""Losslessness: does a decoder write the text that AR decoding of the same weights writes? `fluid-eval audit`.

Greedy text is compared token by token, and each first difference is either rounding (a numerical near-tie) or a fault
of the algorithm. Sampled text is tested against AR's distribution. The rules and their limits are in docs/audit.md.

    AR:        ... has 17 plates    <- first difference at place 3 of the answer
    decoder:   ... has 11 plates    <- near-tie if both logits lie within the measured rounding error of the largest

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
from fluid_model.settings import ArSettings, DecoderSettings

from ..results.run_folder import AUDIT, write_json
from ..running.lm_eval_model import Ids
from ..running.worker import load_for
from .reopen import ReopenedRun, StoredText, open_run

AuditVerdict = Literal["identical", "numerical near-tie", "algorithmic"]
"""Of greedy text. Of sampled text: no difference found, undecided, or different."""
FAULTS = ("algorithmic", "different")
"""Verdicts that rounding does not explain."""
Decode = Callable[[Checkpoint, Sequence[Request]], Iterable[Generation]]
"""The decoder under audit: answers requests with the weights given."""
END = "(end)"
"""Shown where one text ends and the other goes on."""
ROWS = 16
CONTEXT = 60
"""Characters reported before a divergence."""
NOISE_TEXTS, NOISE_PLACES = 8, 32
"""Texts, and places of each, over which rounding is measured."""
NOISE_SHAPES = ((1, 1), (4, 8))
"""Rows and slots of the cached forwards that are compared with an uncached one."""
BINS, LEAST_P = 20, 0.001
"""Of the distribution test: bins, and the p below which it fails."""
RARE, ENOUGH = 1e-4, 2000
"""Of the distribution test: the largest chance that counts as rare; the fewest tokens that can clear a run."""


@dataclass(frozen=True)
class Divergence:
    """The first difference between a text and AR's.

    place: in the answer, from 0.  forward: the one that wrote the token, None where not recorded.
    ours, theirs: the decoder's token and AR's.
    margin: likeliest minus second likeliest logit there, nats, in the run's dtype; margin_recheck: in the recheck's.
    agrees_in_recheck: decoder and AR write the same text if both decode again in the recheck's dtype.
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
    verdict: AuditVerdict


def audit_run(folder: Path) -> dict[str, Any]:
    """Audit a finished run, see `audit`, and store it as audit.json. Raises ConfigError if it cannot be opened."""
    run = open_run(folder)
    decoder = run.spec.decoder

    def decode(checkpoint: Checkpoint, requests: Sequence[Request]) -> Iterable[Generation]:
        return engine_for(checkpoint, decoder, ROWS).generate(requests)

    report = {
        "model": run.spec.model.path,
        "decoder": run.spec.to_dict()["decoder"],
        **audit(run.texts, run.checkpoint, decoder, decode, lambda: load_wider(run)),
    }
    write_json(folder / AUDIT, report)
    return report


def load_wider(run: ReopenedRun) -> Checkpoint:
    """A run's model in the next wider dtype: float32, or float64 where the run is in float32 already."""
    if run.checkpoint.backbone.dtype == torch.float32:
        return in_float64(load_for(run.spec))
    return load_for(replace(run.spec, model=replace(run.spec.model, dtype="float32")))


def in_float64(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights in float64. The given checkpoint's modules are converted in place.

    Norms stay float32 in transformers' own forward, which rounds a slot alike whatever stands beside it.
    """
    head = None if checkpoint.head is None else checkpoint.head.double()
    gated = checkpoint.backbone.adapter
    backbone = Backbone(checkpoint.model.double(), None if gated is None else gated.double())
    if gated is None:
        backbone.explicit = None  # transformers' own forward rounds least
    return replace(checkpoint, backbone=backbone, head=head)


def audit(
    texts: Sequence[StoredText], checkpoint: Checkpoint, decoder: DecoderSettings, decode: Decode,
    wider: Callable[[], Checkpoint],
) -> dict[str, Any]:  # fmt: skip
    """The content of audit.json for texts that `decode` wrote.

    wider: loads the same weights in a dtype that rounds less; called only where greedy texts differ.
    Sampled text: the counts of equal tokens are against AR with the same random numbers.
    """
    # 1) AR decodes the same prompts; count agreeing tokens, ends included
    ar_ids = {answer.key: answer.ids for answer in _decode_ar(checkpoint, decoder, texts)}
    divergent = {t.key: place for t in texts if (place := first_difference(t, ar_ids[t.key])) is not None}
    lengths = {text.key: len(text.ids) + text.ended for text in texts}
    report: dict[str, Any] = {
        "verdict": "identical",
        "promises": decoder.writes_ar_text,
        "n": len(texts),
        "identical": len(texts) - len(divergent),
        "tokens": sum(lengths.values()),
        "agreeing_tokens": sum(divergent.get(key, length) for key, length in lengths.items()),
        "dtype": _dtype_name(checkpoint),
        "recheck": None,
        "tolerance": None,
        "divergences": [],
        "distribution": None,
    }
    # 2) sampled text: by distribution
    if decoder.temperature > 0:
        test = distribution(texts, checkpoint, decoder)
        passed = "no difference found" if test["n"] >= ENOUGH else "undecided"
        return {**report, "verdict": passed if test["ok"] else "different", "distribution": test}
    # 3) greedy text: by the first difference of each text
    if not divergent:
        return report
    judge = DivergenceJudge(checkpoint, wider(), [t for t in texts if t.key in divergent], ar_ids)
    divergences = judge.judge(decoder, decode)
    algorithmic = any(divergence.verdict == "algorithmic" for divergence in divergences)
    return {
        **report,
        "verdict": "algorithmic" if algorithmic else "numerical near-tie",
        "recheck": _dtype_name(judge.wide),
        "tolerance": judge.tolerance,
        "divergences": [asdict(divergence) for divergence in divergences],
    }


def first_difference(text: StoredText, ar_ids: Ids) -> int | None:
    """The first place where a text differs from AR's, its end included; None if there is none."""
    end = (None,) if text.ended else ()
    pairs = zip((*text.ids, *end), (*ar_ids, None), strict=False)
    return next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), None)


class DivergenceJudge:
    """Decides whether texts differ from AR's by rounding or by a fault of the decoder.

    narrow: the weights in the run's dtype.  wide: the same weights in the next wider one.
    ar_ids: AR's answers in the run's dtype, by key.
    """

    def __init__(
        self, narrow: Checkpoint, wide: Checkpoint, texts: Sequence[StoredText], ar_ids: Mapping[str, Ids]
    ) -> None:
        self.narrow, self.wide, self.texts, self.ar_ids = narrow, wide, texts, ar_ids
        self.tolerance = self._tolerance(narrow, texts, ar_ids)

    def judge(self, decoder: DecoderSettings, decode: Decode) -> list[Divergence]:
        """One divergence a text, with its verdict."""
        # 1) decoder and AR decode the same prompts again in the wider dtype
        answers = {a.key: a for a in decode(self.wide, [_request(text) for text in self.texts])}
        rechecks = [
            replace(text, ids=answers[text.key].ids, ended=answers[text.key].finish == "eos") for text in self.texts
        ]
        wide_ar_ids = {answer.key: answer.ids for answer in _decode_ar(self.wide, decoder, rechecks)}
        wide_tolerance = self._tolerance(self.wide, rechecks, wide_ar_ids)
        divergences = []
        for text, recheck in zip(self.texts, rechecks, strict=True):
            place = first_difference(text, self.ar_ids[text.key])
            wide_place = first_difference(recheck, wide_ar_ids[text.key])
            assert place is not None
            # 2) a near-tie: both choices lie within rounding of the likeliest token
            logits = _uncached_logits(self.narrow, (*text.prompt, *text.ids[:place]), 1)[0]  # (V,)
            wide_logits = _uncached_logits(self.wide, (*text.prompt, *text.ids[:place]), 1)[0]
            near_tie = _gap(self.narrow, logits, (text.ids, self.ar_ids[text.key]), place) <= self.tolerance
            # 3) a text that differs in the wider dtype too needs a tie that is closer still
            if wide_place is not None:
                beyond = _uncached_logits(self.wide, (*recheck.prompt, *recheck.ids[:wide_place]), 1)[0]
                gap = _gap(self.wide, beyond, (recheck.ids, wide_ar_ids[text.key]), wide_place)
                near_tie = near_tie and gap <= wide_tolerance
            divergences.append(
                Divergence(
                    key=text.key,
                    place=place,
                    forward=text.written[place] if place < len(text.written) else None,
                    context=self._text(text.ids[:place])[-CONTEXT:],
                    ours=self._token(text.ids, place),
                    theirs=self._token(self.ar_ids[text.key], place),
                    margin=_margin(logits),
                    margin_recheck=_margin(wide_logits),
                    agrees_in_recheck=wide_place is None,
                    verdict="numerical near-tie" if near_tie else "algorithmic",
                )
            )
        return divergences

    def _tolerance(self, checkpoint: Checkpoint, texts: Sequence[StoredText], ar_ids: Mapping[str, Ids]) -> float:
        """The rounding measured over the tokens that decoder and AR agree on."""
        agreed = [(t.prompt, t.ids[: first_difference(t, ar_ids[t.key])]) for t in texts[:NOISE_TEXTS]]
        return tolerance(checkpoint, agreed)

    def _text(self, ids: Ids) -> str:
        text: str = self.narrow.tokenizer.decode(ids)
        return text

    def _token(self, ids: Ids, place: int) -> str:
        return self._text(ids[place : place + 1]) if place < len(ids) else END


def tolerance(checkpoint: Checkpoint, texts: Iterable[tuple[Ids, Ids]]) -> float:
    """Nats by which rounding can turn one choice into another: twice the largest error of a logit, as two may move.

    texts: (prompt, answer) pairs.
    """
    return 2 * max((rounding(checkpoint, *pair) for pair in texts), default=0.0)


@torch.inference_mode()
def rounding(checkpoint: Checkpoint, prompt: Ids, answer: Ids) -> float:
    """Largest difference of a logit between an uncached forward and cached forwards of other shapes, nats.

    Over the two likeliest tokens at an answer's last places; at least a unit in the last place of the largest logit.
    """
    # 1) the reference: one uncached forward
    ids, backbone = (*prompt, *answer), checkpoint.backbone
    tail = min(NOISE_PLACES, len(answer) + 1, len(ids))
    uncached = _uncached_logits(checkpoint, ids, tail)  # (n, V)
    best, tokens = uncached.topk(2)  # (n, 2)
    unit = max(torch.finfo(backbone.dtype).eps, torch.finfo(uncached.dtype).eps)
    error = unit * float(best.abs().max())
    # 2) the same ids through the cache, a few slots at a time
    for rows, width in NOISE_SHAPES:
        cache, start, hidden = KVCache(rows, len(ids)), 0, []
        while start < len(ids):
            stop = min(start + width, len(ids)) if start else max(1, len(ids) - tail)
            fed = torch.tensor([ids[start:stop]] * rows, device=backbone.device)
            attention = cache.set_write_positions(0, [start] * rows, stop - start, backbone.device)
            hidden.append(backbone.forward(fed, attention, cache)[0])
            start = stop
        cached = backbone.logits(torch.cat(hidden)[-tail:])
        error = max(error, float((cached.gather(1, tokens) - best).abs().max()))
    return error


@torch.inference_mode()
def distribution(
    texts: Sequence[StoredText], checkpoint: Checkpoint, decoder: DecoderSettings, seed: int = 0
) -> dict[str, Any]:
    """Tests whether sampled tokens come from the model's own distribution, after temperature and nucleus.

    Ranks: a token's randomised place in the distribution function, likeliest token first, is uniform if the token was
    drawn from it (Rosenblatt 1952); chi-square over BINS bins.
    Rare tokens: more tokens with a tail chance below RARE than a binomial allows; no bin shows them.
    n: tokens, ends included.  p: the smaller of both p values, times two (Bonferroni).
    """
    from scipy.stats import binomtest, chisquare

    temperature, top_p = decoder.temperature, decoder.top_p
    slack = tolerance(checkpoint, [(text.prompt, text.ids) for text in texts[:NOISE_TEXTS]]) / temperature
    random, counts, rare = torch.Generator().manual_seed(seed), torch.zeros(BINS), 0
    for text in texts:
        n = len(text.ids) + text.ended
        if not n:
            continue
        # 1) the distribution that AR samples from at each place
        logits = _uncached_logits(checkpoint, (*text.prompt, *text.ids), len(text.ids) + 1)[:n].cpu()  # (n, V)
        scaled = logits / temperature
        probabilities, order = nucleus(scaled, top_p)  # (n, V) each, likeliest first
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        sampled = list(text.ids)
        if text.ended:
            sampled.append(_draw_end(scaled[-1], probabilities[-1], order[-1], checkpoint.end_ids, random))
        # 2) each token's place in the distribution function
        rank = (order == torch.tensor(sampled)[:, None]).int().argmax(-1, keepdim=True)  # (n, 1)
        inside = torch.rand(n, 1, generator=random)
        place = (probabilities.cumsum(-1) - probabilities).gather(1, rank) + inside * probabilities.gather(1, rank)
        counts += torch.histc(place.clamp(0, 1), BINS, 0, 1)
        # 3) tokens that AR hardly ever samples
        rare += int((tail(scaled.gather(1, order), rank, top_p, slack) < RARE).sum())
    total = int(counts.sum())
    ranks = chisquare(counts.double().numpy()) if total else None
    p_ranks = float(ranks.pvalue) if ranks else 1.0
    p_rare = float(binomtest(rare, total, RARE, alternative="greater").pvalue) if total else 1.0
    p = min(1.0, 2 * min(p_ranks, p_rare))
    return {
        "n": total, "statistic": float(ranks.statistic) if ranks else 0.0, "dof": BINS - 1, "p_ranks": p_ranks,
        "rare": rare, "rare_below": RARE, "p_rare": p_rare, "p": p, "enough": ENOUGH, "ok": p >= LEAST_P,
    }  # fmt: skip


def _draw_end(
    scaled: Tensor, probabilities: Tensor, order: Tensor, end_ids: Sequence[int], random: torch.Generator
) -> int:
    """An end token for a text that ended: runs do not store which one it was, so it is drawn by AR's chances.

    scaled: (V,) logits over the temperature.  probabilities, order: (V,) after nucleus, and their token ids.
    """
    in_nucleus = torch.empty_like(scaled).scatter(0, order, probabilities)
    ends = torch.tensor(end_ids)
    chances = in_nucleus[ends] if in_nucleus[ends].any() else scaled[ends].softmax(-1)
    return int(ends[chances.multinomial(1, generator=random)])


def tail(scaled: Tensor, rank: Tensor, top_p: float, slack: float) -> Tensor:
    """Upper bound on the chance that nucleus sampling draws a token no likelier than this one; 0 outside the nucleus.

    scaled: (n, V) logits over the temperature, falling.  rank: (n, 1) rank of the token.
    slack: nats by which rounding may have moved two logits against each other; every doubt favours the token.
    Returns (n,).
    """
    logs = scaled.double().log_softmax(-1)
    nothing = logs.new_zeros(len(logs), 1)
    # 1) probability of the tokens ahead of each, whatever rounding did
    ahead = torch.searchsorted(-logs, -(logs + slack))  # (n, V) how many they are
    before = torch.cat([nothing, logs.exp().cumsum(-1)], -1).gather(1, ahead)
    before = before / (before + (1 - before).clamp(min=0) * math.exp(slack))
    # 2) the nucleus, and in it the probability of this token and those behind it
    in_nucleus = logs.exp().masked_fill(before >= top_p, 0.0)
    sums = torch.cat([nothing, in_nucleus.cumsum(-1)], -1)
    below = (sums[:, -1:] - sums.gather(1, ahead.gather(1, rank))) * math.exp(slack) / top_p
    return below.clamp(max=1).masked_fill(in_nucleus.gather(1, rank) == 0, 0.0)[:, 0]


@torch.inference_mode()
def _uncached_logits(checkpoint: Checkpoint, ids: Ids, count: int) -> Tensor:
    """(count, V) logits at the last places of a row, by one forward of transformers' own code without a cache."""
    row = torch.tensor([ids], device=checkpoint.backbone.device)
    hidden = checkpoint.model.base_model(input_ids=row, use_cache=False).last_hidden_state[0, -count:]
    return checkpoint.backbone.logits(hidden)


def _margin(logits: Tensor) -> float:
    """Likeliest minus second likeliest. logits: (V,)."""
    first, second = logits.topk(2).values.tolist()
    return float(first - second)


def margin_and_gap(checkpoint: Checkpoint, before: Ids, answers: Sequence[Ids], place: int) -> tuple[float, float]:
    """At a place of answers: likeliest minus second likeliest logit, and likeliest minus the less likely choice, nats.

    before: prompt and answer up to there.  answers: one that has ended there chooses an end token.
    """
    logits = _uncached_logits(checkpoint, before, 1)[0]  # (V,)
    return _margin(logits), _gap(checkpoint, logits, answers, place)


def _gap(checkpoint: Checkpoint, logits: Tensor, answers: Sequence[Ids], place: int) -> float:
    """Distance of the less likely of the answers' choices from the likeliest token, nats. logits: (V,)."""
    ends = torch.tensor(checkpoint.end_ids, device=logits.device)
    choices = [logits[ids[place]] if place < len(ids) else logits[ends].max() for ids in answers]
    return float(logits.max() - torch.stack(choices).min())


def _decode_ar(
    checkpoint: Checkpoint, decoder: DecoderSettings, texts: Sequence[StoredText]
) -> Iterable[Generation]:  # fmt: skip
    """AR's answers to the prompts of these texts, each as long as its text."""
    settings = ArSettings(decoder.temperature, decoder.top_p)
    return engine_for(checkpoint, settings, ROWS).generate([_request(text) for text in texts])


def _request(text: StoredText) -> Request:
    """A request for as many tokens as the text has, its end included, and therefore without stop strings."""
    return Request(text.key, text.prompt, max(1, len(text.ids) + text.ended), seed=text.seed)


def _dtype_name(checkpoint: Checkpoint) -> str:
    return checkpoint.backbone.dtype_name
