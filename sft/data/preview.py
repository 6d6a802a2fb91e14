"""TEMP."""

import itertools
from sft.data.encode import IGNORE_INDEX


def marked(sample, tokenizer):
    text = ""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        decoded = tokenizer.decode([token for token, _ in group])
        text += f"⟦{decoded}⟧" if trained else decoded
    return text
