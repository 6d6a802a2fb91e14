"""Hydra launcher that passes the trials of a sweep to ``sft.sweep.trials``, one torchrun each.

Hydra imports this file whenever it composes a config, so the import must take milliseconds: no
torch. It must not use ``from __future__ import annotations``: Hydra executes the file before
sys.modules contains it, and a dataclass resolves types that are strings through sys.modules.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf


@dataclass
class TorchrunLauncherConf:
    """Settings of ``hydra.launcher``."""

    _target_: str = "hydra_plugins.sft_sweep.torchrun_launcher.TorchrunLauncher"
    nproc_per_node: int | None = None  # ranks of a trial; null: those of this torchrun, or 1


ConfigStore.instance().store(
    group="hydra/launcher", name="torchrun", node=TorchrunLauncherConf, provider="sft"
)


def _sweep_name(overrides: list[str]) -> str:
    from sft.sweep.trials import sweep_name

    return sweep_name(overrides)


# Hydra may execute this file more than once in a process, hence replace.
OmegaConf.register_new_resolver("sweep_name", _sweep_name, replace=True)


class TorchrunLauncher(Launcher):  # type: ignore[misc]
    """Trains the trials one after the other."""

    def __init__(self, nproc_per_node: int | None) -> None:
        self.nproc_per_node = nproc_per_node

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Store Hydra's objects; the task function is not needed, as trials are processes."""
        self.config_loader = hydra_context.config_loader
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Train all trials and print a table of them.

        Raises:
            SystemExit: A trial failed or the user interrupted. Hydra's own way, a JobReturn that
                holds an exception, would print a traceback below the table.
        """
        from sft.cli.command import report_error, start_logging, sweep_result
        from sft.errors import SftError
        from sft.sweep import beforehand, trials

        start_logging()
        hydra = self.config.hydra
        # Resolve the folder once: in a trial's own config, a name made of overrides would differ.
        sweep_dir = Path(hydra.sweep.dir)
        jobs = [list(overrides) for overrides in job_overrides]
        returns = [self._job_return(job, initial_job_idx + i) for i, job in enumerate(jobs)]
        sources = hydra.runtime.config_sources
        ranks = trials.ranks(self.nproc_per_node)
        try:
            planned = trials.plan(
                jobs,
                [OmegaConf.to_container(item.cfg, resolve=True) for item in returns],
                list(hydra.overrides.task),
                sweep_dir,
                ranks,
                [source.path for source in sources if source.provider == "command-line"],
            )
            beforehand.require(planned, ranks)
            exit_code = trials.run(planned, sweep_dir)
        except SftError as error:
            report_error(str(error))
            sweep_result.update(error=str(error))
            raise SystemExit(error.exit_code) from None
        sweep_result.update(sweep=str(sweep_dir), trials=trials.records(planned))
        if exit_code and (message := trials.all_failed(planned)):
            report_error(message)
            sweep_result.update(error=message)
        if exit_code:
            raise SystemExit(exit_code)
        for item, trial in zip(returns, planned, strict=True):
            item.status, item.working_dir = JobStatus.COMPLETED, trial.output_dir
            item.return_value = trial.final.get("eval_loss")
        return returns

    def _job_return(self, overrides: list[str], number: int) -> JobReturn:
        config = self.config_loader.load_sweep_config(self.config, overrides)
        config.hydra.job.id, config.hydra.job.num = str(number), number
        settings = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
        hydra_config = OmegaConf.masked_copy(config, ["hydra"])
        return JobReturn(overrides=overrides, cfg=settings, hydra_cfg=hydra_config)
