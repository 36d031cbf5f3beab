"""Public sets of sounds whose file names or tables tell what is heard: CREMA-D, RAVDESS, ESC-50.

- CREMA-D (Cao et al. 2014): 91 actors say twelve sentences with six emotions, `1001_DFA_ANG_XX.wav`.
- RAVDESS (Livingstone and Russo 2018): 24 actors say or sing two sentences with eight emotions,
  `03-01-06-01-02-01-12.wav`.
- ESC-50 (Piczak 2015): fifty kinds of events in five folds that share no original, `meta/esc50.csv`.

Splits follow from names alone, so that nobody who is heard in one split is heard in another:

- CREMA-D: of every ten actors in the order of their numbers, the ninth validates and the tenth tests.
- RAVDESS: actors 1 to 18 train, 19 and 20 validate, 21 to 24 test; each split has as many women as men.
- ESC-50: folds 1 to 3 train, 4 validates, 5 tests.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from omni_model.artifacts import PayloadFile
from omni_model.audio.clips import Dropped
from omni_model.audio.folder import Known, Source
from omni_model.config import BadInput

SENTENCES = {
    "IEO": "It's eleven o'clock",
    "TIE": "That is exactly what happened",
    "IOM": "I'm on my way to the meeting",
    "IWW": "I wonder what this is about",
    "TAI": "The airplane is almost full",
    "MTI": "Maybe tomorrow it will be cold",
    "IWL": "I would like a new alarm clock",
    "ITH": "I think I have a doctor's appointment",
    "DFA": "Don't forget a jacket",
    "ITS": "I think I've seen this before",
    "TSI": "The surface is slick",
    "WSI": "We'll stop in a couple of minutes",
}
EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgusted",
    "FEA": "afraid",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
LEVELS = {"LO": "low", "MD": "medium", "HI": "high"}  # XX: the actor was asked for no level
CREMA_D = re.compile(
    r"(10(?:0[1-9]|[1-8]\d|9[01]))"
    rf"_({'|'.join(SENTENCES)})_({'|'.join(EMOTIONS)})_(LO|MD|HI|XX?)\.wav"
)
DEMOGRAPHICS = "VideoDemographics.csv"
VOICES = {"Male": "man", "Female": "woman"}

RAVDESS = re.compile(r"03-(0[12])-(0[1-8])-(0[12])-(0[12])-0[12]-(0[1-9]|1\d|2[0-4])\.wav")
RAVDESS_EMOTIONS = ("neutral", "calm", "happy", "sad", "angry", "afraid", "disgusted", "surprised")
STATEMENTS = ("Kids are talking by the door", "Dogs are sitting by the door")

ESC_50_TABLE = "meta/esc50.csv"
ESC_50_COLUMNS = ("filename", "fold", "category", "esc10")
ESC_50_SPLITS = {"1": "train", "2": "train", "3": "train", "4": "validation", "5": "test"}
# Its categories in the one word by which they are asked for.
EVENTS = {
    "airplane": "airplane",
    "breathing": "breathing",
    "brushing_teeth": "brushing",
    "can_opening": "tin",
    "car_horn": "horn",
    "cat": "cat",
    "chainsaw": "chainsaw",
    "chirping_birds": "birds",
    "church_bells": "bells",
    "clapping": "clapping",
    "clock_alarm": "alarm",
    "clock_tick": "ticking",
    "coughing": "coughing",
    "cow": "cow",
    "crackling_fire": "fire",
    "crickets": "crickets",
    "crow": "crow",
    "crying_baby": "baby",
    "dog": "dog",
    "door_wood_creaks": "creaking",
    "door_wood_knock": "knocking",
    "drinking_sipping": "sipping",
    "engine": "engine",
    "fireworks": "fireworks",
    "footsteps": "footsteps",
    "frog": "frog",
    "glass_breaking": "shattering",
    "hand_saw": "sawing",
    "helicopter": "helicopter",
    "hen": "hen",
    "insects": "insects",
    "keyboard_typing": "typing",
    "laughing": "laughing",
    "mouse_click": "clicking",
    "pig": "pig",
    "pouring_water": "pouring",
    "rain": "rain",
    "rooster": "rooster",
    "sea_waves": "waves",
    "sheep": "sheep",
    "siren": "siren",
    "sneezing": "sneezing",
    "snoring": "snoring",
    "thunderstorm": "thunder",
    "toilet_flush": "toilet",
    "train": "train",
    "vacuum_cleaner": "vacuum",
    "washing_machine": "washer",
    "water_drops": "drops",
    "wind": "wind",
}


@dataclass(frozen=True)
class Found:
    """The recordings of a set, and those that its tables or folders name and that give no clip."""

    sources: list[Source]
    left_out: list[Dropped]


def read_crema_d(folder: Path, files: Sequence[PayloadFile]) -> Found:
    """Emotion, intensity, voice and age, and the sentence; voice and age need VideoDemographics.csv.

    Licence: Open Database License, as the set's LICENSE.txt states.
    """
    people = _crema_d_people(folder, files)
    recordings, left_out = _named(folder, files, CREMA_D, "CREMA-D", "1001_DFA_ANG_XX.wav")
    sources = []
    for file, (actor, sentence, emotion, level) in recordings:
        intensity = {"intensity": LEVELS[level]} if level in LEVELS else {}
        known = Known(
            transcript=SENTENCES[sentence],
            labels={"emotion": EMOTIONS[emotion], **intensity, **people.get(actor, {})},
            speaker=f"crema-d-{actor}",
            split=of_ten(int(actor) - 1001),
            licence="ODbL-1.0",
        )
        sources.append(Source(file.path, file.size, file.sha256, known))
    return Found(sources, left_out)


def read_ravdess(folder: Path, files: Sequence[PayloadFile]) -> Found:
    """Emotion, intensity, voice, whether it is spoken or sung, and the sentence. Licence: CC BY-NC-SA 4.0."""
    recordings, left_out = _named(folder, files, RAVDESS, "RAVDESS", "03-01-06-01-02-01-12.wav")
    sources = []
    for file, (channel, emotion, intensity, statement, actor) in recordings:
        number = int(actor)
        known = Known(
            transcript=STATEMENTS[int(statement) - 1],
            labels={
                "emotion": RAVDESS_EMOTIONS[int(emotion) - 1],
                "intensity": ("normal", "strong")[int(intensity) - 1],
                "delivery": ("spoken", "sung")[int(channel) - 1],
                "voice": "man" if number % 2 else "woman",
            },
            speaker=f"ravdess-{actor}",
            split="train" if number <= 18 else "validation" if number <= 20 else "test",
            licence="CC-BY-NC-SA-4.0",
        )
        sources.append(Source(file.path, file.size, file.sha256, known))
    return Found(sources, left_out)


def read_esc_50(folder: Path, files: Sequence[PayloadFile]) -> Found:
    """The event. Licence: CC BY-NC 3.0, and CC BY for the clips of its part ESC-10, as its README states."""
    there = {file.path: file for file in files}
    table = next((path for path in there if f"/{path}".endswith(f"/{ESC_50_TABLE}")), None)
    if table is None:
        raise BadInput(f"{folder} holds no {ESC_50_TABLE}; give ESC-50 as its author publishes it.")
    root = table.removesuffix(ESC_50_TABLE)
    sources, left_out, seen = [], [], set()
    for where, row in _table(folder / table, ESC_50_COLUMNS):
        path = f"{root}audio/{row['filename']}"
        if row["category"] not in EVENTS or row["fold"] not in ESC_50_SPLITS:
            raise BadInput(
                f"{where} has the category {row['category']!r} and fold {row['fold']!r}; ESC-50 has not."
            )
        if path in seen:
            raise BadInput(f"{where} names {row['filename']} for the second time; keep one row.")
        seen.add(path)
        if path not in there:
            left_out.append(Dropped(path, "missing"))
            continue
        licence = "CC-BY" if row["esc10"] == "True" else "CC-BY-NC-3.0"
        labels = {"event": EVENTS[row["category"]]}
        known = Known(labels=labels, split=ESC_50_SPLITS[row["fold"]], licence=licence)
        sources.append(Source(path, there[path].size, there[path].sha256, known))
    return Found(sources, left_out)


# --- files and tables ----------------------------------------------------------------------------


def of_ten(number: int) -> str:
    """Eight of ten for training, the ninth for validation, the tenth for tests."""
    return (*("train",) * 8, "validation", "test")[number % 10]


def wavs_of(folder: Path, files: Sequence[PayloadFile], name: str, example: str) -> list[PayloadFile]:
    """The recordings of a folder; raises BadInput where there are none."""
    wavs = [file for file in files if PurePosixPath(file.path).suffix.lower() == ".wav"]
    if not wavs:
        raise BadInput(f"{folder} holds no .wav files; give {name} unpacked, with files such as {example}.")
    return wavs


def _named(
    folder: Path, files: Sequence[PayloadFile], pattern: re.Pattern[str], name: str, example: str
) -> tuple[list[tuple[PayloadFile, tuple[str, ...]]], list[Dropped]]:
    """Recordings and what their names say, and the further copies of one: some downloads hold a set twice."""
    found: dict[str, tuple[PayloadFile, tuple[str, ...]]] = {}
    copies = []
    for file in wavs_of(folder, files, name, example):
        file_name = PurePosixPath(file.path).name
        match = pattern.fullmatch(file_name)
        if match is None:
            raise misplaced(folder, file, name, example)
        if file_name in found:
            copies.append(Dropped(file.path, "there twice"))
        else:
            found[file_name] = file, match.groups()
    return list(found.values()), copies


def misplaced(folder: Path, file: PayloadFile, name: str, example: str) -> BadInput:
    """The one sentence for a recording that is not named or placed like those of its set."""
    place = folder / file.path
    return BadInput(
        f"{place} is no file of {name}, which has files such as {example}; choose another layout."
    )


def _table(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Each row of a CSV file with a header, and the words that tell a person where it is."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput(f"{path} is not UTF-8 text; take it from the set anew.") from None
    reader = csv.DictReader(lines)
    lacking = [column for column in columns if column not in (reader.fieldnames or ())]
    if lacking:
        raise BadInput(f"{path} lacks the column {lacking[0]}; take it from the set anew.")
    for row in reader:
        if any(row[column] is None for column in columns):
            raise BadInput(f"{path}, line {reader.line_num}, breaks off; take it from the set anew.")
        yield f"{path}, line {reader.line_num},", row


def _crema_d_people(folder: Path, files: Sequence[PayloadFile]) -> dict[str, dict[str, str]]:
    """Actor -> voice and age band; empty where the table is not there."""
    path = next((file.path for file in files if PurePosixPath(file.path).name == DEMOGRAPHICS), None)
    people: dict[str, dict[str, str]] = {}
    for where, row in _table(folder / path, ("ActorID", "Age", "Sex")) if path else ():
        if row["Sex"] not in VOICES or not row["Age"].isdigit():
            raise BadInput(
                f"{where} has the sex {row['Sex']!r} and age {row['Age']!r}; take it from CREMA-D anew."
            )
        people[row["ActorID"]] = {"voice": VOICES[row["Sex"]], "age": f"{int(row['Age']) // 10 * 10}s"}
    return people
