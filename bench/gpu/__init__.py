"""One device, one table: `python -m bench.gpu`."""
