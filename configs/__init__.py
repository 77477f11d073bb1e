"""Recipes: functions that return a Recipe. `cpt run NAME` finds them by their function's name."""
