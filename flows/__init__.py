"""The order of stages, the named recipes, and what is shown of a run."""
