"""Recipes of what somebody else made, named by its bytes. Where it lies is never identity."""

from dataclasses import dataclass

from omni_model.config.base import Recipe, unkeyed


@dataclass(frozen=True)
class OutsideFile(Recipe):
    """A file that somebody else made. Its bytes are identity; where they lie is not."""

    sha256: str = ""
    path: str = unkeyed("")


@dataclass(frozen=True)
class OutsideFolder(Recipe):
    """A folder that somebody else filled. `digest` is over the sorted (path, size, sha256) of its files.

    It may be left empty in a recipe: it is filled in before the plan, from what lies there now.
    """

    digest: str = ""
    path: str = unkeyed("")


@dataclass(frozen=True)
class TokenizerImportRecipe(Recipe):
    """nanochat's `tokenizer.pkl`."""

    pickle: OutsideFile = OutsideFile()


@dataclass(frozen=True)
class GptImportRecipe(Recipe):
    """nanochat's `model_NNNNNN.pt` and `meta_NNNNNN.json`; the step is the number in their names."""

    may_be_zero = (*Recipe.may_be_zero, "step")

    model: OutsideFile = OutsideFile()
    meta: OutsideFile = OutsideFile()
    step: int = 0
