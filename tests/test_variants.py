"""The fourteen scripts are the paper's: what the table says of them, what they share, how long they may be,
that each trains as a user would start it, and that a shared key and value are one tensor."""

import difflib
import json
import re
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, VARIANTS, arguments, metrics, script_of
from torch.profiler import ProfilerActivity, profile

SCRIPTS = [(alias, size) for alias, row in VARIANTS.items() for size in row["script"]]
BOTH_SIZES = [alias for alias, row in VARIANTS.items() if len(row["script"]) == 2]
SHARED = [alias for alias, row in VARIANTS.items() if row["cached"] == ["k"]]
each_script = pytest.mark.parametrize(("alias", "size"), SCRIPTS)
ATTENTION = re.compile(r"^# \[variant: attention\]\n(.*?)^# \[end of variant\]\n", re.DOTALL | re.MULTILINE)
IN_FILE_NAMES = {"300M": "300_M", "1.2B": "1_2B"}
# The paper's notation, and the release's folders
PAPER = {
    "kqv": "QKV", "qk": "Q=K–V", "kv": "Q–K=V", "k": "Q=K=V", "gqa": "GQA", "mqa": "MQA", "qgqa": "Q-GQA",
    "qmqa": "Q-MQA",
}  # fmt: skip
OUTPUT_DIRS = {
    "300M": {
        "kqv": "outputs_kqv", "qk": "outputs_kv", "kv": "outputs_qkv_k_equals_v", "k": "outputs_k",
        "gqa": "outputs_gqa", "mqa": "outputs_mqa", "qgqa": "outputs_q_gqa", "qmqa": "outputs_qmqa",
    },
    "1.2B": {
        "kqv": "outputs_1.2B_kqv", "kv": "outputs_1.2B_qkv_k_equals_v", "gqa": "outputs_1.2B_gqa",
        "mqa": "outputs_1.2B_mqa", "qgqa": "outputs_1.2B_q_gqa", "qmqa": "outputs_1.2B_qmqa",
    },
}  # fmt: skip
BYTES_A_TOKEN = {  # in bf16
    "300M": {
        "kqv": 81_920, "qk": 81_920, "kv": 40_960, "k": 40_960, "gqa": 20_480, "mqa": 5_120, "qgqa": 10_240,
        "qmqa": 2_560,
    },
    "1.2B": {"kqv": 180_224, "kv": 90_112, "gqa": 45_056, "mqa": 5_632, "qgqa": 22_528, "qmqa": 2_816},
}  # fmt: skip


def text_of(alias, size="300M"):
    return (ROOT / VARIANTS[alias]["script"][size]).read_text(encoding="utf-8")


def changed_lines(left, right):
    """As `diff` counts them; with autojunk, difflib does not match the blank ones."""
    matcher = difflib.SequenceMatcher(None, left.splitlines(), right.splitlines(), autojunk=False)
    return sum(i2 - i1 + j2 - j1 for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal")


# ---- the table


def test_the_table_names_every_script_and_no_other():
    named = [name for row in VARIANTS.values() for name in row["script"].values()]
    assert sorted(named) == sorted(path.name for path in ROOT.glob("transformer_*.py"))
    assert len(named) == 14


def test_the_table_is_the_paper_s():
    assert {alias: row["paper"] for alias, row in VARIANTS.items()} == PAPER
    for size, folders in OUTPUT_DIRS.items():
        rows = {alias: row for alias, row in VARIANTS.items() if size in row["script"]}
        assert {alias: row["output_dir"][size] for alias, row in rows.items()} == folders
    groups = {alias: row["groups"] for alias, row in VARIANTS.items() if row["groups"]}
    several, one = {"300M": 4, "1.2B": 8}, {"300M": 1, "1.2B": 1}
    assert groups == {"gqa": several, "mqa": one, "qgqa": several, "qmqa": one}


@each_script
def test_a_script_s_constants_and_class_are_those_of_the_table(alias, size):
    script, row = script_of(alias, size), VARIANTS[alias]
    groups = row["groups"] and row["groups"][size]
    paper = f"{row['paper']}-{groups}" if alias in ("gqa", "qgqa") else row["paper"]
    assert script.__name__ == f"transformer_{script.VARIANT}_{IN_FILE_NAMES[size]}"
    constants = script.PAPER_NAME, script.SIZE, list(script.CACHED), script.N_KV_GROUPS, script.OUTPUT_DIR
    assert constants == (paper, size, row["cached"], groups, row["output_dir"][size])
    assert [name for name in vars(script) if name.startswith("GPT")] == [row["class"]]


@each_script
def test_a_script_s_docstring_tells_its_own_name_folder_and_cache(alias, size):
    script, name = script_of(alias, size), VARIANTS[alias]["script"][size]
    assert script.__doc__.startswith(f"{script.PAPER_NAME} at {size}: ")
    assert set(re.findall(r"transformer_\w+", script.__doc__)) == {script.__name__}
    assert script.__doc__.count(name) == 3
    assert set(re.findall(r"(outputs_[\w.]+?)_masked\b", script.__doc__)) == {script.OUTPUT_DIR}
    assert f" {BYTES_A_TOKEN[size][alias]:,} bytes in bf16" in script.__doc__


# ---- the text


@pytest.mark.parametrize("alias", BOTH_SIZES)
def test_the_attention_is_the_same_text_at_both_sizes(alias):
    (small,), (large,) = (ATTENTION.findall(text_of(alias, size)) for size in ("300M", "1.2B"))
    assert small == large
    assert small.startswith("class ")


@each_script
def test_a_script_has_at_most_950_lines_that_fit_the_screen_with_the_attention_on_the_first(alias, size):
    lines = text_of(alias, size).splitlines()
    assert len(lines) <= 950 and max(map(len, lines)) <= 110
    assert lines.index("class CausalSelfAttention(nn.Module):") < 100


@pytest.mark.parametrize("size", ["300M", "1.2B"])
def test_any_two_variants_of_a_size_differ_by_a_page(size):
    texts = [text_of(*script) for script in SCRIPTS if script[1] == size]
    assert max(changed_lines(*pair) for pair in combinations(texts, 2)) <= 60


# ---- every script, as a user starts it


@each_script
def test_a_start_ends_in_the_folder_of_the_paper_in_a_model_that_either_size_loads(
    alias, size, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    row = VARIANTS[alias]
    folder = tmp_path / row["output_dir"][size]
    args = arguments(data, folder, "target_tokens=512", "n_head=8", "n_embd=64")  # as many as the most groups
    script_of(alias, size).main([arg for arg in args if not arg.startswith("--output_dir")])
    assert [record["kind"] for record in metrics(folder)] == ["val", "train", "train", "final"]
    for reader in row["script"]:
        script = script_of(alias, reader)
        model, cache = script.load_model(folder / "final_model.pt").bfloat16(), script.KVCache(32)
        assert type(model).__name__ == row["class"]
        assert model.config.n_kv_groups == (row["groups"] and row["groups"][size])
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
        assert cache.nbytes == len(row["cached"]) * 2 * 32 * (model.config.n_kv_groups or 8) * 8 * 2


# ---- K=V: one tensor


def decode_step(alias, trace, dtype=torch.float32):
    """The bytes of a layer's cached K, and of each tensor allocated while one more token fills the cache."""
    script, past = script_of(alias), 1999
    groups = {"qgqa": 4, "qmqa": 1}.get(alias)
    shape = {"vocab_size": 61, "n_positions": 2000, "n_embd": 256, "n_layer": 2, "n_head": 8, "n_inner": 64}
    config = script.ModelConfig(**shape, n_kv_groups=groups)
    model = getattr(script, VARIANTS[alias]["class"])(config).eval().to(dtype)
    with torch.no_grad():
        cache = script.KVCache(2000)
        model(torch.zeros(3, past, dtype=torch.int64), cache=cache)
        token = torch.zeros(3, 1, dtype=torch.int64)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            model(token, cache=cache)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    sizes = [event["args"]["Bytes"] for event in events if event["name"] == "[memory]"]
    return cache.nbytes // 2, [size for size in sizes if size > 0]


@pytest.mark.parametrize("alias", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_step_allocates_no_second_tensor_of_the_size_of_the_cached_keys(alias, dtype, tmp_path):
    """Not even in sum, all layers together, the buffers of the fused attention included; but for bf16, whose
    products take several of 70 kB."""
    keys, allocated = decode_step(alias, tmp_path / "trace.json", dtype)
    assert keys == 3 * 2000 * {"qgqa": 4, "qmqa": 1}.get(alias, 8) * 32 * dtype.itemsize
    assert len(allocated) > 20
    assert (sum(allocated) if dtype == torch.float32 else max(allocated)) < keys


COPIES = {
    "a copy of the value": lambda k, v, shared: (k, v.clone()),
    "repeated heads": lambda k, v, shared: [x.repeat_interleave(shared, dim=1) for x in (k, v)],
}


@pytest.mark.parametrize(("alias", "copy"), [("kv", "a copy of the value"), ("qgqa", "repeated heads")])
def test_an_attention_that_copies_would_be_found(alias, copy, tmp_path, monkeypatch):
    fused = F.scaled_dot_product_attention

    def copying(q, k, v, *arguments, **options):
        k, v = COPIES[copy](k, v, q.shape[1] // k.shape[1])
        return fused(q, k, v, *arguments, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", copying)
    keys, allocated = decode_step(alias, tmp_path / "trace.json")
    assert max(allocated) >= keys
