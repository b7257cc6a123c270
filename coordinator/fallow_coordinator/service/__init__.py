"""The coordinator's face: gRPC services over the engine. Protobuf comes in here and goes no further."""
