"""Commands that measure this project against its own claims and its peers: a table, or with --json one object."""
