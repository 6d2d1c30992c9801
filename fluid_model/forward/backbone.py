"""Any Hugging Face causal LM behind one forward.

Legend: B rows, S slots fed, T key columns, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from ..common.errors import ConfigError, reason
from . import attention_masks, compiled, cuda_graphs, llama, slot_budget
from .kv_cache import KVCache

PROBE_LENGTHS = (8, 5)
"""Prompt tokens of the two rows a probe feeds, the first more where masks reach further; each is then continued by
PROBE_MORE.
"""
PROBE_MORE = 3
PROBE_SLIDING = 4
"""Sliding window of a probe, in tokens, where the model's own is wider: both rows pass it."""
PROBE_TOLERANCE = {torch.float32: 1e-3}
"""Largest allowed difference from the model's own logits, relative to their largest magnitude."""
PROBE_TOLERANCE_HALF = 5e-2
MOST_WINDOW = 2**31
"""Tokens; a configuration that says more says nothing."""
SHORT = 2e8
"""Multiplications and additions up to which a forward runs on one thread."""
TIMED_CONTEXT, TIMED_SLOTS, TIMED_RUNS, TIMED_SECONDS = 128, 4096, 9, 0.05
"""Of forwards that are timed: tokens read, slots fed at most, and how often each, and how long, at least."""


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of logits, relative to the largest expected one; nan where some are not finite."""
    error = (expected.float() - found.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
    return float(error)


def tolerance(dtype: torch.dtype) -> float:
    """Largest `difference` that arithmetic of this precision explains."""
    return PROBE_TOLERANCE.get(dtype, PROBE_TOLERANCE_HALF)


def context_window(config: PretrainedConfig) -> int:
    """Longest sequence the positions of this model allow, in tokens (2048 where the config does not say).

    Rotary scalings that depend on the longest row of a batch would couple rows; such models get the window up to which
    they do not scale.
    """
    text = config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        unscaled = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        return int(unscaled or text.max_position_embeddings)
    for name in ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length"):
        value = getattr(text, name, None)
        if isinstance(value, int) and 0 < value <= MOST_WINDOW:
            return value
    return 2048


def _own_window(model: PreTrainedModel) -> int:
    """Tokens after which a mask of the model's own hides the first (GPT-Neo's local attention); 0 without such masks.

    They are buffers, (..., N, N) of query and key, true where readable.
    """
    hides = [
        mask.reshape(-1, *mask.shape[-2:])[0, :, 0] == 0
        for mask in model.buffers()
        if mask.dtype in (torch.bool, torch.uint8) and mask.ndim > 1 and mask.shape[-1] == mask.shape[-2]
    ]
    return min((int(rows.nonzero()[0, 0]) for rows in hides if rows.any()), default=0)


class Backbone:
    """A causal LM that reads slots through a KVCache and returns hidden states, then logits where asked.

    Splitting the two means the vocabulary projection is paid only for slots somebody looks at.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.config = model.config.get_text_config(decoder=True)
        self.window = context_window(model.config)
        self.device = model.device
        self.dtype = model.dtype
        self._lowest = max(torch.finfo(self.dtype).min, torch.finfo(torch.float32).min)  # of a mask, made in float32
        self._head: Any = model.get_output_embeddings()
        if self._head is None:
            raise ConfigError(
                f"{type(model).__name__} has no output embeddings: only causal language models can decode"
            )
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self._once = 2 * sum(weight.numel() for weight in model.parameters())
        self._cap = getattr(self.config, "final_logit_softcapping", None)
        self._sliding = getattr(self.config, "sliding_window", None)
        self._layer_types = set(getattr(self.config, "layer_types", None) or ())
        self.written_out = llama.Forward(model, self.window) if llama.fits(model) else None
        """The forward written out, where it fits."""
        found = self.written_out
        self.native = None if found is None else compiled.Forward.of(model, found.cos, found.sin)
        """The same, compiled, where it can be."""
        self.graphs: cuda_graphs.Graphs | None = None

    @torch.inference_mode()
    def forward(self, ids: Tensor, reading: attention_masks.AttentionPlan, cache: KVCache) -> Tensor:
        """One model call for all rows.

        ids: (B, S) tokens fed.  reading: where they stand and what they read, of a cache aimed at them.
        Returns (B, S, D): hidden states after the final norm.
        """
        if self.native is not None and self.graphs is None:
            return self.native(ids, reading, cache)
        with self._threads(ids.numel()):
            return self._forward(ids, reading, cache)

    def _forward(self, ids: Tensor, reading: attention_masks.AttentionPlan, cache: KVCache) -> Tensor:
        places = reading.positions.clamp(max=self.window - 1)
        if self.written_out is not None:
            mask = self._additive(reading.mask())
            replayed = None if self.graphs is None else self.graphs(ids, places, mask, cache)
            return self.written_out(ids, places, mask, cache) if replayed is None else replayed
        output = self.model.base_model(
            input_ids=ids,
            position_ids=places,
            attention_mask=self._attention_mask(reading),
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def capture(self, *, on: bool, only: cuda_graphs.Size | None = None) -> None:
        """Replay captured forwards, or do not. only: one shape for all, see `graphs`.

        Raises ConfigError where this model's forward is not written out.
        """
        if on and self.written_out is None:
            raise ConfigError(f"{type(self.model).__name__}: only forwards that are written out can be captured")
        self.graphs = cuda_graphs.Graphs(self.written_out, only) if on and self.written_out is not None else None

    def cache(self, slots: int, columns: int) -> KVCache:
        """Room for so many rows of so many tokens."""
        return KVCache(slots, columns) if self.graphs is None else self.graphs.cache(slots, columns)

    def check_ids(self, key: str, ids: Sequence[int]) -> None:
        """Raise ConfigError, naming the request, if this model has no embedding for one of its tokens."""
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            wrong = next(i for i in ids if not 0 <= i < self.vocabulary)
            raise ConfigError(
                f"request {key}: token {wrong} is none of the model's {self.vocabulary}: is the tokenizer another's?"
            )

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) float32 logits."""
        logits = self._projected(hidden.flatten(0, -2)).float().view(*hidden.shape[:-1], -1)
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    def _projected(self, flat: Tensor) -> Tensor:
        """(M, D) -> (M, V): at once, or as many at a time as a row of the one shape has slots."""
        if self.native is not None and self.native.says_tokens and self.graphs is None:
            return self.native.logits(flat)
        with self._threads(len(flat)):
            if self.graphs is None or self.graphs.only is None:
                return self._head(flat)  # type: ignore[no-any-return]
            size = self.graphs.only[1]
            filled = functional.pad(flat, (0, 0, 0, -len(flat) % size)).view(-1, size, flat.shape[-1])
            return torch.cat([self._head(part) for part in filled])[: len(flat)]

    @contextmanager
    def _threads(self, slots: int) -> Iterator[None]:
        """One thread where a forward of that many slots is too short for more: waking them takes longer."""
        threads = torch.get_num_threads()
        if threads == 1 or self._once * slots > SHORT:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @cached_property
    def slot_budget(self) -> int:
        """Slots that cost as much as all else a forward does, measured here and now."""
        context = min(TIMED_CONTEXT, self.window // 2)
        return slot_budget.measure(lambda slots: self._seconds(context, slots), min(TIMED_SLOTS, self.window - context))

    def _seconds(self, context: int, slots: int) -> float:
        """Time of a forward of one row that feeds `slots` slots behind `context` cached tokens: the fastest of some,
        since whatever else the machine does only adds.
        """
        cache, found = KVCache(1, context + slots), list[float]()
        ids = torch.zeros(1, max(context, slots), dtype=torch.long, device=self.device)
        self.forward(ids[:, :context], cache.set_write_positions(0, [0], context, self.device), cache)
        while len(found) < TIMED_RUNS or sum(found) < TIMED_SECONDS:
            started = time.perf_counter()
            hidden = self.forward(ids[:, :slots], cache.set_write_positions(0, [context], slots, self.device), cache)
            float(hidden[0, -1, 0])  # waits for the device
            found.append(time.perf_counter() - started)
        return min(found)

    def _attention_mask(self, reading: attention_masks.AttentionPlan) -> Tensor | dict[str, Tensor]:
        full = near = self._additive(reading.mask())
        if self._sliding is not None and reading.intervals is not None:
            raise ConfigError(f"{type(self.model).__name__} reads through a sliding window: only causal decoders run")
        if self._sliding is not None and reading.total > self._sliding:
            near = self._additive(attention_masks.sliding(reading.columns, reading.total, self._sliding))
        if not self._layer_types:
            return near
        if len(self._layer_types) == 1:
            return near if "sliding_attention" in self._layer_types else full
        return {"full_attention": full, "sliding_attention": near}

    def _additive(self, readable: Tensor) -> Tensor:
        """(B, S, T) bool -> (B, 1, S, T), 0 where readable and the lowest number elsewhere."""
        return torch.where(readable[:, None], 0.0, self._lowest).to(self.dtype)

    @torch.inference_mode()
    def probe(self) -> None:
        """Check on two rows, one past every window, that this engine's forward, batched, ragged and cached, is the
        model's own.

        Catches architectures whose attention, positions or logits need more than this engine gives (recurrent state,
        ALiBi, masks of their own, logit scaling). Raises ConfigError naming the architecture.
        """
        name = type(self.model).__name__
        generator = torch.Generator().manual_seed(0)
        lengths = (max(PROBE_LENGTHS[0], min(_own_window(self.model) + 1, self.window - PROBE_MORE)), PROBE_LENGTHS[1])
        shape = (len(lengths), max(lengths) + PROBE_MORE)
        ids = torch.randint(0, self.vocabulary, shape, generator=generator).to(self.device)
        errors = []
        try:
            with self._narrowed():
                ours = self._probe_cached(ids, lengths)
                for row, length in enumerate(lengths):
                    alone = ids[row : row + 1, : length + PROBE_MORE]
                    plain = self.model(input_ids=alone, use_cache=False).logits[0]
                    errors.append(difference(ours[row], plain))
        except (TypeError, AttributeError, RuntimeError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"{name} does not run in this engine: {type(error).__name__}: {reason(error)}") from error
        if any(error != error for error in errors):
            raise ConfigError(f"{name}: its logits are not finite; its weights may be damaged, or dtype too narrow")
        if not (worst := max(errors)) < tolerance(self.dtype):
            raise ConfigError(f"{name} does not run in this engine: logits differ from the model's own by {worst:.2g}")

    @contextmanager
    def _narrowed(self) -> Iterator[None]:
        """A sliding window that a probe can afford to pass: masks are made of what the configuration says."""
        window = self._sliding
        if window is None or window <= PROBE_SLIDING:
            yield
            return
        self._sliding = self.config.sliding_window = PROBE_SLIDING
        try:
            yield
        finally:
            self._sliding = self.config.sliding_window = window

    def _probe_cached(self, ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Prompts of different length together, then more tokens after each. ids: (2, longest)."""
        cache = KVCache(len(ids) + 1, 2 * ids.shape[1])
        reading = cache.set_write_positions(1, [0] * len(ids), max(lengths), self.device)
        prompts = self.forward(ids[:, : max(lengths)], reading, cache)
        more = torch.stack([row[n : n + PROBE_MORE] for row, n in zip(ids, lengths, strict=True)])
        tails = self.forward(more, cache.set_write_positions(1, list(lengths), PROBE_MORE, self.device), cache)
        rows = zip(prompts, tails, lengths, strict=True)
        return [self.logits(torch.cat([prompt[:length], tail])) for prompt, tail, length in rows]
