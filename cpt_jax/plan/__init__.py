"""What a recipe's train step takes on hardware that is not here: compiled ahead of time, read from the compiled program."""
