"""What is special to osd_jax."""
