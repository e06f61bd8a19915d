"""Online Subspace Descent in your own code: each file stands alone and can be copied."""
