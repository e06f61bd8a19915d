"""The algorithm: against the float64 oracle, and JAX against PyTorch."""
