"""A real JupyterLab on 127.0.0.1 and a browser looking at one notebook in it, for tests marked `browser`.

Everything it writes is in one temporary folder, and it ends only what it started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
from playwright.sync_api import Page, sync_playwright

SETTINGS = {  # no question asked before a cell can run
    "@jupyterlab/notebook-extension/tracker": {"autoStartDefaultKernel": True},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Lab:
    """`with Lab(folder, chromium) as lab: page = lab.open({"name.ipynb": [cells]})`."""

    def __init__(self, folder: Path, chromium: str):
        self.folder, self.chromium, self.port = folder, chromium, free_port()
        self.home = folder / "home"
        self.work = folder / "work"
        for path in (self.home, self.work):
            path.mkdir(parents=True)

    def __enter__(self) -> "Lab":
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
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--expose-app-in-browser",
                   f"--ServerApp.port={self.port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=",
                   f"--ServerApp.root_dir={self.work}"]
        self.log = open(self.folder / "lab.log", "wb")  # noqa: SIM115
        self.server = subprocess.Popen(command, env=env, stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self._wait_for_server()
            self.playwright = sync_playwright().start()
            self.context = self.playwright.chromium.launch_persistent_context(
                str(self.folder / "profile"), executable_path=self.chromium, viewport={"width": 1000, "height": 900},
                args=["--no-sandbox", "--disable-dev-shm-usage"])
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

    def open(self, name: str, cells: list[str]) -> Page:
        """Write a notebook of code cells, open it, wait for its kernel."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
        nbformat.write(notebook, self.work / name)
        page = self.context.pages[0] if self.context.pages else self.context.new_page()
        page.goto(f"http://127.0.0.1:{self.port}/lab/tree/{name}?reset")  # no tab of an earlier test
        self.ready(page)
        return page

    def ready(self, page: Page) -> None:
        """Wait until the notebook is there; answer the dialog that asks for a kernel, if it comes."""
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        dialog, idle = page.locator(".jp-Dialog .jp-mod-accept"), page.locator("#jp-main-statusbar").get_by_text("| Idle")
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

    def saved_outputs(self, page: Page, name: str) -> list[dict]:
        """Save, and read the outputs as another program would."""
        page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
        return [o for c in nbformat.read(self.work / name, 4).cells for o in c.get("outputs", [])]

    def _end_server(self) -> None:
        if self.server.poll() is None:
            os.killpg(self.server.pid, signal.SIGTERM)  # its own session: the server and the kernels it started
            try:
                self.server.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.server.pid, signal.SIGKILL)
                self.server.wait()
        self.log.close()

    def __exit__(self, *exc) -> None:
        try:
            self.context.close()
            self.playwright.stop()
        finally:
            self._end_server()
