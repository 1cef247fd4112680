"""Checkpoint -> a folder that transformers and what builds on it load without this repository; and back.

    python export_hf.py --model kv --checkpoint outputs_qkv_k_equals_v/final_model.pt --output_dir hf_kv
    python export_hf.py --model gqa --checkpoint released.pt --tokenizer gpt2 --output_dir hf_gqa
    python export_hf.py --to_checkpoint hf_kv_finetuned --output_dir outputs_finetuned

The folder holds config.json, model.safetensors, generation_config.json, modeling_qkv.py, a tokenizer and a
model card (README.md). It gets its final name only after it has been loaded back and has given the training
script's logits.
--to_checkpoint turns such a folder, fine-tuned elsewhere, into a final_model.pt for this repository's tools.
The tokenizer goes with it, so that added tokens and a chat template are there again in the next export.

Contents: the same model, tokenizer, model card, checkpoint -> folder, folder -> checkpoint, command line.
"""

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
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging

from common import (  # isort: skip
    GPT2_PATTERN, GPT2_SHA256, ROOT, VARIANTS, InputError, Parser, Tokenizer, cache_bytes, load_tokenizer,
    open_checkpoint, read_metrics, refuse_what_is_not_finite, report, script_of, show_what_the_terminal_can,
    tokenizer_of,
)  # fmt: skip
from modeling_qkv import QKVConfig, QKVForCausalLM

SHAPE = ["vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "n_kv_groups"]
SHAPE += ["dropout", "layer_norm_epsilon", "initializer_range"]
AUTO_MAP = {
    "AutoConfig": "modeling_qkv.QKVConfig",
    "AutoModel": "modeling_qkv.QKVModel",
    "AutoModelForCausalLM": "modeling_qkv.QKVForCausalLM",
    "AutoModelForSequenceClassification": "modeling_qkv.QKVForSequenceClassification",
}
# The names of the end-of-text and padding tokens occur in no web text. GPT-2's <|endoftext|> does, and in the
# training data it is letters.
END_OF_TEXT, PADDING = "<|qkv_end|>", "<|qkv_pad|>"
# The texts of a folder that belong to its tokenizer or its way of generating
KEPT = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|generation_config)\.json"
    r"|(chat_template|additional_chat_templates/[\w-]+)\.jinja"
)
UNKNOWN = "not known"


# -----------------------------------------------------------------------------
# The same model, here and in transformers


def in_transformers(model: torch.nn.Module, **settings) -> QKVForCausalLM:
    """The model of a training script as one of transformers, which takes over the weights without a copy."""
    (alias,) = [alias for alias, row in VARIANTS.items() if row["class"] == type(model).__name__]
    shape = {name: getattr(model.config, name) for name in SHAPE}
    with torch.device("meta"):
        exported = QKVForCausalLM(QKVConfig(variant=alias, **shape, **settings))
    exported.transformer.load_state_dict(model.state_dict(), assign=True)
    exported.tie_weights()
    return exported


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

    Its end-of-text token is the id behind the ranks, its padding the next one, where the model's vocabulary
    has that id; else they share one, and stock collators leave the end of a text out of the labels.
    """
    names = [END_OF_TEXT, PADDING] if tokenizer.eos_id + 1 < vocab_size else [END_OF_TEXT]
    converter = TikTokenConverter(pattern=GPT2_PATTERN, extra_special_tokens=names)
    converter.load_tiktoken_bpe = lambda file: tokenizer.ranks  # which need no file
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=names[-1],
        padding_side="right",  # behind padding, the first token of a text would count in the loss
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def files_of(folder: Path) -> dict[str, str]:
    """The texts of a folder that belong to its tokenizer or its way of generating, by name."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.glob("**/*")}
    return {name: path.read_text(encoding="utf-8") for name, path in paths.items() if KEPT.fullmatch(name)}


def identity_of(tokenizer: PreTrainedTokenizerFast) -> dict:
    """{name, vocab_size, sha256} of a tokenizer of transformers, as checkpoints record it.

    The sha256 is that of its ranks where it encodes as a .tiktoken file of them does, with an end-of-text
    token behind the ranks; tokens added after that do not count. Else it is that of its own text, which no
    data have.
    """
    text = tokenizer.backend_tokenizer.to_str()
    try:
        contents = json.loads(text)
        added = contents["added_tokens"]
        n_ranks = len(contents["model"]["vocab"].keys() - {token["content"] for token in added})
        contents["added_tokens"] = [token for token in added if token["id"] <= n_ranks]
        contents["post_processor"] = None  # it acts on what surrounds a text
        with TemporaryDirectory() as temporary:
            path = Path(temporary) / "tokenizer.json"
            path.write_text(json.dumps(contents), encoding="utf-8")
            found = load_tokenizer(str(path))
    except (InputError, AttributeError):  # AttributeError: a vocabulary of another kind, which is a list
        digest, vocab_size = hashlib.sha256(text.encode()).hexdigest(), len(tokenizer)
    else:
        digest, vocab_size = found.sha256, found.eos_id + 1
    name = "gpt2" if digest == GPT2_SHA256 else f"tokenizer.json sha256:{digest[:16]}"
    return {"name": name, "vocab_size": vocab_size, "sha256": digest}


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


def model_card(exported, contents: dict, path: Path, name: str | None, tokenizer) -> ModelCard:
    """The README.md of the folder: what is known of the model, and what is not. name: of the tokenizer."""
    # The architecture, out of the model itself.
    c = exported.config
    row = VARIANTS[c.variant]
    title = row["paper"] + (f"-{c.n_kv_groups}" if row["paper"].endswith("GQA") else "")
    heads = f"{c.n_head} heads of width {c.n_embd // c.n_head}, {c.n_kv_groups} KV heads"
    shape = f"{c.n_layer} layers, width {c.n_embd:,}, {heads}, feed-forward {c.n_inner:,}"
    cached = "K alone" if row["cached"] == ["k"] else "K and V"
    bytes_a_token, qkv_bytes = cache_bytes(c.variant, c)

    # The run, out of the checkpoint and what stands beside it. The licence is not known of weights that began
    # elsewhere: of a checkpoint of the release, one fine-tuned elsewhere, one begun from other weights.
    train_config = dict(contents.get("train_config") or {})
    evaluation = evaluation_of(path, contents.get("step"))
    trained_here = "variant" in contents and bool(train_config) and not contents.get("init_from")
    licence = "MIT, as the code that trained it; the data have terms of their own"
    rows = {
        "variant": f"{title} (`{c.variant}`): {row['name']}",
        "parameters": f"{exported.num_parameters():,}",
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
    about = {"license": "mit" if trained_here else "unknown"}
    about |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    return ModelCard.from_template(
        ModelCardData(**about),
        template_path=ROOT / "configs/model_card.md",
        title=title,
        rows=rows,
        positions=f"{c.n_positions:,}",
        tokenizer=tokenizer,
        own_names=tokenizer and tokenizer.eos_token == END_OF_TEXT,
        settings=settings_of(train_config),
    )


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
    if origin := contents.get("converted_from"):
        source = f"{Path(origin['source']).name}, {origin['variant']}"
        known.append(f"converted by {origin['method']} from {source}")
        if origin.get("trained_for_tokens"):
            known.append(f"which had been trained on {origin['trained_for_tokens']:,} tokens")
    return "; ".join(known) or UNKNOWN


def settings_of(train_config: dict) -> str:
    """The settings of the run as YAML, but for where its data stood."""
    places = ("_data", "_path", "_dir")
    settings = {key: value for key, value in train_config.items() if not key.endswith(places)}
    return yaml.safe_dump(settings, sort_keys=False) if settings else ""


# -----------------------------------------------------------------------------
# Checkpoint -> folder


def export(alias: str, path: Path, output_dir: Path, tokenizer_argument: str | None) -> None:
    """Write the folder, and say what is in it and how to load it. ValueError where something does not fit."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f"--output_dir {output_dir}: exists already; remove it or choose another name")
    contents, model = open_checkpoint(alias, path)
    files = {name: text for name, text in contents.get("folder_files", {}).items() if KEPT.fullmatch(name)}
    tokenizer = None
    if tokenizer_argument == "none":
        files = {name: text for name, text in files.items() if name == "generation_config.json"}
    elif tokenizer_argument or "tokenizer.json" not in files:
        tokenizer = tokenizer_of(contents, path, tokenizer_argument)

    # All files go into a folder of another name. It is renamed when they are there and load again.
    final = output_dir.resolve()
    partial = final.with_name(f"{final.name}.tmp{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        name, shipped = write_folder(partial, contents, model, path, tokenizer, files)
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
    lines = [f"{output_dir}: {alias}, {exported.num_parameters():,} parameters, {size:,.1f} MB"]
    lines.append(f"KV cache: {bytes_a_token:,} bytes a token in bf16; QKV of this shape takes {qkv_bytes:,}")
    lines.append(f"tokenizer: {name or 'none'}; model card: {output_dir / 'README.md'}")
    if shipped and shipped.pad_token_id in (None, shipped.eos_token_id):
        lines.append("no token id is left for padding; the model card says what that means for fine-tuning")
    lines.append(f'load it: AutoModelForCausalLM.from_pretrained("{output_dir}", trust_remote_code=True)')
    report(*lines)


def write_folder(folder: Path, contents: dict, model, path: Path, tokenizer, files: dict) -> tuple:
    """All files of an export; returns the name of its tokenizer, and the tokenizer as transformers has it."""
    # A checkpoint that came out of such a folder brought its files along. Else the tokenizer is made here.
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    shipped = name = identity = None
    if "tokenizer.json" in files:
        shipped, identity = PreTrainedTokenizerFast.from_pretrained(folder), contents["tokenizer"]
        name = f"{identity['name']}, as it came with the weights"
    elif tokenizer:
        name = tokenizer.name
        shipped = fast_tokenizer(tokenizer, model.config.vocab_size, model.config.n_positions)
        shipped.save_pretrained(folder)
        identity = {"name": name, "vocab_size": tokenizer.eos_id + 1, "sha256": tokenizer.sha256}

    ids = {key: getattr(shipped, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    exported = in_transformers(model, **ids)
    exported.config.auto_map = AUTO_MAP
    if identity:  # --to_checkpoint writes it back, for the tools that ask which tokenizer it was
        exported.config.training_tokenizer = identity
    exported.generation_config = GenerationConfig(**ids)
    if "generation_config.json" in files:
        exported.generation_config = GenerationConfig.from_pretrained(folder)
    exported.save_pretrained(folder)
    # safetensors makes its file readable by the owner alone
    shutil.copymode(folder / "config.json", folder / "model.safetensors")

    shutil.copyfile(ROOT / "modeling_qkv.py", folder / "modeling_qkv.py")
    card = model_card(exported, contents, path, name, shipped)
    (folder / "README.md").write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return name, shipped


# -----------------------------------------------------------------------------
# Folder -> checkpoint


def to_checkpoint(folder: Path, output_dir: Path, alias: str | None) -> None:
    """Write the model of a folder as final_model.pt, with its variant, model_config and tokenizer."""
    output = output_dir / "final_model.pt"
    if output.exists():
        raise InputError(f"{output}: exists already; remove it or choose another --output_dir")
    exported = read_folder(folder, QKVForCausalLM)
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
    lines = [f"{output}: {config.variant}, {exported.num_parameters():,} parameters"]
    if "tokenizer" in contents:
        lines.append(f"tokenizer: {contents['tokenizer']['name']}")
    report(*lines, f"score it: python run_eval.py --model {config.variant} --checkpoint {output}")


def read_folder(folder: Path, model_class: type):
    """The model_class that save_pretrained wrote, in fp32 and eval mode.

    InputError where the folder holds something else: another model, a part of one, an adapter.
    """
    if (folder / "adapter_config.json").is_file():
        raise InputError(f"{folder}: holds an adapter; save the model after merge_and_unload()")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type, expected = settings["model_type"], model_class.config_class.model_type
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}: not a folder of transformers: {error}") from error
    if model_type != expected:
        raise InputError(f"{folder}: model_type is {model_type}, expected {expected}")
    if not settings.get("tie_word_embeddings", True):
        raise InputError(f"{folder}: untied embeddings; in the training scripts, output and input share one")
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, loaded = model_class.from_pretrained(folder, **options)
    except Exception as error:  # a damaged file can fail in any way
        raise InputError(f"{folder}: not a whole model: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in loaded[problem])
        names = [name for name in names if not name.endswith(".attn.masked_bias")]  # a constant of old GPT-2s
        if names:
            problem = f"{problem.replace('_', ' ')}: {', '.join(names[:3])}"
            raise InputError(f"{folder}: weights and config.json do not fit, {problem}")
    refuse_what_is_not_finite(model, folder)
    return model


# -----------------------------------------------------------------------------
# Command line


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", metavar="ALIAS", help=", ".join(VARIANTS))
    add("--checkpoint", type=Path, metavar="PATH", help="of a training script, of the release, or converted")
    add("--output_dir", type=Path, metavar="DIR", help="the folder to write (with --to_checkpoint: FOLDER)")
    add("--tokenizer", help="gpt2, bytes, the PATH of one, or none (default: the one beside the run's data)")
    add("--to_checkpoint", type=Path, metavar="FOLDER", help="the way back: FOLDER -> DIR/final_model.pt")
    options = parser.parse_args(arguments)
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
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
