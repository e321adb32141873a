"""The page for images, in Chromium, with a server that fails like an HTTP front that was killed."""

from __future__ import annotations

import importlib.resources
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import dom_in_browser

from lift_ray.inference.serve_http import PAGE_RULES

DROP = "classify(new File(['%s'], 'x.jpg', {type: 'image/jpeg'}))"
DIED = (500, "Internal Server Error")
FOUND = (200, '{"classes": [{"name": "ant", "probability": 0.75}]}')
REFUSED = (400, '{"error": "image: must be complete"}')
BUSY = (503, '{"error": "server: too many uploads at once"}')


@pytest.mark.parametrize(
    ("answers", "asked", "words"),
    [
        ([DIED, FOUND], 2, "ant<span>75.0%</span>"),
        ([REFUSED], 1, "image: must be complete"),
        ([BUSY] * 3, 3, "server: too many uploads at once"),
        ([DIED] * 3, 3, "The server did not respond"),
    ],
)
def test_the_page_retries_only_if_the_server_failed(
    answers: list[tuple[int, str]], asked: int, words: str, tmp_path: Path
) -> None:
    posts, dom = asked_by_the_page({b"x": answers}, DROP % "x", tmp_path)
    assert words in dom
    assert posts == [b"x"] * asked


def test_the_page_stops_retrying_an_image_that_another_one_has_replaced(tmp_path: Path) -> None:
    answers = {b"x": [DIED, REFUSED, REFUSED], b"y": [DIED, FOUND]}
    posts, dom = asked_by_the_page(answers, f"{DROP % 'x'}; setTimeout(() => {DROP % 'y'}, 200)", tmp_path)
    assert "ant<span>75.0%</span>" in dom
    assert posts == [b"x", b"y", b"y"]  # x would have come again before the second y


def asked_by_the_page(
    answers: dict[bytes, list[tuple[int, str]]], script: str, tmp_path: Path
) -> tuple[list[bytes], str]:
    """Images in the order in which the page sent them, and its DOM after that.

    Args:
        answers: for each image, what comes back each time.
        script: run when the page is there.
    """
    page = (importlib.resources.files("lift_ray") / "inference" / "serving.html").read_text()
    posts: list[bytes] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(
                200, page.replace("</html>", f"<script>onload = () => {{ {script} }}</script></html>"), "text/html"
            )

        def do_POST(self) -> None:
            image = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.path == "/predict"
            posts.append(image)
            self.answer(*answers[image][posts.count(image) - 1], "application/json")

        def answer(self, status: int, text: str, kind: str) -> None:
            self.send_response(status)
            for name, value in {
                "Content-Type": kind,
                "Content-Length": str(len(text)),
                "Content-Security-Policy": PAGE_RULES,
            }.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        dom = dom_in_browser(f"http://127.0.0.1:{server.server_port}/", tmp_path)
    finally:
        server.shutdown()
        server.server_close()
    return posts, dom
