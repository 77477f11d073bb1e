"""Ways to compute attention, and which one is taken: `attend.attend` is the one entrance."""
