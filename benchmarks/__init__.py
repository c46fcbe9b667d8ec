"""Benchmarks: how far each hot path is from what the hardware allows. `make bench` or `python -m benchmarks`."""
