"""Batch generation for any decoder: continuous batching, prefix sharing, end rules, counted forwards."""
