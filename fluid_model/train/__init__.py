"""How checkpoints are made: a recipe, its data, its stage, on transformers' Trainer."""
