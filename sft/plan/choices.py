"""The decisions for settings that are ``auto``: each has a setting, a value and a reason."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.config import zero
from sft.config.artefact_meta import meta_of
from sft.config.rules import AS_SET, Choice, typed
from sft.config.settings import Config, packing_of
from sft.fast import balance, head, linear, mixers
from sft.fast import lora as fast_lora
from sft.model import experts, prequantized, tokens
from sft.model import precision as precisions
from sft.model.precision import Precision, dtype_of, needs_masters
from sft.model.tokenizer import NO_TOKENS, NewTokens
from sft.plan import kernel, memory, schedule
from sft.ranks import from_rank_zero

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.data.prepared import Prepared

WIDTH = 100  # columns of the printed block if the output is not a terminal
LONGEST_VALUE = 20  # columns; a longer value moves only its own reason to the right


@dataclass(frozen=True)
class Choices:
    """The decisions that a run is built with, made before any weight loads.

    Attributes:
        precision: fp32, bf16 or fp16, and how bf16 products are computed on a CPU.
        tf32: Whether float32 products may use TF32.
        zero: The DeepSpeed JSON; None without ZeRO.
        quantization: How a base is loaded whose files are quantised already; None for another.
        packing: How documents are packed into samples.
        attention: The attention kernel; None for the architecture's own.
        padding_free: Whether a micro-batch is joined into one row.
        frozen_linear: How linear layers that are not trained are computed.
        adapters: Whether there is an adapter.
        lm_head: How the loss is computed.
        checkpointing: Whether the backward pass recomputes activations, on every rank.
        evaluation: When held-out rows are evaluated; ``no`` where there are none.
        cadence: When it is logged, evaluated and saved, where that is a share or a count per epoch.
        warmup: The warm-up of a run of one step; None if the run has several.
        ds_config: The DeepSpeed configuration, sized to the model; None without ZeRO.
        packed: Whether a sample holds several documents.
        fused_adapters: Whether ``sft.fast.lora`` computes the adapters instead of PEFT.
        evaluates: Whether there are held-out rows.
        balances: Whether the loss that balances experts is added.
        boundaries: Whether convolutions or states need the boundaries of documents.
        new_tokens: Which rows are trained for the new tokens; None if there are none.
    """

    precision: Precision
    tf32: Choice
    zero: Choice | None
    quantization: Choice | None
    packing: Choice
    attention: Choice
    padding_free: Choice
    frozen_linear: Choice
    adapters: Choice
    lm_head: Choice
    checkpointing: Choice
    evaluation: Choice
    cadence: tuple[Choice, ...]
    warmup: Choice | None
    ds_config: dict[str, Any] | None
    packed: bool
    fused_adapters: bool
    evaluates: bool
    balances: bool
    boundaries: bool
    new_tokens: Choice | None = None

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 without ZeRO."""
        return zero.stage(self.ds_config)

    def __iter__(self) -> Iterator[Choice]:
        """Yield the choices in the order in which they are printed."""
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            each = value if isinstance(value, tuple) else (value,)
            yield from (choice for choice in each if isinstance(choice, Choice))

    @property
    def intervals(self) -> dict[str, int]:
        """The whole numbers of steps that were chosen for shares, by the name of the setting."""
        names = {f"train.{name}_steps": f"{name}_steps" for name in schedule.SHARES}
        return {names[each.setting]: each.value for each in self.cadence if each.setting in names}

    def record(self) -> dict[str, dict[str, Any]]:
        """Return value and reason by setting, for ``run.json``."""
        return {name: item for each in self for name, item in each.record().items()}

    def lines(self, width: int | None = None) -> list[str]:
        """Format one line for each choice: setting, value and reason, in columns.

        Args:
            width: Columns of the output; a longer reason is wrapped into its column. None: the
                width of the terminal.
        """
        width = width or shutil.get_terminal_size((WIDTH, 24)).columns
        settings = max(len(each.setting) for each in self)
        values = min(LONGEST_VALUE, max(len(typed(each.value)) for each in self))
        indent = " " * (settings + values + 4)
        lines: list[str] = []
        for each in self:
            head = f"{each.setting:<{settings}}  {typed(each.value):<{values}}  "
            for line in each.reason.splitlines():
                lines += textwrap.wrap(
                    line,
                    max(width, len(indent) + 24),
                    initial_indent=head,
                    subsequent_indent=indent,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
                head = indent
        return lines


def choose_precision(
    config: Config, architecture: PreTrainedModel, begun: Mapping[str, str]
) -> Precision:
    """Choose the precision of all ranks on rank 0, which may measure its CPU.

    It needs no data, so that a precision that cannot be used is refused before hours of tokenising.

    Args:
        config: The run's config.
        architecture: The model on the meta device.
        begun: The identity of the run that is resumed; empty for a new run.

    Raises:
        ConfigError: The precision that is set cannot be used here.
    """
    width = int(architecture.get_input_embeddings().weight.shape[1])
    chosen = from_rank_zero(
        lambda: dataclasses.asdict(precisions.choose(config.precision, begun, width))
    )
    return Precision(**chosen)


def decide(
    config: Config,
    architecture: PreTrainedModel,
    precision: Precision,
    prepared: Prepared,
    new: NewTokens = NO_TOKENS,
) -> Choices:
    """Decide everything that the settings leave to ``auto``, with the same result on all ranks.

    Args:
        config: The run's config.
        architecture: The model on the meta device.
        precision: See ``choose_precision``.
        prepared: The data; the length of its longest sample decides the memory of a step.
        new: The new tokens.

    Raises:
        ConfigError: A value that is set cannot be used with this model, data or machine.
    """
    experts.check_balance(config, architecture)
    name = precision.value
    zero_choice, ds_config = zero.choose(config, architecture, name)
    stage = zero.stage(ds_config)
    columns = prepared.train.dataset.column_names
    packed = "seq_lengths" in columns
    samples = prepared.train.counts.samples
    balances = balance.balances(config, architecture)
    split = stage == 3 and tokens.trains_rows(config, architecture, new)
    attention, joined = kernel.choose(config, architecture, name, packed)
    frozen = linear.choose(config, architecture, name, stage)
    by_peft = fast_lora.left_to_peft(config, stage)
    itemsize, longest = dtype_of(name).itemsize, prepared.train.counts.longest
    scores = kernel.keeps_scores(architecture, attention.value)
    taken = linear.extra_bytes(architecture) if frozen.value == "packed" else 0
    recomputes = memory.choose_checkpointing(
        config, architecture, longest, itemsize, stage, keeps_scores=scores, taken=taken
    )
    return Choices(
        precision=_with_masters(config, precision),
        tf32=precisions.choose_tf32(name, config.train.extra),
        zero=zero_choice,
        quantization=prequantized.choice(config, architecture, itemsize),
        packing=_packing(config),
        attention=attention,
        padding_free=joined,
        frozen_linear=frozen,
        adapters=_adapters(config, by_peft),
        lm_head=head.choose(config, architecture, "weights" in columns, split),
        checkpointing=memory.same_on_all_ranks(config, recomputes),
        evaluation=_evaluation(config, prepared),
        cadence=tuple(schedule.choose_cadence(config.train, samples, bool(prepared.held_out))),
        warmup=schedule.choose_warmup(config.train, samples),
        ds_config=ds_config,
        packed=packed,
        fused_adapters=not by_peft,
        evaluates=bool(prepared.held_out),
        balances=balances,
        boundaries=(packed or joined.value) and bool(mixers.mixers(architecture)),
        new_tokens=tokens.choose_rows(config, architecture, new, prepared.largest_id),
    )


def _with_masters(config: Config, precision: Precision) -> Precision:
    """Extend the reason if the trained weights are float32 while the run's precision is not."""
    if precision.value == "fp32" or not needs_masters(config):
        return precision
    reason = f"{precision.reason}; the trained weights are stored in float32"
    return dataclasses.replace(precision, reason=reason)


def _packing(config: Config) -> Choice:
    """Choose ``dataset.packing``; prepared data keeps the packing that it was prepared with."""
    meta = meta_of(config.dataset.path)
    if meta is None:
        return packing_of(config.dataset, config.template.kind)
    return Choice(
        "dataset.packing", meta["settings"]["packing"], "dataset.path was prepared with it"
    )


def _adapters(config: Config, by_peft: str) -> Choice:
    """Describe how the adapters are computed; no setting decides that."""
    if not config.lora.enabled:
        return Choice("lora.enabled", False, AS_SET)
    how = f"computed by PEFT: {by_peft}" if by_peft else "computed in fewer passes than PEFT's"
    if not by_peft and (config.quantization.load_in_4bit or config.quantization.load_in_8bit):
        how = "computed by PEFT on quantised layers, in fewer passes on others"
    return Choice("lora.enabled", True, f"{AS_SET}; {how}")


def _evaluation(config: Config, prepared: Prepared) -> Choice:
    """Choose ``train.eval_strategy``."""
    if not prepared.held_out:
        return Choice("train.eval_strategy", "no", "there are no held-out rows")
    reason = f"{AS_SET}; held-out rows are also evaluated before and after training"
    return Choice("train.eval_strategy", config.train.eval_strategy, reason)
