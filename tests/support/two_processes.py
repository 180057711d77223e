"""Two real processes with gloo, each running a program that writes `rank<n>.json` into a folder."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["ended", "failure", "reports"]


def reports(program: Path, folder: Path) -> list[dict[str, Any]]:
    """What each process has found, by rank; both must succeed."""
    found = ended(program, folder)
    assert [code for code, _ in found] == [0, 0], "\n".join(told for _, told in found)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def ended(
    program: Path, folder: Path, *arguments: str, timeout: float = 300
) -> list[tuple[int, str]]:
    """How each process ended, by rank, and what it said; a process that hangs is an error.

    Of a program with arguments time counts from when both have made a file `ready<n>`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(program), str(folder), *arguments]
    running = [
        subprocess.Popen(command, env=_environment(rank, port), stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        if arguments:
            _wait_for(folder, running)
        told = [process.communicate(timeout=timeout)[1] for process in running]
    finally:
        for process in running:
            process.kill()
            process.communicate()
    return [(process.returncode, told[rank]) for rank, process in enumerate(running)]


def failure(act: Callable[[], object]) -> str:
    """What a process hears; "none" if nothing is raised."""
    try:
        act()
    except (OSError, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def _wait_for(folder: Path, running: list["subprocess.Popen[str]"]) -> None:
    while any(process.poll() is None for process in running):
        if all((folder / f"ready{rank}").exists() for rank in (0, 1)):
            return
        time.sleep(0.1)


def _environment(rank: int, port: int) -> dict[str, str]:
    """As torchrun or a cluster sets it for a process of its own."""
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    return os.environ | addresses | places | {"PYTHONPATH": os.pathsep.join(sys.path)}
