"""Exchanges of questions and answers as token ids, in nanochat's format.

    <|bos|><|user_start|>QUESTION<|user_end|><|assistant_start|>ANSWER<|assistant_end|>

The mask is 1 where the model is taught to speak: the answer's tokens and `<|assistant_end|>`. Soft tokens
of a clip stand in front of the row; they are vectors, not ids, so they do not appear here.
"""

from collections.abc import Sequence

from omni_model.text.tokenizer import Tokenizer

Exchange = tuple[str, str]


def render(tokenizer: Tokenizer, exchanges: Sequence[Exchange]) -> tuple[list[int], list[int]]:
    """Ids and loss mask (same length) of a conversation of (question, answer) pairs."""
    ids, mask = [tokenizer.bos_id], [0]
    for question, answer in exchanges:
        asked = _question(tokenizer, question)
        said = [*tokenizer.encode(answer), tokenizer.special("<|assistant_end|>")]
        ids += asked + said
        mask += [0] * len(asked) + [1] * len(said)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, question: str, history: Sequence[Exchange] = ()) -> list[int]:
    """Ids up to and with `<|assistant_start|>`: what comes next is the answer to `question`."""
    ids, _ = render(tokenizer, history)
    return ids + _question(tokenizer, question)


def _question(tokenizer: Tokenizer, question: str) -> list[int]:
    return [
        tokenizer.special("<|user_start|>"),
        *tokenizer.encode(question),
        tokenizer.special("<|user_end|>"),
        tokenizer.special("<|assistant_start|>"),
    ]
