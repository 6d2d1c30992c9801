"""What finished runs say: comparisons, losslessness, acceptance, the K-head, traces."""
