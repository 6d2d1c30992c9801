"""Slots, cache and the loop: how any decoder's forwards are run and counted."""
