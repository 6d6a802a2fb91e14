"""The real OPT-125m architecture and tokenizer on real rows, under two-rank ZeRO-2.

Skipped where ../shared is absent. The weights are random: none can be downloaded in CI.
"""

import json
from pathlib import Path

import pytest
from support import SHARED, losses
from warm import run_warm

pytestmark = pytest.mark.skipif(
    not (SHARED / "facts").is_dir(), reason=f"no real input: {SHARED} is absent"
)
SOURCES = {
    "dolly": [
        "dataset=dolly",
        "dataset.stop_above.nothing_trained=1",
        "dataset.path={data}/dolly-15k/dolly-sample-5000.jsonl",
    ],
    "gsm8k": [
        "dataset=gsm8k",
        "dataset.path={data}/gsm8k/train.jsonl",
        "dataset.subset=null",
        "dataset.eval_split=null",
        "dataset.eval_path={data}/gsm8k/test.jsonl",
        "dataset.max_eval_rows=32",
        "dataset.overlong=truncate",
        "dataset.stop_above.nothing_trained=1",
    ],
    "tiny-shakespeare": [
        "dataset=text",
        "dataset.path=shakespeare.txt",
        "dataset.name=shakespeare",
    ],
}


@pytest.fixture(scope="session")
def opt_125m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write OPT-125m as published, but for its weights."""
    import torch
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    facts = json.loads((SHARED / "facts" / "model_configs.json").read_text())
    fact = facts["models"]["facebook/opt-125m"]
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            hidden_size=fact["hidden_size"],
            num_hidden_layers=fact["num_hidden_layers"],
            num_attention_heads=fact["num_attention_heads"],
            ffn_dim=fact["intermediate_size"],
            vocab_size=fact["vocab_size"],
            max_position_embeddings=fact["max_position_embeddings"],
            word_embed_proj_dim=fact["hidden_size"],
            tie_word_embeddings=fact["tie_word_embeddings"],
        )
    )
    assert sum(p.numel() for p in model.parameters()) == fact["params_total"] == 125_239_296
    folder = tmp_path_factory.mktemp("opt") / "opt-125m"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "opt").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SOURCES)
def test_opt_125m_learns_real_rows_under_zero_2(tmp_path: Path, opt_125m: Path, name: str) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    text = (SHARED / "data" / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    (tmp_path / "shakespeare.txt").write_text(text[:7_000], encoding="utf-8")
    run_warm(
        "train",
        *("model=opt-125m", f"model.name_or_path={opt_125m}", "zero=stage2", "output_dir=run"),
        *(item.format(data=SHARED / "data") for item in SOURCES[name]),
        *("dataset.max_rows=32", "dataset.max_length=64"),
        *("train.per_device_train_batch_size=2", "train.global_batch_size=4"),
        *("train.max_steps=5", "train.learning_rate=5e-3", "train.warmup_steps=0"),
        *("train.logging_steps=1", "train.save_strategy=no", "train.eval_strategy=no"),
        ranks=2,
        cwd=tmp_path,
    )
    run = tmp_path / "run"
    found = losses(run)
    assert found[0] == pytest.approx(10.8, abs=0.3)  # ln(50,272), a uniform guess
    assert found[-1] < found[0] - 0.5

    run_warm("merge", "run=run", cwd=tmp_path)
    ids = torch.arange(2, 66)[None]
    base = AutoModelForCausalLM.from_pretrained(opt_125m).eval()
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
        assert (adapted - merged(ids).logits).abs().max() < 1e-3
