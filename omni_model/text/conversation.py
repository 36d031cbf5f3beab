"""Conversations as token ids, in nanochat's format.

    <|bos|><|user_start|>QUESTION<|user_end|><|assistant_start|>ANSWER<|assistant_end|><|user_start|>...

The mask is 1 where the model is taught to speak: what the assistant says, the calculator's input with the
tokens around it, and `<|assistant_end|>`. What it reads is 0: the user's words and the calculator's output.
Soft tokens of a clip are vectors, not ids: `render_heard` tells where they come. What a user's message begins
a conversation with stands in front of <|bos|>, any other clip where its message has it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omni_model.config import BadInput
from omni_model.text.tokenizer import Tokenizer

# role: system, user or assistant. content: a text; of the assistant also a list of {type, text}, where type
# is text, python (what it gives the calculator) or python_output (what it gets back); of the user also a list
# of {type: text, text}, {type: audio, clip} and {type: description, text}, a text in a clip's place.
Message = Mapping[str, Any]
Exchange = tuple[str, str]

SPEAKERS = ("user", "assistant")
# Of each type of part: whose special tokens stand around it, and whether it is learned, they included.
PARTS = {"text": ("", 1), "python": ("python", 1), "python_output": ("output", 0)}
SOUNDS = ("audio", "description")


@dataclass(frozen=True)
class Hearing:
    """Something heard before token `place`: the clip of that key, or the text that stands in its place."""

    place: int
    clip: str = ""
    description: str = ""


IN_FRONT = 2  # tokens: <|bos|> and <|user_start|>; what is heard behind them alone comes before both


def render_heard(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[int], list[Hearing]]:
    """Ids and loss mask (same length) of a conversation, and what is heard in it, in order.

    Raises:
        BadInput: user and assistant do not alternate, or a content is not what its role may say.
    """
    ids, mask = [tokenizer.bos_id], [0]
    heard: list[Hearing] = []
    for piece in _pieces(tokenizer, messages):
        if isinstance(piece, Mapping):
            place = 0 if len(ids) == IN_FRONT else len(ids)
            clip, text = (str(piece.get(name, "")) for name in ("clip", "text"))
            heard.append(Hearing(place, clip, text))
        else:
            tokens, learned = piece
            ids += tokens
            mask += [learned] * len(tokens)
    return ids, mask, heard


def render_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], max_tokens: int | None = None
) -> tuple[list[int], list[int]]:
    """Ids and loss mask (same length) of a conversation without sound, the first `max_tokens` of them.

    A system message, which may come first, is put before the user's first words with a blank line between.

    Raises:
        BadInput: as for `render_heard`, or something is to be heard.
    """
    ids, mask, heard = render_heard(tokenizer, messages)
    if heard:
        raise BadInput("a conversation that is read as text alone cannot hold sound; leave those parts out")
    return ids[:max_tokens], mask[:max_tokens]


def render_for_completion(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids up to and with `<|assistant_start|>`: what comes next is the answer to the user's last message.

    An assistant's message behind it, the answer as it should be, is left out.

    Raises:
        BadInput: as for `render_conversation`, or there is no user's message to answer.
    """
    asked = messages[:-1] if messages and messages[-1].get("role") == "assistant" else messages
    if not asked or asked[-1].get("role") != "user":
        raise BadInput("a conversation to be answered must have a message of the user's last")
    ids, _ = render_conversation(tokenizer, asked)
    return [*ids, tokenizer.special("<|assistant_start|>")]


def render(tokenizer: Tokenizer, exchanges: Sequence[Exchange]) -> tuple[list[int], list[int]]:
    """Ids and loss mask (same length) of a conversation of (question, answer) pairs."""
    return render_conversation(tokenizer, _messages(exchanges))


def render_prompt(tokenizer: Tokenizer, question: str, history: Sequence[Exchange] = ()) -> list[int]:
    """Ids up to and with `<|assistant_start|>`: what comes next is the answer to `question`."""
    return render_for_completion(tokenizer, [*_messages(history), {"role": "user", "content": question}])


def _messages(exchanges: Sequence[Exchange]) -> list[Message]:
    said = [zip(SPEAKERS, exchange, strict=True) for exchange in exchanges]
    return [{"role": role, "content": content} for pair in said for role, content in pair]


def _pieces(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> Iterator[tuple[list[int], int] | Mapping[str, Any]]:
    """Runs of tokens after `<|bos|>`, and whether each is learned; between them the parts that are heard."""
    for number, message in enumerate(_turns(messages)):
        speaker = SPEAKERS[number % 2]
        if message.get("role") != speaker:
            raise BadInput(
                f"message {number + 1} of a conversation is from {message.get('role')!r} and must be from "
                f"{speaker!r}; user and assistant take turns, the user first"
            )
        start, end = (tokenizer.special(f"<|{speaker}_{edge}|>") for edge in ("start", "end"))
        yield [start], 0
        if speaker == "user":
            yield from _question(tokenizer, message.get("content"))
            yield [end], 0
        else:
            yield from _answer(tokenizer, message.get("content"))
            yield [end], 1


def _turns(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages without a system's, which becomes the beginning of the user's first."""
    if not messages or messages[0].get("role") != "system":
        return messages
    if len(messages) < 2 or messages[1].get("role") != "user":
        raise BadInput("a conversation's system message must be followed by one of the user's")
    system, asked = (_text(message.get("content")) for message in messages[:2])
    return [{"role": "user", "content": f"{system}\n\n{asked}"}, *messages[2:]]


def _question(tokenizer: Tokenizer, content: object) -> Iterator[tuple[list[int], int] | Mapping[str, Any]]:
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            yield tokenizer.encode(_text(part.get("text"))), 0
        elif kind in SOUNDS and (part.get("clip") if kind == "audio" else part.get("text")):
            yield part
        else:
            raise BadInput(
                f"a part of a question must be a text, an audio with its clip or a description, not {part!r}"
            )


def _answer(tokenizer: Tokenizer, content: object) -> Iterator[tuple[list[int], int]]:
    parts: list[Any] = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in PARTS:
            raise BadInput(f"a part of an answer must be of type {', '.join(PARTS)}, not {part!r}")
        tool, learned = PARTS[part["type"]]
        said = tokenizer.encode(_text(part.get("text")))
        if tool:
            said = [tokenizer.special(f"<|{tool}_start|>"), *said, tokenizer.special(f"<|{tool}_end|>")]
        yield said, learned


def _text(content: object) -> str:
    if not isinstance(content, str):
        raise BadInput(f"a message must say a text or a list of parts, not {content!r}")
    return content
