"""What a look at the texts of a data set tells, for `--check`."""

from __future__ import annotations

import numpy as np

from beit3.data.image_text import ImageTextDataset
from beit3.data.tokenizer import UNK_ID


def of_texts(dataset: ImageTextDataset, what: str) -> str:
    """Tokens per text, those that are cut, and how many tokens the tokenizer does not know."""
    texts = dataset.table["text_segment"]
    lengths = texts.lengths + 2  # <s> and </s>
    cut = int((lengths > dataset.num_max_bpe_tokens).sum())
    unknown = 100 * float((texts.values == UNK_ID).mean()) if len(texts.values) else 0.0
    return (
        f"{what}: {int(np.median(lengths))} tokens in the middle, the longest {int(lengths.max())}; {cut} are cut at "
        f"--num_max_bpe_tokens {dataset.num_max_bpe_tokens}; {unknown:.2f} % of the tokens are unknown"
    )
