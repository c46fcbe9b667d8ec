"""Kernels that begin with the heavy libraries already imported: what importing them costs is paid once, not per
notebook.

    python tools/warm_kernel.py --serve SOCKET      # import, then listen
    python tools/warm_kernel.py SOCKET -f CONNECTION  # one kernel, in a process of its own, forked from that server

Every kernel is a new process with nothing but third-party modules in memory; tractkit is never among them. The second
form hands its streams, variables and working folder to the kernel, waits for it, and takes it along when it is killed.
"""

import array
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import warnings
from contextlib import suppress
from typing import NoReturn

AVAILABLE = hasattr(os, "fork") and hasattr(os, "pidfd_open") and sys.platform == "linux"
HEAVY = [
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
    "IPython.display",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "numpy",
    "torch",
    "torch.utils.data",
    "torch.nn.functional",
    "torch.optim",
    "torch._dynamo",
    "numba",
    "h5py",
    "nibabel",
    "nibabel.streamlines",
    "yaml",
    "safetensors.torch",
    "scipy.ndimage",
    "scipy.spatial",
    "scipy.sparse",
    "dipy.io.stateful_tractogram",
    "dipy.io.streamline",
    "dipy.reconst.shm",
    "dipy.reconst.csdeconv",
    "dipy.direction",
    "dipy.core.gradients",
    "dipy.data",
    "ipywidgets",
    "anywidget",
    "tqdm.auto",
    "PIL.Image",
    "pandas",
    "concurrent.futures",
    "multiprocessing.managers",
]


def serve(path: str) -> NoReturn:
    """Import what is heavy, listen on a Unix socket, and fork a kernel for every caller; ends with standard input."""
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as ipykernel would
    filters = warnings.filters[:]
    for name in HEAVY:
        with suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    warnings.filters[:] = filters  # some libraries change them for everyone
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, "call")
    selector.register(0, selectors.EVENT_READ, "end")
    kernels: dict[socket.socket, tuple[int, int]] = {}  # caller -> (process, its pidfd)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.data == "end":
                for process, _ in kernels.values():
                    os.kill(process, signal.SIGKILL)
                sys.exit(0)
            if key.data == "call":
                caller, _ = listener.accept()
                order, streams = receive(caller)
                process = os.fork()
                if process == 0:
                    selector.close()
                    listener.close()
                    caller.close()
                    for other, (_, handle) in kernels.items():
                        other.close()
                        os.close(handle)
                    become_kernel(order, streams)
                for stream in streams:
                    os.close(stream)
                handle = os.pidfd_open(process)
                kernels[caller] = process, handle
                selector.register(handle, selectors.EVENT_READ, caller)
                selector.register(caller, selectors.EVENT_READ, caller)
            elif key.data in kernels:  # the kernel ended, or its caller did
                caller, (process, handle) = key.data, kernels.pop(key.data)
                selector.unregister(handle)
                selector.unregister(caller)
                if key.fileobj is caller:
                    os.kill(process, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                with suppress(OSError):
                    caller.sendall(json.dumps(code).encode())
                caller.close()
                os.close(handle)


def receive(caller: socket.socket) -> tuple[dict, list[int]]:
    """A caller's order, one line of JSON, and its three streams."""
    text, handles, _, _ = socket.recv_fds(caller, 1 << 16, 3)
    while not text.endswith(b"\n"):
        text += caller.recv(1 << 16)
    return json.loads(text), list(array.array("i", handles))


def become_kernel(order: dict, streams: list[int]) -> NoReturn:
    """Be the kernel that `python -m ipykernel_launcher` with these arguments would have been."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.setsid()
    os.environ.clear()
    os.environ.update(order["environment"])
    os.environ.pop("JPY_PARENT_PID", None)  # the kernel's parent is this server, which ends it with its caller
    os.chdir(order["folder"])
    sys.path[:] = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]
    sys.argv = ["ipykernel_launcher", *order["arguments"]]
    from ipykernel import kernelapp

    code = 1
    try:
        kernelapp.launch_new_instance()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.exit(code)


def call(path: str, *arguments: str) -> int:
    """Have a kernel of the server at `path`, and wait for it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        order = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        text = json.dumps(order).encode() + b"\n"
        sent = socket.send_fds(server, [text], [0, 1, 2])
        server.sendall(text[sent:])
        answer = server.recv(64)
    return json.loads(answer) if answer else 1


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    sys.exit(call(*sys.argv[1:]))
