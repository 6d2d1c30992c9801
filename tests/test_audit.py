"""The audit tells rounding from fault: doubles that break one rule of a decoder each, and one that only rounds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch

import fluid_model
from fluid_eval.analysis.losslessness import (
    BINS,
    LEAST_P,
    audit,
    distribution,
    first_difference,
    in_float64,
    rounding,
    tail,
)
from fluid_eval.analysis.reopen import StoredText, was_cut
from fluid_eval.cli.main import main
from fluid_eval.common.paths import resource
from fluid_eval.results.run_folder import encode, read_samples
from fluid_model import ArSettings, FluidSettings, Request, engine_for
from fluid_model.checkpoints.checkpoint import Checkpoint
from fluid_model.decoders.ar import ArStrategy
from fluid_model.decoders.draft_rows import DraftRows
from fluid_model.decoders.fluid import FluidStrategy
from fluid_model.decoders.sampling import choose
from fluid_model.decoders.verification import verify_path
from fluid_model.engine.loop import Engine
from fluid_model.engine.records import Generation
from fluid_model.forward.backbone import Backbone

from .test_laws import CHECKPOINT, requests

FLUID = FluidSettings(slot_budget=1000, min_horizon=4)
QUESTIONS = ("How many plates does Omar have now?", "A train leaves at 8. When does it arrive?", "What is 17 + 6?")
LOOSE = 0.8


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return fluid_model.load(str(resource("checkpoints") / "tiny-fluid"), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def work(checkpoint) -> list[Request]:
    ids = [tuple(checkpoint.tokenizer(f"Question: {text}\nAnswer:")["input_ids"]) for text in QUESTIONS]
    return [Request(str(n), prompt, 32, seed=n) for n, prompt in enumerate(ids)]


def stored(checkpoint: Checkpoint, work: Sequence[Request], answers: Iterable[Generation]) -> list[StoredText]:
    """Answers as a stored run holds them."""
    asked = {request.key: request for request in work}
    return [
        StoredText(a.key, "t", asked[a.key].prompt, a.ids, a.finish == "eos", asked[a.key].seed, tuple(a.trace.written))
        for a in answers
    ]


def audited(checkpoint: Checkpoint, work: Sequence[Request], decoder, write: Callable) -> dict:
    texts = stored(checkpoint, work, write(checkpoint, work))
    return audit(texts, checkpoint, decoder, write, lambda: wider(checkpoint))


def wider(checkpoint: Checkpoint) -> Checkpoint:
    model = copy.deepcopy(checkpoint.model)
    return in_float64(replace(checkpoint, backbone=Backbone(model), head=copy.deepcopy(checkpoint.head)))


def by(strategy: Callable[[Checkpoint], object]) -> Callable:
    """Answers of a decoder that no setting names."""

    def write(checkpoint: Checkpoint, work: Sequence[Request]):
        return Engine(checkpoint.backbone, checkpoint.tokenizer, checkpoint.end_ids, strategy(checkpoint), 4).generate(
            work
        )

    return write


def fluid(kind: type[FluidStrategy]) -> Callable:
    return by(lambda c: kind(c.backbone, c.head, c.mask_id, FLUID))


def skips_the_last_draft(tree, predictions):
    path = verify_path(tree, predictions)
    leaves = set(range(len(tree.tokens))) - set(tree.parents)
    return [*path, *[node for node in leaves if tree.parents[node] == path[-1]][:1]]


def keeps_a_rejected_draft(tree, predictions):
    path = verify_path(tree, predictions)
    children = [node for node, parent in enumerate(tree.parents) if parent == path[-1]]
    return [*path, *children[:1]]


def test_what_verifies_is_identical(checkpoint, work):
    report = audited(checkpoint, work, FLUID, fluid(FluidStrategy))
    assert report["verdict"] == "identical"
    assert report["identical"] == report["n"] == len(work)
    assert report["agreeing_tokens"] == report["tokens"] > 60
    assert report["promises"]
    assert not report["divergences"]


@pytest.mark.parametrize("verify", [skips_the_last_draft, keeps_a_rejected_draft])
def test_a_broken_decoder_is_algorithmic(checkpoint, work, monkeypatch, verify):
    monkeypatch.setattr("fluid_model.decoders.fluid.open_drafts", lambda rows, limits, **_: DraftRows(rows, limits))
    monkeypatch.setattr("fluid_model.decoders.draft_rows.verify_path", verify)
    report = audited(checkpoint, work, FLUID, fluid(FluidStrategy))
    assert report["verdict"] == "algorithmic"
    first = report["divergences"][0]
    assert first["margin"] > report["tolerance"] > 0
    assert not first["agrees_in_recheck"]
    assert first["ours"] != first["theirs"]
    assert first["forward"] > 1
    assert report["agreeing_tokens"] < report["tokens"]


def test_a_decoder_that_promises_nothing_is_measured_all_the_same(checkpoint, work):
    loose = replace(FLUID, verify=False, confidence=0.1)
    report = audited(checkpoint, work, loose, lambda c, w: engine_for(c, loose, 4).generate(w))
    assert report["verdict"] == "algorithmic"
    assert not report["promises"]


class Nudged(Backbone):
    """Logits of one token are a little higher."""

    token, more = 0, 1e-6

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = super().logits(hidden)
        logits[..., self.token] += self.more
        return logits


def tied() -> tuple[Checkpoint, int]:
    """A random model in which another token is always exactly as likely as one it writes."""
    checkpoint = replace(CHECKPOINT, backbone=Backbone(copy.deepcopy(CHECKPOINT.model)))
    (answer,) = engine_for(checkpoint, ArSettings(), 1).generate(requests(1))
    first = answer.ids[5]
    twin = next(t for t in range(first + 1, 257) if t not in answer.ids)
    with torch.no_grad():
        head = checkpoint.model.get_output_embeddings().weight
        head[twin] = head[first]
    return replace(checkpoint, backbone=Backbone(checkpoint.model)), twin


@pytest.mark.parametrize(("more", "verdict"), [(1e-6, "numerical near-tie"), (1e-3, "algorithmic")])
def test_a_nudge_within_rounding_at_a_tie_is_a_near_tie(more, verdict):
    """And one beyond rounding, where no tie was, is not."""
    checkpoint, twin = tied()
    if verdict == "algorithmic":  # the twin falls behind by half of what the nudge adds
        with torch.no_grad():
            checkpoint.model.get_output_embeddings().weight[twin] *= 1 - 2e-4

    def nudged(c: Checkpoint) -> ArStrategy:
        backbone = Nudged(c.model)
        backbone.token, backbone.more = twin, more
        return ArStrategy(backbone, ArSettings())

    report = audited(checkpoint, requests(2), ArSettings(), by(nudged))
    assert report["verdict"] == verdict
    assert not any(each["agrees_in_recheck"] for each in report["divergences"])
    if verdict == "numerical near-tie":
        assert report["divergences"][0]["margin"] < report["tolerance"] < 1e-4
        assert report["recheck"] == "float64"


def test_rounding_is_measured(checkpoint, work):
    """Nothing in float64; something in bfloat16; at least a unit in the last place."""
    prompt, answer = work[0].prompt[:20], work[0].prompt[20:]
    coarse = copy.deepcopy(checkpoint.model).bfloat16()
    fine, rough = (
        rounding(replace(checkpoint, backbone=Backbone(m)), prompt, answer) for m in (checkpoint.model, coarse)
    )
    assert 0 < fine < 1e-4 < 1e-2 < rough < 2
    assert rounding(wider(checkpoint), prompt, answer) <= fine


def test_where_texts_part():
    text = StoredText("a", "t", (1,), (5, 6, 7), False, 0)
    assert first_difference(text, (5, 6, 7)) is None
    assert first_difference(text, (5, 6, 7, 8)) is None, "it was cut there"
    assert first_difference(text, (5, 8, 7)) == 1
    assert first_difference(text, (5, 6)) == 2, "AR ended"
    ended = replace(text, ended=True)
    assert first_difference(ended, (5, 6, 7)) is None
    assert first_difference(ended, (5, 6, 7, 8)) == 3, "AR went on"
    assert first_difference(ended, (5, 6)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [ArSettings(temperature=LOOSE, top_p=0.95), replace(FLUID, temperature=LOOSE)])
def test_samples_of_the_right_distribution_pass_and_others_fail(decoder):
    prompts = [replace(r, key=f"{r.key}-{n}", seed=n * 100 + r.seed) for n in range(8) for r in requests()]

    def sampled(how):
        return stored(CHECKPOINT, prompts, engine_for(CHECKPOINT, how, 32).generate(prompts))

    report = distribution(sampled(decoder), CHECKPOINT, decoder)
    assert report["ok"]
    assert report["n"] > 2000
    assert report["dof"] == BINS - 1
    hotter = distribution(sampled(replace(decoder, temperature=1.15 * LOOSE)), CHECKPOINT, decoder)
    assert not hotter["ok"]
    assert hotter["p"] < 1e-6


@pytest.mark.parametrize(("top_p", "noise"), [(1.0, 0.0), (0.9, 0.0), (0.9, 0.2), (1.0, 0.2)])
def test_no_chance_is_told_smaller_than_it_is(top_p, noise):
    """Nor where rounding moved the logits the tokens were drawn by, over the edge of the nucleus too."""
    random = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(20_000, 40, generator=random)
    moved = logits + noise * (torch.rand(logits.shape, generator=random) - 0.5)
    sampled, _ = choose(moved, torch.rand(len(logits), generator=random), 1.0, top_p, "probability")
    falling, order = logits.sort(dim=-1, descending=True, stable=True)
    chances = tail(falling, (order == sampled[:, None]).int().argmax(-1, keepdim=True), top_p, noise)
    assert chances.min() > 0, "what was drawn can be drawn"
    for bound in (0.001, 0.01, 0.1):
        assert (chances < bound).sum() <= len(logits) * bound + 4 * (len(logits) * bound) ** 0.5
    if top_p == 1 and not noise:
        assert (chances < 0.1).float().mean() > 0.05, "nor much larger"


def test_outside_the_nucleus_is_impossible():
    falling = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    chances = [float(tail(falling, torch.tensor([[place]]), 0.79, 1e-6)) for place in range(4)]
    assert chances == pytest.approx([1, 0.3 / 0.79, 0, 0], abs=1e-4)
    assert float(tail(falling, torch.tensor([[2]]), 0.79, 0.1)) > 0.1, "within rounding of its edge it is not"


@pytest.mark.slow
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_few_tokens_that_ar_hardly_ever_says_are_found(top_p):
    """Too few for any bin: one in five hundred is the unlikeliest of all."""
    decoder = ArSettings(temperature=LOOSE, top_p=top_p)
    prompts = [replace(r, key=f"{r.key}-{n}", seed=n * 100 + r.seed) for n in range(8) for r in requests()]
    texts = stored(CHECKPOINT, prompts, engine_for(CHECKPOINT, decoder, 32).generate(prompts))
    report = audit(texts, CHECKPOINT, decoder, engine_write(decoder), unasked)
    assert report["verdict"] == "no difference found"
    assert report["distribution"]["p_ranks"] > LEAST_P
    assert audit(texts[:2], CHECKPOINT, decoder, engine_write(decoder), unasked)["verdict"] == "undecided"
    for place in range(0, len(texts), 6):  # the last token, so that nothing after it is changed
        text = next(t for t in texts[place:] if not t.ended)
        row = torch.tensor([[*text.prompt, *text.ids[:-1]]])
        worst = int(CHECKPOINT.model(input_ids=row).logits[0, -1].argmin())
        texts[texts.index(text)] = replace(text, ids=(*text.ids[:-1], worst))
    report = audit(texts, CHECKPOINT, decoder, engine_write(decoder), unasked)
    assert report["distribution"]["p_ranks"] > LEAST_P, "bins do not see it"
    assert report["verdict"] == "different"
    assert report["distribution"]["p_rare"] < LEAST_P


def test_unverified_fluid_is_different_and_verified_is_not(checkpoint, work):
    prompts = [replace(r, key=f"{r.key}-{n}", seed=n * 100 + r.seed) for n in range(6) for r in work]
    for verify, verdict in ((False, "different"), (True, "undecided")):
        decoder = replace(FLUID, temperature=LOOSE, verify=verify)
        texts = stored(checkpoint, prompts, engine_write(decoder)(checkpoint, prompts))
        report = audit(texts, checkpoint, decoder, engine_write(decoder), unasked)
        assert report["verdict"] == verdict
        assert (report["distribution"]["p_rare"] < LEAST_P) != verify


def engine_write(decoder) -> Callable:
    return lambda checkpoint, work: engine_for(checkpoint, decoder, 32).generate(work)


def unasked() -> Checkpoint:
    raise AssertionError("sampled text is not written anew")


def test_an_answer_that_nothing_ended_parts_from_ar(checkpoint, work):
    """It says that it was cut, but neither at its length nor by a stop string: AR went on."""
    asked = {"t": {"max_gen_toks": 32, "until": ["plates"]}}

    def cut(finish: str, ids: Sequence[int], protocols=asked) -> bool:
        return was_cut({"task": "t", "finish": finish, "output_ids": list(ids)}, protocols, checkpoint.tokenizer)

    plates = checkpoint.tokenizer("two plates")["input_ids"]
    assert cut("length", [5] * 32)
    assert not cut("length", [5] * 31)
    assert cut("stop", plates)
    assert not cut("stop", plates[:1])
    assert not cut("eos", plates)
    assert not cut("broken", [])
    assert cut("length", [5], {})
    assert cut("stop", [5], {}), "older runs do not say what was asked"
    assert first_difference(StoredText("a", "t", (1,), (5, 6), True, 0), (5, 6, 7)) == 2


def test_the_command_on_a_stored_run(tiny_fluid, tmp_path, capsys):
    run = ["--model", str(tiny_fluid), "--decoder", "fluid", "--tasks", "mini_gsm8k_1", "--limit", "2"]
    run += ["--max-new-tokens", "12", "--set", "decoder.slot_budget=100", "--out", str(tmp_path / "run")]
    assert main(["audit", *run]) == 0
    out = capsys.readouterr().out
    assert "verdict: identical" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    records = list(read_samples(tmp_path / "run"))
    records[1]["output_ids"][3] ^= 1
    (tmp_path / "run" / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    assert main(["audit", str(tmp_path / "run"), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "run" / "audit.json").read_text())
    assert report["verdict"] == "algorithmic"
    (only,) = report["divergences"]
    assert only["key"] == records[1]["key"]
    assert only["place"] == 3
    assert only["agrees_in_recheck"], "the decoder itself is sound"
    records[1]["output_ids"][3] ^= 1
    records[1]["output_ids"], trace = records[1]["output_ids"][:5], records[1]["trace"]
    trace["written"] = trace["written"][:5]
    records[1]["finish"] = "length"
    (tmp_path / "run" / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    assert main(["audit", str(tmp_path / "run")]) == 1, "cut before its length"
    assert '"(end)"' in capsys.readouterr().out
    for flags in (["--limit", "3"], ["--dtype", "bfloat16"], ["--set", "seed=1"], ["--chat"], ["--out", "x"]):
        assert main(["audit", str(tmp_path / "run"), *flags]) == 2
        assert f"drop {flags[0]}" in capsys.readouterr().err
    records[1]["prompt_tokens"] += 1
    (tmp_path / "run" / "samples.jsonl").write_bytes(b"".join(map(encode, records)))
    assert main(["audit", str(tmp_path / "run")]) == 2
    assert f"the prompt of {records[1]['key']} has other tokens now" in capsys.readouterr().err
    assert main(["audit", str(tmp_path)]) == 2
    assert "no finished run here" in capsys.readouterr().err


def test_a_task_of_likelihoods_is_named_and_no_folder_is(tiny_fluid, capsys):
    assert main(["audit", "--model", str(tiny_fluid), "--tasks", "mini_mmlu_1", "--limit", "1"]) == 2
    assert "no text was generated in mini_mmlu_1, only log-likelihoods" in " ".join(capsys.readouterr().err.split())
