"""The decoder: Flax NNX modules that declare each weight once, and pure functions over trees of weights.

Axis letters: B batch, S sequence, K key positions, D embed, V vocabulary, H query heads, G key/value heads, R query
heads a group, F feed-forward width.
"""
