"""The run config: typed sections, the YAML loader, and the docs generated from them."""
