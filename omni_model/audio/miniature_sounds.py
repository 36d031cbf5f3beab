"""Sets of recordings in miniature, laid out as the makers of the real ones lay them out.

LibriSpeech comes as openslr's tar and as Hugging Face's parquet files, the public sets of sounds as the
folders that their archives unpack to, questions in AudioBench's form as JSON and as parquet, and one folder
is like anybody's. People are espeak-ng's voices, everything else is noise. So every reader that will meet the
real files can be run without a network.
"""

import csv
import functools
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omni_model.audio.clips import ClipPlan, clip_rng
from omni_model.audio.librispeech_files import SPEAKERS
from omni_model.audio.sound_set_layouts import (
    DEMOGRAPHICS,
    ESC_50_COLUMNS,
    ESC_50_TABLE,
    SENTENCES,
    STATEMENTS,
)
from omni_model.audio.speech import VARIANTS, Helper
from omni_model.audio.waveform import SAMPLE_RATE_HZ
from omni_model.config import JSON, MiniatureSoundsRecipe, Runtime
from omni_model.storage import Workspace

LIBRISPEECH = "librispeech"
PARTS = {"train-clean-100": ("train", 4), "dev-clean": ("validation", 2), "test-clean": ("test", 2)}
SEXES = ("woman", "man")
SPLITS = ("train", "validation", "test")
ACCENT = "gmw/en-US"
LEVEL = 0.1  # root mean square of what is no speech


@dataclass(frozen=True)
class Studio:
    """Where recordings are made: who speaks, and everything random by the name of a recording."""

    helper: Helper
    seed: int
    recipe: MiniatureSoundsRecipe

    def say(self, name: str, text: str, *, woman: bool, person: int, pitch: int = 50) -> np.ndarray:
        """What a person says: samples (N,) float32 at 16 kHz."""
        variants = VARIANTS[SEXES[not woman]]["train"]
        parameters = {
            "text": text,
            "voice": ACCENT,
            "variant": variants[person % len(variants)],
            "rate_wpm": 170,
            "pitch": pitch,
            "range": 50,
            "volume": 100,
        }
        samples, _ = self.helper.speak(ClipPlan(name, "train", {}, parameters), self.seed)
        return samples

    def make_noise(self, name: str, duration_s: float, rate_hz: int) -> np.ndarray:
        """A tone in noise, (N,) float32: no two are alike."""
        rng = clip_rng(self.seed, name)
        time_s = np.arange(round(duration_s * rate_hz)) / rate_hz
        tone = np.sin(2 * np.pi * rng.uniform(150, 3000) * time_s)
        sound = tone * rng.uniform(0.3, 1) + rng.standard_normal(len(time_s)) * rng.uniform(0.1, 1)
        level = float(np.sqrt(np.mean(sound**2)))
        return (sound * LEVEL / level).astype(np.float32)


def write_sounds(recipe: MiniatureSoundsRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: a folder for each set; returns the facts of SoundFiles.

    Raises:
        BadInput: espeak-ng is not installed.
    """
    with Helper() as helper:
        studio = Studio(helper, work.seed, recipe)
        for number, (name, write) in enumerate(SETS.items()):
            write(work.out / name, studio)
            work.metrics.log(number + 1, len(SETS))
    count = sum(1 for path in work.out.rglob("*") if path.is_file())
    num_bytes = sum(path.stat().st_size for path in work.out.rglob("*") if path.is_file())
    work.metrics.summary(files=count, megabytes=round(num_bytes / 1e6, 2))
    return {"num_sets": len(SETS), "num_files": count}


def sound_file(samples: np.ndarray, rate_hz: int, form: str) -> bytes:
    """A recording as the bytes of a 16-bit WAV or FLAC, or of an MP3 file."""
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format=form, subtype=None if form == "MP3" else "PCM_16")
    return buffer.getvalue()


def _put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


@functools.cache
def _spoken() -> dict[str, list[str]]:
    """Sentences for each split, none of them in two."""
    path = Path(__file__).with_name("spoken_sentences.json")
    found: dict[str, list[str]] = json.loads(path.read_text(encoding="utf-8"))
    return found


# --- LibriSpeech -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Read:
    """An utterance: `speaker-chapter-number`, in capital letters what is read, and its FLAC file."""

    name: str
    text: str
    flac: bytes


def _librispeech(folder: Path, studio: Studio) -> None:
    """Every part as a tar and as parquet files; women have even numbers."""
    speaker, rows = 100, []
    for part, (split, num_speakers) in PARTS.items():
        utterances: list[Read] = []
        for _ in range(num_speakers):
            speaker += 1
            rows.append(f"{speaker:<5}| {'MF'[speaker % 2 == 0]} | {part:<17}| 1.00  | Reader {speaker}")
            utterances += _chapter(speaker, split, studio)
        table = "; ID  |SEX| SUBSET           |MINUTES| NAME\n" + "\n".join(rows) + "\n"
        _put(folder / f"{part}.tar.gz", _tar(part, utterances, table))
        _put(folder / part / SPEAKERS, table)
        _write_librispeech_parquet(folder / part / f"{split}-00000-of-00001.parquet", utterances)


def _chapter(speaker: int, split: str, studio: Studio) -> list[Read]:
    found = []
    for number in range(studio.recipe.utterances):
        name = f"{speaker}-{speaker * 100 + 1}-{number:04d}"
        rng = clip_rng(studio.seed, name)
        count = rng.integers(1, studio.recipe.max_sentences + 1)
        text = " ".join(str(each) for each in rng.choice(_spoken()[split], count, replace=False))
        samples = studio.say(name, text, woman=speaker % 2 == 0, person=speaker // 2)
        words = "".join(letter for letter in text.upper() if letter.isalpha() or letter in " '")
        found.append(Read(name, words, sound_file(samples, SAMPLE_RATE_HZ, "FLAC")))
    return found


def _tar(part: str, utterances: Sequence[Read], speakers: str) -> bytes:
    """openslr's archive: the table of speakers, then chapter by chapter the recordings and their words."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        _add(tar, f"LibriSpeech/{SPEAKERS}", speakers.encode())
        for chapter in dict.fromkeys(each.name.rpartition("-")[0] for each in utterances):
            own = [each for each in utterances if each.name.startswith(f"{chapter}-")]
            inside = f"LibriSpeech/{part}/{chapter.replace('-', '/')}"
            for each in own:
                _add(tar, f"{inside}/{each.name}.flac", each.flac)
            lines = "".join(f"{each.name} {each.text}\n" for each in own)
            _add(tar, f"{inside}/{chapter}.trans.txt", lines.encode())
    return gzip.compress(buffer.getvalue(), mtime=0)  # no clock: the same bytes every time


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _write_librispeech_parquet(path: Path, utterances: Sequence[Read]) -> None:
    rows = []
    for each in utterances:
        speaker, chapter, _ = each.name.split("-")
        audio = {"bytes": each.flac, "path": f"{each.name}.flac"}
        about = {"speaker_id": int(speaker), "chapter_id": int(chapter), "id": each.name}
        rows.append({"file": f"{each.name}.flac", "audio": audio, "text": each.text, **about})
    _write_parquet(path, rows)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


# --- sets of sounds --------------------------------------------------------------------------------


def _crema_d(folder: Path, studio: Studio) -> None:
    """Four actors, the ninth of ten validates and the tenth tests; everybody says the same."""
    people = {1001: (51, "Male"), 1002: (21, "Female"), 1009: (24, "Female"), 1010: (43, "Male")}
    emotions = ("ANG", "HAP", "NEU", "SAD", "FEA", "DIS")[: studio.recipe.emotions]
    rows = [[actor, age, sex, "Unknown", "Unknown"] for actor, (age, sex) in people.items()]
    _put(folder / DEMOGRAPHICS, _csv(("ActorID", "Age", "Sex", "Race", "Ethnicity"), rows))
    for actor, (_, sex) in people.items():
        for sentence in list(SENTENCES)[: studio.recipe.takes]:
            for number, emotion in enumerate(emotions):
                name = f"{actor}_{sentence}_{emotion}_{('LO', 'HI')[(actor + number) % 2]}"
                spoken = studio.say(
                    name, SENTENCES[sentence], woman=sex == "Female", person=actor, pitch=30 + 12 * number
                )
                _put(folder / "AudioWAV" / f"{name}.wav", sound_file(spoken, SAMPLE_RATE_HZ, "WAV"))


def _ravdess(folder: Path, studio: Studio) -> None:
    """Two actors to learn from, one to validate and one to test; everybody says and sings the same."""
    for actor in (1, 2, 19, 22):
        for take in range(2 * studio.recipe.takes):
            channel, emotion = 1 + (actor + take) % 2, 3 + take % 4
            name = f"03-{channel:02d}-{emotion:02d}-{1 + take % 2:02d}-01-01-{actor:02d}"
            spoken = studio.say(
                name, STATEMENTS[0], woman=actor % 2 == 0, person=actor, pitch=40 + 15 * (take % 3)
            )
            place = folder / f"Actor_{actor:02d}" / f"{name}.wav"
            _put(place, sound_file(spoken, SAMPLE_RATE_HZ, "WAV"))


def _esc_50(folder: Path, studio: Studio) -> None:
    """Some kinds of events in each of the five folds, five seconds at 44.1 kHz."""
    rows = []
    for fold in range(1, 6):
        for take in range(studio.recipe.takes):
            category, target = (("dog", 0), ("rain", 10), ("crying_baby", 20), ("door_wood_knock", 30))[
                (fold + take) % 4
            ]
            name = f"{fold}-{100000 + take}-A-{target}.wav"
            noise = studio.make_noise(f"esc-50/{name}", 5.0, 44_100)
            _put(folder / "audio" / name, sound_file(noise, 44_100, "WAV"))
            rows.append([name, fold, category, str(target in (0, 10, 20))])
    _put(folder / ESC_50_TABLE, _csv(ESC_50_COLUMNS, rows))


def _musan(folder: Path, studio: Studio) -> None:
    """Music, speech and noise of one source each, with its annotations and its licence."""
    sources = {
        "music": ("fma", "music-fma", "classical Y The_Quartet"),
        "speech": ("librivox", "speech-librivox", "f english"),
        "noise": ("free-sound", "noise-free-sound", ""),
    }
    for kind, (source, stem, told) in sources.items():
        names = [f"{stem}-{number:04d}" for number in range(4 * studio.recipe.takes)]
        for number, name in enumerate(names):
            if kind == "speech":
                text = _spoken()["train"][number % len(_spoken()["train"])]
                samples = studio.say(name, text, woman=True, person=number)
            else:
                samples = studio.make_noise(f"musan/{name}", 3.0, SAMPLE_RATE_HZ)
            _put(folder / kind / source / f"{name}.wav", sound_file(samples, SAMPLE_RATE_HZ, "WAV"))
        if told:
            _put(folder / kind / source / "ANNOTATIONS", "".join(f"{name} {told}\n" for name in names))
        _put(folder / kind / source / "LICENSE", "All of these files are in the public domain.\n")


# --- questions, and a folder like anybody's --------------------------------------------------------


def _asked(split: str, number: int, studio: Studio) -> tuple[bytes, str, str]:
    """A recording as the bytes of a WAV file, a question about it and the answer."""
    text = _spoken()[split][number % len(_spoken()[split])]
    samples = studio.say(f"asked/{split}/{number}", text, woman=number % 2 == 0, person=number)
    question = ("What does the person say?", "Does a woman or a man speak?")[number // 2 % 2]
    answer = text if number // 2 % 2 == 0 else SEXES[number % 2]
    return sound_file(samples, SAMPLE_RATE_HZ, "WAV"), question, answer


def _audiobench_json(folder: Path, studio: Studio) -> None:
    """A list for each split, and the recordings in a folder of their own."""
    for split in SPLITS:
        rows = []
        for number in range(2 * studio.recipe.takes):
            sound, question, answer = _asked(split, number, studio)
            _put(folder / "audio" / f"{split}-{number}.wav", sound)
            rows.append({"audio_path": f"audio/{split}-{number}.wav", "question": question, "answer": answer})
        _put(folder / f"{split}.json", json.dumps(rows, indent=1) + "\n")


def _audiobench_parquet(folder: Path, studio: Studio) -> None:
    """A file for each split, whose rows hold the bytes of their recordings."""
    for split in SPLITS:
        rows = []
        for number in range(2 * studio.recipe.takes):
            sound, question, answer = _asked(split, number + 2 * studio.recipe.takes, studio)
            audio = {"bytes": sound, "path": f"{split}-{number}.wav"}
            rows.append({"context": audio, "instruction": question, "answer": answer})
        _write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows)


def _folder(folder: Path, studio: Studio) -> None:
    """Recordings of several kinds and rates, most of them described, one of them in stereo."""
    forms = (("WAV", 44_100), ("FLAC", 22_050), ("MP3", 44_100))
    lines = []
    for number in range(3 * studio.recipe.takes):
        form, rate_hz = forms[number % len(forms)]
        name = f"recording {number}.{form.lower()}"
        noise = studio.make_noise(f"folder/{name}", 2.0, rate_hz)
        samples = np.stack([noise, -0.5 * noise], axis=1) if form == "WAV" else noise
        _put(folder / name, sound_file(samples, rate_hz, form))
        about = {"audio": name, "split": SPLITS[number % 3], "labels": {"event": "engine"}}
        lines.append(json.dumps(about, sort_keys=True) + "\n")
    _put(folder / "metadata.jsonl", "".join(lines[1:]))


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([head, *rows])
    return text.getvalue()


SETS: dict[str, Callable[[Path, Studio], None]] = {
    LIBRISPEECH: _librispeech,
    "folder": _folder,
    "crema-d": _crema_d,
    "ravdess": _ravdess,
    "esc-50": _esc_50,
    "musan": _musan,
    "audiobench-json": _audiobench_json,
    "audiobench-parquet": _audiobench_parquet,
}
