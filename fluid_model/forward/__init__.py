"""The model's forward: backbone, attention masks, KV cache, explicit Llama, compiled code, CUDA graphs, K-head."""
