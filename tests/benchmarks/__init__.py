"""Measures ratios, never times: ours and the other in turn, in one process, as pairs. `make bench` runs it."""
