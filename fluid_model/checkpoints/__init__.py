"""Checkpoint folders: load, save, hub ids, published layouts, SentencePiece, fluid.json."""
