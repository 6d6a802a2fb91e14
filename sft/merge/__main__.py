"""Merge an adapter into its base model's weights, and verify the result against base + adapter.

A few rows are read, changed and written at a time; the adapter's change is added in float32 and
rounded once. An adapter that was trained on a 4- or 8-bit base is by default merged into the
dequantised base (``quantized_base``), because training computed with those weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sft import environment
from sft.cli.command import Command
from sft.config.rules import one_of, rule_problems, setting
from sft.errors import MergeError, Problem
from sft.files import write_text
from sft.merge import claim
from sft.merge.report import log_report, write_report
from sft.model.source import named_by
from sft.progress import progress
from sft.report import written
from sft.run import record

if TYPE_CHECKING:
    import torch

    from sft.merge.prepare import PreparedMerge

logger = logging.getLogger("sft")


@dataclass
class MergeConfig:
    """Settings of ``python -m sft.merge``."""

    run: str | None = setting(
        None, "a run's folder: its adapter/ is merged into its merged/", path="read"
    )
    adapter: Any = setting(None, "instead of run: an adapter's folder (PEFT), or a list of them")
    weights: list[float] = setting([], "the factor of each adapter in a list; []: 1 for each")
    output: str | None = setting(
        None, "folder of the merged model; null: merged/ in the run", path="written"
    )
    base: str | None = setting(
        None, "the base model; null: the one that the adapter names", path="read"
    )
    trust_remote_code: bool = setting(
        False, "true: run the Python code in the base model's repository or folder"
    )
    check_base: bool = setting(True, "check that the base is the one of training")
    quantized_base: str = setting(
        "dequantized",
        "for an adapter trained on a 4- or 8-bit base. dequantized: merge into the dequantised "
        "weights, which training computed with; original: into the original ones (answers differ)",
        one_of("dequantized", "original"),
    )
    dtype: str = setting(
        "auto",
        "precision of the written weights; auto: the base model's own",
        one_of("auto", "float32", "bfloat16", "float16"),
    )
    max_shard_size: str | None = setting(None, "size of a file, such as 5GB; null: as the base's")
    device: str = setting("cpu", "device that adds the adapter's change", one_of("cpu", "cuda"))
    verify: bool = setting(True, "compare with base + adapter; the report records false")
    push_to_hub: str | None = setting(None, "hub repository to upload to (private if it is new)")
    overwrite: bool = setting(False, "replace a merged model that is in the output folder")


def check(config: MergeConfig) -> list[Problem]:
    """Check the settings without reading any file."""
    problems = []
    if (config.run is None) == (config.adapter is None):
        problems.append(Problem("run, adapter", "set exactly one of them", "run=outputs/NAME"))
    elif config.adapter is not None and config.output is None:
        problems.append(Problem("output=null", "adapter= needs an output folder", "output=FOLDER"))
    given = config.adapter if isinstance(config.adapter, list) else [config.adapter]
    if not given or (config.adapter is not None and not all(isinstance(x, str) for x in given)):
        rule = "must be a folder or a list of folders"
        problems.append(Problem(f"adapter={config.adapter}", rule, "adapter=FOLDER"))
    if config.weights and len(config.weights) != len(given):
        rule = f"must have one factor for each adapter: {len(given)}"
        problems.append(Problem(f"weights={config.weights}", rule, "leave it out"))
    if config.weights and not any(config.weights):
        problems.append(Problem(f"weights={config.weights}", "would merge nothing", "leave it out"))
    if config.output is not None and not Path(config.output).name:
        problems.append(Problem(f"output={config.output}", "must name a folder", "output=FOLDER"))
    if config.max_shard_size is not None and claim.bytes_of(config.max_shard_size) is None:
        rule = "must be a size"
        fix = "max_shard_size=5GB"
        problems.append(Problem(f"max_shard_size={config.max_shard_size}", rule, fix))
    if config.push_to_hub is not None and os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        rule = "cannot be reached with HF_HUB_OFFLINE=1"
        problems.append(Problem(f"push_to_hub={config.push_to_hub}", rule, "unset HF_HUB_OFFLINE"))
    return problems


def merge(config: MergeConfig) -> dict[str, Any]:
    """Merge into a partial folder, verify it, and rename it to the output folder.

    Returns:
        The report of the merge, and its folder; ``--json`` prints both.

    Raises:
        MergeError: A file is missing, the output exists, or the verification fails.
    """
    adapters, output = _places(config)
    claim.check_output(output, config.overwrite)
    with contextlib.ExitStack() as until_written, named_by("base"):
        claim.check_adapters(adapters, config.base)
        until_written.enter_context(environment.heap_frozen(collect_new=False))
        environment.prepare()
        import torch

        from sft.merge import metadata
        from sft.merge.verify import samples_of, verify, verify_against_training
        from sft.merge.write import write

        began = time.perf_counter()
        if config.device == "cuda" and not torch.cuda.is_available():
            raise MergeError("device=cuda: there is no GPU\n    fix: device=cpu")
        dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
        prepared, report = _prepare(config, adapters, dtype)
        samples = samples_of(prepared) if config.verify else None
        claim.check_space(prepared.layout.size, output)
        with claim.claimed(output) as partial:
            write_report(partial, report)  # until verified
            with progress("merging", prepared.layout.size, "bytes") as bar:
                write(prepared.layout, partial, torch.device(config.device), bar.update)
            if index := prepared.layout.index():
                write_text(partial / "model.safetensors.index.json", index)
            metadata.write(prepared, dtype, partial)
            report["seconds_merging"] = round(time.perf_counter() - began, 2)
            until_written.close()
            if samples is not None:
                quantization = prepared.sources.quantization
                report |= verify(prepared, samples, partial, dtype or prepared.sources.stored_dtype)
                if quantization.load_in_8bit or (
                    quantization.load_in_4bit and not prepared.dequantized
                ):
                    report["from_training"] = verify_against_training(prepared, samples, partial)
            else:
                report |= {"passed": None, "reason": "verify=false"}
            report["seconds"] = round(time.perf_counter() - began, 2)
            write_report(partial, report)
            if report["passed"] is False:
                _refuse(partial, output, report)
    log_report(output, report)
    if config.run is not None:
        written.write(Path(config.run))  # the page shows the merge
    if config.push_to_hub is not None:
        _push(output, config.push_to_hub)
    return {"output": str(output), **report}


def _prepare(
    config: MergeConfig, adapters: list[Path], dtype: torch.dtype | None
) -> tuple[PreparedMerge, dict[str, Any]]:
    """Plan the merge, and start the report.

    An adapter's tensors are small, and OpenMP would synchronise its threads at each of them; so
    one thread is used.
    """
    import torch

    from sft.merge.prepare import prepare
    from sft.merge.sources import check_base, find

    size = None if config.max_shard_size is None else claim.bytes_of(config.max_shard_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        weights = config.weights or [1.0] * len(adapters)
        sources = find(adapters, weights, config.base, config.trust_remote_code)
        compared = check_base(sources) if config.check_base else "not compared: check_base=false"
        quantization = sources.quantization
        is_quantized = quantization.load_in_4bit or quantization.load_in_8bit
        dequantized = is_quantized and config.quantized_base == "dequantized"
        prepared = prepare(sources, dequantized, dtype, size)
    finally:
        torch.set_num_threads(threads)
    return prepared, {
        "passed": False,
        "adapters": [str(folder.resolve()) for folder in sources.adapters],
        "weights": sources.weights,
        "base": str(sources.base.name_or_path),
        "base_compared": compared,
        "onto": config.quantized_base if is_quantized else "the base's own weights",
        "dtype": config.dtype if dtype is not None else str(sources.stored_dtype)[6:],
        "untied": prepared.layout.untied,
    }


def _refuse(partial: Path, output: Path, report: dict[str, Any]) -> NoReturn:
    """Rename a merged model that failed the verification, and raise MergeError."""
    failed = claim.set_aside(partial, output)
    exact = report["dtype"] == "float32"
    fix = "please report this, with the folder's report" if exact else "dtype=float32"
    raise MergeError(
        f"the merged model differs from base + adapter: {report['reason']}; it is left in {failed} "
        f"for inspection\n    fix: {fix}"
    )


def _places(config: MergeConfig) -> tuple[list[Path], Path]:
    """Return the folders of the adapters, and the output folder."""
    if config.run is None:
        given = config.adapter if isinstance(config.adapter, list) else [config.adapter]
        return [Path(item) for item in given], Path(str(config.output))
    run = Path(config.run)
    if (run / "model").is_dir():
        raise MergeError(f"{run} trained every weight: {run / 'model'} is a full model")
    output = Path(config.output or run / record.MERGED)
    record.require_sound(run, f"adapter={run / record.ADAPTER} output={output}")
    return [run / record.ADAPTER], output


def _push(folder: Path, repository: str) -> None:
    """Upload the verified folder; a new repository is private."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        logger.info("uploading %s to %s", folder, repository)
        where = api.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # exceptions of the HTTP library, which depend on its version
        reason = str(error).strip().splitlines()[0]
        raise MergeError(
            f"{folder} is merged, but could not be uploaded to {repository}: {reason}\n"
            f"    fix: hf auth login, then: hf upload {repository} {folder}"
        ) from error
    logger.info("the merged model is uploaded to %s", where)


main = Command(
    name="merge",
    schema=MergeConfig,
    run=merge,
    check=lambda config: [*rule_problems(config), *check(config)],
    summary="merge an adapter into full weights, and verify them",
    examples=(
        "python -m sft.merge run=outputs/opt-125m_alpaca_r8_seed42",
        "python -m sft.merge adapter=FOLDER output=FOLDER base=facebook/opt-125m",
        "python -m sft.merge 'adapter=[ONE,OTHER]' 'weights=[0.7,0.3]' output=FOLDER",
    ),
)

if __name__ == "__main__":
    main()
