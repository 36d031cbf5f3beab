"""The verbs of `omni` that need a model, in this process. `flows/cli.py` hands over to them lazily."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from omni_model.artifacts import GptCheckpoint, TokenizerFiles
from omni_model.audio.readout import Heard
from omni_model.audio.readout import listen as hear
from omni_model.config import BadInput

PICTURE_COLUMNS = 100


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
