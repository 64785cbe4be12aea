"""Trains two steps with only what Windows and macOS have: bare_system.py FOLDER. No SIGUSR1, no `resource`,
no triton, no DALI.
"""

import os
import signal
import socket
import sys

import psutil  # noqa: F401  its half for Linux asks for what is hidden below

HIDDEN = (
    (signal, "SIGUSR1"),
    (socket, "TCP_KEEPIDLE"),
    (os, "O_DIRECTORY"),
    (os, "O_NONBLOCK"),
    (os, "sysconf"),
)
MODULES = ("resource", "fcntl", "pwd", "triton", "nvidia.dali")

for module, name in HIDDEN:
    delattr(module, name)
for name in MODULES:
    sys.modules[name] = None

from tiny_run import TINY  # noqa: E402

from fastgessl.cli import main  # noqa: E402

if __name__ == "__main__":
    options = (*TINY, "--train.max_steps", "2", "--train.device", "cpu", "--train.run_dir", sys.argv[1])
    main(["train", "digits-simclr", *options])
