"""What a CosyVoice server is asked, by its own `runtime/python/fastapi/server.py`.

Five endpoints take forms; each voice and line decides which one is used:

| voice | no emotion asked for | an emotion |
|---|---|---|
| one of the server's own speakers (`spk_id`) | `sft` | `instruct` (version 1) |
| cloned from a recording (`prompt_wav`) whose words are known | `zero_shot` | `instruct2` (2 and 3) |
| cloned, words unknown | `cross_lingual` | `instruct2` (2 and 3) |

The answer is a stream of 16-bit samples without a header. The protocol takes no seed, no speed and no rate.
Instructions end with a marker that version 3 insists on; its model was also taught to see a sentence about
an assistant in front of them.
"""

from dataclasses import dataclass
from pathlib import Path

from omni_model.audio.tts_exchange import Request
from omni_model.config import BadInput, CosyVoiceRecipe, SpokenLine

RATES_HZ = {"1": 22_050, "2": 24_000, "3": 24_000}
END_OF_PROMPT = "<|endofprompt|>"
ASSISTANT = "You are a helpful assistant."  # version 3 knows its instructions by this beginning
PROMPT_RATE_HZ, PROMPT_MAX_S = 16_000, 30.0  # the server asserts both


@dataclass(frozen=True)
class Voice:
    """A speaker of the server's, or one cloned from the bytes of a recording and what it says."""

    name: str
    recording: bytes = b""
    words: str = ""


def voices(recipe: CosyVoiceRecipe) -> list[Voice]:
    """The recipe's voices, or one for each recording in its script folder if it names none.

    Raises:
        BadInput: no voice at all, or a recording that the server would refuse.
    """
    folder = Path(recipe.script.path) if recipe.script.path else None
    names = recipe.voices or tuple(sorted(path.stem for path in folder.glob("*.wav")) if folder else ())
    if not names:
        raise BadInput(
            "cosyvoice has no voices; name some of the server's speakers with --set cosyvoice.voices=A,B, "
            "or a folder of recordings to clone with --set cosyvoice.script.path=DIR"
        )
    return [_voice(name, folder) for name in names]


def _voice(name: str, folder: Path | None) -> Voice:
    recording = folder / f"{name}.wav" if folder else None
    if recording is None or not recording.exists():
        return Voice(name)
    import soundfile

    try:
        header = soundfile.info(str(recording))
    except soundfile.LibsndfileError as error:
        raise BadInput(f"{recording} cannot be read as audio ({error.error_string.rstrip('.')}).") from None
    if header.samplerate < PROMPT_RATE_HZ or not 0 < header.duration <= PROMPT_MAX_S:
        raise BadInput(
            f"{recording} has {header.duration:.1f} s at {header.samplerate} Hz; a voice is cloned from at "
            f"most {PROMPT_MAX_S:.0f} s at {PROMPT_RATE_HZ} Hz or more."
        )
    words = recording.with_suffix(".txt")
    return Voice(name, recording.read_bytes(), words.read_text("utf-8").strip() if words.exists() else "")


def can_emote(voice: Voice, version: str) -> bool:
    """Whether this voice can be told an emotion: a speaker of version 1, or any that is cloned later."""
    return version == "1" if not voice.recording else version != "1"


def request(voice: Voice, line: SpokenLine, version: str) -> Request:
    """The form to send.

    Raises:
        BadInput: an emotion for a voice that cannot be told one.
    """
    if line.style and not can_emote(voice, version):
        raise BadInput(
            f"the line {line.text!r} asks the voice {voice.name} for {line.style!r}, but a CosyVoice "
            f"{version} server takes emotions only for "
            + ("its own speakers." if version == "1" else "voices cloned from a recording.")
        )
    fields = {"tts_text": line.text}
    if not voice.recording:
        path = "/inference_instruct" if line.style else "/inference_sft"
        fields["spk_id"] = voice.name
    elif line.style:
        path = "/inference_instruct2"
    elif voice.words:
        path = "/inference_zero_shot"
        fields["prompt_text"] = f"{ASSISTANT}{END_OF_PROMPT}{voice.words}" if version == "3" else voice.words
    else:
        path = "/inference_cross_lingual"
        if version == "3":
            fields["tts_text"] = f"{ASSISTANT}{END_OF_PROMPT}{line.text}"
    if line.style:
        instruction = f"Please speak like someone who is very {line.style}.{END_OF_PROMPT}"
        fields["instruct_text"] = f"{ASSISTANT} {instruction}" if version == "3" else instruction
    return Request(path, line.text, fields, voice.recording, rate_hz=RATES_HZ[version])
