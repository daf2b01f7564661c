"""The house: every file has its level, imports go one way, no task is named outside its rooms, nothing grows too large.

Each check is a function of a syntax tree or of a table of files; beside each stands a test that it sees what it should.
"""

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"beit3"},
    {"utils", "modeling_finetune", "optim_factory"},
    {"sources"},
    {"tasks"},
    {"datasets", "engine_for_finetuning", "inference"},
    {"runs"},
    {"run_beit3_finetuning"},
    {"demo", "docs", "scripts", "examples"},
    {"benchmarks", "tests"},  # measurements are tested, and measure what tests have as reference
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
TOP = len(LEVELS) - 1
PRODUCT = {name for names in LEVELS[: LEVEL["run_beit3_finetuning"] + 1] for name in names}

# Room of beit3 → the rooms that it may import. Pictures and texts know nothing of models, models nothing of files of
# pictures, and training takes both as they come: it needs no data room either.
ROOMS_OF_BEIT3 = {"system": set(), "data": {"system"}, "model": {"system"}, "training": {"system", "model"}}
# What stands before PyTorch is loaded, so that help and mistakes are told at once.
WITHOUT_TORCH = [
    "runs.command_line", "runs.settings", "tasks.settings", "beit3.system.flags", "beit3.model.names",
    "beit3.model.description",
]  # fmt: skip

TASK_NAME = re.compile(r"vqa|captioning|nocaps|nlvr2|flickr30k|retrieval|imagenet|image_?classification", re.IGNORECASE)
# Who may name tasks: their own rooms, what makes and checks them, and the two lists of what is registered and public.
NAMES_TASKS = {"sources", "tasks", "tests", "demo", "benchmarks", "docs", "modeling_finetune", "datasets"}
NAMES_MODELS = "beit3/model/names.py"
# A text of examples is shown to people and decides nothing; it stands at the top of a module under this name.
SHOWN_ONLY = "EXAMPLES"

LONGEST_FILE, LONGEST_FUNCTION, LONGEST_ENTRY = 500, 80, 180  # lines


def tracked(pattern: str) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", pattern]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def top(name: str) -> str:
    """The first part of a path or of a module's name."""
    return re.split(r"[./]", name)[0]


FILES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in tracked("*.py")}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
every_file = pytest.mark.parametrize("name", FILES)
product_file = pytest.mark.parametrize("name", [name for name in FILES if top(name) in PRODUCT])


def imports(tree: ast.AST) -> set[str]:
    """Modules imported anywhere in a file, `from a import b` as `a.b`; those named to `import_module` too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {"." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def against_the_levels(name: str, tree: ast.AST) -> set[str]:
    """Imports of the same level or a higher one, and relative ones, which say no room."""
    own = LEVEL[top(name)]
    return {
        each
        for each in imports(tree)
        if each.startswith(".")
        or (top(each) in LEVEL and top(each) != top(name) and LEVEL[top(each)] >= own and own != TOP)
    }


def against_the_rooms_of_beit3(name: str, tree: ast.AST) -> set[str]:
    """What a file of beit3 imports from outside of beit3, and from rooms it should not know."""
    room = name.split("/")[1]
    allowed = {room} | ROOMS_OF_BEIT3.get(room, set())
    ours = {each for each in imports(tree) if top(each) in LEVEL}
    return {each for each in ours if top(each) != "beit3" or each.split(".")[1] not in allowed}


def against_the_rooms_of_tasks(name: str, tree: ast.AST, folders: set[str]) -> set[str]:
    """Imports of a task's folder, from another one or from what all tasks share."""
    own = name.split("/")[1]
    parts = {each: each.split(".") for each in imports(tree)}
    return {each for each, (first, *more) in parts.items() if first == "tasks" and {*more[:1]} & folders - {own}}


def task_names(tree: ast.Module) -> list[str]:
    """Task names wherever code could decide by them: strings (also in f-strings, dicts, match, comparisons, calls),
    names of variables, arguments, attributes, functions, classes, modules. Docstrings and comments decide nothing."""
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    prose = {id(value) for value in statements if isinstance(value, ast.Constant)}
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [SHOWN_ONLY]:
            prose.add(id(node.value))
    said: list[str] = []
    for node in ast.walk(tree):
        if id(node) in prose:
            continue
        for _, value in ast.iter_fields(node):
            said += [value] if isinstance(value, str) else []
            said += [each for each in value if isinstance(each, str)] if isinstance(value, list) else []
        if isinstance(node, ast.Constant) and isinstance(node.value, bytes):
            said.append(node.value.decode(errors="replace"))
    return [each for each in said if TASK_NAME.search(each)]


def bare_excepts(tree: ast.AST) -> list[int]:
    return [node.lineno for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.type is None]


def patches_of_print(tree: ast.AST) -> list[int]:
    """Lines that give `print` another meaning, which other people's code would see or a reader would not expect."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            patched = ast.unparse(node) in ("print", "builtins.print", "__builtins__.print")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            patched = node.name == "print"
        elif isinstance(node, ast.arg):
            patched = node.arg == "print"
        elif isinstance(node, ast.alias):
            patched = (node.asname or node.name) == "print"
        elif isinstance(node, ast.Call) and re.search(r"(setattr|patch(\.object)?)$", ast.unparse(node.func)):
            words = [ast.unparse(arg).strip("'\"") for arg in node.args]
            patched = words[:1] == ["builtins.print"] or words[:2] == ["builtins", "print"]
        else:
            patched = False
        if patched:
            found.append(node.lineno)
    return found


def long_functions(tree: ast.AST) -> list[str]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node.name for node in functions if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION]


def share_of_the_largest_room(files: Mapping[str, str]) -> tuple[str, float]:
    """Of the product's lines. A room is a file or folder of the top, and in `beit3` and `tasks` each folder."""
    lines: Counter[str] = Counter()
    for name, text in files.items():
        parts = name.split("/")
        if parts[0].removesuffix(".py") in PRODUCT:
            room = "/".join(parts[:2]) if parts[0] in ("beit3", "tasks") and len(parts) > 2 else parts[0]
            lines[room] += len(text.splitlines())
    [(room, most)] = lines.most_common(1)
    return room, most / lines.total()


def assigned_arguments(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        yield from (ast.unparse(t) for t in targets if isinstance(t, ast.Attribute))


def test_every_python_file_has_a_level():
    assert {name for name in FILES if top(name) not in LEVEL} == set()
    assert {name.split("/")[1] for name in FILES if name.startswith("beit3/")} == {"__init__.py", *ROOMS_OF_BEIT3}


@every_file
def test_imports_go_one_way(name):
    assert against_the_levels(name, TREES[name]) == set()


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("beit3/")])
def test_the_rooms_of_beit3_know_only_what_is_below_them(name):
    assert against_the_rooms_of_beit3(name, TREES[name]) == set()


TASK_FOLDERS = {name.split("/")[1] for name in FILES if re.match(r"tasks/\w+/", name)}


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("tasks/")])
def test_no_task_knows_another(name):
    assert against_the_rooms_of_tasks(name, TREES[name], TASK_FOLDERS) == set()


def against_two_tasks(name: str, tree: ast.Module) -> set[str]:
    return against_the_rooms_of_tasks(name, tree, {"vqav2", "captioning"})


@pytest.mark.parametrize(
    ("check", "name", "source", "wrong"),
    [
        (against_the_levels, "engine_for_finetuning.py", "def f():\n    from runs import state\n", {"runs.state"}),
        (against_the_levels, "engine_for_finetuning.py", "import datasets", {"datasets"}),
        (against_the_levels, "optim_factory.py", "import utils as u", {"utils"}),
        (
            against_the_levels,
            "runs/state.py",
            "import importlib\nimportlib.import_module('tests.workers')",
            {"tests.workers"},
        ),
        (against_the_levels, "runs/state.py", "from . import log", {"..log"}),
        (against_the_levels, "runs/state.py", "import tasks.base, torch, runs.log", set()),
        (against_the_levels, "tests/x.py", "import benchmarks.table, runs.log", set()),
        (
            against_the_rooms_of_beit3,
            "beit3/data/x.py",
            "from beit3.model.names import SIZES",
            {"beit3.model.names.SIZES"},
        ),
        (against_the_rooms_of_beit3, "beit3/model/x.py", "from beit3 import data", {"beit3.data"}),
        (against_the_rooms_of_beit3, "beit3/system/x.py", "def f():\n    import utils", {"utils"}),
        (against_the_rooms_of_beit3, "beit3/training/x.py", "from beit3.model import weights\nimport torch", set()),
        (
            against_two_tasks,
            "tasks/vqav2/x.py",
            "from tasks.captioning import index",
            {"tasks.captioning.index"},
        ),
        (against_two_tasks, "tasks/vqav2/x.py", "from tasks import captioning", {"tasks.captioning"}),
        (against_two_tasks, "tasks/base.py", "def f():\n    import tasks.vqav2.task", {"tasks.vqav2.task"}),
        (against_two_tasks, "tasks/vqav2/x.py", "from tasks.vqav2 import index\nfrom tasks.base import Task", set()),
    ],
)
def test_the_checks_see_an_import_that_goes_the_wrong_way(check, name, source, wrong):
    assert check(name, ast.parse(source)) == wrong


def loaded_by(source: str) -> set[str]:
    """The slow libraries that a process has loaded after `source`."""
    slow = {"torch", "torchvision", "timm", "transformers", "deepspeed"}
    code = f"import sys\n{source}\nprint(*({slow} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("module", WITHOUT_TORCH + [f"tasks.{folder}.settings" for folder in sorted(TASK_FOLDERS)])
def test_what_stands_before_pytorch_does_not_load_it(module):
    assert loaded_by(f"import {module}") == set()


def test_mistakes_in_the_flags_are_told_without_pytorch():
    assert loaded_by("import run_beit3_finetuning as run; assert run.main(['--task', 'no_such']) == 2") == set()


def test_of_the_libraries_that_take_long_to_load_a_run_loads_pytorch_alone():
    """torchvision and timm take longer than PyTorch; what is used of them does without importing them."""
    parts = "import runs.assembly, runs.session, runs.state, runs.log, datasets, modeling_finetune, tasks.base"
    tasks = "from tasks import TASKS, imported, settings_of; [imported(settings_of(name).task) for name in TASKS]"
    decoder = "from beit3.data import images; assert images._jpeg_decoder is not None"
    assert loaded_by(f"{parts}; {tasks}; {decoder}") == {"torch"}


def test_the_check_sees_a_library_loaded_by_others():
    assert "torch" in loaded_by("import optim_factory")


@pytest.mark.parametrize("name", [name for name in FILES if top(name) not in NAMES_TASKS and name != NAMES_MODELS])
def test_no_task_is_named_outside_its_rooms(name):
    assert task_names(TREES[name]) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = {'vqav2': 1}",
        "match task:\n    case 'coco_captioning':\n        pass",
        "match task:\n    case VQAv2():\n        pass",
        "name.startswith('vqa')",
        "if task != 'nocaps': pass",
        "f'submit_vqav2_{split}'",
        "task.is_captioning",
        "def f(vqa): pass",
        "f(retrieval=True)",
        "from tasks.captioning import index",
        "class ImageNet: pass",
        "def f():\n    global nlvr2\n",
        "b'flickr30k' in name",
        "def f():\n    EXAMPLES = 'vqav2'",
        "EXAMPLES = OTHER = 'vqav2'",
        "for x in ('imageclassification',): pass",
    ],
)
def test_the_check_sees_a_task_name_in_any_form(source):
    assert task_names(ast.parse(source))


def test_prose_may_name_tasks():
    assert (
        task_names(ast.parse('"""VQAv2."""\nEXAMPLES = "--task vqav2"\ndef f():\n    "captioning"  # nocaps\n')) == []
    )


def branches_by_task(script: str) -> list[str]:
    """Branches of a shell script's `case` that are a task's name; defaults and examples may name one."""
    return [line for line in script.splitlines() if re.match(r"\s*\(?[\w*| -]+\)", line) and TASK_NAME.search(line)]


@pytest.mark.parametrize("script", tracked("*.sh"), ids=lambda path: path.name)
def test_shell_scripts_keep_no_list_of_tasks(script):
    assert branches_by_task(script.read_text(encoding="utf-8")) == []


def test_the_check_sees_a_branch_by_task():
    case = "case $TASK in\n    vqav2 | nocaps) x=1 ;;\n    *) x=2 ;;\nesac\n# (captioning: x)\nTASK=${TASK:-vqav2}"
    assert branches_by_task(case) == ["    vqav2 | nocaps) x=1 ;;"]


@pytest.mark.parametrize("name", ["engine_for_finetuning.py", "runs/state.py", "optim_factory.py", "utils.py"])
def test_the_engine_names_no_task(name):
    assert not TASK_NAME.findall(FILES[name])  # not in its comments either


def test_the_entry_point_decides_nothing_by_a_task_name():
    assert not TASK_NAME.findall(FILES["run_beit3_finetuning.py"])


def test_nobody_assigns_to_the_arguments():
    found = {
        name: [each for each in assigned_arguments(tree) if each.startswith("args.")] for name, tree in TREES.items()
    }
    assert not any(found[name] for name in FILES if top(name) in PRODUCT), found
    assert list(assigned_arguments(ast.parse("args.lr = 1\nx = 2\nargs.n += 1"))) == ["args.lr", "args.n"]


CHECKS: list[tuple[Callable, str, str]] = [
    (bare_excepts, "try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept OSError:\n    pass"),
    (patches_of_print, "import builtins\nbuiltins.print = f", "builtins.input = print"),
    (patches_of_print, "def print(*x): pass", "def printed(): print()"),
    (patches_of_print, "monkeypatch.setattr('builtins.print', f)", "monkeypatch.setattr('x.y', print)"),
    (patches_of_print, "setattr(builtins, 'print', f)", "setattr(x, 'y', print)"),
    (patches_of_print, "from rich import print", "from rich import table"),
    (long_functions, "def f():\n" + "    x = 1\n" * 80, "def f():\n" + "    x = 1\n" * 79),
]


@every_file
def test_nobody_writes_a_bare_except_patches_print_or_writes_a_long_function(name):
    assert [check(TREES[name]) for check in (bare_excepts, patches_of_print, long_functions)] == [[], [], []]


@pytest.mark.parametrize(("check", "wrong", "right"), CHECKS)
def test_these_checks_see_what_they_should(check, wrong, right):
    assert check(ast.parse(wrong)) and not check(ast.parse(right))


@pytest.mark.parametrize("name", [name for name in FILES if top(name) != "tests"])
def test_no_file_is_too_long(name):
    assert len(FILES[name].splitlines()) <= LONGEST_FILE


def test_the_entry_point_is_short():
    assert len(FILES["run_beit3_finetuning.py"].splitlines()) <= LONGEST_ENTRY


def test_a_test_that_hangs_is_ended(tmp_path, request):
    """In the middle of a pattern too, which comes back to Python only when it is done."""
    assert float(request.config.getini("timeout")) > 0
    (tmp_path / "test_hangs.py").write_text("import re\ndef test():\n    re.match(r'(a+)+$', 'a' * 60 + 'b')\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-c",
        "/dev/null",
        "--rootdir",
        tmp_path,
        "-o",
        "timeout=1",
        tmp_path,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1 and "Timeout" in done.stdout


def test_no_room_holds_more_than_a_third_of_the_product():
    room, share = share_of_the_largest_room(FILES)
    assert share <= 1 / 3, room
    files = {
        "beit3/data/x.py": "a\n" * 30,
        "beit3/model/x.py": "a\n" * 45,
        "utils.py": "a\n" * 25,
        "tests/x.py": "a\n" * 99,
    }
    assert share_of_the_largest_room(files) == ("beit3/model", 0.45)
