"""Checkpoints -> downstream scores, through EleutherAI's lm-evaluation-harness: the paper's five tasks or any other.

    python run_eval.py --model kv --checkpoint outputs_1.2B_qkv_k_equals_v/checkpoint_step_8000.pt
    torchrun --nproc_per_node=8 run_eval.py --model kqv kv --checkpoint a.pt b.pt --output_path scores.json
    python run_eval.py --model kv --checkpoint outputs_demo/final_model.pt --val_data demo_data/validation
    python run_eval.py --model kv --checkpoint a.pt --tasks my_hellaswag my_piqa --include_path my_tasks

Few-shot prompts, requests, metrics and their standard errors are the harness's. This file hands it the log-probability
of a continuation and the greedy continuation of a prompt, out of any checkpoint that the training scripts can read.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import sys
import warnings
from dataclasses import dataclass
from datetime import timedelta
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from accelerate.utils import find_executable_batch_size
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dataset_download import InputError, Tokenizer, load_tokenizer, network_errors, write_atomically

FIVE = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")  # the paper's tasks
# The accuracy of guessing, in per cent: among four answers or endings, or two solutions or names.
CHANCE = {"arc_challenge": 25.0, "arc_easy": 25.0, "hellaswag": 25.0, "piqa": 50.0, "winogrande": 50.0, "mean": 35.0}
# The paper's mean over the five at 1.2B, 5-shot. It gives none for MQA.
PUBLISHED = {"kqv": 36.40, "kv": 35.99, "gqa": 35.86, "qgqa": 36.72, "qmqa": 34.38}
PER_CENT = ("acc", "acc_norm", "exact_match")
PERPLEXITY = "perplexity"  # a task of ours, beside the harness's
END_OF_TEXT = "<|endoftext|>"
NEW_TOKENS = 256  # for a task to generate that does not say how many; as in the harness's HFLM
CPU_BATCH, LARGEST_BATCH = 8, 64  # --batch_size auto on a CPU, and where it starts on a GPU
HEAD_ROWS = 2048  # positions whose logits exist at the same time
ROOT = Path(__file__).resolve().parent
VARIANTS = yaml.safe_load((ROOT / "configs/variants.yaml").read_text(encoding="utf-8"))


class CheckpointLM(TemplateLM):
    """A model of the training scripts, as the harness's language model.

    TemplateLM splits texts into context and continuation; here begins what is done with their tokens. Batches are
    filled up on the right: in a causal model with learned positions, that leaves every real token as it is.
    """

    def __init__(self, model, tokenizer: Tokenizer, batch_size: int | str = CPU_BATCH):
        """batch_size: requests in a forward pass; auto: on a GPU what fits, found by trying, on a CPU 8."""
        super().__init__()
        self.model, self._device, self.batch_size = model.eval(), model.wte.weight.device, batch_size
        self._encode, self._eot = tokenizer.encode, tokenizer.eos_id
        self._bytes = {rank: piece for piece, rank in tokenizer.ranks.items()} | {self._eot: END_OF_TEXT.encode()}
        if batch_size == "auto":
            self.batch_size = self._largest_batch() if self._device.type == "cuda" else CPU_BATCH

    @property
    def eot_token_id(self):
        return self._eot

    @property
    def max_length(self):
        return self.model.config.n_positions

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Token ids, as in the training data: without special tokens, and none is read out of the text."""
        return self._encode([string])[0].tolist()

    def tok_decode(self, tokens):
        """The text of token ids; those that fill the vocabulary up to 50,304 have none."""
        return b"".join(self._bytes.get(token, b"") for token in tokens).decode("utf-8", errors="replace")

    def loglikelihood(self, requests, disable_tqdm=False):
        return super().loglikelihood(requests, disable_tqdm or quiet())

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-probabilities in nats of whole texts, cut into windows that score each token once."""
        windows = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        scores = iter(self._loglikelihood_tokens([window for each in windows for window in each]))
        totals = [sum(next(scores)[0] for _ in each) for each in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, **kwargs):
        """(log-probability in nats, whether greedy decoding would say it) of each request's continuation.

        A request is (its texts or None, context tokens, continuation tokens). A context that is too long loses its
        beginning; a continuation that does not fit is an InputError.
        """
        cut = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            raise InputError(f"a continuation of {longest} tokens does not fit n_positions, {self.max_length}")
        if cut:
            said = f"{cut:,} of {len(requests):,} requests are longer than {self.max_length:,} tokens"
            tqdm.write(f"{said}; the beginning of their context is cut off", file=sys.stderr)
        return self._share_out("_score", requests)

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy continuations, each up to its first stop string. InputError where a task asks for something else."""
        return self._share_out("_generate", [request.args for request in requests])

    def _share_out(self, method, requests):
        """The answers of a method below, in the order of the requests, of which every rank takes its share."""
        count, answers = ranks()[1], [None] * len(requests)
        shares = [(method, requests[rank::count]) for rank in range(count)]
        for rank, share in enumerate(everyone(self._answer(handed_out(shares)))):
            answers[rank::count] = share
        return answers

    def _answer(self, share):
        method, requests = share
        return getattr(self, method)(requests)

    def serve(self):
        """On the other ranks: answer the shares that rank 0 hands out, until it hands out None."""
        while share := handed_out():
            everyone(self._answer(share))

    def _score(self, requests):
        """As _loglikelihood_tokens. The longest go first: batches are of a length, memory runs out at once or never."""
        by_length = Collator(requests, sort_fn=lambda request: -len(request[1] + request[2]))
        answers = []
        with tqdm(total=len(requests), desc="scoring", unit="request", disable=quiet()) as bar:
            for batch in by_length.get_batched(n=self.batch_size):
                for (texts, *_), answer in zip(batch, self._score_batch(batch), strict=True):
                    answers.append(answer)
                    if texts is not None:  # else a window, whose request caches the sum
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(batch))
        return by_length.get_original(answers)

    @torch.inference_mode()
    def _score_batch(self, batch):
        """As _score, in one forward pass. Only what predicts a continuation goes through the output embedding."""
        lengths = [len(continuation) for *_, continuation in batch]
        rows = [((context or [self._eot]) + continuation)[-self.max_length - 1 :] for _, context, continuation in batch]
        inputs = pad_sequence([torch.tensor(row[:-1]) for row in rows], batch_first=True).to(self._device)
        hidden = self.model.hidden_states(inputs)  # [B, T, d]
        ends = [len(row) - 1 for row in rows]
        hidden = torch.cat([h[end - n : end] for h, end, n in zip(hidden, ends, lengths, strict=True)])
        targets = torch.tensor([token for *_, continuation in batch for token in continuation], device=self._device)
        log_p, greedy = [], []
        for some, wanted in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
            logits = F.linear(some, self.model.wte.weight).float()
            log_p.append(-F.cross_entropy(logits, wanted, reduction="none"))
            greedy.append(logits.argmax(dim=-1) == wanted)
        parts = zip(torch.cat(log_p).cpu().split(lengths), torch.cat(greedy).cpu().split(lengths), strict=True)
        return [(float(values.sum()), bool(same.all())) for values, same in parts]

    def _generate(self, requests):
        """The text that continues each (prompt, settings of its task)."""
        by_length = Collator(
            requests,
            sort_fn=lambda request: -len(self.tok_encode(request[0])),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        texts = []
        with tqdm(total=len(requests), desc="generating", unit="request", disable=quiet()) as bar:
            for batch in by_length.get_batched(n=self.batch_size):
                stops, new = greedy_settings(batch[0][1], self.max_length)
                prompts = [self.tok_encode(context)[new - self.max_length :] or [self._eot] for context, _ in batch]
                for request, text in zip(batch, self._continue(prompts, stops, new), strict=True):
                    texts.append(text)
                    self.cache_hook.add_partial("generate_until", request, text)
                bar.update(len(batch))
        return by_length.get_original(texts)

    @torch.inference_mode()
    def _continue(self, prompts, stops, new):
        """Greedy continuations of token lists by at most `new` tokens, each cut before its first stop string.

        Positions are learned, so every row starts at position 0, and beyond the shortest prompt the batch goes on one
        token at a time: a row reads the next token of its prompt while there is one, and then writes the likeliest.
        """
        lengths, texts = [len(prompt) for prompt in prompts], [None] * len(prompts)
        tokens = F.pad(pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True), (0, new))
        tokens = tokens.to(self._device)
        cache = self.model.make_cache(*tokens.shape)
        for end in range(min(lengths), tokens.shape[1]):
            hidden = self.model.hidden_states(tokens[:, cache.length : end], cache)
            likeliest = F.linear(hidden[:, -1], self.model.wte.weight).argmax(dim=-1).tolist()
            for i, token in enumerate(likeliest):
                written = end + 1 - lengths[i]
                if written > 0 and texts[i] is None:
                    tokens[i, end] = token
                    text = self.tok_decode(tokens[i, lengths[i] : end + 1].tolist())
                    if written == new or any(stop in text for stop in stops):
                        texts[i] = postprocess_generated_text(text, stops, None)
            if None not in texts:
                break
        return texts

    def _largest_batch(self):
        """The most rows of max_length tokens that can be scored at once without running out of memory."""
        longest = None, [self._eot], [self._eot] * self.max_length

        @find_executable_batch_size(starting_batch_size=LARGEST_BATCH)
        def attempt(batch_size):
            self._score_batch([longest] * batch_size)
            return batch_size

        return attempt()


def greedy_settings(settings, n_positions):
    """The stop strings and the most new tokens of a task to generate; InputError where it cannot be run like that."""
    settings = normalize_gen_kwargs(settings, NEW_TOKENS)
    new = settings["max_gen_toks"]
    if settings.get("do_sample") or settings.get("num_beams", 1) > 1:
        raise InputError(f"run_eval.py decodes greedily, the task asks for {json.dumps(settings)}")
    if new >= n_positions:
        raise InputError(f"{new} new tokens leave no room for a prompt in the model's n_positions, {n_positions}")
    return handle_stop_sequences(settings["until"], eos=END_OF_TEXT), new


def ranks():
    """The rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def everyone(value):
    """What each rank passed, in their order; every rank has to call it."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def handed_out(shares=None):
    """This rank's item of a list that rank 0 passes; every rank has to call it."""
    if not dist.is_initialized():
        return shares[0]
    share = [None]
    dist.scatter_object_list(share, shares, src=0)
    return share[0]


def together(check):
    """check(), once it has passed on every rank; else all end, and the first error is printed once."""
    result, error = None, None
    try:
        result = check()
    except (InputError, OSError) as caught:
        error = one_line(caught)
    if errors := [error for error in everyone(error) if error]:
        if ranks()[0] == 0:
            print(f"run_eval.py: error: {errors[0]}", file=sys.stderr, flush=True)
        everyone(None)  # torchrun ends the others when one has ended, and rank 0 has to print first
        sys.exit(2)
    return result


def one_line(error):
    return " ".join(str(error).split())


def quiet():
    """For tqdm's `disable`: no bar off rank 0, and none where no terminal would show it."""
    return ranks()[0] != 0 or not sys.stderr.isatty()


@contextlib.contextmanager
def script_errors():
    """The training scripts' own errors, each script's of a class of its own, as InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(one_line(error)) from error


@dataclass
class Checkpoint:
    """What is known of a checkpoint before its weights are loaded."""

    alias: str
    path: str
    sha256: str
    step: int | None
    tokens_seen: int | None
    model_config: dict
    train_config: dict
    script: ModuleType
    tokenizer: Tokenizer

    @property
    def size(self):
        """300M or 1.2B; None for a model of another shape."""
        for size in ("300M", "1.2B"):
            published = yaml.safe_load((ROOT / f"configs/model_config_{size}.yaml").read_text(encoding="utf-8"))
            if all(self.model_config[name] == published[name] for name in ("n_layer", "n_embd", "n_head")):
                return size
        return None

    def __str__(self):
        return f"{self.alias} {self.size or ''}".strip() + f", step {self.step}"

    def description(self):
        """All of it, for JSON."""
        return vars(self) | {"size": self.size, "script": self.script.__name__, "tokenizer": self.tokenizer.name}

    def fingerprint(self, dtype):
        """Of what an answer depends on beside the request, for --use_cache, which knows the request alone."""
        return hashlib.sha256(f"{self.sha256} {self.tokenizer.name} {dtype}".encode()).hexdigest()[:16]


def open_checkpoint(alias, path, tokenizer, val_data):
    """Everything of a checkpoint but its weights. InputError where the alias, tokenizer or data do not fit it."""
    if alias not in VARIANTS:
        raise InputError(f"--model {alias}: expected one of {', '.join(VARIANTS)}")
    scripts = {name: variant["script"]["300M"] for name, variant in VARIANTS.items()}  # each reads both sizes
    script = import_module(scripts[alias].removesuffix(".py"))
    with script_errors():
        try:
            contents = script.read_checkpoint(path)
        except script.RunError as error:
            if fitting := [name for name, file in scripts.items() if file in str(error)]:
                raise InputError(f"--model {alias}: {path} is a checkpoint of --model {fitting[0]}") from error
            raise
        with warnings.catch_warnings(action="ignore"):  # on a device without memory, all is tried but copying numbers
            script.load_model(path, device="meta")
        config, train_config = dict(contents["model_config"]), dict(contents.get("train_config") or {})
        vocabulary = config["vocab_size"]
        if val_data and (needed := script.TokenDataset(val_data, config["n_positions"]).vocab_size) > vocabulary:
            raise InputError(f"--val_data {val_data}: has {needed} token ids, and {path} knows {vocabulary}")
    tokenizer = find_tokenizer(tokenizer, [val_data, train_config.get("train_data")])
    if tokenizer.eos_id >= vocabulary:
        needed = f"{tokenizer.name} has {tokenizer.eos_id + 1} token ids, and {path} knows {vocabulary}"
        raise InputError(f"{needed}; pass the tokenizer that it was trained with, --tokenizer PATH.tiktoken or bytes")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    place = contents.get("step"), contents.get("tokens_seen")
    return Checkpoint(alias, path, digest, *place, config, train_config, script, tokenizer)


def find_tokenizer(argument, data_folders):
    """The tokenizer asked for; by default the one stored beside the data, or else GPT-2's."""
    stored = [Path(folder) / "tokenizer.tiktoken" for folder in data_folders if folder]
    return loaded_once(argument or next((str(path) for path in stored if path.is_file()), "gpt2"))


loaded_once = cache(load_tokenizer)  # for several checkpoints


def open_tasks(names, include_path, n_positions):
    """The harness's TaskManager. InputError for a task that is unknown, without data, or not to be run like this."""
    if include_path and not Path(include_path).is_dir():
        raise InputError(f"--include_path {include_path}: no such folder")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if any(name not in manager.task_index for name in names):
        manager = TaskManager(include_path=include_path)  # the harness's own are 14,000 files: seconds to read
    if unknown := [name for name in names if name not in manager.task_index]:
        similar = " or ".join(get_close_matches(unknown[0], manager.all_tasks)) or "a name that --list_tasks prints"
        raise InputError(f"--tasks {unknown[0]}: no such task; expected {similar}")
    for name in names:
        try:
            for task in manager.load([name])["tasks"].values():
                if task.OUTPUT_TYPE == "generate_until":
                    greedy_settings(task.config.generation_kwargs, n_positions)
        except InputError as error:
            raise InputError(f"--tasks {name}: {error}") from error
        except Exception as error:  # a task file can hold anything, code included
            if isinstance(error, network_errors()) and not isinstance(error, FileNotFoundError):
                raise InputError(out_of_reach(names, manager)) from error
            raise InputError(f"--tasks {name}: {type(error).__name__}: {one_line(error)}") from error
    return manager


def out_of_reach(names, manager):
    """What to say without a network: which task needs which data set of the hub, and how to do without."""
    data = {name: (manager.task_index[name].cfg or {}).get("dataset_path", "several") for name in names}
    needed = ", ".join(f"{name} ({dataset})" for name, dataset in data.items() if dataset != "json")
    local = "to run on local files, write task files with dataset_path: json (README.md) and pass --include_path DIR"
    return f"the hub is out of reach, and not all of the data is on this machine: {needed}; {local}"


def prepare(options):
    """Check all that can be checked before the first forward pass: (device, checkpoints, TaskManager or None)."""
    device = find_device(options.device)
    if options.dtype == "auto":
        options.dtype = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    aliases, paths = options.model or [], options.checkpoint or []
    if not paths or len(aliases) not in (1, len(paths)):
        raise InputError("expected --checkpoint PATH ... and --model ALIAS, one for all or one for each of them")
    if options.output_path and not options.output_path.resolve().parent.is_dir():
        raise InputError(f"--output_path {options.output_path}: there is no such folder")
    if options.num_fewshot < 0:
        raise InputError(f"--num_fewshot {options.num_fewshot}: expected 0 or more")
    tasks = ",".join(options.tasks or ([PERPLEXITY] if options.val_data else FIVE)).split(",")  # the harness's way too
    if PERPLEXITY in tasks and not options.val_data:
        raise InputError(f"--tasks {PERPLEXITY}: needs --val_data DIR, a split that dataset_download.py prepared")
    options.tasks = [name for name in dict.fromkeys(tasks) if name != PERPLEXITY]
    if len(aliases) == 1:
        aliases = aliases * len(paths)
    checkpoints = [
        open_checkpoint(alias, path, options.tokenizer, options.val_data)
        for alias, path in zip(aliases, paths, strict=True)
    ]
    manager = None
    if options.tasks and ranks()[0] == 0:  # which runs the harness
        n_positions = min(checkpoint.model_config["n_positions"] for checkpoint in checkpoints)
        manager = open_tasks(options.tasks, options.include_path, n_positions)
    return device, checkpoints, manager


def find_device(name):
    """The torch.device of this process; InputError where there is none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % max(1, torch.cuda.device_count()))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {one_line(error)}") from error
    return device


def evaluate_checkpoint(checkpoint, options, device, manager):
    """All that was asked for, of one checkpoint, as a dict for JSON; the harness's results on rank 0 alone."""
    with script_errors():
        model = checkpoint.script.load_model(checkpoint.path, device).to(getattr(torch, options.dtype))
    lm = CheckpointLM(model, checkpoint.tokenizer, options.batch_size)
    record = checkpoint.description() | {"parameters": sum(p.numel() for p in model.parameters())}
    if options.tasks and ranks()[0] == 0:
        record["harness"] = simple_evaluate(
            lm,
            tasks=options.tasks,
            num_fewshot=options.num_fewshot,
            batch_size=lm.batch_size,
            device=str(device),
            use_cache=options.use_cache and f"{options.use_cache}_{checkpoint.fingerprint(options.dtype)}",
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
        handed_out([None] * ranks()[1])
    elif options.tasks:
        lm.serve()
    if options.val_data:
        record[PERPLEXITY] = perplexity(checkpoint.script, model, options.val_data, lm.batch_size)
    return record


def perplexity(script, model, val_data, batch_size):
    """{protocol: what evaluate() of the training script says}, over rows of n_positions tokens."""
    results = {}
    for protocol in ("padded", "packed"):
        loader = script.get_dataloader(val_data, batch_size, model.config.n_positions, protocol)
        bar = tqdm(loader, desc=f"{PERPLEXITY}, {protocol}", unit="batch", disable=quiet())
        bar.dataset = loader.dataset  # evaluate() asks its loader for it
        with script_errors():
            results[protocol] = script.evaluate(model, bar)
    return results


def figures(record):
    """{(task, metric): (value, standard error or None)} of a checkpoint; accuracies in per cent."""
    found = {}
    for task, metrics in record.get("harness", {"results": {}})["results"].items():
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                stderr = metrics.get(f"{metric}_stderr,{filtered}")
                scale, known = 100 if metric in PER_CENT else 1, isinstance(stderr, float) and math.isfinite(stderr)
                metric += f", {filtered}" if filtered != "none" else ""
                found[task, metric] = scale * value, scale * stderr if known else None
    if all((task, "acc") in found for task in FIVE):
        for metric in ("acc", "acc_norm"):  # WinoGrande has no acc_norm; its acc stands in
            values, stderrs = zip(*(found.get((task, metric), found[task, "acc"]) for task in FIVE), strict=True)
            found["mean", metric] = fmean(values), None if None in stderrs else math.hypot(*stderrs) / len(FIVE)
        found["mean, published at 1.2B", "5-shot"] = PUBLISHED.get(record["alias"]), None
    for protocol, result in record.get(PERPLEXITY, {}).items():
        if protocol == "padded":
            found[PERPLEXITY, "padded, filling scored"] = result["perplexity"], None
        found[PERPLEXITY, f"{protocol}, text alone"] = result["text_perplexity"], None
        found[PERPLEXITY, f"{protocol}, bits per byte"] = result["bits_per_byte"], None
    return found


def table(records):
    """Lines with a row for each figure and a column for each checkpoint, of {label: record}."""
    columns = [figures(record) for record in records.values()]
    rows = [["task", "metric", "chance", *records]]
    for task, metric in columns[0]:
        chance = f"{CHANCE[task]:.1f}" if task in CHANCE and metric in PER_CENT else ""
        rows.append([task, metric, chance, *(cell(*column[task, metric]) for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def cell(value, stderr):
    if value is None:
        return "not given"
    return f"{value:.2f}" + (f" ± {stderr:.2f}" if stderr is not None else "")


def verdicts(records, options):
    """Sentences: where acc differs from chance, from the paper's mean and from the first checkpoint, and where not."""
    scores = {label: accuracies(record) for label, record in records.items()}
    first, lines = next(iter(scores)), []
    for label, own in scores.items():
        lines.append(compared(f"{label} minus chance", own, {task: (value, 0.0) for task, value in CHANCE.items()}))
        published = PUBLISHED.get(records[label]["alias"])
        if published and records[label]["size"] == "1.2B" and options.num_fewshot == 5 and not options.limit:
            lines.append(compared(f"{label} minus the paper", own, {"mean": (published, 0.0)}))
        if label != first:
            lines.append(compared(f"{label} minus {first}", own, scores[first]))
    return [line for line in lines if line]


def accuracies(record):
    """{task: (acc, standard error)} in per cent, of those of the five tasks that were run, and of their mean."""
    found = figures(record)
    known = {task: found.get((task, "acc"), (None, None)) for task in CHANCE}
    return {task: (value, stderr) for task, (value, stderr) in known.items() if stderr is not None}


def compared(what, ours, theirs):
    """A sentence on two {task: (value, standard error)}; empty where they share no task.

    The two errors are taken as independent. Two checkpoints answer the same questions, so that of their difference
    is smaller: this may miss a difference, and makes up none.
    """
    within, beyond = [], []
    for task in [task for task in ours if task in theirs]:
        (value, stderr), (other, other_stderr) = ours[task], theirs[task]
        difference, noise = value - other, math.hypot(stderr, other_stderr)
        said = f"{task} ({difference:+.2f} ± {noise:.2f})"
        (within if abs(difference) <= noise else beyond).append(said)
    sides = {"within the standard error": within, "beyond it": beyond}
    said = [f"\n    {side}: {', '.join(tasks)}" for side, tasks in sides.items() if tasks]
    return f"{what}, by acc{''.join(said)}" if said else ""


def write_report(path, records, options, lines):
    """The scores as the harness gives them, and what is needed to get them again, as one JSON file."""
    packages = ("torch", "lm_eval", "datasets", "transformers", "tiktoken")
    report = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "settings": vars(options) | {"processes": ranks()[1]},
        "chance": CHANCE,
        "published_mean_1.2B": PUBLISHED,
        "checkpoints": records,
        "verdicts": lines,
    }
    text = json.dumps(report, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def positive(text):
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError(text)
    return number


def batch_size(text):
    return text if text == "auto" else int(positive(str(int(text))))


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="run_eval.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", metavar="ALIAS", help=f"{', '.join(VARIANTS)}; one for all checkpoints or one for each")
    add("--checkpoint", nargs="+", metavar="PATH", help="ours or released, at either size; several make one table")
    add("--tasks", nargs="+", metavar="TASK", help=f"of the harness, or {PERPLEXITY} (default: the paper's five)")
    add("--num_fewshot", type=int, default=5, help="solved examples before each question (default: 5)")
    add("--batch_size", type=batch_size, default="auto", help="requests in a forward pass, or auto (default)")
    add("--limit", type=positive, help="the first N documents of each task, or a share below 1: to try things out")
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto (default)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs that have it")
    add("--tokenizer", help="gpt2, bytes or PATH.tiktoken (default: the one stored beside the data, or else gpt2)")
    add("--include_path", metavar="DIR", help="a folder of task files, which go before the harness's of that name")
    add("--val_data", metavar="DIR", help=f"a split of dataset_download.py: its {PERPLEXITY}, in both protocols")
    add("--use_cache", metavar="PREFIX", help="keep the answers in SQLite files, and take them from there")
    add("--output_path", type=Path, metavar="FILE", help="write everything as JSON")
    add("--list_tasks", action="store_true", help="print the name of every task, and end")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parse(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every setting that differs from its own
    if options.list_tasks:
        print(*TaskManager(include_path=options.include_path).all_tasks, PERPLEXITY, sep="\n")
        return
    if "RANK" in os.environ and not dist.is_initialized():  # gloo, for counts and scores; no rank waits in vain:
        dist.init_process_group("gloo", timeout=timedelta(weeks=1))  # torchrun ends them all when one has ended
    try:
        device, checkpoints, manager = together(lambda: prepare(options))
        records = {}
        for checkpoint in checkpoints:
            label = str(checkpoint) if str(checkpoint) not in records else f"{checkpoint}, {checkpoint.path}"
            records[label] = evaluate_checkpoint(checkpoint, options, device, manager)
        if ranks()[0] == 0:
            lines = verdicts(records, options)
            print(*table(records), "", *lines, sep="\n")
            if options.output_path:
                write_report(options.output_path, records, options, lines)
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, torch.OutOfMemoryError) as error:
        hint = "; lower --batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"run_eval.py: error: {one_line(error)}{hint}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        sys.exit(2)  # another process has ended, and has said why
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
