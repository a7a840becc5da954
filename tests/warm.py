"""Command lines in processes of their own, without the time to start Python and import torch.

Each test process has one server, which has imported everything and computed nothing. This file, run
as a script, stands in for the executable: it sends the server its arguments, environment, working
directory, umask and standard streams. The server forks, and the child runs `python -m countermark`
with them. Signals are passed on to the child, its exit status comes back, and it is killed when its
stand-in is.

A test that changes how Python itself starts needs `COLD`: closed streams, resource limits, or
variables that Python reads when it starts.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import signal
import socket
import sys
from typing import Any

UNPRUNED = "COUNTERMARK_TESTS_UNPRUNED"
"""Set in the environment of commands whose marks need not survive in a pruned copy."""
COLD = [sys.executable, "-m", "countermark"]
_LENGTH = 8  # bytes of the number before a request


@functools.cache
def warm() -> list[str]:
    """Start the server at the first call and return the words that begin a command line.

    Where the server cannot be used, these are the words of a real start.
    """
    if not hasattr(os, "pidfd_open"):
        return COLD
    import subprocess
    import tempfile

    folder = tempfile.mkdtemp(prefix="warm-")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{folder}/socket")
        listening.listen(128)
        command = [sys.executable, __file__, "serve", str(listening.fileno()), folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # The server's standard input is closed when this process ends, however that happens, and
        # the server then ends as well.
        server = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            pass_fds=[listening.fileno()],
            env=environment,
            start_new_session=True,
        )
    atexit.register(lambda: server.communicate())
    return [sys.executable, "-I", "-S", __file__, "ask", f"{folder}/socket"]


# The stand-in.


def _ask(address: str, arguments: list[str]) -> int:
    """Have the server run a command line.

    Returns:
        The exit status, or the negative number of the signal that ended the command.
    """
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        umask = os.umask(0)
        os.umask(umask)
        request = {
            "arguments": arguments,
            "environment": dict(os.environ),
            "folder": os.getcwd(),  # noqa: PTH109
            "umask": umask,
        }
        body = json.dumps(request).encode()
        socket.send_fds(server, [len(body).to_bytes(_LENGTH, "big")], [0, 1, 2])
        server.sendall(body)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: server.send(bytes([number])))
        status = server.recv(4)
    if len(status) < 4:
        sys.exit("the warm server has gone")
    return os.waitstatus_to_exitcode(int.from_bytes(status, "big"))


def _end_as(status: int) -> None:
    """End this process as another one ended."""
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


# The server.


def _serve(listening: socket.socket, folder: str) -> dict[str, Any] | None:
    """Fork a child for each request until standard input ends.

    Returns:
        In a child, its request; in the server, when it ends, None.
    """
    import selectors
    import shutil

    children: dict[
        socket.socket, tuple[int, int]
    ] = {}  # the process and its pidfd, by the connection to its stand-in
    with selectors.DefaultSelector() as ready:
        ready.register(0, selectors.EVENT_READ)
        ready.register(listening, selectors.EVENT_READ)
        while True:
            for key, _ in ready.select():
                if key.fileobj == 0:
                    for _process, handle in children.values():
                        signal.pidfd_send_signal(handle, signal.SIGKILL)
                    shutil.rmtree(folder)
                    return None
                if key.fileobj is listening:
                    connection = listening.accept()[0]
                    request, streams = _received(connection)
                    process = os.fork()
                    if process == 0:
                        for number, stream in enumerate(streams):
                            os.dup2(stream, number)
                        for inherited in (listening, connection, *children):
                            inherited.close()
                        for descriptor in (
                            *streams,
                            *(handle for _process, handle in children.values()),
                        ):
                            os.close(descriptor)
                        return request
                    for stream in streams:
                        os.close(stream)
                    handle = os.pidfd_open(process)
                    children[connection] = process, handle
                    ready.register(connection, selectors.EVENT_READ)
                    ready.register(handle, selectors.EVENT_READ, connection)
                elif key.data is None:  # the stand-in passes a signal on, or was killed
                    if key.fileobj in children:
                        _pass_on(key.fileobj, children[key.fileobj][1])
                elif key.data in children:
                    process, handle = children.pop(key.data)
                    status = os.waitpid(process, 0)[1]
                    for ended in (handle, key.data):
                        ready.unregister(ended)
                    os.close(handle)
                    with contextlib.suppress(OSError):  # the stand-in was killed
                        key.data.sendall(status.to_bytes(4, "big"))
                    key.data.close()


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Receive a request and the standard streams that came with it.

    The request is empty if the stand-in has gone.
    """
    length, streams, _, _ = socket.recv_fds(connection, _LENGTH, 3)
    with connection.makefile("rb") as stream:
        body = stream.read(int.from_bytes(length, "big"))
    return json.loads(body or "{}"), streams


def _pass_on(connection: socket.socket, handle: int) -> None:
    """Send a child the signal that its stand-in got; SIGKILL if that has gone."""
    try:
        number = (connection.recv(1) or bytes([signal.SIGKILL]))[0]
    except ConnectionError:
        number = signal.SIGKILL
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(handle, number)


def _import_everything() -> None:
    """Import what the verbs import, at their start and on their way."""
    import gc
    import importlib
    import pkgutil

    import countermark

    names = [
        "tyro",
        "sklearn.datasets",
        "sqlalchemy.dialects.sqlite",
        "uvicorn",
        "rich.table",
        "lightning_fabric",
        *(module.name for module in pkgutil.walk_packages(countermark.__path__, "countermark.")),
    ]
    # No verb needs the integrations, and `__main__` is what each process runs.
    names = [name for name in names if not re.search(r"\.(integrations|__main__)", name)]
    for name in names:
        with contextlib.suppress(
            ImportError
        ):  # an extra that is not installed: the command says so itself
            importlib.import_module(name)
    gc.freeze()


def _run(request: dict[str, Any]) -> None:
    """Run a command line as Python would, had it just started."""
    import runpy

    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.umask(request["umask"])
    os.chdir(request["folder"])
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    for number, (name, mode) in enumerate([("stdin", "r"), ("stdout", "w"), ("stderr", "w")]):
        how = "backslashreplace" if name == "stderr" else errors or "strict"
        stream = open(number, mode, encoding=encoding or None, errors=how, closefd=False)  # noqa: SIM115
        if name == "stderr":
            stream.reconfigure(line_buffering=True)  # type: ignore[attr-defined]
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if os.environ.get(UNPRUNED):
        from countermark.marking import Standing

        Standing.taken = property(lambda standing: standing.agreement >= standing.needed)  # type: ignore[assignment]
    sys.path[0] = request["folder"]
    sys.argv = ["countermark", *request["arguments"]]
    runpy.run_module("countermark", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    role, first, *rest = sys.argv[1:]
    if role == "ask":
        _end_as(_ask(first, rest))
    _import_everything()
    if asked := _serve(socket.socket(fileno=int(first)), *rest):
        _run(asked)
