"""`omni listen`: numbers against sounds whose truth is known, files of every kind, a picture."""

import io
import json
import os
import pty
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from omni_model.artifacts import AudioCorpus
from omni_model.audio import corpora, picture, speech, texture, waveform
from omni_model.audio.measures import clipped_share
from omni_model.audio.pitch import pitch_track
from omni_model.audio.readout import Heard, listen
from omni_model.config import SpeechRecipe, SplitSizes, TextureRecipe
from tests.small_sound import make

ROOT = Path(__file__).resolve().parent.parent
RATE_HZ = 16_000
UNSEEN_SEED = 4711  # the rules were made on clips of other seeds
SIZES = SplitSizes(train=48, validation=12, test=36)
SYLLABLES = {"zero": 2, "seven": 2, "yellow": 2, "orange": 2, "purple": 2, "tiger": 2}


def wav(samples: np.ndarray, rate_hz: int = RATE_HZ, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate_hz, format="WAV", subtype=subtype)
    return buffer.getvalue()


def hear(samples: np.ndarray, rate_hz: int = RATE_HZ, subtype: str = "PCM_16") -> Heard:
    return listen(wav(samples, rate_hz, subtype))[0]


def sine(frequency_hz: float, seconds: float, level: float = 0.5, rate_hz: int = RATE_HZ) -> np.ndarray:
    return level * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate_hz)) / rate_hz)


def clips(corpus: AudioCorpus) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    for path in corpora.shard_paths(corpus):
        for key, content, about in corpora.read_shard(path):
            yield waveform.decode(content, key), about


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[np.ndarray, dict[str, Any]]]:
    recipe = TextureRecipe(clips=SIZES)
    directory = tmp_path_factory.mktemp("texture")
    return list(clips(make(AudioCorpus, texture.synthesize, directory, recipe, seed=UNSEEN_SEED)))


@pytest.fixture(scope="module")
def voices(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[np.ndarray, dict[str, Any]]]:
    pytest.importorskip("espeakng_loader")
    directory = tmp_path_factory.mktemp("speech")
    recipe = SpeechRecipe(clips=SIZES)
    return list(clips(make(AudioCorpus, speech.synthesize, directory, recipe, seed=UNSEEN_SEED)))


@pytest.fixture(scope="module")
def heard_textures(
    textures: list[tuple[np.ndarray, dict[str, Any]]],
) -> list[tuple[Heard, dict[str, Any]]]:
    return [(hear(samples), about) for samples, about in textures]


@pytest.fixture(scope="module")
def heard_voices(voices: list[tuple[np.ndarray, dict[str, Any]]]) -> list[tuple[Heard, dict[str, Any]]]:
    return [(hear(samples), about) for samples, about in voices]


def with_noise(samples: np.ndarray, snr_db: float, tilt: float, seed: int) -> np.ndarray:
    """Steady noise below samples (N,), both counted over the whole clip."""
    noise = texture.tilted_noise(np.random.default_rng(seed), len(samples), tilt)
    noise *= np.sqrt(np.square(samples).mean() / np.square(noise).mean()) * 10 ** (-snr_db / 20)
    mixed = samples + noise
    return mixed / max(1.0, np.abs(mixed).max())


# --- numbers against truth -----------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
@pytest.mark.parametrize("level", [0.5, 0.01])
def test_the_level_of_a_sine(level: float, rate_hz: int) -> None:
    heard = hear(sine(400, 1.5, level, rate_hz), rate_hz)
    assert heard.peak_dbfs == pytest.approx(20 * np.log10(level), abs=0.15)
    assert heard.rms_dbfs == pytest.approx(20 * np.log10(level) - 3.01, abs=0.15)


def test_the_level_of_what_sounds_leaves_pauses_out() -> None:
    samples = np.concatenate([sine(300, 1.0, 0.1), np.zeros(3 * RATE_HZ), sine(300, 1.0, 0.1)])
    heard = hear(samples)
    assert heard.sounding_dbfs == pytest.approx(-23, abs=0.4)
    assert heard.rms_dbfs == pytest.approx(-23 - 10 * np.log10(5 / 2), abs=0.1)


def test_levels_of_textures(heard_textures: list[tuple[Heard, dict[str, Any]]]) -> None:
    made = [(heard, about["provenance"]) for heard, about in heard_textures]
    errors = [heard.sounding_dbfs - p["level_dbfs"] for heard, p in made if p["kind"] != "silence"]
    assert np.percentile(np.abs(errors), 90) < 0.7


@pytest.mark.parametrize("frequency_hz", [70, 90, 128, 333.3, 500, 997, 1500, 2750, 3900])
def test_the_pitch_of_a_steady_tone(frequency_hz: float) -> None:
    track = pitch_track(sine(frequency_hz, 1.0).astype(np.float32))
    assert np.median(track) == pytest.approx(frequency_hz, rel=0.003)
    assert (track[5:-5] > 0).all()


def test_the_pitch_of_texture_tones(textures: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    tones = [(x, about) for x, about in textures if about["provenance"]["kind"] == "tone"]
    assert len(tones) > 40
    for samples, about in tones:
        p, time_s = about["provenance"], np.arange(len(samples)) / RATE_HZ
        true_hz = p["frequency_hz"] * 2 ** (texture.contour_semitones(p, time_s) / 12)
        heard = hear(samples)
        assert heard.pitch is not None
        assert heard.pitch.median_hz == pytest.approx(np.median(true_hz), rel=0.03), about["key"]
        assert heard.voiced_share > 0.85
        if about["labels"]["contour"] in ("rising", "falling") and about["labels"]["loudness"] != "faint":
            inside = true_hz[true_hz < 3_900]  # the tops of the highest sweeps are out of the track's range
            low_hz, high_hz = np.percentile(inside, [5, 95])
            assert heard.pitch.range_semitones == pytest.approx(12 * np.log2(high_hz / low_hz), abs=0.75)


def test_beeps_are_counted_and_timed(textures: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    beeps = [(x, about) for x, about in textures if about["provenance"]["kind"] == "beeps"]
    assert len(beeps) >= 20
    for samples, about in beeps:
        p, heard = about["provenance"], hear(samples)
        truth = [p["start_s"] + number * p["period_s"] for number in range(p["count"])]
        assert heard.onsets_s == pytest.approx(truth, abs=0.012), about["key"]
        assert heard.num_onsets == p["count"]


@pytest.mark.parametrize("tilt", [0.0, 0.5], ids=["white", "pink"])
def test_noise_below_voices_and_tones(
    tilt: float,
    voices: list[tuple[np.ndarray, dict[str, Any]]],
    textures: list[tuple[np.ndarray, dict[str, Any]]],
) -> None:
    # Loud ones: the noise that every clip has of itself is then 40 dB and more below.
    loud = [x for x, about in [*voices, *textures] if _is_clear(about)]
    assert len(loud) > 15
    loud = loud[::2]
    for snr_db in (0, 10, 20, 30):
        errors = [
            hear(with_noise(x, snr_db, tilt, seed), subtype="FLOAT").snr_db - snr_db
            for seed, x in enumerate(loud)
        ]
        assert np.percentile(np.abs(errors), 90) < 2.5, snr_db
        assert abs(np.median(errors)) < 2, snr_db


def _is_clear(about: dict[str, Any]) -> bool:
    labels = about["labels"]
    sounds = labels.get("voice") in ("man", "woman") or about["provenance"].get("kind") in ("tone", "beeps")
    return labels.get("loudness") == "loud" and sounds


def test_noise_alone_is_heard_as_noise(textures: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    steady = [x for x, about in textures if about["labels"].get("noise") in ("white", "pink")]
    assert len(steady) > 8
    assert max(hear(x).snr_db for x in steady) < 3


def test_voices_are_told_by_pitch(heard_voices: list[tuple[Heard, dict[str, Any]]]) -> None:
    pitch_hz, voiced = defaultdict(list), defaultdict(list)
    for heard, about in heard_voices:
        voice = about["labels"]["voice"]
        voiced[voice].append(heard.voiced_share)
        if heard.pitch:
            pitch_hz[voice].append(heard.pitch.median_hz)
    assert 80 < np.median(pitch_hz["man"]) < 140 < 170 < np.median(pitch_hz["woman"]) < 300
    assert np.percentile(pitch_hz["man"], 90) < np.percentile(pitch_hz["woman"], 10)
    assert max(voiced["whisper"]) < 0.25
    assert np.percentile(voiced["man"], 10) > 0.4
    assert np.percentile(voiced["woman"], 10) > 0.4


@pytest.mark.slow
def test_the_pitch_of_voices_is_what_librosa_hears(voices: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    from librosa import pyin  # compiles for seconds

    spoken = [x for x, about in voices if about["labels"]["voice"] in ("man", "woman")][:16]
    apart = []
    for samples in spoken:
        theirs_hz, is_voiced, _ = pyin(samples, fmin=60, fmax=500, sr=RATE_HZ)
        if is_voiced.mean() < 0.4:  # it gives up on some of them
            continue
        heard = hear(samples)
        assert heard.pitch is not None
        apart.append(abs(12 * np.log2(heard.pitch.median_hz / np.median(theirs_hz[is_voiced]))))
    assert len(apart) > 8
    assert np.median(apart) < 0.3  # semitones
    assert np.percentile(apart, 75) < 1.0


def test_pace_follows_the_words(heard_voices: list[tuple[Heard, dict[str, Any]]]) -> None:
    pace_hz, onsets, syllables = defaultdict(list), [], []
    for heard, about in heard_voices:
        pace_hz[about["labels"]["pace"]].append(heard.pace_hz)
        onsets.append(heard.num_onsets)
        words = about["transcript"].rstrip("?.").split()
        syllables.append(sum(SYLLABLES.get(word, 1) for word in words))
    means = [np.mean(pace_hz[pace]) for pace in ("slow", "calm", "brisk", "hurried")]
    assert all(slower * 1.2 < faster for slower, faster in zip(means, means[1:], strict=False))
    assert sum(onsets) == pytest.approx(sum(syllables), rel=0.08)
    assert np.mean(np.abs(np.subtract(onsets, syllables)) <= 1) > 0.93


def test_speech_is_told_from_other_sounds(
    heard_voices: list[tuple[Heard, dict[str, Any]]], heard_textures: list[tuple[Heard, dict[str, Any]]]
) -> None:
    right = [heard.is_speech for heard, _ in heard_voices]
    assert np.mean([*right, *(not heard.is_speech for heard, _ in heard_textures)]) > 0.94


@pytest.mark.parametrize("snr_db", [10, 5])
def test_speech_is_told_from_other_sounds_in_noise(
    snr_db: float,
    voices: list[tuple[np.ndarray, dict[str, Any]]],
    textures: list[tuple[np.ndarray, dict[str, Any]]],
) -> None:
    right = [
        hear(with_noise(samples, snr_db, seed % 2 / 2, seed), subtype="FLOAT").is_speech == is_speech
        for is_speech, kind in ((True, voices), (False, textures))
        for seed, (samples, _) in enumerate(kind[::2])
    ]
    assert np.mean(right) > 0.88


@pytest.mark.parametrize("edge_hz", [2_000, 3_400, 6_000])
def test_bandwidth_is_where_a_filter_cuts(edge_hz: int) -> None:
    rng = np.random.default_rng(0)
    spectrum = np.fft.rfft(rng.standard_normal(2 * RATE_HZ))
    spectrum[np.fft.rfftfreq(2 * RATE_HZ, 1 / RATE_HZ) > edge_hz] = 0
    samples = 0.1 * np.fft.irfft(spectrum) * np.square(np.hanning(2 * RATE_HZ))  # it stands out of its end
    assert hear(samples, subtype="FLOAT").bandwidth_hz == pytest.approx(edge_hz, abs=200)


def test_a_telephone_is_heard(voices: list[tuple[np.ndarray, dict[str, Any]]]) -> None:
    clear = [x for x, about in voices if about["labels"]["loudness"] in ("loud", "medium")][:24]
    warned = []
    for samples in clear:
        spectrum, hz = np.fft.rfft(samples), np.fft.rfftfreq(len(samples), 1 / RATE_HZ)
        called = hear(np.fft.irfft(np.where((hz > 300) & (hz < 3_400), spectrum, 0), len(samples)))
        assert 2_500 < called.bandwidth_hz <= 3_700
        assert any(w.startswith("narrow") for w in called.warnings) == (
            called.is_speech and called.snr_db > 20
        )
        warned.append(any(w.startswith("narrow") for w in hear(samples).warnings))
    assert np.mean(warned) <= 0.1


def test_clipping_is_heard_and_nothing_else_is_taken_for_it(
    voices: list[tuple[np.ndarray, dict[str, Any]]], textures: list[tuple[np.ndarray, dict[str, Any]]]
) -> None:
    for samples, about in voices:
        assert clipped_share([samples[:, None]]) == 0, about["key"]
        # The peaks of a whisper are too short to become flat, and noise covers what is faint.
        if about["labels"]["loudness"] == "loud" and about["labels"]["voice"] != "whisper":
            clipped = np.clip(8 * samples / np.abs(samples).max(), -1, 1)
            assert hear(0.99 * clipped).clipped_share > 0.001
            assert hear(0.2 * clipped).clipped_share > 0.001  # turned down afterwards
            finer = soxr.resample(samples / np.abs(samples).max(), RATE_HZ, 44_100)
            assert hear(np.clip(8 * finer, -1, 1), 44_100).clipped_share > 0.001
    assert np.mean([hear(samples).clipped_share > 0 for samples, _ in textures[::2]]) < 0.05
    for frequency_hz in (60, 100, 441, 1000, 4000):
        assert clipped_share([sine(frequency_hz, 1)[:, None]]) == 0


# --- files ---------------------------------------------------------------------------------------


def test_what_was_found_and_what_was_done(tmp_path: Path) -> None:
    left = sine(200, 1.0, 0.3, 44_100)
    stereo = np.stack([left, 0.5 * left], axis=1) + 0.1
    heard = hear(stereo, 44_100)
    assert (heard.format, heard.rate_hz, heard.num_channels) == ("wav", 44_100, 2)
    assert heard.duration_s == pytest.approx(1.0, abs=0.001)
    assert set(heard.changes) == {"mixed down", "resampled", "offset removed"}
    for words in ("mono from 2 channels", "resampled from 44,100 Hz", "offset"):
        assert any(words in warning for warning in heard.warnings), words
    path = tmp_path / "tone.flac"
    soundfile.write(path, left, 44_100)
    assert listen(path)[0].format == "flac"
    assert "too quiet" in hear(sine(200, 1.0, 0.001)).warnings[0]


def test_a_long_recording_is_heard_whole() -> None:
    pause = np.zeros(RATE_HZ // 2)
    beep = sine(500, 0.5, 0.3) * np.hanning(RATE_HZ // 2)
    noise = np.random.default_rng(0).standard_normal(95 * RATE_HZ) * 1e-4
    heard = hear(np.concatenate([pause, beep] * 95) + noise)
    assert heard.num_pieces == 4
    assert any("4 pieces" in warning for warning in heard.warnings)
    assert heard.num_onsets == 95
    assert np.diff(heard.onsets_s) == pytest.approx(1.0, abs=0.03)
    assert heard.pitch is not None
    assert heard.pitch.median_hz == pytest.approx(500, rel=0.01)


FUZZ = """
import dataclasses, json, warnings
from collections import Counter
from omni_model.audio import readout
from omni_model.config import BadInput
from tests.fuzz_audio import broken_files, peak_mib, whole_files

warnings.simplefilter("error")
outcomes = Counter()
for name, content in whole_files().items():
    readout.listen(content, name)
before_mib = peak_mib()
for name, content in broken_files(2000, 5):
    try:
        heard, _ = readout.listen(content, name)
        json.dumps(dataclasses.asdict(heard), allow_nan=False)
        outcomes["heard"] += 1
    except BadInput as error:
        assert "\\n" not in str(error)
        outcomes["refused"] += 1
print(json.dumps([outcomes, peak_mib() - before_mib]))
"""


def test_two_thousand_broken_files() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FUZZ], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes, memory_mib = json.loads(done.stdout)
    assert sum(outcomes.values()) == 2000
    assert outcomes["heard"] > 100  # some breaks are harmless
    assert outcomes["refused"] > 1000
    assert memory_mib < 150


# --- the command ---------------------------------------------------------------------------------


def omni(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def beeps(tmp_path: Path) -> Path:
    path = tmp_path / "three beeps.wav"
    beep = sine(440, 0.2, 0.3) * np.hanning(3200)
    path.write_bytes(wav(np.concatenate([np.zeros(3200), beep] * 3 + [np.zeros(3200)])))
    return path


def test_the_command_tells_and_draws(beeps: Path, tmp_path: Path) -> None:
    png = tmp_path / "mel.png"
    done = omni("listen", str(beeps), "--picture", str(png))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    for words in ("three beeps.wav: 1.40 s, WAV, 16,000 Hz, mono", "44", "3 onsets", str(png)):
        assert words in done.stdout
    assert "\x1b" not in done.stdout  # plain where nobody looks
    assert any(line.count("@") + line.count("%") >= 3 for line in done.stdout.splitlines())
    first = png.read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert omni("listen", str(beeps), "--picture", str(png)).returncode == 0
    assert png.read_bytes() == first


def test_the_command_prints_everything_as_json(beeps: Path) -> None:
    done = omni("listen", str(beeps), "--json")
    told = json.loads(done.stdout)
    assert told["file"] == str(beeps)
    assert told["num_onsets"] == 3
    assert told["pitch"]["median_hz"] == pytest.approx(440, rel=0.01)
    assert set(told) >= set(Heard.__dataclass_fields__)


def test_a_terminal_gets_colour(beeps: Path) -> None:
    screen, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "listen", str(beeps)],
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": "80"},
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(screen, 65_536)
        except OSError:  # the other end is closed
            break
    os.close(screen)
    assert child.wait() == 0
    assert "▀".encode() in shown
    assert b"38;2;" in shown


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.wav", None, "No such file"),
        ("", None, "directory"),
        ("garbage.wav", b"this is no sound at all" * 9, "cannot be read as audio"),
        ("empty.wav", b"", "is empty"),
        ("cut.wav", wav(sine(300, 1.0))[:9_000], "ends after"),
        ("silent.wav", wav(np.zeros(RATE_HZ)), "is silent"),
        ("short.wav", wav(sine(300, 0.05)), "at least 0.1 s"),
    ],
)
def test_what_cannot_be_heard_is_refused_in_one_sentence(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name if name else tmp_path
    if content is not None:
        path.write_bytes(content)
    done = omni("listen", str(path))
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("omni: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("place", ["missing/mel.png", "mel.jpg", "."])
def test_a_picture_without_a_place_is_refused(place: str, beeps: Path, tmp_path: Path) -> None:
    done = omni("listen", str(beeps), "--picture", str(tmp_path / place))
    assert done.returncode == 2
    assert "cannot be a picture" in done.stderr


def test_listening_needs_no_torch(beeps: Path) -> None:
    code = "import sys; from flows.cli import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "listen", str(beeps)], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


# --- the picture ---------------------------------------------------------------------------------


def test_the_picture_shows_when_and_how_high() -> None:
    low, high = sine(200, 1.0), sine(3_000, 1.0)
    shown = picture.brightness(np.concatenate([low, high]).astype(np.float32), 80, picture.TERMINAL_BANDS)
    assert shown.shape == (24, 80)
    first, second = shown[:, 10].argmax(), shown[:, 70].argmax()
    assert first < 4
    assert 12 < second < 18
    assert shown[second, 10] < 0.2
    assert shown[first, 70] < 0.2


@pytest.mark.parametrize("seconds", [0.1, 0.25, 31.0])
def test_the_picture_of_short_and_long_sounds(seconds: float) -> None:
    samples = sine(300, seconds).astype(np.float32)
    shown = picture.brightness(samples, 100, picture.TERMINAL_BANDS)
    assert shown.shape == (24, min(100, round(seconds * 100)))
    assert np.isfinite(shown).all()
    lines = picture.plain(shown).splitlines()
    assert len(lines) == 12
    assert {len(line) for line in lines} == {shown.shape[1]}
