"""Experiments: recipes, the strategies that they compare, and what runs them."""
