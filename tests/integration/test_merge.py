"""What merges, bit by bit against base + adapter, and every refusal before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import build_model
from transformers import AutoModelForCausalLM

from sft import train
from sft.errors import MergeError, ModelError
from sft.merge import __main__ as merge

WEIGHTS = "adapter_model.safetensors"


PATTERNS = ["lora.rank_pattern={q_proj: 4}", "lora.alpha_pattern={up_proj: 3}"]


def trained(folder: Path, base: Path, rows: Path, *overrides: str) -> Path:
    run = folder / "run"
    train.train(
        train.main.compose(
            [
                *("model=hf", f"model.name_or_path={base}", f"output_dir={run}"),
                *("dataset=jsonl", f"dataset.path={rows}", "dataset.eval_fraction=0"),
                *("template=chat", "train.global_batch_size=4", "train.max_steps=3"),
                *("train.warmup_steps=0", "train.learning_rate=2e-2", "train.save_strategy=no"),
                *overrides,
            ]
        )
    )
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama: Path, rows: Path) -> Path:
    return trained(tmp_path_factory.mktemp("merge"), llama, rows)


def merged(*overrides: str) -> None:
    merge.merge(merge.main.compose(list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.use_dora=true"],
        [
            "lora.use_rslora=true",
            "lora.rank_pattern={q_proj: 4}",
            "lora.alpha_pattern={up_proj: 3}",
        ],
        ["lora.modules_to_save=[lm_head]"],
        ["lora.extra.init_lora_weights=pissa"],
        ["lora.extra.bias=all"],
    ],
)
def test_kinds_of_adapter_merge(tmp_path: Path, rows: Path, overrides: list[str]) -> None:
    base = build_model(tmp_path / "base", "llama", tied=True)
    run = trained(tmp_path, base, rows, *overrides)
    merged(f"run={run}")
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["passed"] and report["adapter_effect"]["max_difference"] > 1e-2
    ids = torch.arange(200).reshape(2, 100)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(run / "merged")
    with torch.no_grad():
        assert (adapted(ids).logits - whole(ids).logits).abs().max() < 1e-4


def test_bfloat16_rounds_once(run: Path, tmp_path: Path) -> None:
    merged(f"adapter={run / 'adapter'}", f"output={tmp_path / 'float32'}")
    merged(f"adapter={run / 'adapter'}", f"output={tmp_path / 'half'}", "dtype=bfloat16")
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    rounded = load_file(tmp_path / "half" / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(rounded[key].equal(exact[key].bfloat16()) for key in exact)


def test_merged_folder_holds_what_generation_needs(run: Path, tmp_path: Path) -> None:
    merged(f"run={run}", f"output={tmp_path / 'out'}")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"}
    assert {"merge_report.json", "sft.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [258]  # <|end|>


def test_output_that_is_not_ours_is_never_replaced(run: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    for output, overwrite, message in (
        (precious, "false", "exists"),
        (precious, "true", "not a merged model of ours"),
        (run, "true", "not a merged model of ours"),
        (run / "adapter", "true", "not a merged model of ours"),
    ):
        with pytest.raises(MergeError, match=message):
            merged(f"run={run}", f"output={output}", f"overwrite={overwrite}")
    assert (precious / "thesis.txt").read_text() == "years"
    assert (run / "adapter" / WEIGHTS).is_file()
    merged(f"run={run}", f"output={tmp_path / 'out'}")
    merged(f"run={run}", f"output={tmp_path / 'out'}", "overwrite=true")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"\x00" * 40), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
        (lambda path: path.unlink(), "there is no .*adapter_model.safetensors"),
        (lambda path: change(path, torch.zeros_like), "every lora_B .* is zero"),
        (lambda path: change(path, lambda t: t * float("nan")), "is not finite"),
        (lambda path: change(path, lambda t: t[:0]), "holds empty tensors"),
    ],
)
def test_damaged_adapter_is_refused(run: Path, tmp_path: Path, damage, message: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    damage(adapter / WEIGHTS)
    with pytest.raises(MergeError, match=message):
        merged(f"adapter={adapter}", f"output={tmp_path / 'out'}")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def change(path: Path, new) -> None:
    tensors = load_file(path)
    save_file(
        {key: new(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()}, path
    )


def test_wrong_places_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"there is no adapter in .*nowhere"):
        merged(f"run={tmp_path / 'nowhere'}")
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    (adapter / "sft.json").unlink()
    settings = adapter / "adapter_config.json"
    known = json.loads(settings.read_text())
    settings.write_text(json.dumps({**known, "base_model_name_or_path": None}))
    with pytest.raises(ModelError, match="names no base model\n    fix: base="):
        merged(f"adapter={adapter}", f"output={tmp_path / 'out'}")
    merged(
        f"adapter={adapter}",
        f"output={tmp_path / 'out'}",
        f"base={known['base_model_name_or_path']}",
    )
    settings.write_text("{")
    with pytest.raises(ModelError, match="is damaged"):
        merged(f"adapter={adapter}", f"output={tmp_path / 'other'}")
