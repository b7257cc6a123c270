"""Domain values to protobuf and back. Generated classes stop here and in the services."""
