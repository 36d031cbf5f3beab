"""Answering with a trained model: the engine that generates, and the calculator it may use."""
