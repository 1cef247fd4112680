"""Hold the training scripts to the text that they share.

    python tests/sync_scripts.py            # show where a script differs from the reference; exit status 1 if one does
    python tests/sync_scripts.py --write    # carry the reference's shared text to every other script

transformer_KQV_300_M.py owns the shared text. A script's own are its docstring, its two marked regions (constants and
attention class) and the name of its model class. shared_text.sha256 records the text that was last carried over: a
script with that text is merely behind, any other difference was made by hand, and --write refuses to overwrite it.
"""

import argparse
import difflib
import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "transformer_KQV_300_M.py"
RECORD = "tests/shared_text.sha256"
OWN = re.compile(r'\A""".*?"""\n|^# \[variant: \w+\]\n.*?^# \[end of variant\]\n', re.DOTALL | re.MULTILINE)
CLASS = re.compile(r"^class (GPT\w*)\(nn\.Module\):$", re.MULTILINE)


def class_name(text):
    return CLASS.search(text).group(1)


def renamed(text, old, new):
    """The text with the model class under another name; "GPT-2" is not the class."""
    return re.sub(rf"\b{old}\b(?!-)", new, text)


def shared_text(text):
    """What a script shares with the others, with a gap for each of its own parts and the reference's class name."""
    return renamed(OWN.sub("\0", text), class_name(text), "GPT")


def in_step(text, reference):
    """The script as it should be: its own parts set into the reference's shared text."""
    own = OWN.findall(text)
    gaps = renamed(shared_text(reference), "GPT", class_name(text)).split("\0")
    if len(own) != len(gaps) - 1:
        raise ValueError("expected a docstring and two regions between '# [variant: ...]' and '# [end of variant]'")
    return "".join(gap + part for gap, part in zip(gaps, [*own, ""], strict=True))


def digest(text):
    return hashlib.sha256(shared_text(text).encode()).hexdigest()


def difference(name, text, wanted):
    lines = (text.splitlines(keepends=True), wanted.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*lines, name, f"{name}, with the shared text of {REFERENCE}"))


def check(root):
    """Unified diffs of the scripts that are not in step, by name."""
    reference = (root / REFERENCE).read_text(encoding="utf-8")
    scripts = {path.name: path.read_text(encoding="utf-8") for path in sorted(root.glob("transformer_*.py"))}
    wanted = {name: in_step(text, reference) for name, text in scripts.items()}
    return {name: difference(name, text, wanted[name]) for name, text in scripts.items() if text != wanted[name]}


def write(root):
    """Bring all scripts in step, or, where one was edited by hand, change none and return the names of those."""
    reference = (root / REFERENCE).read_text(encoding="utf-8")
    known = {(root / RECORD).read_text(encoding="utf-8").strip(), digest(reference)}
    behind = {root / name: (root / name).read_text(encoding="utf-8") for name in check(root)}
    edited = [path.name for path, text in behind.items() if digest(text) not in known]
    if not edited:
        for path, text in behind.items():
            path.write_text(in_step(text, reference), encoding="utf-8")
        (root / RECORD).write_text(f"{digest(reference)}\n", encoding="utf-8")
    return edited


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="carry the reference's shared text to the other scripts")
    differences = check(ROOT)
    edited = write(ROOT) if parser.parse_args().write else list(differences)
    for name in edited:
        print(differences[name])
    if edited:
        print(f"out of step: {', '.join(edited)}. Edit shared text in {REFERENCE}, and carry it over with --write;")
        sys.exit("--write changes nothing as long as a copy holds an edit of its own.")
    print(f"all scripts are in step with {REFERENCE}")


if __name__ == "__main__":
    main()
