"""Bad folders of models and adapters."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import MARKER, Case

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "assets" / "tiny"
Make = Callable[[Path, Path], None]
WEIGHTS, ADAPTER, SETTINGS = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
PICKLE = b"cposix\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR."
CODE = f"open({MARKER!r}, 'w')\nraise ImportError\n"


def edit(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: item for key, item in content.items() if item != "GONE"}))


def safetensors(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """Return a file in the format of safetensors with any header."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


def base(damage: Callable[[Path], Any]) -> Make:
    """Copy the embedded model and damage it."""

    def make(here: Path, kit: Path) -> None:
        shutil.copytree(TINY, here / "base")
        damage(here / "base")

    return make


def config(**entries: Any) -> Make:
    """Copy the embedded model and change its config."""
    return base(lambda folder: edit(folder / "config.json", **entries))


def text(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """Replace a file's content."""
    return lambda folder: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def _cut(name: str, keep: int) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def _numpy(change: Callable[[dict[str, Any]], Any], name: str) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        tensors = {key: value.copy() for key, value in load_file(folder / name).items()}
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return damage


def _all_of(*damages: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [damage(folder) for damage in damages]


def _first(tensors: dict[str, Any]) -> str:
    return min(tensors)


def _nan(tensors: dict[str, Any]) -> None:
    tensors[_first(tensors)][:] = float("nan")


def _shape(tensors: dict[str, Any]) -> None:
    tensors[_first(tensors)] = tensors[_first(tensors)][:1]


def _code(folder: Path) -> None:
    (folder / "own.py").write_text(CODE)
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit(folder / "config.json", model_type="own", auto_map=classes)


def _tokenizer_code(folder: Path) -> None:
    (folder / "own.py").write_text(CODE)
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.Own", None]},
    )


def _pickles(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(PICKLE)


def _index(content: Any) -> Callable[[Path], Any]:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(content))

    return damage


def _nested_quantization(folder: Path) -> None:
    edit(folder / "config.json", quantization_config={"quant_method": "new", "bits": 3})


MODELS: dict[str, tuple[Make, str]] = {
    "an empty folder": (lambda here, kit: (here / "base").mkdir(), ""),
    "a file": (lambda here, kit: (here / "base").write_text("x"), ""),
    "nothing there": (lambda here, kit: None, ""),
    "no config": (base(lambda folder: (folder / "config.json").unlink()), ""),
    "an empty config": (base(text("config.json", "")), ""),
    "a cut config": (base(_cut("config.json", 40)), ""),
    "a config that is a list": (base(text("config.json", "[]")), ""),
    "a config that is a number": (base(text("config.json", "5")), ""),
    "a config of bytes": (base(text("config.json", b"\xff\xfe\x00")), ""),
    "a config nested deeply": (base(text("config.json", "[" * 100_000)), ""),
    "no model type": (config(model_type="GONE"), ""),
    "an unknown model type": (config(model_type="from_the_future"), ""),
    "a model type that is a number": (config(model_type=5), ""),
    "a model type of images": (config(model_type="vit"), ""),
    "a decoder with an encoder": (config(is_encoder_decoder=True), "is_encoder_decoder"),
    "an encoder": (config(model_type="bert"), ""),
    "2,000,000 layers": (config(num_hidden_layers=2_000_000), ""),
    "no layers": (config(num_hidden_layers=0), ""),
    "minus one layer": (config(num_hidden_layers=-1), ""),
    "layers as text": (config(num_hidden_layers="two"), ""),
    "more layers than weights": (config(num_hidden_layers=9), ""),
    "a huge hidden size": (config(hidden_size=10**9), ""),
    "a hidden size of 0": (config(hidden_size=0), ""),
    "a hidden size of another model": (config(hidden_size=64), ""),
    "no heads": (config(num_attention_heads=0), ""),
    "heads that do not divide": (config(num_attention_heads=7, head_dim=None), ""),
    "a huge vocabulary": (config(vocab_size=10**12), ""),
    "a vocabulary of 1": (config(vocab_size=1), ""),
    "a vocabulary that is negative": (config(vocab_size=-5), ""),
    "no positions": (config(max_position_embeddings=0), ""),
    "a dropout of 7": (config(attention_dropout=7.0), "attention_dropout=7"),
    "quantised weights that are not": (
        config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "they hold the weights of",
    ),
    "an unknown activation": (config(hidden_act="new"), ""),
    "an unknown rope": (config(rope_parameters={"rope_type": "new", "rope_theta": 1.0}), ""),
    "an unknown dtype": (config(dtype="float7"), ""),
    "an unknown quantisation": (base(_nested_quantization), ""),
    "code of its own": (base(_code), "trust_remote_code|own"),
    "a tokenizer with code": (base(_tokenizer_code), "trust_remote_code|own"),
    "code on the hub": (config(model_type="own", auto_map={"AutoConfig": "a/b--own.C"}), ""),
    "no weights": (base(lambda folder: (folder / WEIGHTS).unlink()), ""),
    "empty weights": (base(text(WEIGHTS, b"")), ""),
    "cut weights": (base(_cut(WEIGHTS, 10_000)), ""),
    "weights with a damaged header": (base(text(WEIGHTS, safetensors(b"{no json"))), ""),
    "weights with a huge header": (base(text(WEIGHTS, safetensors(b"{}", size=1 << 60))), ""),
    "weights without tensors": (base(text(WEIGHTS, safetensors(b"{}"))), ""),
    "weights of another shape": (base(_numpy(_shape, WEIGHTS)), ""),
    "a weight is missing": (base(_numpy(lambda t: t.pop(_first(t)), WEIGHTS)), ""),
    "weights of a web page": (base(text(WEIGHTS, "<html>404</html>" * 9)), ""),
    "weights of a pointer to LFS": (
        base(text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")),
        "",
    ),
    "pickles only": (base(_pickles), ""),
    "an index without its files": (
        base(_index({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})),
        "",
    ),
    "an index that is a list": (base(_index([])), ""),
    "an index to elsewhere": (base(_index({"weight_map": {"a": "../../../etc/passwd"}})), ""),
    "no tokenizer": (
        base(
            _all_of(
                lambda folder: (folder / "tokenizer.json").unlink(),
                lambda folder: (folder / "tokenizer_config.json").unlink(),
            )
        ),
        "",
    ),
    "an empty tokenizer": (base(text("tokenizer.json", "")), ""),
    "a damaged tokenizer": (base(_cut("tokenizer.json", 900)), ""),
    "a tokenizer that is a list": (base(text("tokenizer.json", "[]")), ""),
    "a tokenizer's length as text": (
        base(lambda folder: edit(folder / "tokenizer_config.json", model_max_length="x")),
        "model_max_length=x must be a number",
    ),
    "a stop token that is text": (
        base(lambda folder: edit(folder / "generation_config.json", eos_token_id="x")),
        "eos_token_id='x', which must be a token id",
    ),
    "templates without a default": (
        base(lambda folder: edit(folder / "tokenizer_config.json", chat_template={"a": "b"})),
        "chat templates cannot be used",
    ),
    "a template that inflates": (
        base(text("chat_template.jinja", "{{ messages | tojson(indent=999999) }}")),
        "characters for a conversation",
    ),
    "a damaged tokenizer config": (base(text("tokenizer_config.json", "{")), ""),
    "an adapter beside the model": (
        base(lambda folder: (folder / SETTINGS).write_text('{"peft_type": "LORA"}')),
        "",
    ),
}


def adapter(damage: Callable[[Path], Any]) -> Make:
    """Copy the shared run's adapter and damage it."""

    def make(here: Path, kit: Path) -> None:
        shutil.copytree(kit / "run" / "adapter", here / "adapter")
        damage(here / "adapter")

    return make


def setting(**entries: Any) -> Make:
    """Copy the adapter and change its settings."""
    return adapter(lambda folder: edit(folder / SETTINGS, **entries))


def card(section: str, **entries: Any) -> Make:
    """Copy the adapter and change a section of its card."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / "sft.json").read_text())
        edit(folder / "sft.json", **{section: content[section] | entries})

    return adapter(damage)


def _elsewhere(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    (folder / ADAPTER).symlink_to("/etc/passwd")


def _huge(tensors: dict[str, Any]) -> None:
    tensors[_first(tensors)][:] = 3e38


def _integers(tensors: dict[str, Any]) -> None:
    tensors[_first(tensors)] = tensors[_first(tensors)].astype("int32")


def _pickled(folder: Path) -> None:
    (folder / ADAPTER).unlink()
    (folder / "adapter_model.bin").write_bytes(PICKLE)


# The tokenizer beside the card has the chat template; an entry of the card is never read.
UNREAD = {"a card with a bad template"}
ADAPTERS: dict[str, tuple[Make, str]] = {
    "nothing there": (lambda here, kit: None, ""),
    "an empty folder": (lambda here, kit: (here / "adapter").mkdir(), ""),
    "no settings": (adapter(lambda folder: (folder / SETTINGS).unlink()), ""),
    "empty settings": (adapter(text(SETTINGS, "")), ""),
    "cut settings": (adapter(_cut(SETTINGS, 50)), ""),
    "settings that are a list": (adapter(text(SETTINGS, "[]")), ""),
    "settings nested deeply": (adapter(text(SETTINGS, "[" * 100_000)), ""),
    "settings of bytes": (adapter(text(SETTINGS, b"\xff\xfe")), ""),
    "no kind": (setting(peft_type="GONE"), ""),
    "an unknown kind": (setting(peft_type="NEW"), ""),
    "another kind": (setting(peft_type="IA3"), ""),
    "a prompt": (setting(peft_type="PROMPT_TUNING"), ""),
    "rank 0": (setting(r=0), ""),
    "rank -1": (setting(r=-1), ""),
    "a huge rank": (setting(r=1_000_000_000), ""),
    "rank as text": (setting(r="eight"), ""),
    "another rank": (setting(r=4), ""),
    "no scale": (setting(lora_alpha=None), ""),
    "an infinite scale": (setting(lora_alpha=float("inf")), ""),
    "a scale as text": (setting(lora_alpha="x"), ""),
    "no targets": (setting(target_modules=[]), ""),
    "unknown targets": (setting(target_modules=["nothing"]), ""),
    "targets as a number": (setting(target_modules=5), ""),
    "a damaged pattern": (setting(target_modules="(q_proj"), ""),
    "an endless pattern": (setting(target_modules="(([a-z._0-9])+)+!"), ""),
    "an endless rank pattern": (setting(rank_pattern={"(([a-z._0-9])+)+!": 4}), ""),
    "ranks that are a list": (setting(rank_pattern=[1]), "rank_pattern"),
    "a switch that is a number": (setting(use_rslora=5), "use_rslora"),
    "modules that are a number": (setting(modules_to_save=5), "modules_to_save"),
    "tokens that are text": (setting(alora_invocation_tokens=["x"]), "alora_invocation_tokens"),
    "an unknown start": (setting(init_lora_weights="corda"), ""),
    "code of Megatron": (setting(megatron_config={"a": 1}, megatron_core="os"), ""),
    "layers repeated without end": (setting(layer_replication=[[0, 1]] * 100_000), ""),
    "a huge factor": (setting(lora_alpha=1e308), "lora_alpha=1e.308 must be a number of at most"),
    "biases": (setting(bias="everything"), ""),
    "another task": (setting(task_type="SEQ_CLS"), ""),
    "whole modules": (setting(modules_to_save=["nothing"]), ""),
    "no weights": (adapter(lambda folder: (folder / ADAPTER).unlink()), ""),
    "empty weights": (adapter(text(ADAPTER, b"")), ""),
    "cut weights": (adapter(_cut(ADAPTER, 5000)), ""),
    "weights with a damaged header": (adapter(text(ADAPTER, safetensors(b"{"))), ""),
    "weights without tensors": (adapter(text(ADAPTER, safetensors(b"{}"))), ""),
    "NaN": (adapter(_numpy(_nan, ADAPTER)), "NaN"),
    "another shape": (adapter(_numpy(_shape, ADAPTER)), ""),
    "whole numbers": (adapter(_numpy(_integers, ADAPTER)), ""),
    "a tensor is missing": (adapter(_numpy(lambda t: t.pop(_first(t)), ADAPTER)), ""),
    "a misnamed tensor": (
        adapter(_numpy(lambda t: t.update({"x.lora_A.weight": t.pop(_first(t))}), ADAPTER)),
        "",
    ),
    "a pickle": (adapter(_pickled), ""),
    "weights linked elsewhere": (adapter(_elsewhere), ""),
    "weights are a folder": (
        adapter(_all_of(lambda f: (f / ADAPTER).unlink(), lambda f: (f / ADAPTER).mkdir())),
        "",
    ),
    "an empty card": (adapter(text("sft.json", "")), ""),
    "a card that is a list": (adapter(text("sft.json", "[]")), ""),
    "a card without sections": (adapter(text("sft.json", "{}")), ""),
    "a card with an unknown entry": (card("model", surprise=1), ""),
    "a card with a wrong type": (card("template", prompts=7), ""),
    "a card of a base that is gone": (card("model", name_or_path="/nowhere/base"), ""),
    "a card without a base": (card("model", name_or_path=None), ""),
    "a card of another base": (card("identity", base="0" * 32), ""),
    "a card with a secret's name": (card("model", name_or_path="${oc.env:HOSTILE}"), ""),
    "a card with a bad template": (card("template", chat_template="{% for"), ""),
    "a card with two quantisations": (
        card("quantization", load_in_4bit=True, load_in_8bit=True),
        "",
    ),
}


def _card_code(here: Path, kit: Path) -> None:
    base(_code)(here, kit)
    card("model", trust_remote_code=True, name_or_path=str(here / "base"))(here, kit)


def _other_base(here: Path, kit: Path) -> None:
    config(num_hidden_layers=1)(here, kit)
    adapter(lambda folder: None)(here, kit)


def cases() -> list[Case]:
    """List the inputs of these tables: models are given to four commands in turn."""
    model = ("model=hf", "model.name_or_path={here}/base", "dataset.max_rows=16")
    run = (*model, "train.max_steps=1", "dataset.exact_match=0", "dataset.eval_path=null")
    ways: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("train", run),
        ("generate", ("model={here}/base", "prompt=hi", "max_new_tokens=2")),
    )
    found = [
        Case("models", f"{command}: {name}", command, words, says, make)
        for index, (name, (make, says)) in enumerate(MODELS.items())
        for command, words in (ways if index % 4 == 0 else ways[index % 2 : index % 2 + 1])
    ]
    uses: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("generate", ("adapter={here}/adapter", "prompt=hi", "max_new_tokens=2")),
        ("merge", ("adapter={here}/adapter", "output={here}/merged")),
        ("train", ("lora.init_from={here}/adapter", *run[2:])),
    )
    planted = {
        **ADAPTERS,
        "code that its card allows": (_card_code, "trust_remote_code"),
    }
    found += [
        Case("adapters", f"{command}: {name}", command, words, says, make, {}, name in UNREAD)
        for index, (name, (make, says)) in enumerate(planted.items())
        for command, words in (uses[:2] if index % 3 == 0 else uses[index % 2 : index % 2 + 1])
    ]
    found += [
        Case("adapters", f"train from {name}", "train", uses[2][1], says, make)
        for name, (make, says) in list(planted.items())[1:45:4]
    ]
    other = ("adapter={here}/adapter", "base={here}/base")
    found += [
        Case(
            "adapters",
            f"{command}: a base with fewer layers",
            command,
            (*other, *words[1:]),
            "",
            _other_base,
        )
        for command, words in uses[:2]
    ]
    return found
