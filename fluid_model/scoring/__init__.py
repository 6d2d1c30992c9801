"""Log-likelihoods: exact where causal, Monte-Carlo where bidirectional."""
