"""Every command and every piece of code in README.md and the docs: run in a copy of the repository.

What makes a command small is added at its end, where the last of two values counts; SMALL says what.
"""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import lm_eval
import pytest
import torch
from conftest import ROOT, SENTENCES, TINY_MODEL, TINY_RUN, VARIANTS, script_of
from test_run_eval import FORMATS, build, save, write_task
from transformers import LlamaConfig, LlamaForCausalLM

from common import load_tokenizer
from export_hf import fast_tokenizer

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
PAGES = f"{README}\n{OPERATIONS}\n{DESIGN}"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGES, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```", "", PAGES, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = ("diff", "make", "pip", "pytest", "python", "sed", "torchrun")


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


def commands():
    """All of them once, in their order: lines of the bash blocks, and code in the text that is a command."""
    texts = [re.sub(r"\\\n\s*", "", text) for text in blocks("bash") if not text.startswith("#!")]
    lines = [line for text in texts for line in text.splitlines()]
    lines = [re.sub(r"\s+# .*", "", line) for line in lines]
    in_text = [
        code for code in re.findall(r"`([^`\n]+)`", PROSE) if code.startswith(PROGRAMS) and " " in code
    ]
    return list(dict.fromkeys(filter(None, lines + in_text)))


TINY = " ".join([*TINY_MODEL, *TINY_RUN, "eval_batches=4"])
CONFIGS = "--model_config configs/model_config_demo.yaml --train_config configs/train_config_demo.yaml"
SMALL_PYTHON = f"""#!/bin/sh
case "$1" in
    dataset_download.py) exec {sys.executable} "$@" --target_tokens 9e4 --validation_tokens 3e3 ;;
    transformer_*) exec {sys.executable} "$@" {TINY} n_head=4 sequence=padded ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
TRAINED = f"{TINY} --output_dir $(mktemp -d -p .)"
ENVIRONMENT = f"BIN={Path(sys.executable).parent} --assume-old=.venv/installed"
COUNTED = "--sizes 300M --variants kv --contexts 16 --output_dir elsewhere"
MEASURED = (
    "--variants kqv kv --rounds 1 --steps 1 --set n_layer=1 n_embd=32 n_head=2 n_inner=64 vocab_size=64"
)
TEXTS = "--source texts --tokenizer bytes --target_tokens 9e3 --validation_tokens 900"
SMALL = [  # how a command begins, and what is added to it; the first that fits
    ("make demo", f"{ENVIRONMENT} DEMO='{CONFIGS} {TINY} --output_dir outputs_tried'"),
    ("make replicate", "BIN=small_bin --assume-old=.venv/installed"),
    ("make", "--dry-run"),
    ("pip install -r requirements.txt", "--no-index --quiet"),  # all of them are installed
    ("pip install flash-attn", None),  # needs a GPU
    ("diff", "> page || test $? = 1"),
    ("sed", ""),
    ("pytest", None),  # of this suite
    ("python dataset_download.py --verify", "--output_dir slimpajama_data"),
    ("python dataset_download.py", f"{TEXTS} --output_dir prepared"),
    ("python analysis_computation_profiler.py train", f"{MEASURED} --seq_length 16"),
    ("python analysis_computation_profiler.py decode", f"{MEASURED} --contexts 8"),
    ("python analysis_computation_profiler.py", COUNTED),
    ("python results_table.py results", ""),
    ("python results_table.py", "results/reduced_scale"),
    ("python tests/benchmarks/decode.py", "--scenes short --dtypes fp32 --variants kv --rounds 1"),
    ("python tests/benchmarks/attention.py", "--layers 1 --context 64 --rounds 1"),
    ("python tests/benchmarks/evaluation.py", "--requests 8 --rounds 1"),
    ("python tests/benchmarks/training.py", "--layers 1 --rounds 1"),
    ("python tests/benchmarks/ranks.py", "--rounds 1 --steps 5"),
    ("python run_eval.py", "--tasks piqa --include_path FOLDER --tokenizer bytes --limit 2"),
    (
        "torchrun --nproc_per_node=8 run_eval.py",
        "--tasks piqa --include_path FOLDER --tokenizer bytes --limit 2",
    ),
    ("python share_kv.py", "--tokens 2048 --fit_epochs 1"),
    ("python convert_checkpoint.py", ""),
    ("python export_hf.py", "--tokenizer bytes"),
    ("python transformer_", TRAINED),
    ("torchrun", TRAINED),
]
SLOW = {  # of the real width, and twenty runs
    "python tests/benchmarks/training.py", "python tests/benchmarks/training.py --rounds 3", "make replicate",
}  # fmt: skip
HERE = {  # what a command needs that this machine has not; one after the other
    "torchrun --nproc_per_node=8": "torchrun --standalone --nproc_per_node=2",
    "--nproc_per_node=8": "--nproc_per_node=2",
    "--nnodes=2": "--nnodes=1",
    "node1:29500": "localhost:0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "tiny_llama",
}


def tiny_llama(folder):
    """A random model of transformers with rotary positions and grouped heads, and a tokenizer of bytes."""
    settings = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**settings, **heads)).save_pretrained(folder)
    fast_tokenizer(load_tokenizer("bytes"), 257, 128).save_pretrained(folder)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository, with small data and checkpoints where the README's commands look for them."""
    clone = tmp_path_factory.mktemp("clone") / "repository"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "outputs_*", "*_data", "wandb")
    shutil.copytree(ROOT, clone, ignore=left_out)
    (clone / "small_bin").mkdir()
    (clone / "small_bin/python").write_text(SMALL_PYTHON, encoding="utf-8")
    (clone / "small_bin/python").chmod(0o755)
    (clone / "texts").mkdir()
    for i, text in enumerate(SENTENCES):
        (clone / f"texts/{i:03}.txt").write_text(text, encoding="utf-8")
    run(f"python dataset_download.py {TEXTS}", clone)
    run(re.search(r"python dataset_download.py --source stdlib .*", MAKEFILE)[0], clone)  # of `make demo`
    for alias, name in (
        ("kqv", "a.pt"), ("kv", "b.pt"), ("kv", "outputs_demo/final_model.pt"),
        ("kqv", "outputs_kqv/final_model.pt"),
        ("kv", "outputs_qkv_k_equals_v/final_model.pt"),
        ("kv", "outputs_1.2B_qkv_k_equals_v/checkpoint_step_8000.pt"),
        ("kv", "outputs_1.2B_qkv_k_equals_v/final_model.pt"),
    ):  # fmt: skip
        (clone / name).parent.mkdir(exist_ok=True)
        save(build(alias, n_positions=2048), alias, clone / name)
    tiny_llama(clone / "tiny_llama")
    (clone / "prose").mkdir()
    (clone / "prose/a.txt").write_text("\n".join(SENTENCES), encoding="utf-8")
    (clone / "held_out.txt").write_text("\n".join(SENTENCES[:20]), encoding="utf-8")
    (clone / "FOLDER").mkdir()
    write_task(clone / "FOLDER", "piqa", [FORMATS["piqa"](i) for i in range(12)])
    (task,) = blocks("yaml")  # the README's own in place of that one, on the same documents
    assert "/PATH/OF/lm_eval/" in task and "piqa_train.jsonl" in task
    task = task.replace("/PATH/OF/lm_eval", str(Path(lm_eval.__file__).parent))
    (clone / "FOLDER/piqa.yaml").write_text(task.replace("piqa_", f"{clone}/FOLDER/piqa_"), encoding="utf-8")
    return clone


def environment(clone):
    """This interpreter under the names that the README uses, and data sets in a temporary folder."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {
        "PATH": path,
        "HF_DATASETS_CACHE": str(clone / "datasets"),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def run(command, clone, **changes):
    started = partial(subprocess.run, shell=True, cwd=clone, capture_output=True, text=True)
    ended = started(command, env=environment(clone) | changes)
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def smaller(command):
    """What is run in place of a command, or None."""
    added = next(added for beginning, added in SMALL if command.startswith(beginning))
    for there, here in HERE.items():
        command = command.replace(there, here)
    return None if added is None else f"{command} {added}"


def cases():
    """The commands that are run, under their own text as their names."""
    for command in commands():
        if runnable := smaller(command):
            marks = [pytest.mark.slow, pytest.mark.timeout(1800)] if command in SLOW else []
            yield pytest.param(runnable, id=command, marks=marks)


@pytest.mark.parametrize("command", list(cases()))
def test_a_command_runs(command, clone):
    run(command, clone)


def test_the_readme_is_short():
    assert README.count("\n") <= 220


def test_the_files_that_are_named_exist():
    """In code and in the commands of tables; tests/test_docs.py follows the links."""
    names = re.findall(r"(?:[\w.]+/)*[\w.]+\.(?:py|yaml|json|txt|png|md)\b", PAGES)
    ours = [name for name in names if name.startswith(("transformer_", "configs/", "tests/", "results"))]
    assert ours
    assert not [name for name in ours if not (ROOT / name).exists()]


def test_the_python_of_the_paper_s_run(clone, monkeypatch, capsys):
    """On CPU, on a prompt of its own; the bytes it prints are K's alone."""
    (code,) = [text for text in blocks("python") if "load_model" in text]
    monkeypatch.chdir(clone)
    exec(code.replace('"cuda"', '"cpu"'), {"prompt": torch.zeros(2, 3, dtype=torch.int64)})
    evaluation, cached = capsys.readouterr().out.splitlines()
    assert ast.literal_eval(evaluation)["text_perplexity"] > 1
    assert int(cached) == 2 * 2 * 2048 * 32 * 4  # rows x layers x positions x d, fp32


def test_the_slurm_script_trains(clone):
    """With an srun that runs its command, and a scontrol that knows this machine alone."""
    (script,) = [text for text in blocks("bash") if text.startswith("#!")]
    assert script.rstrip().endswith(".py")
    for there, here in {"--nproc_per_node=8": "--nproc_per_node=2", ":29500": ":0"}.items():
        script = script.replace(there, here)
    programs = clone / "slurm"
    programs.mkdir()
    for name, does in (("srun", 'exec "$@"'), ("scontrol", "echo localhost")):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    (clone / "job.sh").write_text(f"{script.rstrip()} --output_dir outputs_job {TINY}", encoding="utf-8")
    job = {"SLURM_NNODES": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    run("bash job.sh", clone, PATH=f"{programs}{os.pathsep}{environment(clone)['PATH']}", **job)
    assert (clone / "outputs_job/final_model.pt").exists()


# ---- Q–K=V in a model of one's own

CONFIG = {"n_embd": 48, "n_layer": 1, "n_head": 4, "n_kv_groups": None, "dropout": 0.0}
CONFIG |= {"use_flash_attention": True}


def copied(clone):
    """The README's way of copying: the names it lists, then what its command cuts out, as a module."""
    (cut,) = [command for command in commands() if command.startswith("sed")]
    (names,) = [text for text in blocks("python") if "flash_attn_func" in text]
    run(cut, clone)
    assert (clone.parent / "qkv_attention.py").read_text().count("\n") < 100
    module = {"__name__": "copied"}
    exec(names + (clone.parent / "qkv_attention.py").read_text(), module)
    return SimpleNamespace(**module)


def changed_lines():
    """The README's two pieces of a forward: of Q–K=V, and of Q–K=V with rotary positions."""
    plain, rotary = (text for text in blocks("python") if "causal_attention(" in text)
    return plain, rotary


def test_what_is_copied_works_alone(clone):
    """It gives what the script's attention gives, at once and through the cache."""
    script, config, own = script_of("kv"), SimpleNamespace(**CONFIG), copied(clone)
    torch.manual_seed(0)
    attention, x = own.CausalSelfAttention(config, 0), torch.randn(2, 9, 48)
    original = script.CausalSelfAttention(config, 0)
    original.load_state_dict(attention.state_dict())
    torch.testing.assert_close(attention(x), original(x), rtol=0, atol=0)
    cache = own.KVCache(9)
    torch.testing.assert_close(in_pieces(attention, x, cache), attention(x))
    assert cache.nbytes == 2 * 9 * 48 * 4


def in_pieces(attention, x, cache, cuts=(0, 4, 5, 9)):
    """What an attention gives when it reads x through a cache, a piece at a time."""
    given = []
    for start, end in pairwise(cuts):
        given.append(attention(x[:, start:end], cache))
        cache.length = end
    return torch.cat(given, dim=1)


def test_the_lines_that_change_are_those_of_the_script():
    script = ast.parse(Path(script_of("kv").__file__).read_text(encoding="utf-8"))
    statements = {ast.unparse(node) for node in ast.walk(script) if isinstance(node, ast.stmt)}
    assert {ast.unparse(node) for node in ast.parse(changed_lines()[0]).body} <= statements


def rotate(x, positions):
    """Rotary embedding of [B, heads, T, head_dim], in pairs of complex numbers."""
    frequencies = 100 ** -(torch.arange(x.shape[-1] // 2) / (x.shape[-1] // 2))
    turns = torch.polar(torch.ones(len(positions), len(frequencies)), positions[:, None] * frequencies)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns).flatten(-2)


def rotary_attention(own, config):
    """The script's attention with the README's lines for rotary positions in place of its own."""
    source = Path(script_of("kv").__file__).read_text(encoding="utf-8")
    (original,) = [
        node for node in ast.parse(source).body if getattr(node, "name", "") == "CausalSelfAttention"
    ]
    (forward,) = [node for node in original.body if getattr(node, "name", "") == "forward"]
    plain, rotary = (ast.parse(lines).body for lines in changed_lines())
    append, attend = plain[-2:]  # the cache and the product; the projections before them stay
    start = [ast.unparse(node) for node in forward.body].index(ast.unparse(append))
    assert ast.unparse(forward.body[start + 1]) == ast.unparse(attend)
    forward.body[start : start + 2] = rotary
    module = {**vars(own), "rotate": rotate}
    exec(f"from __future__ import annotations\n{ast.unparse(original)}", module)
    return module["CausalSelfAttention"](config, 0)


def test_with_rotary_positions_only_distances_count(clone):
    """Through the cache as without it; and the explicit sum over the past, with the values not turned."""
    config, own = SimpleNamespace(**CONFIG), copied(clone)
    torch.manual_seed(0)
    attention, x = rotary_attention(own, config), torch.randn(1, 9, 48)
    cache = own.KVCache(9)
    torch.testing.assert_close(in_pieces(attention, x, cache), attention(x), rtol=1e-4, atol=1e-5)
    q, k = (layer(x)[0].view(9, 4, 12).transpose(0, 1) for layer in (attention.c_q, attention.c_k))
    for offset in (0, 5):  # other positions, the same distances
        turned_q, turned_k = (rotate(y[None], torch.arange(9) + offset)[0] for y in (q, k))
        scores = torch.einsum("htd,hsd->hts", turned_q, turned_k) / math.sqrt(12)
        shares = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(dim=-1)
        y = torch.einsum("hts,hsd->thd", shares, k).reshape(1, 9, 48)
        torch.testing.assert_close(attention(x), attention.c_proj(y), rtol=1e-4, atol=1e-5)


# ---- figures


def results():
    """The committed results of `make replicate`: trained with the padding scored, and with it masked."""
    tables = json.loads((ROOT / "results/reduced_scale/results_table.json").read_text(encoding="utf-8"))
    (scored,), (masked,) = (
        [t for t in tables if t["title"][-1].endswith(how)] for how in ("scored", "masked")
    )
    return [{row["alias"]: row for row in table["rows"]} for table in (scored, masked)]


def with_change(value, change, form):
    """A perplexity and its change against QKV in percent, as a cell of the README."""
    return f"{value:{form}}" + (f" ({change:+.1f} %)" if change else "")


def test_the_first_table_holds_the_published_and_the_committed_results():
    scored, _ = results()
    assert scored.keys() == {alias for alias, row in VARIANTS.items() if row["published"]}
    lines = README.partition("\n## ")[0].splitlines()
    for alias, row in scored.items():
        paper, published = VARIANTS[alias]["paper"], VARIANTS[alias]["published"]
        cells = []
        for size, form in (("300M", ".2f"), ("1.2B", ".3f")):
            change = published.get("perplexity_change", {}).get(size)
            value = published["perplexity"].get(size)
            cells.append(with_change(value, change, form) if value else "")
        for key in ("perplexity", "text_perplexity"):
            cells.append(with_change(row[key], row[f"{key}_vs_qkv"], ".2f"))
        (line,) = [line for line in lines if re.match(rf"\| (\*\*)?{re.escape(paper)}(-4, .*?)?(\*\*)? \| ", line)]
        assert line.endswith(f"| {' | '.join(cells)} |".replace("|  |", "| |")), line


def test_the_effect_of_scoring_the_padding_is_that_of_the_committed_results():
    scored, masked = (table["kv"] for table in results())
    of_all, of_text = (f"{scored[f'{key}_vs_qkv']:+.1f} %" for key in ("perplexity", "text_perplexity"))
    row = rf"^\| .*scored.* \| {re.escape(of_all)} \| {re.escape(of_text)} \|$"
    assert re.search(row, OPERATIONS, re.MULTILINE)
    of_text = f"{masked['text_perplexity_vs_qkv']:+.1f} %"
    assert re.search(rf"^\| .*masked.* \| \| {re.escape(of_text)} \|$", OPERATIONS, re.MULTILINE)
