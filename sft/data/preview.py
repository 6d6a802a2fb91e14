"""Print samples in the terminal, with exactly the trained tokens marked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from sft.data.row_encoder import IGNORE_INDEX
from sft.html import visible

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase


Sample = Mapping[str, Any]

# White on dark green from the fixed part of the palette, which light and dark themes leave alone.
TRAINED = "color(231) on color(22)"
# How byte-level BPE spells bytes in its vocabulary (bytes_to_unicode of GPT-2's encoder.py).
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTES = {chr(byte): byte for byte in _PRINTABLE}
BYTES |= {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}


class Span(NamedTuple):
    """A span of neighbouring tokens of one document: all are trained, or none is."""

    trained: bool
    ids: list[int]
    before: list[int]  # the one token before them, if any
    text: str


class Prompt(NamedTuple):
    """The prompt of one row.

    Attributes:
        ids: Token ids; empty if there is no prompt to show.
        note: How it compares with the document in training.
    """

    ids: list[int]
    note: str


class Token(NamedTuple):
    """One token, as text that is safe to print."""

    text: str
    id: int
    trained: bool
    special: bool


def marked(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a sample, with its trained spans between ⟦ and ⟧."""
    spans = _spans(sample["input_ids"], sample["labels"], tokenizer)
    return "".join(f"⟦{text}⟧" if trained else text for trained, *_, text in spans)


def show(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    tokens: bool = False,
    color: bool | None = None,
    file: IO[str] | None = None,
    prompts: Sequence[Sequence[Prompt | None]] = (),
) -> None:
    """Print samples; trained text is coloured or, without colour, between ⟦ and ⟧.

    Args:
        samples: Mappings with ``input_ids``, ``labels`` and, if packed, ``seq_lengths``.
        tokenizer: The tokenizer that made them.
        tokens: Whether to show token boundaries, with the ids below.
        color: Whether to colour; None: if the terminal can and NO_COLOR is not set.
        file: Where to print; None: standard output.
        prompts: For each sample the generation prompts of its documents, shown below these.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file, color_system="256" if color else "auto" if color is None else None)
    colored = color or (color is None and bool(console.color_system) and not console.no_color)
    console.no_color = not colored
    every = zip(samples, prompts or itertools.repeat(()), strict=False)
    for number, (sample, asked) in enumerate(every, 1):
        lines = [Text()] if number > 1 else []
        documents, heading = documents_of(sample, tokenizer)
        lines.append(Text.assemble((f"sample {number}", "bold"), "  ", heading))
        for position, (document, prompt) in enumerate(itertools.zip_longest(documents, asked), 1):
            if "seq_lengths" in sample:
                rule = f"── document {position} of {len(documents)}: {figures_of(document)} ──"
                lines.append(Text(rule, "dim"))
            lines += _lines(document, tokenizer, console.width if tokens else 0, colored)
            if prompt is not None:
                lines.append(Text(f"generation prompt: {visible(prompt.note)}", "dim"))
                if prompt.ids:
                    given = list(untrained(prompt.ids, tokenizer))
                    lines += _lines(given, tokenizer, console.width if tokens else 0, colored)
        # Use soft wrapping, because rich's own wrapping strips the spaces at the ends of lines.
        console.print(Text("\n").join(lines), soft_wrap=True)


def _lines(
    document: list[Span], tokenizer: PreTrainedTokenizerBase, width: int, colored: bool
) -> list[Text]:
    """Lay out a document as text or, with a width, as tokens over their ids."""
    from rich.text import Text

    if width:
        return _rows(tokens_of(document, tokenizer), width, colored)
    line = Text()
    for trained, *_, text in document:
        before, after = ("⟦", "⟧") if trained and not colored else ("", "")
        line.append(before + visible(text) + after, TRAINED if trained and colored else None)
    return [line]


def untrained(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """Return a prompt's tokens as spans of a document."""
    return _spans(ids, [IGNORE_INDEX] * len(ids), tokenizer)


def documents_of(
    sample: Sample, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[Span]], str]:
    """Split a sample into its documents (one unless it is packed), and these into spans.

    Returns:
        The spans of each document, and the sample's figures as text.
    """
    documents = [list(_spans(ids, labels, tokenizer)) for ids, labels in parts_of(sample)]
    heading = figures_of(itertools.chain(*documents))
    if "seq_lengths" in sample:
        heading += f", {len(documents)} document" + "s" * (len(documents) != 1)
    return documents, heading


def parts_of(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """Split the token ids and the labels of a sample into those of its documents."""
    ids, labels = sample["input_ids"], sample["labels"]
    ends = itertools.accumulate(sample.get("seq_lengths", [len(ids)]))
    return [(ids[a:b], labels[a:b]) for a, b in itertools.pairwise([0, *ends])]


def _spans(
    input_ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Span]:
    pairs = zip(input_ids, labels, strict=True)
    before: list[int] = []
    for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        ids = [token for token, _ in group]
        yield Span(trained, ids, before, _decode(ids, before, tokenizer))
        before = ids[-1:]


def _decode(ids: list[int], before: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode tokens after the token before them: SentencePiece drops a text's first space."""
    head, whole = tokenizer.decode(before), tokenizer.decode(before + ids)
    # If the token before ends inside a character, its bytes merge with those that follow.
    cut = whole.startswith(head) and "\ufffd" not in head
    return str(whole[len(head) :] if cut else tokenizer.decode(ids))


def tokens_of(document: list[Span], tokenizer: PreTrainedTokenizerBase) -> Iterator[Token]:
    """Yield the tokens of a document."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for trained, ids, before, _ in document:
        for token in ids:
            text = _decode([token], before, tokenizer)
            if not text or "\ufffd" in tokenizer.decode([token]):
                # It is a part of a character or decodes to nothing: show its vocabulary entry.
                text = tokenizer.convert_ids_to_tokens(token) or ""
                if BYTES.keys() >= set(text):
                    text = bytes(BYTES[char] for char in text).decode(errors="backslashreplace")
            yield Token(visible(text.replace(" ", "␣")), token, trained, token in special)
            before = [token]


def _rows(tokens: Iterable[Token], width: int, colored: bool) -> list[Text]:
    """Lay tokens out in rows of two lines, each token over its id."""
    from rich.cells import cell_len
    from rich.text import Text

    lines: list[Text] = []
    inside = ended = False
    for token in tokens:
        text, number = token.text.replace("\n", ""), str(token.id)
        size = max(cell_len(text), len(number))
        if ended or not lines or lines[-1].cell_len + size + 2 > width:
            if lines:
                lines[-2].append("⟧" if inside else "·", "dim")
            lines += [Text(), Text()]
            inside = False
        bracket = token.trained != inside and not colored
        lines[-2].append(("⟦" if token.trained else "⟧") if bracket else "·", "dim")
        style = TRAINED if token.trained and colored else ""
        lines[-2].append(text + " " * (size - cell_len(text)), style + " bold" * token.special)
        lines[-1].append(f" {number:<{size}}", "dim")
        inside, ended = token.trained and not colored, "\n" in token.text
    lines[-2].append("⟧" if inside else "·", "dim")
    return lines


def figures_of(spans: Iterable[Span]) -> str:
    """Return the number of tokens, and of trained tokens, as text."""
    tokens = trained = 0
    for span in spans:
        tokens += len(span.ids)
        trained += len(span.ids) * span.trained
    return f"{tokens:,} tokens, {trained:,} trained ({100 * trained / tokens:.0f} %)"
