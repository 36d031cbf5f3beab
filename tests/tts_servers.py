"""Text-to-speech servers of our own on loopback, with the wire manners of the real ones.

Each reply sounds different, as a sampling model's does: a clip that comes out the same was not asked for
twice. A text is spoken as a buzz of `PITCH_HZ` that lasts as long as the text; `fault` decides for each
request how it goes wrong.
"""

import contextlib
import email.parser
import email.policy
import io
import json
import threading
import urllib.parse
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

PITCH_HZ = 220.0
LETTERS_PER_S = 14.0
FORMS = {
    "/inference_sft": {"tts_text", "spk_id"},
    "/inference_zero_shot": {"tts_text", "prompt_text", "prompt_wav"},
    "/inference_cross_lingual": {"tts_text", "prompt_wav"},
    "/inference_instruct": {"tts_text", "spk_id", "instruct_text"},
    "/inference_instruct2": {"tts_text", "instruct_text", "prompt_wav"},
}


@dataclass
class TtsServer:
    """What the server was asked, what it replied, and how it is to fail.

    Attributes:
        fault: (number of the request, its fields) -> name of a fault, or "".
        replies: text -> every whole sound it was spoken as.
    """

    version: str = "2"
    speakers: tuple[str, ...] = ("anna", "boris")
    fault: Callable[[int, dict[str, Any]], str] = lambda number, fields: ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    replies: list[np.ndarray] = field(default_factory=list)
    healthy: bool = True
    url: str = ""

    @property
    def rate_hz(self) -> int:
        return 22_050 if self.version == "1" else 24_000

    def speak(self, text: str, number: int, rate_hz: int) -> np.ndarray:
        """int16 samples (N,): a buzz of overtones under some noise that is never the same twice."""
        seconds = max(0.4, sum(character.isalnum() for character in text) / LETTERS_PER_S)
        time_s = np.arange(round(seconds * rate_hz)) / rate_hz
        buzz = sum(np.sin(2 * np.pi * PITCH_HZ * n * time_s) / n for n in (1, 2, 3))
        noise = np.random.default_rng(number).standard_normal(len(time_s))
        samples = (0.2 * buzz + 0.01 * noise) * 2**15
        return samples.astype(np.int16)


class Handler(BaseHTTPRequestHandler):
    """What both servers share: HTTP/1.1, plain errors, and the faults that any server may show."""

    protocol_version = "HTTP/1.1"
    tts: TtsServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Quiet."""

    def reply(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def reply_json(self, status: int, value: Any) -> None:
        self.reply(status, "application/json", json.dumps(value).encode())

    def stream(self, body: bytes, *, ends: bool = True) -> None:
        """Chunked, no content type; a stream that does not end is cut off as uvicorn cuts it."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for start in range(0, len(body), 16_000):
            part = body[start : start + 16_000]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        if ends:
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def note(self, fields: dict[str, Any]) -> tuple[int, str]:
        self.tts.asked.append({"path": self.path, **fields})
        number = len(self.tts.asked)
        return number, self.tts.fault(number, fields)

    def common_fault(self, fault: str) -> bool:
        """Whether the request is done with."""
        if fault == "500":
            self.reply(500, "text/plain; charset=utf-8", b"Internal Server Error")
        elif fault == "page":
            self.reply(200, "text/html", b"<html><body><h1>Bad gateway</h1></body></html>")
        elif fault == "json":
            self.reply_json(200, {"status": "error", "error": "Traceback\nRuntimeError: CUDA out of memory"})
        elif fault == "hang":
            threading.Event().wait(3)
        elif fault == "block":
            threading.Event().wait(60)
        elif fault == "drop":
            self.close_connection = True
        else:
            return False
        return True


class CosyVoiceHandler(Handler):
    """`runtime/python/fastapi/server.py`."""

    def do_POST(self) -> None:
        body, fields = self.body(), {}
        kind = self.headers.get("Content-Type", "")
        if kind.startswith("multipart/form-data"):
            head = f"Content-Type: {kind}\r\n\r\n".encode()
            message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + body)
            for part in message.iter_parts():
                name = part.get_param("name", header="content-disposition")
                content = part.get_payload(decode=True)
                is_file = part.get_filename() is not None
                fields[str(name)] = content if is_file else content.decode()
        elif kind == "application/x-www-form-urlencoded":
            fields = dict(urllib.parse.parse_qsl(body.decode()))
        if self.path not in FORMS:
            return self.reply_json(404, {"detail": "Not Found"})
        if missing := FORMS[self.path] - set(fields):
            detail = [{"type": "missing", "loc": ["body", name], "msg": "Field required"} for name in missing]
            return self.reply_json(422, {"detail": detail})
        number, fault = self.note(fields)
        if self.common_fault(fault):
            return None
        return self.synthesize(fields, number, fault)

    def synthesize(self, fields: dict[str, Any], number: int, fault: str) -> None:
        tts = self.tts
        marked = "<|endofprompt|>" in str(fields)
        if ("spk_id" in fields and fields["spk_id"] not in tts.speakers) or (
            tts.version == "3" and "prompt_wav" in fields and not marked
        ):
            return self.stream(b"", ends=False)  # raised after the status had been sent
        if "prompt_wav" in fields:
            with wave.open(io.BytesIO(fields["prompt_wav"])) as file:
                assert file.getframerate() >= 16_000
        text = fields["tts_text"].split("<|endofprompt|>")[-1]
        samples = tts.speak(text, number, tts.rate_hz)
        if fault == "wrapped":
            samples = (samples.astype(np.float64) * 4).astype(np.int64).astype(np.int16)
        if fault in ("short", "cut"):
            samples = samples[: len(samples) // 4]
        if fault == "babble":
            samples = np.tile(samples, 12)
        if fault == "silent":
            samples = np.zeros_like(samples)
        tts.replies.append(samples)
        content = samples.astype("<i2").tobytes() + (b"\1" if fault == "odd" else b"")
        return self.stream(b"" if fault == "empty" else content, ends=fault != "cut")


class IndexTtsHandler(Handler):
    """The FastAPI server of the vLLM forks; their older versions sent errors with status 200."""

    def do_GET(self) -> None:
        if self.path != "/health":
            return self.reply_json(404, {"detail": "Not Found"})
        if not self.tts.healthy:
            return self.reply_json(503, {"status": "unhealthy", "message": "TTS model not initialized"})
        return self.reply_json(200, {"status": "healthy", "message": "Service is running"})

    def do_POST(self) -> None:
        body = self.body()
        if self.path != "/tts_url":
            return self.reply_json(404, {"detail": "Not Found"})
        fields = json.loads(body)
        number, fault = self.note(fields)
        if self.common_fault(fault):
            return None
        vector = fields.get("emo_vec", [0] * 8)
        if fields.get("emo_control_method", 0) == 2 and sum(vector) > 1.5:
            return self.reply_json(500, {"status": "error", "error": "the emotion vector sums to over 1.5"})
        if fields["spk_audio_path"] not in self.tts.speakers:
            trace = "Traceback (most recent call last):\nFileNotFoundError: " + fields["spk_audio_path"]
            return self.reply_json(500, {"status": "error", "error": trace})
        samples = self.tts.speak(fields["text"], number, 22_050)
        self.tts.replies.append(samples)
        buffer = io.BytesIO()
        with wave.open(buffer, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(22_050)
            file.writeframes(samples.astype("<i2").tobytes())
        content = buffer.getvalue()
        return self.reply(200, "audio/wav", content[: len(content) // 2] if fault == "half" else content)


@contextlib.contextmanager
def serving(handler: type[Handler], tts: TtsServer) -> Iterator[TtsServer]:
    """Serve on a free port of loopback until the block ends."""
    bound = type("Bound", (handler,), {"tts": tts})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads, server.block_on_close = True, False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    tts.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield tts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
