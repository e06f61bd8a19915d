"""Tests of osd_jax only."""
