"""Where files come from and what reads them: a hub id is a folder once fetched; SentencePiece without its library."""

from __future__ import annotations

import json
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given, settings
from hypothesis import strategies as st

import fluid_model
from bench.field.published import UNUSED, piece_ids, pieces, random_weights, save_llada, save_pangu, save_pieces
from fluid_eval.running.worker import weights_name
from fluid_model import ConfigError, FluidSettings
from fluid_model.checkpoints import hub
from fluid_model.checkpoints.sentencepiece import SPACE, load_sentencepiece

from .tiny import fluid_checkpoint, llama_config, save_model

IDS = torch.arange(3, 40)[None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's. The hub itself is out of reach (see conftest)."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill(cache, repository, folder):
    """Put a folder where the hub's client looks for a repository."""
    place = cache / f"models--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, place / "snapshots" / COMMIT)


def test_a_hub_id_is_its_folder(tmp_path, cache):
    """Published layouts, a folder of this project, and an adapter whose parent is on the hub too."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain = random_weights(bias=False, tied=False)
    folders = {
        "GSAI-ML/LLaDA-8B-Base": save_llada(tmp_path / "a", plain, tied=False),
        "yuchuantian/NBDiff-7B-Base": save_pangu(tmp_path / "NBDiff-7B-Base", plain),
        "someone/fluid": tmp_path / "c",
        "someone/parent": save_model(tmp_path / "parent", llama_config(vocab_size=259)),
        "someone/adapter": tmp_path / "adapter",
    }
    fluid_model.save(fluid_checkpoint(), folders["someone/fluid"])
    fill(cache, "someone/parent", folders["someone/parent"])
    base = fluid_model.load("someone/parent")
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapter = get_peft_model(base.model, lora)
    adapter.peft_config["default"].base_model_name_or_path = "someone/parent"
    adapter.save_pretrained(folders["someone/adapter"])
    for repository, folder in folders.items():
        if repository != "someone/parent":
            fill(cache, repository, folder)
        here, there = (fluid_model.load(str(path)) for path in (folder, repository))
        assert torch.equal(there.model(IDS).logits, here.model(IDS).logits)
        assert (there.mask_id, there.end_ids, len(there.heads)) == (here.mask_id, here.end_ids, len(here.heads))
        assert fluid_model.describe(repository) == fluid_model.describe(str(folder))
        assert weights_name(there.folder) == weights_name(here.folder)
    assert there.manifest is None
    fluid_model.engine_for(fluid_model.load("someone/fluid"), FluidSettings())


def test_a_hub_that_is_not_there_is_one_line(cache):
    for ask in (fluid_model.load, fluid_model.describe, fluid_model.load_tokenizer):
        with pytest.raises(
            ConfigError, match=r"^model=owner/name: the hub gave OfflineModeIsEnabled and its cache holds no"
        ):
            ask("owner/name")


def test_a_hub_that_never_answers_does_not_hold_up(tmp_path, cache, monkeypatch):
    """A filled cache serves all the same."""
    fill(cache, "owner/name", save_model(tmp_path / "m"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        api = HfApi(f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        waits = []
        monkeypatch.setattr(
            hub, "model_info", lambda *what, timeout: [waits.append(timeout), api.model_info(*what, timeout=timeout)][1]
        )
        monkeypatch.setattr(hub, "TIMEOUT", 0.2)
        asked = []
        fetch = hub.snapshot_download
        monkeypatch.setattr(hub, "snapshot_download", lambda *_, **how: [asked.append(how), fetch(*_, **how)][1])
        assert hub.local_folder("owner/name", weights=True).name == COMMIT
        with pytest.raises(
            ConfigError, match=r"model=owner/other: the hub gave \w*Timeout and its cache holds no such"
        ):
            hub.local_folder("owner/other", weights=False)
        assert waits == [0.2, 0.2], "one question each, ended in time"
    assert all(how["local_files_only"] for how in asked), "a download would wait without end"


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """A stand-in for the hub: what is asked of owner/name is copied from `remote` to `fetched`."""
    source, target = tmp_path / "remote", tmp_path / "fetched"

    def download(repository: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert (repository, local_files_only) == ("owner/name", False)
        names = [str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
        return str(target)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "model_info", lambda repository, timeout: None)
    return source


def fetched(remote) -> set[str]:
    target = remote.parent / "fetched"
    return {str(f.relative_to(target)) for f in target.rglob("*") if f.is_file()}


def test_no_weights_are_fetched_to_describe_a_model(remote):
    fluid_model.save(fluid_checkpoint(), remote)
    for name in ("original/model.safetensors", "onnx/model.onnx", "pytorch_model.bin", "model.gguf", "code.py"):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"large")
    assert fluid_model.describe("owner/name").k_max == 8
    fluid_model.load_tokenizer("owner/name")
    described = fetched(remote)
    assert described == {"config.json", "fluid.json", "generation_config.json", "khead.safetensors"} | {
        f.name for f in remote.glob("*token*.json")
    }
    fluid_model.load("owner/name")
    assert fetched(remote) - described == {"model.safetensors"}


def test_pickled_weights_are_fetched_where_there_are_no_others(remote):
    save_model(remote)
    expected = fluid_model.load(str(remote)).model
    (remote / "model.safetensors").unlink()
    torch.save(expected.state_dict(), remote / "pytorch_model.bin")
    assert torch.equal(fluid_model.load("owner/name").model(IDS).logits, expected(IDS).logits)


def test_a_repository_without_a_model_is_refused(remote):
    remote.mkdir()
    (remote / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"model=owner/name: the folder holds no config\.json"):
        fluid_model.describe("owner/name")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    save_pieces(folder)
    return load_sentencepiece(folder)


def by_scores(text: str) -> list[int]:
    """SentencePiece's rule: write spaces out, one in front of each stretch; join the best-scored neighbours; bytes."""
    scores = {piece: score for piece, score, kind in pieces() if kind == 1}
    ids, sequence = piece_ids(), [1]
    for part in filter(None, re.split(r"(\[unused\d+\])", text)):
        symbols = [part] if part in UNUSED else list(SPACE + part.replace(" ", SPACE))
        while pairs := [n for n in range(len(symbols) - 1) if symbols[n] + symbols[n + 1] in scores]:
            best = max(pairs, key=lambda n: scores[symbols[n] + symbols[n + 1]])
            symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]
        for symbol in symbols:
            sequence += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return sequence


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(st.sampled_from(["hello", "hell", "wor", " ", "  ", "\n", "é", "👋", "lo", "[unused9]", "l", ":"]))
)
def test_sentencepiece(tokenizer, words):
    text = "".join(words)
    assert tokenizer.encode(text) == by_scores(text)
    if "[" not in text:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_pieces_the_model_says_are_whole_stay_whole(tmp_path):
    """User-defined pieces, whether or not the configuration repeats them."""
    save_pieces(tmp_path, added_tokens_decoder={})
    tokenizer = load_sentencepiece(Path(tmp_path))
    for text in ("hello[unused9] wor", "[unused9][unused33]hell"):
        assert tokenizer.encode(text) == by_scores(text)
    assert tokenizer.decode(tokenizer.encode("l[unused9]"), skip_special_tokens=True) == "l[unused9]"


def test_tokens_must_be_where_the_configuration_says(tmp_path):
    added = {"7": {"content": "[unused1]", "special": True}}
    save_pieces(tmp_path, added_tokens_decoder=added)
    with pytest.raises(
        ConfigError, match=rf"'\[unused1\]' is token 7 here, {piece_ids()['[unused1]']} in tokenizer\.m"
    ):
        load_sentencepiece(Path(tmp_path))


def test_a_tokenizer_of_the_repositorys_code_with_a_file_of_its_own(tmp_path):
    """tokenizer.json says all; the class that the configuration names is not needed."""
    from .tiny import byte_tokenizer

    torch.manual_seed(0)
    folder = save_pangu(tmp_path / "m", random_weights(bias=True, tied=False))
    (folder / "tokenizer.model").unlink()
    byte_tokenizer().backend_tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer = fluid_model.load_tokenizer(str(folder))
    assert tokenizer.encode("hi") == byte_tokenizer().encode("hi")
    tokenizer.save_pretrained(tmp_path / "t")
    assert "auto_map" not in (tmp_path / "t" / "tokenizer_config.json").read_text()


def test_a_plain_llama_with_tokenizer_model_alone(tmp_path):
    """Neither tokenizer.json nor a configuration: the file's own pieces say what begins and ends a text."""
    folder = save_model(tmp_path / "m", llama_config(vocab_size=400))
    for file in folder.glob("*token*"):
        file.unlink()
    save_pieces(folder)
    for config in (None, {"tokenizer_class": "LlamaTokenizer", "model_max_length": 64}):
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = fluid_model.load(str(folder)).tokenizer
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        for text in ("hello world", "lo\n[unused9] é"):
            assert tokenizer.encode(text) == by_scores(text)
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(
        ConfigError, match=r"tokenizer\.model: not a SentencePiece model; convert it to tokenizer\.json"
    ):
        fluid_model.load_tokenizer(str(folder))
    (folder / "tokenizer.model").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer here: neither tokenizer\.json nor tokenizer\.model$"):
        fluid_model.load_tokenizer(str(folder))


@pytest.mark.parametrize("value", ["", None, "abc", -1, float("nan"), 10**40, [], {}])
@pytest.mark.parametrize("name", ["model_max_length", "eos_token", "added_tokens_decoder", "auto_map"])
def test_odd_values_are_one_line_or_harmless(tmp_path, name, value):
    folder = save_model(tmp_path / "m")
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with suppress(ConfigError):
        assert fluid_model.load_tokenizer(str(folder)).encode("hi")
