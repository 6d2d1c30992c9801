"""Training of checkpoints: a recipe, its data and its stage, on transformers' Trainer."""
