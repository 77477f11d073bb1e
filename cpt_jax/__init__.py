"""Continued pre-training of language models in JAX."""
