"""What would make a test too easy: people, sentences and sounds that training has met.

- A speaker belongs to one side alone.
- A sentence is a transcript of three words or more; shorter ones recur in a closed vocabulary, as single
  words must. It may return only where training has said it with two or more answers to everything that the
  test clip can be asked, as actors do who say one sentence in every mood: then its words tell nothing.
- A sound is a file by its bytes, the parameters that a clip was made with, or those of the noise, room or
  line that was added to it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from omni_model.artifacts import canonical_json
from omni_model.config import BadInput
from omni_model.text.questions import askable

Clip = Mapping[str, Any]
SENTENCE_WORDS = 3
NAMED = 3  # of each kind of overlap


def refuse_overlap(corpora: Iterable[Sequence[Clip]]) -> None:
    """Refuse test clips that share a speaker, a sentence or a sound with training or validation.

    Raises:
        BadInput: naming the first few of each kind, and how many there are; or a key that two corpora have.
    """
    clips = [clip for corpus in corpora for clip in corpus]
    _refuse_equal_keys(clips)
    known = [clip for clip in clips if clip["split"] != "test"]
    tested = [clip for clip in clips if clip["split"] == "test"]
    speakers = {clip["speaker"] for clip in known} - {""}
    found = [
        _told("speaker", [clip["speaker"] for clip in tested if clip["speaker"] in speakers]),
        _told("sentence", [repr(clip["transcript"]) for clip in _known_sentences(tested, known)]),
        _told("sound", _known_sounds(tested, known)),
    ]
    if overlaps := [each for each in found if each]:
        raise BadInput(
            f"the test split shares {' and '.join(overlaps)} with training or validation; leave each in one "
            "split alone"
        )


def _refuse_equal_keys(clips: Sequence[Clip]) -> None:
    seen: set[str] = set()
    for clip in clips:
        if clip["key"] in seen:
            raise BadInput(
                f"the clip key {clip['key']} is used in two corpora; give one of them keys of its own"
            )
        seen.add(clip["key"])


def _told(what: str, names: Sequence[str]) -> str:
    """`2 speakers (anna, bert)`, or nothing where there is none."""
    different = sorted(set(names))
    more = ", ..." if len(different) > NAMED else ""
    plural = "" if len(different) == 1 else "s"
    return f"{len(different)} {what}{plural} ({', '.join(different[:NAMED])}{more})" if different else ""


def sentence_of(clip: Clip) -> str:
    """The transcript in lower case without punctuation, if it is a sentence; else an empty text."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", clip["transcript"].lower())
    return " ".join(words) if len(words) >= SENTENCE_WORDS else ""


def _known_sentences(tested: Sequence[Clip], known: Sequence[Clip]) -> list[Clip]:
    """Test clips whose sentence training has, and which it might give away."""
    said: dict[str, list[Mapping[str, str]]] = {}
    for clip in known:
        if sentence := sentence_of(clip):
            said.setdefault(sentence, []).append(clip["labels"])

    def gives_away(clip: Clip) -> bool:
        before = said.get(sentence_of(clip), [])
        answers = [{labels.get(name) for labels in before} - {None} for name in askable(clip["labels"])]
        return bool(before) and not (answers and all(len(each) > 1 for each in answers))

    return [clip for clip in tested if gives_away(clip)]


def _known_sounds(tested: Sequence[Clip], known: Sequence[Clip]) -> list[str]:
    """`test key as training key` of clips that have a file or exact parameters in common."""
    sounds = {sound: clip["key"] for clip in known for sound in _sounds_of(clip)}
    return [
        f"{clip['key']} as {sounds[sound]}"
        for clip in tested
        for sound in _sounds_of(clip)
        if sound in sounds
    ]


def _sounds_of(clip: Clip) -> list[str]:
    """Everything exact that is known of how the clip came about."""
    made = {name: value for name, value in clip["provenance"].items() if name != "generator"}
    added = {name: value for name, value in made.pop("augmentation", {}).items() if name != "seed"}
    sounds = [canonical_json(made.get("file_sha256", made))] if made else []
    return sounds + ([canonical_json(added)] if len(added) > 1 else [])  # a name alone is no sound
