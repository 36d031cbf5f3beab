"""What a GPT needs on a card and on disk, counted from its shape alone.

On a card lie the weights, their gradients, the optimizer's state, and what a forward pass keeps of each token
until the backward pass has used it. The last grows with the rows taken at once; the others do not, and they
decide whether a depth fits a card at all.

Legend: C width, V vocabulary. Standard library and the vocabulary of omni_model only.
"""

from omni_model.config import GptShape
from omni_model.config.depth import GptSize, padded, value_embedding_layers

BF16_BYTES = 2
LOSS_ENTRIES = 2**27  # of logits at once on a card; see omni_model/model/softcap_loss.py
MUON_BYTES = 2**28  # of a stack of matrices at once on a card; see omni_model/training/optim.py
MUON_WORKSPACES = 5
GAPS = 1.1


def kept_for_backward(shape: GptShape, tokens: int, element_bytes: int = BF16_BYTES) -> int:
    """Bytes of activations that the GPT keeps of `tokens` positions from forward to backward.

    Of each block: its input before and after the mix with x0, the normed copies that its matrices multiply, q
    and k before and after their norm, v, what attention returns, the stream between attention and MLP, and
    relu(x) of 4 C. In layers with value embeddings also the rows that were looked up. Compiled blocks keep
    less: they make some of it again.
    """
    width, heads = shape.n_embd, shape.n_head
    kv_width = width // heads * shape.n_kv_head
    gated = value_embedding_layers(shape)
    numbers = shape.n_layer * (12 * width + 3 * kv_width) + gated * kv_width + 3 * width
    # In fp32 whatever the dtype: one number for each norm, and for each head's softmax.
    wide = shape.n_layer * (2 + 2 * heads + shape.n_kv_head)
    return tokens * (numbers * element_bytes + 4 * wide)


def training_bytes(
    shape: GptShape, vocab_size: int, rows: int, *, element_bytes: int = BF16_BYTES, gpus: int = 1
) -> int:
    """Peak of all tensors on a card that trains with `rows` rows at once, beside earlier rows' gradients."""
    lasting = lasting_bytes(shape, vocab_size, element_bytes=element_bytes, gpus=gpus)
    return lasting + passing_bytes(shape, vocab_size, rows, element_bytes=element_bytes)


def lasting_bytes(shape: GptShape, vocab_size: int, *, element_bytes: int = BF16_BYTES, gpus: int = 1) -> int:
    """What lies on a card all the time: weights, gradients and the optimizer's state.

    Matrices are fp32, with a narrow copy to multiply by; tables are narrow. AdamW keeps two numbers a weight
    and Muon one, in the dtype of the weight and divided among cards.
    """
    size = GptSize.of(shape, vocab_size)
    weights = 4 * (size.blocks + size.head + size.small) + element_bytes * size.tables
    copies = element_bytes * (size.blocks + size.head) if element_bytes < 4 else 0
    state = 4 * size.blocks + 8 * size.head + 2 * element_bytes * size.tables
    return 2 * weights + copies + state // gpus


def passing_bytes(shape: GptShape, vocab_size: int, rows: int, *, element_bytes: int = BF16_BYTES) -> int:
    """The most that a pass over `rows` rows and back, or the optimizer's step, takes for a while."""
    size, tokens = GptSize.of(shape, vocab_size), rows * shape.sequence_len
    # The loss walks over its logits in chunks and makes the head's gradient anew, to be added to the last.
    chunk = min(tokens, max(128, LOSS_ENTRIES // vocab_size)) * padded(vocab_size) * element_bytes
    loss = chunk + (4 + element_bytes) * size.head + tokens * shape.n_embd * element_bytes
    # The last block's way back, while all others still wait: gradients of C and 4 C, and relu^2.
    way_back = 10 * tokens * shape.n_embd * element_bytes
    stepping = MUON_WORKSPACES * min(MUON_BYTES, 16 * shape.n_layer * shape.n_embd**2)
    return max(kept_for_backward(shape, tokens, element_bytes) + max(loss, way_back), stepping)


def fits(shape: GptShape, vocab_size: int, usable_bytes: int, rows: int, *, gpus: int = 1) -> bool:
    """Whether a card holds it, with a margin for the gaps that tensors leave as they come and go."""
    passing = int(GAPS * passing_bytes(shape, vocab_size, rows))
    return lasting_bytes(shape, vocab_size, gpus=gpus) + passing <= usable_bytes


def fitting_rows(shape: GptShape, vocab_size: int, usable_bytes: int, rows: int, *, gpus: int = 1) -> int:
    """The most rows at once, a power of two that divides `rows` (a card's share of a step); 0: none fits."""
    powers = (2**power for power in reversed(range(rows.bit_length())) if rows % 2**power == 0)
    return next((each for each in powers if fits(shape, vocab_size, usable_bytes, each, gpus=gpus)), 0)


def weights_bytes(size: GptSize) -> int:
    """`model.safetensors`: tables in bf16, the rest in fp32."""
    return 4 * (size.blocks + size.head + size.small) + BF16_BYTES * size.tables


def checkpoint_bytes(size: GptSize) -> int:
    """A checkpoint of a training: the weights and the optimizer's state."""
    return weights_bytes(size) + 4 * size.blocks + 8 * size.head + 2 * BF16_BYTES * size.tables
