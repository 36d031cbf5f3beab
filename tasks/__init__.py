"""One declared task per stage, what identifies it, and how it is planned and run."""
