"""The blob service: bytes by digest, in a process of its own, under grants that the coordinator signs."""
