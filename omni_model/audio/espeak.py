"""The speaking helper: a small process of its own that turns phrases into sound with espeak-ng.

Run as `python -m omni_model.audio.espeak`. It reads one JSON request per line on stdin and answers each, in
order, with one frame on stdout: a status byte, a length (4 bytes, little-endian), then that many bytes. A
spoken frame is a line of JSON, `{"words": [[word, first sample], ...], "end": last sample + 1}`, and 16-bit
mono samples. The process ends when stdin closes, and therefore with the process that started it.

espeak-ng keeps hidden state: saying the same phrase twice in one process gives two different waveforms, and
some voices draw noise that is seeded by the clock. So this process initialises the library, never speaks
itself, and for each request forks a child that sets the library's random seed, speaks once and exits.
Forking is safe only in a process with one thread, hence the helper: standard library alone, no torch.

espeak-ng is GPL-3. It is an optional extra, loaded here at run time and nowhere else.
"""

import ctypes
import hashlib
import itertools
import json
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from omni_model.config import BadInput

READY, SOUND, REFUSED = 0, 1, 2
FRAME_HEADER = struct.Struct("<BI")
MISSING_EXTRA = 'Speech needs the espeak-ng synthesizer: pip install "nanochat-omni[espeak]".'

# From espeak-ng's speak_lib.h.
SYNCHRONOUS_OUTPUT = 2
CHARACTERS_UTF8 = 1
POSITION_CHARACTER = 1
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4
LIMITS = {"rate_wpm": (80, 450), "volume": (0, 200), "pitch": (0, 99), "range": (0, 99)}
LAST_EVENT, WORD_EVENT, END_EVENT = 0, 1, 5


class SynthEvent(ctypes.Structure):
    """`espeak_EVENT`: where in the text and in the sound a word begins or a clause ends."""

    _fields_: ClassVar[Any] = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),  # characters
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


SOUND_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(SynthEvent)
)


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until the stream ends. The first frame says READY with the sample rate and version."""
    try:
        library, data = load_library()
    except BadInput as error:
        send(answers, REFUSED, str(error).encode())
        return
    library.espeak_Info.restype = ctypes.c_char_p
    hello = {
        "sample_rate_hz": library.espeak_Initialize(SYNCHRONOUS_OUTPUT, 0, str(data.parent).encode(), 0),
        "version": library.espeak_Info(None).decode(),
    }
    # Else each fork would read all voice files anew to find its own: 4 of the 7 ms that a clip then costs.
    library.espeak_ListVoices(None)
    send(answers, READY, json.dumps(hello).encode())
    names = {"voice": voice_files(data / "lang"), "variant": voice_files(data / "voices" / "!v")}
    for line in requests:
        try:
            request = checked(json.loads(line), names)
            send(answers, SOUND, speak_in_child(library, request))
        except BadInput as error:
            send(answers, REFUSED, str(error).encode())


def send(answers: BinaryIO, status: int, body: bytes) -> None:
    """Write one frame."""
    answers.write(FRAME_HEADER.pack(status, len(body)) + body)
    answers.flush()


def load_library() -> tuple[ctypes.CDLL, Path]:
    """The espeak-ng library and its data directory, as the espeakng-loader package carries them.

    Raises:
        BadInput: the package is not installed or its library does not load.
    """
    try:
        import espeakng_loader
    except ImportError:
        raise BadInput(MISSING_EXTRA) from None
    try:
        library = ctypes.CDLL(espeakng_loader.get_library_path())
    except OSError as error:
        raise BadInput(f"espeak-ng does not load ({error}); reinstall the package espeakng-loader.") from None
    return library, Path(espeakng_loader.get_data_path())


def checked(request: dict[str, Any], names: dict[str, set[str]]) -> dict[str, Any]:
    """The request itself, if espeak-ng will do what it says.

    The library takes an unknown variant for no variant, and clamps numbers, without a word.

    Raises:
        BadInput: an unknown voice or variant, a number out of range, or an empty text.
    """
    for field, known in names.items():
        if request[field] not in known:
            raise BadInput(
                f"espeak-ng has no {field} {request[field]!r} (clip {request['key']}); "
                f"it has {', '.join(sorted(known)[:8])} and {len(known) - 8} more."
            )
    for field, (low, high) in LIMITS.items():
        if not low <= request[field] <= high:
            raise BadInput(f"{field} of clip {request['key']} is {request[field]}; not {low}..{high}.")
    if not request["text"].strip():
        raise BadInput(f"clip {request['key']} has no text to speak.")
    return request


def voice_files(folder: Path) -> set[str]:
    """Every voice file below `folder`, as a relative path such as `gmw/en-US` or `f3`."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def speak_in_child(library: ctypes.CDLL, request: dict[str, Any]) -> bytes:
    """Words and samples of one request, spoken by a fork that has never spoken before.

    Raises:
        BadInput: the child died or espeak-ng returned an error.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            with open(writer, "wb") as pipe:
                pipe.write(speak(library, request))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as pipe:
        spoken = pipe.read()
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise BadInput(f"espeak-ng could not speak clip {request['key']} ({request['text']!r}).")
    return spoken


def speak(library: ctypes.CDLL, request: dict[str, Any]) -> bytes:
    """Speak once; returns the body of a spoken frame. Call it in a fresh fork only."""
    chunks: list[bytes] = []
    words: list[tuple[str, int]] = []
    end = 0

    def keep(samples: Any, count: int, events: Any) -> int:
        nonlocal end
        if samples and count > 0:
            chunks.append(ctypes.string_at(samples, 2 * count))
        for event in itertools.takewhile(lambda event: event.type != LAST_EVENT, events or ()):
            if event.type == WORD_EVENT:
                first = event.text_position - 1
                words.append((request["text"][first : first + event.length], event.sample))
            elif event.type == END_EVENT:
                end = event.sample
        return 0

    callback = SOUND_CALLBACK(keep)
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(ctypes.c_long(noise_seed(request["seed"], request["key"])))
    name = f"{request['voice']}+{request['variant']}"
    if library.espeak_SetVoiceByName(name.encode()) != 0:
        raise OSError(f"espeak-ng refused the voice {name}")
    for parameter, field in ((RATE, "rate_wpm"), (VOLUME, "volume"), (PITCH, "pitch"), (RANGE, "range")):
        library.espeak_SetParameter(parameter, request[field], 0)
    text = request["text"].encode()
    failed = library.espeak_Synth(
        text, ctypes.c_size_t(len(text) + 1), 0, POSITION_CHARACTER, 0, CHARACTERS_UTF8, None, None
    )
    if failed:
        raise OSError(f"espeak_Synth returned {failed}")
    if not words or not chunks:
        raise OSError(f"espeak-ng found no word in {request['text']!r}")
    return json.dumps({"words": words, "end": end}).encode() + b"\n" + b"".join(chunks)


def noise_seed(seed: int, key: str) -> int:
    """A 31-bit seed for the library's noise, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:4], "little") >> 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver; closing stdin ends the helper
    serve(sys.stdin.buffer, sys.stdout.buffer)
