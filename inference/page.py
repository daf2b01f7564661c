"""A page in the browser to ask a model about pictures. `bash demo.sh` comes here; it needs gradio beside the rest."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit3.system.errors import InputError
from beit3.system.terminal import for_terminal, print_anywhere
from inference.arguments import add_device_arguments, add_model_arguments, within

if TYPE_CHECKING:
    from inference.opening import Opened

USAGE = "bash demo.sh [options]"
DESCRIPTION = """\
Opens a page on this machine: a picture, a question, the five likeliest answers and what the best one looked at; with a
checkpoint for captions a picture, its caption and the alternatives. Programs can ask it too, see docs/PAGE.md.

The checkpoint is FINETUNE=…, else the newest checkpoint-best under output/."""
EPILOG = """\
exit status: 0 ended by Ctrl-C; 2 something is wrong with what was asked"""

HERE = "127.0.0.1"
PORT = 7860
EXAMPLES = Path("demo_data")  # where bash.sh puts the demo's pictures
# The browser may load things from this server alone: no script, font or picture from elsewhere, whatever a part of the
# page asks for. gradio needs scripts and styles inside the page.
CONTENT_POLICY = "; ".join(
    [
        "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'", "img-src 'self' data: blob:", "media-src 'self' data: blob:",
        "font-src 'self' data:", "connect-src 'self'", "worker-src 'self' blob:", "object-src 'none'",
        "base-uri 'self'", "frame-ancestors 'none'",
    ]
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
}  # fmt: skip
_ENCODED = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python3 -m inference.page", usage=USAGE, description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_model_arguments(made)
    made.add_argument("--examples", type=Path, default=EXAMPLES, help="data folder to offer pictures of (demo_data)")
    made.add_argument("--host", default=HERE, help=f"address that the page is opened on ({HERE}: this machine alone)")
    made.add_argument("--port", type=within(int, 0, 65535), default=PORT, help=f"({PORT}); 0 takes a free one")
    add_device_arguments(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0, 2 for what is wrong with the input."""
    print_anywhere()
    asked = parser().parse_args(argv)
    try:
        _run(asked)
    except InputError as error:
        print(for_terminal(f"error: {error}"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("the page is closed", file=sys.stderr)
    return 0


def _run(asked: argparse.Namespace) -> None:
    opened = _opened(asked)
    if importlib.util.find_spec("gradio") is None:
        raise InputError(
            "the page needs gradio, which is not installed: `bash demo.sh` installs it, or pip install -r "
            "requirements-web.txt"
        )
    listening = listen(asked.host, asked.port)
    with listening, tempfile.TemporaryDirectory(prefix="page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # pictures that people upload; gone when the page is closed
        warnings.filterwarnings(
            "ignore", module=r"gradio\."
        )  # of its own code, in which nobody here can change a thing
        # PyTorch, gradio and the weights are loaded from here on.
        import uvicorn

        import utils
        from inference.page_parts import examples_of, make_page
        from inference.predictor import Predictor

        utils.set_up_logging(is_main=True)
        predictor = Predictor(opened, device=asked.device, precision=asked.precision)
        examples, problem = examples_of(predictor, asked.examples)
        if problem is not None:
            print(for_terminal(f"no examples are offered: {problem}"), file=sys.stderr)
        app = application(make_page(predictor, examples), asked.host, [name for name, *_ in examples])
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        address = listening.getsockname()
        print(f"the page is open at http://{_in_address(address[0])}:{address[1]}/  (Ctrl-C closes it)", flush=True)
        if not is_here(asked.host):
            print(
                f"warning: whoever can reach this machine on port {address[1]} can use the page too: it asks for no "
                f"password. --host {HERE} keeps it to this machine",
                file=sys.stderr,
            )
        # An end by SIGTERM removes the uploaded pictures too.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server = uvicorn.Server(config)
        server.shutdown = _quietly(server.shutdown)  # type: ignore[method-assign]
        server.run(sockets=[listening])


def _quietly(shutdown: Any) -> Any:
    """A server's end without the tracebacks of the connections to browsers that are cut by it."""

    async def shut_down(*arguments: Any, **options: Any) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL + 1)
        await shutdown(*arguments, **options)

    return shut_down


def _opened(asked: argparse.Namespace) -> Opened:
    from inference.opening import newest_checkpoint, open_checkpoint

    named = asked.checkpoint or (Path(os.environ["FINETUNE"]) if os.environ.get("FINETUNE") else None)
    if named is None:
        named = newest_checkpoint()
    print(for_terminal(f"checkpoint: {named}"), file=sys.stderr)
    return open_checkpoint(named, tokenizer=asked.tokenizer, answers=asked.answers)


def is_here(host: str) -> bool:
    """Whether an address is this machine's own, which no other machine can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that waits for browsers; port 0: any free one.

    Raises:
        InputError: the port is taken, or the address is none of this machine's.
    """
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        made = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(
            f"--host {host}: {error.strerror}; {HERE} is this machine, 0.0.0.0 all its addresses"
        ) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(128)
    except OSError as error:
        made.close()
        raise InputError(
            f"--host {host} --port {port}: {error.strerror}; name another port, or --port 0 for a free one"
        ) from error
    return made


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class _WithHeaders:
    """A layer around a web application (ASGI) that adds `HEADERS` to its answers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_ENCODED]
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def application(page: Any, host: str, shown: Sequence[str] = ()) -> Any:
    """The page as a web application (ASGI) that sends `HEADERS` with everything.

    shown: files of this machine that a browser may have, those of the examples; all others are out of reach.

    Opened on this machine alone it answers only to this machine's names: a site that gives its own name this machine's
    address would otherwise be let in by the browser.
    """
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from inference.page_parts import FILE_LIMIT, STYLE, THEME

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(_WithHeaders)
    if is_here(host):
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    mounted = gradio.mount_gradio_app(
        app, page, path="/", server_name=host, show_error=False, max_file_size=FILE_LIMIT, ssr_mode=False,
        allowed_paths=list(shown), theme=THEME, css=STYLE, footer_links=["api"], enable_monitoring=False, pwa=False,
    )  # fmt: skip
    # Until a page counts as launched gradio takes any file of this machine that a program names for an upload of its.
    page.has_launched = True
    return mounted


if __name__ == "__main__":
    sys.exit(main())
