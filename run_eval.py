"""Downstream scores of checkpoints, through lm-evaluation-harness: the paper's five tasks or any other.

    python run_eval.py --model kv --checkpoint outputs_1.2B_qkv_k_equals_v/checkpoint_step_8000.pt
    torchrun --nproc_per_node=8 run_eval.py --model kqv kv --checkpoint a.pt b.pt --output_path scores.json
    python run_eval.py --model kv --checkpoint outputs_demo/final_model.pt --val_data demo_data/validation
    python run_eval.py --model kv --checkpoint a.pt --tasks my_hellaswag my_piqa --include_path my_tasks

The harness builds the few-shot prompts and computes the metrics with their standard errors. This file answers
its requests: the log-probability of a continuation, and the greedy continuation of a prompt, from any
checkpoint that the training scripts can load.

Contents: the language model that the harness asks, processes, checkpoints, tasks, evaluation, the table and
the report, command line.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import platform
import sqlite3
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import version
from itertools import chain
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
from lm_eval.models import utils as harness
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window
from tabulate import tabulate
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from common import ROOT, VARIANTS, InputError, Parser, Tokenizer, load_tokenizer, show_what_the_terminal_can, write_text
from dataset_download import network_errors, read_metadata

RANK = int(os.environ.get("RANK", 0))
# without RANK, a WORLD_SIZE is left over from another job
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1

FIVE = ("arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande")  # the paper's tasks
CHANCE = {  # the accuracy of guessing, in per cent: among four answers or endings, or two solutions or names
    "arc_challenge": 25.0, "arc_easy": 25.0, "hellaswag": 25.0, "piqa": 50.0, "winogrande": 50.0,
    "mean": 35.0,
}  # fmt: skip
# The paper's mean over the five at 1.2B, 5-shot. It gives none for MQA.
PUBLISHED = {
    alias: row["published"]["downstream"]["1.2B"]
    for alias, row in VARIANTS.items()
    if "downstream" in row["published"]
}
PER_CENT = ("acc", "acc_norm", "exact_match")
PERPLEXITY = "perplexity"  # a task of ours, besides the harness's

END_OF_TEXT = "<|endoftext|>"
GPT2_RANKS = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # Tokenizer.sha256
NEW_TOKENS = 256  # for a task that does not say how many to generate; as in the harness's HFLM
CPU_BATCH = 8  # --batch_size auto on a CPU
LARGEST_BATCH = 64  # where --batch_size auto starts on a GPU
HEAD_ROWS = 2048  # positions whose logits exist at the same time


# -----------------------------------------------------------------------------
# The language model that the harness asks


class CheckpointLM(TemplateLM):
    """A model of the training scripts, as one of the harness's language models.

    TemplateLM splits texts into context and continuation; the methods here work on their tokens. Batches are
    padded on the right: in a causal model with learned positions, that changes nothing for the real tokens.

    With several processes, rank 0 alone runs the harness and hands out the requests. The harness's own way, a
    share of the documents for every rank, would draw other few-shot examples for every world size.
    """

    def __init__(self, model, tokenizer: Tokenizer, batch_size: int | str = CPU_BATCH, max_length=None):
        """batch_size: requests in a forward pass; auto: what fits on a GPU, by trial, and 8 on a CPU.

        max_length: tokens in a row; None: n_positions.
        """
        super().__init__()
        self.model = model.eval()
        self.max_length = max_length or model.config.n_positions
        self._device = model.wte.weight.device
        self._encode = tokenizer.encode
        self._eot = tokenizer.eos_id
        self._bytes = {rank: piece for piece, rank in tokenizer.ranks.items()}
        self._bytes[self._eot] = END_OF_TEXT.encode()
        self.batch_size = batch_size
        if batch_size == "auto":
            self.batch_size = self._largest_batch() if self._device.type == "cuda" else CPU_BATCH

    @property
    def eot_token_id(self):
        return self._eot

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        """Token ids as in the training data: no special token is added, or read out of the text."""
        return self._encode([string])[0].tolist()

    def tok_decode(self, tokens):
        """The text of token ids; the ids that pad the vocabulary to 50,304 have none."""
        return b"".join(self._bytes.get(token, b"") for token in tokens).decode("utf-8", errors="replace")

    def loglikelihood(self, requests, disable_tqdm=False):
        return super().loglikelihood(requests, disable_tqdm or no_bar())

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """Log-probabilities in nats of whole texts, cut into windows that score each token once."""
        windows = []
        for (text,) in (request.args for request in requests):
            tokens = self.tok_encode(text)
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(None, *make_disjoint_window(pair)) for pair in pairs])
        scores = iter(self._loglikelihood_tokens(list(chain.from_iterable(windows))))
        totals = [sum(next(scores)[0] for _ in own) for own in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests, **kwargs):
        """(log-probability in nats, whether greedy decoding produces it) of each request's continuation.

        A request is (its texts or None, context tokens, continuation tokens). A context that is too long
        loses its beginning; a continuation that does not fit is an InputError.
        """
        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            limit = f"n_positions, {self.max_length} (or the seq_length of training, if shorter)"
            raise InputError(f"a continuation of {longest} tokens does not fit {limit}")
        cut = sum(len(context + continuation) > self.max_length + 1 for _, context, continuation in requests)
        if cut:
            what = f"{cut:,} of {len(requests):,} requests are longer than {self.max_length:,} tokens"
            tqdm.write(f"{what}; the beginning of their context is cut off", file=sys.stderr)
        return self._share_out("_score", requests)

    def generate_until(self, requests, disable_tqdm=False):
        """Greedy continuations, each up to its first stop string; InputError where a task wants sampling."""
        return self._share_out("_generate", [request.args for request in requests])

    def _share_out(self, method, requests):
        """The answers of _score or _generate, in the order of the requests; every rank takes a share."""
        shares = [(method, requests[rank::WORLD_SIZE]) for rank in range(WORLD_SIZE)]
        answers = [None] * len(requests)
        for rank, share in enumerate(gather(self._answer(scatter(shares)))):
            answers[rank::WORLD_SIZE] = share
        return answers

    def _answer(self, share):
        method, requests = share
        return getattr(self, method)(requests)

    def serve(self):
        """On the other ranks: answer the shares that rank 0 hands out, until it hands out None."""
        while share := scatter():
            gather(self._answer(share))

    def _score(self, requests):
        """As _loglikelihood_tokens. The longest go first: if memory runs out, it does so at once."""
        by_length = harness.Collator(requests, sort_fn=lambda request: -len(request[1] + request[2]))
        answers = []
        with tqdm(total=len(requests), desc="scoring", unit="request", disable=no_bar()) as bar:
            for batch in by_length.get_batched(n=self.batch_size):
                for (texts, *_), answer in zip(batch, self._score_batch(batch), strict=True):
                    answers.append(answer)
                    if texts is not None:  # None: a window, whose request caches the sum
                        self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update(len(batch))
        return by_length.get_original(answers)

    @torch.inference_mode()
    def _score_batch(self, batch):
        """As _score, in one forward pass."""
        rows = []
        lengths = []
        for _, context, continuation in batch:
            row = (context or [self._eot]) + continuation
            rows.append(torch.tensor(row[-self.max_length - 1 :]))
            lengths.append(len(continuation))
        inputs = pad_sequence([row[:-1] for row in rows], batch_first=True).to(self._device)
        hidden = self.model.hidden_states(inputs)  # [B, T, C]

        # Only the positions that predict a continuation go through the LM head, a bounded number at a time.
        states = []
        targets = []
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            start = len(row) - length
            states.append(hidden[i, start - 1 : len(row) - 1])
            targets.append(row[start:])
        states = torch.cat(states).split(HEAD_ROWS)
        targets = torch.cat(targets).to(self._device).split(HEAD_ROWS)
        log_p = []
        greedy = []
        for some, wanted in zip(states, targets, strict=True):
            logits = F.linear(some, self.model.wte.weight).float()
            log_p.append(-F.cross_entropy(logits, wanted, reduction="none"))
            greedy.append(logits.argmax(dim=-1) == wanted)
        log_p = torch.cat(log_p).cpu()
        greedy = torch.cat(greedy).cpu()

        if not log_p.isfinite().all():
            raise InputError("its log-probabilities are not finite: it has diverged, or is damaged")
        parts = zip(log_p.split(lengths), greedy.split(lengths), strict=True)
        return [(float(values.sum()), bool(same.all())) for values, same in parts]

    def _generate(self, requests):
        """The text that continues each (prompt, generation settings of its task)."""
        by_length = harness.Collator(
            requests,
            sort_fn=lambda request: -len(self.tok_encode(request[0])),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        texts = []
        with tqdm(total=len(requests), desc="generating", unit="request", disable=no_bar()) as bar:
            for batch in by_length.get_batched(n=self.batch_size):
                stops, new = greedy_settings(batch[0][1], self.max_length)
                # A prompt loses its beginning where it leaves no room for the new tokens.
                prompts = [self.tok_encode(text)[new - self.max_length :] or [self._eot] for text, _ in batch]
                for request, text in zip(batch, self._continue(prompts, stops, new), strict=True):
                    texts.append(text)
                    self.cache_hook.add_partial("generate_until", request, text)
                bar.update(len(batch))
        return by_length.get_original(texts)

    @torch.inference_mode()
    def _continue(self, prompts, stops, new):
        """Greedy continuations of token lists by at most `new` tokens, each cut before its first stop string.

        Positions are learned, so every row starts at position 0. Once the shortest prompt is read, the batch
        advances one token at a time: a row reads the rest of its prompt, then writes the likeliest token.
        """
        lengths = [len(prompt) for prompt in prompts]
        texts = [None] * len(prompts)
        tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        tokens = F.pad(tokens, (0, new)).to(self._device)
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
                        texts[i] = harness.postprocess_generated_text(text, stops, None)
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
    """(stop strings, most new tokens) of a task's generation_kwargs; InputError where they cannot be met."""
    settings = harness.normalize_gen_kwargs(settings, NEW_TOKENS)
    new = settings["max_gen_toks"]
    if settings.get("do_sample") or settings.get("num_beams", 1) > 1:
        raise InputError(f"run_eval.py decodes greedily, the task asks for {json.dumps(settings)}")
    if new >= n_positions:
        limit = f"n_positions, {n_positions} (or the seq_length of training, if shorter)"
        raise InputError(f"{new} new tokens leave no room for a prompt in {limit}")
    stops = [stop for stop in settings["until"] if stop is not None]  # until: null comes as [None]
    return harness.handle_stop_sequences(stops, eos=END_OF_TEXT), new


# -----------------------------------------------------------------------------
# Processes


def gather(value):
    """What each rank passed, in the order of ranks; every rank has to call it."""
    if WORLD_SIZE == 1:
        return [value]
    values = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def scatter(values=None):
    """This rank's item of a list that rank 0 passes; every rank has to call it."""
    if WORLD_SIZE == 1:
        return values[0]
    received = [None]
    dist.scatter_object_list(received, values, src=0)
    return received[0]


def together(check):
    """check(), where it passes on every rank; otherwise all end, and the first error is printed once."""
    try:
        result, error = check(), None
    except (InputError, OSError) as caught:
        result, error = None, one_line(caught)
    errors = [error for error in gather(error) if error]
    if errors:
        if RANK == 0:
            print_error(errors[0])
        gather(None)  # torchrun ends the others when one has ended, and rank 0 has to print first
        sys.exit(2)
    return result


def one_line(error):
    return " ".join(str(error).split())


def print_error(error):
    print(f"run_eval.py: error: {one_line(error)}", file=sys.stderr, flush=True)


def no_bar():
    """For tqdm's `disable`: no bar off rank 0, and none where no terminal would show it."""
    return RANK != 0 or not sys.stderr.isatty()


# -----------------------------------------------------------------------------
# Checkpoints


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
            text = (ROOT / f"configs/model_config_{size}.yaml").read_text(encoding="utf-8")
            published = yaml.safe_load(text)
            if all(self.model_config[name] == published[name] for name in ("n_layer", "n_embd", "n_head")):
                return size
        return None

    @property
    def positions(self):
        """The positions that training reached: n_positions, or fewer where its rows were shorter.

        Released checkpoints do not say how long theirs were: as long as n_positions.
        """
        n_positions = self.model_config["n_positions"]
        return min(n_positions, self.train_config.get("seq_length") or n_positions)

    def __str__(self):
        return f"{self.alias} {self.size or ''}".strip() + f", step {self.step}"

    def description(self):
        """All of it, for JSON."""
        readable = {"script": self.script.__name__, "tokenizer": self.tokenizer.name}
        return vars(self) | {"size": self.size} | readable

    def fingerprint(self, dtype):
        """Of what an answer depends on beside the request, for --use_cache, which knows the request alone."""
        known = f"{self.sha256} {self.tokenizer.name} {dtype} {self.positions}"
        return hashlib.sha256(known.encode()).hexdigest()[:16]


def open_checkpoint(alias, path, tokenizer, val_data):
    """A Checkpoint; InputError where the alias, the tokenizer or the validation data do not belong to it."""
    if alias not in VARIANTS:
        raise InputError(f"--model {alias}: expected one of {', '.join(VARIANTS)}")
    script = script_of(alias)
    contents = read_contents(alias, path)

    # A vocabulary that is too large for the model is certainly another one.
    config = contents["model_config"]
    known = f"and the model in {path} has only {config['vocab_size']}"
    if val_data:
        with script_errors():
            needed = script.get_dataloader(val_data, 1, config["n_positions"]).dataset.vocab_size
        if needed > config["vocab_size"]:
            raise InputError(f"--val_data {val_data}: has {needed} token ids, {known}")
    train_config = dict(contents.get("train_config") or {})
    recorded = contents.get("tokenizer")
    tokenizer = find_tokenizer(tokenizer, path, recorded, val_data, train_config.get("train_data"))
    if tokenizer.eos_id >= config["vocab_size"]:
        needed = f"{tokenizer.name} has {tokenizer.eos_id + 1} token ids, {known}"
        raise InputError(f"{needed}; pass its own tokenizer, --tokenizer PATH.tiktoken or bytes")

    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    place = contents.get("step"), contents.get("tokens_seen")
    return Checkpoint(alias, path, sha256, *place, config, train_config, script, tokenizer)


def read_contents(alias, path):
    """The contents of a checkpoint of this variant; InputError for another's, which names the right alias."""
    script = script_of(alias)
    with script_errors():
        try:
            return try_loading(script, path)
        except script.RunError as error:
            fitting = []
            for other in VARIANTS:
                with contextlib.suppress(ValueError):
                    try_loading(script_of(other), path)
                    fitting.append(other)
            if not fitting:
                raise
            hint = f"{path} is a checkpoint of --model {' or '.join(fitting)}"
            raise InputError(f"--model {alias}: {hint}") from error


def script_of(alias):
    """The 300M training script of a variant, which reads checkpoints of both sizes."""
    return import_module(VARIANTS[alias]["script"]["300M"].removesuffix(".py"))


def try_loading(script, path):
    """The contents of a checkpoint that the script can load; the script's own errors where it cannot."""
    contents = script.read_checkpoint(path)
    with warnings.catch_warnings(action="ignore"):  # on the meta device, all is tried but copying the numbers
        model = script.load_model(path, device="meta")
    return contents | {"model_config": asdict(model.config)}  # with the defaults


@contextlib.contextmanager
def script_errors():
    """Raise the errors of the training scripts, each of which has its own class, as InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(one_line(error)) from error


def find_tokenizer(argument, path, recorded, val_data, train_data):
    """The tokenizer of a checkpoint's training data; InputError where the validation data has another one.

    `recorded` is what the checkpoint says of it, see identity(); None in the released ones, which do not say.
    Without --tokenizer it is the one stored beside the data, or the one the checkpoint names, or GPT-2's.
    """
    validation = stored_tokenizer(val_data) if val_data else None
    training = None
    with contextlib.suppress(InputError):  # the folder it was trained on may be of an older format
        training = stored_tokenizer(train_data) if train_data else None
    if training and not (recorded or argument):
        recorded = training  # other data may lie there by now, so this counts only where nothing else says

    if argument:
        tokenizer = loaded_once(argument)
    elif validation:
        tokenizer = validation
    elif training and identity(training)[0] == identity(recorded)[0]:
        tokenizer = training
    else:
        name = identity(recorded)[0] if recorded else "gpt2"
        if name not in ("gpt2", "bytes"):
            lost = f"{path} was trained with {name}, whose ranks are not beside its training data any more"
            raise InputError(f"{lost}; pass --tokenizer PATH.tiktoken")
        tokenizer = loaded_once(name)

    for place, known in {path: recorded, f"--val_data {val_data}": validation}.items():
        if known:
            name, sha256 = identity(known)
            if tokenizer.name != name and not tokenizer.sha256.startswith(sha256):
                other = f"{tokenizer.name} is not the tokenizer of {place}, {name}"
                raise InputError(f"{other}; pass a --tokenizer and a --val_data that belong to {path}")
    return tokenizer


@cache
def stored_tokenizer(folder):
    """The tokenizer stored beside token files, named as in their metadata; None where there is none."""
    ranks = Path(folder, "tokenizer.tiktoken")
    metadata = read_metadata(ranks.parent)
    if metadata is None or not ranks.is_file():
        return None
    return replace(load_tokenizer(str(ranks)), name=metadata.tokenizer)


def identity(tokenizer):
    """(name, SHA-256 of the ranks or its beginning) of a Tokenizer, or of what a checkpoint says of one."""
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.name, tokenizer.sha256
    if isinstance(tokenizer, dict):
        return tokenizer["name"], tokenizer["sha256"]
    ranks = {"gpt2": GPT2_RANKS, "bytes": loaded_once("bytes").sha256}
    return tokenizer, ranks.get(tokenizer, tokenizer.rpartition(" sha256:")[2])


loaded_once = cache(load_tokenizer)  # for several checkpoints


# -----------------------------------------------------------------------------
# Tasks


def open_tasks(names, include_path, num_fewshot, n_positions):
    """A TaskManager that knows all names; InputError for a task that is unknown, lacks data or cannot run."""
    manager = find_tasks(names, include_path)
    owners = {}
    for name in names:
        try:
            for label, task in manager.load([name])["tasks"].items():
                owner = name if name in manager.all_groups else label  # a tag is short for its tasks
                if owners.setdefault(label, owner) != owner:  # the harness would refuse it once all is loaded
                    raise InputError(f"holds {label}, which --tasks has already; leave one out")
                check_task(task, num_fewshot, n_positions)
        except InputError as error:
            raise InputError(f"--tasks {name}: {error}") from error
        except Exception as error:  # a task file can hold anything, code included
            if isinstance(error, network_errors()) and not isinstance(error, FileNotFoundError):
                raise InputError(out_of_reach(names, manager)) from error
            raise InputError(f"--tasks {name}: {type(error).__name__}: {one_line(error)}") from error
    return manager


def find_tasks(names, include_path):
    """A TaskManager that knows all names; InputError where one is unknown, or may be in a broken file."""
    manager = open_folder(include_path, include_defaults=False)
    missing = [name for name in names if name not in manager.task_index]
    unsure = missing or [name for name in names if name in manager.all_groups]  # may name the harness's tasks
    if not unsure:
        return manager

    # The harness passes over a file that it cannot read, and would take its own task of that name.
    if include_path:
        for file in sorted(Path(include_path).rglob("*.yaml")):
            try:
                load_yaml(file, resolve_func=False)
            except Exception as error:  # of the syntax, an include, the encoding
                found = "not found" if missing else "not certainly all found"
                place = f"{found} in {include_path}, where {file} cannot be read"
                raise InputError(f"--tasks {unsure[0]}: {place}: {one_line(error)}") from error

    manager = open_folder(include_path)
    for name in missing:
        if name not in manager.task_index:
            similar = get_close_matches(name, manager.all_tasks) or ["a name that --list_tasks prints"]
            raise InputError(f"--tasks {name}: no such task; expected {' or '.join(similar)}")
    return manager


def open_folder(include_path, include_defaults=True):
    """A TaskManager for a folder and for the harness's own tasks, 14,000 files that take seconds to read."""
    if include_path and not Path(include_path).is_dir():
        raise InputError(f"--include_path {include_path}: no such folder")
    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def check_task(task, num_fewshot, n_positions):
    """InputError where a task cannot be run; its own errors where its code or its templates fail."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise InputError("runs code that the model writes, or shows it pictures; run_eval.py does neither")
    if task.OUTPUT_TYPE == "generate_until":
        greedy_settings(task.config.generation_kwargs, n_positions)

    # A task's own 0 goes before --num_fewshot. Where the examples come from the split that is scored, the
    # harness draws one to spare, as the document itself may be among them.
    shots = 0 if task.config.num_fewshot == 0 else num_fewshot
    if shots and hasattr(task, "sampler"):
        examples = len(task.sampler.fewshot_docs())
        if task.fewshot_cfg.split == task.config.test_split:
            examples -= 1
        if examples < shots:
            raise InputError(f"has {examples} examples for a prompt, and --num_fewshot asks for {shots}")
    _, document = next(task.doc_iterator(limit=1))
    task.fewshot_context(document, num_fewshot=shots)


def out_of_reach(names, manager):
    """The error without a network: which task needs which data set of the hub, and how to do without."""
    needed = []
    for name in names:
        dataset = (manager.task_index[name].cfg or {}).get("dataset_path", "several")
        if dataset != "json":
            needed.append(f"{name} ({dataset})")
    local = "write task files with dataset_path: json (README.md) and pass --include_path DIR"
    return (
        "the hub is out of reach, and not all of the data is on this machine: "
        f"{', '.join(needed)}; to run on local files, {local}"
    )


# -----------------------------------------------------------------------------
# Evaluation


def prepare(options):
    """(device, checkpoints, TaskManager or None), once all that can be checked beforehand is."""
    device = find_device(options.device)
    check_options(options, device)

    aliases = options.model or []
    paths = options.checkpoint or []
    if not paths or len(aliases) not in (1, len(paths)):
        raise InputError("expected --checkpoint PATH ... and --model ALIAS, one for all or one for each")
    if len(aliases) == 1:
        aliases = aliases * len(paths)
    checkpoints = []
    for alias, path in zip(aliases, paths, strict=True):
        checkpoints.append(open_checkpoint(alias, path, options.tokenizer, options.val_data))

    manager = None
    if options.tasks and RANK == 0:
        n_positions = min(checkpoint.positions for checkpoint in checkpoints)
        manager = open_tasks(options.tasks, options.include_path, options.num_fewshot, n_positions)
        for checkpoint in checkpoints if options.use_cache else ():
            check_cache(Path(f"{cache_prefix(checkpoint, options)}_rank0.db"))  # as the harness calls it
    return device, checkpoints, manager


def cache_prefix(checkpoint, options):
    """Where the harness keeps the answers of a checkpoint; None without --use_cache."""
    return options.use_cache and f"{options.use_cache}_{checkpoint.fingerprint(options.dtype)}"


def check_cache(path):
    """InputError where there is a cache and SQLite cannot read all of it, which would otherwise end the work."""
    found = "ok"
    if path.exists():
        try:
            with contextlib.closing(sqlite3.connect(path)) as database:
                (found,) = database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            found = error
    if found != "ok":
        raise InputError(f"--use_cache: {path}: {one_line(found)}; delete it if it is damaged")


def check_options(options, device):
    """Check and complete the options that concern no single checkpoint; InputError for a bad one."""
    if options.dtype == "auto":
        fits = device.type == "cuda" and torch.cuda.is_bf16_supported()
        options.dtype = "bfloat16" if fits else "float32"
    if options.num_fewshot < 0:
        raise InputError(f"--num_fewshot {options.num_fewshot}: expected 0 or more")
    limit = options.limit
    if limit is not None and not (0 < limit < 1 or limit >= 1 and limit.is_integer()):
        raise InputError(f"--limit {limit:g}: expected a whole number above 0, or a share below 1")
    if options.batch_size != "auto":
        if not options.batch_size.isdecimal() or int(options.batch_size) == 0:
            raise InputError(f"--batch_size {options.batch_size}: expected auto or a whole number above 0")
        options.batch_size = int(options.batch_size)
    if RANK == 0 and options.output_path:
        check_writable("--output_path", options.output_path)
    if RANK == 0 and options.use_cache:
        check_writable("--use_cache", Path(f"{options.use_cache}_"))

    # Tasks are separated by spaces, or by commas as in the harness's own command.
    tasks = options.tasks or ([PERPLEXITY] if options.val_data else FIVE)
    tasks = list(dict.fromkeys(",".join(tasks).split(",")))
    if PERPLEXITY in tasks:
        if not options.val_data:
            raise InputError(f"--tasks {PERPLEXITY}: needs --val_data DIR, files of dataset_download.py")
        tasks.remove(PERPLEXITY)
    if limit and not tasks:
        raise InputError(f"--limit {limit:g}: does not go with {PERPLEXITY} alone, which is over all of --val_data")
    options.tasks = tasks


def check_writable(option, path):
    """InputError where a file could not be written, said now and not after hours of work."""
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no such folder")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder, expected a file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written ({error.strerror})") from error


def find_device(name):
    """The torch.device of this process; InputError where it has none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            device = torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))
        torch.empty(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {one_line(error)}") from error
    return device


def evaluate_checkpoint(checkpoint, options, device, manager):
    """All figures of a checkpoint, as a dict for JSON; the harness's results are on rank 0 alone."""
    with script_errors():
        model = checkpoint.script.load_model(checkpoint.path, device).to(getattr(torch, options.dtype))
    lm = CheckpointLM(model, checkpoint.tokenizer, options.batch_size, checkpoint.positions)
    record = checkpoint.description() | {"parameters": sum(p.numel() for p in model.parameters())}
    if options.tasks and RANK == 0:
        record["harness"] = simple_evaluate(
            lm,
            tasks=options.tasks,
            num_fewshot=options.num_fewshot,
            batch_size=lm.batch_size,
            device=str(device),
            use_cache=cache_prefix(checkpoint, options),
            limit=options.limit,
            task_manager=manager,
            log_samples=False,
        )
        scatter([None] * WORLD_SIZE)
    elif options.tasks:
        lm.serve()
    if options.val_data:
        # The ranks take batches in turn, so theirs have to be of one size; each has found its own by trial.
        batch_size = min(gather(lm.batch_size))
        record[PERPLEXITY] = perplexity(checkpoint, model, options.val_data, batch_size)
    return record


def perplexity(checkpoint, model, val_data, batch_size):
    """{protocol: what evaluate() of the training script returns}, over rows as long as in training."""
    script = checkpoint.script
    results = {}
    for protocol in ("padded", "packed"):
        with script_errors():
            loader = script.get_dataloader(val_data, batch_size, checkpoint.positions, protocol)
            bar = tqdm(loader, desc=f"{PERPLEXITY}, {protocol}", unit="batch", disable=no_bar())
            bar.dataset = loader.dataset  # evaluate() asks its loader for it
            results[protocol] = script.evaluate(model, bar)
        if not math.isfinite(results[protocol]["loss"]):
            raise InputError(f"its loss on {val_data} is not finite: it has diverged, or is damaged")
    return results


# -----------------------------------------------------------------------------
# The table and the report


def figures(record):
    """{(task, metric): (value, standard error or None)} of a checkpoint; accuracies in per cent."""
    found = {}
    results = record["harness"]["results"] if "harness" in record else {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, comma, filtered = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            scale = 100 if metric in PER_CENT else 1
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
        found["mean, published at 1.2B", "5-shot"] = published_mean(record), None

    for protocol, result in record.get(PERPLEXITY, {}).items():
        if protocol == "padded":
            found[PERPLEXITY, "padded, over all positions"] = result["perplexity"], None
        found[PERPLEXITY, f"{protocol}, over text only"] = result["text_perplexity"], None
        found[PERPLEXITY, f"{protocol}, bits per byte"] = result["bits_per_byte"], None
    return found


def published_mean(record):
    """The paper's mean of the variant; None where it has none, or one of another number of KV heads."""
    groups = VARIANTS[record["alias"]]["groups"]
    # A model of another shape is compared with the scripts' default, that of 300M.
    if groups and record["model_config"]["n_kv_groups"] != groups[record["size"] or "300M"]:
        return None
    return PUBLISHED.get(record["alias"])


def table(records):
    """Lines of text for {label: record}: a row for each figure and a column for each checkpoint."""
    columns = [figures(record) for record in records.values()]
    rows = []
    for task, metric in columns[0]:
        chance = f"{CHANCE[task]:.1f}" if task in CHANCE and metric in PER_CENT else ""
        rows.append([task, metric, chance, *(cell(*column[task, metric]) for column in columns)])
    headers = ["task", "metric", "chance", *records]
    return tabulate(rows, headers, tablefmt="plain", disable_numparse=True).splitlines()


def cell(value, stderr):
    if value is None:
        return "not given"
    return f"{value:.2f}" if stderr is None else f"{value:.2f} ± {stderr:.2f}"


def verdicts(records, options):
    """Sentences: where acc differs from chance, from the paper's mean and from the first checkpoint."""
    scores = {label: accuracies(record) for label, record in records.items()}
    first = next(iter(scores))
    chance = {task: (value, 0.0) for task, value in CHANCE.items()}
    lines = []
    for label, own in scores.items():
        lines.append(compared(f"{label} minus chance", own, chance))
        published = published_mean(records[label])
        as_published = records[label]["size"] == "1.2B" and options.num_fewshot == 5 and not options.limit
        if published and as_published:
            lines.append(compared(f"{label} minus the paper", own, {"mean": (published, 0.0)}))
        if label != first:
            lines.append(compared(f"{label} minus {first}", own, scores[first]))
    lines = [line for line in lines if line]
    if lines:
        lines.append("(of scores that differ by chance alone, up to a third lie beyond one standard error)")
    return lines


def accuracies(record):
    """{task: (acc, standard error)} in per cent, of the five tasks and of their mean, where known."""
    found = figures(record)
    pairs = {task: found.get((task, "acc"), (None, None)) for task in CHANCE}
    return {task: (value, stderr) for task, (value, stderr) in pairs.items() if stderr is not None}


def compared(what, ours, theirs):
    """A sentence on two {task: (value, standard error)}; empty where they share no task.

    The two errors are taken as independent. Two checkpoints answer the same questions, so the error of their
    difference is usually smaller. One standard error is a low bar: where there is no difference at all, up to a
    third of the comparisons lie beyond it.
    """
    sides = {"within the standard error": [], "beyond it": []}
    for task in ours:
        if task in theirs:
            difference = ours[task][0] - theirs[task][0]
            noise = math.hypot(ours[task][1], theirs[task][1])
            side = "within the standard error" if abs(difference) <= noise else "beyond it"
            sides[side].append(f"{task} ({difference:+.2f} ± {noise:.2f})")
    parts = [f"\n    {side}: {', '.join(tasks)}" for side, tasks in sides.items() if tasks]
    return f"{what}, by acc{''.join(parts)}" if parts else ""


def write_report(path, records, options, lines):
    """Write the scores as the harness gives them, and what it takes to get them again, as one JSON file."""
    packages = ("torch", "lm_eval", "datasets", "transformers", "tiktoken")
    report = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "settings": vars(options) | {"processes": WORLD_SIZE},
        "chance": CHANCE,
        "published_mean_1.2B": PUBLISHED,
        "checkpoints": records,
        "verdicts": lines,
    }
    # The standard error of a single document is NaN, which is no JSON.
    text = json.dumps(report, default=handle_non_serializable)
    report = json.loads(text, parse_constant=lambda constant: None)
    write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


# -----------------------------------------------------------------------------
# Command line


def parse(arguments):
    parser = Parser(__file__, __doc__)
    add = parser.add_argument
    add("--model", nargs="+", metavar="ALIAS", help=f"{', '.join(VARIANTS)}; one for all or one for each")
    add("--checkpoint", nargs="+", metavar="PATH", help="ours or released; several make one table")
    tasks = f"the harness's, or {PERPLEXITY} (default: the paper's; with --val_data, that alone)"
    add("--tasks", nargs="+", metavar="TASK", help=tasks)
    add("--num_fewshot", type=int, default=5, help="solved examples before each question (default: 5)")
    add("--batch_size", default="auto", help="requests in a forward pass, or auto (default)")
    add("--limit", type=float, help=f"the first N documents of each task but {PERPLEXITY}, or a share below 1")
    add("--device", default="auto", help="cpu, cuda, cuda:N or auto (default)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: bfloat16 on GPUs")
    add("--tokenizer", help="gpt2, bytes or PATH.tiktoken (default: that of the training data, or else gpt2)")
    add("--include_path", metavar="DIR", help="a folder of task files, which go before the harness's own")
    add("--val_data", metavar="DIR", help=f"files of dataset_download.py: {PERPLEXITY} in both protocols")
    add("--use_cache", metavar="PREFIX", help="keep the answers in SQLite files, and take them from there")
    add("--output_path", type=Path, metavar="FILE", help="write everything as JSON")
    add("--list_tasks", action="store_true", help="print the name of every task, and end")
    return parser.parse_args(arguments)


def run(options):
    """Evaluate every checkpoint, write the report and print the table."""
    device, checkpoints, manager = together(lambda: prepare(options))
    records = {}
    try:
        for checkpoint in checkpoints:
            label = str(checkpoint)
            if label in records:
                label += f", {checkpoint.path}"
            try:
                records[label] = evaluate_checkpoint(checkpoint, options, device, manager)
            except InputError as error:
                raise InputError(f"{checkpoint.path}: {error}") from error
    finally:  # a checkpoint that fails must not cost the scores of those before it
        if RANK == 0 and records:
            report(records, options)


def report(records, options):
    """Write the report and print the table."""
    lines = verdicts(records, options)
    try:
        if options.output_path:
            write_report(options.output_path, records, options, lines)
    finally:  # a full disk must not cost the scores, nor a closed pipe the report
        print(*table(records), "", *lines, sep="\n", flush=True)


def main(arguments=None):
    options = parse(arguments)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each setting that is not its own
    show_what_the_terminal_can()
    if "RANK" not in os.environ:
        os.environ.pop("LOCAL_RANK", None)  # left over from another job; the harness would keep its results back
    if WORLD_SIZE > 1 and not dist.is_initialized():
        # gloo is enough for scores. No rank waits in vain: torchrun ends them all when one has ended.
        dist.init_process_group("gloo", timeout=timedelta(weeks=1))

    try:
        if options.list_tasks:
            print(*open_folder(options.include_path).all_tasks, PERPLEXITY, sep="\n")
        else:
            run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        print_error(error)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print_error(f"{error}; lower --batch_size")
        sys.exit(2)
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        sys.exit(2)  # another process has ended, and has said why
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
