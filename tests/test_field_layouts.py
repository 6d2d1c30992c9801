"""Layouts of the field's checkpoints: logits as in plain code, told by their files, refused in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fluid_model
from bench.field import plan
from bench.field.layouts import EPS, LAYERS, OWN, SPECIAL, THETA, D, G, H, V, random_weights, save_layout
from bench.field.published import save_head, write_json
from fluid_eval.cli.main import main
from fluid_eval.cli.models import describe_model
from fluid_eval.common.spec import build_spec
from fluid_eval.results import run_folder
from fluid_eval.running.decoder_choice import with_decoder
from fluid_eval.running.job import run
from fluid_model import ConfigError, registry
from fluid_model.checkpoints import weights
from fluid_model.checkpoints.special_tokens import read_special_tokens
from fluid_model.forward import attention_masks
from fluid_model.forward.kv_cache import KVCache

from .test_cli import write_gsm8k

LENGTH = 19
METHODS = {
    "a2d-llama": "mdlm", "a2d-qwen2": "mdlm", "a2d-qwen3": "mdlm", "Dream": "mdlm", "sdar": "sdar", "CoDA": "mdlm",
    "Fast_dLLM_Qwen": "fast-dllm-v2", "wedlm": "wedlm",
}  # fmt: skip
MASKS = {"sdar": "<|MASK|>", "Fast_dLLM_Qwen": "|<MASK>|"}
BLOCKS = {"sdar": 4, "Fast_dLLM_Qwen": 8}


def plain_logits(weights, ids, hidden):
    """(B, L) ids -> (B, L, V) logits in float64.  hidden: (L, L) bool, keys that a query does not attend to."""
    weights = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}

    def norm(x, name):
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    def linear(x, name):
        return x @ weights[name].T + weights.get(f"{name}.bias", 0)

    def heads(x, count, norm_name):
        x = x.unflatten(-1, (count, -1)).transpose(1, 2)
        x = norm(x, norm_name) if norm_name in weights else x
        if norm_name:
            half = x.shape[-1] // 2
            angle = torch.arange(x.shape[2])[:, None].double() * THETA ** (-torch.arange(half).double() / half)
            a, b = x[..., :half], x[..., half:]
            x = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)
        return x.repeat_interleave(H // count, 1)

    x = weights["model.embed_tokens"][ids]
    for n in range(LAYERS):
        layer = f"model.layers.{n}."
        y, own = norm(x, f"{layer}input_layernorm"), f"{layer}self_attn."
        q = heads(linear(y, f"{own}q_proj"), H, f"{own}q_norm")
        k = heads(linear(y, f"{own}k_proj"), G, f"{own}k_norm")
        v = heads(linear(y, f"{own}v_proj"), G, "")
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{own}o_proj")
        y = norm(x, f"{layer}post_attention_layernorm")
        gate = torch.nn.functional.silu(linear(y, f"{layer}mlp.gate_proj"))
        x = x + linear(gate * linear(y, f"{layer}mlp.up_proj"), f"{layer}mlp.down_proj")
    return norm(x, "model.norm") @ weights.get("lm_head", weights["model.embed_tokens"]).T


def published_attention(layout, rows):
    """The layout's attention: intervals of the engine, and the pairs that it hides."""
    slot = torch.arange(LENGTH)
    if METHODS[layout] == "wedlm":
        return None, slot[:, None] < slot
    block = slot // BLOCKS.get(layout, LENGTH)
    spread = (block * attention_masks.MAX_STEPS).expand(rows, -1)
    always = torch.full_like(spread, attention_masks.ALWAYS)
    intervals = attention_masks.AttentionIntervals(spread, always, slot.expand(rows, -1))
    return intervals, block[:, None] < block


@pytest.mark.parametrize("layout", OWN)
def test_logits_are_those_of_plain_code(tmp_path, layout):
    folder = save_layout(tmp_path / "m", layout)
    backbone = fluid_model.load(str(folder)).backbone
    ids = torch.randint(0, V, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    intervals, hidden = published_attention(layout, len(ids))
    cache = KVCache(len(ids), LENGTH)
    plan = replace(cache.set_write_positions(0, [0, 0], LENGTH, backbone.device), intervals=intervals)
    expected = plain_logits(random_weights(layout), ids, hidden)
    torch.testing.assert_close(
        backbone.logits(backbone.forward(ids, plan, cache)).double(), expected, rtol=0, atol=1e-5 * expected.abs().max()
    )


@pytest.mark.parametrize("layout", OWN)
def test_configuration_and_tokenizer_are_enough_to_describe(tmp_path, layout, capsys):
    folder = save_layout(tmp_path / "m", layout)
    (folder / "model.safetensors").unlink()
    ids = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in ids}
    facts = describe_model(str(folder))
    mask = MASKS.get(layout, "<|mask|>")
    assert (facts["layout"], facts["method"]) == (layout, METHODS[layout])
    assert facts["mask_token"] == f"{mask} ({ids[mask]})"
    assert facts["end_tokens"] == [f"{text} ({ids[text]})" for text in ("<|endoftext|>", "<|im_end|>")]
    assert facts["block_length"] == BLOCKS.get(layout, "not stated")
    assert facts["decoder"] == METHODS[layout]
    assert facts["missing"][0] == "weights"
    assert main(["models", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == facts
    assert main(["models", str(folder)]) == 0
    assert mask in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"method='mlm'.*mdlm"):
        describe_model(str(folder), "mlm")


def test_the_configs_mask_id_counts_before_the_text(tmp_path):
    folder = save_layout(tmp_path / "m", "sdar", mask_token_id=260)
    assert read_special_tokens(str(folder)).mask == ("<|mask|>", 260)
    assert fluid_model.load(str(folder)).mask_id == 260


@pytest.mark.parametrize(
    ("name", "layout", "config", "method", "expected"),
    [
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", "a2d-qwen3", {}, None, "bd3lm"),
        ("TIDE-0.6B", "a2d-qwen3", {}, None, "bd3lm"),
        ("m", "a2d-qwen2", {"block_size": 32}, None, "bd3lm"),
        ("peptide", "a2d-qwen2", {}, None, "mdlm"),
        ("m", "a2d-qwen2", {}, "bd3lm", "bd3lm"),
        ("m", "sdar", {}, "llada", "llada"),
        ("I-DLM-8B", "a2d-qwen3", {"model_type": "qwen3", "auto_map": ...}, None, None),
    ],
)
def test_names_configs_and_the_user_tell_the_method(tmp_path, name, layout, config, method, expected):
    folder = save_layout(tmp_path / name, layout, **config)
    assert fluid_model.describe(str(folder), method).method == expected


def test_shift_belongs_to_the_layout_and_is_saved(tmp_path):
    folder = save_layout(tmp_path / "m", "Dream")
    first = fluid_model.load(str(folder))
    fluid_model.save(first, tmp_path / "c")
    again = fluid_model.load(str(tmp_path / "c"))
    assert again.manifest == first.manifest
    assert (again.manifest.method, again.manifest.shift, again.end_ids) == ("mdlm", True, first.end_ids)
    assert fluid_model.describe(str(tmp_path / "c")).shift
    assert not fluid_model.describe(str(save_layout(tmp_path / "a", "a2d-qwen2"))).shift


def test_open_dcoder_is_told_by_its_name(tmp_path):
    config = {"model_type": "qwen2", "auto_map": ...}
    folder = save_layout(tmp_path / "open-dcoder-0.5B", "a2d-qwen2", **config)
    info = fluid_model.describe(str(folder))
    assert (info.method, info.shift, info.layout) == ("mdlm", True, "")
    assert fluid_model.describe(str(save_layout(tmp_path / "plain", "a2d-qwen2", **config))).method is None


@pytest.mark.parametrize("layout", ["a2d-qwen3", "CoDA"])
def test_embeddings_are_tied_where_no_second_table_is_stored(tmp_path, layout):
    folder = save_layout(tmp_path / "m", layout, tied=True, tie_word_embeddings=...)
    model = fluid_model.load(str(folder)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_dreams_tokenizer_needs_no_code(tmp_path):
    """Dream's folder has vocab.json and merges.txt, and a class of its own that is Qwen2's."""
    folder = save_layout(tmp_path / "m", "Dream")
    kept = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    write_json(folder / "vocab.json", kept)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    added = {str(len(kept) + n): {"content": text, "special": True} for n, text in enumerate(SPECIAL)}
    own = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    }
    write_json(folder / "tokenizer_config.json", {**own, "added_tokens_decoder": added, "eos_token": SPECIAL[0]})
    tokenizer = fluid_model.load_tokenizer(str(folder))
    assert tokenizer.decode(tokenizer("Two and 2!<|im_end|>")["input_ids"]) == "Two and 2!<|im_end|>"
    assert len(tokenizer("<|im_end|>")["input_ids"]) == 1


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})


def change_weights(folder, drop=None, **more):
    stored = load_file(folder / "model.safetensors")
    stored.pop(drop, None)
    save_file(stored | more, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("layout", "harm", "message"),
    [
        ("sdar", {"head_dim": None}, r"config\.json: head_dim is missing; a sdar model"),
        ("Dream", {"rope_theta": None}, r"config\.json: rope_theta is missing"),
        ("Dream", {"use_mrope": True}, r"use_mrope=True is not supported; Dream models have False"),
        ("Dream", {"block_size": 32}, r"block_size=32 is not supported"),
        ("a2d-qwen3", {"use_sliding_window": True}, r"use_sliding_window=True is not supported"),
        ("wedlm", {"qk_norm": False}, r"attention_bias=False with qk_norm=False is neither"),
        ("sdar", {"block_size": 0}, r"config\.json: block_size=0 must be the tokens of a block"),
        ("Fast_dLLM_Qwen", {"bd_size": "32"}, r"bd_size='32' must be the tokens of a block"),
        ("sdar", {"hidden_size": "wide"}, r"config\.json: not a Qwen3-shaped model: .*hidden_size"),
        ("sdar", {"model_type": "llada2_moe"}, r"LLaDA2 is a mixture of experts, .* known are a2d-llama, .*PanguEmb"),
        ("sdar", {"model_type": "sdar2"}, r"model_type 'sdar2' of config\.json is unknown; known are .*wedlm"),
    ],
)
def test_a_config_half_known_is_refused(tmp_path, layout, harm, message):
    folder = save_layout(tmp_path / "m", layout)
    change(folder, **harm)
    with pytest.raises(ConfigError, match=message) as caught:
        fluid_model.describe(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layout", ["sdar", "Dream", "wedlm"])
def test_weights_missing_or_left_over_are_named_before_any_is_read(tmp_path, layout, monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(weights, "from_pretrained", read)
    norm = "model.layers.1.input_layernorm.weight"
    change_weights(save_layout(tmp_path / "less", layout), drop=norm)
    with pytest.raises(ConfigError, match=f"1 weights are missing or misshapen, first {norm}"):
        fluid_model.load(str(tmp_path / "less"))
    change_weights(save_layout(tmp_path / "more", layout), **{"model.layers.0.self_attn.o_proj.bias": torch.ones(D)})
    with pytest.raises(ConfigError, match=r"1 weights are unknown, first model\.layers\.0\.self_attn\.o_proj\.bias"):
        fluid_model.load(str(tmp_path / "more"))


def test_a_head_lies_under_head_as_on_the_hub(tmp_path, tiny_model):
    folder = shutil.copytree(tiny_model, tmp_path / "FLUID")
    save_head(folder / "head" / "tau_2.8")
    info = fluid_model.describe(str(folder))
    assert (info.method, info.k_max) == ("fluid", 16)
    assert fluid_model.load(str(folder), mask_token="</s>").head.k_max == 16
    save_head(folder / "head" / "tau_1.4")
    with pytest.raises(ConfigError, match=r"2 K-heads, head/tau_1\.4/model_head\.bin, .* copy the one to use"):
        fluid_model.describe(str(folder))


@pytest.mark.parametrize("named", [None, "ar", "llada"])
def test_a_method_without_a_decoder_is_refused_before_weights_load(tmp_path, named, monkeypatch):
    """A layout may be known before its decoder is."""
    monkeypatch.setattr(registry, "BUILT_IN", tuple(kind for kind in registry.BUILT_IN if kind.name != "wedlm"))
    folder = save_layout(tmp_path / "m", "wedlm")
    (folder / "model.safetensors").unlink()
    values = {"tasks": "gsm8k", "model": str(folder), "data_dir": str(write_gsm8k(tmp_path / "rows"))}
    with pytest.raises(ConfigError, match=r"adapted to wedlm have no decoder here yet; decoders are ar, "):
        run(build_spec(with_decoder(values | ({"decoder": named} if named else {}))), tmp_path / "run")


@pytest.mark.parametrize(
    ("layout", "decoder", "message"),
    [
        ("wedlm", "llada", "decoder=llada: .*/m was adapted to wedlm; use --decoder wedlm"),
        ("wedlm", "fast-dllm-v2", "decoder=fast-dllm-v2: .*/m was adapted to wedlm; use --decoder wedlm"),
        ("sdar", "wedlm", "decoder=wedlm: .*/m was adapted to sdar; use --decoder sdar"),
    ],
)
def test_a_decoder_of_another_layout_is_refused_before_weights_load(tmp_path, layout, decoder, message):
    folder = save_layout(tmp_path / "m", layout)
    (folder / "model.safetensors").unlink()
    rows = str(write_gsm8k(tmp_path / "rows"))
    with pytest.raises(ConfigError, match=message) as caught:
        run(build_spec({"tasks": "gsm8k", "model": str(folder), "data_dir": rows, "decoder": decoder}), tmp_path / "r")
    assert "\n" not in str(caught.value)


def test_ar_is_refused_where_attention_is_bidirectional(tmp_path):
    folder = save_layout(tmp_path / "m", "a2d-qwen2")
    values = {"tasks": "gsm8k", "model": str(folder), "data_dir": str(write_gsm8k(tmp_path / "rows")), "decoder": "ar"}
    with pytest.raises(ConfigError, match=r"reads in both directions; use --decoder mdlm"):
        run(build_spec(values), tmp_path / "run")


QUICK = [plan.FieldModel("CoDA", "mdlm"), plan.FieldModel("sdar", "sdar")]
SLOW = [pytest.param(model, marks=pytest.mark.slow) for model in plan.MODELS if model not in QUICK]


@pytest.mark.parametrize("model", [*QUICK, *SLOW], ids=str)
def test_a_published_folder_is_described_and_runs_gsm8k(tmp_path, model):
    """Described from its configuration, tokenizer and K-head; answers are written by the decoder that is named then."""
    # 1) without weights
    folder = plan.save_model(model, tmp_path / "hub")
    bare = tmp_path / "bare" / folder.name
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors*"))
    facts = describe_model(str(bare))
    assert (facts["layout"], facts["method"]) == (model.layout, model.method or "none, a plain causal model")
    assert (facts["decoder"], facts["missing"]) == (model.method or "ar", ["weights"])
    in_place = model.layout.startswith(("llada", "a2d", "sdar", "wedlm"))
    assert facts["shift"].startswith("none" if in_place else "next-token")
    # 2) with them
    values = {"tasks": "gsm8k", "model": str(folder), "data_dir": str(write_gsm8k(tmp_path / "rows")), "limit": 2}
    size = {"ar": {}, "fluid": {}, "wedlm": {"window": 8}}.get(facts["decoder"], {"block_length": 8})
    spec = build_spec(with_decoder({**values, "max_new_tokens": 8, "num_fewshot": 0, "decoder": size}))
    assert spec.decoder.name == facts["decoder"]
    result = run(spec, tmp_path / "run")
    assert {line["n"] for line in result["lines"]} == {2}
    kind = "denoise" if size else "prefill"
    assert all(record["trace"]["forwards"][kind] > 0 for record in run_folder.read_samples(tmp_path / "run"))


@pytest.mark.parametrize("block_cache", [True, False])
def test_a_run_says_that_its_decoder_approximates(tmp_path, block_cache):
    decoder = {"small_block": 4, "block_cache": block_cache}
    values = {"tasks": "gsm8k", "data_dir": str(write_gsm8k(tmp_path / "rows")), "limit": 1, "num_fewshot": 0}
    values |= {"model": str(save_layout(tmp_path / "m", "Fast_dLLM_Qwen")), "max_new_tokens": 8, "decoder": decoder}
    notices = run(build_spec(with_decoder(values)), tmp_path / "run")["notices"]
    assert any("decoder.block_cache: approximate" in notice for notice in notices) == block_cache


@pytest.mark.parametrize(
    ("layout", "decoder", "message"),
    [
        ("sdar", {"steps": 8}, "steps=8 must not exceed block_length=4"),
        ("Fast_dLLM_Qwen", {"small_block": 3}, "small_block=3 must divide block_length=8"),
        ("sdar", {"remasking": "random"}, "decoder.remasking='random' is unknown; known: dynamic, static, sequential"),
        ("Dream", {"rule": "p2"}, "decoder.rule='p2' must be 'probability' or 'margin' or"),
        ("CoDA", {"remasking": "static"}, "decoder.remasking is no setting of decoder 'mdlm'"),
    ],
)
def test_settings_that_do_not_fit_are_one_line_before_weights_load(tmp_path, layout, decoder, message, capsys):
    folder = save_layout(tmp_path / "m", layout)
    (folder / "model.safetensors").unlink()
    rows = write_gsm8k(tmp_path / "rows")
    words = [word for name, value in decoder.items() for word in ("--set", f"decoder.{name}={value}")]
    words += ["--tasks", "gsm8k", "--model", str(folder), "--data-dir", str(rows), "--out", str(tmp_path / "run")]
    assert main(["run", *words]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert message in printed[-1]
    assert not any("Traceback" in line for line in printed)
