"""analysis_computation_profiler.py against the published figures, PyTorch's own FLOP counter, the caches of
real models, and turns whose outcome is known beforehand."""

import csv
import io
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, VARIANTS
from torch.utils.flop_counter import FlopCounterMode

import analysis_computation_profiler as profiler
from analysis_computation_profiler import Variant

BOTH = [(alias, size) for alias, row in VARIANTS.items() for size in row["script"]]
each_variant = pytest.mark.parametrize(("alias", "size"), BOTH)
COMMITTED = json.loads((ROOT / "comprehensive_flop_analysis_300M.json").read_text(encoding="utf-8"))
KEYS = ["QKV", "KV", "Q-KV", "K", "GQA-4", "MQA", "Q-GQA-4", "Q-MQA"]  # in the order of configs/variants.yaml
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 8, "n_inner": 96, "vocab_size": 257, "n_positions": 32}
SETTINGS = ["--set", *(f"{key}={value}" for key, value in TINY.items())]
CPU = torch.device("cpu")
# Published: parameters, of attention alone, and by T the MACs and the profiled FLOPs
PUBLISHED = {
    "QKV": (305_534_976, 83_968_000, {"128": (39_476_789_248, 78_964_195_328),
                                      "2048": (792_689_901_568, 1_586_807_963_648)}),
    "K": (263_550_976, 41_984_000, {"128": (34_108_080_128, 68_226_777_088)}),
}  # fmt: skip
# Outputs of a layer's projections, c_proj aside, at d = 1,024 and d = 2,048: the paper's notation in numbers.
WIDTHS = {
    "300M": {"kqv": 3072, "qk": 2048, "kv": 2048, "k": 1024,
             "gqa": 1536, "mqa": 1152, "qgqa": 1280, "qmqa": 1088},
    "1.2B": {"kqv": 6144, "kv": 4096, "gqa": 3072, "mqa": 2176, "qgqa": 2560, "qmqa": 2112},
}  # fmt: skip
CACHED = {  # bytes a token in bf16
    "300M": {"kqv": 81_920, "qk": 81_920, "kv": 40_960, "k": 40_960,
             "gqa": 20_480, "mqa": 5_120, "qgqa": 10_240, "qmqa": 2_560},
    "1.2B": {"kqv": 180_224, "kv": 90_112, "gqa": 45_056, "mqa": 5_632, "qgqa": 22_528, "qmqa": 2_816},
}  # fmt: skip


def run(*arguments, capsys):
    """Exit status, standard output and standard error of the command line, in this process."""
    status = 0
    try:
        profiler.main(list(arguments))
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def parsed(markdown):
    """{title: rows by header} of the tables of a page."""
    pages = {}
    for block in markdown.split("### ")[1:]:
        title, _, header, rule, *rows = block.rstrip().splitlines()
        assert set(rule) == set("|:-")
        pages[title] = [dict(zip(cells(header), cells(row), strict=True)) for row in rows]
    return pages


def tokens(T, device="meta"):
    return torch.zeros(1, T, dtype=torch.int64, device=device)


def explicit(variant):
    """A context in which the variant's models compute attention as they are counted."""
    return patch.object(variant.script, "causal_attention", profiler.explicit_attention)


@pytest.fixture(scope="module")
def records():
    """What an analysis of 300M comes to, from the committed accounts."""
    everything = {"parameters": [], "compute": [], "kv_cache": []}
    for alias, key in zip(VARIANTS, KEYS, strict=True):
        entries = Variant(alias, "300M"), COMMITTED[key], COMMITTED["QKV"]
        for name, rows in profiler.account_records(*entries, profiler.PAPER_CONTEXTS, 40 * 10**9).items():
            everything[name] += rows
    return everything


@pytest.fixture
def quick(monkeypatch):
    """A small matrix for the bandwidth, so that a measurement takes no second."""
    monkeypatch.setattr(profiler, "READ_BYTES", 2**20)


# ---- counting


@each_variant
def test_three_accounts_agree_at_the_published_widths(alias, size):
    """Two of the layers, which are all alike; test_published_figures has all of them."""
    T, variant = 96, Variant(alias, size, n_layer=2)
    model, d = variant.build(), variant.config.n_embd
    account = profiler.forward_account(variant, model, T)
    with explicit(variant), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(T))

    macs, items = account["theoretical_macs"], account["elementwise_flops"]
    assert macs["attention_per_layer"] == T * d * (WIDTHS[size][alias] + d) + 2 * T * T * d
    assert macs["total"] == account["fvcore_macs"] == counter.get_total_flops() // 2
    by_operator = account["actual_flops"]["by_operator"]
    assert by_operator.pop("aten::mul") == items["score_scaling"]
    assert by_operator.pop("aten::add") == items["residual_adds"] + items["position_add"]
    assert sum(by_operator.values()) == 2 * macs["total"]


@pytest.mark.parametrize("alias", VARIANTS)
def test_counting_goes_by_shapes_and_changes_how_attention_is_computed_alone(alias):
    variant = Variant(alias, "300M", **TINY)
    model, ids = variant.build("cpu"), torch.randint(257, (2, 16))
    with torch.no_grad():
        logits, _ = model(ids)
        with explicit(variant):
            counted, _ = model(ids)
            real = profiler.profiled_flops(model, tokens(16, "cpu"))
    torch.testing.assert_close(counted, logits, rtol=1e-4, atol=1e-5)
    account = profiler.forward_account(variant, variant.build(), 16)
    assert account["actual_flops"]["by_operator"] == real


def test_published_figures():
    """Of QKV, in all its layers; the committed file has them too."""
    variant = Variant("kqv", "300M")
    parameters, attention, by_T = PUBLISHED[variant.key]
    assert (variant.parameters["total"], variant.parameters["attention"]) == (parameters, attention)
    for T, (macs, flops) in by_T.items():
        account = profiler.forward_account(variant, variant.build(), int(T))
        assert account["theoretical_macs"]["total"] == account["fvcore_macs"] == macs
        assert account["actual_flops"]["total_flops"] == flops
        assert account == COMMITTED[variant.key]["analysis_by_seq_len"][T]


@each_variant
def test_parameters(alias, size):
    parameters, c = Variant(alias, size).parameters, Variant(alias, size).config
    width = WIDTHS[size][alias]
    assert parameters["attention"] == c.n_layer * (c.n_embd * (width + c.n_embd) + width + c.n_embd)
    assert parameters["embedding"] == (50_304 + 2_048) * c.n_embd
    assert parameters["layernorm"] == (2 * c.n_layer + 1) * 2 * c.n_embd
    assert parameters["mlp"] == c.n_layer * (8 * c.n_embd**2 + 5 * c.n_embd)
    parts = [parameters[part] for part in ("embedding", "attention", "mlp", "layernorm")]
    assert parameters["total"] == parameters["trainable"] == sum(parts)


# ---- the committed file


@pytest.mark.parametrize(("alias", "key"), list(zip(VARIANTS, KEYS, strict=True)))
def test_committed_accounts_keep_the_schema_of_the_release_and_follow_from_the_formula(alias, key):
    assert list(COMMITTED) == KEYS
    variant, entry = Variant(alias, "300M"), COMMITTED[key]
    assert (entry["model_name"], entry["attention_type"]) == (variant.paper, VARIANTS[alias]["name"])
    assert list(entry["parameters"]) == ["total", "trainable", "embedding", "attention", "mlp", "layernorm"]
    assert entry["parameters"] == variant.parameters
    assert entry["max_seq_len"] == 2048
    assert entry["kv_cache"] == profiler.cache_account(variant, profiler.PAPER_CONTEXTS)
    assert list(entry["analysis_by_seq_len"]) == ["128", "512", "1024", "2048"]
    for T, account in entry["analysis_by_seq_len"].items():
        macs, flops = account["theoretical_macs"], account["actual_flops"]
        assert macs == profiler.theoretical_macs(variant, int(T))
        assert account["fvcore_macs"] == macs["total"]
        items = profiler.elementwise_flops(variant, int(T))
        assert account["elementwise_flops"] == items
        assert flops["total_flops"] == 2 * macs["total"] + items["total"]
        assert flops["total_gflops"] == flops["total_flops"] / 1e9
        assert account["ratio"] == flops["total_flops"] / (2 * macs["total"])
        assert account["overhead_percent"] == pytest.approx(100 * (account["ratio"] - 1))
    assert list(macs) == [
        "attention_per_layer", "mlp_per_layer", "total_attention", "total_mlp", "lm_head", "total",
    ]  # fmt: skip


@pytest.mark.slow
def test_default_run_writes_the_committed_file(tmp_path):
    command = [sys.executable, ROOT / "analysis_computation_profiler.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["comprehensive_flop_analysis_300M.json"]
    fresh = (tmp_path / "comprehensive_flop_analysis_300M.json").read_bytes()
    assert fresh == (ROOT / "comprehensive_flop_analysis_300M.json").read_bytes()
    for figure in ("305,534,976", "1,586,807,963,648", "1,215,102,976", "5,716,521,779,200"):
        assert figure in done.stdout


def test_a_part_of_the_variants_overwrites_no_file(tmp_path, monkeypatch, capsys):
    """And prints the published figures of Q=K=V."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(profiler, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(profiler, "SEQUENCE_LENGTHS", [128])
    part = ["--sizes", "300M", "--variants", "k", "--format", "json"]
    status, out, _ = run(*part, capsys=capsys)
    assert (status, list(tmp_path.iterdir())) == (0, [])
    printed, (parameters, attention, by_T) = json.loads(out), PUBLISHED["K"]
    assert [(row["total"], row["attention"]) for row in printed["parameters"]] == [(parameters, attention)]
    counted = [(row["fvcore_macs"], row["profiled_flops"]) for row in printed["compute"]]
    assert counted == [by_T["128"]]


# ---- the KV cache, computed


@each_variant
def test_cache_bytes_are_those_of_the_scripts_cache(alias, size):
    variant = Variant(alias, size)
    assert variant.cache_bytes() == CACHED[size][alias]
    for dtype, itemsize in ((torch.bfloat16, 2), (torch.float32, 4)):
        cache = variant.script.KVCache(100)
        with torch.no_grad():
            variant.build(dtype=dtype).hidden_states(torch.zeros(3, 7, dtype=torch.int64, device="meta"), cache)
        assert cache.nbytes == 3 * variant.cache_bytes(100, itemsize)
    saved = profiler.cache_account(variant, [])["reduction_percent"]
    assert saved == 100 * (1 - CACHED[size][alias] / CACHED[size]["kqv"])


def test_paper_rows_of_the_cache_as_printed(records):
    (rows,) = parsed(profiler.FORMATS["markdown"]({"kv_cache": records["kv_cache"]})).values()
    printed = {(row[""], row["tokens"]): (row["GB"], row["GiB"]) for row in rows}
    assert printed["QKV", "32,000"] == ("2.62", "2.44")
    assert printed["Q–K=V", "32,000"] == ("1.31", "1.22")
    assert printed["QKV", "128,000"] == ("10.49", "9.77")
    assert printed["Q–K=V", "128,000"] == ("5.24", "4.88")


def test_sequences_that_fit_beside_the_weights():
    variant, cache, weights = Variant("kv", "300M"), 40_960 * 32_000, 2 * 284_542_976
    for memory, fit in (
        (40 * 10**9, 30), (weights + 5 * cache, 5), (weights + 5 * cache - 1, 4), (weights // 2, 0)
    ):  # fmt: skip
        rows = profiler.account_records(variant, COMMITTED["KV"], None, [32_000], memory)["kv_cache"]
        assert [row["sequences"] for row in rows] == [fit]


def test_memory_sizes():
    sizes = {"40GB": 40 * 10**9, "24GiB": 24 * 2**30, "0.5 tb": 5 * 10**11, "1.5GiB": 3 * 2**29}
    assert {text: profiler.memory_size(text) for text in sizes} == sizes


# ---- measuring


def test_roofline_of_the_paper_size():
    """1.2B in bf16, batch 8: what Q–K=V can gain where memory is all that counts."""
    for context, gain in ((2_048, 1.45), (32_000, 1.92)):
        qkv, kv = (profiler.step_bytes(Variant(alias, "1.2B"), context, 8, 2) for alias in ("kqv", "kv"))
        assert round(qkv / kv, 2) == gain


def test_decode_is_measured_through_generate_and_its_cache(capsys, quick):
    status, out, err = run(
        "decode", *SETTINGS, "--variants", "kqv", "kv", "qgqa", "--contexts", "16", "48", "--batches", "3",
        "--steps", "4", "--rounds", "2", "--dtype", "fp32", "--device", "cpu", "--format", "json", capsys=capsys,
    )  # fmt: skip
    printed = json.loads(out)
    assert (status, err, printed["skipped"]) == (0, "", [])
    assert printed["machine"][0]["read_bandwidth"] > 0
    places = [(row["alias"], row["context"], row["batch"]) for row in printed["decode"]]
    assert places == [(alias, context, 3) for context in (16, 48) for alias in ("kqv", "kv", "qgqa")]
    numbers = {"kqv": 2 * 64, "kv": 64, "qgqa": 32}  # cached of a token, a layer
    for row in printed["decode"]:
        cached = row["batch"] * (row["context"] + 5) * 2 * numbers[row["alias"]] * 4  # 48: beyond n_positions
        assert row["cache_bytes"] == row["formula_bytes"] == cached
        for key in ("prefill", "decode"):
            assert 0 < row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
            assert (row[f"{key}_vs_qkv"] == 0) == (row["alias"] == "kqv")
        assert row["of_roofline"] == pytest.approx(100 * row["decode"] / row["roofline"])
        assert row["set"] == " ".join(SETTINGS[1:])


def test_decode_turn_times_the_prompt_and_the_steps_apart(monkeypatch):
    """A clock that is read where the prompt begins, where decoding does, and at the end."""
    times = iter([0.0, 10.0, 14.0])
    monkeypatch.setattr(profiler, "now", lambda device: next(times))
    machine = profiler.Machine(CPU, torch.float32, 1e9)
    turn = profiler.decode_turn(Variant("kv", "300M", **TINY), machine, context=20, batch=3, steps=4)
    assert next(times, None) is None
    assert (turn["prefill"], turn["decode"]) == (3 * 20 / 10, 3 * 4 / 4)
    weights = sum(p.numel() for p in Variant("kv", "300M", **TINY).build().parameters()) - 32 * 64
    assert turn["roofline"] == 3 * 1e9 / (4 * (weights + 3 * 22 * 2 * 64))


def test_variants_take_turns_and_the_first_round_does_not_count():
    calls = []

    def turn(variant):
        calls.append(variant.alias)
        if variant.alias == "large" and len(calls) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        return len(calls)

    variants = [SimpleNamespace(alias=alias) for alias in ("a", "large")]
    results, failed = profiler.take_turns(variants, turn, 2, lambda: None)
    assert calls == ["a", "large", "a", "large", "a"]
    assert results == {"a": [3, 5]}
    assert failed == {"large": "CUDA out of memory. Tried to allocate 9 GiB."}


def test_ranges_and_comparison_with_qkv_are_by_round():
    ours = [{"decode": rate} for rate in (11.0, 30.0, 26.0)]
    record = profiler.over_rounds(ours, [{"decode": rate} for rate in (10.0, 20.0, 20.0)])
    assert [record[f"decode{end}"] for end in ("", "_low", "_high")] == [26, 11, 30]
    assert [round(record[f"decode_vs_qkv{end}"], 6) for end in ("", "_low", "_high")] == [30, 10, 50]
    assert set(profiler.over_rounds(ours, None)) == {"decode", "decode_low", "decode_high"}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="resident memory is Linux's")
def test_peak_memory_is_of_what_came_after():
    before = torch.ones(100 * 2**20, dtype=torch.uint8)
    peak = profiler.PeakMemory(CPU)
    torch.ones(200 * 2**20, dtype=torch.uint8)  # before the restart, and gone
    peak.restart()
    torch.ones(50 * 2**20, dtype=torch.uint8)
    assert 49 * 2**20 < peak.read()["peak_bytes"] < 60 * 2**20  # Linux is off by some pages
    assert before[0] == 1


def test_training_is_measured(capsys, quick):
    status, out, _ = run(
        "train", *SETTINGS, "--variants", "kqv", "kv", "--micro_batch_size", "2", "--seq_length", "16",
        "--steps", "2", "--rounds", "2", "--dtype", "fp32", "--device", "cpu", "--format", "json",
        capsys=capsys,
    )  # fmt: skip
    rows = json.loads(out)["train"]
    assert (status, [row["alias"] for row in rows]) == (0, ["kqv", "kv"])
    assert all(0 < row["train_low"] <= row["train"] <= row["train_high"] and "mfu" not in row for row in rows)


def test_a_training_turn_makes_updates_of_the_micro_batches_it_counts(monkeypatch):
    """MFU as the script counts it, on a GPU that it knows."""
    passes, updates, times = [], [], iter([0.0, 4.0])
    variant = Variant("kv", "300M", **TINY)
    build = variant.build

    def watched(*arguments, **changes):
        model = build(*arguments, **changes)
        model.register_forward_hook(lambda module, inputs, output: passes.append(tuple(inputs[0].shape)))
        return model

    variant.build = watched
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (updates.append(1), step(self)))
    monkeypatch.setattr(profiler, "now", lambda device: next(times))
    mfu, cuda = variant.script.mfu, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setattr(variant.script, "mfu", lambda n, c, run, device, rate: mfu(n, c, run, cuda, rate))
    machine = profiler.Machine(CPU, torch.float32, 1e9)
    turn = profiler.train_turn(variant, machine, micro_batch_size=2, seq_length=16, steps=3)
    assert passes == [(2, 16)] * 6  # two updates, of which one is for warming up
    assert len(updates) == 2
    assert turn["train"] == 3 * 2 * 16 / 4
    flops = 6 * variant.parameters["total"] + 12 * 2 * 64 * 16
    assert turn["mfu"] == pytest.approx(100 * turn["train"] * flops / 312e12)


def test_what_does_not_fit_is_skipped_with_the_allocators_message(capsys, quick):
    """More tokens than a processor has addresses for."""
    status, out, _ = run(
        "decode", *SETTINGS, "--variants", "kv", "--contexts", "16", "--batches", "1", str(10**15),
        "--steps", "1", "--rounds", "1", "--device", "cpu", "--format", "json", capsys=capsys,
    )  # fmt: skip
    printed = json.loads(out)
    assert (status, [row["batch"] for row in printed["decode"]]) == (0, [1])
    (skipped,) = printed["skipped"]
    assert skipped["batch"] == 10**15
    assert "tried to allocate" in skipped["reason"]


# ---- output


def test_csv_carries_every_record(records):
    rows = list(csv.DictReader(io.StringIO(profiler.as_csv(records))))
    assert len(rows) == sum(map(len, records.values()))
    (row,) = (r for r in rows if r["table"] == "compute" and r["alias"] == "k" and r["T"] == "128")
    assert int(row["profiled_flops"]) == 68_226_777_088
    assert float(row["macs_vs_qkv"]) == pytest.approx(100 * (34_108_080_128 / 39_476_789_248 - 1))
    assert row["bytes_per_token"] == ""


def test_a_changed_model_has_no_published_figures_beside_it(capsys, quick):
    status, out, _ = run(
        "decode", *SETTINGS, "--variants", "kv", "--contexts", "4", "--steps", "1", "--rounds", "1",
        "--dtype", "fp32", "--device", "cpu", "--format", "markdown", capsys=capsys,
    )  # fmt: skip
    (title,) = [title for title in parsed(out) if title.startswith("Prefill and decode")]
    assert status == 0 and f"300M with {' '.join(SETTINGS[1:])}" in title
    assert "published" not in parsed(out)[title][0]
    variant = Variant("kv", "1.2B")
    record = variant.label | {"context": 9, "decode": 5.0, "published_decode": variant.published("decode")}
    (_, rows) = parsed(profiler.FORMATS["markdown"]({"decode": [record]})).values()
    assert rows[0]["published"] and rows[0]["decode"] == "5.0"


def test_disagreeing_accounts_end_with_status_1(records, monkeypatch, capsys):
    compute = [row | {"unexplained": 1} for row in records["compute"]]
    monkeypatch.setattr(profiler, "run_accounts", lambda options: records | {"compute": compute})
    status, out, err = run(capsys=capsys)
    assert (status, err.count("\n"), "disagree" in err) == (1, 1, True)
    assert "305,534,976" in out


# ---- command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "foo"], "invalid choice: 'foo'"),
        (["--variants", "qk", "--sizes", "1.2B"], "Q=K–V (qk) has no 1.2B model, only 300M"),
        (["--memory", "40XB"], "expected an amount such as 40GB or 24GiB, got '40XB'"),
        (["--memory", "40"], "expected an amount such as 40GB or 24GiB, got '40'"),
        (["--contexts", "0"], "expected a whole number above 0, got '0'"),
        (["--output_dir", "FILE"], "FILE"),
        (["--output_dir", "FILE/folder"], "FILE/folder"),
        (["train", "--contexts", "9"], "unrecognized arguments: --contexts 9"),
        (["decode", "--set", "seed=7"], "seed=7: expected KEY=VALUE"),
        (["decode", "--set", "n_embd=["], "n_embd=[: expected KEY=VALUE"),
        (["decode", "--set", "n_embd=10", "--set", "n_head=7"], "multiple of n_head"),
        pytest.param(
            ["decode", "--device", "cuda"], "PyTorch finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_errors_take_one_line_before_any_work(arguments, message, tmp_path, monkeypatch, capsys):
    def work(*_):
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    Path("FILE").touch()
    monkeypatch.setattr(profiler, "ProcessPoolExecutor", work)
    monkeypatch.setattr(profiler, "measure", work)
    status, out, err = run(*arguments, capsys=capsys)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert re.match(r"analysis_computation_profiler\.py( \w+)?: error: ", err)
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_commands_of_earlier_versions():
    for earlier, command in (
        ("--measure", "decode"), ("--measure train --steps 2", "train --steps 2"), ("", "count"),
        ("--sizes 300M --measure --contexts 9", "decode --sizes 300M --contexts 9"),
    ):  # fmt: skip
        assert profiler.with_command(earlier.split()) == command.split()


def test_defaults_suit_the_device(monkeypatch):
    def options(*arguments):
        parsed = profiler.command_line().parse_args(arguments)
        profiler.complete(parsed)
        return parsed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cpu = options("decode")
    assert (cpu.device.type, cpu.sizes, cpu.variants) == ("cpu", ["300M"], ["kqv", "kv", "gqa", "qmqa"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    gpu = options("decode")
    assert (gpu.device.type, gpu.dtype, gpu.sizes, gpu.variants) == ("cuda", "bf16", None, None)
    training = options("train", "--seq_length", "512")
    assert profiler.points_of(training, "300M") == [{"micro_batch_size": 6, "seq_length": 512, "steps": 24}]
