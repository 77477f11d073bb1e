"""The heart: a pure step, and the loop around it."""
