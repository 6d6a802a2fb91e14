"""A Python that need not import the libraries: a server that has imported them forks each process.

``python -m torch.distributed.run`` starts its ranks with the executable that PYTHON_EXEC names. The
script that ``executable`` names is one: it sends its arguments, environment, folder and standard
streams to the server, passes signals on to the forked process and its group, as torchrun does to
its ranks, and exits as the forked process does. It saves each rank
the seconds that importing takes, where a test is not about the start itself. In a forked process,
``sys.executable`` is this script, so that what it starts is forked too: trials, ranks and proofs.
"""

import contextlib
import functools
import gc
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
order = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(order).to_bytes(8, "big")], [0, 1, 2])
server.sendall(order)
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda received, _: os.killpg(pid, received))
code = int(answers.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


def start() -> None:
    """Start the server of this process and of those that it starts; it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    script = folder / "python"
    script.write_text(CLIENT.format(python=sys.executable, address=str(folder / "server")))
    script.chmod(0o755)
    subprocess.Popen([sys.executable, __file__, str(folder), str(os.getpid())])
    os.environ["WARM_PYTHON"] = str(folder)


@functools.cache
def executable() -> str:
    """Give the script, as soon as the server is ready; without a server, start one."""
    if "WARM_PYTHON" not in os.environ:
        start()
    folder = Path(os.environ["WARM_PYTHON"])
    deadline = time.monotonic() + 120
    while not (folder / "server").exists():
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.05)
    return str(folder / "python")


def preload() -> None:
    """Import what commands import, and compute what is the same in each."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft.tuners.lora.bnb  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import sft.fast.proof
    import sft.fast.zero3
    import sft.inference.card
    import sft.merge.probes
    import sft.training.build
    import sft.training.summary  # noqa: F401
    from sft.train import main

    get_checkpoint_conversion_mapping("llama")
    main.compose([])
    del sys.modules["sft.train"]  # python -m warns of a module that is there before it runs
    # A collection would read all objects of the libraries, and so copy their memory: 0.4 seconds,
    # twice a run.
    gc.collect()
    gc.freeze()


def serve(folder: Path, owner: int) -> None:
    """Fork a process for each order, and end those whose client has died."""
    preload()
    address = str(folder / "server")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.partial")
    listener.listen()
    os.rename(f"{address}.partial", address)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(os.pidfd_open(owner), selectors.EVENT_READ, "the tests have ended")
    while True:
        over: set[int] = set()  # a client and its process may end at once
        for key, _ in waiting.select():
            if key.fileobj is listener:
                accept(listener, waiting, str(folder / "python"))
            elif key.data == "the tests have ended":
                shutil.rmtree(folder)
                return
            else:
                client, pid, watch = key.data
                if pid in over:
                    continue
                over.add(pid)
                if key.fileobj is client:  # closed: the client was killed
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    client.sendall(f"{code}\n".encode())
                for ended in (client, watch):
                    waiting.unregister(ended)
                client.close()
                os.close(watch)


def accept(listener: socket.socket, waiting: selectors.BaseSelector, script: str) -> None:
    """Read an order and fork a process that carries it out."""
    client, _ = listener.accept()
    length, streams, _, _ = socket.recv_fds(client, 8, 3)
    order = client.makefile("rb").read(int.from_bytes(length, "big"))
    pid = os.fork()
    if pid == 0:
        listener.close()
        client.close()
        asked = json.loads(order)
        sys.executable, sys.orig_argv = script, [script, *asked[0]]
        carry_out(asked, streams)
    os.setpgid(pid, pid)  # here, too, so that the group is there before its number is told
    for stream in streams:
        os.close(stream)
    watch = os.pidfd_open(pid)
    client.sendall(f"{pid}\n".encode())
    for end in (client, watch):
        waiting.register(end, selectors.EVENT_READ, (client, pid, watch))


def carry_out(order: list[Any], streams: list[int]) -> None:
    """Become what ``python`` with these arguments would have been."""
    arguments, folder, environment = order
    code = 1
    try:
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        arguments = arguments[1:] if arguments[0] == "-u" else arguments
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = arguments[1:], folder
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *arguments[2:]], folder
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).resolve().parent)
            runpy.run_path(arguments[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
