"""What is measured: the benchmark, the comparison, compiled programs, other processors."""
