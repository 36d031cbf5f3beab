"""What an IndexTTS 2 server is asked: the JSON of `POST /tts_url`, which answers with a WAV file.

The authors publish no HTTP server; this is the protocol of the vLLM one that most people run. An emotion is
a vector of eight weights. How strongly `emo_weight` acts on it differs (the authors' own code multiplies
them, the vLLM server ignores it), so the strength goes into the vector and the weight is always 1.
"""

from omni_model.audio.tts_exchange import Request
from omni_model.config import JSON, BadInput, IndexTtsRecipe, SpokenLine
from omni_model.config.sound import EMOTIONS

AS_THE_VOICE, BY_VECTOR = 0, 2  # emo_control_method
MAX_EMOTION_WEIGHT = 0.8  # beyond it the authors' program refuses, or scales down by itself


def check(recipe: IndexTtsRecipe) -> None:
    """Refuse what the server could not do.

    Raises:
        BadInput: no voice, or an emotion out of range.
    """
    if not recipe.voices:
        raise BadInput(
            "indextts has no voices; name recordings on the server's disk with "
            "--set indextts.voices=examples/voice_01.wav"
        )
    if recipe.emotion_weight > MAX_EMOTION_WEIGHT:
        raise BadInput(f"indextts.emotion_weight is {recipe.emotion_weight}; at most {MAX_EMOTION_WEIGHT}.")


def request(voice: str, line: SpokenLine, emotion_weight: float) -> Request:
    """The JSON to send; `voice` is a path on the server's disk."""
    weights: list[JSON] = [emotion_weight if emotion == line.style else 0.0 for emotion in EMOTIONS]
    fields: dict[str, JSON] = {
        "text": line.text,
        "spk_audio_path": voice,
        "emo_control_method": BY_VECTOR if line.style else AS_THE_VOICE,
        "emo_vec": weights,
        "emo_weight": 1.0,
        "emo_random": False,
    }
    return Request("/tts_url", line.text, fields, as_json=True)
