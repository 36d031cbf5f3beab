"""AudioBench-mini: multiple-choice questions about sounds, made so that guessing without ears gains nothing.

Public benchmarks of this kind can be beaten unheard: in one of them the first option is right in 39.5 % of
items, where chance is 25 %. Here letters and answers are balanced, clips come from the test split, whose
speakers, sentences and sounds no training saw, and items that differ in sound alone stand in pairs. The items
have a seed of their own and are fixed before training, sounds and all.
"""

from collections import Counter
from dataclasses import asdict

from omni_model.artifacts import AudioCorpus, canonical_json, sha256_file
from omni_model.audio.corpora import read_clips
from omni_model.config import JSON, BenchmarkRecipe, Runtime
from omni_model.evaluation.benchmark_audio import AUDIO, write_audio
from omni_model.evaluation.benchmark_card import CARD, card
from omni_model.evaluation.benchmark_choice import held_out
from omni_model.evaluation.benchmark_groups import write_items
from omni_model.evaluation.benchmark_item import ITEMS, pairs_of
from omni_model.evaluation.benchmark_overlap import refuse_overlap
from omni_model.storage import Workspace
from omni_model.text.questions import LETTERS


def build_benchmark(
    recipe: BenchmarkRecipe, *corpora: AudioCorpus, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: `items.jsonl`, `clips.tar` and `card.md` from the test clips of any number of corpora.

    Uses the recipe's own seed.

    Raises:
        BadInput: the test split shares a speaker, a sentence or a sound with the others; a group's size is no
            multiple of four, or the test clips cannot fill it evenly; a clip's sound is missing.
    """
    clips = [read_clips(corpus) for corpus in corpora]
    refuse_overlap(clips)
    items = write_items(recipe, held_out(clips))
    lines = [canonical_json(asdict(item)) for item in items]
    path = work.out / ITEMS
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_audio(items, corpora, work.out / AUDIO)
    (work.out / CARD).write_text(card(items), encoding="utf-8")
    letters = Counter(LETTERS[item.answer] for item in items)
    work.metrics.summary(
        num_items=len(items),
        num_clips=len({key for item in items for key in item.clips}),
        num_pairs=len(pairs_of(items)),
        **{f"key_{letter}": letters[letter] for letter in LETTERS},
    )
    return {"num_items": len(items), "items_sha256": sha256_file(path)}
