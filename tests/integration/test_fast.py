"""The fast path trains as the plain one does, and gives way where it cannot be exact."""

import json
from pathlib import Path

import pytest
import torch
from support import PLAIN, build_model, losses, records


def trained(run: Path, model: Path, rows: Path, *overrides: str) -> tuple[list[float], float]:
    """Train in this process; give the losses by step and the last evaluation's."""
    from sft.train import main, train

    train(
        main.compose(
            [
                *("model=hf", f"model.name_or_path={model}", f"output_dir={run}"),
                *("dataset=jsonl", f"dataset.path={rows}", "dataset.eval_fraction=0.34"),
                *("template=chat", "train.per_device_train_batch_size=4"),
                *("train.global_batch_size=8", "train.num_train_epochs=4"),
                *("train.logging_steps=1", "train.learning_rate=1e-2", "train.save_strategy=no"),
                *("precision=fp32", *overrides),
            ]
        )
    )
    return losses(run), [r for r in records(run) if "eval_loss" in r][-1]["eval_loss"]


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox", "gptj"])
def test_to_the_end_of_a_run(
    tmp_path: Path, rows: Path, family: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(tmp_path / family, family, tied=False)
    with caplog.at_level("INFO", "sft"):
        fast, fast_eval = trained(tmp_path / "fast", model, rows, "model.frozen_linear=packed")
    joined = "rows are joined without padding" in caplog.text
    assert joined is (family != "gptj")  # which brings its own attention
    record = json.loads((tmp_path / "fast" / "run.json").read_text())
    choices = {setting: each["value"] for setting, each in record["choices"].items()}
    assert choices["model.lm_head"] == "chunked"
    assert choices["model.frozen_linear"] == "packed"
    assert choices["train.gradient_checkpointing"] is False
    assert choices["train.padding_free"] is joined
    plain, plain_eval = trained(tmp_path / "plain", model, rows, *PLAIN)
    assert fast == pytest.approx(plain, rel=1e-4)
    assert fast_eval == pytest.approx(plain_eval, rel=1e-4)
    assert fast[-1] < fast[0]
    trls, _ = trained(tmp_path / "trl", model, rows, "model.lm_head=trl")
    assert fast == pytest.approx(trls, rel=1e-4)
    found, expected = (
        [record for record in records(tmp_path / name) if "loss" in record]
        for name in ("fast", "plain")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-3)
        assert ours["mean_token_accuracy"] == theirs["mean_token_accuracy"]
        assert ours["num_tokens"] == theirs["num_tokens"]
    assert found[-1]["num_tokens"] == 4 * 490


def test_packed_as_one_by_one(tmp_path: Path, rows: Path) -> None:
    model = build_model(tmp_path / "llama", "llama", tied=False)
    packed = ["dataset.packing=bfd", "dataset.max_length=96"]
    fast, fast_eval = trained(tmp_path / "fast", model, rows, *packed)
    plain, plain_eval = trained(tmp_path / "plain", model, rows, *packed, *PLAIN)
    assert fast == pytest.approx(plain, rel=1e-4)
    assert fast_eval == pytest.approx(plain_eval, rel=1e-4)
    assert fast[-1] < fast[0]


def test_compiled_it_trains_saves_and_evaluates_as_it_is(
    tmp_path: Path, llama: Path, rows: Path
) -> None:
    """Not compiled in truth, which takes minutes: what matters is the wrapper around the model."""
    steps = "train.max_steps=2"
    with torch.compiler.set_stance("force_eager"):
        compiled = "train.extra={torch_compile: true}"
        found = trained(tmp_path / "compiled", llama, rows, steps, compiled)
    assert found == trained(tmp_path / "plain", llama, rows, steps)
    one, other = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("compiled", "plain")
    )
    assert one == other


def test_samples_are_padded_where_joined_they_would_see_each_other(
    tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that ignores where documents end stands in for a layer that cannot be told."""
    from sft.errors import ModelError
    from sft.fast import attention

    model = build_model(tmp_path / "llama", "llama", tied=False)
    expected, _ = trained(tmp_path / "plain", model, rows, *PLAIN)
    true = attention.packed_attention

    def deaf(*args, cu_seq_lens_q=None, **kwargs):  # type: ignore[no-untyped-def]
        return true(*args, cu_seq_lens_q=None, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", deaf)
    with caplog.at_level("INFO", "sft"):
        found, _ = trained(tmp_path / "padded", model, rows)
    assert "train.padding_free=false: with attn_implementation=packed, documents" in caplog.text
    assert found == pytest.approx(expected, rel=1e-4)
    choice = json.loads((tmp_path / "padded" / "run.json").read_text())["choices"][
        "train.padding_free"
    ]
    assert choice["value"] is False
    assert choice["reason"].startswith("with attn_implementation=packed, documents that are packed")
    with pytest.raises(ModelError, match="attend to each other"):
        trained(tmp_path / "refused", model, rows, "train.padding_free=true")


def test_a_head_that_fails_its_check_is_replaced_and_recorded_so(
    tmp_path: Path, llama: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.fast import proof

    monkeypatch.setattr(proof, "difference", lambda *args: 2.0)  # roundings
    found, _ = trained(tmp_path / "run", llama, rows, "train.max_steps=1")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["choices"]["model.lm_head"] == {
        "value": "plain",
        "reason": "the fast LM head differs from the model's logits",
    }
    assert (record["status"], len(found)) == ("finished", 1)
