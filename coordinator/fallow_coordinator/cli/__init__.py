"""What `fallow-coordinator` does on the command line."""
