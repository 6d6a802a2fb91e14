"""Generate greedy answers to prompts."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence

from sft.attributes import replaced
from sft.checkpoint.sharded import shape_of
from sft.errors import DataError
from sft.fast.rows import split
from sft.inference.stops import all_stop_ids
from sft.progress import beat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger("sft")

ROUTERS = "output_router_logits"  # of a config: return the routers' scores and the balance's loss


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    stop_ids: Sequence[int] = (),
    **options: Any,
) -> list[str]:
    """Continue a batch of encoded prompts with text; for the arguments see ``continuations``.

    Returns:
        The texts that follow the prompts, without special tokens and the token that ended them.
    """
    given = (prompts, max_new_tokens, device, stop_ids)
    ids = continuations(model, tokenizer, *given, **options).tolist()
    stops = all_stop_ids(model.generation_config, tokenizer, stop_ids)
    return texts_of(tokenizer, ids, stops)


def rounds(count: int, size: int) -> Iterator[tuple[int, list[int]]]:
    """Yield for each batch the first prompt of all ranks, and this rank's prompts, by number.

    Prompts are assigned to the ranks in turn. Every rank has as many batches as the others; the
    last may be empty.

    Args:
        count: The number of prompts.
        size: Prompts of a rank's batch, at most.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for start in range(0, count, size * ranks):
        yield start, list(range(start + rank, min(start + size * ranks, count), ranks))


def texts_of(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[list[int]], stops: Sequence[int]
) -> list[str]:
    """Decode each row up to the first token that ends an answer, which need not be special."""
    ended = [list(itertools.takewhile(lambda token: token not in stops, row)) for row in rows]
    texts: list[str] = tokenizer.batch_decode(ended, skip_special_tokens=True)
    return texts


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    stop_ids: Sequence[int] = (),
    **options: Any,
) -> torch.Tensor:
    """Continue a batch of encoded prompts.

    Args:
        model: The model; its training mode is restored afterwards.
        tokenizer: Its EOS ends an answer.
        prompts: Token ids, of any lengths; they are padded on the left here.
        max_new_tokens: Limit for each prompt.
        device: Where the model computes; offloaded parameters may be elsewhere.
        stop_ids: Further tokens that end an answer, such as a chat template's end of turn.
        **options: Further arguments of ``generate``; decoding is greedy unless they change it.

    Returns:
        Token ids that follow the prompts, shape (prompts, tokens), padded on the right.
    """
    if len(set(map(len, prompts))) > 1 and not takes_padding(model, tokenizer, device):
        options["stop_ids"] = stop_ids
        each = [
            continuations(model, tokenizer, [prompt], max_new_tokens, device, **options)[0]
            for prompt in prompts
        ]
        return pad_sequence(each, batch_first=True, padding_value=tokenizer.pad_token_id)
    width = max(map(len, prompts))
    ids = [[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with answering(model):
        output: torch.Tensor = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=all_stop_ids(model.generation_config, tokenizer, stop_ids),
            **{"do_sample": False, "use_cache": True, **options},
        )
    return output[:, width:]


@contextlib.contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Switch off what a model's settings would change about a greedy answer.

    Gradients and dropout. Beams, penalties and forced tokens of its generation_config.json, which
    also change the number and the type of what ``generate`` returns. The loss that balances
    experts: the routers' scores of one step do not fit the attention mask of all tokens.
    """
    text, own = model.config.get_text_config(), model.generation_config
    balance = {ROUTERS: False} if getattr(text, ROUTERS, False) else {}
    plain = {"generation_config": type(own)(eos_token_id=own.eos_token_id)}
    # PEFT's generate writes the settings of its model into the base.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training = model.training
    model.eval()
    alive = base.register_forward_hook(beat)  # a batch of long answers may take minutes
    try:
        with (
            replaced(text, balance),
            replaced(base, plain),
            replaced(model, plain),
            torch.no_grad(),
        ):
            yield
    finally:
        alive.remove()
        model.train(was_training)


_takes_padding: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()


def takes_padding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> bool:
    """Return whether padding on the left of a prompt leaves the model's next tokens as they are.

    Some architectures count positions from the padding on, or let it into their state. The answer
    is found once per model, with a prompt alone, padded, and after as many visible tokens.
    """
    if model in _takes_padding:
        return _takes_padding[model]
    embedding, *_ = split(model.get_input_embeddings())  # whose weight ZeRO-3 may have split
    rows = shape_of(embedding.weight)[0]
    prompt = [(7 * place + 5) % min(rows, len(tokenizer)) for place in range(9)]
    padding = [tokenizer.pad_token_id] * 7

    def scores(ids: list[int], hidden: int) -> torch.Tensor:
        """Return the logits of two new tokens, shape (2, vocabulary)."""
        with answering(model):
            found: Any = model.generate(
                input_ids=torch.tensor([ids], device=device),
                attention_mask=torch.tensor([[0] * hidden + [1] * (len(ids) - hidden)]).to(device),
                pad_token_id=tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_logits=True,
                **{"min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False, "use_cache": True},
            )
        return torch.cat(found.logits).float().log_softmax(-1)

    alone = scores(prompt, 0)
    padded, visible = scores(padding + prompt, 7), scores(padding + prompt, 0)
    # Rounding may choose a different first token of two that are as likely, and with it the second.
    count = 2 if alone[0].argmax() == padded[0].argmax() else 1
    # Each token has its own bound: the first one is computed without the cache.
    apart = (padded - alone)[:count].abs().mean(-1)
    effect = (visible - alone)[:count].abs().mean(-1)
    rounding = 16 * torch.finfo(model.dtype).eps * float(alone.abs().max())
    exact = bool((apart <= (effect / 8).clamp(min=rounding / 64).clamp(max=rounding)).all())
    if not exact:
        logger.info(
            "prompts are answered one at a time: %s computes padded prompts differently",
            model.config.model_type,
        )
    _takes_padding[model] = exact
    return exact


def room(model: PreTrainedModel, prompts: Sequence[list[int]], wanted: int) -> int:
    """Return how many tokens may follow each prompt: ``wanted``, or as many as have a position.

    Raises:
        DataError: A prompt has as many tokens as the model has positions, or more.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if positions is None or longest + wanted <= positions:
        return wanted
    if longest >= positions:
        number = next(index for index, ids in enumerate(prompts, 1) if len(ids) == longest)
        raise DataError(
            f"prompt {number} has {longest} tokens, but the model has {positions} positions\n"
            "    fix: a shorter prompt, or a model with a longer context"
        )
    return int(positions - longest)
