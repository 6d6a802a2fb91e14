"""Merging what a run has trained: proven, safe, and every refusal before anything is written."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import ROOT, build_model, run_sft
from transformers import AutoModelForCausalLM
from warm import run_warm

from sft import train
from sft.errors import ConfigError, MergeError, ModelError, RunError, SftError
from sft.generate import main as generate
from sft.merge import __main__ as merge
from sft.merge import claim

WEIGHTS = "adapter_model.safetensors"


def trained(folder: Path, base: Path, rows: Path, *overrides: str, precision: str = "fp32") -> Path:
    run = folder / "run"
    settings = [
        *("model=hf", f"model.name_or_path={base}", f"output_dir={run}"),
        *("dataset=jsonl", f"dataset.path={rows}"),
        *("template=chat", "train.global_batch_size=4", "train.max_steps=3"),
        *("train.warmup_steps=0", "train.learning_rate=2e-2", "train.save_strategy=no"),
        f"precision={precision}",
    ]
    train.train(train.main.compose([*settings, *overrides]))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, llama: Path, rows: Path) -> Path:
    return trained(tmp_path_factory.mktemp("merge"), llama, rows, "dataset.eval_fraction=0")


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


def test_pissa_trained_in_bf16_merges(tmp_path: Path, llama: Path, rows: Path) -> None:
    """Its first product was taken out of weights that were rounded when training loaded them."""
    pissa = "lora.extra.init_lora_weights=pissa"
    run = trained(tmp_path, llama, rows, pissa, precision="bf16")
    merged(f"run={run}")
    assert report_of(run / "merged")["passed"]
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    whole = AutoModelForCausalLM.from_pretrained(run / "merged")
    kept = PeftModel.from_pretrained(base, run / "adapter").get_base_model()
    for name, layer in kept.named_modules():
        if name.endswith("_proj"):
            expected = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
            found = whole.get_submodule(name).weight
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "merge_report.json").read_text())
    return report


def test_is_compared_on_the_runs_own_samples(
    run: Path, tmp_path: Path, llama: Path, rows: Path
) -> None:
    merged(f"run={run}")
    assert report_of(run / "merged")["compared_on"].startswith("8 training samples of the run")
    run = trained(tmp_path, llama, rows, "dataset.eval_fraction=0.34")
    merged(f"run={run}")
    report = report_of(run / "merged")
    assert report["compared_on"].startswith("8 held-out samples of the run")
    losses = report["eval_loss"]
    assert losses["merged"] == pytest.approx(losses["base_and_adapter"], rel=1e-5)
    assert report["base_compared"] == "the same as in training"


@pytest.mark.parametrize("fault", ["lost", "doubled", "swapped"])
def test_a_merge_that_is_wrong_is_marked_and_not_used(
    run: Path, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of fourteen changes goes wrong while it is written."""
    from sft.merge.change import Change

    honest = Change._add_products
    places: dict[int, int] = {}

    def dishonest(self: Change, tile: torch.Tensor, *rest: Any) -> None:
        number = places.setdefault(id(self), len(places))
        before = tile.clone()
        honest(self, tile, *rest)
        if number == 5:
            faults = {
                "lost": lambda: tile.copy_(before),
                "doubled": lambda: honest(self, tile, *rest),
                "swapped": lambda: tile.copy_(before - (tile - before)),
            }
            faults[fault]()

    monkeypatch.setattr(Change, "_add_products", dishonest)
    with pytest.raises(MergeError, match=r"differs from base . adapter: logits differ by"):
        merged(f"run={run}", f"output={tmp_path / 'out'}")
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]
    report = report_of(tmp_path / "out.failed")
    assert report["passed"] is False and "logits differ" in report["reason"]
    monkeypatch.undo()
    merged(f"run={run}", f"output={tmp_path / 'out'}")
    assert report_of(tmp_path / "out")["passed"]


def test_a_rounding_that_swallows_the_adapter_is_said(run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    change(adapter / WEIGHTS, lambda tensor: tensor * 1e-3)
    out = tmp_path / "out"
    with pytest.raises(MergeError, match="rounding removes more than half of the adapter's change"):
        merged(f"adapter={adapter}", f"output={out}", "dtype=bfloat16")
    merged(f"adapter={adapter}", f"output={out}", "dtype=float32")


def test_precision_and_file_sizes_are_as_asked(run: Path, tmp_path: Path) -> None:
    merged(f"adapter={run / 'adapter'}", f"output={tmp_path / 'float32'}")
    half, small = tmp_path / "half", tmp_path / "small"
    merged(f"adapter={run / 'adapter'}", f"output={half}", "dtype=bfloat16")
    merged(f"adapter={run / 'adapter'}", f"output={small}", "max_shard_size=150KB")
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    rounded = load_file(half / "model.safetensors")
    assert exact.keys() == rounded.keys()
    assert all(rounded[key].equal(exact[key].bfloat16()) for key in exact)
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
    files = sorted(small.glob("model-*-of-*.safetensors"))
    assert len(files) > 2 and all(path.stat().st_size < 160_000 for path in files)
    assert json.loads((small / "model.safetensors.index.json").read_text())["weight_map"]
    model = AutoModelForCausalLM.from_pretrained(small)
    assert all(model.state_dict()[key].equal(exact[key]) for key in exact)
    # A base in several files is merged into as many.
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    merged(f"adapter={adapter}", f"output={tmp_path / 'out'}", f"base={small}", "check_base=false")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == [
        path.name for path in files
    ]


@pytest.mark.parametrize("size", ["5", "0GB", "five GB", "-1GB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ConfigError, match="must be a size"):
        merge.main.compose(["adapter=a", "output=b", f"max_shard_size={size}"])


def test_without_verification_it_is_recorded(run: Path, tmp_path: Path) -> None:
    merged(f"run={run}", f"output={tmp_path / 'out'}", "verify=false")
    report = report_of(tmp_path / "out")
    assert (report["passed"], report["reason"]) == (None, "verify=false")


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
        (precious, "true", "exists without merge_report.json"),
        (run, "true", "exists without merge_report.json"),
        (run / "adapter", "true", "exists without merge_report.json"),
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
        (lambda path: change(path, lambda t: t * float("nan")), "holds NaN or infinite values"),
        (lambda path: change(path, lambda t: t[:0]), "holds empty tensors"),
    ],
)
def test_damaged_adapter_is_refused(run: Path, tmp_path: Path, damage, message: str) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    damage(adapter / WEIGHTS)
    with pytest.raises(MergeError, match=message):
        merged(f"adapter={adapter}", f"output={tmp_path / 'out'}")
    with pytest.raises(MergeError, match=message):
        generate.run(generate.compose([f"adapter={adapter}", "prompt=a"]))
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("sft.json", "{"),
        ("sft.json", "[]"),
        ("sft.json", '{"model": 3}'),
        ("sft.json", '{"new": 3}'),
        ("adapter_config.json", "{"),
        ("adapter_config.json", "[]"),
    ],
)
def test_damaged_settings_of_an_adapter_are_named(
    run: Path, tmp_path: Path, name: str, text: str
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    (adapter / name).write_text(text)
    with pytest.raises(SftError, match=f"{name} is damaged: .*\n    fix: train or copy it again"):
        merged(f"adapter={adapter}", f"output={tmp_path / 'out'}")
    with pytest.raises(SftError, match=f"{name} is damaged: .*\n    fix: train or copy it again"):
        generate.run(generate.compose([f"adapter={adapter}", "prompt=a"]))


def test_a_run_given_as_something_else_is_recognised(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=f"there is no adapter in .*\n    fix: run={run}"):
        merged(f"adapter={run}", f"output={tmp_path / 'out'}")
    with pytest.raises(ModelError, match=f"is a run, not a model\n    fix: run={run}"):
        generate.run(generate.compose([f"model={run}", "prompt=a"]))
    with pytest.raises(ModelError, match=r"cannot be loaded: the folder has no config.json\n"):
        generate.run(generate.compose([f"model={tmp_path}", "prompt=a"]))
    with pytest.raises(ConfigError, match=r"x.jsonl\n    the folder .* does not exist"):
        generate.compose([f"model={run}", "prompt=a", f"output={tmp_path}/new/x.jsonl"])


@pytest.fixture
def base(run: Path, tmp_path: Path, llama: Path) -> Path:
    """Give a copy of the base that may be damaged."""
    return Path(shutil.copytree(llama, tmp_path / "base"))


def test_another_base_is_refused(run: Path, tmp_path: Path, base: Path) -> None:
    command = [f"run={run}", f"output={tmp_path / 'out'}", f"base={base}"]
    merged(*command)
    assert report_of(tmp_path / "out")["base_compared"] == "the same as in training"
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    os.utime(base / "model.safetensors", (1, 1))
    with pytest.raises(MergeError, match=r"is not the base of training: .* in training, "):
        merged(*command, "overwrite=true")
    merged(*command, "overwrite=true", "check_base=false")
    assert report_of(tmp_path / "out")["base_compared"] == "not compared: check_base=false"


def test_a_damaged_base_is_refused(run: Path, tmp_path: Path, base: Path) -> None:
    command = [f"run={run}", f"output={tmp_path / 'out'}", f"base={base}", "check_base=false"]
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(MergeError, match=r"model.safetensors is damaged"):
        merged(*command)
    tensors = load_file_bytes(whole)
    tensors.pop("model.norm.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(MergeError, match=r"lacks 1 tensors .* such as model.norm.weight"):
        merged(*command)
    weights.unlink()
    with pytest.raises(ModelError, match=r"the weights of .* cannot be loaded"):
        merged(*command)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def load_file_bytes(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def test_a_base_of_another_shape_is_refused(run: Path, tmp_path: Path) -> None:
    for family, settings, message in (
        ("opt", {}, "does not fit the base: Target modules"),
        ("llama", {"intermediate_size": 192}, "does not fit the base: size mismatch"),
        ("llama", {"num_hidden_layers": 1}, "14 tensors .* do not exist in the base"),
    ):
        other = build_model(tmp_path / f"{family}{len(settings)}{message[-4:]}", family, False)
        if settings:
            shutil.rmtree(other)
            build_model(other, family, False, **settings)
        with pytest.raises(MergeError, match=message):
            merged(f"run={run}", f"output={tmp_path / 'out'}", f"base={other}", "check_base=false")
    assert not (tmp_path / "out").exists()


def test_adapters_of_unlike_bases_are_not_added(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run / "adapter", other)
    card = json.loads((other / "sft.json").read_text())
    card["quantization"]["load_in_8bit"] = True
    (other / "sft.json").write_text(json.dumps(card))
    command = [f"adapter=[{run / 'adapter'},{other}]", f"output={tmp_path / 'out'}"]
    with pytest.raises(MergeError, match="quantised in different ways"):
        merged(*command)
    card["quantization"]["load_in_8bit"] = False
    card["identity"]["base"] = "0" * 32
    (other / "sft.json").write_text(json.dumps(card))
    with pytest.raises(MergeError, match="is not the base of training: 0000"):
        merged(*command)


def test_deepspeed_shards_are_no_adapter(run: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    (adapter / WEIGHTS).rename(adapter / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    with pytest.raises(MergeError, match=r"holds DeepSpeed's shards .* not an adapter"):
        merged(f"adapter={adapter}", f"output={tmp_path / 'out'}")


def test_a_killed_merge_leaves_nothing_that_looks_finished(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    inject = str(ROOT / "benchmarks" / "inject.py")
    for place in ("sft.merge.write.write:before", "sft.merge.metadata.write:after"):
        merge_run = ("sft.merge", f"run={run}", f"output={out}")
        killed = run_warm(inject, f"SIGKILL:{place}:1:0", *merge_run, cwd=tmp_path, check=False)
        assert killed.returncode == -9
        assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    merged(f"run={run}", f"output={out}")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_merges_do_not_share_an_output(run: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years")
    with pytest.raises(MergeError, match=r"out.partial exists without merge_report.json"):
        merged(f"run={run}", f"output={tmp_path / 'out'}")
    (partial / "thesis.txt").rename(partial / "merge_report.json")
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(MergeError, match="another merge is writing"):
        merged(f"run={run}", f"output={tmp_path / 'out'}")
    assert (partial / "merge_report.json").read_text() == "years"
    os.close(handle)
    merged(f"run={run}", f"output={tmp_path / 'out'}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that the merged model does not fit."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_seen_before_and_survived(
    run: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MergeError, match=r"needs 0.06\d GB, and .*disk has 0.00\d GB free"):
        merged(f"run={run}", f"output={disk / 'out'}")
    monkeypatch.setattr(claim, "SPARE", -(1 << 40))  # somebody else takes the room meanwhile
    with pytest.raises(MergeError, match=r"out cannot be written: .*No space left"):
        merged(f"run={run}", f"output={disk / 'out'}")
    assert list(disk.iterdir()) == []


def test_training_merges_at_its_end(tmp_path: Path, llama: Path, rows: Path) -> None:
    """On rank 0 of two, after both have ended."""
    run_warm(
        "train",
        *("model=hf", f"model.name_or_path={llama}", "output_dir=run", "template=chat"),
        *("dataset=jsonl", f"dataset.path={rows}", "train.global_batch_size=8"),
        *("train.max_steps=2", "train.warmup_steps=0", "train.learning_rate=2e-2"),
        *("zero=stage3", "train.save_strategy=no", "train.merge=true"),
        ranks=2,
        cwd=tmp_path,
    )
    assert report_of(tmp_path / "run" / "merged")["passed"]


def test_a_model_of_the_hub_trains_and_merges_offline(
    tmp_path: Path, llama: Path, rows: Path
) -> None:
    """From the hub's cache, as a download leaves it; the branch moves on before the merge."""
    cached = tmp_path / "hub" / "models--me--small"
    commits = ["a" * 40, "b" * 40]
    for commit in commits:
        shutil.copytree(llama, cached / "snapshots" / commit)
    (cached / "snapshots" / commits[1] / "model.safetensors").write_bytes(b"another")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commits[0])
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    run_sft(
        "train",
        *("model=hf", "model.name_or_path=me/small", "output_dir=run", "template=chat"),
        *("dataset=jsonl", f"dataset.path={rows}", "train.global_batch_size=4"),
        *("train.max_steps=2", "train.warmup_steps=0", "train.save_strategy=no"),
        cwd=tmp_path,
        **offline,
    )
    card = json.loads((tmp_path / "run" / "adapter" / "sft.json").read_text())
    assert card["identity"]["base"] == f"commit {commits[0]}"
    (cached / "refs" / "main").write_text(commits[1])
    run_sft("merge", "run=run", cwd=tmp_path, **offline)
    assert report_of(tmp_path / "run" / "merged")["base_compared"] == "the same as in training"


def test_what_cannot_be_uploaded_stays(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_sft(
        *("merge", f"run={run}", f"output={out}", "push_to_hub=me/model"),
        cwd=tmp_path,
        check=False,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_TOKEN="hf_none",
        HF_HUB_OFFLINE="0",
    )
    assert result.returncode == 1
    assert f"error: {out} is merged, but could not be uploaded to me/model: " in result.stderr
    assert "hf_none" not in result.stderr
    assert report_of(out)["passed"]


def change(path: Path, new) -> None:
    tensors = load_file(path)
    save_file(
        {key: new(tensor) if "lora_B" in key else tensor for key, tensor in tensors.items()}, path
    )


def test_damaged_files_of_a_run_are_named_before_anything_is_written(
    run: Path, tmp_path: Path
) -> None:
    from sft import generate

    run = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("merged*")))
    rows = (run / "probes.jsonl").read_text().splitlines(keepends=True)
    line = json.loads(rows[0])
    for text, reason in (
        ("", "it has 0 lines, not 1 to 8"),
        ("".join([*rows, rows[0]]), "it has 9 lines"),
        ("[" * 100_000, ":1 is damaged: .* nested too deeply"),
        (rows[0] + "{\n", ":2 is damaged: Expecting property name"),
        ('{"input_ids": [-1], "labels": [5]}', "the entry origin is missing"),
        (json.dumps({**line, "input_ids": 7}), "input_ids must be of type list"),
        (json.dumps({**line, "input_ids": line["input_ids"][1:]}), "must have the same 1 to 128"),
        (json.dumps({**line, "input_ids": [10**6] * len(line["labels"])}), "a token id is not"),
        (json.dumps({**line, "labels": [-5] * len(line["labels"])}), "a label is neither -100"),
    ):
        (run / "probes.jsonl").write_text(text)
        with pytest.raises(
            MergeError, match=rf"probes.jsonl.*{reason}(.|\n)*fix: restore the file"
        ):
            merged(f"run={run}")
        assert not (run / "merged").exists() and not (run / "merged.partial").exists()
    (run / "probes.jsonl").unlink()  # as the fix says
    (run / "run.json").write_text("{")
    with pytest.raises(RunError, match=rf"run.json is damaged\n    fix: adapter={run}/adapter$"):
        generate.main.run(generate.main.compose([f"run={run}", "prompt=a"]))
    with pytest.raises(RunError, match=r"run.json is damaged\n    fix: adapter=") as refused:
        merged(f"run={run}")
    merged(*str(refused.value).partition("fix: ")[2].split())
    assert "random tokens" in report_of(run / "merged")["compared_on"]


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
