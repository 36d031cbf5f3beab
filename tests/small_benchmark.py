"""Metadata of corpora as the generators plan them, without a sound: what a benchmark is made of."""

from collections.abc import Sequence
from typing import Any

from omni_model.audio import speech, texture
from omni_model.audio.clips import SPLITS, ClipPlan, clip_rng
from omni_model.audio.texture import NOISE_TILT
from omni_model.config import BenchmarkRecipe, SpeechRecipe, SplitSizes, TextureRecipe
from omni_model.evaluation.benchmark_choice import held_out
from omni_model.evaluation.benchmark_groups import write_items
from omni_model.evaluation.benchmark_item import Item

CONDITIONS = ("clean", "noisy", "echoing", "telephone", "distorted")
Clip = dict[str, Any]


def metadata(plan: ClipPlan, **more: str) -> Clip:
    """What a corpus would hold of a planned clip, with more labels."""
    return {
        "key": plan.key,
        "split": plan.split,
        "labels": {**plan.labels, **more},
        "transcript": plan.transcript,
        "speaker": plan.speaker,
        "licence": plan.licence,
        "provenance": {"generator": "test", **plan.parameters},
    }


def sounds(test: int = 240) -> list[Clip]:
    """Tones, noises, beeps and silence."""
    recipe = TextureRecipe(clips=SplitSizes(120, 40, test))
    return [metadata(plan) for split in SPLITS for plan in texture.plan_split(recipe, split, 3)]


def phrases(test: int = 240, seed: int = 3) -> list[ClipPlan]:
    recipe = SpeechRecipe(clips=SplitSizes(120, 40, test))
    return [plan for split in SPLITS for plan in speech.plan_split(recipe, split, seed)]


def recorded(plans: Sequence[ClipPlan], noisy: bool = True) -> list[Clip]:
    """Two of five spoken clips under a recording condition, some of them noisy."""
    conditions = [name for name in CONDITIONS if noisy or name != "noisy"]
    clips = []
    for number, plan in enumerate(plans):
        rng = clip_rng(1, plan.key)
        more: dict[str, str] = {}
        if number % 5 < 2:
            more["recording"] = conditions[int(rng.integers(len(conditions)))]
        if more.get("recording") == "noisy":
            more["noise"] = str(rng.choice(list(NOISE_TILT)))
        clips.append(metadata(plan, **more))
    return clips


def corpora() -> list[list[Clip]]:
    """As the demo has them: sounds, and speech of which some is recorded otherwise."""
    return [sounds(), recorded(phrases())]


def items_of(*clips: list[Clip], **sizes: int) -> list[Item]:
    """The items of a benchmark of these corpora."""
    return write_items(BenchmarkRecipe(**sizes), held_out(clips))


NONE = dict.fromkeys(("words", "speaker", "prosody", "quality", "room", "events", "conflict"), 0)
