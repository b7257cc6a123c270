"""The pure part of the worker: what to do next, given what it holds."""
