"""One sentence to a text-to-speech server and back: asked, asked again where that may help, and judged.

Servers fail quietly. A synthesis that breaks half-way has already sent status 200, and what follows is a
short stream; some send an error as JSON or a page where sound should be; samples beyond full scale wrap
around when they become 16-bit numbers; a language model that loses its thread babbles on or stops early. So
a reply is believed only if it reads as sound and lasts as long as its text could take to say.
"""

import io
import json
import re
import time
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from omni_model.audio.unusable import Unusable
from omni_model.audio.waveform import SAMPLE_RATE_HZ, decode, encode_wav
from omni_model.config import JSON, BadInput

if TYPE_CHECKING:
    import httpx

RETRY_PAUSES_S = (1.0, 4.0, 15.0)  # between four attempts
REPLY_TIMEOUT_S = 300.0  # a slow card may speak slower than real time
CONNECT_TIMEOUT_S = 10.0
MAX_REPLY_BYTES = 64 * 2**20
PASSING_STATUSES = (408, 425, 429)  # these and 500 or more may pass; at any other, asking again is idle

# What any speaker does: fast newsreaders stay below 20 letters a second, slow ones above 5.
MAX_LETTERS_PER_S = 25.0
MIN_LETTERS_PER_S = 3.0
PAUSES_S = 2.0  # silence that may surround the shortest sentence
LETTERS_PER_SYLLABLE_SIGN = 4  # a Chinese character, a kana or a digit is a syllable or more
WRAP_JUMP = 49_152  # three quarters of the 16-bit range between two samples: no voice does that
ERROR_CHARACTERS = 200


class NotSpoken(Exception):
    """A clip that could not be had. `reason` is a few words that can be counted; the rest is for the log."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class ServerFailed(RuntimeError):
    """The server is gone, or fails too often to go on."""


@dataclass(frozen=True)
class Request:
    """One sentence as it goes over the wire.

    Attributes:
        path: endpoint below the server's address.
        fields: what is sent; together with `recording` it decides the reply as far as anything does.
        recording: a WAV file to clone the voice of, sent as `prompt_wav`; empty for none.
        as_json: whether the fields travel as JSON or as a form.
        rate_hz: sample rate of a reply without a header; 0 if the reply is a WAV file.
    """

    path: str
    text: str
    fields: Mapping[str, JSON]
    recording: bytes = b""
    as_json: bool = False
    rate_hz: int = 0


class Server:
    """A text-to-speech server, for as long as the `with` block lasts; not connected to before it is asked.

    Args:
        name: what people call it.
        setting: the recipe's field that holds its address, for errors.
        health: path that answers 200 once the model is loaded; empty if there is none.
    """

    def __init__(self, name: str, url: str, setting: str, health: str = "") -> None:
        if not re.fullmatch(r"https?://[^\s/:]+(:\d+)?(/\S*)?", url):
            raise BadInput(f"{setting} {url!r} is no address; write it like http://127.0.0.1:50000")
        self.name, self.url, self._setting, self._health = name, url.rstrip("/"), setting, health
        self._client: httpx.Client | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()

    def speak(self, request: Request) -> bytes:
        """A 16 kHz mono 16-bit WAV file of the sentence, asked for up to four times.

        Raises:
            NotSpoken: no attempt gave a usable reply; the last one's reason.
            ServerFailed: nobody listens at the address (any more).
            BadInput: the server does not know such a request.
        """
        for pause_s in (*RETRY_PAUSES_S, None):
            try:
                return judged(self._ask(request), request)
            except (NotSpoken, ServerFailed):
                if pause_s is None:
                    raise
                time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")

    def _ask(self, request: Request) -> bytes:
        if request.as_json:
            content: dict[str, Any] = {"json": dict(request.fields)}
        else:
            content = {"data": dict(request.fields)}
        if request.recording:
            content["files"] = {"prompt_wav": ("prompt.wav", request.recording, "audio/wav")}
        if self._client is None:
            import httpx

            timeout = httpx.Timeout(REPLY_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
            client = httpx.Client(timeout=timeout, trust_env=False)
            try:
                if self._health:
                    self._exchange(client, "GET", self._health, {}, missing_is_fine=True)
            except BaseException:
                client.close()
                raise
            self._client = client
        return self._exchange(self._client, "POST", request.path, content)

    def _exchange(
        self,
        client: "httpx.Client",
        method: str,
        path: str,
        content: dict[str, Any],
        *,
        missing_is_fine: bool = False,
    ) -> bytes:
        import httpx

        deadline = time.monotonic() + REPLY_TIMEOUT_S
        body = bytearray()
        try:
            with client.stream(method, f"{self.url}{path}", **content) as response:
                for part in response.iter_bytes():
                    body += part
                    if time.monotonic() > deadline:
                        raise NotSpoken("no reply in time", f"{len(body)} bytes in {REPLY_TIMEOUT_S:.0f} s")
                    if len(body) > MAX_REPLY_BYTES:
                        raise NotSpoken("an endless reply", f"over {MAX_REPLY_BYTES} bytes")
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ServerFailed(
                f"no {self.name} server answers at {self.url} ({error}); start it, or give its address "
                f"with --set {self._setting}=URL, and run again: the clips that it has spoken are kept"
            ) from None
        except httpx.TimeoutException:
            raise NotSpoken("no reply in time", f"over {REPLY_TIMEOUT_S:.0f} s") from None
        except httpx.RequestError as error:
            raise NotSpoken("the connection was cut", str(error)) from None
        if response.status_code == 200 or (missing_is_fine and response.status_code == 404):
            return bytes(body)
        detail = error_text(bytes(body)) or "without a word"
        if response.status_code < 500 and response.status_code not in PASSING_STATUSES:
            raise BadInput(
                f"{self.url}{path} answers {response.status_code} ({detail}); check that it is a "
                f"{self.name} server of the recipe's version"
            )
        raise NotSpoken(f"HTTP status {response.status_code}", detail)


def judged(reply: bytes, request: Request) -> bytes:
    """The reply as a 16 kHz mono 16-bit WAV file, if it can be what was asked for.

    Raises:
        NotSpoken: it is empty, an error, damaged, silent, wrapped, or of an impossible length.
    """
    if not reply:
        raise NotSpoken("an empty reply", "the server's own log says why")
    if error := error_text(reply):
        raise NotSpoken("an error instead of sound", error)
    if reply[:4] != b"RIFF":
        if not request.rate_hz:
            raise NotSpoken("no WAV file", f"it begins with {reply[:8]!r}")
        reply = with_header(reply, request.rate_hz)
    try:
        samples = decode(reply, "the reply")
    except Unusable as error:
        raise NotSpoken(error.reason, str(error)) from None
    duration_s, letters = len(samples) / SAMPLE_RATE_HZ, spoken_letters(request.text)
    what = f"{duration_s:.2f} s for {letters} letters"
    if duration_s < letters / MAX_LETTERS_PER_S:
        raise NotSpoken("too short for its text", what)
    if duration_s > letters / MIN_LETTERS_PER_S + PAUSES_S:
        raise NotSpoken("too long for its text", what)
    return encode_wav(samples)


def with_header(pcm: bytes, rate_hz: int) -> bytes:
    """Headerless 16-bit little-endian mono samples as a WAV file.

    Raises:
        NotSpoken: half a sample at the end, or samples that wrapped around.
    """
    if len(pcm) % 2:
        raise NotSpoken("an odd number of bytes", f"{len(pcm)} bytes of 16-bit samples")
    if wraps := num_wraps(np.frombuffer(pcm, "<i2")):
        raise NotSpoken("wrapped peaks", f"{wraps} jumps across the range")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        file.writeframes(pcm)
    return buffer.getvalue()


def num_wraps(pcm: np.ndarray) -> int:
    """How often int16 samples (N,) leap across most of the range, as a peak beyond full scale does twice.

    x * 2**15 as a 16-bit number turns 1.01 into -0.99. The steepest natural step, of a full-scale tone at a
    quarter of the sample rate, is three quarters of that.
    """
    return int((np.abs(np.diff(pcm.astype(np.int32))) > WRAP_JUMP).sum())


def spoken_letters(text: str) -> int:
    """About how many letters are spoken: markup aside, and signs that stand for syllables counted as such."""
    plain = re.sub(r"<[^>]*>|\[[a-z]+\]", "", text)
    signs = len(re.findall(r"[0-9\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", plain))
    letters = sum(character.isalpha() for character in plain)
    digits = sum(character.isdigit() and character.isascii() for character in plain)
    return letters + digits + (LETTERS_PER_SYLLABLE_SIGN - 1) * signs


def error_text(reply: bytes) -> str:
    """What a reply says if it is text, in one line; "" if it is no text (sound never is)."""
    try:
        text = reply.decode()
    except UnicodeDecodeError:
        return ""
    if not text.strip() or "\0" in text:
        return ""
    try:
        found = json.loads(text)
        text = str(next(found[name] for name in ("error", "detail", "message") if name in found))
    except (ValueError, TypeError, StopIteration):
        text = re.sub(r"<[^>]*>", " ", text)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return lines[-1][-ERROR_CHARACTERS:] if lines else "an empty page"  # a traceback ends with its reason
