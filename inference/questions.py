"""Questions of people: what of them reaches a model."""

from __future__ import annotations

from beit3.data.tokenizer import BOS_ID, EOS_ID, UNK_ID, Tokenizer
from beit3.system.errors import InputError, printable

MOST_UNKNOWN = 0.5  # share of <unk> among the tokens from which on the model would guess


def token_ids(tokenizer: Tokenizer, question: str, num_max_bpe_tokens: int) -> list[int]:
    """`<s>`, the question, `</s>`, cut to `num_max_bpe_tokens`.

    Raises:
        InputError: it is empty, no valid text, or most of it is unknown to the tokenizer.
    """
    if not isinstance(question, str) or not question.strip():
        raise InputError("the question is empty; ask something")
    try:
        ids = tokenizer.encode(question)
    except ValueError as error:
        raise InputError(f"the question {printable(question)[:60]!r} is no valid text ({error})") from error
    unknown = ids.count(UNK_ID)
    if not ids or unknown >= MOST_UNKNOWN * len(ids):
        share = 100 * unknown / max(len(ids), 1)
        raise InputError(
            f"the question {printable(question)[:60]!r}: {share:.0f} % of its {len(ids)} tokens are unknown to the "
            "tokenizer; ask in the words and letters that the model was trained on"
        )
    return [BOS_ID, *ids[: num_max_bpe_tokens - 2], EOS_ID]
