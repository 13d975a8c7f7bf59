"""From the results of `python -m benchmarks.evidence` to their report."""
