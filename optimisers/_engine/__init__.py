"""The engine: updates leaves, all or none, each by the backend that suits it."""
