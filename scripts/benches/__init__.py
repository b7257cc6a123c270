"""Benchmarks of the whole system: real processes on loopback over mTLS, real rows, and a peer in the same run."""
