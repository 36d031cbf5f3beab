"""Broken audio files by the thousand, the same ones for the same seed.

Each starts as a short, whole file of some format and is broken in one of the ways that disks, networks,
careless programs and ill will break files. `python -m tests.fuzz_audio COUNT SEED` ingests them in its own
process, every other lot from disk, and prints how they were told apart and how much memory that took.
"""

import contextlib
import io
import json
import resource
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from omni_model.audio import ingest
from omni_model.audio.clips import Dropped
from omni_model.audio.containers import ogg_checksum
from omni_model.audio.unusable import Unusable

EXTREMES = (0, 1, 0x7FFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFE, 0xFFFF_FFFF)
MAGICS = (
    (b"RIFF\xff\xff\xff\x7fWAVE", b"RF64\xff\xff\xff\xffWAVE", b"fLaC", b"OggS\0\2", b"ID3\4\0\0")
    + (b"\xff\xfb", b"\x1aE\xdf\xa3", b"\0\0\0\x20ftypM4A ", b"\xff\xf1\x50\x80", b"FORM\0\0\0\0AIFF")
    + (b"PK\3\4", b"")
)
MAX_MORE_MIB = 256
RATES_HZ = (0, 1, 7_999, 16_000, 192_001, 2**32 - 1)


def wav(samples: np.ndarray, rate_hz: int = 16_000, subtype: str = "PCM_16") -> bytes:
    """A WAV file of samples (n,) or (n, channels)."""
    return encode(samples, rate_hz, "WAV", subtype)


def encode(samples: np.ndarray, rate_hz: int, form: str, subtype: str) -> bytes:
    """A file of samples (n,) or (n, channels) by libsndfile; an Ogg stream's random number is made 1."""
    buffer = io.BytesIO()
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    with soundfile.SoundFile(buffer, "w", rate_hz, channels, subtype, format=form) as file:
        for first in range(0, len(samples), rate_hz):  # libsndfile crashes on minutes of Vorbis at once
            file.write(samples[first : first + rate_hz])
    return renumbered(buffer.getvalue()) if form == "OGG" else buffer.getvalue()


def renumbered(content: bytes) -> bytes:
    """An Ogg file with stream number 1 and right checksums, whatever its pages hold."""
    pages = []
    while content.startswith(b"OggS") and len(content) > 27:
        length = 27 + content[26] + sum(content[27 : 27 + content[26]])
        page, content = content[:14] + struct.pack("<I", 1) + content[18:length], content[length:]
        pages.append(page[:22] + ogg_checksum(page) + page[26:] if len(page) >= 27 else page)
    return b"".join(pages) + content


def media(samples: np.ndarray, rate_hz: int, form: str, codec: str, **options: str) -> bytes:
    """A file of samples (n,) by PyAV: `form` webm or mp4, `codec` libopus or aac."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form, options={"fflags": "+bitexact", **options}) as target:
        stream: Any = target.add_stream(codec, rate=rate_hz, layout="mono")
        wide = av.AudioFrame.from_ndarray(samples[None].astype(np.float32), format="fltp", layout="mono")
        wide.sample_rate = rate_hz
        converter = av.AudioResampler(stream.codec_context.format.name, "mono", rate_hz)
        for frame in [*converter.resample(wide), None]:
            target.mux(stream.encode(frame))
    return buffer.getvalue()


def whole_files(seed: int = 0) -> dict[str, bytes]:
    """Name -> a short file of each kind that can be read; WebM, MP4 and AAC where PyAV is installed."""
    rng = np.random.default_rng(seed)
    noise = (rng.standard_normal(16_000) * 0.1).astype(np.float32)
    stereo = np.stack([noise[:6_000], noise[6_000:12_000]], axis=1)
    files = {
        "pcm16.wav": wav(noise[:6_000]),
        "pcm24.wav": wav(noise[:6_000], 44_100, "PCM_24"),
        "float.wav": wav(stereo, 48_000, "FLOAT"),
        "ulaw.wav": wav(noise[:6_000], 8_000, "ULAW"),
        "adpcm.wav": wav(noise[:6_000], 22_050, "IMA_ADPCM"),
        "mono.flac": encode(noise[:6_000], 16_000, "FLAC", "PCM_16"),
        "stereo.flac": encode(stereo, 44_100, "FLAC", "PCM_24"),
        "mono.mp3": encode(noise, 44_100, "MP3", "MPEG_LAYER_III"),
        "stereo.mp3": encode(stereo, 16_000, "MP3", "MPEG_LAYER_III"),
        "vorbis.ogg": encode(noise, 44_100, "OGG", "VORBIS"),
        "opus.ogg": encode(noise, 48_000, "OGG", "OPUS"),
    }
    with contextlib.suppress(ImportError):
        files["opus.webm"] = media(noise, 48_000, "webm", "libopus")
        files["live.webm"] = media(noise, 48_000, "webm", "libopus", live="1")
        files["aac.mp4"] = media(noise, 48_000, "mp4", "aac")
        files["aac.aac"] = media(noise, 48_000, "adts", "aac")
    return files


# --- ways to break a file ------------------------------------------------------------------------


def truncate(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def flip_bits(content: bytes, rng: np.random.Generator) -> bytes:
    broken = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 9)):
        broken[place] ^= 1 << int(rng.integers(8))
    return bytes(broken)


def flip_bits_of_header(content: bytes, rng: np.random.Generator) -> bytes:
    return flip_bits(content[:128], rng) + content[128:]


def overwrite(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 400))) + content[start + 400 :]


def zero_run(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + bytes(400) + content[start + 400 :]


def lie(content: bytes, rng: np.random.Generator) -> bytes:
    """Some field of the header becomes an extreme number: a length, a rate, a number of channels."""
    broken = bytearray(content)
    for place in rng.integers(4, min(80, len(content) - 4), size=rng.integers(1, 4)):
        value, form = int(rng.choice(EXTREMES)), str(rng.choice(["<I", ">I", "<H", ">H"]))
        size = struct.calcsize(form)
        broken[place : place + size] = struct.pack(form, value & (256**size - 1))
    return bytes(broken)


def lying_wav(content: bytes, rng: np.random.Generator) -> bytes:
    """A well-formed WAV header that claims anything, before a little sound."""
    tag, rate_hz = int(rng.choice([1, 3, 6, 17, 0x55, 0xFFFE])), int(rng.choice(RATES_HZ))
    channels, num_bits = int(rng.choice([0, 1, 2, 9, 65_535])), int(rng.choice([0, 1, 8, 16, 24, 32, 64]))
    block_bytes = channels * num_bits // 8 % 65_536
    rates = struct.pack("<HHII", tag, channels, rate_hz, rate_hz * block_bytes % 2**32)
    head = b"RIFF" + struct.pack("<I", int(rng.choice(EXTREMES))) + b"WAVEfmt " + struct.pack("<I", 16)
    head += rates + struct.pack("<HH", block_bytes, num_bits) + b"data"
    sound = rng.bytes(int(rng.integers(4_000)))
    return head + struct.pack("<I", int(rng.choice([len(sound), *EXTREMES]))) + sound


def lying_flac(content: bytes, rng: np.random.Generator) -> bytes:
    """A FLAC whose STREAMINFO claims another number of samples, rate or sample size; half without MD5."""
    base = bytearray(encode(np.tile(rng.standard_normal(500) * 0.1, 8), 16_000, "FLAC", "PCM_16"))
    rate_hz, channels = int(rng.choice([0, 1, 16_000, 655_350])), int(rng.choice([1, 2, 8]))
    total = int(rng.choice([0, 1, 3_999, 4_001, 2**31, 2**36 - 1]))
    base[18:26] = (rate_hz << 44 | (channels - 1) << 41 | 15 << 36 | total).to_bytes(8, "big")
    if rng.integers(2):
        base[26:42] = bytes(16)
    return bytes(base)


def swap_chunks(content: bytes, rng: np.random.Generator) -> bytes:
    cuts = sorted(int(cut) for cut in rng.integers(len(content), size=rng.integers(2, 8)))
    parts = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
    kept = 1 if rng.integers(2) else 0
    return b"".join([*parts[:kept], *(parts[kept + i] for i in rng.permutation(len(parts) - kept))])


def repeat(content: bytes, rng: np.random.Generator) -> bytes:
    return content + content[: rng.integers(len(content) + 1)]


def insert_junk(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + rng.bytes(int(rng.integers(1, 3_000))) + content[start:]


def remove_part(content: bytes, rng: np.random.Generator) -> bytes:
    start = int(rng.integers(len(content)))
    return content[:start] + content[start + int(rng.integers(1, 2_000)) :]


def deep_ogg(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage inside Ogg pages whose checksums are right again, so that it reaches the decoder."""
    noise = rng.standard_normal(4_000) * 0.1
    form = str(rng.choice(["VORBIS", "OPUS"]))
    return renumbered(flip_bits(encode(noise, 48_000, "OGG", form), rng))


def magic_and_noise(content: bytes, rng: np.random.Generator) -> bytes:
    return MAGICS[rng.integers(len(MAGICS))] + rng.bytes(int(rng.integers(6_000)))


def not_finite(content: bytes, rng: np.random.Generator) -> bytes:
    """A float WAV with some samples that are no numbers, or beyond every scale."""
    samples = (rng.standard_normal(4_000) * 0.1).astype(np.float32)
    values = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30], np.float32)
    samples[rng.integers(4_000, size=rng.integers(1, 50))] = rng.choice(values)
    return wav(samples, int(rng.choice([8_000, 16_000, 44_100])), "FLOAT")


def weak(content: bytes, rng: np.random.Generator) -> bytes:
    """Nothing to hear: no samples, a few, or silence, with or without an offset."""
    count, level = int(rng.choice([0, 1, 100, 1_599, 20_000])), float(rng.choice([0, 1e-6, 0.5]))
    return wav(np.full(count, level), 16_000, str(rng.choice(["PCM_16", "FLOAT"])))


def nested(content: bytes, rng: np.random.Generator) -> bytes:
    """One file inside another: behind a tag with a lying length, or as a WAV's sound."""
    if rng.integers(2):
        return b"ID3\4\0\0" + bytes(rng.integers(0, 128, 4, dtype=np.uint8)) + content
    return (
        b"RIFF"
        + struct.pack("<I", len(content) + 36)
        + wav(np.zeros(1))[8:40]
        + struct.pack("<I", len(content))
        + content
    )


def foreign(content: bytes, rng: np.random.Generator) -> bytes:
    """What a download gives instead of a file, and other things that are no sound."""
    kinds = [
        b"",
        b"\0",
        b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * int(rng.integers(1, 40)),
        json.dumps({"error": "expired"}).encode(),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n",
        rng.bytes(int(rng.integers(1, 8_000))),
        bytes(int(rng.integers(1, 8_000))),
        b"\xff" * int(rng.integers(1, 8_000)),
        b"#EXTM3U\nhttp://127.0.0.1:9/a.ts\n",
    ]
    return kinds[rng.integers(len(kinds))]


WAYS: tuple[Callable[[bytes, np.random.Generator], bytes], ...] = (
    truncate,
    flip_bits,
    flip_bits_of_header,
    overwrite,
    zero_run,
    lie,
    lying_wav,
    lying_flac,
    swap_chunks,
    repeat,
    insert_junk,
    remove_part,
    deep_ogg,
    magic_and_noise,
    not_finite,
    weak,
    nested,
    foreign,
)


def broken_files(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of `count` files. Some breaks are harmless: such a file may well be heard."""
    whole = list(whole_files(seed).items())
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        name, content = whole[rng.integers(len(whole))]
        way = WAYS[number % len(WAYS)]
        yield f"{number:05d}-{way.__name__}-{name}", way(content, rng)


def ingest_one(source: bytes | Path, name: str, outcomes: Counter[str]) -> None:
    """Count what becomes of one file. Whatever is not a refusal in a sentence is a crash."""
    try:
        for clip in ingest.clips(source, name):
            outcomes[clip.reason if isinstance(clip, Dropped) else "heard"] += 1
    except Unusable as unusable:
        outcomes[unusable.reason] += 1
        named = str(unusable).startswith(name)
        if not named or "\n" in str(unusable):
            raise AssertionError(f"{name} was refused so: {unusable}") from unusable
    except Exception as error:
        raise AssertionError(f"{name} was not refused") from error


def peak_mib() -> float:
    """The most memory this process has held. Linux passes a parent's `ru_maxrss` on, so it is not asked."""
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def forbid_more_memory() -> None:
    """From here on this process gets 256 MiB more at most, even of memory that it never touches."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MAX_MORE_MIB * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(count: int, seed: int) -> None:
    """Ingest that many files and print what became of them, and how far memory rose above whole files'."""
    outcomes: Counter[str] = Counter()
    for name, content in whole_files(seed).items():
        ingest_one(content, name, Counter())
    before_mib = peak_mib()
    forbid_more_memory()
    with tempfile.NamedTemporaryFile() as file:
        for number, (name, content) in enumerate(broken_files(count, seed)):
            source: bytes | Path = content
            if number // len(WAYS) % 2:
                source = Path(file.name)
                source.write_bytes(content)
            ingest_one(source, name, outcomes)
    print(json.dumps({"outcomes": dict(outcomes), "memory_mib": round(peak_mib() - before_mib, 1)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
