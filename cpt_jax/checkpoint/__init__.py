"""Weights on disk: Hugging Face directories and GGUF files in, Hugging Face directories out, and the train state
(orbax)."""
