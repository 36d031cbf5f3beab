"""The verbs of `omni` that need a model, in this process. `flows/cli.py` hands over to them lazily."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from omni_model.artifacts import (
    AdapterCheckpoint,
    EncoderFiles,
    Familiarity,
    GptCheckpoint,
    TokenizerFiles,
)
from omni_model.audio.readout import Heard
from omni_model.audio.readout import listen as hear
from omni_model.config import BadInput, FeatureRecipe

if TYPE_CHECKING:
    from rich.console import Console

    from omni_model.serving.engine import Engine
    from omni_model.serving.talk import Talk

PICTURE_COLUMNS = 100
UNPRINTABLE = "\ufffd"
HELP = """Write something and press Enter. Ctrl-C stops an answer; pressed again it leaves.
/new   begin a new conversation
/back  take back the last question and its answer
/quit  leave"""


def listen(file: Path, *, as_json: bool, png: Path | None) -> None:
    """Print what is heard in an audio file before any model, with a small picture; `png` gets a large one.

    Raises:
        BadInput: the file cannot be heard, or there is no place for the picture.
    """
    if png and (png.suffix.lower() != ".png" or not png.parent.is_dir() or png.is_dir()):
        raise BadInput(f"{png} cannot be a picture; name a .png file in a directory that is there")
    heard, samples = hear(file)
    if png:
        from omni_model.audio import picture

        png.write_bytes(picture.png(samples))
    if as_json:
        drawn = {"picture": str(png)} if png else {}
        print(json.dumps({"file": str(file)} | dataclasses.asdict(heard) | drawn, indent=1))
        return
    _show(heard, samples, _printable(file.name))
    if png:
        print(f"picture: {_printable(str(png))}")


def _show(heard: Heard, samples: np.ndarray, name: str) -> None:
    """A picture in colour where a terminal has it, in plain shades elsewhere, between what was measured."""
    from rich.console import Console
    from rich.text import Text

    from omni_model.audio.picture import TERMINAL_BANDS, brightness, coloured, plain

    console = Console(highlight=False, soft_wrap=True)
    drawing = brightness(samples, min(console.width - 1, PICTURE_COLUMNS), TERMINAL_BANDS)
    has_colours = console.is_terminal and console.color_system in ("256", "truecolor")
    console.print(Text(f"{name}: {_summary(heard)}\n", style="bold"))
    console.print(coloured(drawing) if has_colours else Text(plain(drawing)))
    console.print(Text("0 s" + f"{heard.duration_s:.1f} s\n".rjust(drawing.shape[1] - 2), style="dim"))
    for what, words in _measured(heard):
        console.print(Text.assemble((f"{what:<8}", "cyan"), words))
    for warning in heard.warnings:
        console.print(Text(f"! {warning}", style="yellow"))


def _printable(name: str) -> str:
    """A file's name without what would confuse a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _summary(heard: Heard) -> str:
    channels = "mono" if heard.num_channels == 1 else f"{heard.num_channels} channels"
    what = "sounds like speech" if heard.is_speech else "does not sound like speech"
    return f"{heard.duration_s:,.2f} s, {heard.format.upper()}, {heard.rate_hz:,} Hz, {channels}; {what}"


def _measured(heard: Heard) -> Iterator[tuple[str, str]]:
    yield (
        "level",
        f"{heard.sounding_dbfs:.1f} dB of full scale where it sounds, {heard.rms_dbfs:.1f} in all, "
        f"peak {heard.peak_dbfs:.1f}",
    )
    yield "noise", f"{heard.snr_db:.0f} dB below it" if heard.snr_db > 0 else "all of it is steady noise"
    if pitch := heard.pitch:
        yield (
            "pitch",
            f"{pitch.median_hz:,.0f} Hz, from {pitch.low_hz:,.0f} to {pitch.high_hz:,.0f} "
            f"({pitch.range_semitones:.1f} semitones); {100 * heard.voiced_share:.0f} % voiced",
        )
    else:
        yield "pitch", "none"
    onsets = "onset" if heard.num_onsets == 1 else "onsets"
    yield "pace", f"{heard.num_onsets} {onsets}, {heard.pace_hz:.1f} a second"
    yield "band", f"up to {heard.bandwidth_hz:,} Hz"


def export_nanochat(gpt: GptCheckpoint, tokenizer: TokenizerFiles | None, out: Path) -> list[Path]:
    """Write `out` as nanochat's base directory: `base_checkpoints/dN/` and, with a tokenizer, `tokenizer/`.

    Everything is built beside `out` and renamed: either all of it is there or nothing.

    Returns the files written.

    Raises:
        BadInput: `out` is there and not empty, or nanochat's files cannot say what is to be exported.
    """
    from omni_model.model.nanochat_files import write_checkpoint  # with torch, which listening can do without

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is there already; name a new or empty directory")
    if tokenizer is not None and tokenizer.vocab_size != gpt.vocab_size:
        raise BadInput(
            f"the GPT in {gpt.uri} has {gpt.vocab_size} tokens and the tokenizer in {tokenizer.uri} "
            f"{tokenizer.vocab_size}; export those that were trained together"
        )
    building = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    building.mkdir(parents=True)
    try:
        if tokenizer is not None:
            _write_tokenizer(tokenizer, building / "tokenizer")
        write_checkpoint(gpt.out, building)
        os.replace(building, out)
    except BaseException:
        shutil.rmtree(building)
        raise
    return sorted(path for path in out.rglob("*") if path.is_file())


def _write_tokenizer(tokenizer: TokenizerFiles, directory: Path) -> None:
    from omni_model.model.nanochat_files import write_token_bytes
    from omni_model.text.nanochat_tokenizer import pickle_ranks, ranks_of
    from omni_model.text.tokenizer import SPECIAL_TOKENS

    ranks = ranks_of(tokenizer.out)
    directory.mkdir()
    (directory / "tokenizer.pkl").write_bytes(pickle_ranks(ranks))
    num_bytes = [len(token) for token in sorted(ranks, key=lambda token: ranks[token])]
    write_token_bytes(num_bytes + [0] * len(SPECIAL_TOKENS), directory / "token_bytes.pt")


def score(
    place: Path,
    question: str | None,
    options: Sequence[str],
    *,
    as_json: bool,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    encoder: EncoderFiles,
    features: FeatureRecipe,
    familiarity: Familiarity | None,
) -> None:
    """Print what a listener answers about a recording, or about every recording in a folder, and how sure.

    Raises:
        BadInput: nothing to hear or to ask, or parts that were not made for each other.
    """
    from omni_model.evaluation import score_files, score_in_words

    parts = score_files.Parts(gpt, adapter, tokenizer, encoder, features, familiarity)
    told = score_files.score(parts, place, question, options)
    print(score_in_words.as_json(told) if as_json else score_in_words.in_words(told))


# --- chat ----------------------------------------------------------------------------------------


def chat(
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    *,
    prompt: str | None,
    temperature: float,
    top_k: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Talk with a model in the terminal; with `prompt` print its answer alone, or as JSON how long it is too.

    Raises:
        BadInput: model, tokenizer and settings do not go together, or the prompt is empty or too long.
    """
    if prompt is None and as_json:
        raise BadInput("--json prints one answer; say with --prompt what is to be answered")
    if prompt is not None and not prompt.strip():
        raise BadInput("--prompt is empty; say what is to be answered")
    from omni_model.serving.sampling import Sampling
    from omni_model.serving.talk import Talk, spoken

    try:
        talk = Talk(_engine(gpt, tokenizer), Sampling(temperature, top_k, seed))
    except ValueError as error:
        raise BadInput(str(error)) from None
    if prompt is None:
        _talk_in_terminal(talk)
        return
    words = (text for text, is_tool in spoken(talk.ask(prompt), talk.tokenizer) if not is_tool)
    if as_json:
        answer = "".join(words)
        print(json.dumps({"answer": answer, "tokens": talk.num_tokens, "stopped": talk.stopped}))
        return
    for text in words:
        print(_safe(text), end="", flush=True)
    print()


def _engine(gpt: GptCheckpoint, tokenizer: TokenizerFiles) -> "Engine":
    """On this machine's card, where it has one."""
    from omni_model import hardware
    from omni_model.model.weights import load_gpt
    from omni_model.serving.engine import Engine
    from omni_model.text.tokenizer import load_tokenizer

    device = hardware.device()
    model = load_gpt(gpt.out, hardware.compute_dtype(device))
    return Engine(model.to(device).eval(), load_tokenizer(tokenizer.out))


def _safe(text: str) -> str:
    """A model's words without what would steer a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else UNPRINTABLE for letter in text)


def _talk_in_terminal(talk: "Talk") -> None:
    """Questions from standard input, a line each, until it ends; prompts and hints only where a person is."""
    from rich.console import Console

    console = Console(highlight=False)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() lets a line be edited from now on
        console.out(
            f"{talk.engine.gpt.num_params():,} parameters, {talk.capacity:,} tokens; /help", style="dim"
        )
    with contextlib.suppress(KeyboardInterrupt):
        while (line := _next_line()) != "/quit":
            if line.startswith("/"):
                console.out(_obey(talk, line), style="dim")
            elif line:
                _answer(talk, line, console)


def _obey(talk: "Talk", command: str) -> str:
    """Do what a command says; returns what to tell."""
    if command == "/help":
        return HELP
    if command == "/new":
        talk.begin()
        return "a new conversation"
    if command == "/back":
        return "taken back" if talk.go_back() else "there is nothing to take back"
    return f"{_printable(command)} is no command; /help lists them"


def _next_line() -> str:
    """What is said next; at the end of the input, or where Ctrl-C was pressed, /quit."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        if sys.stdin.isatty():
            print()
        return "/quit"


def _answer(talk: "Talk", question: str, console: "Console") -> None:
    """Print the answer as it comes, tool calls in a fainter hand."""
    from omni_model.serving.talk import spoken

    if talk.is_full(question):
        console.out("the conversation is full; a new one begins", style="dim")
        talk.begin()
    with _stoppable() as pressed:

        def tokens() -> Iterator[int]:
            for token in talk.ask(question):
                yield token
                if pressed.is_set():
                    return

        try:
            for text, is_tool in spoken(tokens(), talk.tokenizer):
                console.out(_safe(text), end="", style="dim" if is_tool else None)
        except BadInput as error:
            console.out(str(error), style="yellow")
        else:
            console.out(
                "" if talk.stopped else " (stopped)" if pressed.is_set() else " (cut off)", style="dim"
            )


@contextlib.contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """While the block lasts Ctrl-C sets the event, so that no step is cut in two; pressed again it leaves."""
    pressed = threading.Event()

    def press(number: int, frame: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
