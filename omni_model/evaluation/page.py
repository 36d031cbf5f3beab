"""Building blocks of a self-contained HTML page: nothing in it points outside, and it needs no script.

Pictures and sounds travel inside the page as data URIs. Everything that comes from data is escaped here, so
the callers pass plain text.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from omni_model.evaluation.charts import percent, waveform

PROVENANCE = "<!-- run provenance -->"
FULL_SCALE = 32768  # of 16-bit PCM


def page(title: str, sections: Sequence[str]) -> str:
    """A whole document; the one comment before its last section is where a run's table may be put."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join([*sections[:-1], PROVENANCE, sections[-1]])
        + "\n</body>\n</html>\n"
    )


def section(title: str, lead: str, body: str) -> str:
    """A headed part of the page; `body` is HTML."""
    return f'<section>\n<h2>{escape(title)}</h2>\n<p class="lead">{escape(lead)}</p>\n{body}\n</section>'


def hero(title: str, *, number: str, unit: str, beside: str, meaning: str, why: str, below: str) -> str:
    """The top of the page: one number, one sentence that says what it means, one that says why."""
    return (
        f'<header class="hero">\n<h1>{escape(title)}</h1>\n<div class="figure">'
        f'<span class="number">{escape(number)}<small> {escape(unit)}</small></span>'
        f'<span class="beside">{escape(beside)}</span></div>\n'
        f'<p class="meaning">{escape(meaning)}</p>\n<p class="why">{escape(why)}</p>\n{below}\n</header>'
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A row of small figures with their names."""
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{cells}</dl>'


def card(title: str, aside: str, body: str, name: str = "") -> str:
    """A box with a heading and a remark at its right; `body` is HTML."""
    return (
        f'<article class="card {name}"><h3>{escape(title)}<span>{escape(aside)}</span></h3>{body}</article>'
    )


def grid(cards: Iterable[str], *, wide: bool = False) -> str:
    """Boxes side by side where the screen is wide enough."""
    return f'<div class="grid{" wide" if wide else ""}">\n' + "\n".join(cards) + "\n</div>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colour keys: (CSS name after `key-`, words)."""
    parts = "".join(f'<li><i class="key-{name}"></i>{escape(words)}</li>' for name, words in entries)
    return f'<ul class="legend">{parts}</ul>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers_from: int = 1) -> str:
    """A table whose columns from `numbers_from` on are right-aligned."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if column >= numbers_from else ''}>{escape(value)}</{tag}>"
            for column, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head = f"<thead><tr>{cells('th', header)}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def details(summary: str, body: str) -> str:
    """Something to unfold."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def data_uri(kind: str, content: bytes) -> str:
    """A file inside the page."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def player(wav: bytes, words: str) -> str:
    """The waveform and a player of a 16-bit mono WAV file. `words` must not give the answer away."""
    source = data_uri("audio/wav", wav)
    sound = f'<audio controls preload="none" aria-label="{escape(words)}" src="{source}"></audio>'
    return waveform(pcm_of(wav), words=f"Waveform of {words}") + sound


def pcm_of(wav: bytes) -> np.ndarray:
    """Samples (N,) in -1..1 of a 16-bit mono WAV file given as bytes."""
    start = wav.find(b"data")
    size = int.from_bytes(wav[start + 4 : start + 8], "little")
    body = wav[start + 8 : start + 8 + size]
    return np.frombuffer(body[: len(body) // 2 * 2], dtype="<i2").astype(np.float64) / FULL_SCALE


def option_bars(options: Sequence[tuple[str, float]], *, truth: str, picked: str) -> str:
    """The options of a question with the model's probabilities; the right and the chosen one are named."""
    rows = []
    for option, share in options:
        marks = [name for name, value in (("truth", truth), ("picked", picked)) if option == value]
        said = " (right)" if option == truth else ""
        rows.append(
            f'<li class="{" ".join(marks)}"><span>{escape(option)}{"" if option != picked else " ◂"}'
            f'</span><span class="bar"><b style="width:{100 * share:.1f}%"></b></span>'
            f'<span class="share" aria-label="{percent(share)}{said}">{100 * share:.0f} %</span></li>'
        )
    return f'<ul class="options">{"".join(rows)}</ul>'


def prose(markdown: str) -> str:
    """HTML of our cards' Markdown: `#` titles (dropped), `##` headings, paragraphs and `-` lists."""
    parts: list[str] = []
    for block in re.split(r"\n\s*\n", markdown.strip()):
        if block.startswith("## "):
            parts.append(f"</section><section><h3>{escape(block[3:])}</h3>")
        elif block.startswith("- "):
            entries = "".join(f"<li>{escape(line[2:])}</li>" for line in block.splitlines())
            parts.append(f"<ul>{entries}</ul>")
        elif not block.startswith("# "):
            parts.append(f"<p>{escape(block)}</p>")
    return f'<div class="prose"><section>{"".join(parts)}</section></div>'
