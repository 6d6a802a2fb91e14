"""What comes from elsewhere runs no code, hangs nothing and is refused alike by every command."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import TINY, build_adapter
from warm import run_warm

from sft import limits
from sft.config.settings import ModelConfig, QuantizationConfig, TemplateConfig
from sft.data.__main__ import main as data
from sft.errors import SftError
from sft.generate import main as generate
from sft.inference.card import CARD, Card, write_card
from sft.merge.__main__ import main as merge
from sft.train import main as train

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path({marker!r}).touch()
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
WEIGHTS = "adapter_model.safetensors"
OTHER = "base_model.model.x.lora_A.weight"


def change(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give an adapter of the embedded model, with a tokenizer and a card."""
    folder = build_adapter(
        tmp_path_factory.mktemp("trust") / "adapter", TINY, target_modules=["q_proj", "v_proj"]
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    template = TemplateConfig(prompts=["{prompt}"], completions=["{completion}"])
    write_card(folder, Card(ModelConfig(name_or_path=str(TINY)), template, QuantizationConfig()))
    return folder


@pytest.fixture
def adapter(plain: Path, tmp_path: Path) -> Path:
    """Give a copy that may be changed."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def both(adapter: Path, tmp_path: Path, *more: str) -> list[str]:
    """Return what generate and merge say when they refuse an adapter."""
    said = []
    for command, words in (
        (generate, ["prompt=a", "max_new_tokens=1"]),
        (merge, [f"output={tmp_path / 'out'}"]),
    ):
        with pytest.raises(SftError) as error:
            command.run(command.compose([f"adapter={adapter}", *words, *more]))
        said.append(str(error.value))
    assert not (tmp_path / "out").exists()
    return said


def with_code(tmp_path: Path, where: str) -> tuple[Path, Path]:
    """Write a copy of the embedded model with code of its own, and the file that the code makes."""
    marker, base = tmp_path / "ran", tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "own.py").write_text(CODE.format(marker=str(marker)))
    if where == "config":
        classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
        change(base / "config.json", model_type="own", auto_map=classes)
    else:
        classes = {"AutoTokenizer": [None, "own.Tokenizer"]}
        change(base / "tokenizer_config.json", tokenizer_class="Tokenizer", auto_map=classes)
    return base, marker


def test_an_adapter_cannot_allow_the_code_of_its_base(adapter: Path, tmp_path: Path) -> None:
    base, marker = with_code(tmp_path, "config")
    card = json.loads((adapter / CARD).read_text())
    card["model"] |= {"trust_remote_code": True, "name_or_path": str(base)}
    (adapter / CARD).write_text(json.dumps(card))
    for said in both(adapter, tmp_path):
        assert "it has Python code of its own, which runs only if you allow it" in said
        assert "fix: read that code, then trust_remote_code=true on the command line" in said
    assert not marker.exists()
    given = [f"adapter={adapter}", "prompt=a", "max_new_tokens=1", "trust_remote_code=true"]
    generate.run(generate.compose(given))
    assert marker.exists()
    marker.unlink()
    merge.run(merge.compose([f"adapter={adapter}", f"output={tmp_path / 'm'}", given[-1]]))
    assert marker.exists()


@pytest.mark.parametrize("where", ["config", "tokenizer"])
def test_training_and_data_run_no_code_that_only_a_file_allows(where: str, tmp_path: Path) -> None:
    base, marker = with_code(tmp_path, where)
    (tmp_path / "model").mkdir()
    text = f"name_or_path: {base}\ntrust_remote_code: true\n"
    (tmp_path / "model" / "theirs.yaml").write_text(text)
    (tmp_path / "theirs.yaml").write_text("model:\n  trust_remote_code: true\n")
    few = ["dataset.max_rows=8", f"output_dir={tmp_path / 'run'}"]
    for words, folder in (
        ([str(tmp_path / "theirs.yaml"), "model=hf", f"model.name_or_path={base}"], None),
        (["model=theirs"], str(tmp_path)),
    ):
        with pytest.raises(SftError, match="is taken from the command line only"):
            train.compose([*words, *few], folder)
    for command in (train, data):
        words = ["model=hf", f"model.name_or_path={base}", *few]
        if command is train or where == "tokenizer":
            with pytest.raises(SftError, match=r"then model.trust_remote_code=true on the command"):
                command.run(command.compose(words))
    assert not marker.exists()
    assert train.compose([*words, "model.trust_remote_code=true"]).model.trust_remote_code


def tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Change an adapter's tensors."""

    def apply(adapter: Path) -> None:
        found = load_file(adapter / WEIGHTS)
        edit(found)
        save_file(found, adapter / WEIGHTS)

    return apply


def settings(**entries: Any) -> Callable[[Path], None]:
    """Change an adapter's settings."""
    return lambda adapter: change(adapter / "adapter_config.json", **entries)


def card(*keys: str, value: Any) -> Callable[[Path], None]:
    """Change an entry of an adapter's card."""

    def apply(adapter: Path) -> None:
        whole = node = json.loads((adapter / CARD).read_text())
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        (adapter / CARD).write_text(json.dumps(whole))

    return apply


ENDLESS = "(([a-z._0-9])+)+!"
REFUSED = {
    "misnamed": (
        tensors(lambda found: found.update({OTHER: found.pop(min(found))})),
        "1 tensors of .* do not exist in the base, and 1 tensors are missing",
    ),
    "missing": (tensors(lambda found: found.__delitem__(min(found))), "1 tensors are missing"),
    "extra": (
        tensors(lambda found: found.update({OTHER: torch.ones(2)})),
        "1 tensors of .* do not exist in the base, and 0 tensors are missing",
    ),
    "shape": (
        tensors(lambda found: found.update({min(found): torch.ones(3, 3)})),
        "does not fit the base: size mismatch for",
    ),
    "integers": (
        tensors(lambda found: found.update({min(found): found[min(found)].int()})),
        r"has numbers that are not floating-point \(torch.int32\)",
    ),
    "nan": (
        tensors(lambda found: found.update({min(found): found[min(found)] * float("nan")})),
        "holds NaN or infinite values",
    ),
    "pickle": (
        lambda adapter: (adapter / WEIGHTS).rename(adapter / "adapter_model.bin"),
        "there is no .*safetensors",
    ),
    "rank": (settings(r=1_000_000), "r=1000000 must be a whole number from 1 to 65536"),
    "rank 0": (settings(r=0), "r=0 must be a whole number"),
    "rank text": (settings(r="x"), "r=x must be of type int"),
    "pattern rank": (settings(rank_pattern={"q_proj": -1}), "q_proj=-1 must be a whole number"),
    "target": (settings(target_modules=["nothing"]), "does not fit the base: Target modules"),
    "target number": (settings(target_modules=5), "target_modules=5 must be of type"),
    "ranks list": (settings(rank_pattern=[1]), r"rank_pattern=\[1\] must be of type"),
    "tokens": (
        settings(alora_invocation_tokens=["x"]),
        r"alora_invocation_tokens=\['x'\] must be of type",
    ),
    "whole number": (settings(use_rslora=5), "use_rslora=5 must be of type"),
    "target pattern": (settings(target_modules="(q_proj"), "is not a regular expression"),
    "start": (settings(init_lora_weights="corda"), "has init_lora_weights=corda, which changed"),
    "megatron": (
        settings(megatron_config={"a": 1}, megatron_core="os"),
        "uses megatron_config, with which PEFT loads code or files from elsewhere",
    ),
    "task": (settings(task_type="SEQ_CLS"), "has task_type=SEQ_CLS, whose model has another head"),
    "bias": (settings(bias="odd"), "is damaged: bias=odd must be one of none, all, lora_only"),
    "whole modules": (
        settings(modules_to_save=["nothing"]),
        "does not fit the base: modules_to_save=nothing matches no module",
    ),
    "kind": (settings(peft_type="NEW"), "is damaged: 'NEW'"),
    "infinity": (settings(lora_alpha=float("inf")), "is damaged: it holds Infinity"),
    "other base": (card("identity", value={"base": "0" * 32}), "is not the base of training: 0000"),
    "no base": (card("model", "name_or_path", value=None), "names no base model\n    fix: base="),
    "unknown entry": (card("model", "new", value=1), "there is no entry model.new"),
    "type": (card("template", "prompts", value=7), r"template.prompts must be of type list\[str\]"),
    "bool": (card("quantization", "load_in_4bit", value=1), "load_in_4bit must be of type bool"),
    "rule": (card("template", "kind", value="new"), "template.kind=new must be one of"),
    "braces": (card("template", "prompts", value=["{"]), "sft.json is damaged: "),
    "date": (card("template", "date", value="today"), "Invalid isoformat string"),
    "precision": (card("identity", value={"precision": "fp7"}), "precision must be one of fp32"),
    "extra setting": (card("quantization", "extra", value={"a": 1}), "entry quantization.extra.a"),
    "4 and 8 bits": (
        card("quantization", value={"load_in_4bit": True, "load_in_8bit": True}),
        "is damaged: quantization has both load_in_4bit and load_in_8bit",
    ),
    "bits": (
        card("quantization", value={"load_in_4bit": True, "extra": {"llm_int8_threshold": "x"}}),
        "Transformers refuses these settings: .*\n    fix: correct quantization.extra",
    ),
    "no mapping": (lambda adapter: (adapter / CARD).write_text("[]"), "it must be a mapping"),
    "nested": (lambda adapter: (adapter / CARD).write_text("[" * 100_000), "nested too deeply"),
    "bytes": (lambda adapter: (adapter / CARD).write_bytes(b"\xff\xfe"), "codec can't decode"),
    "missing part": (
        lambda adapter: (adapter / CARD).write_text("{}"),
        "the entry model is missing",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_generate_and_merge_refuse_the_same(fault: str, adapter: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[fault]
    damage(adapter)
    one, other = both(adapter, tmp_path)
    assert one == other and re.search(message, one), (one, other)


@pytest.mark.parametrize(
    "damage",
    [settings(target_modules=ENDLESS), settings(rank_pattern={ENDLESS: 4})],
)
def test_a_pattern_that_takes_years_is_refused(
    damage: Callable[[Path], None], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MATCHING", 0.2)
    damage(adapter)
    for said in both(adapter, tmp_path):
        assert "takes more than 0.2 s to match the names of all modules" in said


def test_secrets_of_the_environment_do_not_reach_a_name(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    card("model", "name_or_path", value="/models/${oc.env:SECRET}")(adapter)
    for said in both(adapter, tmp_path):
        assert "hunter2" not in said and "${oc.env:SECRET}" in said


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        *(({"num_hidden_layers": layers}, "num_hidden_layers") for layers in (2_000_000, 0, "x")),
        ({"attention_dropout": 7.0}, "attention_dropout=7.0, which must be from 0 to 1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0, which must be 1 or more"),
        (
            {"quantization_config": {"quant_method": "new"}},
            "are quantised by new, .*(.|\n)*fix: mo",
        ),
        ({"quantization_config": {"bits": 3}}, "are quantised by unknown method"),
    ],
)
def test_a_config_that_no_model_has_is_refused(
    entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    change(base / "config.json", **entry)
    words = ["model=hf", f"model.name_or_path={base}", f"output_dir={tmp_path / 'run'}"]
    for command, given in ((train, words), (generate, [f"model={base}", "prompt=a"])):
        with pytest.raises(SftError, match=message):
            command.run(command.compose(given))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
            "quantised by bitsandbytes, but they hold the weights of .*q_proj unquantised",
        ),
        ({"is_encoder_decoder": True}, "is_encoder_decoder=true, which must be false"),
    ],
)
def test_a_config_that_its_weights_do_not_fit_is_refused(
    entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    change(base / "config.json", **entry)
    with pytest.raises(SftError, match=f"{message}(.|\n)*fix: "):
        generate.run(generate.compose([f"model={base}", "prompt=a"]))


def test_an_adapter_beside_a_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    """Transformers would load it with the model, from a pickle if that is what there is."""
    base = Path(shutil.copytree(TINY, tmp_path / "base"))
    shutil.copy(adapter / "adapter_config.json", base)
    words = ["model=hf", f"model.name_or_path={base}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(SftError, match="holds an adapter beside the model"):
        train.run(train.compose(words))


def test_answers_are_written_as_they_come_and_positions_are_counted(
    adapter: Path, tmp_path: Path
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "a" * n}) + "\n" for n in (1, 2, 5000)))
    given = [f"adapter={adapter}", f"output={output}", "batch_size=1", "max_new_tokens=1"]
    with pytest.raises(SftError, match=r"prompt 3 has \d+ tokens, .* has 1024 positions"):
        generate.run(generate.compose([*given, f"file={rows}"]))
    assert not output.exists()
    rows.write_text("".join(json.dumps({"prompt": "a" * n}) + "\n" for n in (1, 2)))
    generate.run(generate.compose([*given, f"file={rows}"]))
    assert len(output.read_text().splitlines()) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "rows.jsonl", output.name}


def test_earlier_answers_are_kept_beside_the_new_ones(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows, output = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    earlier = [{"prompt": "a", "generated": "old"}, {"prompt": "b", "earlier_generated": "older"}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in earlier))
    caplog.set_level("INFO", "sft")
    words = [f"adapter={adapter}", f"file={rows}", f"output={output}", "max_new_tokens=1"]
    generate.run(generate.compose(words))
    first, second = map(json.loads, output.read_text().splitlines())
    assert first.keys() == {"prompt", "generated", "earlier_earlier_generated"}
    assert first["earlier_earlier_generated"] == "old" != first["generated"]
    assert second["earlier_generated"] == "older" and "generated" in second
    assert "already; it is kept as earlier_earlier_generated" in caplog.text


def test_a_line_break_in_the_name_of_a_model_is_refused_on_one_line() -> None:
    for command, words in {
        train: ["model=hf", "model.name_or_path=a\nb"],
        generate: ["model=a\nb", "prompt=a"],
    }.items():
        with pytest.raises(SftError) as error:
            command.run(command.compose(words))
        first, second = str(error.value).splitlines()
        assert first == r"the name 'a\nb' of the model has a line break"
        assert second.startswith("    fix: model")
    with pytest.raises(SftError) as error:
        train.compose(["model=a\nb"])
    assert r"model=a\nb" in str(error.value).splitlines()[2]


def test_an_option_file_cannot_make_hydra_call_a_function(tmp_path: Path) -> None:
    file = tmp_path / "train" / "grid.yaml"
    file.parent.mkdir()
    grid = "hydra: {sweeper: {params: {_target_: json.loads, s: '1'}}}\n"
    file.write_text(f"# @package _global_\n{grid}")
    with pytest.raises(SftError, match="makes Hydra call json"):
        train.compose(["train=grid"], str(tmp_path))


def test_a_models_file_changes_neither_greedy_answers_nor_their_number(tmp_path: Path) -> None:
    base = shutil.copytree(TINY, tmp_path / "base")
    given = ["prompt=abc", "max_new_tokens=6"]
    expected = generate.run(generate.compose([f"model={TINY}", *given]))
    asked = {"num_beams": 3, "no_repeat_ngram_size": 1, "suppress_tokens": [*range(60, 99)]}
    change(base / "generation_config.json", **asked, return_dict_in_generate=True)
    assert generate.run(generate.compose([f"model={base}", *given])) == expected


def test_no_connection_is_tried_when_all_is_local(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "offline_run.py"
    result = run_warm(str(script), cwd=tmp_path)
    assert json.loads(result.stdout.splitlines()[-1]) == []
    assert (tmp_path / "merged.jsonl").read_text() and (tmp_path / "adapter.jsonl").read_text()
