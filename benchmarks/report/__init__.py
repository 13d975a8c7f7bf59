"""The report of the results of before `benchmarks.evidence` used `trial`."""
