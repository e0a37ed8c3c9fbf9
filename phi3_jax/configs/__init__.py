"""The YAML configs that ship with the package."""
