"""A real browser, headless, driven by its own protocol: JSON messages on two pipes, which needs nothing installed."""

import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 30.0  # seconds


class Browser:
    """One page of Chromium; ``profile``: a folder that is its own."""

    def __init__(self, profile, width=1000, height=640):
        commands, self.to = os.pipe()
        self.answers, events = os.pipe()
        flags = f"--headless --no-sandbox --disable-gpu --hide-scrollbars --window-size={width},{height}"
        line = (
            f'exec "$0" {flags} --no-first-run --remote-debugging-pipe --user-data-dir="$1" 3<&{commands} 4>&{events}'
        )
        self.process = subprocess.Popen(
            ["bash", "-c", line, CHROMIUM, str(profile)],  # dash knows descriptors of one digit only
            pass_fds=(commands, events),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(events)
        self.sent, self.session, self.unread = 0, None, b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.to)
        os.close(self.answers)

    def call(self, method, **parameters):
        """The result of one command."""
        self.sent += 1
        message = {"id": self.sent, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.unread:
                part = os.read(self.answers, 1 << 16)
                assert part, "the browser ended"
                self.unread += part
            text, _, self.unread = self.unread.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self.sent:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url):
        """Show a page."""
        target = self.call("Target.createTarget", url=url)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def evaluate(self, expression):
        """The value of JavaScript."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression):
        """Until it is true."""
        end = time.monotonic() + PATIENCE
        tried = f"(() => {{ try {{ return Boolean({expression}) }} catch {{ return false }} }})()"
        while not self.evaluate(tried):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def press(self, key):
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if kind == "keyDown" else "")

    def screenshot(self):
        """The bytes of a PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
