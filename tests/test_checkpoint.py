"""Checkpoints: strict in, atomic out, bit for bit; and any ordinary causal LM."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import fluid_model
from fluid_model import ArSettings, ConfigError, FluidSettings, Request
from fluid_model.common import replace_folder
from fluid_model.forward.backbone import context_window

from .tiny import MASK, fluid_checkpoint, llama_config, save_model

IDS = torch.arange(3, 40)[None]
SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.3,
}
GQA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama": llama_config(),
    "llama-tied": llama_config(tie_word_embeddings=True),
    "qwen2": Qwen2Config(**{**GQA, "tie_word_embeddings": True}),
    "qwen2-sliding": Qwen2Config(**GQA, use_sliding_window=True, sliding_window=16, max_window_layers=1),
    "qwen3": Qwen3Config(**GQA),
    "mistral-sliding": MistralConfig(**GQA, sliding_window=16),
    "gemma3-sliding": Gemma3TextConfig(**GQA, sliding_window=16, query_pre_attn_scalar=8),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=258, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1,
        initializer_range=0.3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_any_causal_lm_writes_as_transformers_does(family, tmp_path):
    """The caller names no architecture; greedy text is that of `generate`, past a sliding window too."""
    checkpoint = fluid_model.load(str(save_model(tmp_path / "m", FAMILIES[family])))
    engine = fluid_model.engine_for(checkpoint, ArSettings(), batch_size=2)
    prompts = [tuple(range(5, 5 + n)) for n in (30, 9, 17)]
    answers = {g.key: g for g in engine.generate([Request(str(len(p)), p, 24) for p in prompts])}
    for prompt in prompts:
        expected = checkpoint.model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected = expected[0, len(prompt) :].tolist()
        if 1 in expected:
            expected = expected[: expected.index(1)]
        assert list(answers[str(len(prompt))].ids) == expected


def test_an_architecture_the_engine_cannot_run_is_refused(tmp_path):
    folder = save_model(tmp_path / "m", Cohere2Config(**GQA))  # scales its logits
    with pytest.raises(ConfigError, match="Cohere2ForCausalLM does not run in this engine: logits differ"):
        fluid_model.load(str(folder))


def test_masks_of_the_models_own_are_refused(tmp_path):
    """GPT-Neo masks by column, which ragged rows of a batch do not share; alone it would look right."""
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 128}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=4, initializer_range=0.3)
    with pytest.raises(ConfigError, match="GPTNeoForCausalLM does not run in this engine"):
        fluid_model.load(str(save_model(tmp_path / "m", config)))


def test_rotary_scaling_by_the_longest_row_is_kept_out_of_reach():
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "rope_theta": 10000.0, "factor": 4.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    assert context_window(llama_config(max_position_embeddings=256, rope_parameters=rope)) == 64


def test_code_in_a_model_folder_is_not_run(tmp_path, capsys, monkeypatch):
    folder = save_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ConfigError, match="model="):
        fluid_model.load(str(folder))
    assert not (tmp_path / "mark").exists()


def test_a_floor_above_the_heads_reach_is_refused():
    with pytest.raises(ConfigError, match=r"min_horizon=12 exceeds what .* K-head was trained for .k_max=8."):
        fluid_model.engine_for(fluid_checkpoint(), FluidSettings(min_horizon=12))


def test_save_then_load_changes_nothing(tmp_path):
    checkpoint = fluid_checkpoint(tau=(2.8, 0.5))
    fluid_model.save(checkpoint, tmp_path / "c")
    again = fluid_model.load(str(tmp_path / "c"), tau=0.5)
    assert torch.equal(again.model(IDS).logits, checkpoint.model(IDS).logits)
    assert (again.mask_id, again.manifest, again.end_ids) == (258, checkpoint.manifest, checkpoint.end_ids)
    assert again.model.get_input_embeddings().num_embeddings == 259
    hidden = torch.randn(4, 32)
    assert again.head is again.heads[1]
    for ours, theirs in zip(again.heads, checkpoint.heads, strict=True):
        assert torch.equal(ours(hidden), theirs(hidden))
    info = fluid_model.describe(str(tmp_path / "c"))
    assert (info.k_max, info.tau, info.window) == (8, (2.8, 0.5), 256)


def test_a_known_mask_token_needs_no_new_embedding():
    checkpoint = fluid_checkpoint()
    before = checkpoint.model.get_input_embeddings().weight.clone()
    assert fluid_model.add_mask_token(checkpoint.model, checkpoint.tokenizer, MASK) == 258
    assert torch.equal(checkpoint.model.get_input_embeddings().weight, before)


def test_a_padded_vocabulary_is_not_resized():
    """Parents often have more embedding rows than tokens; the mask token takes one of them."""
    from .tiny import byte_tokenizer

    model = AutoModelForCausalLM.from_config(llama_config(vocab_size=300))
    assert fluid_model.add_mask_token(model, byte_tokenizer(), MASK) == 258
    assert model.get_input_embeddings().num_embeddings == 300


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_over_its_parent(tmp_path, tied):
    parent = save_model(tmp_path / "parent", llama_config(tie_word_embeddings=tied))
    checkpoint = fluid_model.load(str(parent))
    mask = fluid_model.add_mask_token(checkpoint.model, checkpoint.tokenizer, MASK)
    with torch.no_grad():
        checkpoint.model.get_input_embeddings().weight[mask] += 1.0
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(checkpoint.model, lora)
    manifest = fluid_model.Manifest(parent="../parent", mask_token=MASK, k_max=8, tau=(1.0,), weights="adapter")
    checkpoint = replace(checkpoint, adapter=adapter, mask_id=mask, manifest=manifest, heads=[fluid_model.KHead(32, 8)])
    fluid_model.save(checkpoint, tmp_path / "c")
    again = fluid_model.load(str(tmp_path / "c"))
    assert torch.equal(again.model(IDS).logits, checkpoint.model(IDS).logits)
    assert torch.equal(again.model(IDS + 219).logits, checkpoint.model(IDS + 219).logits)  # reads the mask token
    assert not torch.allclose(again.model(IDS).logits, fluid_model.load(str(parent)).model(IDS).logits[..., :1])
    assert sum(f.stat().st_size for f in (tmp_path / "c").rglob("*.safetensors")) < 60_000
    (tmp_path / "c" / "mask_embedding.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"mask_embedding\.safetensors: missing"):
        fluid_model.load(str(tmp_path / "c"))


def test_the_published_layout(tmp_path):
    """A parent folder with model_head.bin beside it; the mask token is one the parent has."""
    folder = save_model(tmp_path / "m", llama_config())
    tokenizer = fluid_model.load_tokenizer(str(folder))
    tokenizer.add_tokens(["[unused32]"])
    tokenizer.save_pretrained(folder)
    AutoModelForCausalLM.from_config(llama_config(vocab_size=259)).save_pretrained(folder)
    head = fluid_model.KHead(32, 16)
    torch.save({f"diffusion_k_head.{k}": v for k, v in head.state_dict().items()}, folder / "model_head.bin")
    checkpoint = fluid_model.load(str(folder))
    assert (checkpoint.mask_id, checkpoint.manifest.k_max, checkpoint.manifest.tau) == (258, 16, (None,))
    hidden = torch.randn(3, 32)
    assert torch.equal(checkpoint.head(hidden), head(hidden))
    (answer,) = fluid_model.engine_for(checkpoint, FluidSettings()).generate([Request("x", (5, 6), 8)])
    (plain,) = fluid_model.engine_for(checkpoint, ArSettings()).generate([Request("x", (5, 6), 8)])
    assert answer.ids == plain.ids


def test_a_published_head_is_read_as_tensors_only(tmp_path):
    folder = save_model(tmp_path / "m")
    torch.save({"diffusion_k_head.0.weight": torch.zeros(8, 32)}, folder / "model_head.bin")
    with pytest.raises(ConfigError, match=r"model_head\.bin: a K-head needs .* found 0\.weight"):
        fluid_model.describe(str(folder))

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit(9)",))

    torch.save(Evil(), folder / "model_head.bin")
    with pytest.raises(ConfigError, match=r"model_head\.bin: cannot be read"):
        fluid_model.describe(str(folder))


def break_manifest(folder, **changes):
    file = folder / "fluid.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop_head(folder):
    (folder / "khead.safetensors").unlink()


def bend_head(folder):
    tensors = load_file(folder / "khead.safetensors")
    save_file({**tensors, "0.0.weight": torch.zeros(8, 31)}, folder / "khead.safetensors")


def drop_weight(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop_head, r"khead\.safetensors: missing"),
        (bend_head, r"khead\.safetensors: 0\.weight has shape \(8, 31\).* needs \(8, 32\)"),
        (lambda f: (f / "khead.safetensors").write_bytes(b"junk"), r"khead\.safetensors: not a safetensors file"),
        (lambda f: break_manifest(f, format_version=7), r"fluid\.json: format_version 7 is unknown"),
        (lambda f: break_manifest(f, k_max=9), r"head 0 has 8 classes, the manifest says k_max=9"),
        (lambda f: break_manifest(f, tau=[1.0, 2.0, 3.0]), r"khead\.safetensors: a K-head needs"),
        (
            lambda f: break_manifest(f, tau=["x"]),
            "not a FLUID manifest: tau='x' must be a number or nothing",
        ),
        (lambda f: break_manifest(f, tau=[float("nan")]), r"not a FLUID manifest: tau=nan must lie in"),
        (lambda f: break_manifest(f, k_max=0), r"not a FLUID manifest: k_max=0 must lie in \[1, 4096\]"),
        (lambda f: break_manifest(f, surprise=1), r"fluid\.json: not a FLUID manifest.*surprise"),
        (lambda f: (f / "fluid.json").write_text("{"), r"fluid\.json: not a JSON object"),
        (lambda f: break_manifest(f, mask_token="<nope>"), "'<nope>' is not one token"),
        (drop_weight, "1 weights are missing or misshapen, first model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(tiny_fluid, tmp_path, harm, message):
    folder = tmp_path / "c"
    shutil.copytree(tiny_fluid, folder)
    harm(folder)
    with pytest.raises(ConfigError, match=message):
        fluid_model.load(str(folder))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("", "no such folder"),
        ("owner/name", "owner/name"),
    ],
)
def test_paths_that_are_no_model(path, message):
    with pytest.raises(ConfigError, match=message):
        fluid_model.load(path)


def test_unknown_tau_names_the_known_ones(tiny_fluid, tiny_model):
    with pytest.raises(ConfigError, match=r"model\.tau=4\.0: this checkpoint has heads for tau = 2\.8, 1\.0"):
        fluid_model.load(str(tiny_fluid), tau=4.0)
    with pytest.raises(ConfigError, match="has no K-head"):
        fluid_model.load(str(tiny_model), tau=2.8)
    checkpoint = fluid_model.load(str(tiny_model))
    with pytest.raises(ConfigError, match="decoder=fluid needs a K-head"):
        fluid_model.engine_for(checkpoint, FluidSettings())


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "c"
    fluid_model.save(fluid_checkpoint(), target)
    before = {f.name: f.read_bytes() for f in target.iterdir()}

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    other = fluid_checkpoint(seed=5)
    monkeypatch.setattr(type(other.model), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        fluid_model.save(other, target, overwrite=True)
    assert {f.name: f.read_bytes() for f in target.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir()] == ["c"], "no draft is left behind"


def test_a_save_replaces_a_checkpoint_only_when_told_and_nothing_else_ever(tmp_path):
    target, link = tmp_path / "c", tmp_path / "link"
    target.mkdir()
    fluid_model.save(fluid_checkpoint(), target)
    first = (target / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="is not empty; pass overwrite=True"):
        fluid_model.save(fluid_checkpoint(seed=5), target)
    assert (target / "model.safetensors").read_bytes() == first
    link.symlink_to(target)
    fluid_model.save(fluid_checkpoint(seed=5), link, overwrite=True)
    assert link.is_symlink()
    assert (target / "model.safetensors").read_bytes() != first
    (target / "adapter").mkdir()
    for theirs in ("thesis.tex", "model-notes.md", ".hidden", "notes/config.json"):
        (target / theirs).parent.mkdir(exist_ok=True)
        (target / theirs).write_text("years of work")
        with pytest.raises(ConfigError, match=f"{theirs}, which was not written here"):
            fluid_model.save(fluid_checkpoint(), target, overwrite=True)
        assert (target / theirs).read_text() == "years of work"
        (target / theirs).unlink()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is no folder"):
        fluid_model.save(fluid_checkpoint(), tmp_path / "file", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "file", "link"]


def test_what_comes_between_a_check_and_a_swap_stays(tmp_path):
    """A file put beside ours at the last moment is set aside, not removed."""
    target, draft = tmp_path / "c", tmp_path / ".c-x"
    for folder in (target, draft):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    (target / "thesis.tex").write_text("years of work")
    replace_folder.swap(draft, target, ("config.json",))
    assert (target / "config.json").read_text() == ".c-x"
    assert [path.name for path in (tmp_path / ".c-x-old").iterdir()] == ["thesis.tex"]
