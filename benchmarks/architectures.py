"""Train, merge and answer with a small model of every type, and compare with Transformers + PEFT.

    python benchmarks/architectures.py [--only NAME ...] [--workers 2] [--write PAGE]

For every type of causal language model that the installed Transformers builds, in float32 and in
bf16, a model of a few thousand parameters is trained for one step by ``sft.train``, in three ways:
with the default settings, with the other value of ``train.padding_free`` (in float32 only), and
packed. The gradient of the adapter is compared with that of Transformers and PEFT alone: eager
attention, one document at a time, autograd on the model's own logits. Rows are longer than all
windows and chunks. The first evaluation, the merge, and answers to prompts in a batch and alone are
compared too.

A type is "exact" if what sft does agrees, "refused" if sft says before training that it cannot, and
"wrong" otherwise; an error without a fix is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

# The libraries read these as they are imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import architectures_page
import datasets
import small_models
import torch
import transformers
from architectures_page import PARTS, cell, total
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from sft import generate, train
from sft.errors import SftError
from sft.fast.isolation import ALONE
from sft.inference.answers import continuations
from sft.merge import __main__ as merge
from sft.training import build, loop, trainer  # noqa: F401  (imported once, before the workers fork)

SECONDS, MEMORY = 240, 8 << 30  # of one type in one precision
LENGTHS, HELD_OUT = (40, 20, 33, 17), (37, 21)
PACKED = 64  # tokens in a pack: the four documents fill two
EXACT = 1e-5
# A gradient in bf16 is compared with that of the same weights in float32. Plain Transformers is
# also away from it, by the rounding of every product. Another order of the same roundings may be
# twice as far away; in these random models a leak moves the gradient by several times that.
# That distance depends on the data: beyond the bound, the mean of more sets of documents decides.
# Where plain Transformers in float32 is further away from float64 than that, another order of sums
# may be as far away on the other side.
FP32_FACTOR = 4.0
BF16_FACTOR, BF16_LEAST = 2.0, 2.0**-7
MORE = (100, 200, 300, 400)
WAYS = {"fp32": ("default", "other", "packed"), "bf16": ("default", "packed")}


def documents(lengths: tuple[int, ...], seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, 250, (length,), generator=generator).tolist()
        ids[-1] = 258  # EOS of the tiny tokenizer
        rows.append({"input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    return rows


def write_rows(path: Path, rows: list[dict[str, list[int]]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# What is compared with: Transformers and PEFT


def plain(
    base: Path,
    adapter: dict[str, torch.Tensor],
    lora: Any,
    dtype: torch.dtype,
    attention: str = "eager",
) -> Any:
    """Load base and adapter with Transformers and PEFT alone, with eager attention."""
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    model = AutoModelForCausalLM.from_pretrained(base, **options)
    with contextlib.suppress(ValueError):  # a type without experts, or whose experts are its own
        model.set_experts_implementation("eager")
    model = get_peft_model(model, lora)
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert weights.keys() == adapter.keys(), weights.keys() ^ adapter.keys()
    for name, weight in weights.items():
        weight.data = adapter[name].clone()
    return model.train()


def mean_loss(model: Any, rows: list[dict[str, list[int]]], bf16: bool) -> torch.Tensor:
    """Compute the mean loss over trained tokens, one document at a time."""
    total: Any = 0.0
    count = 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            scores = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(scores.float(), labels, reduction="sum")
        count += int((labels != -100).sum())
    return total / count


def balancing_losses(
    model: Any, rows: list[dict[str, list[int]]], bf16: bool, alone: bool
) -> torch.Tensor:
    """Compute the loss over all documents, or the mean of the micro-batches' if each has one."""
    parts = [[row] for row in rows] if alone else [rows]
    return sum(balancing_loss(model, part, bf16) for part in parts) / len(parts)


def balancing_loss(model: Any, rows: list[dict[str, list[int]]], bf16: bool) -> torch.Tensor:
    """Compute the model's own loss that balances its experts, over all documents."""
    lengths = [len(row["labels"]) for row in rows]
    width = max(lengths)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["labels"])) for row in rows])
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(
            input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True
        )
    return output.aux_loss


def gradient(
    model: Any,
    rows: list[dict[str, list[int]]],
    bf16: bool,
    coefficient: float = 0.0,
    alone: bool = False,
) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = mean_loss(model, rows, bf16)
    if coefficient:
        loss = loss + coefficient * balancing_losses(model, rows, bf16, alone)
    loss.backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad.float().clone()
        for name, weight in model.named_parameters()
        if weight.requires_grad
    }


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the distance between two gradients, as a share of the second one's length."""
    size = sum(float(value.double().square().sum()) for value in wanted.values())
    away = sum(float((found[n] - wanted[n]).double().square().sum()) for n in wanted)
    return (away / max(size, 1e-30)) ** 0.5


@torch.no_grad()
def merge_apart(base: Path, watched: Watched, run: Path, dtype: torch.dtype) -> tuple[float, float]:
    """Compare the merged model, read by Transformers alone, with the base and trained adapter.

    Returns:
        The largest difference of a logit, as a share of the largest logit, and its bound: PEFT's
        own merge, rounded to ``dtype``, may be away too.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    ids = torch.tensor([documents(LENGTHS, 0)[0]["input_ids"]])

    def scores(model: Any) -> torch.Tensor:
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits[0]
        return found

    adapted = plain(base, watched.trained, watched.lora, torch.float32)
    wanted = scores(adapted)
    stock = adapted.merge_and_unload()
    for weight in stock.parameters():
        weight.data = weight.data.to(dtype).float()
    rounded = scores(stock)
    merged = scores(AutoModelForCausalLM.from_pretrained(run / "merged", **options))
    scale = float(wanted.abs().max())
    own = float((rounded - wanted).abs().max()) / scale
    factor, least = (FP32_FACTOR, EXACT) if dtype == torch.float32 else (BF16_FACTOR, BF16_LEAST)
    return float((merged - wanted).abs().max()) / scale, max(factor * own, least)


# What is compared


class Watched:
    """Gives the adapter of a run random values, and keeps them and the gradient of its step."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}  # before the step
        self.trained: dict[str, torch.Tensor] = {}  # after it
        self.gradient: dict[str, torch.Tensor] = {}
        self.lora: Any = None
        self.choices: dict[str, Any] = {}
        self.aux = 0.0

    def fit(self, settings: list[str]) -> Path:
        with mock.patch.object(loop, "train", self._train):
            return train.fit(train.main.compose(settings))

    def _train(self, running: Any, *arguments: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(1)
        model = running.model
        for name, weight in sorted(model.named_parameters()):
            if weight.requires_grad:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.data = (0.2 * drawn).to(weight.dtype)
                self.weights[name] = weight.data.float().clone()
        self.lora = model.peft_config["default"]
        self.aux = running.router_aux_loss_coef if running.aux_loss_enabled else 0.0
        watched = self

        class Keep(transformers.TrainerCallback):
            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                watched.gradient = {
                    name: torch.zeros_like(weight)
                    if weight.grad is None
                    else weight.grad.float().clone()
                    for name, weight in model.named_parameters()
                    if weight.requires_grad
                }

        running.add_callback(Keep())
        metrics = _stock_train(running, *arguments)
        self.trained = {
            name: weight.detach().float().clone()
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        return metrics


_stock_train = loop.train


def settings_of(
    base: Path, folder: Path, way: str, precision: str, joined: bool, extra: list[str]
) -> list[str]:
    settings = [
        *("model=hf", f"model.name_or_path={base}", f"output_dir={folder / way}"),
        *("dataset=jsonl", f"dataset.path={folder / 'rows.jsonl'}", "dataset.num_proc=1"),
        *(f"dataset.eval_path={folder / 'held_out.jsonl'}", "dataset.eval_fraction=0"),
        *("lora=all-linear", "lora.lora_dropout=0", f"precision={precision}"),
        *("train.max_steps=1", "train.warmup_steps=0", "train.learning_rate=1e-4"),
        *("train.max_grad_norm=1e9", "train.save_strategy=no", "train.logging_steps=1"),
        f"dataset.max_length={PACKED}",
    ]
    count = 2 if way == "packed" else 4
    settings += [f"train.global_batch_size={count}", f"train.per_device_train_batch_size={count}"]
    if way == "packed":
        settings += ["dataset.packing=bfd"]
    if way == "other":
        settings += [f"train.padding_free={str(not joined).lower()}"]
    given = {item.split("=")[0] for item in extra}
    return [*(item for item in settings if item.split("=")[0] not in given), *extra]


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines)[:400]


def verdict(action: Any) -> dict[str, Any]:
    """Run a comparison: exact or wrong with its figure, or refused with the message."""
    try:
        return action()
    except SftError as error:
        return {"verdict": "refused", "message": one_line(error)}
    except Exception as error:  # whatever a library raises unhandled is what a user would see
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        traceback.print_exc()
        return {
            "verdict": "wrong",
            "message": f"{type(error).__name__}: {one_line(error)} ({place})",
        }


def judged(figure: float, bound: float, **more: Any) -> dict[str, Any]:
    return {
        "verdict": "exact" if figure <= bound else "wrong",
        "figure": figure,
        "bound": bound,
    } | more


def repeated(given: Any, extra: list[str], seed: int, dtype: torch.dtype) -> tuple[float, float]:
    """Train on other documents; return how far sft and plain bf16 are from plain float32."""
    base, folder, way, precision, joined = given
    folder = folder / f"{way}-{seed}"
    folder.mkdir()
    rows = documents(LENGTHS, seed)
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "held_out.jsonl", documents(HELD_OUT, 1))
    watched = Watched()
    watched.fit(settings_of(base, folder, way, precision, joined, extra))
    same = (base, watched.weights, watched.lora)
    balance = (watched.aux, "train.per_device_train_batch_size=1" in extra)
    wanted = gradient(plain(*same, torch.float32), rows, False, *balance)
    own = gradient(plain(*same, dtype), rows, True, *balance)
    return apart(watched.gradient, wanted), apart(own, wanted)


def compare(
    kind: str, precision: str, folder: Path, ways: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Do all comparisons for one type in one precision."""
    ways = ways or WAYS[precision]
    bf16 = precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    try:
        base = small_models.build(folder / "base", kind, dtype)
        with torch.no_grad():
            model = AutoModelForCausalLM.from_pretrained(base).eval()
            scores = model(input_ids=torch.arange(40)[None], use_cache=False).logits
        assert scores.shape[-1] > 250 and scores.isfinite().all(), "no finite logits"
        counted = model.num_parameters()
    except Exception as error:  # what Transformers alone cannot do is listed, not judged
        traceback.print_exc()
        return {"kind": kind, "precision": precision, "build": one_line(error)}
    rows, held_out = documents(LENGTHS, 0), documents(HELD_OUT, 1)
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "held_out.jsonl", held_out)
    result: dict[str, Any] = {"kind": kind, "precision": precision, "parameters": counted}
    result["class"] = type(model).__name__
    extra: list[str] = []
    runs: dict[str, Path] = {}
    first: Watched | None = None
    for way in ways:
        watched = Watched()

        def trained(
            way: str = way, watched: Watched = watched, extra: list[str] = extra
        ) -> dict[str, Any]:
            given = (base, folder, way, precision, result.get("joined", True))
            try:
                run = watched.fit(settings_of(*given, extra))
            except SftError as error:  # the fix that it names must help
                if way != "default" or ALONE not in str(error):
                    raise
                result["alone"] = one_line(error)
                extra.extend(ALONE.split())
                shutil.rmtree(folder / way, ignore_errors=True)
                run = watched.fit(settings_of(*given, extra))
            runs[way] = run
            alone = "alone" in result
            record = json.loads((run / "run.json").read_text())
            chosen = {name: item["value"] for name, item in record["choices"].items()}
            if way == "default":
                result["joined"] = chosen["train.padding_free"]
                result["attention"] = chosen["model.attn_implementation"]
            balance = (watched.aux, alone)
            same = (base, watched.weights, watched.lora)
            wanted = gradient(plain(*same, torch.float32), rows, False, *balance)
            figure, bound, reference = apart(watched.gradient, wanted), EXACT, "eager"
            if not bf16 and figure > EXACT:  # float32 itself may be further away from float64
                model = plain(*same, torch.float32).double()
                own = apart(wanted, gradient(model, rows, False, *balance))
                bound = max(EXACT, FP32_FACTOR * own)
            if bf16:
                own = apart(gradient(plain(*same, dtype), rows, True, *balance), wanted)
                again = ()
                if figure > max(BF16_FACTOR * own, BF16_LEAST):
                    again = (repeated(given, extra, seed, dtype) for seed in MORE)
                pairs = [(figure, own), *again]
                figure, own = (sum(part) / len(pairs) for part in zip(*pairs, strict=True))
                bound = max(BF16_FACTOR * own, BF16_LEAST)
            if not bf16 and figure > bound:
                # A ReLU whose input is 0 but for rounding has another slope under Transformers'
                # own default attention too.
                with contextlib.suppress(ValueError):
                    stock = plain(*same, torch.float32, "sdpa")
                    found = gradient(stock, rows, False, *balance)
                    if (other := apart(watched.gradient, found)) < figure:
                        figure, reference = other, "sdpa"
            more = {"joined": chosen["train.padding_free"], "reference": reference}
            return judged(figure, bound, aux=watched.aux, **more)

        result[way] = verdict(trained)
        if way == "default" and watched.aux:
            extra += ["train.extra.router_aux_loss_coef=0.0"]
        if first is None and way in runs:
            first, run = watched, runs[way]
    if first is None:
        return result

    def evaluated() -> dict[str, Any]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        found = next(line["eval_loss"] for line in map(json.loads, lines) if "eval_loss" in line)
        with torch.no_grad():
            one = plain(base, first.weights, first.lora, torch.float32).eval()
            wanted = float(mean_loss(one, held_out, False))
            bound = EXACT
            if bf16:
                other = plain(base, first.weights, first.lora, dtype).eval()
                own = float(mean_loss(other, held_out, True))
                bound = max(BF16_FACTOR * abs(own - wanted) / wanted, BF16_LEAST)
        return judged(abs(found - wanted) / wanted, bound)

    def merged() -> dict[str, Any]:
        rounded = ""
        try:
            report = merge.merge(merge.main.compose([f"run={run}"]))
        except SftError as error:
            if not bf16 or "dtype=float32" not in str(error):
                raise
            rounded = one_line(error)  # the fix that it names must help
            report = merge.merge(merge.main.compose([f"run={run}", "dtype=float32"]))
        figure, bound = merge_apart(base, first, run, dtype if not rounded else torch.float32)
        own = {"own_figure": report["max_difference"], "own_bound": report["allowed_difference"]}
        return judged(figure, bound, rounded=rounded, **own)

    result["eval"] = verdict(evaluated)
    result["merge"] = verdict(merged)
    result["answers"] = verdict(lambda: answered(run / "adapter", bf16))
    return result


def answered(adapter: Path, bf16: bool) -> dict[str, Any]:
    """Answer prompts in a batch and alone; in bf16 a near tie may be decided differently."""
    model, template, _ = generate._load(generate.GenerateConfig(adapter=str(adapter)), adapter)
    prompts = [row["input_ids"][:-1] for row in documents((19, 3, 11), 2)]
    options = (model, template.tokenizer)
    batch = continuations(*options, prompts, 6, model.device)
    worst = 0.0
    for prompt, together in zip(prompts, batch.tolist(), strict=True):
        alone = continuations(*options, [prompt], 6, model.device)[0].tolist()
        pairs = enumerate(zip(together, alone, strict=False))
        place = next((place for place, (one, other) in pairs if one != other), None)
        if place is None:
            continue
        with torch.no_grad():
            ids = torch.tensor([prompt + alone[:place]])
            scores = model(input_ids=ids, use_cache=False).logits[0, -1].float()
        gap = abs(float(scores[together[place]] - scores[alone[place]]))
        worst = max(worst, gap / float(scores.abs().max()))
    return judged(worst, 2.0**-5 if bf16 else 1e-5)


# Every type, each in a process of its own


def in_child(kind: str, precision: str, folder: Path, seconds: int) -> int:
    """Start the comparisons in a forked process, which writes their result; return its id."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(seconds)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 8 * 2**30,) * 2)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        began = time.perf_counter()
        result = compare(kind, precision, folder)
        result["seconds"] = round(time.perf_counter() - began, 1)
        (folder / "result.json").write_text(json.dumps(result))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def every(
    kinds: list[str], precisions: list[str], workers: int, keep: Path
) -> list[dict[str, Any]]:
    """Compare all types, ``workers`` at a time."""
    waiting = [(kind, precision) for kind in kinds for precision in precisions]
    running: dict[int, tuple[str, str, Path]] = {}
    results = []
    while waiting or running:
        while waiting and len(running) < workers:
            kind, precision = waiting.pop(0)
            folder = keep / f"{kind}-{precision}"
            folder.mkdir(parents=True)
            running[in_child(kind, precision, folder, SECONDS)] = (kind, precision, folder)
        child, status = os.wait()
        if child not in running:
            continue
        kind, precision, folder = running.pop(child)
        if (folder / "result.json").is_file():
            result = json.loads((folder / "result.json").read_text())
        else:
            what = "no end in time" if os.WIFSIGNALED(status) else "the process died"
            result = {"kind": kind, "precision": precision}
            result["default"] = {"verdict": "wrong", "message": what}
        results.append(result)
        print(line(result), flush=True)
        for part in ("base", *WAYS[precision]):
            shutil.rmtree(folder / part, ignore_errors=True)
    return sorted(results, key=lambda item: (item["kind"], item["precision"]))


def line(result: dict[str, Any]) -> str:
    """Format a result for the terminal."""
    cells = [f"{part}={cell(result, part)}" for part in PARTS if part in result]
    said = [result["build"]] if "build" in result else []
    said += [
        item["message"] for item in result.values() if isinstance(item, dict) and "message" in item
    ]
    how = f" joined={result.get('joined')} {result.get('attention')} {result.get('seconds')}s"
    return " ".join([total(result), result["kind"], result["precision"], *cells, how, *said[:2]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="types; the default is every one")
    parser.add_argument("--precision", nargs="*", default=["fp32", "bf16"])
    parser.add_argument("--workers", type=int, default=1, help="types at a time")
    parser.add_argument(
        "--write", type=Path, help="the page to write, such as docs/architectures.md"
    )
    parser.add_argument("--keep", type=Path, help="a folder for the logs of every type")
    given = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    began = time.perf_counter()
    keep = given.keep or Path(tempfile.mkdtemp(prefix="architectures-"))
    os.environ["SFT_CACHE_DIR"] = str(keep / "cache")
    AutoTokenizer.from_pretrained(small_models.TINY)
    kinds = given.only or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    results = every(kinds, given.precision, given.workers, keep)
    counts = Counter(map(total, results))
    seconds = time.perf_counter() - began
    print(
        ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())), f"{seconds:.0f} s"
    )
    (keep / "results.json").write_text(json.dumps(results, indent=1))
    if given.write:
        given.write.write_text(architectures_page.page(results, seconds))
    if not given.keep:
        with contextlib.suppress(OSError):
            shutil.rmtree(keep)
    sys.exit(counts["wrong"] > 0)


if __name__ == "__main__":
    main()
