"""Music, noises, and sounds made at random, none of which any corpus is trained on. numpy alone.

Every function takes random numbers and a number of samples and gives (N,) float64 of any level. A *partial*
is one sine; none lies above 7.5 kHz. N: samples at 16 kHz.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from omni_model.audio.waveform import SAMPLE_RATE_HZ

Sound = Callable[[np.random.Generator, int], np.ndarray]
HIGHEST_HZ = 7_500
MAJOR, MINOR = (0, 4, 7), (0, 3, 7)
SCALE = (0, 2, 3, 5, 7, 8, 10, 12)
ORGAN, FLUTE, CLARINET = (1, 0.6, 0.2, 0.5, 0.1, 0.2), (1, 0.3, 0.08), (1, 0, 0.6, 0, 0.35, 0, 0.2)
BARS = (1, 2.76, 5.4, 8.93)  # partials of a struck bar that is free at both ends
BELL = (0.5, 1, 1.19, 1.56, 2, 2.51, 3.1)


def partials(
    num_samples: int, frequency_hz: float, amplitudes: Sequence[float], ratios: Sequence[float] = ()
) -> np.ndarray:
    """Sines (N,) at multiples of a frequency; `ratios` where they are not 1, 2, 3."""
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    sound = np.zeros(num_samples)
    for ratio, amplitude in zip(ratios or range(1, len(amplitudes) + 1), amplitudes, strict=False):
        if amplitude and ratio * frequency_hz < HIGHEST_HZ:
            sound += amplitude * np.sin(2 * math.pi * ratio * frequency_hz * time_s + ratio)
    return sound


def coloured(
    rng: np.random.Generator, num_samples: int, gain: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Gaussian noise (N,) whose amplitude at each frequency in Hz is `gain` of it."""
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    frequency_hz = np.maximum(np.fft.rfftfreq(num_samples, 1 / SAMPLE_RATE_HZ), 20.0)
    return np.fft.irfft(spectrum * gain(frequency_hz), num_samples)


def decay(num_samples: int, half_life_s: float, attack_s: float = 0.004) -> np.ndarray:
    """An envelope (N,) that rises at once and halves every `half_life_s`."""
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    return np.minimum(time_s / attack_s, 1.0) * np.exp2(-time_s / half_life_s)


def swell(num_samples: int, edge_s: float = 0.03) -> np.ndarray:
    """An envelope (N,) that stays, with slopes at both ends."""
    time_s = np.arange(num_samples) / SAMPLE_RATE_HZ
    return np.clip(np.minimum(time_s, time_s[::-1]) / edge_s, 0, 1)


def beats(rng: np.random.Generator, num_samples: int, shortest_s: float, longest_s: float) -> list[slice]:
    """A bar line: equal steps of a random length, the last one cut."""
    step = round(rng.uniform(shortest_s, longest_s) * SAMPLE_RATE_HZ)
    starts = range(0, max(1, num_samples - 800), step)
    return [slice(start, min(num_samples, start + step)) for start in starts]


def semitones(count: float) -> float:
    """The ratio of two frequencies so far apart."""
    return float(2 ** (count / 12))


# --- music ---------------------------------------------------------------------------------------


def waltz(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A bass note and two chords, over and over."""
    sound, root_hz = np.zeros(num_samples), rng.uniform(70, 120)
    for number, beat in enumerate(beats(rng, num_samples, 0.22, 0.4)):
        size = beat.stop - beat.start
        if number % 3 == 0:
            root_hz *= semitones(rng.choice([-5, 0, 2, 5]))
            root_hz *= 0.5 if root_hz > 180 else 2 if root_hz < 60 else 1
            sound[beat] += 1.4 * partials(size, root_hz, ORGAN) * decay(size, 0.2)
        else:
            for step in MAJOR:
                sound[beat] += partials(size, 4 * root_hz * semitones(step), ORGAN) * decay(size, 0.1)
    return sound


def arpeggio(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """The notes of a chord one after another, each ringing on."""
    sound, root_hz = np.zeros(num_samples), rng.uniform(120, 260)
    chord = [*(MAJOR if rng.random() < 0.5 else MINOR), 12, 16 - rng.integers(2), 19]
    order = rng.permutation(len(chord))
    amplitudes = [1 / n**1.5 for n in range(1, 9)]
    for number, beat in enumerate(beats(rng, num_samples, 0.11, 0.22)):
        size = num_samples - beat.start
        note_hz = root_hz * semitones(chord[order[number % len(order)]])
        sound[beat.start :] += partials(size, note_hz, amplitudes) * decay(size, 0.18)
    return sound


def strings(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Bowed chords: several players on each note, none quite in tune, all with vibrato."""
    sound, root_hz = np.zeros(num_samples), rng.uniform(130, 260)
    for beat in beats(rng, num_samples, 0.6, 1.2):
        size = beat.stop - beat.start
        time_s = np.arange(size) / SAMPLE_RATE_HZ
        move = rng.choice([0, 5, 7, -3])
        for step in (-12, *(MAJOR if rng.random() < 0.6 else MINOR)):
            for _ in range(2):
                note_hz = root_hz * semitones(step + move + rng.normal(0, 0.08))
                vibrato = 0.003 * np.sin(2 * math.pi * rng.uniform(4.5, 6.5) * time_s + rng.uniform(0, 6))
                phase = 2 * math.pi * np.cumsum(note_hz * (1 + vibrato)) / SAMPLE_RATE_HZ
                count = int(min(14, HIGHEST_HZ // (1.01 * note_hz)))
                sound[beat] += sum(np.sin(n * phase) / n for n in range(1, count + 1)) * swell(size, 0.08)
    return sound


def march(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """A snare, a bass drum, and a tune on a fife."""
    sound, root_hz, degree = np.zeros(num_samples), rng.uniform(500, 800), 3
    for number, beat in enumerate(beats(rng, num_samples, 0.16, 0.26)):
        size = beat.stop - beat.start
        snare = coloured(rng, size, lambda hz: hz / (hz + 1500)) * decay(size, 0.025)
        sound[beat] += (0.8 if number % 2 else 0.3) * snare
        if number % 4 == 0:
            sound[beat] += 2 * partials(size, rng.uniform(55, 70), (1, 0.4), (1, 1.6)) * decay(size, 0.05)
        degree = int(np.clip(degree + rng.integers(-2, 3), 0, len(SCALE) - 1))
        sound[beat] += partials(size, root_hz * semitones(SCALE[degree]), FLUTE) * swell(size)
    return sound


def chimes(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Struck bars and bells that ring into each other."""
    sound, root_hz = np.zeros(num_samples), rng.uniform(250, 500)
    ratios = BARS if rng.random() < 0.5 else BELL
    for beat in beats(rng, num_samples, 0.14, 0.35):
        size = num_samples - beat.start
        note_hz = root_hz * semitones(SCALE[rng.integers(len(SCALE))])
        for place, ratio in enumerate(ratios):
            struck = partials(size, note_hz, (1 / (place + 1),), (ratio,))
            sound[beat.start :] += struck * decay(size, 0.3 / (1 + 0.5 * place))
    return sound


def duet(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Two reeds, each with a tune and a pace of its own."""
    sound = np.zeros(num_samples)
    for lowest_hz in (rng.uniform(150, 220), rng.uniform(330, 500)):
        for beat in beats(rng, num_samples, 0.18, 0.5):
            size = beat.stop - beat.start
            note_hz = lowest_hz * semitones(SCALE[rng.integers(len(SCALE))])
            sound[beat] += partials(size, note_hz, CLARINET) * swell(size, 0.02)
    return sound


# --- noises --------------------------------------------------------------------------------------


def motor(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """An engine: bursts at an uneven rate through an exhaust that resonates."""
    strikes = np.zeros(num_samples)
    place, number, turn = 0.0, 0, SAMPLE_RATE_HZ / rng.uniform(22, 60)
    while place < num_samples:
        strikes[int(place)] = (1.0, 0.55, 0.8, 0.65)[number % 4]
        place, number = place + turn * rng.normal(1, 0.03), number + 1
    ring = sum(partials(1600, rng.uniform(low, 2 * low), (1,)) * decay(1600, 0.01) for low in (80, 240, 700))
    rattle = coloured(rng, num_samples, lambda hz: 1 / (1 + (hz / 900) ** 2))
    return np.convolve(strikes, ring)[:num_samples] + 0.08 * rattle


def shower(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Rain on a roof: drops that each ring for an instant, over a wash of noise that comes in gusts."""
    sound = np.zeros(num_samples + 400)
    for start in rng.integers(0, num_samples, int(rng.uniform(60, 200) * num_samples / SAMPLE_RATE_HZ)):
        drop = partials(400, rng.uniform(900, 5000), (rng.uniform(0.2, 1),)) * decay(400, 0.003, 0.0005)
        sound[start : start + 400] += drop
    wash = coloured(rng, num_samples, lambda hz: np.sqrt(hz) / (1 + hz / 2500))
    sound[:num_samples] += 0.15 * wash / wash.std() * smooth(rng, num_samples, 1.5, 6)
    return sound[:num_samples]


def surf(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Waves or wind: a band of noise that moves up and down."""
    sound = np.zeros(num_samples)
    for lowest_hz in (250, 1500):
        wave = coloured(rng, num_samples, band(lowest_hz * rng.uniform(1, 2), 0.5))
        sound += wave / wave.std() * smooth(rng, num_samples, 1.2, 10)
    return sound


def typing(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Keys: two clicks each, at times of their own."""
    sound, start = 1e-3 * rng.standard_normal(num_samples), rng.uniform(0.02, 0.1)
    while (place := round(start * SAMPLE_RATE_HZ)) < num_samples - 3000:
        for late, strength in ((0, 1.0), (round(rng.uniform(0.05, 0.09) * SAMPLE_RATE_HZ), 0.4)):
            click = coloured(rng, 1200, band(rng.uniform(1800, 3200), 0.6)) * decay(1200, 0.006, 0.0005)
            sound[place + late : place + late + 1200] += strength * click
        start += rng.uniform(0.09, 0.3)
    return sound


def applause(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Many hands, each at a rate of its own."""
    sound = np.zeros(num_samples + 800)
    for _ in range(rng.integers(5, 14)):
        clap = coloured(rng, 800, band(rng.uniform(700, 1800), 0.5)) * decay(800, 0.008, 0.0005)
        for start in np.arange(rng.uniform(0, 0.3), num_samples / SAMPLE_RATE_HZ, rng.uniform(0.2, 0.34)):
            place = round((start + rng.normal(0, 0.01)) * SAMPLE_RATE_HZ)
            if 0 <= place < num_samples:
                sound[place : place + 800] += clap
    return sound[:num_samples]


def sawing(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise that swells to and fro with sharp turns."""
    strokes = np.arange(num_samples) / SAMPLE_RATE_HZ * rng.uniform(2.2, 6) % 1
    rough = coloured(rng, num_samples, band(rng.uniform(1200, 3500), 0.7))
    return rough * (0.05 + strokes ** rng.uniform(1, 3))


def mains(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """The hum of a transformer, with its multiples and a little hiss."""
    amplitudes = [rng.uniform(0.1, 1) for _ in range(12)]
    hum = partials(num_samples, float(rng.choice([50, 60])), amplitudes)
    return hum + 0.05 * rng.standard_normal(num_samples)


def blue(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise that grows towards high frequencies."""
    tilt = rng.uniform(0.5, 1.0)
    return coloured(rng, num_samples, lambda hz: (hz / 1000) ** tilt)


def murmur(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise with the spectrum of speech, as loud and soft as syllables."""
    voice = coloured(rng, num_samples, lambda hz: hz / (hz + 120) / (1 + (hz / 550) ** 1.6))
    voice *= smooth(rng, num_samples, 5, 14)
    return voice


def band(centre_hz: float, width_octaves: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda hz: np.exp(-np.square(np.log2(hz / centre_hz) / width_octaves))


def smooth(rng: np.random.Generator, num_samples: int, rate_hz: float, swing_db: float) -> np.ndarray:
    """An envelope (N,) that wanders about 1, changing `rate_hz` times a second or so."""
    count = max(4, round(num_samples / SAMPLE_RATE_HZ * 2 * rate_hz) + 3)
    places = np.linspace(0, count - 1, num_samples)
    return np.asarray(10 ** (swing_db / 20 * np.interp(places, np.arange(count), rng.standard_normal(count))))


# --- made at random ------------------------------------------------------------------------------


def notes(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """One to four parts, each a row of notes with random partials, pitches, envelope and rate."""
    sound = np.zeros(num_samples)
    for _ in range(rng.integers(1, 5)):
        count = int(rng.integers(1, 10))
        stretch = rng.choice([1.0, 1.0, rng.uniform(0.9, 1.15)])
        ratios = [n**stretch for n in range(1, count + 1)]
        amplitudes = [rng.uniform(0.1, 1) / n ** rng.uniform(0.3, 1.5) for n in range(1, count + 1)]
        lowest_hz, octaves = 2 ** rng.uniform(5.8, 9.5), rng.uniform(0.2, 2)
        half_life_s, weight = 2 ** rng.uniform(-5, 1), rng.uniform(0.3, 1)
        for beat in beats(rng, num_samples, 0.09, 0.7):
            size = beat.stop - beat.start
            note = partials(size, lowest_hz * 2 ** rng.uniform(0, octaves), amplitudes, ratios)
            sound[beat] += weight * note * decay(size, half_life_s) * swell(size, 0.005)
    if rng.random() < 0.4:
        struck = strikes(rng, num_samples)
        sound += rng.uniform(0.2, 1) * sound.std() / (struck.std() + 1e-9) * struck
    return sound


def hisses(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise of a random spectrum, strikes, drops, a comb of partials: one of them, or several."""
    often = {wash: 0.6, strikes: 0.35, drops: 0.3, comb: 0.3}
    parts = [part for part, share in often.items() if rng.random() < share] or [wash]
    sound = np.zeros(num_samples)
    for part in parts:
        made = part(rng, num_samples)
        sound += rng.uniform(0.1, 1) * made / (made.std() + 1e-9)
    return sound


def wash(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise whose spectrum is bent, or which throbs or wanders, or both."""
    is_bent, is_moving = rng.permutation([True, rng.random() < 0.5])
    octaves = np.arange(9)
    gains_db = rng.uniform(-8, 8) * octaves + rng.normal(0, rng.uniform(4, 12) if is_bent else 0, 9)

    def gain(hz: np.ndarray) -> np.ndarray:
        return np.asarray(10 ** (np.interp(np.log2(hz / 31.25), octaves, gains_db) / 20))

    noise = coloured(rng, num_samples, gain)
    if not is_moving:
        return noise
    rate_hz = 2 ** rng.uniform(0, 5.5)
    if rng.random() < 0.5:
        noise *= smooth(rng, num_samples, rate_hz, rng.uniform(4, 12))
        return noise
    turns = np.arange(num_samples) / SAMPLE_RATE_HZ * rate_hz + rng.random()
    shape = 0.5 - 0.5 * np.cos(2 * math.pi * turns) if rng.random() < 0.5 else turns % 1
    return noise * (1 - rng.uniform(0.5, 1) * shape ** rng.uniform(0.5, 3))


def strikes(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Short bursts of one random band, at regular or random times."""
    rate_hz, impulses = 2 ** rng.uniform(1, 7), np.zeros(num_samples)
    steps = rng.exponential(1, num_samples) if rng.random() < 0.5 else np.ones(num_samples)
    places = (np.cumsum(steps) * SAMPLE_RATE_HZ / rate_hz).astype(np.int64)
    places = places[places < num_samples]
    impulses[places] = rng.uniform(0.4, 1, len(places))
    half_life_s = 2 ** rng.uniform(-9.5, -5)
    size = round(8 * half_life_s * SAMPLE_RATE_HZ) + 64
    burst = coloured(rng, size, band(2 ** rng.uniform(8, 12.5), rng.uniform(0.2, 2)))
    return _struck(impulses, burst * decay(size, half_life_s, 0.0005))


def drops(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Short tones at random times, each of one of a few random pitches."""
    sound = np.zeros(num_samples)
    lowest_hz, octaves = 2 ** rng.uniform(8, 11.5), rng.uniform(0.1, 2)
    share = 2 ** rng.uniform(1, 6.5) / SAMPLE_RATE_HZ
    for _ in range(6):
        impulses = (rng.random(num_samples) < share) * rng.uniform(0.2, 1, num_samples)
        half_life_s = 2 ** rng.uniform(-9.5, -6)
        size = round(8 * half_life_s * SAMPLE_RATE_HZ) + 64
        ring = partials(size, lowest_hz * 2 ** rng.uniform(0, octaves), (1,))
        sound += _struck(impulses, ring * decay(size, half_life_s, 0.0005))
    return sound


def comb(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Many multiples of one low frequency, each as strong as chance has it."""
    count = int(rng.integers(5, 40))
    amplitudes = rng.uniform(0, 1, count) * np.arange(1, count + 1) ** -rng.uniform(0, 1)
    return partials(num_samples, rng.uniform(25, 130), amplitudes.tolist())


def _struck(impulses: np.ndarray, response: np.ndarray) -> np.ndarray:
    """Every impulse (N,) as the response sounds."""
    size = 2 ** (len(impulses) + len(response)).bit_length()
    return np.fft.irfft(np.fft.rfft(impulses, size) * np.fft.rfft(response, size), size)[: len(impulses)]


MUSIC: dict[str, Sound] = {each.__name__: each for each in (waltz, arpeggio, strings, march, chimes, duet)}
NOISES: dict[str, Sound] = {
    each.__name__: each for each in (motor, shower, surf, typing, applause, sawing, mains, blue, murmur)
}
NONSENSE: dict[str, Sound] = {each.__name__: each for each in (notes, hisses)}
