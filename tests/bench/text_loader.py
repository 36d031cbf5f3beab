"""Does the loader keep up? Rows of packed text beside the training that eats them, and nanochat's loader.

Two corpora, made here from a seed: *web* has documents of some 700 tokens whose words are as rare as those of
a language (Zipf), and 32,768 ids; *small* has documents of some 40 tokens and 1,024 ids. Each is met with the
model that would read it. Everybody has one thread; nanochat also the four that it ships with.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.text.corpus import write_shard
from omni_model.text.tokenizer import train_bpe
from tests.bench.gpt_sides import Shape
from tests.bench.gpt_worker import Job as TrainingJob
from tests.bench.measure import Companion, columns
from tests.bench.text_worker import Job

BAR = 20.0  # times the training rate


@dataclass(frozen=True)
class Material:
    """A corpus, and the model that reads it."""

    name: str
    documents: int
    words: int  # of the language
    document_words: float  # median
    spread: float  # of their logarithm
    vocab_size: int
    shape: Shape
    training_rows: int
    rows: int
    steps: int


TINY = Shape(sequence_len=256, vocab_size=1024, n_layer=4, n_head=4, n_kv_head=4, n_embd=128)
MATERIALS = (
    Material("web", 4_000, 60_000, 400, 0.9, 32_768, Shape(sequence_len=512), 4, 32, 12),
    Material("small", 40_000, 3_000, 22, 0.3, 1_024, TINY, 16, 16, 100),
)


@dataclass
class Contender:
    """A name, the job, and tokens a second by either clock in every round."""

    name: str
    job: Job | TrainingJob
    sha256: str = ""
    rates: dict[str, list[float]] = field(default_factory=lambda: {"wall": [], "cpu": []})

    def rate(self, clock: str) -> float:
        return statistics.median(self.rates[clock])


def measure(options: argparse.Namespace, tree: Path | None) -> list[dict[str, Any]]:
    """Print a table for each corpus; `tree` is nanochat's source."""
    records = []
    for material in MATERIALS:
        with tempfile.TemporaryDirectory() as folder:
            contenders = _contest(material, Path(folder), tree, options.rounds)
        print(_table(material, contenders), end="\n\n", flush=True)
        rows = [{**asdict(each), "name": each.name} for each in contenders]
        records.append({"title": f"loader: {material.name}", "rows": rows})
    return records


def _contest(material: Material, folder: Path, tree: Path | None, rounds: int) -> list[Contender]:
    write(material, folder)
    tokens = 2048 if material.name == "web" else 256

    def job(side: str, threads: int = 1) -> Job:
        places = str(folder / "corpus"), str(folder / "tokenizer")
        return Job(side, *places, tokens, material.rows, material.steps, threads)

    training = TrainingJob(
        "ours",
        "train",
        material.shape,
        material.training_rows,
        material.shape.sequence_len,
        precision="medium",
    )
    contenders = [
        Contender("the training step", training),
        Contender("rows from a process of its own", job("background")),
        Contender("rows made here", job("rows")),
        Contender("tokenising alone", job("tokenising")),
        Contender("tokenising alone, by tokenizers", job("tokenizers")),
        Contender("packing alone", job("packing")),
    ]
    if tree:
        contenders.append(Contender("nanochat's loader", job("nanochat")))
        contenders.append(Contender("nanochat's loader, 4 threads", job("nanochat", 4)))
    with ExitStack() as hired:
        companions = []
        for each in contenders:
            print(f"preparing {material.name}: {each.name}", file=sys.stderr)
            companions.append(_start(each, folder, tree))
            hired.callback(companions[-1].close)
            each.sha256 = companions[-1].greeting.get("sha256", "")
        streams = {each.sha256 for each in contenders if _makes_rows(each)}
        assert len(streams) == 1, "they do not make the same rows"
        for _ in range(rounds):
            for each, companion in zip(contenders, companions, strict=True):
                _note(each, companion.ask("time"))
    return contenders


def _makes_rows(contender: Contender) -> bool:
    return isinstance(contender.job, Job) and contender.job.side in ("background", "rows", "nanochat")


def _start(contender: Contender, folder: Path, tree: Path | None) -> Companion:
    job = contender.job
    environment = dict(os.environ, OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    module = "tests.bench.gpt_worker" if isinstance(job, TrainingJob) else "tests.bench.text_worker"
    if tree and isinstance(job, Job) and job.side == "nanochat":
        environment |= {
            "PYTHONPATH": str(tree),
            "NANOCHAT_BASE_DIR": str(folder),
            "NANOCHAT_DTYPE": "float32",
        }
    return Companion([sys.executable, "-m", module, json.dumps(asdict(job))], environment)


def _note(contender: Contender, answer: dict[str, Any]) -> None:
    job = contender.job
    tokens = answer["tokens"] if isinstance(job, Job) else job.rows * job.tokens
    for clock, rates in contender.rates.items():
        rates.append(tokens / answer[clock])


def _table(material: Material, contenders: list[Contender]) -> str:
    title = f"{material.name}: V {material.vocab_size}, training {material.shape.n_layer} layers"
    lines: list[Sequence[str]] = [
        (f"  {title}", "tokens/s", "min", "max", "by CPU", "x training", "by CPU", "bar")
    ]
    first = contenders[0]
    for each in contenders:
        # A process that waits for another one's rows takes no CPU time worth telling.
        own = isinstance(each.job, TrainingJob) or each.job.side != "background"
        lines.append(
            (
                each.name,
                *(f"{rate:,.0f}" for rate in (each.rate("wall"), *_ends(each.rates["wall"]))),
                f"{each.rate('cpu'):,.0f}" if own else "",
                f"{each.rate('wall') / first.rate('wall'):,.0f}x",
                f"{each.rate('cpu') / first.rate('cpu'):,.0f}x" if own else "",
                "" if own else f">= {BAR:g}x",
            )
        )
    return columns(lines)


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


# --- the corpora ---------------------------------------------------------------------------------


def write(material: Material, folder: Path) -> None:
    """`corpus/` of three training files and one of validation, `tokenizer/` trained on it."""
    texts = list(_documents(material))
    (folder / "corpus").mkdir()
    (folder / "tokenizer").mkdir()
    # nanochat looks for this name, and takes the last file of the folder for validation.
    (folder / "base_data_climbmix").symlink_to("corpus")
    fourth = len(texts) // 4
    for number in range(4):
        name = f"train-{number:05d}.parquet" if number < 3 else "validation-00000.parquet"
        write_shard(folder / "corpus" / name, {"text": texts[number * fourth : (number + 1) * fourth]})
    model = train_bpe(texts, material.vocab_size)
    plain = json.dumps(json.loads(model.to_str()), sort_keys=True, ensure_ascii=False)
    (folder / "tokenizer" / "tokenizer.json").write_text(plain)


def _documents(material: Material) -> Iterator[str]:
    rng = np.random.default_rng(1)
    words = _language(material.words, rng)
    shares = np.cumsum(1 / (np.arange(len(words)) + 2.7))
    lengths = rng.lognormal(np.log(material.document_words), material.spread, material.documents)
    for length in np.clip(lengths, 5, 8000).astype(int):
        drawn = np.searchsorted(shares, rng.random(length) * shares[-1])
        marks = rng.choice(["", ",", ".", ".\n\n", " 17"], size=length, p=[0.87, 0.05, 0.06, 0.01, 0.01])
        yield " ".join(words[i] + mark for i, mark in zip(drawn.tolist(), marks.tolist(), strict=True))


def _language(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct words of one to five syllables, the short ones first: frequent words are short."""
    starts, ends = ["", *"bcdfglmnprst", "st", "tr", "ch"], ["", *"nrstl", "ng", "ck"]
    syllables = [start + vowel + end for start in starts for vowel in "aeiou" for end in ends]
    words: set[str] = set()
    while len(words) < count:
        picked = rng.integers(len(syllables), size=min(int(rng.geometric(0.5)), 4) + 1)
        words.add("".join(syllables[i] for i in picked))
    return sorted(words, key=lambda word: (len(word), word))
