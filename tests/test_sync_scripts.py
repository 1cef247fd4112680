"""The training scripts differ only in what the paper varies, and the tool that keeps them so works."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "dev"))

import sync_scripts

SCRIPTS = sorted(sync_scripts.model_classes(ROOT))


@pytest.fixture
def copy(tmp_path):
    """A folder with all that the tool reads, free to be edited."""
    for folder in ("tests", "configs", "dev"):
        (tmp_path / folder).mkdir()
    for name in [*SCRIPTS, sync_scripts.RECORD, "configs/variants.yaml", "README.md", "dev/sync_scripts.py"]:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def test_every_script_and_the_readme_are_in_sync():
    differences = sync_scripts.check(ROOT)
    assert not differences, "run `python dev/sync_scripts.py --write`\n" + "\n".join(differences.values())


def test_the_record_is_of_the_text_as_it_stands():
    recorded = (ROOT / sync_scripts.RECORD).read_text(encoding="utf-8").strip()
    assert recorded == sync_scripts.digest((ROOT / sync_scripts.REFERENCE).read_text(encoding="utf-8"))


def test_every_training_script_is_in_the_table():
    assert sorted(path.name for path in ROOT.glob("transformer_*.py")) == SCRIPTS


def test_a_change_of_the_reference_is_copied_to_the_others(copy):
    edit(copy / sync_scripts.REFERENCE, "LOSS_CHUNK = 2048 ", "LOSS_CHUNK = 1024 ")
    assert "transformer_KV_1_300_M.py" in sync_scripts.check(copy)
    assert sync_scripts.write(copy) == []
    text = (copy / "transformer_KV_1_300_M.py").read_text(encoding="utf-8")
    assert "LOSS_CHUNK = 1024 " in text and "class GPT_QKV_KEqualsV(" in text
    assert not sync_scripts.check(copy)


def test_an_edit_of_a_copy_is_shown_and_not_overwritten(copy):
    name = "transformer_KV_1_300_M.py"
    edit(copy / name, "LOSS_CHUNK = 2048 ", "LOSS_CHUNK = 512 ")
    edit(copy / sync_scripts.REFERENCE, "LOSS_CHUNK = 2048 ", "LOSS_CHUNK = 1024 ")
    before = (copy / name).read_text(encoding="utf-8")
    assert sync_scripts.write(copy) == [name]
    assert (copy / name).read_text(encoding="utf-8") == before
    assert "-LOSS_CHUNK = 512 " in sync_scripts.check(copy)[name]


def test_a_variant_s_own_parts_are_left_alone(copy):
    name = "transformer_KV_1_300_M.py"
    edit(copy / name, 'OUTPUT_DIR = "outputs_qkv_k_equals_v"', 'OUTPUT_DIR = "elsewhere"')
    edit(copy / name, "(k,) = cache.append(self.layer, k)", "k = cache.append(self.layer, k)[0]")
    assert not sync_scripts.check(copy)


def test_a_model_class_under_the_wrong_name_is_found(copy):
    name = "transformer_KV_1_300_M.py"
    edit(copy / name, "GPT_QKV_KEqualsV(ModelConfig(", "GPT(ModelConfig(")
    assert name in sync_scripts.check(copy)
    assert sync_scripts.write(copy) == []
    assert not sync_scripts.check(copy)


def test_the_readme_s_table_follows_the_variants(copy):
    edit(copy / "configs/variants.yaml", "class: GPT_K\n", "class: GPT_Key\n")
    assert "`GPT_Key`" in sync_scripts.check(copy)["README.md"]


def test_the_command_says_what_is_out_of_sync_and_mends_it(copy):
    name = "transformer_KV_1_300_M.py"
    edit(copy / sync_scripts.REFERENCE, "LOSS_CHUNK = 2048 ", "LOSS_CHUNK = 1024 ")

    def command(*options):
        ended = subprocess.run(
            [sys.executable, "dev/sync_scripts.py", *options],
            cwd=copy,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return ended.returncode, ended.stdout, ended.stderr

    status, printed, advice = command()
    assert status == 1
    assert "+LOSS_CHUNK = 1024 " in printed
    assert name in printed.splitlines()[-1]
    assert printed.splitlines()[-1].startswith("Out of sync: ")
    assert advice.count("\n") == 1 and "--write" in advice
    assert command("--write") == (0, command()[1], "")
    assert command()[0] == 0
