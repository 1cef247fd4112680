"""Checkpoint -> a folder that transformers and what builds on it load without this repository; and back.

    python export_hf.py --model kv --checkpoint outputs_qkv_k_equals_v/final_model.pt --output_dir hf_kv
    python export_hf.py --model gqa --checkpoint released.pt --tokenizer gpt2 --output_dir hf_gqa
    python export_hf.py --to_checkpoint hf_kv_finetuned --output_dir outputs_finetuned

The folder holds config.json, model.safetensors, generation_config.json, modeling_qkv.py, a tokenizer and a
model card (README.md). It gets its final name only after it has been loaded back and has given the training script's
logits.
--to_checkpoint turns such a folder, fine-tuned elsewhere, into a final_model.pt for this repository's tools.
"""

import argparse
import json
import math
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import yaml
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging

from common import GPT2_PATTERN, InputError, Tokenizer, load_tokenizer
from dataset_download import read_metadata
from modeling_qkv import QKVConfig, QKVForCausalLM

ROOT = Path(__file__).resolve().parent
VARIANTS = yaml.safe_load((ROOT / "configs/variants.yaml").read_text(encoding="utf-8"))
SHAPE = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "n_kv_groups"]
SHAPE += ["dropout", "layer_norm_epsilon", "initializer_range"]
AUTO_MAP = {
    "AutoConfig": "modeling_qkv.QKVConfig",
    "AutoModel": "modeling_qkv.QKVModel",
    "AutoModelForCausalLM": "modeling_qkv.QKVForCausalLM",
}
END_OF_TEXT = "<|endoftext|>"
N_RANKS = {"bytes": 256, "gpt2": 50_256}
UNKNOWN = "not known"


# -----------------------------------------------------------------------------
# Checkpoints


def open_checkpoint(alias: str, path: Path) -> tuple[dict, torch.nn.Module]:
    """The contents of a checkpoint, ours or released, and the training script's model with its weights.

    InputError where the alias or the file is not what it should be, or a weight is not finite.
    """
    script = script_of(alias)
    try:
        contents = script.read_checkpoint(path)
        model = script.load_model(path)
    except ValueError as error:
        for other in VARIANTS:
            if VARIANTS[other]["script"]["300M"] in str(error):
                raise InputError(f"--model {alias}: {path} is a checkpoint of --model {other}") from error
        raise InputError(str(error)) from error
    refuse_what_is_not_finite(model, path)
    return contents, model


def script_of(alias: str) -> ModuleType:
    """The training script of a variant; that of 300M reads checkpoints of both sizes."""
    if alias not in VARIANTS:
        raise InputError(f"--model {alias}: expected one of {', '.join(VARIANTS)}")
    return import_module(VARIANTS[alias]["script"]["300M"].removesuffix(".py"))


def refuse_what_is_not_finite(model: torch.nn.Module, path: Path) -> None:
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise InputError(f"{path}: {name} holds values that are not finite; take an earlier checkpoint")


def same_logits(model: torch.nn.Module, exported: QKVForCausalLM) -> bool:
    """Whether the training script's model and that of transformers give random tokens the same logits."""
    generator = torch.Generator().manual_seed(0)
    length = min(32, model.config.n_positions)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=generator)
    with torch.inference_mode():
        logits, _ = model(tokens)
        others = exported(tokens).logits
    return torch.allclose(logits, others, rtol=1e-3, atol=1e-3)


# -----------------------------------------------------------------------------
# Tokenizer


def find_tokenizer(
    argument: str | None,
    contents: dict,
    vocab_size: int,
    path: Path,
) -> Tokenizer | None:
    """The tokenizer asked for, by default the one stored beside the run's data; None for "none".

    InputError where there is none, and where it is not the one that the checkpoint was trained with.
    """
    if argument == "none":
        return None
    train_config = dict(contents.get("train_config") or {})
    recorded, digest = contents.get("tokenizer"), None  # released checkpoints do not say
    if isinstance(recorded, dict):
        recorded, digest = recorded["name"], recorded.get("sha256")
    if argument:
        tokenizer = load_tokenizer(argument)
    elif stored := stored_tokenizer(train_config.get("train_data"), train_config.get("val_data")):
        tokenizer = stored
    elif recorded in N_RANKS:
        tokenizer = load_tokenizer(recorded)
    else:
        raise InputError(
            f"{path}: its training data, and with them its tokenizer, are not on this machine; "
            "pass --tokenizer gpt2, bytes, PATH.tiktoken or none"
        )

    ids = tokenizer.eos_id + 1
    if ids > vocab_size:
        raise InputError(f"--tokenizer {tokenizer.name}: has {ids} token ids, and {path} knows {vocab_size}")
    same = recorded in (None, tokenizer.name)
    if recorded in N_RANKS:  # whatever the name of the file that these ranks came out of
        same = len(tokenizer.ranks) == N_RANKS[recorded]
    if digest:
        same = tokenizer.sha256 == digest
    if not same:
        raise InputError(f"--tokenizer {tokenizer.name}: {path} was trained with another, {recorded}")
    return tokenizer


def stored_tokenizer(*data_folders: str | None) -> Tokenizer | None:
    """The tokenizer stored beside token files, under the name that their metadata have for it."""
    for folder in data_folders:
        ranks = Path(folder or "nowhere") / "tokenizer.tiktoken"
        if ranks.is_file():
            tokenizer = load_tokenizer(str(ranks))
            metadata = read_metadata(ranks.parent)
            return replace(tokenizer, name=metadata.tokenizer if metadata else tokenizer.name)
    return None


def fast_tokenizer(tokenizer: Tokenizer, vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that encodes as the training data were: no text holds a special token.

    Its end-of-text token, the id behind the ranks, begins a text, ends it and pads it, as in training.
    """
    converter = TikTokenConverter(pattern=GPT2_PATTERN, extra_special_tokens=[END_OF_TEXT])
    converter.load_tiktoken_bpe = lambda file: tokenizer.ranks  # which need no file
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",  # a batch of prompts is continued on the right
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


# -----------------------------------------------------------------------------
# Model card


def model_card(
    alias: str,
    contents: dict,
    model: torch.nn.Module,
    path: Path,
    tokenizer: Tokenizer | None,
) -> str:
    """The README.md of the folder: what is known of the model, and what is not."""
    # The architecture, out of the model itself.
    c = model.config
    title = VARIANTS[alias]["paper"]
    if title.endswith("GQA"):
        title += f"-{c.n_kv_groups}"
    heads = f"{c.n_head} heads of width {c.n_embd // c.n_head}, {c.n_kv_groups or c.n_head} KV heads"
    shape = f"{c.n_layer} layers, width {c.n_embd:,}, {heads}, feed-forward {c.n_inner:,}"
    cached = "K alone" if VARIANTS[alias]["cached"] == ["k"] else "K and V"
    bytes_a_token, qkv_bytes = cache_bytes(model)

    # The run, out of the checkpoint and what stands beside it. The licence is not known of weights that began
    # elsewhere: of a checkpoint of the release, one fine-tuned elsewhere, one begun from other weights.
    train_config = dict(contents.get("train_config") or {})
    evaluation = metrics_of(path, contents.get("step"))
    trained_here = "variant" in contents and bool(train_config) and not contents.get("init_from")
    licence = "MIT, as the code that trained it; the data have terms of their own"
    rows = {
        "variant": f"{title} (`{alias}`): {VARIANTS[alias]['name']}",
        "parameters": f"{count_parameters(model):,}",
        "architecture": f"{shape}, {c.n_positions:,} positions, vocabulary {c.vocab_size:,}",
        "KV cache": f"{cached}: {bytes_a_token:,} bytes a token in bf16; QKV of this shape: {qkv_bytes:,}",
        "data": data_of(train_config),
        "trained": training_of(contents),
        "perplexity over all positions": figure(evaluation, "perplexity"),
        "perplexity over text only": figure(evaluation, "text_perplexity"),
        "bits per byte of text": figure(evaluation, "bits_per_byte"),
        "tokenizer": tokenizer.name if tokenizer else "none in this folder",
        "licence": licence if trained_here else UNKNOWN,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
license: {"mit" if trained_here else "unknown"}
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A language model of the {title} variant in
[Do Transformers Need Three Projections? A Systematic Study of QKV Variants](https://arxiv.org/abs/2606.04032)
(ICML 2026), exported from a reproduction of its experiments.

| | |
|---|---|
{table}

The perplexities are of the run's validation data. Over all positions, as in the paper, padding counts where
the rows have any; over text only, the figure can be compared with other models of the same tokenizer.

## Use

With torch and transformers 5.20 or newer:

```python
{FROM_TEXT if tokenizer else FROM_TOKENS}
```

`modeling_qkv.py` is the model's code. Positions are learned, so a text ends at {c.n_positions:,} tokens.
{END_OF_A_TEXT if tokenizer else NO_TOKENIZER}
{settings_of(train_config)}"""


FROM_TEXT = """from transformers import pipeline

generate = pipeline("text-generation", model=FOLDER, trust_remote_code=True)
print(generate("The key is", max_new_tokens=50))"""
FROM_TOKENS = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
model.generate(token_ids, max_new_tokens=50)  # int64 [B, T]"""
END_OF_A_TEXT = f"""`{END_OF_TEXT}` within a text is encoded as plain text, as in training; to end a text, append
`tokenizer.eos_token_id`."""
NO_TOKENIZER = "The folder holds no tokenizer; encode texts as the training data were."


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes that a token takes in the KV cache in bf16, and what it takes in QKV, K and V of all heads."""
    config = model.config
    qkv_bytes = 2 * torch.bfloat16.itemsize * config.n_layer * config.n_embd
    return model.make_cache(1, max_length=1, dtype=torch.bfloat16).nbytes, qkv_bytes


def metrics_of(path: Path, step: int | None) -> dict:
    """The run's last evaluation at the checkpoint's step, out of the metrics.jsonl beside it; {} for none."""
    file = path.parent / "metrics.jsonl"
    found = {}
    # A converted checkpoint is at step 0, and a record of step 0 belongs to another model.
    if not step or not file.is_file():
        return found
    for line in file.read_bytes().splitlines():
        with suppress(ValueError, AttributeError):  # a kill cut it short
            record = json.loads(line)
            if record.get("step") == step and record.get("kind") in ("val", "final"):
                found = record
    return found


def figure(evaluation: dict, name: str) -> str:
    value = evaluation.get(name)
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else UNKNOWN


def data_of(train_config: dict) -> str:
    """The source of the training data, out of the metadata beside them."""
    try:
        metadata = read_metadata(Path(train_config.get("train_data") or "nowhere"))
    except InputError:  # damaged since, which is no reason to refuse the export
        metadata = None
    if metadata is None:
        return UNKNOWN
    source = metadata.source
    if Path(source).is_absolute():  # of this machine, and nobody else's business
        source = f"local files, {Path(source).name}"
    if metadata.revision:
        source += f", revision {metadata.revision}"
    return source


def training_of(contents: dict) -> str:
    """Tokens and steps, and where the weights came from that a run or a conversion began with."""
    known = []
    if contents.get("tokens_seen"):
        known.append(f"{contents['tokens_seen']:,} tokens, padding included")
    if contents.get("step"):
        known.append(f"{contents['step']:,} steps")
    if contents.get("init_from"):
        known.append(f"begun from the weights of {Path(contents['init_from']).name}")
    if contents.get("converted_from"):
        known.append(f"converted from {described(contents['converted_from'])}")
    return "; ".join(known) or UNKNOWN


def described(record: object) -> str:
    """What a record says, in a line; of a path, the last part."""
    if isinstance(record, dict):
        known = {key: value for key, value in record.items() if value is not None}
        return ", ".join(f"{key.replace('_', ' ')} {described(value)}" for key, value in known.items())
    if isinstance(record, list | tuple):
        return " ".join(described(value) for value in record)
    if isinstance(record, float):
        return f"{record:.3g}"
    return Path(record).name if isinstance(record, str) else str(record)


def settings_of(train_config: dict) -> str:
    """The settings of the run, but for where its data stood."""
    places = ("_data", "_path", "_dir")
    settings = {key: value for key, value in train_config.items() if not key.endswith(places)}
    if not settings:
        return ""
    return f"\n## Settings of the run\n\n```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```\n"


# -----------------------------------------------------------------------------
# Checkpoint -> folder


def export(alias: str, path: Path, output_dir: Path, tokenizer_argument: str | None) -> None:
    """Write the folder, and say what is in it and how to load it. InputError where something does not fit."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir}: exists already; remove it or choose another name")
    contents, model = open_checkpoint(alias, path)
    tokenizer = find_tokenizer(tokenizer_argument, contents, model.config.vocab_size, path)

    # All files go into a folder of another name. It is renamed when they are there and load again.
    final = output_dir.absolute()
    partial = final.with_name(f"{final.name}.tmp{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        write_folder(partial, alias, contents, model, path, tokenizer)
        exported = QKVForCausalLM.from_pretrained(partial)
        if not same_logits(model, exported):
            raise InputError(f"{path}: the exported model does not compute what the training script does")
        partial.replace(final)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output_dir}: not written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    bytes_a_token, qkv_bytes = cache_bytes(model)
    size = (final / "model.safetensors").stat().st_size / 1e6
    print(f"{output_dir}: {alias}, {count_parameters(model):,} parameters, {size:,.1f} MB")
    print(f"KV cache: {bytes_a_token:,} bytes a token in bf16; QKV of this shape takes {qkv_bytes:,}")
    print(f"tokenizer: {tokenizer.name if tokenizer else 'none'}; model card: {output_dir / 'README.md'}")
    print(f'load it: AutoModelForCausalLM.from_pretrained("{output_dir}", trust_remote_code=True)')


def write_folder(
    folder: Path,
    alias: str,
    contents: dict,
    model: torch.nn.Module,
    path: Path,
    tokenizer: Tokenizer | None,
) -> None:
    """All files of an export."""
    # The end-of-text token begins and ends texts. It pads batches too, as in training.
    end_of_text = {}
    if tokenizer:
        end_of_text = {"bos_token_id": tokenizer.eos_id, "eos_token_id": tokenizer.eos_id}
    shape = {name: getattr(model.config, name) for name in SHAPE}
    config = QKVConfig(variant=alias, **shape, **end_of_text)
    config.auto_map = AUTO_MAP
    if tokenizer:  # what --to_checkpoint writes back, for the tools that ask which one it was
        identity = {"name": tokenizer.name, "vocab_size": tokenizer.eos_id + 1, "sha256": tokenizer.sha256}
        config.training_tokenizer = identity

    # The weights are the checkpoint's: made on no device, the exported model takes them over without a copy.
    with torch.device("meta"):
        exported = QKVForCausalLM(config)
    exported.transformer.load_state_dict(model.state_dict(), assign=True)
    exported.tie_weights()
    exported.generation_config = GenerationConfig(**end_of_text)
    if tokenizer:
        exported.generation_config.pad_token_id = tokenizer.eos_id
    exported.save_pretrained(folder)
    # safetensors makes its file readable by the owner alone
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

    shutil.copyfile(ROOT / "modeling_qkv.py", folder / "modeling_qkv.py")
    if tokenizer:
        fast_tokenizer(tokenizer, model.config.vocab_size, model.config.n_positions).save_pretrained(folder)
    card = model_card(alias, contents, model, path, tokenizer)
    (folder / "README.md").write_text(card, encoding="utf-8")


# -----------------------------------------------------------------------------
# Folder -> checkpoint


def to_checkpoint(folder: Path, output_dir: Path, alias: str | None) -> None:
    """Write the model of a folder as final_model.pt, with its variant and model_config and nothing of a run.

    InputError where the folder holds something else: another model, a part of one, an adapter.
    """
    output = output_dir / "final_model.pt"
    if output.exists():
        raise InputError(f"{output}: exists already; remove it or choose another --output_dir")
    exported = read_folder(folder)
    config = exported.config
    if alias not in (None, config.variant):
        raise InputError(f"--model {alias}: {folder} holds a model of --model {config.variant}")

    script = script_of(config.variant)
    model_config = {name: getattr(config, name) for name in SHAPE}
    if VARIANTS[config.variant]["groups"] is None:
        del model_config["n_kv_groups"]  # one for each head, which the scripts write as none at all
    weights = {name: weight.contiguous() for name, weight in exported.transformer.state_dict().items()}
    contents = {"variant": script.VARIANT, "model_config": model_config, "model_state_dict": weights}
    if tokenizer := getattr(config, "training_tokenizer", None):
        contents["tokenizer"] = tokenizer

    # Under another name, until the training script has read it and computed the same.
    output_dir.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.tmp{os.getpid()}")
    try:
        torch.save(contents, partial)
        model = script.load_model(partial)
        if not same_logits(model, exported):
            raise InputError(f"{folder}: the training script does not compute what the exported model does")
        partial.replace(output)
    except (OSError, RuntimeError, ValueError) as error:  # torch turns a full disk into a RuntimeError
        raise InputError(f"{output}: not written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{output}: {config.variant}, {count_parameters(model):,} parameters")
    print(f"score it: python run_eval.py --model {config.variant} --checkpoint {output}")


def read_folder(folder: Path) -> QKVForCausalLM:
    """The model that export_hf.py or save_pretrained wrote, in fp32 and eval mode; else InputError."""
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: holds an adapter; save the model after merge_and_unload()")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = settings["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: not a folder of transformers: {error}") from error
    if model_type != QKVConfig.model_type:
        raise InputError(f"{folder}: a {model_type} model, not one that export_hf.py wrote")
    if not settings.get("tie_word_embeddings", True):
        raise InputError(f"{folder}: untied embeddings; in the training scripts, output and input share one")
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        exported, loaded = QKVForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a whole model: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loaded[problem]:
            names = ", ".join(str(name) for name in sorted(loaded[problem])[:3])
            problem = problem.replace("_", " ")
            raise InputError(f"{folder}: weights and config.json do not fit, {problem}: {names}")
    refuse_what_is_not_finite(exported, folder)
    return exported


# -----------------------------------------------------------------------------
# Command line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export_hf.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", metavar="ALIAS", help=", ".join(VARIANTS))
    add("--checkpoint", type=Path, metavar="PATH", help="of a training script, of the release, or converted")
    add("--output_dir", type=Path, metavar="DIR", help="the folder to write (with --to_checkpoint: FOLDER)")
    add("--tokenizer", help="gpt2, bytes, PATH.tiktoken or none (default: the one beside the run's data)")
    add("--to_checkpoint", type=Path, metavar="FOLDER", help="the way back: FOLDER -> DIR/final_model.pt")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        if options.to_checkpoint and (options.checkpoint or options.tokenizer):
            raise InputError("--to_checkpoint takes neither --checkpoint nor --tokenizer")
        elif options.to_checkpoint:
            to_checkpoint(options.to_checkpoint, options.output_dir or options.to_checkpoint, options.model)
        elif options.model and options.checkpoint and options.output_dir:
            export(options.model, options.checkpoint, options.output_dir, options.tokenizer)
        else:
            raise InputError("expected --model, --checkpoint and --output_dir, or --to_checkpoint FOLDER")
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        print(f"export_hf.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
