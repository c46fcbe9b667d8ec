"""A real JupyterLab on 127.0.0.1 and a browser looking at one notebook in it, for tests marked `browser`.

Everything it writes is in one temporary folder, and it ends only what it started.

    with Server(folder) as server, browse(chromium) as browser:
        lab = Lab(server, browser)
        page = lab.open("name.ipynb", ["6 * 7"])"""

import ast
import datetime
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import BlockingKernelClient
from playwright.sync_api import Browser, Locator, Page, sync_playwright

CONTRASTS = """() => {
    const rgb = c => c.match(/[\\d.]+/g).map((v, i) => v * (c.startsWith('color(') && i < 3 ? 255 : 1));
    const linear = v => v <= 10 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
    const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
    const over = (a, b) => [0, 1, 2].map(i => (a[3] ?? 1) * a[i] + (1 - (a[3] ?? 1)) * b[i]);
    const behind = e => e ? over(rgb(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
    const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
        const ours = e.closest('.tractkit-readout, .jupyter-widgets') && !e.closest(':disabled');
        if (!text || !ours || !e.checkVisibility()) continue;
        const back = behind(e), [a, b] = [light(over(rgb(getComputedStyle(e).color), back)), light(back)];
        found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), text.slice(0, 40)]);
    }
    return found;
}"""  # of each text of a widget that is seen, with what is behind it, by WCAG 2
SETTINGS = {  # no question asked before a cell can run
    "@jupyterlab/notebook-extension/tracker": {"autoStartDefaultKernel": True},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "results" / "browser"  # kept, for a person to look at


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """JupyterLab, with all that it reads and writes in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        self.home = folder / "home"
        self.work = folder / "work"
        for path in (self.home, self.work):
            path.mkdir(parents=True)

    def __enter__(self) -> "Server":
        own = {name: str(self.home / name.lower()) for name in (
            "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR",
            "JUPYTERLAB_SETTINGS_DIR", "IPYTHONDIR", "XDG_RUNTIME_DIR")}
        for path in own.values():
            Path(path).mkdir(mode=0o700)
        for plugin, settings in SETTINGS.items():
            path = Path(own["JUPYTERLAB_SETTINGS_DIR"]) / f"{plugin}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        env = {**os.environ, **own, "HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        env.pop("JUPYTER_PATH", None)
        command = [
            sys.executable,
            "-m",
            "jupyterlab",
            "--no-browser",
            "--allow-root",
            "--ip=127.0.0.1",
            "--expose-app-in-browser",
            f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=",
            f"--ServerApp.root_dir={self.work}",
        ]
        self.log = open(self.folder / "lab.log", "wb")  # noqa: SIM115
        self.server = subprocess.Popen(
            command, env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            self._wait_for_server()
        except BaseException:
            self._end_server()
            raise
        return self

    def _wait_for_server(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError("JupyterLab did not start:\n" + (self.folder / "lab.log").read_text()[-3000:])

    def _end_server(self) -> None:
        if self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGTERM)  # its own session: the server and the kernels it started
            try:
                self.server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.server.pid, signal.SIGKILL)
                self.server.wait()
        self.log.close()

    def __exit__(self, *exc: object) -> None:
        self._end_server()


@contextmanager
def browse(chromium: str) -> Iterator[Browser]:
    """A browser without a window."""
    with (
        sync_playwright() as p,
        p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]) as browser,
    ):
        yield browser


class Lab:
    """One page of a browser at a server, with one notebook in it at a time."""

    def __init__(self, server: Server, browser: Browser):
        self.server, self.work = server, server.work
        self.page = browser.new_page(viewport={"width": 1000, "height": 900})

    def open(self, name: str, cells: list[str]) -> Page:
        """Write a notebook of code cells, open it, wait for its kernel."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
        nbformat.write(notebook, self.work / name)
        return self.visit(name)

    def visit(self, name: str) -> Page:
        """Open a notebook of the folder, wait for its kernel; those of other notebooks end."""
        self.end_kernels()
        self.page.goto(f"http://127.0.0.1:{self.server.port}/lab/tree/{name}?reset")  # no tab of an earlier test
        self.ready(self.page)
        return self.page

    def end_kernels(self) -> None:
        if self.page.url.startswith("http"):
            self.page.evaluate("() => window.jupyterapp.serviceManager.sessions.shutdownAll()")

    def ready(self, page: Page) -> None:
        """Wait until the notebook is there; answer the dialog that asks for a kernel, if it comes."""
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        dialog, idle = (
            page.locator(".jp-Dialog .jp-mod-accept"),
            page.locator("#jp-main-statusbar").get_by_text("| Idle"),
        )
        dialog.or_(idle).first.wait_for(timeout=30_000)
        if dialog.count():
            dialog.first.click()
            idle.first.wait_for(timeout=30_000)
        page.locator(".jp-Notebook .jp-InputPrompt").first.click()

    def command(self, page: Page, command: str) -> None:
        """Start a command of JupyterLab, e.g. "notebook:run-all-cells"; does not wait for its end."""
        page.evaluate("c => { window.jupyterapp.commands.execute(c); }", command)

    def run_cell(self, page: Page, index: int) -> None:
        """Select one cell and run it; returns when the kernel has answered."""
        page.locator(".jp-Notebook .jp-Cell").nth(index).locator(".jp-InputPrompt").first.click()
        self.command(page, "notebook:run-cell")

    def run_cell_with(self, page: Page, text: str) -> list[str]:
        """Run the one cell that has `text` in it, however long the notebook is; what it printed or showed as text."""
        return page.evaluate(
            """async text => {
            const notebook = window.jupyterapp.shell.currentWidget.content, found = [];
            notebook.widgets.forEach((w, k) => {
                if (w.model.type === 'code' && w.model.sharedModel.getSource().includes(text)) found.push(k);
            });
            if (found.length !== 1) throw new Error(`${found.length} cells have in them: ${text}`);
            notebook.activeCellIndex = found[0];
            await window.jupyterapp.commands.execute('notebook:run-cell');
            return notebook.widgets[found[0]].model.sharedModel.getOutputs().map(o =>
                o.text ? [o.text].flat().join('') : String(o.data?.['text/plain'] ?? o.evalue));
        }""",
            text,
        )

    def begin_cell_with(self, page: Page, text: str) -> None:
        """Run the first cell that has `text` in it; does not wait for its end."""
        page.evaluate(
            """text => {
            const notebook = window.jupyterapp.shell.currentWidget.content;
            notebook.activeCellIndex = notebook.widgets.findIndex(w => w.model.sharedModel.getSource().includes(text));
            window.jupyterapp.commands.execute('notebook:run-cell');
        }""",
            text,
        )

    def trust(self, page: Page) -> None:
        """Trust Notebook: of one that is not, JupyterLab shows no widgets again after a reload."""
        self.command(page, "notebook:trust")
        page.locator(".jp-Dialog .jp-mod-accept").click()

    def restart_and_run_all(self, page: Page, seconds: float = 120) -> None:
        """A new kernel, all cells; returns when the last has been run."""
        self.command(page, "kernelmenu:restart")
        page.locator(".jp-Dialog .jp-mod-accept").click()
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=30_000)
        page.evaluate(
            """milliseconds => Promise.race([window.jupyterapp.commands.execute('notebook:run-all-cells'),
            new Promise((_, no) => setTimeout(() => no(new Error('the cells are still running')), milliseconds))])""",
            1000 * seconds,
        )

    def theme(self, page: Page, name: str) -> None:
        """Light or Dark."""
        page.evaluate(
            "name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: 'JupyterLab ' + name })", name
        )

    def saved_outputs(self, page: Page, name: str) -> list[dict]:
        """Save, and read the outputs as another program would."""
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return [o for c in nbformat.read(self.work / name, 4).cells for o in c.get("outputs", [])]


@contextmanager
def one_lab(folder: Path, chromium: str) -> Iterator[Lab]:
    """A server, a browser and a page, for what is no test."""
    with Server(folder) as server, browse(chromium) as browser:
        yield Lab(server, browser)


class Kernel:
    """The kernel of the notebook that was opened last, asked beside the page."""

    def __init__(self, lab: Lab):
        newest = max((lab.server.home / "jupyter_runtime_dir").glob("kernel-*.json"), key=lambda p: p.stat().st_mtime)
        self.client = BlockingKernelClient(connection_file=str(newest))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=30)

    def ask(self, expression: str) -> Any:
        """The value of an expression of plain Python values."""
        answer = self.client.execute("", user_expressions={"value": expression}, silent=True, reply=True, timeout=30)
        value = answer["content"]["user_expressions"]["value"]
        assert value["status"] == "ok", value
        return ast.literal_eval(value["data"]["text/plain"])

    def close(self) -> None:
        self.client.stop_channels()


class Panel:
    """One of the page's panels of trainers, as a person reads and clicks it."""

    def __init__(self, page: Page, k: int = 0):
        self.page, self.k = page, k
        self.readout = page.locator(".tractkit-readout").nth(k)
        self.chip, self.message = self.readout.locator(".tractkit-chip"), self.readout.locator(".tractkit-message")
        self.step = self.readout.locator(".tractkit-measure[data-name=step] b")

    def button(self, verb: str) -> Locator:
        return self.page.locator(f".jupyter-button:has-text('{verb}')").nth(self.k)

    def press(self, verb: str) -> None:
        self.button(verb).click()

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).nth(self.k).click()

    def batches(self) -> int:
        """Batches done, from the words on the page."""
        return int(self.step.inner_text().replace(",", "")) if self.step.count() else 0

    def painted(self) -> int:
        """How many pixels of its curves are drawn on."""
        return self.readout.locator("canvas").evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v > "
            "0).length"
        )


class Wire:
    """What the kernels send to a page, of the messages that come after this was made and the page was opened
    (again)."""

    def __init__(self, page: Page):
        # when it was sent, what kind of message, bytes with its buffers, what it holds
        self.seen: list[tuple[float, str, int, bytes]] = []
        page.on("websocket", lambda socket: socket.on("framereceived", self._note))

    def _note(self, frame: bytes | str) -> None:
        if isinstance(
            frame, bytes
        ):  # the protocol v1.kernel.websocket.jupyter.org: how many offsets, the offsets, the parts
            offsets = struct.unpack_from(f"<{struct.unpack_from('<Q', frame)[0]}Q", frame, 8)
            header = json.loads(frame[offsets[1]:offsets[2]])
            when = datetime.datetime.fromisoformat(header["date"].replace("Z", "+00:00")).timestamp()
            self.seen.append((when, header["msg_type"], len(frame), frame[offsets[4]:offsets[5]]))
