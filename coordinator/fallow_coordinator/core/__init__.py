"""The pure core: decisions are functions of (state, command, now, entropy)."""
