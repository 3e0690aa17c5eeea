"""Small networks of the recipes."""
