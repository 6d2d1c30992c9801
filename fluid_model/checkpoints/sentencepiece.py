"""SentencePiece BPE models as fast tokenizers, for folders with `tokenizer.model` alone.

These are plain Llamas, and openPangu with its adaptations, whose tokenizer class is code of the repository. The model
file alone decides: its scores rank merges, its rules normalise text. SentencePiece itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Fast
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from ..common.errors import ConfigError, reason
from ..common.files import read_json, read_text
from ..tokens import Tokenizer

MODEL_FILE = "tokenizer.model"
SPACE = "\u2581"
"""SentencePiece's space."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BPE = 1, 2, 3, 4, 2
"""Codes of sentencepiece_model.proto: types of pieces (normal, unknown, control, user-defined) and the BPE model type.

Control pieces never occur in text; user-defined ones are never split.
"""
TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
OPTIONS = ("add_bos_token", "add_eos_token", "model_max_length", "clean_up_tokenization_spaces", "chat_template")


def load_sentencepiece(folder: Path) -> Tokenizer:
    """The tokenizer of tokenizer.model and tokenizer_config.json.

    Text after a user-defined piece begins with a space of its own, as in the repositories' classes; SentencePiece would
    leave this space out where the configuration does not repeat the piece.
    Raises ConfigError, naming the file, if it is no BPE model or contradicts the configuration's token ids.
    """
    # 1) model and configuration
    proto = _read(folder / MODEL_FILE)
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = read_text(template)
    config = _defaults(proto, folder) | {name: value for name, value in config.items() if value is not None}
    # 2) the tokenizer, after a trial
    try:
        stated = {int(i): _token(t) for i, t in config.get("added_tokens_decoder", {}).items()}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_convert(proto),
            added_tokens_decoder=stated,
            **{name: _token(config[name]) for name in TOKENS if name in config},
            **{name: config[name] for name in OPTIONS if name in config},
        )
        tokenizer("a")
    except Exception as error:  # values of a wrong type raise errors of many types
        raise ConfigError(f"{file}: no tokenizer can be made of it: {type(error).__name__}: {reason(error)}") from error
    # 3) ids of the configuration
    vocabulary = tokenizer.get_vocab()
    for token, added in stated.items():
        if vocabulary.get(str(added)) != token:
            raise ConfigError(
                f"{file}: {str(added)!r} is token {token} here, {vocabulary.get(str(added))} in {MODEL_FILE}"
            )
    return tokenizer


def _defaults(proto: Any, folder: Path) -> dict[str, Any]:
    """Defaults of tokenizer_config.json.

    Special tokens of the model, a beginning-of-sequence token before every text (as in LlamaTokenizer), and the tokens
    of an older folder's added_tokens.json.
    """
    spec, pieces = proto.trainer_spec, proto.pieces
    special_ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id}
    defaults: dict[str, Any] = {
        name: pieces[i].piece
        for name, i in special_ids.items()
        if 0 <= i < len(pieces) and pieces[i].type in (UNKNOWN, CONTROL)
    }
    file = folder / "added_tokens.json"
    if file.is_file():
        defaults["added_tokens_decoder"] = {str(i): {"content": text} for text, i in read_json(file).items()}
    return {**defaults, "add_bos_token": "bos_token" in defaults}


def _read(file: Path) -> Any:
    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except Exception as error:  # of a private type of protobuf
        raise ConfigError(f"{file}: not a SentencePiece model; convert it to tokenizer.json") from error
    if not proto.pieces:  # some other files parse as an empty model
        raise ConfigError(f"{file}: not a SentencePiece model; convert it to tokenizer.json")
    if proto.trainer_spec.model_type != BPE:
        raise ConfigError(f"{file}: only BPE models are read here; convert it to tokenizer.json")
    return proto


def _convert(proto: Any) -> Fast:
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = generate_merges(vocabulary, scores, skip_tokens=vocabulary.keys() - scores.keys())
    fast = Fast(
        models.BPE(
            vocab=vocabulary, merges=merges, unk_token=spec.unk_piece, fuse_unk=True, byte_fallback=spec.byte_fallback
        )
    )
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    fast.add_tokens(
        [AddedToken(p.piece, normalized=False, special=False) for p in proto.pieces if p.type == USER_DEFINED]
    )
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else back)
    return fast


def _token(value: str | Mapping[str, Any]) -> AddedToken:
    """A special token of tokenizer_config.json, given as text or as a table."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    known = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(value["content"], **{name: value[name] for name in known if name in value})
