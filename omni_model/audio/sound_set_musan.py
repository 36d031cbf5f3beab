"""MUSAN: hours of music, speech and noise, for whoever must tell one from the others.

Snyder, Chen and Povey 2015, "MUSAN: A Music, Speech, and Noise Corpus"; openslr.org/17. Files lie in
`KIND/SOURCE/*.wav`. Beside those of each source, `ANNOTATIONS` has a line a file (`music-fma-0000 GENRES Y|N
MUSICIAN`, `speech-librivox-0000 m|f LANGUAGE`), and `LICENSE` paragraphs that name files, or one for all.

A tenth of the musicians, and of the files of speech and noise, is for validation and a tenth for tests; the
hash of a name decides. All pieces of a long recording are of its split.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from omni_model.artifacts import PayloadFile, sha256_text
from omni_model.audio.folder import Known, Source
from omni_model.audio.sound_set_layouts import Found, misplaced, of_ten, wavs_of

EXAMPLE = "music/fma/music-fma-0000.wav"
VOICES = {"m": "man", "f": "woman"}
KINDS = ("music", "speech", "noise")
NAME = re.compile(rf"\b(?:{'|'.join(KINDS)})-[a-z-]+-\d+\b")
WHOLE_LICENCE = "CC-BY-4.0"  # as openslr.org/17 states: for a source that came without its LICENSE
NOT_STATED = "unknown"


def read_musan(folder: Path, files: Sequence[PayloadFile]) -> Found:
    """What fills the clip; of music its genre and whether anybody sings, of speech voice and language.

    Licences are those of each file's paragraph in its source's LICENSE; "unknown" where none names it.
    """
    there = {file.path for file in files}
    notes: dict[str, tuple[Mapping[str, list[str]], Callable[[str], str]]] = {}
    sources = []
    for file in wavs_of(folder, files, "MUSAN", EXAMPLE):
        path = PurePosixPath(file.path)
        place = str(path.parent)
        if len(path.parts) < 3 or path.parts[-3] not in KINDS:
            raise misplaced(folder, file, "MUSAN", EXAMPLE)
        if place not in notes:
            notes[place] = _notes(folder, place, there)
        annotations, licence = notes[place]
        kind, told = path.parts[-3], annotations.get(path.stem, [])
        labels, performer = {"background": kind}, path.stem
        if kind == "music" and len(told) >= 3:
            labels |= {"genre": told[0], "singing": "yes" if told[1] == "Y" else "no"}
            performer = told[2]
        elif kind == "speech" and told:
            labels |= {"voice": VOICES[told[0]]} if told[0] in VOICES else {}
            labels |= {"language": told[1]} if len(told) > 1 else {}
        known = Known(
            labels=labels,
            speaker=f"musan-{path.stem}" if kind == "speech" else "",
            split=of_ten(int(sha256_text(performer)[:8], 16)),
            licence=licence(path.stem),
        )
        sources.append(Source(file.path, file.size, file.sha256, known))
    return Found(sources, [])


def _notes(folder: Path, place: str, there: set[str]) -> tuple[Mapping[str, list[str]], Callable[[str], str]]:
    """What one source tells: name of a file -> what is known of it, and -> its licence."""
    texts = {
        name: (folder / place / name).read_text(encoding="utf-8", errors="replace")
        for name in ("ANNOTATIONS", "LICENSE")
        if f"{place}/{name}" in there
    }
    rows = [line.split() for line in texts.get("ANNOTATIONS", "").splitlines() if line.strip()]
    licence = _licences(texts["LICENSE"]) if "LICENSE" in texts else (lambda _: WHOLE_LICENCE)
    return {row[0]: row[1:] for row in rows}, licence


def _licences(text: str) -> Callable[[str], str]:
    """Name -> licence. Lines of `=` part paragraphs that name files; a text that names none is for all."""
    stated: dict[str, str] = {}
    for paragraph in re.split(r"(?m)^=+\s*$", text):
        for name in NAME.findall(paragraph):
            stated.setdefault(name, licence_in(paragraph))
    whole = NOT_STATED if stated else licence_in(text)
    return lambda name: stated.get(name, whole)


def licence_in(statement: str) -> str:
    """The identifier of the licence that a sentence in English, or an address, names.

    >>> licence_in("Creative Commons Attribution-NonCommercial 3.0")
    'CC-BY-NC-3.0'
    """
    text = statement.lower()
    if re.search(r"\bcc[ -]?by\b|licenses/by\b|attribution", text):
        terms = {"NC": r"non-?commercial|\bnc\b", "SA": r"share-? ?alike|\bsa\b", "ND": r"no-? ?deriv|\bnd\b"}
        version = re.search(r"\b[1-4]\.\d\b", text)
        named = [term for term, words in terms.items() if re.search(words, text)]
        return "-".join(["CC", "BY", *named, *([version[0]] if version else [])])
    if re.search(r"\bcc-?0\b|publicdomain/zero", text):
        return "CC0-1.0"
    return "public-domain" if "public domain" in text else NOT_STATED
