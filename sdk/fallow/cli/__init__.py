"""The `fallow` command."""
