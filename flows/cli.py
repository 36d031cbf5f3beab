"""The `omni` command: runs, plans and their store; models that come from nanochat or go there.

Only what a verb needs is imported when it runs, so that looking at a plan imports neither torch nor Prefect.
Exit codes: 0 done, 1 a stage or a check failed, 2 bad input or refused.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flows import models, nanochat, recipes, verbs
from flows.cards import CARDS
from flows.verbs import DONE, FAILED, Stopped
from omni_model.config import BadInput

REFUSED, INTERRUPTED = 2, 130
UI_PORT = 4200


def _stop(number: int, frame: object) -> None:
    raise Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, carry out, and turn every foreseen error into one sentence. Returns the exit code."""
    args = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return int(args.verb(args))
    except (KeyboardInterrupt, Stopped):
        print("\nomni: stopped; run the same command again to continue", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if args.debug:
            raise
        print(f"omni: {error_sentence(error)}", file=sys.stderr)
        return REFUSED if isinstance(error, BadInput) else FAILED


def error_sentence(error: Exception) -> str:
    """An error as one sentence; what nobody foresaw is named by its type."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    foreseen = isinstance(error, BadInput) or type(error).__name__ in ("StageFailed", "RuntimeError")
    return str(error) if foreseen else f"{type(error).__name__}: {error} (--debug shows where)"


def listen(args: argparse.Namespace) -> int:
    """`omni listen`."""
    from omni_model import cli

    cli.listen(Path(args.file), as_json=args.json, png=Path(args.picture) if args.picture else None)
    return DONE


def chat(args: argparse.Namespace) -> int:
    """`omni chat`."""
    from omni_model import cli  # needs torch

    gpt, tokenizer = models.talker(args.gpt, args.tokenizer)

    cli.chat(
        gpt,
        tokenizer,
        prompt=args.prompt,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        as_json=args.json,
    )
    return DONE


def score(args: argparse.Namespace) -> int:
    """`omni score`."""
    from omni_model import cli  # needs torch

    parts = models.listener(args.run, args.listener)
    cli.score(Path(args.place), args.question, args.options or (), as_json=args.json, **vars(parts))
    return DONE


def parser() -> argparse.ArgumentParser:
    """The command line, with examples in every help."""
    top = argparse.ArgumentParser(prog="omni", description="A small GPT, trained from scratch, that hears.")
    top.set_defaults(debug=False)
    known = top.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: object, summary: str, examples: str) -> argparse.ArgumentParser:
        sub = known.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"examples:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(verb=function)
        return sub

    def recipe(sub: argparse.ArgumentParser) -> None:
        names = ", ".join(recipes.RECIPES)
        sub.add_argument(
            "recipe", nargs="?", default=recipes.DEFAULT, help=f"one of: {names}; default {recipes.DEFAULT}"
        )
        sub.add_argument(
            "--set",
            dest="settings",
            action="append",
            default=[],
            metavar="PATH=VALUE",
            help="change a field of the recipe, or of runtime.*; may be repeated",
        )

    def as_json(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print JSON")

    sub = verb(
        "run",
        verbs.run,
        "run a recipe; stages whose inputs did not change are reused",
        "  omni run\n  omni run smoke\n  omni run demo --set lora.rank=8 --set runtime.threads=2",
    )
    recipe(sub)
    sub.add_argument(
        "--yes", action="store_true", help="recompute costly results that only changed code made stale"
    )
    as_json(sub)
    sub = verb(
        "plan",
        verbs.show_plan,
        "say what a run would do, and why, without doing it",
        "  omni plan\n  omni plan demo --set lessons.max_steps=800 --json\n  omni plan base-d20 --card 5090",
    )
    recipe(sub)
    sub.add_argument("--card", choices=sorted(CARDS), help="predict for this card: hours, memory and disk")
    as_json(sub)
    sub = verb(
        "why",
        verbs.why,
        "say why one stage would or would not run",
        "  omni why finetune_lora\n  omni why finetune_lora demo --set lora.lr=0.001",
    )
    sub.add_argument("stage", help="the stage's name, as omni plan shows it")
    recipe(sub)
    as_json(sub)
    sub = verb(
        "verify",
        verbs.verify,
        "hash every payload file in the store against its manifest",
        "  omni verify\n  omni verify --json",
    )
    as_json(sub)
    sub = verb(
        "ui",
        verbs.ui,
        "open the Prefect UI on this store's runs",
        f"  omni ui\n  omni ui --port {UI_PORT + 1}",
    )
    sub.add_argument(
        "--port", type=int, default=UI_PORT, help=f"port on the loopback interface; default {UI_PORT}"
    )
    sub = verb(
        "doctor",
        verbs.doctor,
        "check the environment, the store, the server and the encoder",
        "  omni doctor\n  omni doctor --json",
    )
    as_json(sub)
    _model_verbs(verb, as_json)
    return top


def _model_verbs(
    verb: Callable[[str, object, str, str], argparse.ArgumentParser],
    as_json: Callable[[argparse.ArgumentParser], None],
) -> None:
    sub = verb(
        "listen",
        listen,
        "say what is heard in a recording, before any model",
        "  omni listen voice.wav\n  omni listen voice.mp3 --json\n  omni listen voice.wav --picture mel.png",
    )
    sub.add_argument("file", help="an audio file of up to an hour")
    sub.add_argument("--picture", metavar="OUT.png", help="also draw its mel spectrogram")
    as_json(sub)
    sub = verb(
        "score",
        score,
        "ask a listener about recordings, and whether it may be sure",
        '  omni score voice.wav --question "Which colour is said?" --options red blue green white\n'
        '  omni score recordings --question "What do you hear?"\n'
        "  omni score labelled-recordings --json",
    )
    sub.add_argument(
        "place", help="an audio file, or a folder of them; labels in its metadata.jsonl are asked"
    )
    sub.add_argument("--question", help="what is asked; a folder with labels needs none")
    sub.add_argument("--options", nargs="+", metavar="ANSWER", help="four answers to choose from")
    sub.add_argument("--run", metavar="DIR", help="the listener of this run; default the newest there is")
    sub.add_argument("--listener", metavar="DIR", help="a finished artifact of a listener")
    as_json(sub)
    sub = verb(
        "chat",
        chat,
        "talk in the terminal with a model that has learned to",
        '  omni chat\n  omni chat --prompt "Who are you?"\n  omni chat --temperature 0',
    )
    sub.add_argument("--prompt", help="ask this, print the answer and end")
    sub.add_argument("--temperature", type=float, default=0.6, help="0: the likeliest token; default 0.6")
    sub.add_argument("--top-k", type=int, default=50, help="draw from that many tokens at most; default 50")
    sub.add_argument("--seed", type=int, default=0, help="of what is drawn; default 0")
    _which_model(sub)
    as_json(sub)
    sub = verb(
        "import-nanochat",
        nanochat.import_nanochat,
        "make artifacts of a model that nanochat trained, and of its tokenizer",
        "  omni import-nanochat ~/.cache/nanochat/base_checkpoints/d12\n"
        "  omni import-nanochat d12 --step 1500 --tokenizer ~/.cache/nanochat/tokenizer",
    )
    sub.add_argument("directory", help="the directory of model_NNNNNN.pt and meta_NNNNNN.json")
    sub.add_argument("--step", type=int, help="which checkpoint; default the newest")
    sub.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="the directory of tokenizer.pkl; default ../../tokenizer as nanochat has it, else tokenizer/",
    )
    as_json(sub)
    sub = verb(
        "export-nanochat",
        nanochat.export_nanochat,
        "write a model and its tokenizer as a directory that nanochat loads",
        "  omni export-nanochat out && NANOCHAT_BASE_DIR=out python -m scripts.chat_cli -i base\n"
        "  omni export-nanochat out --gpt runs/pretrain_gpt/KEY --tokenizer runs/train_tokenizer/KEY",
    )
    sub.add_argument("out", help="a new or empty directory, to be nanochat's base directory")
    _which_model(sub)
    as_json(sub)


def _which_model(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--gpt", metavar="DIR", help="a finished artifact; default the latest run's, and its tokenizer"
    )
    sub.add_argument("--tokenizer", metavar="DIR", help="a finished artifact; goes with --gpt")


if __name__ == "__main__":
    sys.exit(main())
