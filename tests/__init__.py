"""The test suite: truth, not mocks."""
