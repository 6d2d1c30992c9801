"""Any Hugging Face causal LM behind one forward over the key/value cache.

Four forwards stand behind it. `Backbone.forward_choice` decides which runs; the first of these that is possible:

    captured      the explicit forward in CUDA graphs, replayed     where `Backbone.capture` was asked for it
    compiled      the explicit forward in C (`compiled`)            float32, bfloat16, int8 on a CPU; a C compiler
    explicit      the forward of Llama in torch (`llama`)           Llama, Qwen2, Qwen3, Mistral; plain linear maps
    transformers  the model's own modules                           all other causal models

docs/forwards.md has the table in full.

Legend: B rows, S slots fed, M hidden states, T key columns, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from ..common.errors import ConfigError, reason
from . import attention_masks, compiled, cuda_graphs, forward_time, int8_rows, llama
from .gated_lora import GatedLora
from .kv_cache import KVCache

PROBE_LENGTHS = (8, 5)
"""Prompt tokens of the two rows of a probe; the first row has more where the model's own mask reaches further."""
PROBE_MORE = 3
"""Tokens that continue each prompt of a probe."""
PROBE_SLIDING = 4
"""Sliding window of a probe, in tokens, where the model's own is wider: both rows pass it."""
PROBE_TOLERANCE = {torch.float32: 1e-3}
"""Largest allowed difference from the model's own logits, relative to their largest magnitude."""
PROBE_TOLERANCE_HALF = 5e-2
"""The same for half precision."""
PROBE_TOLERANCE_OWN_HALF = 0.15
"""The same where only the model's own forward rounds to half precision. 30 layers of it move logits by 4 to 7%."""
MOST_WINDOW = 2**31
"""Tokens. A configuration with more has a placeholder there."""
SHORT = 2e8
"""Multiplications and additions up to which a forward runs on one thread."""
TIMED_SLOTS, TIMED_RUNS, TIMED_SECONDS = 4096, 9, 0.05
"""Timed forwards: tokens cached, most slots fed, least runs and least seconds of each."""


class ForwardChoice(NamedTuple):
    """Which forward runs: captured, compiled, explicit or transformers.

    reason: why none that comes before it; for the fastest of a device, what made it possible.
    """

    kind: str
    reason: str


def difference(logits: Tensor, expected: Tensor) -> float:
    """Largest difference of logits, relative to the largest expected one; nan where some are not finite."""
    error = (expected.float() - logits.float()).abs().max() / expected.float().abs().max().clamp(min=1e-6)
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

    Such masks are buffers, (..., N, N) of query and key, True where the query attends to the key.
    """
    hidden_first = [
        mask.reshape(-1, *mask.shape[-2:])[0, :, 0] == 0
        for mask in model.buffers()
        if mask.dtype in (torch.bool, torch.uint8) and mask.ndim > 1 and mask.shape[-1] == mask.shape[-2]
    ]
    return min((int(queries.nonzero()[0, 0]) for queries in hidden_first if queries.any()), default=0)


def predicting_slots(slots: Tensor, shift: bool) -> Tensor:
    """Slots whose states predict the tokens of `slots`, (M,) each: the same ones (LLaDA), or the ones before them.

    The first slot has none before it and predicts its own, as in Dream's public code, where logits move right by one.
    """
    return (slots - 1).clamp(min=0) if shift else slots


class Backbone:
    """A causal LM over a KVCache: hidden states of the slots fed, and logits of some of them.

    The two are apart, so that the vocabulary projection runs only for slots whose logits are used.
    """

    def __init__(self, model: PreTrainedModel, adapter: GatedLora | None = None, *, int8: bool = False) -> None:
        """adapter: acts on mask slots.  int8: round the weights of linear maps, in place, see `int8_rows`.

        Raises ConfigError where the model's own modules would have to apply either.
        """
        self.model = model.eval()
        self.int8 = int8
        """Whether the weights of linear maps are rounded to int8 by row."""
        self.adapter = adapter
        self.config = model.config.get_text_config(decoder=True)
        self.window = context_window(model.config)
        self.device = model.device
        self.dtype = model.dtype
        self._lowest = max(torch.finfo(self.dtype).min, torch.finfo(torch.float32).min)  # of an additive mask
        self._head: Any = model.get_output_embeddings()
        if self._head is None:
            raise ConfigError(
                f"{type(model).__name__} has no output embeddings: only causal language models can decode"
            )
        self.vocabulary: int = model.get_input_embeddings().num_embeddings
        self._operations = 2 * sum(weight.numel() for weight in model.parameters())  # of one slot
        self._softcap = getattr(self.config, "final_logit_softcapping", None)
        self._sliding = getattr(self.config, "sliding_window", None)
        self._layer_types = set(getattr(self.config, "layer_types", None) or ())
        self.explicit: llama.ExplicitForward | None = None
        """The explicit Llama forward in torch, where the model fits."""
        self.compiled: compiled.CompiledForward | None = None
        """The same in C, where it can run."""
        self.graphs: cuda_graphs.Graphs | None = None
        """Captured forwards, where asked for."""
        self._not_compiled = ""
        self._not_explicit = llama.misfit(model)
        if int8 and self._not_explicit:
            raise ConfigError(f"dtype=int8 needs the explicit Llama forward: {self._not_explicit}")
        if int8:
            int8_rows.round_linear_maps(model)
        if not self._not_explicit:
            self.explicit = explicit = llama.ExplicitForward(model, self.window, adapter)
            self.compiled, self._not_compiled = compiled.CompiledForward.of(
                model, explicit.cos, explicit.sin, adapter, int8=int8
            )
        elif adapter is not None:
            raise ConfigError(f"a gated adapter needs the explicit Llama forward: {self._not_explicit}")

    @property
    def dtype_name(self) -> str:
        """Format of the weights: int8, bfloat16, float32, ..."""
        return "int8" if self.int8 else str(self.dtype).removeprefix("torch.")

    @property
    def cache_dtype(self) -> torch.dtype:
        """Format of keys and values in the cache."""
        return torch.float32 if self.forward_choice.kind == "compiled" else self.dtype

    @property
    def forward_choice(self) -> ForwardChoice:
        """Which forward runs and why, see the module's docstring. Captured forwards leave single calls that fit no
        captured shape to the explicit one.
        """
        if self.graphs is not None:
            return ForwardChoice("captured", "asked for")
        if self.compiled is not None:
            return ForwardChoice("compiled", f"{self.compiled.stored} on a CPU")
        if self.explicit is not None:
            return ForwardChoice("explicit", self._not_compiled or "compiled code is turned off")
        return ForwardChoice("transformers", self._not_explicit or "the explicit forward is turned off")

    def forward(self, ids: Tensor, plan: attention_masks.AttentionPlan, cache: KVCache) -> Tensor:
        """One model call for all rows.

        ids: (B, S) tokens fed.  plan: their columns, positions and mask; the cache's write positions are set to it.
        Returns (B, S, D): hidden states after the final norm.
        """
        if self.compiled is not None and self.graphs is None:
            return self.compiled(ids, plan, cache)
        with torch.inference_mode(), self._threads(ids.numel()):
            return self._forward_in_torch(ids, plan, cache)

    def _forward_in_torch(self, ids: Tensor, plan: attention_masks.AttentionPlan, cache: KVCache) -> Tensor:
        """`forward` by any but compiled code."""
        positions = plan.positions.clamp(max=self.window - 1)
        if self.explicit is not None:
            mask = self._additive(plan.mask())
            replayed = None if self.graphs is None else self.graphs(ids, positions, mask, cache)
            return self.explicit(ids, positions, mask, cache) if replayed is None else replayed
        output = self.model.base_model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=self._attention_mask(plan),
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def capture(self, *, on: bool, only: cuda_graphs.Size | None = None) -> None:
        """Replay captured forwards, or stop doing so. only: one shape for all, see `cuda_graphs`.

        Raises ConfigError where this model has no explicit forward.
        """
        if on and self.explicit is None:
            raise ConfigError(f"{type(self.model).__name__}: only the explicit Llama forward can be captured")
        self.graphs = cuda_graphs.Graphs(self.explicit, only) if on and self.explicit is not None else None

    def cache(self, rows: int, columns: int) -> KVCache:
        """Room for so many rows of so many tokens."""
        return KVCache(rows, columns) if self.graphs is None else self.graphs.cache(rows, columns)

    def check_ids(self, key: str, ids: Sequence[int]) -> None:
        """Raise ConfigError, naming the request, if this model has no embedding for one of its tokens."""
        if not 0 <= min(ids) <= max(ids) < self.vocabulary:
            wrong = next(i for i in ids if not 0 <= i < self.vocabulary)
            raise ConfigError(
                f"request {key}: token {wrong} is outside the model's vocabulary of {self.vocabulary}; does the "
                "tokenizer belong to it?"
            )

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states -> (..., V) float32 logits."""
        logits = self._projected(hidden.flatten(0, -2)).float().view(*hidden.shape[:-1], -1)
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    def _projected(self, flat: Tensor) -> Tensor:
        """(M, D) -> (M, V). Where one shape is captured, as many at a time as it has slots: kernels are chosen by
        shape, so this keeps a slot's logits independent of the batch.
        """
        if self.compiled is not None and self.compiled.projects_vocabulary and self.graphs is None:
            return self.compiled.logits(flat)
        with torch.inference_mode(), self._threads(len(flat)):
            if self.graphs is None or self.graphs.only is None:
                return self._head(flat.to(self.dtype))  # type: ignore[no-any-return]
            size = self.graphs.only[1]
            padded = functional.pad(flat, (0, 0, 0, -len(flat) % size)).view(-1, size, flat.shape[-1])
            return torch.cat([self._head(part) for part in padded])[: len(flat)]

    @contextmanager
    def _threads(self, slots: int) -> Iterator[None]:
        """Runs on one thread where a forward of that many slots is short: waking others would take longer."""
        threads = torch.get_num_threads()
        if threads == 1 or self._operations * slots > SHORT:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    @cached_property
    def forward_time(self) -> forward_time.ForwardTime:
        """Seconds of a forward by its slots and cached tokens. Measured at first use."""
        return forward_time.measure(self._seconds, self.window, TIMED_SLOTS)

    @property
    def slot_budget(self) -> int:
        """Slots that cost as much as all else in a forward, see `forward_time`."""
        return self.forward_time.slot_budget

    @torch.inference_mode()
    def _seconds(self, slots: int, context: int) -> float:
        """Time of a forward of one row with `slots` slots behind `context` cached tokens, and of all their logits: the
        fastest of several runs, since other work on the machine only adds time. What is cached does not matter.
        """
        cache, times = KVCache(1, context + slots), list[float]()
        ids = torch.zeros(1, slots, dtype=torch.long, device=self.device)
        if self.adapter is not None:  # most slots of a draft are masks, which cost more
            ids[:, 1:slots] = self.adapter.mask_id
        self.forward(ids, cache.set_write_positions(0, [context], slots, self.device), cache)
        cache.zero_row(0)  # untouched memory is a single page of zeros, read from caches
        while len(times) < TIMED_RUNS or sum(times) < TIMED_SECONDS:
            started = time.perf_counter()
            hidden = self.forward(ids, cache.set_write_positions(0, [context], slots, self.device), cache)
            float(self.logits(hidden[0])[-1, 0])  # waits for the device
            times.append(time.perf_counter() - started)
        return min(times)

    def _attention_mask(self, plan: attention_masks.AttentionPlan) -> Tensor | dict[str, Tensor]:
        """Additive masks as transformers' models take them: one for all layers, or one by layer type.

        Raises ConfigError for tree attention through a sliding window.
        """
        full = near = self._additive(plan.mask())
        if self._sliding is not None and plan.intervals is not None:
            raise ConfigError(f"{type(self.model).__name__} reads through a sliding window: only causal decoders run")
        if self._sliding is not None and plan.total > self._sliding:
            near = self._additive(attention_masks.sliding(plan.columns, plan.total, self._sliding))
        if not self._layer_types:
            return near
        if len(self._layer_types) == 1:
            return near if "sliding_attention" in self._layer_types else full
        return {"full_attention": full, "sliding_attention": near}

    def _additive(self, mask: Tensor) -> Tensor:
        """(B, S, T) bool -> (B, 1, S, T), 0 where a query attends to a key and the lowest number elsewhere."""
        return torch.where(mask[:, None], 0.0, self._lowest).to(self.dtype)

    @torch.inference_mode()
    def probe(self) -> None:
        """Compare this engine's forward, batched, ragged and cached, with the model's own, on two rows.

        One row is longer than every window. Catches architectures that need more than this engine gives (recurrent
        state, ALiBi, masks of their own, logit scaling). Raises ConfigError naming the architecture.
        """
        name = type(self.model).__name__
        generator = torch.Generator().manual_seed(0)
        lengths = (max(PROBE_LENGTHS[0], min(_own_window(self.model) + 1, self.window - PROBE_MORE)), PROBE_LENGTHS[1])
        shape = (len(lengths), max(lengths) + PROBE_MORE)
        ids = torch.randint(0, self.vocabulary, shape, generator=generator).to(self.device)
        if self.adapter is not None:  # transformers' own forward knows no gate
            ids[self.adapter.gate(ids)] = 0
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
        widens = self.forward_choice.kind == "compiled" and self.dtype != torch.float32
        if not (worst := max(errors)) < (PROBE_TOLERANCE_OWN_HALF if widens else tolerance(self.dtype)):
            raise ConfigError(f"{name} does not run in this engine: logits differ from the model's own by {worst:.2g}")

    @contextmanager
    def _narrowed(self) -> Iterator[None]:
        """Narrows the sliding window, so that a short probe is longer: masks are made by the configuration."""
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
        """Logits of two rows by `forward`: prompts of different length together, then more tokens behind each.

        ids: (2, longest).  Returns (length + PROBE_MORE, V) of each row.
        """
        cache = KVCache(len(ids) + 1, 2 * ids.shape[1])
        plan = cache.set_write_positions(1, [0] * len(ids), max(lengths), self.device)
        prompts = self.forward(ids[:, : max(lengths)], plan, cache)
        more = torch.stack([row[n : n + PROBE_MORE] for row, n in zip(ids, lengths, strict=True)])
        tails = self.forward(more, cache.set_write_positions(1, list(lengths), PROBE_MORE, self.device), cache)
        rows = zip(prompts, tails, lengths, strict=True)
        return [self.logits(torch.cat([prompt[:length], tail])) for prompt, tail, length in rows]
