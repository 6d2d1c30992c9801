"""Prepares a stage: its parent with mask token and LoRA, its trained module, and its layouts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from ..checkpoints import checkpoint as checkpoints
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.manifest import Manifest
from ..checkpoints.weights import fingerprint
from ..common.errors import ConfigError
from ..forward.backbone import Backbone
from ..forward.gated_lora import GatedLora
from .gated import GatedStage
from .masked_layouts import BlockCausalLayout, CanvasLayout
from .noise import NoiseSpec
from .parent import load_parent
from .recipe import MASKED, LoraSpec, LossTarget, Recipe
from .row_layouts import AllMaskLayout, CausalLayout, HybridLayout, Layout, NoisedBlockLayout
from .stages import HorizonCalibration

NEW_MASK = "<|mask|>"
"""Text of the mask token added to a parent, where the recipe names none."""
DLLM_OFFSET = 1e-6
"""Added to the divisor of a masked token's weight by dLLM's schedules, see `noise`."""


@dataclass
class StageSetup:
    """A stage ready to train.

    checkpoint: the result, trained in place.  module: holds the trained parameters.  layout: of training rows.
    measured_layout: of held-out rows whose accepted length is measured; None where the loss suffices.
    """

    checkpoint: Checkpoint
    module: nn.Module
    layout: Layout
    measured_layout: Layout | None = None


def set_up_stage(recipe: Recipe, texts: Sequence[str]) -> StageSetup:
    """Load or create the parent, and prepare it for its stage. texts: training texts for a new tokenizer.

    Raises ConfigError where the parent does not suit the stage.
    """
    # 1) the parent; frozen weights may be bfloat16, trained ones stay float32
    freezes = recipe.lora is not None or bool(recipe.tau)
    narrow = recipe.optim.bf16 and freezes and (torch.cuda.is_available() or recipe.is_gated)
    dtype = "bfloat16" if narrow else "float32"
    checkpoint = load_parent(recipe.model, texts, dtype, calibrates=recipe.stage == "fluid-horizon")
    _check_attention(checkpoint, recipe)
    # 2) its stage
    if recipe.stage == "ar":
        return StageSetup(checkpoint, checkpoint.model, CausalLayout())
    parent = _parent_name(recipe)
    if recipe.stage == "fluid-horizon":
        return _set_up_calibration(checkpoint, recipe, parent)
    return _set_up_adaptation(checkpoint, recipe, parent)


def _set_up_calibration(checkpoint: Checkpoint, recipe: Recipe, parent: str) -> StageSetup:
    """K-heads over a frozen result of stage fluid-hybrid."""
    mask, manifest, k_max = checkpoint.mask_id, checkpoint.manifest, recipe.fans.k_max
    if mask is None or manifest is None or manifest.method != "fluid":
        raise ConfigError(f"model.parent={parent}: stage fluid-horizon needs a checkpoint of stage fluid-hybrid")
    gated = None if checkpoint.backbone.adapter is None else GatedStage(checkpoint.backbone)
    calibration = HorizonCalibration(checkpoint.model, k_max, recipe.tau, gated)
    checkpoint.manifest = replace(manifest, k_max=k_max, tau=recipe.tau)
    checkpoint.heads = list(calibration.heads)  # type: ignore[arg-type]  # a ModuleList of KHeads
    return StageSetup(checkpoint, calibration, layout_of(recipe, mask, end=mask, noise_ids=range(0)))


def _set_up_adaptation(checkpoint: Checkpoint, recipe: Recipe, parent: str) -> StageSetup:
    """A mask token for the parent, its manifest and layouts, and LoRA if the recipe asks for it."""
    # 1) mask token and end token
    mask_text = recipe.model.mask_token or NEW_MASK
    parent_hash = fingerprint(checkpoint.model)
    mask = checkpoints.add_mask_token(checkpoint.model, checkpoint.tokenizer, mask_text)
    checkpoint = replace(checkpoint, mask_id=mask, backbone=Backbone(checkpoint.model))
    end = checkpoint.tokenizer.eos_token_id
    if recipe.stage != "fluid-hybrid" and end is None:
        raise ConfigError(f"model.parent={parent}: its tokenizer has no end-of-sequence token to fill blocks with")
    # 2) layouts of training rows, and of held-out rows without restored tokens
    special = {*checkpoint.tokenizer.all_special_ids, mask}
    noise_ids = [i for i in range(len(checkpoint.tokenizer)) if i not in special]
    layout = layout_of(recipe, mask, end, noise_ids)
    measured_layout: Layout
    if recipe.is_gated:
        measured_layout = AllMaskLayout(mask, recipe.fans.k_max)
        checkpoint.manifest = Manifest(
            parent, mask_text, recipe.fans.k_max, weights="adapter", gated=True, parent_hash=parent_hash
        )
    elif isinstance(layout, HybridLayout):
        measured_layout = AllMaskLayout(mask, layout.k_max)
        checkpoint.manifest = Manifest(parent, mask_text, layout.k_max)
    elif isinstance(layout, NoisedBlockLayout):
        measured_layout = replace(layout, every=0, by_noise=False, noise_level=1.0)
        checkpoint.manifest = Manifest(parent, mask_text, method="nbdiff", block_length=layout.length)
    elif isinstance(layout, BlockCausalLayout):
        measured_layout = replace(layout, every=0, noise_level=1.0, noise=NoiseSpec())  # a cosine weighs t = 1 with 0
        checkpoint.manifest = Manifest(
            parent, mask_text, method="bd3lm", block_length=layout.length, shift=layout.shift
        )
    else:
        measured_layout = CanvasLayout(mask, end, shift=recipe.canvas.shift, noise_level=1.0)
        method = "mdlm" if recipe.stage == "mdlm" else "llada"
        checkpoint.manifest = Manifest(parent, mask_text, method=method, shift=recipe.canvas.shift)
    # 3) trained parameters: the model's, or an adapter's
    module: nn.Module = checkpoint.model
    if recipe.lora is not None and recipe.lora.gated:
        module = _add_gated_lora(checkpoint, recipe.lora, mask, recipe.loss.target)
    elif recipe.lora is not None:
        module = checkpoint.adapter = _add_lora(checkpoint, recipe.lora, mask)
    return StageSetup(checkpoint, module, layout, measured_layout)


def _add_lora(checkpoint: Checkpoint, spec: LoraSpec, mask: int) -> PeftModel:
    lora = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.targets) or "all-linear",
        trainable_token_indices=[mask] if spec.train_mask else None,
    )
    try:
        return get_peft_model(checkpoint.model, lora)
    except ValueError as error:
        raise ConfigError(f"lora.targets={list(spec.targets)}: {error}") from error


def _add_gated_lora(checkpoint: Checkpoint, spec: LoraSpec, mask: int, target: LossTarget) -> GatedStage:
    """Give the checkpoint a backbone with a gated adapter, and return the stage that trains it."""
    adapter = GatedLora(checkpoint.model, mask, spec.rank, spec.alpha, spec.targets)
    if not any(adapter.maps(layer) for layer in range(len(adapter.layers))):
        raise ConfigError(f"lora.targets={list(spec.targets)}: no linear map of this parent has such a name")
    checkpoint.backbone = Backbone(checkpoint.model, adapter)
    return GatedStage(checkpoint.backbone, target)


def layout_of(recipe: Recipe, mask: int, end: int, noise_ids: Sequence[int]) -> Layout:
    """The layout of a recipe's stage. mask, end: token ids.  noise_ids: tokens that noise is drawn from."""
    fans, blocks, canvas = recipe.fans, recipe.blocks, recipe.canvas
    if recipe.stage == "fluid-horizon" or recipe.is_gated:
        past_end = fans.past_end and not recipe.is_gated
        return AllMaskLayout(mask, fans.k_max, fans.probability, past_end, fans.anchors, fans.depth, fans.drawn)
    if recipe.stage == "fluid-hybrid":
        shape = fans.probability, fans.noise, fans.restore, fans.anchors, fans.depth
        return HybridLayout(mask, fans.k_max, noise_ids, *shape)
    if recipe.stage == "nbdiff":
        return NoisedBlockLayout(mask, end, blocks.length, blocks.first, blocks.every, blocks.by_noise)
    offset = 0.0 if recipe.stage == "llada" else DLLM_OFFSET
    if recipe.stage == "bd3lm":
        growth = blocks.length, blocks.first, blocks.every
        return BlockCausalLayout(mask, end, *growth, shift=blocks.shift, noise=recipe.noise, divisor_offset=offset)
    if recipe.stage in MASKED:
        length = 0 if recipe.fills_batch else canvas.length
        return CanvasLayout(mask, end, length, canvas.shift, noise=recipe.noise, divisor_offset=offset)
    return CausalLayout()


def final_layout(layout: Layout) -> Layout:
    """The layout at the end of a training: blocks at full length."""
    return replace(layout, every=0) if isinstance(layout, NoisedBlockLayout | BlockCausalLayout) else layout


def _check_attention(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Choose FlexAttention on CUDA, dense masks elsewhere. Raises ConfigError if rows exceed the parent's window.

    Training masks attend to the whole row, so a sliding window must hold all of it.
    """
    config = checkpoint.backbone.config
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True) and window < recipe.data.max_length:
        raise ConfigError(f"data.max_length={recipe.data.max_length} exceeds the parent's sliding window of {window}")
    if recipe.data.max_length > checkpoint.backbone.window:
        raise ConfigError(f"data.max_length={recipe.data.max_length}: the parent reads {checkpoint.backbone.window}")
    if torch.cuda.is_available():
        checkpoint.model.set_attn_implementation("flex_attention")


def _parent_name(recipe: Recipe) -> str:
    """The parent in the new checkpoint's manifest: a folder is relative to the new one, so that both can move."""
    parent = str(recipe.model.parent)
    return os.path.relpath(parent, recipe.out) if Path(parent).is_dir() else parent
