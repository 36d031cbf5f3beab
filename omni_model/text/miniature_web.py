"""Web text in miniature: the files that ClimbMix has, with stories and with words that nobody knows.

A grammar knows some hundreds of words, from which a tokenizer learns no more than a few thousand merges. The
web has words without end, and so has this: syllables drawn at random. What is read here has the shape of the
real thing and teaches nothing.
"""

import itertools

import numpy as np

from omni_model.config import JSON, MiniatureWebRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.text.corpus import SPLITS, TEXT, write_shard
from omni_model.text.stories import random_story

ONSETS = ("b", "ch", "d", "dr", "f", "fl", "g", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t")
VOWELS = ("a", "ai", "e", "ea", "i", "o", "oo", "ou", "u", "y")
CODAS = ("", "ck", "l", "m", "n", "nd", "r", "rt", "s", "t")
SYLLABLES = tuple(map("".join, itertools.product(ONSETS, VOWELS, CODAS)))
MAX_SYLLABLES = 4
SENTENCE_WORDS = 10


def write_web_text(recipe: MiniatureWebRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: parquet files with a column `text`. Document i of a split depends on (seed, split, i) alone."""
    counts = dict(zip(SPLITS, (recipe.num_documents, recipe.validation_documents), strict=True))
    for number, (split, count) in enumerate(counts.items()):
        rngs = (np.random.default_rng([work.seed, number, index]) for index in range(count))
        texts = [write_page(recipe.strange_words, rng) for rng in rngs]
        write_shard(work.out / f"{split}-00000.parquet", {TEXT: texts})
        work.metrics.log(number + 1, len(counts))
    num_bytes = sum(path.stat().st_size for path in work.out.iterdir())
    work.metrics.summary(num_documents=sum(counts.values()), megabytes=round(num_bytes / 1e6, 2))
    return {"num_documents": sum(counts.values()), "num_bytes": num_bytes}


def write_page(num_words: int, rng: np.random.Generator) -> str:
    """A story, and behind it so many strange words in sentences."""
    words = strange_words(num_words, rng)
    sentences = [words[first : first + SENTENCE_WORDS] for first in range(0, num_words, SENTENCE_WORDS)]
    told = (f"{' '.join(each).capitalize()}." for each in sentences)
    return "\n\n".join([random_story(rng).text, " ".join(told)])


def strange_words(count: int, rng: np.random.Generator) -> list[str]:
    """Words of two to four syllables, each one of about 10^13."""
    lengths = rng.integers(2, MAX_SYLLABLES + 1, count)
    syllables = iter(rng.integers(len(SYLLABLES), size=lengths.sum()))
    return ["".join(SYLLABLES[next(syllables)] for _ in range(length)) for length in lengths]
