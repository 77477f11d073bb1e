"""How good it is: bits per byte by domain, the only loss that compares models with different tokenizers."""
