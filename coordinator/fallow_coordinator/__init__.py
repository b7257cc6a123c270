"""The control plane: pure core, journal, services."""
