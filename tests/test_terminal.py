"""What reaches a terminal or a log: no escape sequence, no forged line, no failure for a letter that is not there."""

import logging
import subprocess
import sys
from pathlib import Path

import utils
from beit3.system.terminal import for_terminal
from tasks.vqav2.task import _report_lines

ROOT = Path(__file__).parent.parent


def test_lines_behind_the_first_are_indented_and_nothing_moves_the_cursor():
    assert for_terminal("2 problems:\n- a\n- b") == "2 problems:\n  - a\n  - b"
    assert for_terminal("x\x1b[2J\ry\tz é 漢") == "x\\x1b[2J\\ry z é 漢"


def test_a_name_cannot_forge_a_line_of_the_log(capsys):
    utils.set_up_logging(is_main=True)
    logging.getLogger("tasks").info("%s: read", "a.jpg\n12:00:00 official VQA accuracy: 100.00")
    said = capsys.readouterr().err.splitlines()
    assert said[1] == "  12:00:00 official VQA accuracy: 100.00: read"


def test_question_types_are_shown_as_text():
    report = {
        "overall": 50.0, "questions": 2, "not_answered": 0,
        "by_answer_type": {"other\nofficial VQA accuracy: 100.00": 50.0}, "by_question_type": {"\x1b[31mis": 50.0},
    }  # fmt: skip
    lines = _report_lines(report)
    assert not any("\n" in line or "\x1b" in line for line in lines)
    assert any("other\\nofficial" in line for line in lines)


def test_an_ascii_terminal_fails_for_no_letter():
    environment = {"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "run_beit3_finetuning.py", "--task", "vqav2", "--data_path", "Фото", "--modél", "x"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60, check=False)
    assert result.returncode == 2
    assert b"\\u0424" in result.stderr and b"Traceback" not in result.stderr
