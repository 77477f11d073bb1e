"""Many runs as one experiment: one after the other, several at once, as one program, or on a queue."""
