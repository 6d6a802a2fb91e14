"""New tokens, another EOS and pad token; and what is saved stops where the template ends a turn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_tokenizers import train_tokenizer
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from support import FAMILIES, assert_same_adapter, build_adapter, build_model, losses, records
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from warm import run_warm

from sft.config.new_tokens import read_new_tokens
from sft.config.settings import ModelConfig
from sft.errors import ConfigError, RunError, SftError
from sft.fast import head, rows
from sft.model.tokenizer import load_tokens
from sft.model.tokens import initialise

NEW = 'model.new_tokens=["<think>","</think>"]'
WEIGHTS = "adapter_model.safetensors"
KNOWN = 320  # tokens of the embedded tokenizer


SCALED = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Give small models: their rows are as many as their tokens, but for ``spare``."""
    folder = tmp_path_factory.mktemp("bases")
    made = {
        "untied": ("llama", False, {}),
        "tied": ("llama", True, {}),
        "spare": ("qwen3", True, {"vocab_size": KNOWN + 7}),
        "bias": ("gptj", False, {}),
        "scaled": ("gemma3_text", True, {}),
    }
    FAMILIES["gemma3_text"] = SCALED
    found = {
        name: build_model(folder / name, family, tied, **changed)
        for name, (family, tied, changed) in made.items()
    }
    del FAMILIES["gemma3_text"]
    return found


@pytest.fixture(scope="session")
def thoughts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give rows whose completions hold both new tokens, and four others to evaluate on."""
    folder = tmp_path_factory.mktemp("thoughts")
    lines = [
        {"prompt": f"Say {n}.", "completion": f"<think>{'ab' * (n % 4)}</think> {n}"}
        for n in range(12)
    ]
    for name, part in (("rows", lines[:8]), ("held", lines[8:])):
        text = "".join(json.dumps(line) + "\n" for line in part)
        (folder / f"{name}.jsonl").write_text(text)
    return folder / "rows.jsonl", folder / "held.jsonl"


def settings(base: Path, data: tuple[Path, Path], run: Path, *more: str) -> list[str]:
    """Give the settings of four steps; those of ``more`` replace the others."""
    given = [
        *("model=hf", f"model.name_or_path={base}", "template=completion", "precision=fp32"),
        *("dataset=jsonl", f"dataset.path={data[0]}", f"dataset.eval_path={data[1]}"),
        *("dataset.eval_fraction=0", f"output_dir={run}", "train.max_steps=4"),
        *("train.global_batch_size=4", "train.per_device_train_batch_size=2"),
        *("train.learning_rate=1e-2", "train.logging_steps=1", "train.save_strategy=no", *more),
    ]
    return list({item.partition("=")[0]: item for item in given}.values())


def train(given: list[str]) -> None:
    from sft.train import main, train

    train(main.compose(given))


def eval_losses(run: Path) -> list[float]:
    return [record["eval_loss"] for record in records(run) if "eval_loss" in record]


def ends_of(folder: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end.weight.detach() for end in ends]


@pytest.mark.parametrize("kind", ["untied", "tied", "spare", "bias"])
def test_new_rows_begin_as_means(bases: dict[str, Path], kind: str) -> None:
    given = {"<think>": None, "<b>": "abc"}
    tokenizer, new = load_tokens(ModelConfig(name_or_path=str(bases[kind]), new_tokens=given))
    assert tokenizer.convert_tokens_to_ids(["<think>", "<b>"]) == [KNOWN, KNOWN + 1] == new.ids
    assert tokenizer("x<think>y<b>")["input_ids"][1::2] == new.ids
    model = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32)
    before = ends_of(bases[kind])
    bias = getattr(model.get_output_embeddings(), "bias", None)
    bias = None if bias is None else bias.detach().clone()
    initialise(model, new)
    parts = AutoTokenizer.from_pretrained(bases[kind])("abc", add_special_tokens=False).input_ids
    size = KNOWN + 7 if kind == "spare" else KNOWN + 2
    for end, old in zip(
        (model.get_input_embeddings(), model.get_output_embeddings()), before, strict=True
    ):
        assert end.weight.shape[0] == size == model.config.vocab_size
        assert end.weight[:KNOWN].equal(old[:KNOWN])
        expected = torch.stack([old[:KNOWN].mean(0), old[parts].mean(0)])
        torch.testing.assert_close(end.weight[new.ids].detach(), expected, rtol=0, atol=1e-7)
        assert end.weight[KNOWN + 2 :].equal(old[KNOWN + 2 :])
    if bias is not None:
        found = model.get_output_embeddings().bias.detach()
        assert found[:KNOWN].equal(bias)
        torch.testing.assert_close(found[KNOWN:], bias.mean().expand(2))


@pytest.mark.parametrize("kind", ["untied", "tied", "scaled"])
@pytest.mark.parametrize("way", ["chunked", "trl", "plain"])
def test_rows_get_the_gradients_of_peft(bases: dict[str, Path], kind: str, way: str) -> None:
    ids = [KNOWN, KNOWN + 1]
    found = {}
    for mine in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32)
        model.resize_token_embeddings(KNOWN + 2, mean_resizing=False)
        named = {"embed_tokens": ids} | ({"lm_head": ids} if kind == "untied" else {})
        lora = LoraConfig(target_modules=["q_proj"], trainable_token_indices=named)
        peft: Any = get_peft_model(model, lora)
        tokens = torch.randint(0, KNOWN + 2, (2, 9))
        tokens[:, 4] = torch.tensor(ids)
        labels = tokens.masked_fill(torch.rand(2, 9) < 0.2, -100)
        if mine:
            rows.install(peft, partitioned=False)
            head.install(peft.get_base_model(), way)
            loss = peft(input_ids=tokens, labels=labels, fused_lm_head=True).loss
        else:
            logits = peft(input_ids=tokens).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        grads = {n: p.grad for n, p in peft.named_parameters() if p.requires_grad}
        found[mine] = (loss.detach(), grads)
    assert len([name for name in found[True][1] if "token" in name]) == len(named)
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["untied", "tied", "spare", "bias"])
def test_an_adapter_with_new_tokens_is_the_same_everywhere(
    bases: dict[str, Path],
    thoughts: tuple[Path, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    """As it was trained, loaded by PEFT alone, and merged."""
    run = tmp_path / "run"
    caplog.set_level("INFO", "sft")
    train(settings(bases[kind], thoughts, run, NEW))
    saved = load_file(run / "adapter" / WEIGHTS)
    ends = [name for name in saved if "lora_" not in name]
    assert len(ends) == {"untied": 2, "bias": 3}.get(kind, 1)
    assert all(saved[name].shape[0] == 2 for name in ends if "token_adapter" in name)
    line = json.loads((run / "run.json").read_text())["choices"]["model.new_tokens"]
    assert line["value"] == 2
    count = 256 if kind == "untied" else 128
    assert f"{count} of them are rows of single tokens" in caplog.text
    numbers = {"untied": "256 parameters", "bias": "lm_head is trained whole"}
    assert numbers.get(kind, "which the head shares: 128 parameters") in line["reason"]
    final = eval_losses(run)[-1]
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    assert loss_of(adapted, tokenizer, thoughts[1]) == pytest.approx(final, rel=1e-5)
    merge_of(run)
    whole = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert loss_of(whole, tokenizer, thoughts[1]) == pytest.approx(final, rel=1e-5)
    assert whole.config.vocab_size == (KNOWN + 7 if kind == "spare" else KNOWN + 2)
    # The only rows that are trained are those of the new tokens.
    for end, old in zip(ends_of(run / "merged"), ends_of(bases[kind]), strict=True):
        if kind != "bias":
            assert end[:KNOWN].equal(old[:KNOWN]) and end[KNOWN + 2 :].equal(old[KNOWN + 2 :])
        assert (end[[KNOWN, KNOWN + 1]] - old[:KNOWN].mean(0)).abs().amax(1).min() > 1e-3


TYING = "lora.extra.ensure_weight_tying=true"


@pytest.mark.parametrize("stage", ["none", "stage3"])
def test_a_tied_embedding_is_trained_whole_as_one(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path, stage: str
) -> None:
    """As it was trained, loaded by PEFT alone, and merged; split by ZeRO-3 too."""
    run = tmp_path / "run"
    name = "embed_tokens" if stage == "none" else "lm_head"  # PEFT trains both in either case
    more = [NEW, TYING, f"lora.modules_to_save=[{name}]", f"zero={stage}"]
    if stage == "none":
        train(settings(bases["tied"], thoughts, run, *more))
    else:
        run_warm("train", *settings(bases["tied"], thoughts, run, *more), ranks=2, cwd=tmp_path)
    final = eval_losses(run)[-1]
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32)
    assert loss_of(adapted, tokenizer, thoughts[1]) == pytest.approx(final, rel=1e-5)
    merge_of(run)
    whole = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    assert loss_of(whole, tokenizer, thoughts[1]) == pytest.approx(final, rel=1e-5)
    embedding, head = ends_of(run / "merged")
    assert embedding.equal(head) and not embedding[:9].equal(ends_of(bases["tied"])[0][:9])


@pytest.mark.parametrize(("family", "said"), [("gptj", "without its bias"), ("gpt2", "names wte")])
def test_what_peft_would_not_tie_is_refused(
    thoughts: tuple[Path, Path], tmp_path: Path, family: str, said: str
) -> None:
    base = build_model(tmp_path / family, family, tied=True)
    given = settings(base, thoughts, tmp_path / "run", TYING, "lora.modules_to_save=[wte]")
    with pytest.raises(ConfigError, match=said) as raised:
        train(given)
    assert "lora.modules_to_save=[wte,lm_head]" in str(raised.value)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_trained_weights_must_hold_the_new_rows(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    more = [NEW, "lora=none", "model.trainable=[model.layers.1, model.embed]"]
    given = settings(bases[kind], thoughts, tmp_path / "run", *more)
    if kind == "untied":
        with pytest.raises(ConfigError, match="leaves lm_head") as raised:
            train(given)
        (fix,) = re.findall("'(model.trainable=.*)'", str(raised.value))
        given = settings(bases[kind], thoughts, tmp_path / "run", *more, fix)
    train(given)
    for end, old in zip(ends_of(tmp_path / "run" / "model"), ends_of(bases[kind]), strict=True):
        assert (end[KNOWN:] - old[:KNOWN].mean(0)).abs().amax(1).min() > 1e-3


def loss_of(model: Any, tokenizer: Any, path: Path) -> float:
    """Compute the mean loss of held-out rows with the model's own logits."""
    total, count = 0.0, 0
    for line in map(json.loads, path.read_text().splitlines()):
        prompt = tokenizer(line["prompt"] + "\n", add_special_tokens=False).input_ids
        answer = tokenizer(line["completion"], add_special_tokens=False).input_ids
        assert sum(token in answer for token in (KNOWN, KNOWN + 1)) == 2
        ids = [*prompt, *answer, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        labels = torch.tensor(ids[len(prompt) :])
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return total / count


def merge_of(run: Path) -> None:
    from sft.merge import __main__ as merge

    merge.merge(merge.main.compose([f"run={run}"]))


def test_a_run_with_new_tokens_goes_on_without_their_file(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path
) -> None:
    from sft import prove

    straight, again, file = tmp_path / "straight", tmp_path / "again", tmp_path / "tokens.txt"
    saving = ("train.save_strategy=steps", "train.save_steps=2")
    file.write_text("<think>\n\n</think>\n")
    for run in (straight, again):
        train(settings(bases["tied"], thoughts, run, f"model.new_tokens={file}", *saving))
    prove.cut_back(again, 2)
    file.write_text("<think>\n</thought>\n")
    with pytest.raises(RunError, match=r"new_tokens: \['<think>', '</think>'\] there"):
        train(settings(bases["tied"], thoughts, again, f"model.new_tokens={file}", *saving))
    file.unlink()
    train(settings(bases["tied"], thoughts, again, NEW, *saving))
    assert losses(again) == losses(straight)
    one, other = (load_file(run / "adapter" / WEIGHTS) for run in (again, straight))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    # Another run starts from this adapter if it has the same tokens.
    third = tmp_path / "third"
    more = (f"lora.init_from={straight}",)
    with pytest.raises(ConfigError, match=r"model\.new_tokens"):
        train(settings(bases["tied"], thoughts, third, *more))
    train(settings(bases["tied"], thoughts, third, NEW, *more))
    assert eval_losses(third)[0] == pytest.approx(eval_losses(straight)[-1], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("tied", ["train.gradient_checkpointing=true", "dataset.exact_match=2"]),
        ("untied", ["lora=none"]),
    ],
)
def test_zero_trains_the_same_rows(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path, kind: str, more: list[str]
) -> None:
    from sft import prove

    one, two = tmp_path / "one", tmp_path / "two"
    given = [NEW, "train.save_strategy=steps", "train.save_steps=2", *more]
    train(settings(bases[kind], thoughts, one, *given))
    # Every parameter is split, however small it is.
    name = "zero.overrides.zero_optimization.stage3_param_persistence_threshold"
    command = settings(bases[kind], thoughts, two, *given, "zero=stage3", f"{name}=0")
    run_warm("train", *command, ranks=2, cwd=tmp_path)

    def answers(run: Path) -> list[float]:
        return [record["exact_match"] for record in records(run) if "exact_match" in record]

    def require_same() -> None:
        assert answers(two) == answers(one)
        assert len(answers(one)) == (2 if kind == "tied" else 0)
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        if "lora=none" in more:
            for end, other in zip(ends_of(two / "model"), ends_of(one / "model"), strict=True):
                torch.testing.assert_close(end, other, rtol=1e-3, atol=1e-4)
        else:
            assert_same_adapter(two, one, rate=1e-2, steps=4)

    require_same()
    prove.cut_back(two, 2)
    train(settings(bases[kind], thoughts, two, *given))  # goes on from ZeRO-3's checkpoint
    require_same()


def test_trls_head_is_refused_for_rows_that_zero_splits(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path
) -> None:
    more = [NEW, "zero=stage3", "model.lm_head=trl"]
    given = settings(bases["tied"], thoughts, tmp_path / "run", *more)
    with pytest.raises(ConfigError, match=r"single trained rows.*\n.*model\.lm_head=chunked"):
        train(given)


class Force(LogitsProcessor):
    """Let a model write the letter a twice, and then one token again and again."""

    def __init__(self, letter: int, token: int, begin: int) -> None:
        self.letter, self.token, self.begin = letter, token, begin

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.letter if ids.shape[1] - self.begin < 2 else self.token
        return torch.full_like(scores, -1e9).index_fill(1, torch.tensor([wanted]), 0.0)


CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WAYS = {
    "completion": (["template=completion"], "<|end|>"),
    "text": (["template=text", "dataset.packing=none"], "<|end|>"),
    "own EOS": (["template=completion", "model.eos_token=<|stop|>"], "<|stop|>"),
    "chat": (["template=chat", f"template.chat_template={CHAT!r}"], "<|stop|>"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_what_is_saved_stops_where_the_template_ends_a_turn(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path, way: str, lora: str
) -> None:
    chosen, stop = WAYS[way]
    chosen = [item.replace("'{", '"{').replace("}'", '}"') for item in chosen]
    run = tmp_path / "run"
    more = ["train.max_steps=1", f"lora={lora}", *chosen]
    more += ['model.new_tokens=["<|user|>","<|assistant|>","<|stop|>"]', "train.warmup_steps=0"]
    data = thoughts
    if way == "text":
        data = (tmp_path / "a.txt", tmp_path / "b.txt")
        for path in data:
            path.write_text("abc " * 30)
    if way != "text":  # generating must leave the settings as they are
        more += ["dataset.exact_match=2"]
    train(settings(bases["tied"], data, run, *more))
    folders = [run / "model"]
    if lora != "none":
        merge_of(run)
        folders = [run / "adapter", run / "merged"]
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        generation = GenerationConfig.from_pretrained(folder)
        ids = tokenizer.convert_tokens_to_ids(["<|end|>", stop])
        assert sorted(generation.eos_token_id) == sorted(set(ids))
        assert generation.pad_token_id == tokenizer.pad_token_id
        if way == "own EOS" and folder.name != "adapter":
            config = json.loads((folder / "config.json").read_text())
            assert config["eos_token_id"] == ids[1] == tokenizer.eos_token_id
        if folder.name == "adapter":
            model: Any = AutoPeftModelForCausalLM.from_pretrained(folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder)
        prompt = tokenizer("abc", return_tensors="pt").input_ids
        letter = tokenizer.convert_tokens_to_ids("a")
        forced = LogitsProcessorList([Force(letter, ids[1], prompt.shape[1])])
        options = {"generation_config": generation} if folder.name == "adapter" else {}
        written = model.generate(
            input_ids=prompt, max_new_tokens=9, do_sample=False, logits_processor=forced, **options
        )[0, prompt.shape[1] :]
        assert written.tolist() == [letter, letter, ids[1]]


def test_answers_show_new_tokens_and_end_before_the_stop(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path
) -> None:
    """A run that has learnt its rows answers with the new tokens, and so does its merge."""
    from sft import generate

    run = tmp_path / "run"
    more = ["train.max_steps=60", "train.learning_rate=3e-2"]
    train(settings(bases["tied"], thoughts, run, NEW, *more))
    merge_of(run)
    for where in (f"run={run}", f"model={run / 'merged'}"):
        config = generate.main.compose([where, "prompt=Say 3.", "max_new_tokens=30"])
        (answer,) = generate.generate(config)["answers"]
        assert answer["generated"].startswith("<think>") and "</think> " in answer["generated"]
        assert "<|end|>" not in answer["generated"]


def test_a_token_that_does_not_exist_is_refused(bases: dict[str, Path]) -> None:
    def refused(match: str, **given: Any) -> None:
        with pytest.raises(SftError, match=match):
            load_tokens(ModelConfig(name_or_path=str(bases["tied"]), **given))

    refused(r"eos_token=<\|edn\|>[\s\S]*no such token[\s\S]*<\|end\|>", eos_token="<|edn|>")
    refused(r"add it with 'model.new_tokens=\[\"<stop>\"\]'", pad_token="<stop>")
    refused("is text in the tokenizer's vocabulary", pad_token="a")
    refused("' ' must be a text, or null", new_tokens={"<b>": " "})


def test_eos_pad_and_tokens_that_exist(
    bases: dict[str, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    given = {"new_tokens": ["<|end|>", "<b>", "a"], "eos_token": "<b>", "pad_token": "<b>"}
    caplog.set_level("INFO", "sft")
    tokenizer, new = load_tokens(ModelConfig(name_or_path=str(bases["tied"]), **given))
    assert "the tokenizer has '<|end|>', 'a' already" in caplog.text
    assert new.ids == [KNOWN] == [tokenizer.eos_token_id] == [tokenizer.pad_token_id]
    # A tokenizer without EOS is usable with one.
    bare = train_tokenizer("bytes")
    bare.eos_token = bare.pad_token = None
    bare.save_pretrained(tmp_path)
    with pytest.raises(SftError, match=r"model\.eos_token=TOKEN"):
        load_tokens(ModelConfig(name_or_path=str(tmp_path)))
    tokenizer, _ = load_tokens(ModelConfig(name_or_path=str(tmp_path), eos_token="</s>"))
    assert tokenizer.eos_token == tokenizer.pad_token == "</s>"


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "prepend", "rstrip"])
def test_new_tokens_survive_saving(kind: str, tmp_path: Path) -> None:
    train_tokenizer(kind).save_pretrained(tmp_path / "before")
    given = ModelConfig(
        name_or_path=str(tmp_path / "before"), new_tokens=["<think>", "a b"], eos_token="<think>"
    )
    tokenizer, new = load_tokens(given)
    tokenizer.save_pretrained(tmp_path / "after")
    again = AutoTokenizer.from_pretrained(tmp_path / "after")
    text = "the cat<think>a b sat"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert again(text, add_special_tokens=False).input_ids == ids
    assert set(new.ids) < set(ids) and again.eos_token_id == new.ids[0]


def test_settings_that_would_leave_new_rows_untrained(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = "lora.extra.trainable_token_indices={wte: [3], lm_head: [3]}"
    with pytest.raises(ConfigError, match="would leave out the head's bias"):
        train(settings(bases["bias"], thoughts, tmp_path / "run", rows))
    for kind, more, match in (
        ("untied", "lora.target_modules=[q_proj,embed_tokens]", "cannot train the rows"),
        ("tied", "lora.modules_to_save=[embed_tokens]", "unties the head"),
        ("tied", "lora.extra.trainable_token_indices=[3]", "chooses the rows to train by itself"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(settings(bases[kind], thoughts, tmp_path / "run", NEW, more))
    more = ("model.new_tokens=[<never>]", "train.max_steps=1", "train.warmup_steps=0")
    train(settings(bases["tied"], thoughts, tmp_path / "run", *more))
    choices = json.loads((tmp_path / "run" / "run.json").read_text())["choices"]
    assert "no sample holds one of them" in choices["model.new_tokens"]["reason"]


def test_a_new_token_in_a_conversation_is_one_token(bases: dict[str, Path]) -> None:
    """A token of the data is one; those that the chat template writes are text in the data."""
    from sft.config.settings import TemplateConfig
    from sft.data.row_encoder import RowEncoder
    from sft.data.rows import Row
    from sft.data.template import Template

    names = ["<|stop|>", "<call>"]
    tokenizer, new = load_tokens(ModelConfig(name_or_path=str(bases["tied"]), new_tokens=names))
    stop, call = tokenizer.convert_tokens_to_ids(names)
    template = Template(TemplateConfig(kind="chat", chat_template=CHAT), tokenizer)
    assert template.stop_ids == [stop]
    messages = [
        {"role": "user", "content": "a<|stop|><call>"},
        {"role": "assistant", "content": "<call>b<|user|>"},
    ]
    found = RowEncoder(template)([Row({"messages": messages}, "rows.jsonl", 1)])
    assert not found.bad
    assert [token for token in found.ids.tolist() if token in new.rows] == [call, stop] * 2
    trained = found.ids[found.marks % 2 == 1].tolist()
    assert trained[0] == call and trained[-1] == stop and stop not in trained[:-1]


def test_a_merge_takes_over_how_a_foreign_adapter_stops(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    from sft.merge import __main__ as merge

    adapter = build_adapter(tmp_path / "adapter", bases["tied"], target_modules=["q_proj"])
    asked = [f"adapter={adapter}", "verify=false"]

    def generation_of(name: str) -> dict[str, Any]:
        merge.merge(merge.main.compose([*asked, f"output={tmp_path / name}"]))
        content = (tmp_path / name / "generation_config.json").read_text()
        return dict(json.loads(content))

    tokenizer = AutoTokenizer.from_pretrained(bases["tied"])
    end, pad = tokenizer.convert_tokens_to_ids(["<|end|>", "<|pad|>"])
    assert generation_of("bare")["eos_token_id"] == end  # the base's own
    turn = tokenizer.convert_ids_to_tokens(259)
    tokenizer.eos_token, tokenizer.chat_template = "<|pad|>", CHAT.replace("<|stop|>", turn)
    tokenizer.save_pretrained(adapter)
    found = generation_of("with tokenizer")
    assert found["eos_token_id"] == [pad, end, 259] and found["pad_token_id"] == pad
    # Entries without effect would not be saved.
    GenerationConfig(eos_token_id=7, max_new_tokens=5, temperature=0.5).to_json_file(
        adapter / "generation_config.json"
    )
    found = generation_of("with settings")
    assert found["eos_token_id"] == [7, pad, 259] and found["max_new_tokens"] == 5
    assert "temperature" not in found


def test_new_tokens_on_a_quantised_base(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(settings(bases["untied"], thoughts, run, NEW, "quantization=nf4"))
    merge_of(run)
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["passed"] is True
    for end, old in zip(ends_of(run / "merged"), ends_of(bases["untied"]), strict=True):
        assert end[:KNOWN].equal(old[:KNOWN])
        assert (end[KNOWN:] - old[:KNOWN].mean(0)).abs().amax(1).min() > 1e-3


def test_a_card_names_no_file_of_tokens(
    bases: dict[str, Path], thoughts: tuple[Path, Path], tmp_path: Path
) -> None:
    from sft.inference.card import CARD, read_card

    for value in ("tokens.txt", [1]):
        (tmp_path / CARD).write_text(
            json.dumps({"model": {"new_tokens": value}, "template": {}, "quantization": {}})
        )
        with pytest.raises(SftError, match="is damaged"):
            read_card(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "<a>\n\n <b c> \r\n", ["<a>", "<b c>"]),
        ("a.json", '["<a>", "<b>"]', ["<a>", "<b>"]),
        ("a.json", '{"<a>": "first", "<b>": null}', {"<a>": "first", "<b>": None}),
        ("a.yaml", "- <a>\n- <b>\n", ["<a>", "<b>"]),
        ("a.yml", "<a>: first\n", {"<a>": "first"}),
        ("a.txt", "", None),
        ("a.json", "[", "cannot be read"),
        ("a.yaml", "[", "cannot be read"),
        ("a.json", "7", "must be a list of tokens"),
        ("a.json", "[7]", "must be a text"),
        ("a.txt", "<a>\n<a>\n", "named twice"),
    ],
)
def test_files_of_new_tokens(tmp_path: Path, name: str, content: str, expected: Any) -> None:
    path = tmp_path / name
    path.write_text(content)
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            read_new_tokens(str(path))
    else:
        assert read_new_tokens(str(path)) == expected
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_new_tokens(str(path))
