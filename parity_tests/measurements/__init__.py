"""The measurements: the benchmark, the comparison, compiled programs, other processors."""
