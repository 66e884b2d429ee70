"""Kernels forked from one process that has imported what most pages import.

Imports are four seconds of every page, and the same ones. With arguments of pytest this
runs it on notebooks; with the file of a connection, as jupyter starts it below pytest,
it stands for a kernel that the first process forks. Nothing is computed before a fork,
so pages start as in a kernel of their own, each in a process of its own.
"""

import gc
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from socketserver import BaseRequestHandler, ForkingMixIn, UnixStreamServer
from threading import Thread

HERE = Path(__file__).resolve().parent
ADDRESS = "SIPIT_LITE_KERNELS"  # the variable that holds the path of the socket
INLINE = "module://matplotlib_inline.backend_inline"  # as kernels set it at their start
MODULES = ("ipykernel.kernelapp", "ipykernel.ipkernel", "matplotlib.figure", "sympy",
    "transformers.models.auto.modeling_auto", "transformers.models.gpt2.modeling_gpt2",
    "sipit_lite.model")  # fmt: skip


class Kernel(BaseRequestHandler):
    """A process that becomes the kernel of one page."""

    def handle(self) -> None:
        """Take the streams, the folder and the connection, and run until shut down."""
        words, streams, *_ = socket.recv_fds(self.request, 1 << 16, 3)
        os.setsid()  # Ctrl-C at the terminal is for pytest
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        folder, connection = words.decode().split("\0")
        os.chdir(folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Thread(target=self.end_with_its_stand_in, daemon=True).start()
        self.request.sendall(str(os.getpid()).encode())
        kernelapp = import_module("ipykernel.kernelapp")
        kernelapp.launch_new_instance(["-f", connection])

    def end_with_its_stand_in(self) -> None:
        """Whoever kills the stand-in means the kernel."""
        self.request.recv(1)
        os._exit(1)


class Server(ForkingMixIn, UnixStreamServer):
    """Forks a kernel for each stand-in that calls."""

    timeout = 0.5  # seconds after which it looks whether pytest has ended


def stand_in(connection: str) -> None:
    """Ask for a kernel, pass interrupts on, and end with it."""
    with socket.socket(socket.AF_UNIX) as call:
        call.connect(os.environ[ADDRESS])
        words = f"{Path.cwd()}\0{connection}".encode()
        socket.send_fds(call, [words], [0, 1, 2])
        kernel = int(call.recv(32))
        signal.signal(signal.SIGINT, lambda *_: os.kill(kernel, signal.SIGINT))
        parent = os.getppid()
        call.settimeout(1)
        while os.getppid() == parent:  # a worker of pytest may have been killed
            with suppress(TimeoutError):
                call.recv(1)  # nothing ever comes: the kernel has ended
                break


def run(options: list[str]) -> int:
    """The exit code of pytest, whose kernels are forked where that is safe."""
    command = [sys.executable, "-m", "pytest"]
    if sys.platform != "linux":
        return subprocess.call([*command, "--nbval-current-env", *options])
    del sys.path[0]  # this folder, which no page sees
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(f"{folder}/s", Kernel) as server,
    ):
        command += ["--nbval-kernel-name", HERE.name, *options]
        places = {ADDRESS: f"{folder}/s", "JUPYTER_PATH": str(HERE.parents[1])}
        tests = subprocess.Popen(command, env=os.environ | places)
        os.environ.setdefault("MPLBACKEND", INLINE)  # matplotlib reads it once
        for name in MODULES:
            import_module(name)
        gc.freeze()  # what is there stays: no kernel searches it for garbage
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest hears it, and ends
        while tests.poll() is None:
            server.handle_request()
    return tests.returncode


if __name__ == "__main__":
    if ADDRESS in os.environ:
        stand_in(sys.argv[1])
    else:
        sys.exit(run(sys.argv[1:]))
