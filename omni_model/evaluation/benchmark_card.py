"""The card of AudioBench-mini: what its score can and cannot say."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from omni_model.evaluation.benchmark_item import CHANCE, GROUPS, PASS_MARK, Item, pairs_of
from omni_model.evaluation.benchmark_overlap import SENTENCE_WORDS

CARD = "card.md"
ABOUT = {
    "words": "which number, colour or animal is said",
    "speaker": "who speaks in the first or the second of two clips",
    "prosody": "how something is said",
    "quality": "what kind of voice it is",
    "room": "what noise there is, and what room or line the sound came through",
    "events": "what tones, beeps and other events sound like",
    "conflict": "nobody speaks, or a wrong option is true of something else that is heard",
}
TEXT = """# AudioBench-mini

{total} questions about {clips} sound clips, four options each, one of them right. Guessing gives {chance} %.

## What it is

- Closed-set perception: what was said, how and by what voice, and what else is in the air.
- Three splits: training learns, validation decides whatever is decided, and these clips of the test split \
are read once in a run. The items were fixed before training, and so were their sounds.
- No speaker, no sentence of {sentence} words or more and no exact sound of these clips is in training or \
validation; their builder refuses it. Shorter phrases recur: the vocabulary is closed. A sentence may \
return only where training says it with several answers to everything that is asked.
- Each letter is the key equally often in every group; inside a category every answer is the key, and a \
wrong option, about equally often.
- {pairs} pairs of items say the same words, ask the same with the same options and differ in sound alone; \
guessing gets both right in {pair_chance:.1f} % of pairs.
- In {silent} items nothing may be said; the answer "nothing" is right in a quarter of them.
- In {lured} items a wrong option is true of something else that is heard.
- The score asks each item in all four rotations of its options, so a model that likes one letter gets \
{chance} %.
- Passing takes {goal} % and a lead over the best baseline without audio whose 95 % interval lies above zero.

## What it is not

- Not open understanding: the vocabulary is closed, and the same kinds of labels are taught in training, to \
the micro encoder (where that is the ear) as to the listener.
- Not real people or real rooms where the clips were made here: those voices and sounds are synthetic.
- Not always an unheard kind of voice: the one croaking voice is new to the test by its accent alone.
- Not a test of reasoning, or of anything longer than a few seconds.
- Not a part of, and not comparable with, AudioLLMs/AudioBench, MMAU or any other public benchmark.

## What is in it

{contents}

Licences of the clips: {licences}.
"""


def card(items: Sequence[Item]) -> str:
    """The benchmark card in Markdown: headings, paragraphs and flat lists only."""
    lines = []
    for group in GROUPS:
        categories = Counter(item.category for item in items if item.group == group)
        if categories:
            parts = ", ".join(f"{name} {number}" for name, number in categories.items())
            lines.append(f"- {group} ({sum(categories.values())}), {ABOUT[group]}: {parts}")
    silent = [item for item in items if item.group == "conflict" and not item.lure]
    licences = {licence for item in items for licence in item.licence.split(", ")}
    return TEXT.format(
        total=len(items),
        clips=len({key for item in items for key in item.clips}),
        chance=round(100 * CHANCE),
        pair_chance=100 * CHANCE**2,
        goal=round(100 * PASS_MARK),
        sentence=SENTENCE_WORDS,
        pairs=len(pairs_of(items)),
        silent=len(silent),
        lured=sum(bool(item.lure) for item in items),
        contents="\n".join(lines),
        licences=", ".join(sorted(licences)),
    )


def read_card(directory: Path) -> str:
    """The Markdown of a benchmark's payload directory."""
    return (directory / CARD).read_text(encoding="utf-8")
