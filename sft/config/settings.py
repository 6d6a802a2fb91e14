"""The config of a run: its sections, and the values that follow from several settings.

The sections' files and this one declare what is legal, as one table: each setting has its type,
unit, default and rule, and what else the code must know of it, in one place. The YAML files in
``conf/`` choose values. A field that exists upstream (``learning_rate``, ``lora_alpha``,
``bnb_4bit_quant_type``) has upstream's name, so that a section maps onto the library's class by
name. Other modules import the sections from here. These files import no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sft.config.data_settings import DatasetConfig
from sft.config.model_settings import LoraSection, ModelConfig, QuantizationConfig
from sft.config.new_tokens import read_new_tokens
from sft.config.rules import AS_SET, LARGEST_SEED, Choice, between, name_fault, one_of, setting
from sft.config.template_settings import TemplateConfig
from sft.config.train_settings import ResumeConfig, TrainConfig, ZeroConfig
from sft.config.watch_settings import (
    AlertConfig,
    ProfileConfig,
    ReportConfig,
    SampleConfig,
    TrackerConfig,
)
from sft.errors import ConfigError, Problem

__all__ = [
    "AlertConfig",
    "Config",
    "DatasetConfig",
    "LoraSection",
    "ModelConfig",
    "ProfileConfig",
    "QuantizationConfig",
    "ReportConfig",
    "ResumeConfig",
    "SampleConfig",
    "TemplateConfig",
    "TrackerConfig",
    "TrainConfig",
    "ZeroConfig",
    "fill_names",
    "packing_of",
    "short_name",
    "streamed_samples",
]


@dataclass
class Config:
    """The run as a whole: its name, folder, seed and precision."""

    run_name: str | None = setting(
        None,
        "name of the run; null: <model>_<dataset>_r<rank>_seed<seed>",
        changes_training=False,
        decides=("train.run_name",),
    )
    output_dir: str | None = setting(
        None,
        "folder of the run; null: outputs/<run_name>",
        path="written",
        changes_training=False,
        decides=("train.output_dir",),
    )
    overwrite: bool = setting(
        False,
        "true: delete the run that is already in output_dir and start again",
        changes_training=False,
    )
    seed: int = setting(
        42,
        "seed of the data order, the adapter's initialisation and dropout",
        between(0, LARGEST_SEED),
        decides=("train.seed", "train.data_seed"),
    )
    precision: str = setting(
        "auto",
        "precision of weights and arithmetic; auto: bf16 on a GPU that supports it, else fp16; on "
        "a CPU bf16 if it computes faster in it, else fp32",
        one_of("auto", "fp32", "bf16", "fp16"),
        decides=("train.bf16", "train.fp16", "train.bf16_full_eval", "train.fp16_full_eval"),
    )
    on_alert: str | None = setting(
        None,
        "command that is run at each alert, with the alert as JSON on its standard input; only on "
        "the command line",
        changes_training=False,
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    lora: LoraSection = field(default_factory=LoraSection)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    alert: AlertConfig = field(default_factory=AlertConfig)


def short_name(path: str) -> str:
    """Return the short name of a model or dataset: ``opt-125m`` for ``facebook/opt-125m``."""
    return Path(path.rstrip("/")).stem if Path(path).is_file() else path.rstrip("/").split("/")[-1]


def packing_of(dataset: DatasetConfig, kind: str) -> Choice:
    """Choose ``dataset.packing``: what a sample is.

    Rows are not packed by default: joining the rows of a micro-batch without padding
    (train.padding_free) is as fast, and a step still has train.global_batch_size rows.

    Args:
        dataset: The dataset section.
        kind: ``template.kind``.
    """
    if dataset.packing != "auto":
        return Choice("dataset.packing", dataset.packing, AS_SET)
    if kind == "text":
        reason = "plain text is joined and cut every dataset.max_length tokens"
        return Choice("dataset.packing", "wrapped", reason)
    reason = "each row is a sample; bfd joins rows up to dataset.max_length"
    return Choice("dataset.packing", "none", reason)


def streamed_samples(config: Config) -> int | None:
    """Return the number of samples that a run with streamed rows needs; None: all samples."""
    if not config.dataset.streaming:
        return None
    return config.train.max_steps * config.train.global_batch_size


def fill_names(config: Config) -> None:
    """Fill in names and the output folder that are null; without a clock, so that ranks agree.

    Raises:
        ConfigError: A name that follows from a path or a mix is no folder's name, or the file of
            new tokens cannot be read.
    """
    # An absolute path stays valid when a later command runs in a different folder, and has a name.
    if config.model.name_or_path and Path(config.model.name_or_path).is_dir():
        config.model.name_or_path = str(Path(config.model.name_or_path).resolve())
    # The run's config.yaml holds the tokens themselves, so that their file is read once.
    config.model.new_tokens = read_new_tokens(config.model.new_tokens)
    for section, path in (
        (config.model, config.model.name_or_path),
        (config.dataset, config.dataset.path),
    ):
        if section.name is None and path:
            section.name = short_name(path)
    if config.lora.init_from and Path(config.lora.init_from).is_dir():
        folder = Path(config.lora.init_from).resolve()
        within = folder / "adapter"  # of a run
        config.lora.init_from = str(within if within.is_dir() else folder)
    if config.dataset.name is None and config.dataset.mix:
        config.dataset.name = "+".join(config.dataset.mix)
    if config.run_name is None:
        size = f"r{config.lora.r}" if config.lora.enabled else "full"
        config.run_name = f"{config.model.name}_{config.dataset.name}_{size}_seed{config.seed}"
    if fault := name_fault(config.run_name):
        rule = f"follows from the names of model and dataset, and {fault}"
        raise ConfigError([Problem(f"run_name={config.run_name}", rule, "run_name=NAME")])
    if config.output_dir is None:
        config.output_dir = str(Path("outputs") / config.run_name)
