"""Any Hugging Face causal LM behind one forward.

Legend: B rows, S slots fed, T key columns, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from . import masks
from .engine.cache import SlotCache
from .errors import ConfigError

PROBE_LENGTH = 8
PROBE_TOLERANCE = {torch.float32: 1e-3}
"""Largest allowed difference from the model's own logits, relative to their largest magnitude."""
PROBE_TOLERANCE_HALF = 5e-2


def context_window(config: PretrainedConfig) -> int:
    """Longest sequence the positions of this model allow, in tokens (2048 where the config does not say)."""
    text = config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


class Backbone:
    """A causal LM that reads slots through a SlotCache and returns hidden states, then logits where asked.

    Splitting the two means the vocabulary projection is paid only for slots somebody looks at.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config(decoder=True)
        self.window = context_window(model.config)
        self.device = model.device
        self.dtype = model.dtype
        self._head: Any = model.get_output_embeddings()
        if self._head is None:
            raise ConfigError(
                f"{type(model).__name__} has no output embeddings: only causal language models can decode"
            )
        self._cap = getattr(self.config, "final_logit_softcapping", None)
        self._sliding = getattr(self.config, "sliding_window", None)
        self._layer_types = set(getattr(self.config, "layer_types", None) or ())

    @torch.inference_mode()
    def forward(self, ids: Tensor, columns: Tensor, total: int, cache: SlotCache) -> Tensor:
        """One model call for all rows.

        ids: (B, S) tokens fed.  columns: (B, S) their cache columns, equal to their positions.  total: T.
        Returns (B, S, D): hidden states after the final norm.
        """
        output = self.model.base_model(
            input_ids=ids,
            position_ids=columns.clamp(max=self.window - 1),
            attention_mask=self._attention_mask(columns, total),
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) float32 logits."""
        logits: Tensor = self._head(hidden).float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def _attention_mask(self, columns: Tensor, total: int) -> Tensor | dict[str, Tensor]:
        full = self._additive(masks.causal(columns, total))
        if self._sliding is None or total <= self._sliding:
            near = full
        else:
            near = self._additive(masks.sliding(columns, total, self._sliding))
        if not self._layer_types:
            return near
        if len(self._layer_types) == 1:
            return near if "sliding_attention" in self._layer_types else full
        return {"full_attention": full, "sliding_attention": near}

    def _additive(self, readable: Tensor) -> Tensor:
        """(B, S, T) bool -> (B, 1, S, T), 0 where readable and the dtype's lowest number elsewhere."""
        mask = torch.zeros(readable.shape, dtype=self.dtype, device=readable.device)
        return mask.masked_fill_(~readable, torch.finfo(self.dtype).min)[:, None]

    @torch.inference_mode()
    def probe(self) -> None:
        """Check on a few tokens that this engine's forward is the model's own, cached and batched.

        Catches architectures whose attention, positions or logits need more than this engine gives (recurrent state,
        ALiBi, logit scaling). Raises ConfigError naming the architecture.
        """
        length = min(PROBE_LENGTH, self.window)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.model.get_input_embeddings().num_embeddings
        ids = torch.randint(0, vocabulary, (1, length), generator=generator).to(self.device)
        name = type(self.model).__name__
        try:
            plain = self.model(input_ids=ids, use_cache=False).logits[0].float()
            cache = SlotCache(2, 2 * length)
            pieces = []
            for start, stop in ((0, length // 2), (length // 2, length)):
                columns, total = cache.aim(1, [start], stop - start, self.device)
                pieces.append(self.forward(ids[:, start:stop], columns, total, cache))
            ours = self.logits(torch.cat(pieces, dim=1))[0]
        except (TypeError, AttributeError, RuntimeError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"{name} does not run in this engine: {type(error).__name__}: {error}") from error
        worst = float((plain - ours).abs().max() / plain.abs().max().clamp(min=1e-6))
        if not worst < PROBE_TOLERANCE.get(self.dtype, PROBE_TOLERANCE_HALF):
            raise ConfigError(f"{name} does not run in this engine: logits differ from the model's own by {worst:.2g}")
