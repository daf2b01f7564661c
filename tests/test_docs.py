"""What the README, the documents and the scripts tell people to type, run or look at is there and is understood.

Commands stand in fenced blocks and between backticks. Each check is made on today's text, whatever it says, and has a
test that it sees what is wrong.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import datasets
import modeling_finetune
from beit3.model.names import model_name
from beit3.model.weights import write_weights
from beit3.system.errors import InputError
from inference.command_line import parser as parser_of_asking
from runs.command_line import EXAMPLES, read_settings
from tests import reference
from tests.test_architecture import LEVEL, top, tracked

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = tracked("*.sh")
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS + SCRIPTS}
of_documents = pytest.mark.parametrize("name", [name for name in TEXTS if name.endswith(".md")])
of_all = pytest.mark.parametrize("name", TEXTS)

README_LINES = 220
ENTRY = "run_beit3_finetuning.py"
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Folders that people's data and runs have, and that no clone holds.
MADE_BY_RUNS = (
    "dataset",
    "demo_data",
    "output",
    "your_prediction",
    "train2014",
    "val2014",
    "test2015",
    "vqa",
    "val",
    "test",
)
# Whose flags stand on a line: the first that is named there. A line that names nobody speaks of the entry point.
PROGRAMS = {
    r"demo\.make": ["-m", "demo.make"],
    r"demo\.contact_sheet": ["-m", "demo.contact_sheet"],
    r"demo\.pointing": ["-m", "demo.pointing"],
    r"demo\.sh|inference\.page": ["-m", "inference.page"],
    r"tests\.chaos|^--runs \d+ --seed": ["-m", "tests.chaos"],
    r"-m inference export|^--(int8|overwrite)$": ["-m", "inference", "export"],
    r"-m inference|^--beams": ["-m", "inference"],
    r"benchmarks/run\.sh|-m benchmarks": ["-m", "benchmarks"],
    r"tests/run\.sh|\bpytest\b": ["-m", "pytest"],
    r"\bruff format\b": ["-m", "ruff", "format"],
    r"\bruff\b": ["-m", "ruff", "check"],
}
OTHER_TOOLS = r"\bgit |\bpip |\bdocker |-m pip|\bapt-get |\bfind |\bsort |\bgrep "


def fences(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks, without the indentation of a list's item; lines ended by a backslash
    are one."""
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    blocks = [(kind, re.sub(rf"^{indent}", "", content, flags=re.MULTILINE)) for indent, kind, content in found]
    return [(kind, re.sub(r"\\\n\s*", "", content)) for kind, content in blocks]


def spans(text: str) -> list[str]:
    """What stands between single backticks, which may go over the end of a line."""
    without = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", without)]


def pieces(name: str, text: str) -> list[str]:
    """The lines and spans that may hold commands."""
    if name.endswith(".md"):
        return [line for _, block in fences(text) for line in block.splitlines()] + spans(text)
    return re.sub(r"\\\n\s*", "", text).splitlines()


def help_of(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def flags_of_program(*command: str) -> set[str]:
    return set(FLAG.findall(help_of(*command)))


OF_ASKING = set(parser_of_asking()._option_string_actions)  # prediction.sh with a picture
OF_TORCHRUN = {option for action in get_args_parser()._actions for option in action.option_strings}


def known(flag: str, piece: str) -> bool:
    """Whether there is such a flag, asked of the programs themselves. The entry point stands behind torchrun, often."""
    command = next((command for pattern, command in PROGRAMS.items() if re.search(pattern, piece)), None)
    if command is not None:
        return flag in flags_of_program(*command)
    return knows(flag) or flag in OF_TORCHRUN or flag in OF_ASKING


@functools.cache
def knows(flag: str) -> bool:
    """Whether the entry point has this flag: what it says of it is not that there is none such."""
    if flag in ("--help", "--help_all"):
        return True
    with pytest.raises(InputError) as error:
        read_settings([flag])
    return not any(problem.startswith(f"{flag}: no such flag") for problem in error.value.problems)


def unknown_flags(name: str, text: str) -> set[str]:
    return {
        flag
        for piece in pieces(name, text)
        if not re.search(OTHER_TOOLS, piece)
        for flag in FLAG.findall(piece)
        if not known(flag, piece)
    }


@of_all
def test_every_flag_named_exists(name):
    assert unknown_flags(name, TEXTS[name]) == set()


def test_the_check_sees_a_flag_that_is_not_there():
    text = (
        "Use `--batch_sise 3`, `--lr 1` and `bash benchmarks/run.sh\n--fast`:\n\n"
        "```\ntorchrun --nproc_per_node=8 run_beit3_finetuning.py \\\n  --no_auto_resume --nproc_per_gpu 1\n```\n"
    )
    assert unknown_flags("x.md", text) == {"--batch_sise", "--fast", "--nproc_per_gpu"}
    assert unknown_flags("x.sh", "recipe=(--lr 1e-3\n --epoch 2)") == {"--epoch"}


def missing_paths(name: str, text: str) -> set[str]:
    """Files and folders of the toolkit that are named and not there: programs, documents, and whatever begins with one
    of the house's folders. A name without a folder may be
    anywhere in the tree."""
    tree = {str(path.relative_to(ROOT)) for path in tracked("*")}
    folders = {str(parent) for each in tree for parent in Path(each).parents}
    names = {Path(each).name for each in tree | folders}
    here = Path(name).parent
    wanted = [word.strip("(),:;\"'") for span in spans(text) for word in span.split()]
    wanted += [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if ":" not in link]
    missing = set()
    for word in filter(None, wanted):
        first = word.split("/")[0]
        if not re.fullmatch(r"\.?[\w./-]+", word) or word.startswith((".venv", "/")) or first in MADE_BY_RUNS:
            continue
        of_house = "/" in word and first in {each.split("/")[0] for each in tree}
        if of_house or word.endswith("/") or re.search(r"\.(py|sh|md|toml|flags)$", word):
            places = {os.path.normpath(word), os.path.normpath(here / word)}
            if not (places & (tree | folders) or word.rstrip("/") in names):
                missing.add(word)
    return missing


@of_documents
def test_every_file_and_folder_named_exists(name):
    assert missing_paths(name, TEXTS[name]) == set()


def test_the_check_sees_a_file_that_is_not_there():
    text = "`beit3/no.py` `utils.py` `run_state.py` `docs/` `nodocs/` [x](PERFORMANCE.md) [y](no.md#z) `output/x`"
    assert missing_paths("docs/FAULTS.md", text) == {"beit3/no.py", "run_state.py", "nodocs/", "no.md"}


def resolves(dotted: str) -> bool:
    """Whether a module, or an attribute inside one, has this name."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            continue
        if found is not None:
            thing = importlib.import_module(module)
            for part in parts[length:]:
                if not hasattr(thing, part):
                    return False
                thing = getattr(thing, part)
            return True
    return False


def names_that_lead_nowhere(text: str) -> set[str]:
    """Dotted names that begin with one of the house's rooms, modules of `python -m`, public names of `datasets`."""
    said = [*spans(text), *(line for _, block in fences(text) for line in block.splitlines())]
    dotted = {
        word
        for each in said
        for word in re.findall(r"(?<![\w./-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w./*{<])", each)
        if top(word) in LEVEL and not re.search(r"\.(py|md|sh|json|jsonl|txt|pth|spm)$", word)
    }
    dotted |= {word for each in said for word in re.findall(r"python3? -m ([\w.]+)", each)}
    public = {
        word
        for each in said
        for word in re.findall(r"\b[A-Z]\w+(?:\.\w+)+", each)
        if word.split(".")[0] in datasets.__all__
    }
    return {word for word in dotted if not resolves(word)} | {
        word for word in public if not resolves(f"datasets.{word}")
    }


@of_documents
def test_every_module_and_function_named_exists(name):
    assert names_that_lead_nowhere(TEXTS[name]) == set()


def test_the_check_sees_a_name_that_leads_nowhere():
    text = "`tests.chaoss`, `python -m demo.makes`, `VQAv2Dataset.make_index(x)`, `beit3.data.index_table.read_index`"
    assert names_that_lead_nowhere(text) == {"tests.chaoss", "demo.makes", "VQAv2Dataset.make_index"}


def wrong_in_python(source: str) -> list[str]:
    """Runs the imports of a snippet; each call of what was imported must fit the function's parameters."""
    tree, names, wrong = ast.parse(source), {}, []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            try:
                exec(compile(ast.Module([node], []), "snippet", "exec"), names)
            except ImportError as error:
                wrong.append(str(error))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[0] in names:
            try:
                function = eval(ast.unparse(node.func), names)
                # of a class of others, which takes anything, nothing can be said
                inspect.signature(function).bind(*node.args, **{word.arg: word.value for word in node.keywords})
            except (AttributeError, TypeError) as error:
                wrong.append(f"{ast.unparse(node.func)}: {error}")
    return wrong


def python_snippets(text: str) -> list[str]:
    """Fenced Python, and calls in spans, with the import that the text leaves out."""
    fenced = [block for kind, block in fences(text) if kind == "python"]
    found = spans(text)
    public = [each for each in found if re.match(rf"({'|'.join(datasets.__all__)})\b.*\)$", each)]
    calls = [f"from datasets import {re.match(r'[A-Za-z0-9_]+', each)[0]}\n{each}" for each in public]
    return fenced + [each for each in found if re.match(r"(from \w\S* )?import \w", each)] + calls


@of_documents
def test_python_that_is_shown_can_be_imported_and_called_so(name):
    snippets = python_snippets(TEXTS[name])
    assert [wrong for snippet in snippets for wrong in wrong_in_python(snippet)] == []


def test_the_check_sees_python_that_cannot_be():
    text = "```python\nfrom datasets import NoDataset\n```\n`VQAv2Dataset.make_dataset_index(data_paht=1)`"
    wrong = [each for snippet in python_snippets(text) for each in wrong_in_python(snippet)]
    assert len(wrong) == 2 and "NoDataset" in wrong[0] and "VQAv2Dataset.make_dataset_index" in wrong[1]


def launches(name: str, text: str) -> list[str]:
    """Whole commands that start the entry point: those without "…" and variables of a shell."""
    said = [piece.strip() for piece in pieces(name, text)]
    begins = re.compile(rf"(\w+=\S+ )*(torchrun |python3? )(\S+ )*{re.escape(ENTRY)} -")
    return [each for each in said if begins.match(each) and "…" not in each and "$" not in each]


LAUNCHES = [(name, each) for name, text in [*TEXTS.items(), ("EXAMPLES", EXAMPLES)] for each in launches(name, text)]


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory):
    """A folder with what the commands name: empty index files, weights, a tokenizer, and a checkpoint of ours."""
    folder = tmp_path_factory.mktemp("somewhere")
    coco = folder / "data" / "coco"
    coco.mkdir(parents=True)
    vqa = ["vqa." + split for split in ("train", "val", "trainable_val", "rest_val", "test", "test-dev")]
    captions = [f"{source}.{split}" for source in ("coco_captioning", "nocaps") for split in ("train", "val", "test")]
    for stem in vqa + captions:
        (coco / f"{stem}.jsonl").touch()
    for file in ("answer2label.txt", "dataset_coco.json", "nocaps_val_4500_captions.json"):
        (coco / file).touch()
    for place in (folder, folder / "data"):
        shutil.copy(reference.MINI_COCO / "mini.spm", place / "beit3.spm")
        (place / "beit3_base_patch16_224.pth").touch()
    model = modeling_finetune._entry_point("vqav2", "tiny", 64)(vocab_size=100, num_classes=2)
    description = {
        "format": 2, "task": "vqav2", "model": model_name("tiny", 64, "vqav2"), "image_size": 64, "vocab_size": 100,
        "num_max_bpe_tokens": 12, "answers": ["yes", "no"],
    }  # fmt: skip
    tokenizer = (reference.MINI_COCO / "mini.spm").read_bytes()
    write_weights(folder / "output" / "checkpoint-best", model.state_dict(), description, tokenizer)
    return folder


def settings_of(command: str, somewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """What the entry point makes of a command; torchrun's part goes to torchrun's parser."""
    monkeypatch.chdir(somewhere)
    words = shlex.split(re.sub(r"(?<![\w.])/data/", f"{somewhere}/data/", command))
    at = words.index(ENTRY)
    if "torchrun" in words:
        get_args_parser().parse_args(words[words.index("torchrun") + 1 : at + 1])
    return read_settings(words[at + 1 :])


@pytest.mark.parametrize(("name", "command"), LAUNCHES)
def test_commands_that_start_the_entry_point_are_understood(name, command, somewhere, monkeypatch):
    settings = settings_of(command, somewhere, monkeypatch)
    said = re.search(r"--task (\w+)", command)
    assert settings.task.name == (said[1] if said else "vqav2")
    assert settings.run.eval == ("--eval" in command)


def test_there_are_such_commands_in_the_readme_and_in_the_help():
    where = [name for name, _ in LAUNCHES]
    assert where.count("README.md") >= 1 and where.count("EXAMPLES") >= 2


@pytest.mark.parametrize(
    ("changed", "problem"),
    [(("--layer_decay 1.0", "--layer_decay 7"), "--layer_decay 7"), (("--task vqav2", "--task vqa2"), "--task vqa2")],
)
def test_the_check_sees_a_command_that_is_refused(changed, problem, somewhere, monkeypatch):
    command = (
        "torchrun --nproc_per_node=8 run_beit3_finetuning.py --model beit3_base_patch16_480 --input_size 480 "
        "--task vqav2 --layer_decay 1.0 --sentencepiece_model /data/beit3.spm --data_path /data/coco"
    )
    settings_of(command, somewhere, monkeypatch)
    with pytest.raises(InputError, match=problem):
        settings_of(command.replace(*changed), somewhere, monkeypatch)


def unread_variables(name: str, text: str) -> set[str]:
    """Variables that a command sets for one of the scripts, which does not read them."""
    unread = set()
    for piece in pieces(name, text):
        for variables, script in re.findall(r"((?:\b[A-Z_]+=\S+ )+)bash (?:\S*[/}])?([\w.]+\.sh)", piece):
            reads = "".join(path.read_text() for path in SCRIPTS if path.name in (script, "environment.sh"))
            names = re.findall(r"([A-Z_]+)=", variables)
            unread |= {each for each in names if not re.search(rf"\${{?{each}\b", reads)}
    return unread


@of_all
def test_variables_that_commands_set_are_read_by_the_scripts(name):
    assert unread_variables(name, TEXTS[name]) == set()


def test_the_check_sees_a_variable_that_nobody_reads():
    assert unread_variables("x.md", "`TASK=nocaps GPU=8 DATA_PATH=/x bash bash.sh --lr 1`") == {"GPU"}


@pytest.mark.parametrize("flag", ["--help", "--help_all"])
def test_help_is_printed_by_the_command_itself(flag):
    done = subprocess.run(
        [sys.executable, ENTRY, flag], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0 and "--task" in done.stdout and done.stderr == ""


@pytest.mark.parametrize(
    "module", ["demo.make", "demo.contact_sheet", "demo.pointing", "inference.page", "tests.chaos", "benchmarks"]
)
def test_modules_that_are_started_have_a_help(module):
    assert "--help" in flags_of_program("-m", module)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_right_for_bash(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_readme_stays_short():
    assert len(TEXTS["README.md"].splitlines()) < README_LINES
