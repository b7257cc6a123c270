"""The compute plane: daemon, executors, sandboxed engine."""
