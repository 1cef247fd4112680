"""The grid of results/conversion/README.md. It starts from the runs of runs/scaling.sh, so run that first.

    python runs/conversion.py                          # all parts, two jobs at a time, a thread each
    python runs/conversion.py --parts 1 2 3 --jobs 8
    python runs/conversion.py --scaling results/scaling_own --results results/conversion_own

A run that is recorded is not repeated, nor is a conversion that stands in one_shot.jsonl. A run that fails is
named, and the others go on. Ctrl-C (or SIGTERM to the process group) saves a checkpoint of the runs under
way; the same command continues from there. Checkpoints are not in git: in a fresh clone run
`RESULTS=results/scaling_own make scaling`, and then the last of the commands above.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conversion_tables
from gather import finished, gather, refuse_another_text, text_of
from one_shot import SHARED, missing
from other_conversions import DEFAULT, WAYS

from common import ROOT, VARIANTS, InputError, Parser, script_of
from results_table import read_runs

PYTHON = os.environ.get("PYTHON", sys.executable)
OUTPUTS = Path("outputs_conversion")
SEEDS = (42, 43, 44)


class Failed(Exception):
    """A job failed; the others go on. Any other exception stops all of them."""


@dataclass(frozen=True)
class Source:
    """A run from the start. Its shape is a width of runs/scaling.sh, a width and a number of heads (96h8), or
    replica; `n` is tokens per parameter.
    """

    alias: str
    shape: str
    n: int
    seed: int

    @property
    def grouped(self):
        return self.alias in ("gqa", "qgqa")

    @property
    def configs(self):
        """Files and settings of its model and recipe."""
        width, _, heads = self.shape.partition("h")
        model, train = ("replicate",) * 2 if self.shape == "replica" else (f"scaling_{width}", "scaling")
        arguments = ["--model_config", ROOT / f"configs/model_config_{model}.yaml"]
        arguments += ["--train_config", ROOT / f"configs/train_config_{train}.yaml"]
        return arguments + [f"n_head={heads}"] * bool(heads) + ["n_kv_groups=2"] * self.grouped

    @property
    def steps(self):
        """Of 1,024 tokens, for the 12 x layers x width^2 parameters of QKV's matrices."""
        if self.shape == "replica":
            return 1500
        width = int(self.shape.partition("h")[0])
        return 12 * (width // 32) * width**2 * self.n // 1024

    @property
    def data(self):
        return "replicate_data" if self.shape == "replica" else "scaling_data"

    def name(self, rate):
        """As in runs/scaling.sh; the rate in thousandths."""
        protocol = "padded" if self.shape == "replica" else "packed"
        return f"{self.alias}_d{self.shape}_n{self.n}_lr{rate:g}e-3_T256_{protocol}_seed{self.seed}"

    def checkpoint(self, folder, tenths):
        step = self.steps if tenths == 10 else self.steps // 10 * tenths
        return folder / f"checkpoint_step_{step}.pt"

    def rate_at(self, step, peak):
        """What get_lr says of a step of this run with a peak rate; in thousandths, as the peak."""
        script = script_of(self.alias)
        settings = yaml.safe_load(self.configs[3].read_text(encoding="utf-8"))
        settings |= {"target_tokens": 1024 * self.steps, "warmup_steps": self.steps // 10}
        settings |= {"learning_rate": peak / 1000, "min_lr": peak / 10_000}
        return 1000 * script.get_lr(step, script.TrainingConfig(**settings))


class Study:
    """The jobs, over what is recorded in the two studies and what lies in outputs_conversion."""

    def __init__(self, scaling, results):
        self.scaling, self.results = scaling, results
        self.stopped = threading.Event()

    def records(self):
        """{name: record} of all runs there are."""
        records = [*finished(OUTPUTS), *read_runs(self.results), *read_runs(self.scaling)]
        return {record["name"]: record for record in records}  # a recorded one counts

    def best_rate(self, alias, shape, n):
        """The peak rate, in thousandths, at which a variant was best."""
        started, _ = conversion_tables.by_place(self.records().values())
        if (alias, shape, n) not in started:
            what = f"{alias} of d{shape} at {n} tokens per parameter"
            raise InputError(f"{what}: no finished runs; see runs/scaling.sh")
        return conversion_tables.best_rate(started[alias, shape, n])

    def command(self, script, *arguments, log=os.devnull):
        """Run a script of this repository; what it prints goes to the log."""
        command = [PYTHON, *map(str, [ROOT / script, *arguments])]
        with open(log, "a", encoding="utf-8") as file:
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
            status = subprocess.call(command, stdout=file, stderr=file, env=one_thread)
        if status:
            last = Path(log).read_text(encoding="utf-8").splitlines()[-1:]
            error = Failed if status == 2 else InputError  # stopped by a signal
            raise error(f"{Path(log).stem}: {' '.join(last)}")

    def train_run(self, name, source, start, settings):
        """Train; of the settings, None stands for YAML's null."""
        print(f"training {name}", flush=True)
        words = [f"{key}={'null' if value is None else value}" for key, value in settings.items()]
        init = ["--init_from", start] if start else []
        how = ["--output_dir", OUTPUTS / name, *source.configs, *init, *words]
        self.command(VARIANTS[source.alias]["script"]["300M"], *how, log=f"{OUTPUTS / name}.log")

    # ---- three kinds of jobs

    def train(self, source, rate):
        """From the start."""
        name, start = source.name(rate), None
        if name in self.records():
            return
        # All variants of a seed start from the same weights where they share them; not with other heads, nor
        # the replica.
        if source.shape.isdigit():
            start = OUTPUTS / f"{name}.initial.pt"
            if not start.exists():
                how = [*source.configs[:2], *["--n_kv_groups", 2] * source.grouped, "--seed", source.seed]
                self.command("runs/initial_weights.py", source.alias, *how, "--output", start)
        steps = source.steps
        settings = {"seed": source.seed, "target_tokens": 1024 * steps, "warmup_steps": steps // 10}
        settings |= {"learning_rate": f"{rate:g}e-3", "min_lr": f"{rate / 10:g}e-3", "keep_checkpoints": None}
        settings |= {"log_interval": steps // 20, "eval_interval": steps // 2, "save_interval": steps // 10}
        self.train_run(name, source, start, settings)

    def checkpoint(self, source, tenths):
        """That of the run at the best rate after so many tenths of its steps."""
        name = source.name(self.best_rate(source.alias, source.shape, source.n))
        for outputs in (Path("outputs_scaling"), OUTPUTS):
            if (path := source.checkpoint(outputs / name, tenths)).exists():
                return path
        own = "RESULTS=results/scaling_own make scaling"
        own += ", then SCALING=results/scaling_own RESULTS=results/conversion_own make conversion"
        raise InputError(f"{path}: missing; for a study of your own: {own}")

    def train_on(self, source, tenths, method, percent):
        """The run at the best rate, converted after some tenths of its steps and trained on.

        To the same total, or after the end for `percent` more. The method is one of other_conversions.py;
        none (not converted at all); or own_rate, which is joint_svd, trained on at the best rate of Q–K=V's
        schedule in the place of the source's.
        """
        alias, shape, n, seed = source.alias, source.shape, source.n, source.seed
        name = f"{alias}_d{shape}_n{n}_at{10 * tenths}_{method}_{percent}_seed{seed}"
        if name in self.records():
            return
        rate, target, start = self.best_rate(alias, shape, n), source, self.checkpoint(source, tenths)
        if method != "none":
            target = Source(SHARED[alias], shape, n, seed)
            checkpoint, start = start, OUTPUTS / f"{name}.initial.pt"
            if not start.exists():
                ways = {"own_rate": [], "joint_svd": [], "unweighted": ["--weighting", "none"]}
                script = "convert_checkpoint.py" if ways.get(method) == [] else "runs/other_conversions.py"
                way = ways.get(method, ["--method", method])
                way += ["--checkpoint", checkpoint, "--to", target.alias]
                way += ["--data", f"{source.data}/train", "--output", start]
                self.command(script, *way, log=OUTPUTS / f"{name}.log")
        if method == "own_rate":
            rate = self.best_rate(target.alias, shape, n)

        # After the end a fifth of the peak rate; before it, the rate that the schedule has there.
        if tenths == 10:
            more, peak, lowest = source.steps * percent // 100, rate / 5, rate / 50
        else:
            step = source.steps // 10 * tenths
            more, peak, lowest = source.steps - step, source.rate_at(step, rate), rate / 10
        settings = {"seed": seed + 100, "target_tokens": 1024 * more, "warmup_steps": more // 50 + 10}
        settings |= {"learning_rate": f"{peak:.6g}e-3", "min_lr": f"{lowest:.6g}e-3", "keep_checkpoints": 1}
        settings |= {"log_interval": more // 10, "eval_interval": more // 4 + 1}
        self.train_run(name, target, start, settings | {"save_interval": more // 10 + 1})

    def one_shot(self, source, tenths, every=False):
        """Conversion alone, of the run at the best rate."""
        record = self.results / "one_shot.jsonl"
        name = source.name(self.best_rate(source.alias, source.shape, source.n))
        if missing(source.checkpoint(Path(name), tenths), [DEFAULT, *(WAYS if every else [])], record):
            how = [self.checkpoint(source, tenths), "--data", source.data, "--record", record]
            log = OUTPUTS / f"{name}_{tenths}.one_shot.log"
            self.command("runs/one_shot.py", *how, *["--all"] * every, log=log)

    # ---- many jobs

    def do(self, jobs, at_once):
        """Do [(function, arguments)], some at once; returns how many failed."""

        def failed(job):
            function, *arguments = job
            if self.stopped.is_set():
                return False
            try:
                function(*arguments)
            except Failed as error:
                print(error, file=sys.stderr)
                return True
            except BaseException:
                self.stopped.set()
                raise
            return False

        with ThreadPoolExecutor(at_once) as pool:
            return sum(pool.map(failed, jobs))

    def stages(self, part):
        """Lists of jobs of a part; the rates of a list may come from the runs of the one before it."""

        def jobs(function, alias, shape, n, *arguments, seeds=SEEDS):
            return [(function, Source(alias, shape, n, seed), *arguments) for seed in seeds]

        def alone(alias, shape, n, tenths=10, every=False):
            return jobs(self.one_shot, alias, shape, n, tenths, every)

        def trained_on(alias, shape, n, tenths, percents=(0,), methods=("none", "joint_svd")):
            choices = [(tenths, method, percent) for percent in percents for method in methods]
            return [job for choice in choices for job in jobs(self.train_on, alias, shape, n, *choice)]

        def from_the_start(shape, n, rates, *aliases):
            """The rates on seed 42, and the best of them on 43 and 44."""
            yield [(self.train, Source(alias, shape, n, 42), rate) for alias in aliases for rate in rates]
            yield [
                (self.train, Source(alias, shape, n, seed), self.best_rate(alias, shape, n))
                for alias in aliases for seed in (43, 44)
            ]  # fmt: skip

        qkv = "kqv", "64", 80
        if part == 1:
            yield [job for tenths in range(1, 11) for job in alone(*qkv, tenths)]
            yield alone("kqv", "64", 5) + alone("kqv", "64", 20) + alone(*qkv, 10, True)
        if part == 2:
            yield trained_on(*qkv, 10, (1, 5, 10)) + trained_on(*qkv, 5) + trained_on(*qkv, 1)
            yield trained_on(*qkv, 10, (10,), ("mean", "drop_v", "unweighted"))
            yield trained_on(*qkv, 1, (0,), ("own_rate",))
        if part == 3:
            rate, rate_kv = (self.best_rate(alias, "64", 80) for alias in ("kqv", "kv"))
            yield from from_the_start("64", 80, around(rate), "gqa", "mqa")
            yield from from_the_start("64", 80, [*around(rate_kv), 4 * rate_kv], "qgqa", "qmqa")
            for alias in ("gqa", "mqa"):
                place = alias, "64", 80
                yield alone(*place) + trained_on(*place, 10, (10,)) + trained_on(*place, 5)
        if part == 4:
            yield from from_the_start("96", 60, around(self.best_rate("kqv", "96", 5)), "kqv", "kv")
            yield alone("kqv", "96", 60) + trained_on("kqv", "96", 60, 10, (1, 5, 10))
        if part == 5:
            heads = ("96h8", "96h4", "96h3", "96h2")
            rate, rate_kv = (self.best_rate(alias, "96", 20) for alias in ("kqv", "kv"))
            yield [job for shape in heads for job in jobs(self.train, "kqv", shape, 20, rate)]
            yield jobs(self.train, "kqv", "128h2", 5, self.best_rate("kqv", "128", 5)) + [
                (self.train, Source("kv", shape, 20, 42), rate_kv) for shape in heads
            ]
            yield [job for shape in heads for job in alone("kqv", shape, 20)] + alone("kqv", "128h2", 5)
            # Does the price stay small in wide heads after long training? One seed, see "Changes since".
            yield jobs(self.train, "kqv", "96h2", 60, rate, seeds=(42,))
            yield jobs(self.one_shot, "kqv", "96h2", 60, 10, seeds=(42,))
        if part == 6:
            yield from from_the_start("replica", 1, (0.5, 1, 2), "kqv", "kv")
            replica = "kqv", "replica", 1
            yield alone(*replica) + trained_on(*replica, 10, (10,)) + trained_on(*replica, 5)
        if part == 7:
            yield trained_on("kqv", "96", 60, 5) + trained_on("kqv", "96", 60, 1)
        if part == 8:
            yield alone("kqv", "96", 20, 10, True) + alone("kqv", "96", 5) + alone("kqv", "128", 5)


def around(rate):
    return rate / 2, rate, 2 * rate


def prepare_data(scaling, results):
    """The text of runs/scaling.sh, and for part 6 of runs/replicate.sh; it has to be the recorded one."""
    recorded = read_runs(results)
    for source, folder, tokens, held_out in (
        ("site-packages", "scaling_data", "50_000_000", "250_000"),
        ("stdlib", "replicate_data", "20_000_000", "100_000"),
    ):
        command = [PYTHON, ROOT / "dataset_download.py", "--source", source, "--split_paragraphs"]
        command += ["--tokenizer", "bytes", "--target_tokens", tokens, "--validation_tokens", held_out]
        if subprocess.call([*command, "--output_dir", folder]):
            raise InputError(f"{folder}: not prepared")
        of_text = [run for run in recorded if ("_dreplica_" in run["name"]) == (source == "stdlib")]
        refuse_another_text([text_of(Path(folder))], of_text, results)
    refuse_another_text([text_of(Path("scaling_data"))], read_runs(scaling), scaling)


def main(arguments=None):
    parser = Parser(__file__, __doc__)
    environment = os.environ.get
    folder = {"type": Path, "metavar": "DIR"}
    parser.add_argument("--parts", type=int, nargs="*", default=range(1, 9), choices=range(1, 9))
    parser.add_argument("--jobs", type=int, default=2, help="at once (default: %(default)s)")
    parser.add_argument("--scaling", default=environment("SCALING", ROOT / "results/scaling"), **folder)
    parser.add_argument("--results", default=environment("RESULTS", ROOT / "results/conversion"), **folder)
    options = parser.parse_args(arguments)
    scaling, results = options.scaling, options.results
    OUTPUTS.mkdir(exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    study, failed = Study(scaling, results), 0
    try:
        prepare_data(scaling, results)
        for part in options.parts:
            print(f"part {part}", flush=True)
            for jobs in study.stages(part):
                failed += study.do(jobs, options.jobs)
            gather(finished(OUTPUTS), results)
            conversion_tables.write_all(scaling, results)
    except (InputError, OSError) as error:
        parser.error(error)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
