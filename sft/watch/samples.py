"""Answers that the model generates while it trains, in samples.jsonl and on the terminal."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList, TrainerCallback

from sft.checkpoint import sharded
from sft.files import read_records, to_json, write_text
from sft.inference.answers import continuations, rounds, takes_padding, texts_of
from sft.inference.sampling import Draw
from sft.inference.stops import all_stop_ids
from sft.ranks import gather

if TYPE_CHECKING:
    from sft.inference.prompts import Prompt, Prompts

logger = logging.getLogger("sft")

SHOWN = 160  # characters of a prompt or an answer on the terminal, at most


class Samples(TrainerCallback):  # type: ignore[misc]
    """Answers the prompts before the first step, every few steps, and after the last one.

    An answer is taken when the next step begins: by then the step before is logged and saved. So a
    run that is interrupted meanwhile takes it when it is resumed.
    """

    def __init__(self, trainer: Any, prompts: Prompts, file: Path) -> None:
        """Set up the samples, of which the prompts have the settings.

        Args:
            trainer: The trainer.
            prompts: What is answered.
            file: samples.jsonl of the run.
        """
        self.trainer, self.prompts, self.file = trainer, prompts, file
        self.settings, self.stop_ids = prompts.settings, prompts.template.stop_ids
        self.last = -1  # the step of the newest samples
        self.stopped = self.unwritten = False  # whether memory or the disk has failed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the samples that a resumed run will take again: those after its checkpoint."""
        if state.is_world_process_zero and self.file.is_file():
            step = state.global_step  # 0: the run starts again
            kept = [found for found in read_records(self.file) if 0 < step >= found["step"]]
            self._write("".join(f"{to_json(record)}\n" for record in kept), again=True)
            self.last = kept[-1]["step"] if kept else -1
        self.last = gather(self.last)[0]

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the samples of the step before."""
        if state.global_step % self.settings.every == 0:
            self.take(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the samples of the last step."""
        self.take(state)

    def take(self, state: Any) -> None:
        """Answer the prompts with the model as it is now, unless this step has its samples.

        Raises:
            Stopped: A signal asked the run to stop.
        """
        step = state.global_step
        if self.stopped or step <= self.last:
            return
        main = state.is_world_process_zero
        asked, room = gather((self.prompts.again(), self.prompts.room) if main else None)[0]
        failed = None
        try:
            with self.trainer.guard.alerts.patiently():
                answers = self._answers(asked, room)
        except torch.OutOfMemoryError as error:
            # Under ZeRO-3 the other ranks wait for this one in the middle of a forward pass.
            if sharded.any_sharded(self.trainer.bare_model):
                raise
            answers, failed = {}, str(error).partition(".")[0]
        self.trainer.stop_if_asked()
        everywhere = gather((answers, failed))
        if why := next((why for _, why in everywhere if why), None):
            self.stopped = True
            if main:
                logger.info(
                    "warning: no more samples are taken, because memory has run out: %s; a smaller "
                    "sample.max_new_tokens or sample.num needs less",
                    why,
                )
            return
        self.last = step
        if main:
            texts = dict(itertools.chain(*(found.items() for found, _ in everywhere)))
            records = [
                {"step": step, "index": index, "prompt": prompt.text, **texts[index]}
                for index, prompt in enumerate(asked)
            ]
            self._write("".join(f"{to_json(record)}\n" for record in records))
            where = f"step {step:>{len(str(state.max_steps))}}/{state.max_steps}"
            logger.info("%s", "\n".join(f"{where}  {describe(record)}" for record in records))

    def _answers(self, asked: list[Prompt], room: int) -> dict[int, dict[str, Any]]:
        """Answer this rank's share of the prompts, by their numbers."""
        model, tokenizer = self.trainer.bare_model, self.trainer.processing_class
        device, together = self.trainer.args.device, sharded.any_sharded(model)
        stops = all_stop_ids(model.generation_config, tokenizer, self.stop_ids)
        size = self.trainer.args.per_device_eval_batch_size
        size = size if takes_padding(model, tokenizer, device) else 1
        found = {}
        for start, numbers in rounds(len(asked), size):
            if not (numbers or together):
                continue
            # A rank that has none left repeats a prompt: ZeRO-3 needs every rank.
            batch = [asked[number] for number in numbers or [start]]
            lengths = [len(prompt.ids) for prompt in batch]
            draw = Draw(self.settings, lengths, numbers or [start], device)
            rows = continuations(
                model,
                tokenizer,
                [prompt.ids for prompt in batch],
                room,
                device,
                self.stop_ids,
                synced_gpus=together,
                logits_processor=LogitsProcessorList([draw] if draw.steps else []),
                stopping_criteria=StoppingCriteriaList([self._interrupted]),
            ).tolist()
            for number, prompt, row in zip(numbers, batch, rows, strict=False):
                answer = list(itertools.takewhile(lambda token: token not in stops, row))
                texts = texts_of(tokenizer, [answer, prompt.reference or []], stops)
                found[number] = {
                    "answer": texts[0],
                    "reference": None if prompt.reference is None else texts[1],
                    "tokens": len(answer),
                    "stopped": len(answer) < len(row),
                }
        return found

    def _interrupted(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """End all answers when a signal asks the run to stop."""
        guard = self.trainer.guard
        asked = guard is not None and guard.signals.received is not None
        return torch.full((len(ids),), asked, device=ids.device)

    def _write(self, text: str, again: bool = False) -> None:
        """Append to samples.jsonl, or write it again; a failure ends no run, and is said once."""
        try:
            if again:
                write_text(self.file, text)
            else:
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(text)
        except OSError as error:
            if not self.unwritten:
                logger.info("warning: %s cannot be written: %s", self.file, error)
            self.unwritten = True


def describe(record: dict[str, Any]) -> str:
    """Format a sample for the terminal: the prompt, the answer, and the answer in the data."""
    cut = "" if record["stopped"] else f" [cut after {record['tokens']} tokens]"
    lines = [f"sample {record['index'] + 1}: {shortened(record['prompt'])}"]
    lines.append(f"    answer: {shortened(record['answer'])}{cut}")
    if record["reference"] is not None and record["reference"].strip() != record["answer"].strip():
        lines.append(f"    in the data: {shortened(record['reference'])}")
    return "\n".join(lines)


def shortened(text: str) -> str:
    """Return a text as one line of at most ``SHOWN`` characters, without those in its middle."""
    line = text.strip().replace("\r", "").replace("\n", "↵").replace("\t", " ")
    line = "".join(letter if letter.isprintable() else "\ufffd" for letter in line)
    half = SHOWN // 2 - 3
    return line if len(line) <= SHOWN else f"{line[:half]} [...] {line[-half:]}"
