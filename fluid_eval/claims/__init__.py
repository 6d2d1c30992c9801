"""Published numbers: the ledger, the conflicts in it, and what reproduces."""
