"""``sft import``: real configurations are converted, and every key has a line."""

import contextlib
import json
import re
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT

from sft.config import names
from sft.config.foreign import DEFAULT, DIFFERS, NOT_OURS, UNKNOWN
from sft.convert import convert, report
from sft.convert.__main__ import main
from sft.convert.convert import Result, recognise
from sft.convert.read import Source, read
from sft.errors import ConfigError
from sft.train import main as train

FILE = ROOT / "tests" / "foreign_configs.yaml"
CASES = {case["name"]: case for case in yaml.safe_load_all(FILE.read_text()) if case}


def written(case: dict[str, Any], folder: Path) -> Path:
    """Write a configuration as its user has it, beside its dataset_info.json."""
    if "script" in case:
        path = folder / "train.py"
        path.write_text(case["script"])
        return path
    if "info" in case:
        (folder / "data").mkdir()
        (folder / "data" / "dataset_info.json").write_text(json.dumps(case["info"]))
    if "JSON" in case["name"]:
        path = folder / "theirs.json"
        path.write_text(json.dumps(case["config"]))
        return path
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(case["config"], sort_keys=False))
    return path


def imported(case: dict[str, Any], folder: Path) -> Result:
    source = read(str(written(case, folder)))
    return convert.convert(source, recognise(source, None), case.get("gpus", 1), train)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Convert every configuration, from the folder that its user trains in."""
    found = {}
    for name, case in CASES.items():
        with contextlib.chdir(tmp_path_factory.mktemp("run")):
            found[name] = imported(case, Path())
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_configuration_becomes_the_settings_that_mean_the_same(
    name: str, results: dict[str, Result]
) -> None:
    case, result = CASES[name], results[name]
    assert result.tool == case["tool"]
    if "settings" in case:
        assert result.settings == case["settings"]
    # Each key of the file has a line.
    keys = {line.key.partition("[")[0] for line in result.conversion.lines if line.given}
    keys = {key.partition(".")[0] for key in keys} | keys
    assert keys >= set(case.get("config", {}))
    needed = {"dataset.path"} if case.get("dataset_needed") else set()
    if "model.name_or_path" not in result.settings and needed:
        needed.add("model.name_or_path")
    refused = {problem.setting.partition("=")[0] for problem in result.problems}
    said = [str(problem) for problem in result.problems]
    assert needed - {"model.name_or_path"} <= refused, said
    assert refused <= needed | set(case.get("may_be_refused", ())), said


def test_nine_of_ten_keys_convert_by_themselves(results: dict[str, Result]) -> None:
    tools = Counter(case["tool"] for case in CASES.values())
    assert tools == {"axolotl": 13, "llamafactory": 9, "trl": 8}
    assert sum("settings" in case for case in CASES.values()) >= 12
    total = sum((Counter(report.counts(result)) for result in results.values()), Counter[str]())
    keys = sum(total.values())
    assert keys >= 850
    assert (keys - total[NOT_OURS] - total[UNKNOWN]) / keys >= 0.90
    assert min(report.share(result) for result in results.values()) >= 0.70
    assert total[UNKNOWN] == 0
    assert min(total[DEFAULT], total[DIFFERS]) > 50 and total[NOT_OURS] > 10


# The door


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
        raise SystemExit(0)
    return int(str(ended.value.code))


EOS = "train_on_eos"


def put(text: str, name: str = "theirs.yaml") -> str:
    Path(name).write_text(text)
    return name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = """base_model: facebook/opt-125m
datasets: [{path: rows.jsonl, type: alpaca}]
adapter: lora
lora_r: 16
learning_rate: 1e-4
micro_batch_size: 2
"""


def test_the_file_that_is_written_composes_and_is_reported(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(SMALL + "wandb_entity: us\nhub_model_id: me/x\nnot_a_key: sesame\n")
    assert run("theirs.yaml", "gpus=4", "output=ours.yaml") == 0
    said = capsys.readouterr().out
    config = train.compose(["ours.yaml"])
    assert config.model.name_or_path == "facebook/opt-125m"
    assert (config.lora.r, config.train.learning_rate, config.train.global_batch_size) == (
        16,
        1e-4,
        8,
    )
    # Axolotl's own defaults, where the file says nothing: not ours, which are 3 and 1024.
    assert (config.train.num_train_epochs, config.dataset.max_length) == (1, 512)
    for name in yaml.safe_load(SMALL):
        assert f"\n  {name}" in said, name
    assert "wandb_entity: us" in said and "hf upload USER/NAME" in said
    assert "unknown to sft import:\n  not_a_key: (not shown)" in said
    assert "10 keys: 6 converted, 0 converted with another meaning, 1 left out" in said
    assert "next: sft data ours.yaml preview=3, then sft train ours.yaml" in said
    assert "sesame" not in said + Path("ours.yaml").read_text()


def test_the_report_is_the_same_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(SMALL)
    assert run("theirs.yaml", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["output"] == "theirs.sft.yaml" and found["tool"] == "axolotl"
    assert found["settings"]["lora.r"] == 16 and found["problems"] == []
    by_key = {line["key"]: line for line in found["keys"]}
    assert by_key["learning_rate"]["settings"] == {"train.learning_rate": 0.0001}
    assert by_key["sequence_len"]["in_file"] is False
    assert sum(found["counts"].values()) == 7


def test_what_sft_refuses_is_said_at_the_end_with_exit_code_2(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(SMALL + "lora_target_modules: [q_proj, lm_head]\n")
    assert run("theirs.yaml", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    (problem,) = found["problems"]
    assert problem["setting"] == "lora.target_modules=['q_proj', 'lm_head']"
    assert problem["fix"] == "lora.modules_to_save=[lm_head]"
    assert "1 setting is refused" in found["error"] and Path("theirs.sft.yaml").is_file()


def test_training_with_a_file_of_another_tool_leads_to_the_import(here: Path) -> None:
    put(SMALL)
    with pytest.raises(ConfigError) as refused:
        train.compose(["theirs.yaml"])
    (problem,) = refused.value.problems
    assert problem.rule == "6 of its 6 keys are no settings of sft"
    assert problem.fix.startswith("sft import theirs.yaml")


def test_a_file_is_replaced_only_if_asked_for(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(SMALL)
    Path("theirs.sft.yaml").write_text("mine")
    assert run("theirs.yaml") == 2
    assert "fix: overwrite=true" in capsys.readouterr().err
    assert Path("theirs.sft.yaml").read_text() == "mine"
    assert run("theirs.yaml", "overwrite=true") == 0
    assert "lora.r: 16" in Path("theirs.sft.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["thiers.yaml"], "did you mean theirs.yaml?"),
        (["."], "is a folder"),
        (["theirs.yaml", "output=no/such/x.yaml"], "fix: mkdir -p no/such"),
        (["theirs.yaml", "output=theirs.yaml", "overwrite=true"], "is the configuration itself"),
        (["ours.yaml", "output=x.yaml"], "fix: sft train ours.yaml"),
    ],
)
def test_a_path_that_cannot_be_meant_is_refused(
    words: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(SMALL)
    put("model.name_or_path: a\ntrain.learning_rate: 1e-4\nlora.r: 4\n", "ours.yaml")
    assert run(*words) == 2
    assert says in capsys.readouterr().err
    assert Path("theirs.yaml").read_text() == SMALL


def test_secrets_are_neither_written_nor_shown(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(
        "model_name_or_path: a/b\nstage: sft\nfinetuning_type: lora\ncutoff_len: 512\n"
        "hub_token: sesame\nhf_hub_token: sesame\nswanlab_api_key: sesame\n"
        "my_api_key: sesame\nWANDB_API_KEY: sesame\noutput_dir: ${HOME}/x\n"
        "deepspeed: {wandb: {key: sesame}}\nexport_hub_model_id: hf_sesamesesame\n"
        "swanlab_mode: https://me:sesame@host\n"
    )
    for words in ([], ["--json", "overwrite=true"]):
        run("theirs.yaml", *words)
        out = capsys.readouterr()
        assert "sesame" not in out.out + out.err
    text = Path("theirs.sft.yaml").read_text()
    assert "sesame" not in text and "output_dir: \\${HOME}/x" in text


DEEP = "a: " + "[" * 1200 + "]" * 1200
BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(6)
)


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("", "x.yaml", "holds no keys"),
        ("- a\n- b\n", "x.yaml", "holds no keys"),
        ("just text", "x.yaml", "holds no keys"),
        ("[1, 2]", "x.json", "holds no keys"),
        ('{"a": NaN}', "x.json", "is not valid JSON"),
        ("a: [1", "x.yaml", "is not plain YAML"),
        ("a: !!python/object/apply:os.system [touch pwned]", "x.yaml", "is not plain YAML"),
        (SMALL + "lora_r: 8\n", "x.yaml", "lora_r is given in line 4 already"),
        (BOMB, "x.yaml", "aliases make more than"),
        (DEEP, "x.yaml", "nested too deeply"),
        ("a: 1\n" * 60_000, "x.yaml", "bytes, and a configuration at most"),
        ("key: 1\nother: 2\n", "x.yaml", "0 of its 2 keys are keys of"),
        ("def f(:\n", "x.py", "is not valid Python"),
        ("print(1)\n", "x.py", "has no call of load_dataset"),
        ("stage: dpo\nfinetuning_type: lora\ncutoff_len: 5\n", "x.yaml", "no preferences"),
        (SMALL + "rl: dpo\n", "x.yaml", "no preferences"),
        (SMALL.replace("adapter: lora", "adapter: [lora]"), "x.yaml", "sft trains LoRA adapters"),
        (SMALL.replace("adapter: lora", "adapter: ia3"), "x.yaml", "sft trains LoRA adapters"),
        ("stage: sft\nfinetuning_type: oft\ncutoff_len: 5\n", "x.yaml", "trains LoRA adapters"),
        (
            "stage: sft\nfinetuning_type: freeze\ncutoff_len: 5\n",
            "x.yaml",
            "model.trainable=[REGEX]",
        ),
        ("stage: sft\ndataset: mine\nfinetuning_type: lora\n", "x.yaml", "there is no data/"),
    ],
)
def test_a_file_that_cannot_be_converted_is_refused(
    text: str, name: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(put(text, name)) == 2
    error = capsys.readouterr().err
    assert says in error and "Traceback" not in error
    assert sorted(path.name for path in here.iterdir()) == [name]  # nothing is written


def test_the_word_for_another_tool_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(SMALL)
    assert run("theirs.yaml", "tool=trl") == 2
    assert "fix: tool=axolotl" in capsys.readouterr().err
    assert run("nothing.yaml") == 2
    assert "there is no such file" in capsys.readouterr().err
    assert run() == 2
    assert "fix: sft import FILE.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (
            "base_model: a/b\ndatasets: [{path: x.jsonl, type: alpaca}]\nlearning_rate: 1e-5\n",
            {
                "lora": "none",
                "train.num_train_epochs": 1,
                "train.global_batch_size": 1,
                "train.per_device_train_batch_size": 1,
                "dataset.max_length": 512,
                "dataset.overlong": "drop",
                "dataset.eval_fraction": 0.0,
            },
        ),
        (
            "model_name_or_path: a/b\nstage: sft\ndataset: one\n",
            {
                "lora.r": 8,
                "lora.lora_alpha": 16,
                "lora.target_modules": "all-linear",
                "train.learning_rate": 5e-5,
                "train.lr_scheduler_type": "linear",
                "train.warmup_steps": 0,
                "train.num_train_epochs": 3.0,
                "train.global_batch_size": 8,
                "dataset.max_length": 2048,
                "dataset.overlong": "truncate",
                "dataset.path": "data/one.json",
            },
        ),
        (
            "model_name_or_path: a/b\ndataset_name: c/d\nuse_peft: true\n",
            {
                "lora.r": 16,
                "lora.lora_alpha": 32,
                "lora.lora_dropout": 0.05,
                "lora.target_modules": "attention",
                "train.learning_rate": 2e-5,
                "train.lr_scheduler_type": "linear",
                "train.warmup_steps": 0,
                "train.global_batch_size": 8,
                "dataset.max_length": 1024,
                "dataset.overlong": "truncate",
            },
        ),
        ("model_name_or_path: a/b\ndataset_name: c/d\n", {"lora": "none"}),
    ],
)
def test_what_a_file_does_not_say_is_what_the_other_tool_does(
    text: str, settings: dict[str, Any], here: Path
) -> None:
    (here / "data").mkdir()
    put('{"one": {"file_name": "one.json"}}', "data/dataset_info.json")
    source = read(put(text))
    found = convert.convert(source, recognise(source, None), 1, train).settings
    assert {name: found.get(name) for name in settings} == settings


@pytest.mark.parametrize(
    ("info", "says"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be a mapping of names"),
        ('{"other": {"file_name": "x.json"}}', "has no dataset mine; it has other"),
        ('{"mine": {"file_name": "x.json", "ranking": true}}', "no preferences"),
    ],
)
def test_a_damaged_list_of_datasets_is_refused(
    info: str, says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(info, "dataset_info.json")
    assert run(put("stage: sft\ndataset: mine\nfinetuning_type: lora\ndataset_dir: .\n")) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "key", "becomes"),
    [
        ("lora_r: [8, 16]", "lora.r", "refused"),
        ("lora_r: null", "lora.r", "absent"),
        ("micro_batch_size: [2]", "train.per_device_train_batch_size", "refused"),
        ("gradient_accumulation_steps: four", "train.global_batch_size", "absent"),
        ("num_epochs: {a: 1}", "train.num_train_epochs", "refused"),
        ("datasets: 5", "dataset.path", "absent"),
        ("datasets: [5]", "dataset.path", "absent"),
        ("special_tokens: [a]", "model.pad_token", "absent"),
        ("sequence_len: long", "dataset.max_length", "refused"),
    ],
)
def test_a_value_of_another_kind_is_reported(
    line: str, key: str, becomes: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load(SMALL) | yaml.safe_load(line)
    code = run(put(yaml.safe_dump(values)), "--json")
    out = capsys.readouterr()
    found = json.loads(out.out)
    assert "Traceback" not in out.err
    assert (key in found["settings"]) is (becomes == "refused"), found["settings"]
    if becomes == "refused":
        assert code == 2 and any(p["setting"].startswith(key) for p in found["problems"])


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        # Both keys add tokens.
        (
            {"tokens": ["<a>"], "special_tokens": {"additional_special_tokens": ["<b>"]}},
            {"model.new_tokens": ["<a>", "<b>"]},
        ),
        # FSDP's stage is in one key, and what it offloads in another.
        (
            {"fsdp": ["shard_grad_op"], "fsdp_config": {"fsdp_offload_params": True}},
            {"zero": "stage2_offload"},
        ),
        ({"fsdp_config": {"reshard_after_forward": True}}, {"zero": "stage3"}),
        ({"deepspeed": "mine/zero3.json"}, {"zero.config": "mine/zero3.json"}),
        ({"batch_size": 8}, {"train.global_batch_size": 8}),
        ({"neftune_noise_alpha": 5}, {"train.padding_free": False}),
        ({"bf16": False, "fp16": True}, {"precision": "fp16"}),
        ({"bf16": False}, {"precision": "fp32"}),
        ({"val_set_size": 200}, {"dataset.eval_fraction": 0.05}),
        ({"evals_per_epoch": 4}, {"train.evals_per_epoch": None}),  # nothing is held out
        ({"excess_length_strategy": "truncate"}, {"dataset.overlong": "truncate"}),
        (
            {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1},
            {"train.lr_scheduler_type": "cosine_with_min_lr"},
        ),
        ({"adapter": None}, {"lora": "none", "lora.r": None}),
        (
            {"model_config": {"output_router_logits": True, "rope_theta": 5}},
            {"model.config.rope_theta": 5, "model.config.output_router_logits": None},
        ),
        ({"wandb_project": "p"}, {"tracker.wandb": True, "tracker.project": "p"}),
        (
            {"datasets": [{"path": "a", "type": "alpaca"}, {"path": "b", "type": "sharegpt"}]},
            {"template": "chat", "dataset": "mix"},
        ),
        (
            {"datasets": [{"path": "json", "data_files": "x/y.jsonl", "type": "alpaca"}]},
            {"dataset.path": "x/y.jsonl"},
        ),
        (
            {
                "datasets": [
                    {"path": "a", "type": "chat_template"} | dict.fromkeys(("roles_to_train", EOS))
                ]
            },
            {"template.train_on": "last_assistant"},
        ),
        (
            {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False}, "adapter": "qlora"},
            {"quantization.bnb_4bit_use_double_quant": False},
        ),
        (
            {"loraplus_lr_ratio": 16, "loraplus_lr_embedding": 1e-6, "lora_target_linear": True},
            {"train.loraplus_lr_ratio": 16, "train.embedding_learning_rate": None},
        ),
        (
            {"loraplus_lr_embedding": 1e-6, "lora_target_modules": ["embed_tokens", "q_proj"]},
            {"train.embedding_learning_rate": 1e-6},
        ),
        (
            {"profiler_steps": 5, "profiler_steps_start": 3},
            {"profile": "torch", "profile.steps": 5, "profile.start": 4},
        ),
        ({"profiler_steps": 0, "profiler_steps_start": 3}, {"profile": None}),
        ({"profiler_steps_start": 3}, {"profile.start": None}),
        (
            {"streaming": True, "max_steps": 9, "saves_per_epoch": 2, "num_epochs": 5},
            {"train.save_strategy": "steps", "train.save_steps": 0.1},
        ),
    ],
)
def test_what_several_keys_decide(given: Any, settings: Any, here: Path) -> None:
    source = Source(Path("x.yaml"), yaml.safe_load(SMALL) | given)
    found = convert.convert(source, "axolotl", 1, train).settings
    assert {name: found.get(name) for name in settings} == settings


@pytest.mark.parametrize(
    ("trained", "roles", "train_on"),
    [
        (["bot9"], {"assistant": ["bot9"]}, None),
        (["gpt"], None, None),
        (["assistant", "tool"], None, None),
        (["assistant", "me"], {"user": ["me"]}, "all"),
    ],
)
def test_the_roles_that_axolotl_trains(trained: Any, roles: Any, train_on: Any, here: Path) -> None:
    rows = {"path": "a", "type": "chat_template", "roles_to_train": trained, "roles": roles}
    keys = yaml.safe_load(SMALL) | {"datasets": [rows]}
    found = convert.convert(Source(Path("x.yaml"), keys), "axolotl", 1, train).settings
    assert found.get("template.train_on") == train_on


def test_gpus_that_share_a_row_count_once_in_the_batch(here: Path) -> None:
    keys = yaml.safe_load(SMALL) | {"context_parallel_size": 4, "tensor_parallel_size": 1}
    found = convert.convert(Source(Path("x.yaml"), keys), "axolotl", 8, train).settings
    assert found["train.global_batch_size"] == 2 * 1 * 8 // 4


def test_a_script_is_read_and_not_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(
        "import os\nos.system('touch pwned')\nrate = 3e-4\n"
        "args = SFTConfig(learning_rate=rate, max_length=os.getpid(), packing=not True,\n"
        "                 num_train_epochs=2, **more)\n",
        "train.py",
    )
    assert run("train.py", "--json") == 2  # neither model nor data stand in the script
    found = json.loads(capsys.readouterr().out)
    assert not Path("pwned").exists()
    assert found["settings"]["train.learning_rate"] == 3e-4
    assert found["settings"]["train.num_train_epochs"] == 2
    unread = [line["key"] for line in found["keys"] if line["becomes"] == "unknown"]
    assert unread == ["max_length", "packing", "**more"]


SCRIPT = """
size = 2
common = dict(num_train_epochs=2)
def main():
    rows = load_dataset("json", data_files={"train": "rows.jsonl"}, token="sesame")
    quantized = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained("a/b", token="sesame")
    args = TrainingArguments("out", **common, per_device_train_batch_size=size * 2)
    other = SFTConfig(output_dir="other")
    SFTTrainer(model, args=args, peft_config=LoraConfig(r=4), dataset_text_field="text")
"""


def test_the_defaults_of_a_script_are_those_of_its_calls(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put(SCRIPT, "train.py")
    assert run("train.py") == 0
    said = capsys.readouterr().out
    assert "line 9 gives another value: the first one is converted" in said
    found = yaml.safe_load(Path("train.sft.yaml").read_text())
    assert "sesame" not in said + str(found)
    wanted = {
        "dataset.path": "rows.jsonl",
        "output_dir": "out",
        "train.num_train_epochs": 2,
        "train.per_device_train_batch_size": 4,
        "train.global_batch_size": 4,
        "train.learning_rate": 5e-5,  # TrainingArguments has another default than SFTConfig
        "quantization.bnb_4bit_quant_type": "fp4",  # of BitsAndBytesConfig
        "template": "text",
    }
    assert {name: found.get(name) for name in wanted} == wanted


@pytest.mark.parametrize(
    ("more", "row", "trains"),
    [
        ({}, '{"messages": []}', "all"),
        ({"assistant_only_loss": False}, '{"messages": []}', "all"),
        ({"assistant_only_loss": True}, '{"messages": []}', None),
        ({}, '{"prompt": "a", "completion": "b"}', None),
        ({}, '{"prompt": [{"role": "user", "content": "a"}], "completion": []}', None),
        ({"assistant_only_loss": False}, '{"prompt": "a", "completion": "b"}', None),
        ({"completion_only_loss": False}, '{"prompt": "a", "completion": "b"}', "all"),
    ],
)
def test_what_trl_trains_is_trained(more: Any, row: str, trains: Any, here: Path) -> None:
    put(row, "rows.jsonl")
    source = Source(Path("x.yaml"), {"model_name_or_path": "a/b", "dataset_name": "rows.jsonl"})
    source.keys |= more
    found = convert.convert(source, "trl", 1, train).settings
    assert found.get("template.train_on") == trains
    is_text = '"prompt": "a"' in row  # texts, which TRL puts into no chat template
    assert found["template"] == ("completion" if is_text else "chat")
    assert found.get("template.prompts") == (["{prompt}"] if is_text else None)


def test_a_mask_of_answers_in_a_script_needs_conversations(here: Path) -> None:
    put("SFTConfig(dataset_text_field='text')\ntrain_on_responses_only(trainer)\n", "train.py")
    found = convert.convert(read("train.py"), "trl", 1, train).settings
    assert found["template"] == "chat" and "template.train_on" not in found


def test_the_page_shows_what_is_converted(results: dict[str, Result]) -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "import_coverage.py"))
    assert script["table"](results) in (ROOT / "docs" / "importing.md").read_text()
    for tool in names.TABLES:
        assert len(script["keys_of"](tool).splitlines()) > 20


@pytest.mark.parametrize("tool", ["axolotl", "llama-factory", "trl"])
def test_the_page_of_a_tool_shows_its_run_and_what_the_import_makes_of_it(
    tool: str, here: Path
) -> None:
    page = (ROOT / "docs" / f"from-{tool}.md").read_text()
    theirs, *info, ours = re.findall(r'```\w+ title="[^"]+"\n(.*?)```', page, re.DOTALL)
    put(theirs)
    for text in info:
        put(text, "dataset_info.json")
    source = read("theirs.yaml")
    result = convert.convert(source, recognise(source, None), 4, train)
    assert not result.problems
    assert yaml.safe_load(convert.text_of(result.settings, "")) == yaml.safe_load(ours)


@pytest.mark.parametrize("tool", ["unsloth", "torchtune"])
def test_the_page_of_a_tool_shows_a_run_that_composes(tool: str, here: Path) -> None:
    page = (ROOT / "docs" / f"from-{tool}.md").read_text()
    for text in re.findall(r'```yaml title="sft"\n(.*?)```', page, re.DOTALL):
        train.compose([put(text)])


def test_the_page_of_unsloth_shows_what_the_import_makes_of_its_script(here: Path) -> None:
    page = (ROOT / "docs" / "from-unsloth.md").read_text()
    theirs, ours = re.findall(r'```\w+ title="[^"]+"\n(.*?)```', page, re.DOTALL)
    made = convert.convert(read(put(theirs, "theirs.py")), "trl", 1, train).settings
    shown = yaml.safe_load(ours)
    added = {"dataset.path": "rows.jsonl", "train.merge": True}
    assert shown | {"train.num_train_epochs": 3.0} == made | added
