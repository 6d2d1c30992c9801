"""Published layouts load without their repositories' code: openPangu, NBDiff, LLaDA, FLUID; logits as in plain code."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import fluid_model
from bench.field.published import (
    FFN,
    LAYERS,
    D,
    V,
    piece_ids,
    plain_forward,
    random_weights,
    save_llada,
    save_pangu,
    save_pieces,
    write_json,
)
from fluid_model import ArSettings, ConfigError, FluidSettings, LladaSettings, NbdiffSettings, Request
from fluid_model.forward import attention_masks
from fluid_model.forward.kv_cache import KVCache
from fluid_model.tokens import think_end

IDS = torch.arange(3, 250).view(13, 19)


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return random_weights(bias=True, tied=False)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


def bidirectional(checkpoint, ids):
    """Logits through the engine, every slot reading every other."""
    backbone = checkpoint.backbone
    cache = KVCache(len(ids), ids.shape[1])
    reading = cache.set_write_positions(0, [0] * len(ids), ids.shape[1], backbone.device)
    both = replace(
        reading, intervals=attention_masks.bidirectional(torch.full((len(ids),), ids.shape[1]), ids.shape[1])
    )
    return backbone.logits(backbone.forward(ids, both, cache))


@pytest.mark.parametrize("bias", [True, False])
def test_openpangu(tmp_path, bias):
    torch.manual_seed(0)
    weights = random_weights(bias=bias, tied=False)
    folder = save_pangu(tmp_path / "openPangu-Embedded-7B", weights)
    checkpoint = fluid_model.load(str(folder))
    close(checkpoint.model(IDS).logits, plain_forward(weights, IDS, causal=True))
    ids = piece_ids()
    assert checkpoint.end_ids == (ids["[unused10]"],)
    assert (think_end(checkpoint.tokenizer), checkpoint.manifest, checkpoint.mask_id) == ("[unused17]", None, None)
    assert checkpoint.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    info = fluid_model.describe(str(folder))
    assert (info.architecture, info.window, info.method) == ("PanguEmbeddedForCausalLM", 128, None)
    config = fluid_model.checkpoints.checkpoint.read_config(str(folder))
    assert config.dtype == torch.bfloat16  # what is loaded where the device is no CPU


@pytest.mark.parametrize("tied", [True, False])
def test_llada(tmp_path, tied):
    torch.manual_seed(0)
    weights = random_weights(bias=False, tied=tied)
    folder = save_llada(tmp_path / "m", weights, tied)
    checkpoint = fluid_model.load(str(folder))
    close(bidirectional(checkpoint, IDS), plain_forward(weights, IDS, causal=False))
    text = checkpoint.tokenizer.convert_ids_to_tokens
    assert text(checkpoint.mask_id) == checkpoint.manifest.mask_token == "<|mdm_mask|>"
    assert text(checkpoint.end_ids) == ["<|endoftext|>", "<|eot_id|>"]
    info = fluid_model.describe(str(folder))
    assert (info.architecture, info.window, info.method) == ("LLaDAModelLM", 128, "llada")
    engine = fluid_model.engine_for(checkpoint, LladaSettings(block_length=4))
    (answer,) = engine.generate([Request("x", (5, 6, 7), 8)])
    assert answer.trace.forwards["denoise"] > 0


@pytest.mark.parametrize("layout", ["llada", "nbdiff"])
def test_saved_again_it_is_an_ordinary_folder(tmp_path, weights, layout):
    """transformers alone can then read it, and nothing changes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if layout == "llada":
        folder = save_llada(tmp_path / "m", {k: v for k, v in weights.items() if "bias" not in k}, tied=False)
    else:
        folder = save_pangu(tmp_path / "nbdiff-7b-base", weights, block_length=16)
    first = fluid_model.load(str(folder))
    fluid_model.save(first, tmp_path / "c")
    again = fluid_model.load(str(tmp_path / "c"))
    assert again.manifest == first.manifest
    assert (again.mask_id, again.end_ids) == (first.mask_id, first.end_ids)
    assert think_end(again.tokenizer) == think_end(first.tokenizer)
    for text in ("hello world", "[unused9] hello:[unused10] w"):
        assert again.tokenizer.encode(text) == first.tokenizer.encode(text)
    assert torch.equal(again.model(IDS).logits, first.model(IDS).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "c")(IDS).logits, first.model(IDS).logits)
    assert "auto_map" not in AutoTokenizer.from_pretrained(tmp_path / "c").init_kwargs


@pytest.mark.parametrize(
    ("name", "config", "method", "block"),
    [
        ("NBDiff-7B-Instruct", {}, None, None),
        ("openPangu-R-7B-Diffusion", {}, None, None),
        ("m", {"mask_token_id": piece_ids()["[unused3]"]}, None, None),
        ("m", {"block_length": 16}, None, 16),
        ("m", {}, "nbdiff", None),
    ],
)
def test_nbdiff_is_told_by_name_by_config_or_by_the_user(tmp_path, weights, name, config, method, block):
    folder = save_pangu(tmp_path / name, weights, **config)
    assert fluid_model.describe(str(folder), method).method == "nbdiff"
    checkpoint = fluid_model.load(str(folder), method=method)
    text = "[unused3]" if "mask_token_id" in config else "[unused0]"
    assert (checkpoint.mask_id, checkpoint.manifest.block_length) == (piece_ids()[text], block)
    close(bidirectional(checkpoint, IDS), plain_forward(weights, IDS, causal=False))
    engine = fluid_model.engine_for(checkpoint, NbdiffSettings(small_blocks=1))
    assert engine.strategy.max_slots == (block or 32)
    (answer,) = engine.generate([Request("x", (5, 6, 7), 8)])
    assert len(answer.ids) <= 8


def test_what_files_say_can_be_overridden(tmp_path, weights):
    folder = save_pangu(tmp_path / "nbdiff-7b-base", weights)
    ids = piece_ids()
    checkpoint = fluid_model.load(str(folder), mask_token="[unused5]", end_tokens=("</s>", "[unused2]"))
    assert (checkpoint.mask_id, checkpoint.manifest.mask_token) == (ids["[unused5]"], "[unused5]")
    assert checkpoint.end_ids == tuple(sorted((ids["</s>"], ids["[unused2]"])))
    with pytest.raises(ConfigError, match="end token 'nope' is not one token"):
        fluid_model.load(str(folder), end_tokens=("nope",))
    with pytest.raises(ConfigError, match=r"end_tokens=\[\] leaves nothing that ends an answer"):
        fluid_model.load(str(folder), end_tokens=())
    fluid_model.save(checkpoint, tmp_path / "c")
    with pytest.raises(ConfigError, match=r"model\.method=llada: .*fluid\.json says nbdiff"):
        fluid_model.load(str(tmp_path / "c"), method="llada")


def test_overrides_reach_the_model_through_a_spec(tmp_path, weights):
    from fluid_eval.common.spec import build_spec
    from fluid_eval.running.job import run

    from .test_cli import write_gsm8k

    folder = save_pangu(tmp_path / "m", weights)
    model = {"path": str(folder), "method": "nbdiff", "mask_token": "[unused4]", "end_tokens": ["hello"]}
    values = {"tasks": ["gsm8k"], "limit": 1, "num_fewshot": 0, "max_new_tokens": 8, "decoder": "nbdiff"}
    values |= {"data_dir": str(write_gsm8k(tmp_path / "data"))}
    assert run(build_spec({**values, "model": model}), tmp_path / "r")["lines"][0]["n"] == 1
    with pytest.raises(ConfigError, match="is a plain causal model; use --decoder ar"):
        run(build_spec({**values, "model": str(folder)}), tmp_path / "r2")
    with pytest.raises(ConfigError, match="mask token 'x' is not one token"):
        run(build_spec({**values, "model": {**model, "mask_token": "x"}}), tmp_path / "r3")
    with pytest.raises(ConfigError, match="end token 'y' is not one token"):
        run(build_spec({**values, "model": {**model, "end_tokens": ["y"]}}), tmp_path / "r4")
    with pytest.raises(ConfigError, match=r"model\.end_tokens=\[\] leaves nothing"):
        build_spec({**values, "model": {**model, "end_tokens": []}})


def test_a_missing_mask_token_is_told_before_weights_are_read(tmp_path, weights):
    folder = save_pangu(tmp_path / "nbdiff-7b-base", weights)
    save_pieces(folder, mask_token=None)
    proto = folder / "tokenizer.model"
    proto.write_bytes(proto.read_bytes().replace(b"[unused0]", b"[unusee0]"))
    config = folder / "tokenizer_config.json"
    config.write_text(config.read_text().replace("[unused0]", "[unusee0]"))
    for file in folder.glob("*.safetensors"):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no mask token: none of .* is in the tokenizer"):
        fluid_model.load(str(folder))


def save_head(folder):
    head = fluid_model.KHead(D, 16)
    torch.save({f"diffusion_k_head.{k}": v for k, v in head.state_dict().items()}, folder / "model_head.bin")
    return head


def save_lora(folder, parent, prefix):
    """An adapter as FLUID's trainer leaves it. Returns what it adds: by short name, B A alpha / rank."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": str(parent), "bias": "none"})
    tensors, added = {}, {}
    for n in range(LAYERS):
        for short, long, rows in (("q", "self_attn.q_proj", D), ("up", "mlp.up_proj", FFN)):
            a, b = torch.randn(2, D), torch.randn(rows, 2)
            path = f"{prefix}.layers.{n}.{long}"
            tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            added[f"{n}.{short}"] = 2.0 * b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    return added


def test_a_fluid_head_beside_its_parent(tmp_path, weights):
    folder = save_pangu(tmp_path / "m", weights)
    head = save_head(folder)
    checkpoint = fluid_model.load(str(folder))
    close(checkpoint.model(IDS).logits, plain_forward(weights, IDS, causal=True))
    assert checkpoint.mask_id == piece_ids()["[unused32]"]
    assert torch.equal(checkpoint.head(torch.ones(1, D)), head(torch.ones(1, D)))
    info = fluid_model.describe(str(folder))
    assert (info.method, info.k_max, info.tau, info.has_head) == ("fluid", 16, (None,), True)


@pytest.mark.parametrize("prefix", ["base_model.model.model", "base_model.model.model.model"])
@pytest.mark.parametrize("has_head", [True, False])
def test_a_fluid_head_beside_an_adapter(tmp_path, weights, prefix, has_head):
    """Over openPangu, trained with and without the wrapper of the published code; without a head it is stage 1."""
    save_pangu(tmp_path / "parent", weights)
    added = save_lora(tmp_path / "m", "../parent", prefix)
    if has_head:
        save_head(tmp_path / "m")
        save_pieces(tmp_path / "m", eos_token="[unused11]")
    checkpoint = fluid_model.load(str(tmp_path / "m"))
    assert checkpoint.tokenizer.eos_token == ("[unused11]" if has_head else "[unused10]"), "its own before its parent's"
    merged = {name: tensor + added.get(name, 0) for name, tensor in weights.items()}
    close(checkpoint.model(IDS).logits, plain_forward(merged, IDS, causal=True))
    info = fluid_model.describe(str(tmp_path / "m"))
    assert (info.method, info.k_max) == (("fluid", 16) if has_head else (None, None))
    if not has_head:  # its files do not tell stage 1 from any other LoRA; whoever goes on to stage 2 says so
        assert checkpoint.manifest is None
        checkpoint = fluid_model.load(str(tmp_path / "m"), method="fluid")
    assert checkpoint.mask_id == piece_ids()["[unused32]"]
    manifest = checkpoint.manifest
    assert (manifest.weights, manifest.k_max, manifest.tau) == ("merged", 16, (None,) * has_head)
    if has_head:
        (answer,) = fluid_model.engine_for(checkpoint, FluidSettings()).generate([Request("x", (5, 6), 8)])
        (plain,) = fluid_model.engine_for(checkpoint, ArSettings()).generate([Request("x", (5, 6), 8)])
        assert answer.ids == plain.ids
    fluid_model.save(checkpoint, tmp_path / "c")
    assert torch.equal(fluid_model.load(str(tmp_path / "c")).model(IDS).logits, checkpoint.model(IDS).logits)


def test_an_adapter_over_nbdiff_stays_nbdiff(tmp_path, weights):
    save_pangu(tmp_path / "nbdiff-7b-base", weights)
    save_lora(tmp_path / "m", "../nbdiff-7b-base", "base_model.model.model")
    assert fluid_model.describe(str(tmp_path / "m")).method == "nbdiff"
    assert fluid_model.load(str(tmp_path / "m")).mask_id == piece_ids()["[unused0]"]


def test_an_adapter_that_fits_nothing_is_refused(tmp_path, weights):
    save_pangu(tmp_path / "parent", weights)
    save_lora(tmp_path / "m", "../parent", "base_model.model.transformer")
    with pytest.raises(ConfigError, match=r"8 adapter weights are missing, first .*up_proj.*another base's\?"):
        fluid_model.load(str(tmp_path / "m"))


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text()) | values
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})


def put_weight(folder, name, tensor):
    file = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(file), name: tensor}, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = file.name
    write_json(folder / "model.safetensors.index.json", index)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: change(f, bias=False), r"8 weights are unknown, first model\.layers\.0\.self_attn\.k_proj\.bias"),
        (lambda f: put_weight(f, "model.layers.0.mlp.up_proj.bias", torch.ones(FFN)), "1 weights are unknown"),
        (lambda f: change(f, num_hidden_layers=3), "missing or misshapen, first model.layers.2"),
        (lambda f: change(f, rope_theta=None), r"config\.json: rope_theta is missing"),
        (lambda f: change(f, hidden_size="wide"), r"config\.json: not a Llama-shaped model: .*hidden_size"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json: not a JSON object"),
        (lambda f: change(f, mask_token_id=V - 1), f"mask_token_id={V - 1} is no token of this tokenizer"),
        (
            lambda f: (f / "tokenizer.model").unlink(),
            r"neither tokenizer\.json nor tokenizer\.model; its tokenizer is code",
        ),
        (lambda f: (f / "tokenizer.model").write_bytes(b"\xff"), r"tokenizer\.model: not a SentencePiece model"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, weights, harm, message):
    folder = save_pangu(tmp_path / "m", weights)
    harm(folder)
    with pytest.raises(ConfigError, match=message):
        fluid_model.load(str(folder))


@pytest.mark.parametrize(
    ("field", "value"),
    [("include_bias", True), ("activation_type", "gelu"), ("rope", False), ("scale_logits", True), ("d_model", None)],
)
def test_a_llada_that_is_no_llama_is_refused(tmp_path, field, value):
    torch.manual_seed(0)
    folder = save_llada(tmp_path / "m", random_weights(bias=False, tied=False), tied=False)
    change(folder, **{field: value})
    with pytest.raises(ConfigError, match=rf"config\.json: {field}"):
        fluid_model.describe(str(folder))


def test_without_a_known_mask_token_the_way_out_is_told(tmp_path, weights):
    from .tiny import byte_tokenizer

    folder = save_pangu(tmp_path / "m", weights)
    byte_tokenizer().save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"none of \[unused0\].* is in the tokenizer; set model\.mask_token"):
        fluid_model.load(str(folder), method="nbdiff")
    assert fluid_model.load(str(folder), method="nbdiff", mask_token="a").mask_id == byte_tokenizer().encode("a")[0]
    assert think_end(fluid_model.load(str(folder)).tokenizer) is None
