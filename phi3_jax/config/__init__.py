"""The config of a run: typed sections, the YAML loader, the docs generated from them."""
