"""A small GPT that hears: model, sound, text, training, judging and serving."""
