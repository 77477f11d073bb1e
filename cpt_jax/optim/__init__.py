"""How it trains: learning-rate schedules, the optimizer, the moving average of the weights."""
