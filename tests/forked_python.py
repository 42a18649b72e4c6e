"""A stand-in for `python` that starts at once: every command is a fork of a process that has imported torch already.

`forked_python.py SOCKET script.py …` runs a command and ends as it ends; without a command it is the server.
"""

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import sys


def ask(path, arguments):
    """Let a fork of the server be what this process would be, with its streams, folder, environment and signals."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    socket.send_fds(connection, [json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()], [0, 1, 2])
    child = int(connection.recv(20))
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, lambda kind, _: os.kill(child, kind))
    code = int(connection.recv(20))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(path):
    """Wait for commands; return in the process of each of them, with its arguments."""
    names = ("torch._dynamo", "torch.distributed.fsdp", "safetensors.torch", "tokenizers", "einops", "jinja2", "tqdm")
    for name in names:
        importlib.import_module(name)

    def reap(*_):
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("listening", flush=True)
    while True:
        signal.signal(signal.SIGCHLD, reap)
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
        child = os.fork()
        if child:
            connection.send(str(child).encode())
            ended = os.pidfd_open(child)
            if ended not in select.select([ended, connection], [], [])[0]:  # whoever asked was killed
                os.kill(child, signal.SIGKILL)
                os._exit(0)
            connection.send(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
            os._exit(0)
        connection.close()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        utf8 = {"encoding": "utf-8", "errors": "surrogateescape"}
        sys.stdin, sys.stdout, sys.stderr = open(0, **utf8), open(1, "w", **utf8), open(2, "w", 1, **utf8)
        arguments, folder, environment = json.loads(message)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        return arguments


def become(kind, *rest):
    """Run a script, or what follows -c or -m, as Python does."""
    import runpy
    import types

    sys.argv = [*rest] if kind == "-m" else [kind, *rest]
    sys.path[0:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    if kind == "-c":
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(rest[0], vars(module))
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    become(*serve(sys.argv[1])) if sys.argv[2:] == [] else ask(sys.argv[1], sys.argv[2:])
