"""The engine: updates leaves, all or none, each by the first backend that takes it."""
