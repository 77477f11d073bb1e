"""The vocabulary: the tokenizer, how it grows without taking anything from the old text, and what new rows start
from."""
