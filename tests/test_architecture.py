"""The house: imports go one way, no task is named outside its rooms, commands in the README exist."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"beit3"},
    {"utils", "modeling_finetune", "optim_factory"},
    {"tasks"},
    {"datasets", "engine_for_finetuning"},
    {"runs"},
    {"run_beit3_finetuning"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TASK_NAME = re.compile(r"vqa|captioning|nocaps|nlvr2|flickr30k|retrieval|imagenet", re.IGNORECASE)


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def house_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in listed if room(ROOT / name) in LEVEL]


def imported_rooms(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & LEVEL.keys()


@pytest.mark.parametrize("path", house_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    wrong = {name for name in imported_rooms(path) - {room(path)} if LEVEL[name] >= LEVEL[room(path)]}
    assert not wrong


def test_the_check_sees_an_import_against_the_direction(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from tasks.vqav2.task import VQAv2\n")
    assert imported_rooms(file) == {"tasks"}


@pytest.mark.parametrize("name", ["engine_for_finetuning.py", "runs/state.py", "optim_factory.py", "utils.py"])
def test_the_engine_names_no_task(name):
    assert not TASK_NAME.findall((ROOT / name).read_text(encoding="utf-8"))


def test_the_entry_point_decides_nothing_by_a_task_name():
    tree = ast.parse((ROOT / "run_beit3_finetuning.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            assert not TASK_NAME.search(ast.unparse(node)), ast.unparse(node)


def test_nobody_assigns_to_the_arguments():
    for path in house_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            assert not any(isinstance(t, ast.Attribute) and ast.unparse(t).startswith("args.") for t in targets), path
