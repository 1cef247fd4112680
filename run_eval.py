"""Downstream scores of checkpoints, through lm-evaluation-harness: the paper's five tasks or any other.

    python run_eval.py --model kv --checkpoint outputs_1.2B_qkv_k_equals_v/checkpoint_step_8000.pt
    torchrun --nproc_per_node=8 run_eval.py --model kqv kv --checkpoint a.pt b.pt --output_path scores.json
    python run_eval.py --model kv --checkpoint outputs_demo/final_model.pt --val_data demo_data/validation
    python run_eval.py --model kv --checkpoint a.pt --tasks my_hellaswag 'my_arc*' --include_path my_tasks

The harness builds the few-shot prompts, asks its own HFLM for log-probabilities and generations, and computes
the metrics with their standard errors. This file hands it any checkpoint that the training scripts can load,
as the model of transformers that export_hf.py writes.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import re
import sys
import tempfile
import warnings
from collections import deque
from dataclasses import asdict
from datetime import timedelta
from fnmatch import filter as matching
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

import datasets
import torch
import torch.distributed as dist
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import handle_non_serializable, sanitize_model_name
from tabulate import tabulate
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from common import (  # isort: skip
    ROOT, SIZES, VARIANTS, InputError, Parser, Tokenizer, read_checkpoint, script_of,
    show_what_the_terminal_can, stored_tokenizer, tokenizer_of, write_text,
)  # fmt: skip
from export_hf import fast_tokenizer, in_transformers

RANK = int(os.environ.get("RANK", 0))
# without RANK, a WORLD_SIZE is left over from another job
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

FIVE = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")  # the paper's tasks
CHANCE = dict(zip((*FIVE, "mean"), (25.0, 25.0, 25.0, 50.0, 50.0, 35.0), strict=True))  # per cent, guessed
# The paper's mean over the five at 1.2B, 5-shot. It gives none for MQA.
PUBLISHED = {alias: row["published"].get("downstream", {}).get("1.2B") for alias, row in VARIANTS.items()}
SHARES = re.compile(r"acc|acc_(norm|bytes|all|mutual_info)|exact_match|em|f1")  # printed in per cent
PERPLEXITY = "perplexity"  # a task of ours, besides the harness's
BATCH = 8  # --batch_size auto on a CPU, and for --val_data
NO_BAR = RANK != 0 or not sys.stderr.isatty()


# -----------------------------------------------------------------------------
# The language model that the harness asks


class CheckpointLM(HFLM):
    """The harness's own adapter over a model of the training scripts.

    With several processes each rank builds all the prompts and answers a share of them. The harness's own
    way, a share of the documents for every rank, draws other few-shot examples for every world size.
    """

    def __init__(self, model, tokenizer: Tokenizer, batch_size: int | str = BATCH, max_length=None):
        """batch_size: requests in a pass; auto: what fits on a GPU, 8 on a CPU. max_length: of rows."""
        ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_id)
        exported, c = in_transformers(model, **ids, use_cache=False), model.config
        self._starts = deque()
        super().__init__(
            exported,
            backend="causal",
            tokenizer=fast_tokenizer(tokenizer, c.vocab_size, c.n_positions),
            batch_size=BATCH if batch_size == "auto" and exported.device.type == "cpu" else batch_size,
            max_length=max_length or c.n_positions,
            softmax_dtype="float32",
            logits_cache=False,  # with it, 0.4.13 misplaces a continuation that two splits of a text share
        )

    def tok_batch_encode(self, strings, *args, **kwargs):
        """(ids, attention mask) of prompts; an empty one becomes the end-of-text token."""
        texts = [text or self.tokenizer.eos_token for text in strings]
        return super().tok_batch_encode(texts, *args, **kwargs)

    def _model_call(self, inps, attn_mask=None, labels=None):
        """Logits [B, T, vocab_size], without positions before the first continuation of the batch.

        HFLM counts from the end. On a CPU this is most of the time of short requests, see results/evaluation.
        """
        first = min((self._starts.popleft() for _ in inps), default=0) if self._starts else 0
        with torch.no_grad():
            return self.model(inps, logits_to_keep=inps.shape[1] - first).logits

    def loglikelihood(self, requests, disable_tqdm=False):
        return share_out(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return share_out(super().loglikelihood_rolling, requests)

    def generate_until(self, requests, disable_tqdm=False):
        return share_out(super().generate_until, requests)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        """(log-probability in nats, whether greedy decoding produces it) of each request's continuation.

        A request is (its texts or None, context tokens, continuation tokens). A context that is too long
        loses its beginning; a continuation that does not fit is an InputError.
        """
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise InputError(f"a continuation of {longest} tokens is longer than a row, {self.max_length}")
        cut = sum(len(context + continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            what = f"{cut:,} of {len(requests):,} requests are longer than {self.max_length:,} tokens"
            tqdm.write(f"{what}; the beginning of their context is cut off", file=sys.stderr)

        # Blanks at the end of a context belong to the continuation. HFLM fails where nothing else is in the
        # context, and where the last token of the context reaches over all of the continuation.
        asked = [(texts, c or [self.prefix_token_id], wanted) for texts, c, wanted in requests if wanted]
        if self.batch_size != "auto":  # where continuations begin, in the order of HFLM's batches
            ordered = sorted(asked, key=lambda asked: (-len(asked[1] + asked[2]), asked[1] + asked[2]))
            self._starts.extend(min(len(c + w) - 1, self.max_length) - len(w) for _, c, w in ordered)
        quiet = NO_BAR or override_bs is not None  # a bar for each batch of windows
        given = iter(super()._loglikelihood_tokens(asked, quiet, override_bs))
        answers = [next(given) if wanted else (0.0, True) for *_, wanted in requests]
        if not all(math.isfinite(value) for value, _ in answers):
            raise InputError("its log-probabilities are not finite: it has diverged, or is damaged")
        return answers


# -----------------------------------------------------------------------------
# Processes


def gather(value):
    """What each rank passed, in the order of ranks; every rank has to call it."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value)
    return values


def together(work):
    """work(), where it passes on every rank; else the first rank's error as an InputError on all."""
    result = error = None
    try:
        result = work()
    except (ValueError, AssertionError, OSError) as caught:  # of the harness and the scripts too
        error = one_line(caught)
    errors = [error for error in gather(error) if error]
    if errors:
        raise InputError(errors[0])
    return result


def share_out(answer, requests):
    """The answers to requests that all ranks have, of which each answers a share."""
    share = requests[RANK::WORLD_SIZE]
    answers = [None] * len(requests)
    for rank, part in enumerate(gather(together(lambda: answer(share, NO_BAR) if share else []))):
        answers[rank::WORLD_SIZE] = part
    return answers


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


# -----------------------------------------------------------------------------
# Checks before the work


def open_checkpoint(alias, path, options):
    """(what is known of a checkpoint, its Tokenizer); a ValueError where the arguments do not go together."""
    if (Path(path) / "config.json").is_file():
        how = f"python export_hf.py --to_checkpoint {path} --output_dir DIR makes a checkpoint of it"
        raise InputError(f"--checkpoint {path}: an exported folder, which lm_eval --model hf scores; {how}")
    contents, script, val_data = read_checkpoint(alias, path), script_of(alias), options.val_data
    with warnings.catch_warnings(action="ignore"):  # the meta device tries everything but copying the numbers
        shape = asdict(script.load_model(path, device="meta").config)  # with its defaults
    if val_data:
        script.get_dataloader(val_data, 1, shape["n_positions"])

    config = dict(contents.get("train_config") or {})
    contents |= {"model_config": shape}
    tokenizer = tokenizer_of(contents, path, options.tokenizer, config.get("train_data"), val_data)
    stored = stored_tokenizer(val_data)
    if stored and stored.sha256 != tokenizer.sha256:
        other = f"{stored.name} is not the tokenizer of {path}, {tokenizer.name}"
        raise InputError(f"--val_data {val_data}: {other}")

    # Positions that training did not reach are not used. Released checkpoints do not say how far it went.
    n_positions = shape["n_positions"]
    known = {"alias": alias, "path": path} | {name: contents.get(name) for name in ("step", "tokens_seen")}
    known |= {"size": size_of(shape), "positions": min(n_positions, config.get("seq_length") or n_positions)}
    with open(path, "rb") as file:
        known["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return known | {"tokenizer": tokenizer.name, "model_config": shape, "train_config": config}, tokenizer


def size_of(shape):
    """300M or 1.2B; None for a model of another shape."""
    paths = {size: ROOT / f"configs/model_config_{size}.yaml" for size in SIZES}
    published = {size: yaml.safe_load(path.read_text(encoding="utf-8")) for size, path in paths.items()}
    names = ("n_layer", "n_embd", "n_head")
    return next((size for size in SIZES if all(shape[name] == published[size][name] for name in names)), None)


def open_tasks(patterns, include_path, num_fewshot):
    """(names, a TaskManager that knows them), once the data are there and a prompt of each task was built."""
    names, manager = find_tasks(patterns, include_path)
    for name in names:
        try:
            for task in manager.load([name])["tasks"].values():
                _, document = next(task.doc_iterator(limit=1))
                # a task's own 0 goes before --num_fewshot
                task.fewshot_context(document, 0 if task.config.num_fewshot == 0 else num_fewshot)
        except Exception as error:  # a task file can hold anything, code included
            raise InputError(f"--tasks {name}, {num_fewshot}-shot: {in_its_own_words(error)}") from error
    return names, manager


def find_tasks(patterns, include_path):
    """(names, a TaskManager that knows them). A pattern with wildcards means tasks, or else groups."""
    if include_path and not Path(include_path).is_dir():
        raise InputError(f"--include_path {include_path}: no such folder")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if set(patterns) <= set(manager.task_index) - set(manager.all_groups):
        return patterns, manager  # the harness's own tasks, 14,000 files, take seconds to read

    # The harness passes over a file that it cannot read, and would take its own task of that name.
    for file in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # of the syntax, an include, the encoding
            raise InputError(f"--include_path: {file} cannot be read: {one_line(error)}") from error

    manager = TaskManager(include_path=include_path)
    names = []
    for pattern in patterns:  # of a name that nothing has, load() says so
        names += matching(manager.all_subtasks, pattern) or manager.match_tasks([pattern]) or [pattern]
    return list(dict.fromkeys(names)), manager


def in_its_own_words(error):
    """What a library says that failed to get the data, and the cause below it, with the path concerned."""
    links = [error]
    while links[-1].__cause__:
        links.append(links[-1].__cause__)
    ends = [f"{type(link).__name__}: {one_line(link)}" for link in (error, links[-1])]
    said = " from ".join(dict.fromkeys(ends))
    if any(isinstance(link, ConnectionError) for link in links):
        return f"{said}; to run on local files, see Downstream tasks in docs/operations.md"
    if isinstance(links[-1], OSError) and not links[-1].filename:  # as of a full disk
        return f"{said}; data sets are kept in {datasets.config.HF_DATASETS_CACHE}, which HF_HOME moves"
    return said


def prepare(options):
    """([(what is known of a checkpoint, its Tokenizer)], TaskManager or None), once all is checked."""
    options.device = find_device(options.device)
    if options.dtype == "auto":
        fits = options.device.type == "cuda" and torch.cuda.is_bf16_supported()
        options.dtype = "bfloat16" if fits else "float32"
    limit, size, output = options.limit, options.batch_size, options.output_path
    if limit is not None and not limit > 0:
        raise InputError(f"--limit {limit:g}: expected a number of documents, or a share below 1")
    if size != "auto" and not (size.isdecimal() and int(size)):
        raise InputError(f"--batch_size {size}: expected auto or a whole number above 0")
    options.batch_size = size if size == "auto" else int(size)
    if options.log_samples and not output:
        raise InputError("--log_samples: needs --output_path FILE, beside which it writes")
    if output:
        tempfile.TemporaryFile(dir=output.parent).close()  # fails now, and not after hours of work
        if output.is_dir():
            raise InputError(f"--output_path {output}: is a folder, expected a file")

    # Tasks are separated by blanks or, as in the harness's own command, by commas.
    tasks = options.tasks or ([PERPLEXITY] if options.val_data else FIVE)
    tasks = list(dict.fromkeys(",".join(tasks).replace(",", " ").split()))
    if PERPLEXITY in tasks and not options.val_data:
        raise InputError(f"--tasks {PERPLEXITY}: needs --val_data DIR, files of dataset_download.py")
    options.tasks = [name for name in tasks if name != PERPLEXITY]

    aliases = options.model * (len(options.checkpoint) if len(options.model) == 1 else 1)
    if len(aliases) != len(options.checkpoint):
        raise InputError("--model: expected one for all checkpoints, or one for each")
    checkpoints = [open_checkpoint(*pair, options) for pair in zip(aliases, options.checkpoint, strict=True)]
    manager = None
    if options.tasks:
        options.tasks, manager = open_tasks(options.tasks, options.include_path, options.num_fewshot)
    return checkpoints, manager


def find_device(name):
    """The torch.device of this process; InputError where it has none of that name."""
    try:
        device = torch.device(name.replace("auto", "cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None:
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {one_line(error)}") from error
    return device


# -----------------------------------------------------------------------------
# Evaluation


def evaluate_checkpoint(known, tokenizer, options, manager):
    """All figures of a checkpoint, as a dict for JSON; the harness's results are on rank 0 alone."""
    script = script_of(known["alias"])
    model = script.load_model(known["path"], options.device).to(getattr(torch, options.dtype))
    record = known | {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if options.tasks:
        lm = CheckpointLM(model, tokenizer, options.batch_size, known["positions"])
        settings = {name: getattr(options, name) for name in ("tasks", "num_fewshot", "limit", "log_samples")}
        with contextlib.redirect_stdout(sys.stderr):  # where it tells what batch size it has found
            record["harness"] = simple_evaluate(lm, task_manager=manager, **settings)

    batch_size = BATCH if options.batch_size == "auto" else options.batch_size
    for protocol in ("padded", "packed") if options.val_data else ():
        loader = script.get_dataloader(options.val_data, batch_size, known["positions"], protocol)
        result = script.evaluate(model, loader)
        if not math.isfinite(result["loss"]):
            raise InputError(f"its loss on {options.val_data} is not finite: it has diverged, or is damaged")
        record.setdefault(PERPLEXITY, {})[protocol] = result
    return record


# -----------------------------------------------------------------------------
# The table and the report


def figures(record):
    """{(task, metric): (value, standard error or None)} of a checkpoint; shares in per cent."""
    found = {}
    results = record["harness"]["results"] if "harness" in record else {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            scale = 100 if SHARES.fullmatch(metric) else 1
            stderr = metrics.get(f"{metric}_stderr,{filtered}")
            known = isinstance(stderr, float) and math.isfinite(stderr)  # not with a single document
            title = metric if filtered == "none" else f"{metric}, {filtered}"
            found[task, title] = scale * value, scale * stderr if known else None

    # The paper's mean over the five is of acc. WinoGrande has no acc_norm: its acc stands in.
    if all((task, "acc") in found for task in FIVE):
        for metric in ("acc", "acc_norm"):
            parts = [found.get((task, metric), found[task, "acc"]) for task in FIVE]
            values, stderrs = zip(*parts, strict=True)
            stderr = None if None in stderrs else math.hypot(*stderrs) / len(FIVE)
            found["mean", metric] = fmean(values), stderr
        # Not of another number of KV heads. A model of another shape is compared with that of 300M.
        groups = VARIANTS[record["alias"]]["groups"]
        same = not groups or record["model_config"]["n_kv_groups"] == groups[record["size"] or "300M"]
        found["mean, published at 1.2B", "5-shot"] = PUBLISHED[record["alias"]] if same else None, None

    for protocol, result in record.get(PERPLEXITY, {}).items():
        if protocol == "padded":
            found[PERPLEXITY, "padded, over all positions"] = result["perplexity"], None
        found[PERPLEXITY, f"{protocol}, over text only"] = result["text_perplexity"], None
        found[PERPLEXITY, f"{protocol}, bits per byte"] = result["bits_per_byte"], None
    return found


def table(records):
    """Lines of text for {label: record}: a row for each figure and a column for each checkpoint."""
    columns = [figures(record) for record in records.values()]
    rows = []
    for task, metric in columns[0]:
        chance = f"{CHANCE[task]:.1f}" if task in CHANCE and metric in ("acc", "acc_norm") else ""
        rows.append([task, metric, chance, *(cell(*column[task, metric]) for column in columns)])
    headers = ["task", "metric", "chance", *records]
    lines = tabulate(rows, headers, tablefmt="plain", disable_numparse=True).splitlines()
    metrics = dict.fromkeys(metric.partition(",")[0] for _, metric in columns[0])
    shares = [metric for metric in metrics if SHARES.fullmatch(metric)]
    return lines + (["", f"in per cent: {', '.join(shares)}; ±: one standard error"] if shares else [])


def cell(value, stderr):
    if value is None:
        return "not given"
    return f"{value:.2f}" if stderr is None else f"{value:.2f} ± {stderr:.2f}"


def report(records, options):
    """Write the harness's scores, with what it takes to get them again, and print the table."""
    packages = ("torch", "lm_eval", "datasets", "transformers", "tiktoken")
    versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
    settings = vars(options) | {"processes": WORLD_SIZE}
    harness = {label: record.get("harness", {}) for label, record in records.items()}
    samples = {label: results.pop("samples", None) or {} for label, results in harness.items()}
    encode = partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
    try:
        if path := options.output_path:
            text = encode({"versions": versions, "settings": settings, "checkpoints": records})
            # The standard error of a single document is NaN, which is no JSON.
            write_text(path, encode(json.loads(text, parse_constant=lambda constant: None), indent=2) + "\n")
        for label, tasks in samples.items():
            for task, documents in tasks.items():
                beside = path.with_suffix(f".{sanitize_model_name(label)}.{task}.jsonl")
                write_text(beside, "".join(f"{encode(document)}\n" for document in documents))
    finally:  # a full disk must not cost the scores, nor a closed pipe the report
        print(*table(records), sep="\n", flush=True)


# -----------------------------------------------------------------------------
# Command line


def parse(arguments):
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="ALIAS", help=f"{', '.join(VARIANTS)}; for all or each")
    add("--checkpoint", nargs="+", required=True, metavar="PATH", help="ours or released; several: one table")
    tasks = f"those of `lm_eval ls tasks` or {PERPLEXITY} (default: the paper's; with --val_data, that alone)"
    add("--tasks", nargs="+", metavar="TASK", help=tasks)
    add("--num_fewshot", type=int, default=5, help="solved examples before each question (default: 5)")
    add("--batch_size", default="auto", help="requests in a forward pass, or auto (default)")
    add("--limit", type=float, help=f"the first N documents of a task but {PERPLEXITY}, or a share below 1")
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto (default)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs")
    add("--tokenizer", help="gpt2, bytes or PATH.tiktoken (default: that of the training data, or else gpt2)")
    add("--include_path", metavar="DIR", help="a folder of task files, which go before the harness's own")
    add("--val_data", metavar="DIR", help=f"files of dataset_download.py: {PERPLEXITY} in both protocols")
    add("--output_path", type=Path, metavar="FILE", help="write everything as JSON")
    add("--log_samples", action="store_true", help="write each document's prompt and answers beside it too")
    return parser.parse_args(arguments)


def run(options):
    """Evaluate every checkpoint, write the report and print the table."""
    checkpoints, manager = together(lambda: prepare(options))
    records = {}
    try:
        for known, tokenizer in checkpoints:
            label = f"{known['alias']} {known['size'] or ''}".strip() + f", step {known['step']}"
            if label in records:
                label += f", {known['path']}"
            try:
                records[label] = evaluate_checkpoint(known, tokenizer, options, manager)
            except ValueError as error:
                raise InputError(f"{known['path']}: {one_line(error)}") from error
    finally:  # a checkpoint that fails must not cost the scores of those before it
        if RANK == 0 and records:
            report(records, options)


def main(arguments=None):
    options = parse(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each setting that is not its own
    transformers_logging.set_verbosity_error()
    show_what_the_terminal_can()
    if WORLD_SIZE > 1 and not dist.is_initialized():
        # gloo is enough for scores. No rank waits in vain: the launcher ends them all when one has ended.
        dist.init_process_group("gloo", timeout=timedelta(weeks=1))

    try:
        run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        if RANK == 0 or not isinstance(error, InputError):  # which is the same on every rank
            print(f"run_eval.py: error: {one_line(error)}", file=sys.stderr, flush=True)
        if isinstance(error, InputError):
            gather(None)  # the launcher ends the others when one has ended, and rank 0 has to print first
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
