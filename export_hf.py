"""Checkpoint -> a folder that transformers and what builds on it load without this repository; and back.

    python export_hf.py --model kv --checkpoint outputs_qkv_k_equals_v/final_model.pt --output_dir hf_kv
    python export_hf.py --model gqa --checkpoint released.pt --tokenizer gpt2 --output_dir hf_gqa
    python export_hf.py --to_checkpoint hf_kv_finetuned --output_dir outputs_finetuned

The folder holds config.json, model.safetensors, generation_config.json, modeling_qkv.py, a tokenizer and a
model card (README.md). It gets its final name only after it has been loaded back and has given the training script's
logits.
--to_checkpoint turns such a folder, fine-tuned elsewhere, into a final_model.pt for this repository's tools. The
tokenizer goes with it, so that added tokens and a chat template are there again in the next export.

Contents: checkpoints, tokenizer, model card, checkpoint -> folder, folder -> checkpoint, command line.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers import GenerationConfig, GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode
from transformers.utils import logging

from common import (
    GPT2_PATTERN,
    GPT2_SHA256,
    ROOT,
    VARIANTS,
    InputError,
    Parser,
    Tokenizer,
    load_tokenizer,
    rank_file,
    read_checkpoint,
    read_metrics,
    report,
    script_of,
    show_what_the_terminal_can,
    tokenizer_of,
)
from modeling_qkv import QKVConfig, QKVForCausalLM

SHAPE = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "n_kv_groups"]
SHAPE += ["dropout", "layer_norm_epsilon", "initializer_range"]
AUTO_MAP = {
    "AutoConfig": "modeling_qkv.QKVConfig",
    "AutoModel": "modeling_qkv.QKVModel",
    "AutoModelForCausalLM": "modeling_qkv.QKVForCausalLM",
    "AutoModelForSequenceClassification": "modeling_qkv.QKVForSequenceClassification",
}
# The names of the end-of-text and padding tokens are none that occur in web text, as GPT-2's <|endoftext|> does:
# in the training data that is letters.
END_OF_TEXT, PADDING = "<|qkv_end|>", "<|qkv_pad|>"
# The texts of a folder that belong to its tokenizer or its way of generating
KEPT = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|generation_config)\.json"
    r"|(chat_template|additional_chat_templates/[\w-]+)\.jinja"
)
# What tokenizers of bytes differ in beside their vocabulary: case, spaces, digits, Unicode's normal forms
PROBE = "Hello  world's 1234567 CamelCase\n\n\tna\u00efve e\u0301 \u4e2d\u6587 \U0001f600 don't  x.\n "
UNKNOWN = "not known"


# -----------------------------------------------------------------------------
# Checkpoints


def open_checkpoint(alias: str, path: Path) -> tuple[dict, torch.nn.Module]:
    """The contents of a checkpoint, ours or released, and the training script's model with its weights.

    InputError where the alias or the file is not what it should be, or a weight is not finite.
    """
    contents = read_checkpoint(alias, path)
    try:
        model = script_of(alias).load_model(path)
    except ValueError as error:
        raise InputError(str(error)) from error
    refuse_what_is_not_finite(model, path)
    return contents, model


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


def fast_tokenizer(tokenizer: Tokenizer, vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that encodes texts as the training data were.

    Its end-of-text token is the id behind the ranks, its padding the next one, where the model's vocabulary has
    that id; else they share one, and stock collators leave the end of a text out of the labels.
    """
    names = [END_OF_TEXT, PADDING] if tokenizer.eos_id + 1 < vocab_size else [END_OF_TEXT]
    converter = TikTokenConverter(pattern=GPT2_PATTERN, extra_special_tokens=names)
    converter.load_tiktoken_bpe = lambda file: tokenizer.ranks  # which need no file
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=names[-1],
        padding_side="right",  # on the left, the first token of a text would count in the loss, behind padding
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def files_of(folder: Path) -> dict[str, str]:
    """The texts of a folder of transformers that belong to its tokenizer or its way of generating, by name."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob("**/*")}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if KEPT.fullmatch(name)}


def identity_of(tokenizer: PreTrainedTokenizerFast) -> dict:
    """{name, vocab_size, sha256} of a tokenizer of transformers, as checkpoints record it.

    The sha256 is that of its ranks where it encodes as a .tiktoken file of them does, with an end-of-text token
    behind the ranks; tokens added after that do not count. Else it is that of its own text, which no data have.
    """
    text = tokenizer.backend_tokenizer.to_str()
    contents = json.loads(text)
    added = [token["content"] for token in contents["added_tokens"]]
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    digest = hashlib.sha256(text.encode()).hexdigest()
    other = {"name": f"tokenizer.json sha256:{digest[:16]}", "vocab_size": len(tokenizer), "sha256": digest}
    try:
        pieces = {piece: rank for piece, rank in contents["model"]["vocab"].items() if piece not in added}
        ranks = {bytes(byte_of[character] for character in piece): rank for piece, rank in pieces.items()}
        with TemporaryDirectory() as temporary:
            path = Path(temporary) / "ranks.tiktoken"
            path.write_bytes(rank_file(ranks))
            found = load_tokenizer(str(path))
    except (InputError, KeyError, AttributeError):  # not made of bytes
        return other
    end = tokenizer.convert_ids_to_tokens(found.eos_id) if found.eos_id < len(tokenizer) else None
    ends = (None, tokenizer.eos_token, END_OF_TEXT, "<|endoftext|>")
    if tokenizer.encode(PROBE, add_special_tokens=False) != found.encode([PROBE])[0].tolist() or end not in ends:
        return other
    name = "gpt2" if found.sha256 == GPT2_SHA256 else f"tokenizer.json sha256:{found.sha256[:16]}"
    return {"name": name, "vocab_size": found.eos_id + 1, "sha256": found.sha256}


def tokenizer_entries(folder: Path, recorded: dict | None = None) -> dict:
    """What a checkpoint has of the tokenizer of a folder: its identity, and the files as they are.

    recorded: the identity that the folder's config.json has. A tokenizer of vocab.json and merges.txt, as of
    old GPT-2s, becomes a tokenizer.json.
    """
    try:
        files, found = files_of(folder), recorded
        if "tokenizer.json" in files:
            found = identity_of(PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True))
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            tokenizer = GPT2Tokenizer.from_pretrained(folder, local_files_only=True)
            found = identity_of(tokenizer)
            with TemporaryDirectory() as temporary:
                tokenizer.save_pretrained(temporary)
                files |= files_of(Path(temporary))
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{folder}: its tokenizer cannot be read: {error}") from error
    if recorded and found["sha256"] == recorded["sha256"]:
        found = recorded  # under the name that the training data have for it
    return ({"tokenizer": found} if found else {}) | ({"folder_files": files} if files else {})


# -----------------------------------------------------------------------------
# Model card


def model_card(
    alias: str,
    contents: dict,
    model: torch.nn.Module,
    path: Path,
    name: str | None,
    tokenizer: PreTrainedTokenizerFast | None,
) -> ModelCard:
    """The README.md of the folder: what is known of the model, and what is not. name: of the tokenizer."""
    # The architecture, out of the model itself.
    c = model.config
    title = VARIANTS[alias]["paper"]
    if title.endswith("GQA"):
        title += f"-{c.n_kv_groups}"
    heads = f"{c.n_head} heads of width {c.n_embd // c.n_head}, {c.n_kv_groups or c.n_head} KV heads"
    shape = f"{c.n_layer} layers, width {c.n_embd:,}, {heads}, feed-forward {c.n_inner:,}"
    cached = "K alone" if VARIANTS[alias]["cached"] == ["k"] else "K and V"
    bytes_a_token, qkv_bytes = cache_bytes(alias, c)

    # The run, out of the checkpoint and what stands beside it. The licence is not known of weights that began
    # elsewhere: of a checkpoint of the release, one fine-tuned elsewhere, one begun from other weights.
    train_config = dict(contents.get("train_config") or {})
    evaluation = evaluation_of(path, contents.get("step"))
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
        "tokenizer": name or "none in this folder",
        "licence": licence if trained_here else UNKNOWN,
    }
    return ModelCard.from_template(
        ModelCardData(
            license="mit" if trained_here else "unknown",
            library_name="transformers",
            pipeline_tag="text-generation",
        ),
        template_path=ROOT / "configs/model_card.md",
        title=title,
        rows=rows,
        positions=f"{c.n_positions:,}",
        tokenizer=tokenizer,
        own_names=tokenizer and tokenizer.eos_token == END_OF_TEXT,
        settings=settings_of(train_config),
    )


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(alias: str, config) -> tuple[int, int]:
    """Bytes that a token takes in the KV cache in bf16, and what it takes in QKV, K and V of all heads."""
    head_bytes = torch.bfloat16.itemsize * config.n_layer * config.n_embd // config.n_head
    heads = config.n_kv_groups or config.n_head
    return len(VARIANTS[alias]["cached"]) * heads * head_bytes, 2 * config.n_head * head_bytes


def evaluation_of(path: Path, step: int | None) -> dict:
    """The run's last evaluation at the checkpoint's step, out of the metrics.jsonl beside it; {} for none."""
    if not step:  # a converted checkpoint is at step 0, and a record of step 0 belongs to another model
        return {}
    records = read_metrics(path.parent / "metrics.jsonl")
    at_step = [record for record in records if record["step"] == step and record["kind"] in ("val", "final")]
    return at_step[-1] if at_step else {}


def figure(evaluation: dict, name: str) -> str:
    value = evaluation.get(name)
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else UNKNOWN


def data_of(train_config: dict) -> str:
    """The source of the training data, out of the metadata beside them."""
    try:
        file = Path(train_config.get("train_data") or "nowhere") / "metadata.json"
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # gone or damaged since, which is no reason to refuse the export
        return UNKNOWN
    source = metadata["source"]
    if Path(source).is_absolute():  # of this machine, and nobody else's business
        source = f"local files, {Path(source).name}"
    return source + (f", revision {metadata['revision']}" if metadata.get("revision") else "")


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
    """The settings of the run as YAML, but for where its data stood."""
    places = ("_data", "_path", "_dir")
    settings = {key: value for key, value in train_config.items() if not key.endswith(places)}
    return yaml.safe_dump(settings, sort_keys=False) if settings else ""


# -----------------------------------------------------------------------------
# Checkpoint -> folder


def export(alias: str, path: Path, output_dir: Path, tokenizer_argument: str | Tokenizer | None) -> None:
    """Write the folder, and say what is in it and how to load it. InputError where something does not fit.

    tokenizer_argument: as --tokenizer, or a Tokenizer as it is.
    """
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir}: exists already; remove it or choose another name")
    contents, model = open_checkpoint(alias, path)
    files, tokenizer = contents.get("folder_files", {}), tokenizer_argument
    if tokenizer == "none":
        tokenizer = None
        contents["folder_files"] = {name: files[name] for name in files if name == "generation_config.json"}
    elif not isinstance(tokenizer, Tokenizer) and (tokenizer or "tokenizer.json" not in files):
        tokenizer = tokenizer_of(contents, path, tokenizer)

    # All files go into a folder of another name. It is renamed when they are there and load again.
    final = output_dir.resolve()
    partial = final.with_name(f"{final.name}.tmp{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        shipped = write_folder(partial, alias, contents, model, path, tokenizer)
        exported = QKVForCausalLM.from_pretrained(partial)
        if not same_logits(model, exported):
            raise InputError(f"{path}: the exported model does not compute what the training script does")
        partial.replace(final)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output_dir}: not written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

    bytes_a_token, qkv_bytes = cache_bytes(alias, model.config)
    size = (final / "model.safetensors").stat().st_size / 1e6
    lines = [f"{output_dir}: {alias}, {count_parameters(model):,} parameters, {size:,.1f} MB"]
    lines.append(f"KV cache: {bytes_a_token:,} bytes a token in bf16; QKV of this shape takes {qkv_bytes:,}")
    lines.append(f"tokenizer: {name_of(contents, tokenizer) or 'none'}; model card: {output_dir / 'README.md'}")
    if shipped and shipped.pad_token_id in (None, shipped.eos_token_id):
        lines.append("no token id is left for padding; the model card says what that means for fine-tuning")
    lines.append(f'load it: AutoModelForCausalLM.from_pretrained("{output_dir}", trust_remote_code=True)')
    report(*lines)


def write_folder(
    folder: Path,
    alias: str,
    contents: dict,
    model: torch.nn.Module,
    path: Path,
    tokenizer: Tokenizer | None,
) -> PreTrainedTokenizerFast | None:
    """All files of an export; returns the tokenizer that is in it."""
    # A checkpoint that came out of such a folder brought its files along. Else the tokenizer is made here.
    kept = {name: text for name, text in contents.get("folder_files", {}).items() if KEPT.fullmatch(name)}
    for name, text in kept.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    shipped = None
    if "tokenizer.json" in kept:
        shipped = PreTrainedTokenizerFast.from_pretrained(folder)
    elif tokenizer:
        shipped = fast_tokenizer(tokenizer, model.config.vocab_size, model.config.n_positions)
        shipped.save_pretrained(folder)

    ids = {name: getattr(shipped, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {name: getattr(model.config, name) for name in SHAPE}
    config = QKVConfig(variant=alias, **shape, **ids)
    config.auto_map = AUTO_MAP
    # What --to_checkpoint writes back, for the tools that ask which tokenizer it was
    if "tokenizer.json" in kept:
        config.training_tokenizer = contents.get("tokenizer")
    elif tokenizer:
        identity = {"name": tokenizer.name, "vocab_size": tokenizer.eos_id + 1, "sha256": tokenizer.sha256}
        config.training_tokenizer = identity

    # The weights are the checkpoint's: made on no device, the exported model takes them over without a copy.
    with torch.device("meta"):
        exported = QKVForCausalLM(config)
    exported.transformer.load_state_dict(model.state_dict(), assign=True)
    exported.tie_weights()
    exported.generation_config = GenerationConfig(**ids)
    if "generation_config.json" in kept:
        exported.generation_config = GenerationConfig.from_pretrained(folder)
    exported.save_pretrained(folder)
    # safetensors makes its file readable by the owner alone
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

    shutil.copyfile(ROOT / "modeling_qkv.py", folder / "modeling_qkv.py")
    card = model_card(alias, contents, model, path, name_of(contents, tokenizer), shipped)
    (folder / "README.md").write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return shipped


def name_of(contents: dict, tokenizer: Tokenizer | None) -> str | None:
    """What the tokenizer of an export is called."""
    if "tokenizer.json" not in contents.get("folder_files", {}):
        return tokenizer.name if tokenizer else None
    recorded = contents.get("tokenizer") or {}
    return f"{recorded.get('name', UNKNOWN)}, as it came with the weights"


# -----------------------------------------------------------------------------
# Folder -> checkpoint


def to_checkpoint(folder: Path, output_dir: Path, alias: str | None) -> None:
    """Write the model of a folder as final_model.pt, with its variant, model_config and tokenizer.

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
    contents |= tokenizer_entries(folder, getattr(config, "training_tokenizer", None))

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
    lines = [f"{output}: {config.variant}, {count_parameters(model):,} parameters"]
    if "tokenizer" in contents:
        lines.append(f"tokenizer: {name_of(contents, None) or contents['tokenizer']['name']}")
    report(*lines, f"score it: python run_eval.py --model {config.variant} --checkpoint {output}")


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
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", metavar="ALIAS", help=", ".join(VARIANTS))
    add("--checkpoint", type=Path, metavar="PATH", help="of a training script, of the release, or converted")
    add("--output_dir", type=Path, metavar="DIR", help="the folder to write (with --to_checkpoint: FOLDER)")
    add("--tokenizer", help="gpt2, bytes, the PATH of one, or none (default: the one beside the run's data)")
    add("--to_checkpoint", type=Path, metavar="FOLDER", help="the way back: FOLDER -> DIR/final_model.pt")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    show_what_the_terminal_can()
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
