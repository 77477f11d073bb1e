"""What every other room stands on: errors, trees of weights, configuration, storage, progress."""
