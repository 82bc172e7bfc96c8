"""A script as several ranks on this machine's CPU."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def run_ranks(script: Path, arguments: Sequence[str], num_ranks: int) -> None:
    """Run it under DeepSpeed's launcher, on a free port; RuntimeError, with the end of what it said, where it fails."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    programs = Path(sys.executable).parent
    command = [str(programs / "deepspeed"), "--quiet", "--master_port", str(port), "--num_accelerators", str(num_ranks)]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{programs}:{environment['PATH']}"  # where the launcher looks for python
    done = subprocess.run([*command, str(script), *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name}: {num_ranks} ranks failed: {(done.stdout + done.stderr)[-3000:]}")
