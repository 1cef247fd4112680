"""Keep the training scripts in sync with each other, and the README's table with configs/variants.yaml.

    python dev/sync_scripts.py            # show what is out of sync; exit status 1 if anything is
    python dev/sync_scripts.py --write    # copy the reference's shared text to the others, renew the table

transformer_KQV_300_M.py owns the shared text. A script's own parts are its docstring, its two marked regions
(constants and attention class) and the name of its model class. tests/shared_text.sha256 records the shared
text of the last --write: a script that still has it is merely behind. Any other difference was made by hand,
and --write refuses to overwrite it.
"""

import argparse
import difflib
import hashlib
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "transformer_KQV_300_M.py"
RECORD = "tests/shared_text.sha256"
OWN = re.compile(r'\A""".*?"""\n|^# \[variant: \w+\]\n.*?^# \[end of variant\]\n', re.DOTALL | re.MULTILINE)
MARK = "<!-- generated from configs/variants.yaml by `make sync` -->"
TABLE = re.compile(rf"({MARK}\n).*?(<!-- end -->\n)", re.DOTALL)


def variants(root):
    return yaml.safe_load((root / "configs/variants.yaml").read_text(encoding="utf-8"))


def model_classes(root):
    """The name of the model class of every training script, by file name."""
    return {script: row["class"] for row in variants(root).values() for script in row["script"].values()}


def read(root):
    return {name: (root / name).read_text(encoding="utf-8") for name in model_classes(root)}


def renamed(text, old, new):
    """The text with the model class under another name; "GPT-2" is not the class."""
    return re.sub(rf"\b{old}\b(?!-)", new, text)


def shared_text(text, model_class):
    """What a script shares with the others: a gap for each of its own parts, the reference's class name."""
    return renamed(OWN.sub("\0", text), model_class, "GPT")


def in_sync(text, model_class, reference):
    """The script as it should be: its own parts set into the reference's shared text."""
    own = OWN.findall(text)
    gaps = renamed(shared_text(reference, "GPT"), "GPT", model_class).split("\0")
    if len(own) != len(gaps) - 1:
        regions = "two regions between '# [variant: ...]' and '# [end of variant]'"
        raise ValueError(f"{model_class}: expected a docstring and {regions}, found {len(own)} parts")
    return "".join(gap + part for gap, part in zip(gaps, [*own, ""], strict=True))


def digest(text, model_class="GPT"):
    return hashlib.sha256(shared_text(text, model_class).encode()).hexdigest()


def wanted(root):
    """Every training script as it should be, by file name."""
    classes, scripts = model_classes(root), read(root)
    return {name: in_sync(text, classes[name], scripts[REFERENCE]) for name, text in scripts.items()}


def readme_table(root):
    """The README's table of variants, in Markdown."""
    lines = ["| paper | alias | class | a layer caches | 300M | 1.2B |", "|---|---|---|---|---|---|"]
    for alias, row in variants(root).items():
        cached = " and ".join(name.upper() for name in row["cached"])
        scripts = [script_cell(row, size) for size in ("300M", "1.2B")]
        cells = [row["paper"], f"`{alias}`", f"`{row['class']}`", cached, *scripts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def script_cell(row, size):
    if size not in row["script"]:
        return "–"
    heads = row["groups"] and row["groups"][size]
    return f"`{row['script'][size]}`" + (f", {heads} head{'s' * (heads > 1)}" if heads else "")


def readme(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    return text, TABLE.sub(lambda match: match[1] + readme_table(root) + match[2], text)


def check(root):
    """Unified diffs of what is out of sync, by file name."""
    goals, diffs = wanted(root), {}
    pairs = {name: (text, goals[name]) for name, text in read(root).items()} | {"README.md": readme(root)}
    for name, (text, goal) in pairs.items():
        lines = text.splitlines(keepends=True), goal.splitlines(keepends=True)
        diffs[name] = "".join(difflib.unified_diff(*lines, name, f"{name}, in sync"))
    return {name: diff for name, diff in diffs.items() if diff}


def write(root):
    """Bring everything into sync; if scripts were edited by hand, change nothing and return their names."""
    classes, scripts, goals = model_classes(root), read(root), wanted(root)
    known = {(root / RECORD).read_text(encoding="utf-8").strip(), digest(scripts[REFERENCE])}
    edited = [n for n in scripts if scripts[n] != goals[n] and digest(scripts[n], classes[n]) not in known]
    if not edited:
        record = f"{digest(scripts[REFERENCE])}\n"
        for name, text in (goals | {RECORD: record, "README.md": readme(root)[1]}).items():
            (root / name).write_text(text, encoding="utf-8")
    return edited


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--write", action="store_true", help="copy the shared text to the other scripts")
    differences = check(ROOT)
    out_of_sync = write(ROOT) if parser.parse_args().write else list(differences)
    for name in out_of_sync:
        print(differences[name])
    if out_of_sync:
        print(f"Out of sync: {', '.join(out_of_sync)}.")
        sys.exit(f"Edit shared text in {REFERENCE} only, undo it elsewhere, and run this with --write.")
    print(f"all scripts are in sync with {REFERENCE}, and the README with configs/variants.yaml")


if __name__ == "__main__":
    main()
