"""Whether text that another program wrote is greedy AR's text of given weights: `fluid-eval audit RUN --model M`.

A log holds text, not tokens. AR decodes the stored prompts, and the texts are compared letter by letter, without white
space at their beginning, which some programs drop. A text that a stop string or a length limit cut is compared up to
its end. Where the texts part, the token of the log's text is that of its own encoding by the model's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.common.errors import ConfigError
from fluid_model.decoders import engine_for
from fluid_model.engine.records import Generation, Request
from fluid_model.settings import ArSettings
from fluid_model.tokens import Tokenizer, decode_pieces

from ..common.spec import ModelSpec, RunSpec
from ..results.run_folder import AUDIT, ENVIRONMENT, RESULT, SPEC, Record, held_spec, read_samples, write_json
from ..results.stored_values import read_environment
from ..running.lm_eval_model import Ids, encode_prompts
from ..running.worker import load_for
from . import losslessness
from .foreign_logs import lm_eval_files

SPARE = 8
"""Tokens that AR writes beyond those of the text's own encoding: AR may spell the same text with more."""


@dataclass(frozen=True)
class Spelled:
    """A stored text against AR's. place: token of AR's answer where they part; None where they do not.

    ids: AR's tokens as far as they agree, then the next one of the stored text. tokens: of the stored text.
    """

    key: str
    prompt: Ids
    ids: Ids
    ar_ids: Ids
    place: int | None
    tokens: int


def spec_of_others(folder: Path) -> RunSpec | None:
    """The spec of a finished run whose answers another program wrote; None for other folders."""
    spec = held_spec(folder) if (folder / SPEC).is_file() and (folder / RESULT).is_file() else None
    return spec if spec is not None and spec.backend is not None else None


def audit_text(folder: Path, model: ModelSpec | None = None) -> dict[str, Any]:
    """Audit a run that another program wrote, and store it as audit.json. model: default: the one that the run names.

    Raises ConfigError if the answers were sampled, if there are none, or if the model cannot be loaded.
    """
    # 1) the run and its texts
    spec = spec_of_others(folder)
    assert spec is not None, "the caller asks for such a run"
    source = read_environment(folder / ENVIRONMENT).get("imported", {})
    if source.get("sampled"):
        raise ConfigError(f"{folder}: its answers were sampled; only greedy text can be compared with AR's")
    records = [record for record in read_samples(folder) if record["finish"] not in (None, "lost")]
    if not records:
        raise ConfigError(f"{folder}: no text was generated there, only log-likelihoods")
    # 2) the weights
    model = model or spec.model
    checkpoint = load_for(RunSpec(tasks=spec.tasks, model=model))
    # 3) compare
    is_chat = bool(source.get("chat") or spec.chat)
    renders = is_chat and source.get("harness") not in (None, lm_eval_files.HARNESS)
    prompts = [_prompt(record["prompt"], checkpoint.tokenizer, renders) for record in records]
    report = {
        "model": model.path,
        "decoder": spec.to_dict()["decoder"],
        **_audit(records, prompts, checkpoint, is_chat=is_chat),
    }
    write_json(folder / AUDIT, report)
    return report


def _prompt(text: str, tokenizer: Any, renders: bool) -> str:
    """A prompt as the model got it: messages are rendered by its chat template, a text alone as one user turn."""
    messages = [{"role": "user", "content": text}]
    if text.startswith('[{"'):  # of a chat server: lm-eval stores the messages
        messages, renders = json.loads(text), True
    if not renders or not getattr(tokenizer, "chat_template", None):
        return text
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _audit(
    records: Sequence[Record], prompts: Sequence[str], checkpoint: Checkpoint, *, is_chat: bool
) -> dict[str, Any]:  # fmt: skip
    """The content of audit.json for these texts."""
    # 1) AR decodes the same prompts
    tokenizer = checkpoint.tokenizer
    encoded = encode_prompts(tokenizer, list(dict.fromkeys(prompts)), chat=is_chat)
    lengths = {r["key"]: len(tokenizer.encode(r["output"], add_special_tokens=False)) + SPARE for r in records}
    requests = [
        _request(record["key"], encoded[prompt], lengths[record["key"]], checkpoint)
        for record, prompt in zip(records, prompts, strict=True)
    ]
    answers = {a.key: a for a in engine_for(checkpoint, ArSettings(), losslessness.ROWS).generate(requests)}
    # 2) where texts part
    prompt_ids = {request.key: request.prompt for request in requests}
    texts = [spell(r["key"], r["output"], prompt_ids[r["key"]], answers[r["key"]], tokenizer) for r in records]
    parted = [text for text in texts if text.place is not None]
    # 3) by rounding, or not
    tolerance = None
    if parted:
        agreed = [(text.prompt, text.ar_ids[: text.place]) for text in texts[: losslessness.NOISE_TEXTS]]
        tolerance = losslessness.tolerance(checkpoint, agreed)
    divergences = [_divergence(text, checkpoint, tolerance or 0.0) for text in parted]
    differs = any(divergence["verdict"] == "different" for divergence in divergences)
    return {
        "verdict": "different" if differs else "numerical near-tie" if divergences else "identical",
        "promises": True,
        "n": len(texts),
        "identical": len(texts) - len(parted),
        "tokens": sum(text.tokens for text in texts),
        "agreeing_tokens": sum(text.tokens if text.place is None else text.place for text in texts),
        "dtype": checkpoint.backbone.dtype_name,
        "recheck": None,
        "tolerance": tolerance,
        "divergences": divergences,
        "distribution": None,
    }


def _request(key: str, prompt: Ids, length: int, checkpoint: Checkpoint) -> Request:
    if len(prompt) + length > checkpoint.backbone.window:
        raise ConfigError(f"{key}: prompt and answer have {len(prompt) + length} tokens, more than the model's window")
    return Request(key, prompt, length)


def spell(key: str, output: str, prompt: Ids, answer: Generation, tokenizer: Tokenizer) -> Spelled:
    """A stored text and AR's answer to its prompt, as far as they agree."""
    # 1) how far AR's pieces spell the text
    pieces, _ = decode_pieces(tokenizer, answer.ids)
    text, written, place = output.lstrip(), "", 0
    for piece in pieces:
        longer = (written + piece).lstrip()
        if not (text.startswith(longer) or longer.startswith(text)) or (written.lstrip() == text and text):
            break
        written, place = written + piece, place + 1
    # 2) all of the text: AR may go on where the log's answer was cut
    if written.lstrip().startswith(text):
        return Spelled(key, prompt, answer.ids[:place], answer.ids, None, place)
    # 3) the token with which the text goes on
    rest = text[len(written.lstrip()) :]
    ids = tuple(tokenizer.encode(output, add_special_tokens=False))
    own = decode_pieces(tokenizer, ids)[0]
    ends = {len("".join(own[:n]).lstrip()): n for n in range(len(own) - 1, -1, -1)}
    after = ids[ends[len(text) - len(rest)] :] if len(text) - len(rest) in ends else ()
    after = after or tuple(tokenizer.encode(rest, add_special_tokens=False))
    return Spelled(key, prompt, (*answer.ids[:place], *after), answer.ids, place, place + len(after))


def _divergence(text: Spelled, checkpoint: Checkpoint, tolerance: float) -> Mapping[str, Any]:
    """One divergence, as audit.json holds it."""
    place = text.place
    assert place is not None
    before, answers = (*text.prompt, *text.ids[:place]), (text.ids, text.ar_ids)
    margin, gap = losslessness.margin_and_gap(checkpoint, before, answers, place)
    decode = checkpoint.tokenizer.decode
    ours, theirs = (
        decode(ids[place : place + 1]) if place < len(ids) else losslessness.END for ids in (text.ids, text.ar_ids)
    )
    return {
        "key": text.key, "place": place, "forward": None, "context": decode(text.ids[:place])[-losslessness.CONTEXT :],
        "ours": ours, "theirs": theirs, "margin": margin,
        "verdict": "numerical near-tie" if gap <= tolerance else "different",
    }  # fmt: skip
