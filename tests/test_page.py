"""The page: what its buttons do, what programs get, what a browser shows, and what nobody can make it do.

Needs gradio (requirements-web.txt); the tests in a browser also Chromium, its driver and selenium, and are skipped
without them.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

pytest.importorskip("gradio", reason="gradio is not installed: pip install -r requirements-web.txt")

import gradio
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from safetensors.torch import load_file

from beit3.data.images import ImageError
from beit3.model.description import about
from beit3.model.weights import write_weights
from beit3.system.errors import InputError
from inference import page
from inference.page_parts import BEFORE, MOST_EXAMPLES, Desk, about_model, examples_of, make_page, telling
from tests.test_inference import answering, captioning, picture, trained  # noqa: F401  fixtures
from tests.test_settings import coco  # noqa: F401  a fixture

ROOT = Path(__file__).parent.parent
# Fetches nothing and sets a mark when it is taken for HTML; the second runs when it is taken for a script.
MARKUP = "<img src=x onerror=window.taken=1><script>window.taken=1</script>"
QUESTION = "what color is the cat?"


@pytest.fixture(scope="module")
def no_picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("wrong") / "wrong.jpg"
    file.write_text("no picture")
    return file


# what the buttons ask


def test_answers_are_those_of_the_model_and_the_map_is_over_the_picture(answering, picture):
    answers, seen = Desk(answering).answer(str(picture), QUESTION, True)
    assert list(answers.items()) == [(each.text, each.confidence) for each in answering.answer(picture, QUESTION)]
    with Image.open(picture) as opened:
        assert seen.shape[1] / seen.shape[0] == pytest.approx(opened.width / opened.height, rel=0.02)
    assert seen.dtype == "uint8" and (seen != seen[:, :, :1]).any()  # coloured somewhere
    assert Desk(answering).answer(str(picture), QUESTION, False) == (answers, None)


def test_captions_are_those_of_the_model(captioning, picture):
    best, others = Desk(captioning).caption(str(picture), 4)
    told = captioning.caption(picture, num_beams=4, top=4)
    assert best == told[0].text and others == [[each.text, round(each.score, 3)] for each in told]
    assert Desk(captioning).caption(str(picture), 1)[0] == captioning.caption(picture, num_beams=1).text


def test_what_is_wrong_is_refused_in_a_sentence(answering, captioning, picture, no_picture):
    for wrong, error, said in [
        (lambda: Desk(answering).answer(None, QUESTION, False), InputError, BEFORE),
        (lambda: Desk(answering).answer(str(picture), None, False), InputError, "the question is empty"),
        (lambda: Desk(answering).answer(str(picture), "a" * 1001, False), InputError, "1001 characters; 1000"),
        (lambda: Desk(answering).answer(str(no_picture), QUESTION, False), ImageError, "not a JPEG"),
        (lambda: Desk(captioning).caption(str(picture), 11), InputError, "11 beams; a whole number from 1 to 10"),
        (lambda: Desk(captioning).caption(str(picture), 1.5), InputError, "1.5 beams"),
    ]:
        with pytest.raises(error, match=said):
            wrong()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("the question '<b>' & more"), "the question '&lt;b&gt;' &amp; more"),
        (ImageError("/secret/<x>.jpg", "empty file"), "the picture cannot be read: empty file"),
        (FloatingPointError("not finite"), "not finite"),
    ],
)
def test_a_problem_is_told_escaped_and_without_the_servers_folders(error, said):
    def fails():
        raise error

    with pytest.raises(gradio.Error) as caught:
        telling(fails)()
    assert caught.value.message == said and caught.value.print_exception is False


def test_an_error_of_our_own_is_not_told_as_the_readers(answering):
    def fails():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        telling(fails)()


def test_one_request_at_a_time_reaches_the_model(captioning, picture, monkeypatch):
    """The number of beams is a setting of the model while it searches."""
    inside, most = 0, 0
    original = captioning.caption

    def counted(*arguments, **options):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.05)
        found = original(*arguments, **options)
        inside -= 1
        return found

    monkeypatch.setattr(captioning, "caption", counted)
    desk, found = Desk(captioning), {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: desk.caption(str(picture), n)})) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and [len(found[n][1]) for n in (1, 2, 3)] == [1, 2, 3]


def test_the_page_says_which_model_it_is_and_what_its_numbers_mean(answering, captioning, trained, monkeypatch):
    rows = about(trained["vqav2"]).description["calibration"]["rows"]
    assert f"calibrated on {rows} validation questions" in about_model(answering)
    monkeypatch.setattr(answering.task, "calibration", type(answering.task.calibration)())
    assert "not calibrated" in about_model(answering)
    assert "below 0" in about_model(captioning) and str(trained["coco_captioning"]) in about_model(captioning)


def test_examples_are_pictures_and_questions_of_the_same_tokenizer(answering, captioning, coco, tmp_path):
    offered, problem = examples_of(answering, coco)
    assert problem is None and len(offered) == MOST_EXAMPLES == len({name for name, _ in offered})
    file = coco / "vqa" / "v2_OpenEnded_mscoco_test2015_questions.json"
    asked = [each["question"].split() for each in json.loads(file.read_text())["questions"]]
    assert all(Path(name).is_file() and question.split() in asked for name, question in offered)
    assert all(Path(name).is_file() for [name] in examples_of(captioning, coco)[0])
    assert examples_of(answering, tmp_path) == ([], None)
    (tmp_path / "other.spm").write_bytes(b"another")
    assert examples_of(answering, tmp_path) == ([], None)
    shutil.copy(coco / "mini.spm", tmp_path / "mini.spm")
    offered, problem = examples_of(answering, tmp_path)
    assert offered == [] and "missing" in problem


def test_nothing_outside_of_this_machine_is_asked_for(answering, coco, monkeypatch):
    """Neither version checks nor analytics nor fonts, from making the page on."""
    asked = []

    def refuse(*arguments, **_):
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: refuse(address))
    threads = threading.active_count()
    made = page.application(make_page(answering, examples_of(answering, coco)[0]), page.HERE)
    time.sleep(0.5)  # what is asked in a thread
    assert asked == [] and threading.active_count() == threads and made is not None


# starting


@pytest.mark.parametrize(
    ("host", "here"),
    [("127.0.0.1", True), ("127.3.3.3", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.4", False), ("example", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host, here):
    assert page.is_here(host) is here


def test_a_page_that_cannot_be_opened_says_why(trained, tmp_path, capsys, monkeypatch):
    checkpoint = ["--checkpoint", str(trained["vqav2"])]
    with page.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert page.main([*checkpoint, "--port", port]) == 2
        assert f"--port {port}: Address already in use; name another port" in capsys.readouterr().err
    assert page.main([*checkpoint, "--host", "203.0.113.7"]) == 2
    assert "--host 203.0.113.7" in capsys.readouterr().err
    assert page.main(["--checkpoint", str(tmp_path / "nothing")]) == 2
    assert "no such checkpoint" in capsys.readouterr().err
    monkeypatch.delenv("FINETUNE", raising=False)
    monkeypatch.chdir(tmp_path)
    assert page.main([]) == 2
    assert "train one (`bash bash.sh`" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert page.main(checkpoint) == 2
    assert "`bash demo.sh` installs it" in capsys.readouterr().err


def test_without_gradio_and_pytorch_mistakes_are_told():
    code = (
        "import sys; from inference import page; status = page.main(['--checkpoint', '/no/such']);"
        "assert status == 2 and not {'torch', 'gradio'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60, capture_output=True)


def test_the_script_without_a_model_says_what_to_run(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("FINETUNE", "SPM", "ANSWERS")}
    done = subprocess.run(
        ["bash", ROOT / "demo.sh"], cwd=tmp_path, env={**environment, "PYTHON": sys.executable}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "installing" not in done.stdout
    assert "no checkpoint-best under output/" in done.stderr and "`bash bash.sh`" in done.stderr


# the server


@contextlib.contextmanager
def serving(checkpoint, folder, *flags):
    """The page in a process of its own, as demo.sh starts it: its address. Uploads go to a folder below `folder`."""
    command = [sys.executable, "-m", "inference.page", "--checkpoint", str(checkpoint), "--port", "0", *flags]
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (folder / "said.txt").open("w+") as said:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said, text=True)
        try:
            deadline = time.monotonic() + 120
            while " is open at " not in (text := (folder / "said.txt").read_text()):
                assert server.poll() is None and time.monotonic() < deadline, text
                time.sleep(0.1)
            yield text.split(" is open at ")[1].split()[0]
        finally:
            server.send_signal(signal.SIGTERM)
            status = server.wait(timeout=60)
    text = (folder / "said.txt").read_text()
    assert status == 0 and "ASGI" not in text and text.endswith("the page is closed\n"), text
    assert not list(folder.glob("page-*")), "uploaded pictures are still there"


@pytest.fixture(scope="module")
def with_markup(trained, tmp_path_factory):
    """A checkpoint whose answers are written like parts of a page."""
    folder = tmp_path_factory.mktemp("markup") / "checkpoint-best"
    said = dict(about(trained["vqav2"]).description)
    said["answers"] = [f"{answer} {MARKUP}" for answer in said["answers"]]
    tokenizer = (trained["vqav2"] / "tokenizer.spm").read_bytes()
    write_weights(folder, load_file(trained["vqav2"] / "model.safetensors"), said, tokenizer)
    return folder


@pytest.fixture(scope="module")
def address(with_markup, coco, tmp_path_factory):
    with serving(with_markup, tmp_path_factory.mktemp("served"), "--examples", str(coco)) as found:
        yield found


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    return Client(address, verbose=False, download_files=str(tmp_path_factory.mktemp("downloaded")))


def test_programs_get_the_answers_and_the_map(client, answering, picture):
    said, seen = client.predict(handle_file(str(picture)), QUESTION, True, api_name="/answer")
    wanted = answering.answer(picture, QUESTION)
    assert said["label"] == f"{wanted[0].text} {MARKUP}"
    assert [each["label"] for each in said["confidences"]] == [f"{each.text} {MARKUP}" for each in wanted]
    assert [each["confidence"] for each in said["confidences"]] == pytest.approx([each.confidence for each in wanted])
    with Image.open(seen) as opened:
        assert max(opened.size) == 640
    assert client.predict(handle_file(str(picture)), QUESTION, False, api_name="/answer")[1] is None


def test_programs_are_told_what_is_wrong(client, picture, no_picture):
    with pytest.raises(AppError, match="the picture cannot be read: not a JPEG"):
        client.predict(handle_file(str(no_picture)), QUESTION, False, api_name="/answer")
    with pytest.raises(AppError, match="the question is empty"):
        client.predict(handle_file(str(picture)), " ", False, api_name="/answer")
    with pytest.raises(AppError, match="a picture is wanted"):
        client.predict(None, QUESTION, False, api_name="/answer")


def test_programs_see_one_function_and_no_other(client):
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/answer"]


@pytest.mark.slow
def test_captions_for_programs(captioning, trained, picture, tmp_path):
    with serving(trained["coco_captioning"], tmp_path, "--host", "0.0.0.0") as address:
        client = Client(address.replace("0.0.0.0", "127.0.0.1"), verbose=False)
        best, others = client.predict(handle_file(str(picture)), 2, api_name="/caption")
    told = captioning.caption(picture, num_beams=2, top=2)
    assert best == told[0].text
    assert others["data"] == [[each.text, round(each.score, 3)] for each in told]
    assert "whoever can reach this machine" in (tmp_path / "said.txt").read_text()


def fetch(url, data=None, **headers):
    """Status, headers and text of an answer."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as answer:
            return answer.status, answer.headers, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode(errors="replace")


def test_the_browser_is_told_to_load_nothing_from_elsewhere(address):
    status, headers, _ = fetch(address)
    assert status == 200
    policy = dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["connect-src"] == "'self'"
    assert not any("http" in sources or "*" in sources for sources in policy.values())


def test_another_sites_name_for_this_machine_is_not_answered(address):
    assert fetch(address, Host="evil.example")[0] == 400
    assert fetch(address, Host="localhost:1234")[0] == 200


def test_an_upload_that_is_too_large_is_refused(address):
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n%b\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert fetch(f"{address}gradio_api/upload", part % b"small", **kind)[0] == 200
    assert fetch(f"{address}gradio_api/upload", part % bytes((50 << 20) + 1), **kind)[0] == 413


def call(address, *data):
    """The events of a call as a program makes it that is not gradio_client."""
    body = json.dumps({"data": data}).encode()
    _, _, said = fetch(f"{address}gradio_api/call/answer", body, **{"Content-Type": "application/json"})
    return fetch(f"{address}gradio_api/call/answer/{json.loads(said)['event_id']}")[2]


def test_a_picture_is_what_was_uploaded_and_no_file_or_address_that_somebody_names(address, coco, tmp_path):
    file = shutil.copy(sorted((coco / "test2015").iterdir())[-1], tmp_path / "secret.jpg")
    with page.listen("127.0.0.1", 0) as other:
        other.settimeout(0.5)
        for named in (file, f"http://127.0.0.1:{other.getsockname()[1]}/a.jpg", "http://localhost.example/a.jpg"):
            for fields in ({"path": str(named)}, {"path": str(named), "url": str(named)}):
                events = call(address, {**fields, "meta": {"_type": "gradio.FileData"}}, QUESTION, False)
                assert "event: error" in events and "event: complete" not in events, (fields, events)
        with pytest.raises(TimeoutError):
            other.accept()
    assert fetch(f"{address}gradio_api/file={file}")[0] in (403, 404)
    assert fetch(f"{address}gradio_api/file={ROOT / 'README.md'}")[0] in (403, 404)


# a browser


def _wanting() -> str | None:
    """What a test in a browser lacks."""
    if importlib.util.find_spec("selenium") is None:
        return "selenium is not installed: pip install selenium"
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: apt-get install chromium chromium-driver" if missing else None


in_a_browser = pytest.mark.skipif(_wanting() is not None, reason=_wanting() or "")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync --window-size=1200,1000"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


class Reader:
    """Somebody who uses the page."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get_log("performance")  # of the reader before
        browser.get(address)
        self.wait_for(lambda: self.find("#ask") and self.find("#picture input[type=file]"))

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def wait_for(self, condition):
        deadline = time.monotonic() + 60
        while not (found := condition()):
            assert time.monotonic() < deadline, self.find("body")[0].text
            time.sleep(0.1)
        return found

    def ask(self, file=None, question=None):
        if file is not None:
            self.find("#picture input[type=file]")[0].send_keys(str(file))
            self.wait_for(lambda: self.find("#picture img"))
        if question is not None:
            self.find("#question textarea, #question input")[0].send_keys(question)
        self.find("#ask")[0].click()

    def is_told(self, sentence):
        """Waits until the page shows a problem, and it is this one."""
        shown = self.wait_for(lambda: [each.text for each in self.find(".toast-body") if sentence in each.text])
        return "Traceback" not in shown[0]

    def requested(self):
        """Addresses that the page has asked for, and not the browser's own start page."""
        events = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("chrome:", "data:", "blob:"))]

    def markup_was_taken(self):
        return self.browser.execute_script("return window.taken === 1")


@in_a_browser
def test_a_reader_uploads_asks_and_reads(browser, address, answering, picture):
    reader = Reader(browser, address)
    reader.ask(picture, QUESTION)
    wanted = answering.answer(picture, QUESTION)
    reader.wait_for(lambda: wanted[-1].text in reader.find("#answers")[0].text)
    said = reader.find("#answers")[0].text
    for answer in wanted:  # whole, markup and all, as text
        assert f"{answer.text} {MARKUP}" in said and f"{round(100 * answer.confidence)}%" in said
    assert not reader.find("#answers script") and not reader.find("#answers img")
    [seen] = reader.wait_for(lambda: reader.find("#seen img"))
    assert reader.wait_for(lambda: browser.execute_script("return arguments[0].naturalWidth", seen)) >= 1
    assert not reader.markup_was_taken()
    requested = reader.requested()
    assert len(requested) > 10 and [url for url in requested if not url.startswith(address)] == []


@in_a_browser
def test_a_wrong_file_is_told_in_a_sentence(browser, address, no_picture):
    reader = Reader(browser, address)
    reader.ask(no_picture, QUESTION)
    assert reader.is_told("the picture cannot be read: not a JPEG")


@in_a_browser
def test_without_a_picture_or_a_question_the_reader_is_told_so(browser, address, picture):
    reader = Reader(browser, address)
    reader.ask(question=QUESTION)
    assert reader.is_told(BEFORE)
    reader = Reader(browser, address)
    reader.ask(picture)
    assert reader.is_told("the question is empty")


@in_a_browser
@pytest.mark.parametrize("question", [MARKUP, f"漢字漢字漢字 {MARKUP}"])
def test_a_script_in_a_question_does_not_run(browser, address, picture, question):
    reader = Reader(browser, address)
    reader.ask(picture, question)
    reader.wait_for(lambda: reader.find(".toast-body") or "%" in reader.find("#answers")[0].text)
    for shown in reader.find(".toast-body"):
        assert "<img src=x" in shown.text  # as text
    time.sleep(0.3)  # an event of an <img> comes after it is there
    assert not reader.markup_was_taken() and not reader.find(".toast-body img[src=x]")


@in_a_browser
def test_an_example_fills_picture_and_question(browser, address, answering, coco):
    [(_, question), *_] = examples_of(answering, coco)[0]
    reader = Reader(browser, address)
    [row, *_] = reader.wait_for(lambda: reader.find(".table-wrap tbody tr, .gallery-item"))
    row.click()
    field = reader.find("#question textarea, #question input")[0]
    reader.wait_for(lambda: field.get_attribute("value") == question)
    reader.ask()
    wanted = answering.answer(*examples_of(answering, coco)[0][0])
    reader.wait_for(lambda: wanted[0].text in reader.find("#answers")[0].text)


def test_the_picture_reaches_the_model_as_it_was_uploaded(answering, picture):
    """gradio would turn it into another format first."""
    from gradio.data_classes import ImageData

    made = make_page(answering)
    [upload] = [block for block in made.blocks.values() if getattr(block, "elem_id", None) == "picture"]
    assert upload.preprocess(ImageData(path=str(picture))) == str(picture)
    assert upload.preprocess(None) is None
    assert torch.is_grad_enabled()
