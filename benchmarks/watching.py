"""Measure what the figures of the logged lines cost.

    python benchmarks/watching.py [--runs 3] [--steps 200] [--layers 4] [--width 256] [SETTING...]

A Llama of random weights trains LoRA on the demo's rows. In every second step the figures do
nothing; what is compared is the median CPU time of the steps with them and without, in the same
run. The time that is spent in them is also summed. The steps are as short as those of a small
model; the figures take no longer beside large ones.
"""

import argparse
import functools
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
WARM_UP = 5  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    from support import build_model

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": given.width, "intermediate_size": 4 * given.width}
        sizes |= {"num_hidden_layers": given.layers, "num_key_value_heads": 4}
        model = build_model(Path(folder) / "model", "llama", tied=False, **sizes)
        command = ["model=hf", f"model.name_or_path={model}", "template=chat", "overwrite=true"]
        command += [f"dataset={ROOT}/assets/demo/train.jsonl", "train.eval_strategy=no"]
        command += ["train.save_strategy=no", "train.logging_steps=1", "precision=fp32"]
        command += [f"train.max_steps={given.steps}", f"output_dir={folder}/run", *given.settings]
        ratios, shares = [], []
        for _ in range(given.runs):
            on, off, inside = measured(command)
            ratios.append(on / off)
            shares.append(inside / on)
            print(
                f"{off * 1000:.2f} ms a step, with figures {on * 1000:.2f} ({ratios[-1]:.4f}); "
                f"in them {inside * 1e6:.0f} us ({shares[-1]:.3%})"
            )
    print(f"median ratio {statistics.median(ratios):.4f}, share {statistics.median(shares):.3%}")


def measured(command: list[str]) -> tuple[float, float, float]:
    """Train; return the seconds of a step with figures and without, and those spent in them."""
    from transformers import TrainerCallback

    from sft.train import main as command_line
    from sft.train import train
    from sft.watch import callbacks, clock, figures, operations

    steps = [0]
    inside = [0.0]
    times: list[float] = []

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())  # after the line of the previous step is written
            steps[0] += 1

    def only_in_every_second_step(owner: Any, name: str) -> Callable[..., Any]:
        stock: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(stock)
        def call(*args: Any, **kwargs: Any) -> Any:
            if steps[0] % 2 and steps[0] > WARM_UP:
                return None
            began = time.process_time()
            try:
                return stock(*args, **kwargs)
            finally:
                inside[0] += time.process_time() - began

        setattr(owner, name, call)
        return stock

    def watch(run: Any, metrics: Path) -> None:
        stock_watch(run, metrics)
        run.callback_handler.callbacks.insert(0, Steps())

    stock_watch, callbacks.watch = callbacks.watch, watch
    patched = [(clock.Clock, "mark"), (operations.Operations, "_see")]
    patched += [(figures.Figures, name) for name in ("on_log", "on_step_end")]
    stocks = [only_in_every_second_step(*each) for each in patched]
    try:
        train(command_line.compose(command))
    finally:
        callbacks.watch = stock_watch
        for (owner, name), stock in zip(patched, stocks, strict=True):
            setattr(owner, name, stock)
    # From one step's begin to the next one's: its line, and the data of the next step.
    took = [end - begin for begin, end in itertools.pairwise(times)]
    on, off = took[WARM_UP::2], took[WARM_UP + 1 :: 2]  # WARM_UP is odd: step 6 is on
    return statistics.median(on), statistics.median(off), inside[0] / (len(times) / 2)


if __name__ == "__main__":
    main()
