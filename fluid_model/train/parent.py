"""The model that training starts from: a parent checkpoint, or a new Llama with a tokenizer trained on the data."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..checkpoints import checkpoint as checkpoints
from ..checkpoints.checkpoint import Checkpoint
from ..forward.backbone import Backbone
from ..tokens import Tokenizer, end_ids
from .recipe import LlamaSpec, ParentSpec


def load_parent(spec: ParentSpec, texts: Iterable[str], dtype: str, *, calibrates: bool = False) -> Checkpoint:
    """Load the parent, or create a new model with random weights.

    texts: training texts for a new tokenizer.  dtype: of a parent's weights.  calibrates: FLUID's stage 2 follows; an
    adapter then counts as a result of stage 1, which its own files do not state.
    Raises ConfigError if the parent cannot be loaded.
    """
    # 1) a parent
    if spec.scratch is None:
        path = str(spec.parent)
        method: str | None = "fluid" if calibrates and checkpoints.is_adapter(path) else None
        return checkpoints.load(path, dtype=dtype, device="cpu", mask_token=spec.mask_token, method=method)
    # 2) or a new model, its vocabulary the new tokenizer's
    tokenizer = train_tokenizer(islice(texts, spec.tokenizer_rows), spec.scratch.vocab_size)
    config = llama_config(spec.scratch)
    config.vocab_size = len(tokenizer)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    return Checkpoint(Backbone(LlamaForCausalLM(config)), tokenizer, end_ids(tokenizer, config))


def outline(spec: ParentSpec) -> PreTrainedModel:
    """The model on the meta device, without weights. Raises ConfigError if its shape is unknown here."""
    if (shape := spec.scratch or spec.shape) is not None:
        config = llama_config(shape)
    else:
        config = checkpoints.read_config(str(spec.parent))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def llama_config(spec: LlamaSpec) -> LlamaConfig:
    """transformers' configuration of a Llama of this shape."""
    return LlamaConfig(
        vocab_size=spec.vocab_size, hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.window, tie_word_embeddings=spec.tie_embeddings, rms_norm_eps=spec.rms_eps,
        initializer_range=spec.init_std,
        attention_bias=spec.attention_bias, rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
    )  # fmt: skip


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer, which encodes any text. Every digit is a token of its own."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    fast.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
