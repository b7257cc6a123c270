"""The sandboxed child that runs foreign programs on rows, and the narrow contract by which it is spawned and fed."""
