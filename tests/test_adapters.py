"""Adapters say what PEFT says of the same folder, whatever their kind; weights without a place are refused."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoConfig

import fluid_model
from fluid_model import ArSettings, ConfigError, Request
from fluid_model.common.errors import reason

from .tiny import llama_config, save_model

IDS = torch.arange(3, 40)[None]


def lora(**options):
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", **options)


KINDS = {
    "lora": lora(),
    "rank-stabilised": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "biases": lora(bias="all"),
    "rows of tokens": lora(trainable_token_indices=[5, 6]),
    "modules of its own": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "of a tied table": lora(target_modules=["q_proj", "lm_head"]),
    "layers repeated": lora(layer_replication=[[0, 2], [1, 2]]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False,
        task_type="CAUSAL_LM",
    ),
}  # fmt: skip


def save_adapter(folder, parent, config, rows=None):
    """A folder as PEFT saves it, and its own logits.  rows: of a vocabulary grown before."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = str(parent)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return adapted.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("a") / "parent", llama_config(tie_word_embeddings=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_says_what_peft_says(tmp_path, parent, kind):
    expected = save_adapter(tmp_path / "m", parent, KINDS[kind])
    checkpoint = fluid_model.load(str(tmp_path / "m"))
    assert (checkpoint.manifest, fluid_model.describe(str(tmp_path / "m")).method) == (None, None)
    logits = checkpoint.model(IDS).logits
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert not torch.allclose(logits, fluid_model.load(str(parent)).model(IDS).logits[..., :1])
    fluid_model.save(checkpoint, tmp_path / "c")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "c")(IDS).logits, logits)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_a_grown_vocabulary_comes_with_its_adapter(tmp_path, parent, options):
    expected = save_adapter(tmp_path / "m", parent, lora(**options), rows=262)
    checkpoint = fluid_model.load(str(tmp_path / "m"))
    assert checkpoint.backbone.vocabulary == 262
    assert (checkpoint.model(IDS).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_an_adapter_beside_whole_weights_is_put_into_them(tmp_path):
    folder = save_model(tmp_path / "m")
    expected = save_adapter(folder, folder, lora())
    assert torch.allclose(fluid_model.load(str(folder)).model(IDS).logits, expected, atol=1e-4)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_the_base_is_told_missing_and_can_be_given(tmp_path, parent):
    save_adapter(tmp_path / "m", parent, lora())
    edit(tmp_path / "m" / "adapter_config.json", base_model_name_or_path="./gone")
    with pytest.raises(ConfigError, match=r"an adapter over '\./gone': .*no such folder.*model\.base=FOLDER") as raised:
        fluid_model.load(str(tmp_path / "m"))
    assert "\n" not in str(raised.value)
    assert fluid_model.load(str(tmp_path / "m"), base=str(parent)).manifest is None
    with pytest.raises(ConfigError, match=r"model\.base=x: .* is no adapter"):
        fluid_model.load(str(parent), base="x")


def test_adapters_that_cannot_be_merged_are_refused(tmp_path, parent):
    for number, config in enumerate(
        [peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), lora(alora_invocation_tokens=[5])]
    ):
        save_adapter(tmp_path / str(number), parent, config)
        with pytest.raises(ConfigError, match="merge"):
            fluid_model.load(str(tmp_path / str(number)))


@pytest.mark.parametrize("what", ["missing", "unknown"])
def test_an_adapters_weights_are_all_taken(tmp_path, parent, what):
    save_adapter(tmp_path / "m", parent, lora())
    file = tmp_path / "m" / "adapter_model.safetensors"
    tensors = load_file(file)
    if what == "missing":
        del tensors[min(tensors)]
    else:
        tensors["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=f"1 adapter weights are {what}, first base_model"):
        fluid_model.load(str(tmp_path / "m"))


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 1}, r"9 weights are unknown, first model\.layers\.1\.input_layernorm\.weight"),
        ({"attention_bias": False}, r"8 weights are unknown, first model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"intermediate_size": 40}, r"6 weights are missing or misshapen, first .*down_proj\.weight \(32, 48\) for"),
    ],
)
def test_weights_that_the_configuration_has_no_place_for(tmp_path, form, config, message):
    folder = save_model(tmp_path / "m", llama_config(attention_bias="attention_bias" in config))
    file = folder / "model.safetensors"
    if form == "bin":
        torch.save(load_file(file), folder / "pytorch_model.bin")
    elif form == "shards":
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    if form != "safetensors":
        file.unlink(missing_ok=True)
    edit(folder / "config.json", **config)
    with pytest.raises(ConfigError, match=message):
        fluid_model.load(str(folder))


def test_what_changes_no_logit_may_be_there(tmp_path):
    folder = save_model(tmp_path / "m", llama_config(tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    names = ("self_attn.rotary_emb.inv_freq", "self_attn.masked_bias")
    more = {f"model.layers.0.{name}": torch.ones(4) for name in names} | {"v_head.summary.weight": torch.ones(1, 32)}
    more |= {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    expected = fluid_model.load(str(folder)).model(IDS).logits
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(fluid_model.load(str(folder)).model(IDS).logits, expected)


def test_local_attention_is_probed_past_its_window(tmp_path):
    """GPT-Neo hides by column of its own table; a short row beside one longer than the window would go wrong."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=64, initializer_range=0.3)
    with pytest.raises(ConfigError, match="GPTNeoForCausalLM does not run in this engine: logits differ"):
        fluid_model.load(str(save_model(tmp_path / "m", config)))
    config.attention_types, config.attention_layers = [[["global"], 2]], ["global", "global"]
    checkpoint = fluid_model.load(str(save_model(tmp_path / "g", config)))
    prompts = [tuple(range(5, 105)), (5, 6, 7)]
    engine = fluid_model.engine_for(checkpoint, ArSettings(), batch_size=2)
    answers = {a.key: a.ids for a in engine.generate([Request(str(len(p)), p, 6) for p in prompts])}
    for prompt in prompts:
        (alone,) = fluid_model.engine_for(checkpoint, ArSettings(), batch_size=1).generate([Request("x", prompt, 6)])
        assert answers[str(len(prompt))] == alone.ids


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("plain", "plain"),
        ("", "ValueError"),
        ("\nFooTokenizer requires X\nSee there", "FooTokenizer requires X"),
        (
            "Error(s) in loading state_dict for X:\n\tsize mismatch for a.b",
            "Error(s) in loading state_dict for X: size",
        ),
        (
            "Validation error for field 'h':\n    TypeError: expected int",
            "Validation error for field 'h': TypeError: ex",
        ),
        ("Weights only load failed. Do \x1b[1mthis\x1b[0m.\n\tWeightsUnpickler error: Unsupported", "WeightsUnpickler"),
    ],
)
def test_the_line_with_the_reason_is_shown(message, expected):
    assert reason(ValueError(message)).startswith(expected)
    assert "\n" not in reason(ValueError(message))
