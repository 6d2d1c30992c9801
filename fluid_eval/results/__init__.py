"""What a run leaves behind: the run folder, its metrics, its health gates."""
