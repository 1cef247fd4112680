"""Shared fixtures. The hubs are switched off before any library that would reach for them is imported."""

import atexit
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    WANDB_MODE="offline",
    WANDB_SILENT="true",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",  # threads that wait for each other make tiny models slow
    HF_HOME=tempfile.mkdtemp(prefix="hf_home_"),  # in the place of the user's cache
    NO_PROXY="127.0.0.1,localhost",  # where tests serve files
    no_proxy="127.0.0.1,localhost",
)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
# A shell's background job ignores Ctrl-C, and nohup SIGHUP, and the processes under test would inherit that.
# They do not inherit a handler.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

import dataset_download  # noqa: E402

# In this order, so that no worker of pytest-xdist is left alone with one of them at the end.
LONGEST_FILES = (
    "test_readme.py", "test_gate.py", "test_run_eval.py", "test_dataset_interruptions.py", "test_survival.py",
)  # fmt: skip
GPT2_RANKS = Path(os.environ.get("GPT2_RANKS", ROOT.parent / "shared/data/gpt2.tiktoken"))  # not in the repository
VARIANTS = yaml.safe_load((ROOT / "configs/variants.yaml").read_text(encoding="utf-8"))

hypothesis.settings.register_profile("a busy machine", deadline=None)
hypothesis.settings.load_profile("a busy machine")


def pytest_collection_modifyitems(items):
    """The longest files first; the order within a file stays."""
    first = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: first.get(item.path.name, len(first)))


def script_of(alias, size="300M"):
    """The training script of a variant, imported."""
    return import_module(VARIANTS[alias]["script"][size].removesuffix(".py"))


def gpt2_of(model, **settings):
    """transformers' GPT-2 with the weights of a QKV model, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {name: getattr(model.config, name) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, activation_function="gelu", **settings))
    transposed = {name for name in model.state_dict() if ".c_" in name and name.endswith("weight")}  # stored [in, out]
    weights = {f"transformer.{name}": w.T if name in transposed else w for name, w in model.state_dict().items()}
    gpt2.load_state_dict(weights | {"lm_head.weight": model.wte.weight})
    return gpt2.eval()


# A model of a few thousand parameters and a run of eight steps on it, as KEY=VALUE settings.
TINY_MODEL = ["vocab_size=257", "n_positions=32", "n_embd=32", "n_layer=2", "n_head=2", "n_inner=64"]
TINY_RUN = [
    "sequence=packed", "seq_length=32", "micro_batch_size=2", "gradient_accumulation=2", "num_gpus=2",
    "target_tokens=2048", "learning_rate=1e-2", "min_lr=1e-3", "warmup_steps=2", "precision=fp32", "compile=false",
    "log_interval=1", "eval_interval=4", "eval_batches=null", "save_interval=2", "sample_tokens=8",
]  # fmt: skip
SENTENCES = [
    f"Document {i} says that {i} times {j} is {i * j}, and that is all there is to say about it." * (1 + i % 3)
    for i, j in enumerate(range(40, 160))
]


def prepare(folder, texts, validation_tokens=1500):
    """Token files of the byte tokenizer for a list of texts; returns the KEY=VALUE settings that name them."""
    source = folder / "texts"
    source.mkdir(parents=True)
    for i, text in enumerate(texts):
        (source / f"{i:04}.txt").write_text(text, encoding="utf-8")
    dataset_download.main([
        "--source", str(source), "--tokenizer", "bytes", "--target_tokens", "1e6", "--chunk_tokens", "4000",
        "--validation_tokens", str(validation_tokens), "--output_dir", str(folder / "data"),
    ])  # fmt: skip
    return [f"train_data={folder / 'data/train'}", f"val_data={folder / 'data/validation'}"]


# -----------------------------------------------------------------------------
# Runs of the tiny model, in this process or in others

SCRIPT = ROOT / "transformer_KV_1_300_M.py"
ENDLESS = "target_tokens=1000000000000"  # a run that no signal can come too late for
PATIENCE = 120  # seconds to an end, the start of the processes on a busy machine included


def arguments(data, output_dir, *settings):
    """The command line of a run of eight steps, with a checkpoint after every second."""
    configs = [f"--{kind}_config={ROOT}/configs/{kind}_config_demo.yaml" for kind in ("model", "train")]
    return [*configs, f"--output_dir={output_dir}", *TINY_MODEL, *TINY_RUN, *data, *settings]


def metrics(output_dir):
    """The records of a run, without the one field that no two runs share."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def weights(path):
    return torch.load(path, weights_only=True)["model_state_dict"]


def assert_same_weights(left, right):
    expected, found = weights(left), weights(right)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected), (left, right)


def assert_same_run(left, right):
    """Bit-identical weights at the end and in every checkpoint, and the same log."""
    assert metrics(left) == metrics(right)
    for name in ["final_model.pt", *(path.name for path in left.glob("checkpoint_step_*.pt"))]:
        assert_same_weights(left / name, right / name)


def failing_run(args, capsys, script):
    """The one line with which the script says why it cannot go on."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main(args)
    assert stop.value.code == 2
    del stop
    gc.collect(1)  # the traceback holds the lock of the folder, which in a process of its own ends with it
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script.__name__}.py: error: "), lines
    return lines[0]


def steps_of(output_dir):
    """The steps of the checkpoints in a folder."""
    return [int(path.stem.rpartition("_")[2]) for path in script_of("kv").checkpoints(output_dir)]


def to_a_moment(moment, action, args):
    """The command line of SCRIPT, to be killed or held at a moment; see to_a_moment.py."""
    return [str(ROOT / "tests/to_a_moment.py"), moment, str(action), str(SCRIPT), *args]


def start(*command, ranks=None, **options):
    """A script in a process of its own, or in the ranks of torchrun."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, *launch, *map(str, command)], **options)


def start_ranks(*commands, folders=None):
    """Ranks with a command line each, and folders to start in, in less time than torchrun takes."""
    folders = folders or [ROOT] * len(commands)
    ranks = [(str(folder), [*map(str, command)]) for folder, command in zip(folders, commands, strict=True)]
    return start(ROOT / "tests/forked_ranks.py", json.dumps(ranks))


def completed(process):
    """What a process wrote to stdout, once it has ended well."""
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    return output


def wait_until_held(process, file):
    """Returns once the process has come to its moment."""
    while not file.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="session")
def whole_run(data, tmp_path_factory):
    """The folder of an uninterrupted run with dropout."""
    output_dir = tmp_path_factory.mktemp("whole") / "run"
    script_of("kv").main(arguments(data, output_dir, "dropout=0.1"))
    return output_dir


@pytest.fixture
def half(whole_run, tmp_path):
    """The folder that a kill between steps 4 and 6 of that run leaves."""
    output_dir = Path(shutil.copytree(whole_run, tmp_path / "half"))
    for name in ("final_model.pt", "checkpoint_step_6.pt", "checkpoint_step_8.pt"):
        (output_dir / name).unlink()
    return output_dir


@pytest.fixture(autouse=True)
def signal_handlers():
    """main() keeps the signals that it has taken over."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Settings that name a small prepared data set: about 10,000 tokens in three chunks."""
    return prepare(tmp_path_factory.mktemp("prepared"), SENTENCES)


@pytest.fixture(scope="session")
def data_dir(data):
    """The folder with the train and validation splits of that data set."""
    return Path(data[0].partition("=")[2]).parent
