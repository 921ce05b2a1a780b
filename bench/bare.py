"""The bare alternatives: a command for each run, as other servers do it, without a server around it.

`same_command` is the very nsjail command of our engine, its init included; `plain_command` makes the same jail and
starts the interpreter in it directly; `unjailed_command` starts it without a jail. None has a control group, reads live
output, or judges.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
from collections.abc import Callable

from sandbox.languages import LANGUAGES, environment
from sandbox.model import Job
from sandbox.nsjail import NsjailEngine

Run = Callable[[], None]


def same_command(engine: NsjailEngine, job: Job, expected: str) -> Run:
    """Runs our engine's own command and waits for its end."""
    config_of = engine.config_of(job, 200_000)
    task = engine.task_of(job)

    def run() -> None:
        job_fd, log_fd = os.memfd_create("job", os.MFD_CLOEXEC), os.open(os.devnull, os.O_WRONLY)
        os.pwrite(job_fd, task, 0)
        report, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        config = config_of(job_fd, far_end.fileno(), log_fd)
        with tempfile.NamedTemporaryFile("w", suffix=".cfg") as file:
            file.write(config)
            file.flush()
            done = subprocess.run(
                [engine._opened().nsjail, "--config", file.name],
                stdin=subprocess.DEVNULL, capture_output=True, text=True,
                pass_fds=(job_fd, far_end.fileno(), log_fd), env={}, check=False,
            )  # fmt: skip
        os.close(job_fd)
        os.close(log_fd)
        report.close()
        far_end.close()
        assert done.stdout == expected, done

    return run


def plain_command(engine: NsjailEngine, job: Job, expected: str) -> Run:
    """Runs the interpreter as the jail's only process."""
    interpreter = str(engine._opened().interpreters[job.language].inside)
    file_name = LANGUAGES[job.language].file_name
    surroundings = environment(job.language, home="/work", scratch="/tmp")

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            program = os.path.join(folder, file_name)
            with open(program, "w") as file:
                file.write(job.code)
            os.chmod(folder, 0o755)
            *lines, _, _, _, _ = engine.config_of(job, 200_000)(0, 0, 0).split("\n")
            lines += [f'mount {{ src: "{program}" dst: "/{file_name}" is_bind: true }}']
            lines += [f'envar: "{name}={value}"' for name, value in surroundings.items()]
            lines.append(f'exec_bin {{ path: "{interpreter}" arg: "/{file_name}" }}')
            config = os.path.join(folder, "jail.cfg")
            with open(config, "w") as file:
                file.write("\n".join(lines))
            done = subprocess.run(
                [engine._opened().nsjail, "--config", config], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                env={}, check=False,
            )  # fmt: skip
        assert done.stdout == expected, done

    return run


def unjailed_command(engine: NsjailEngine, job: Job, expected: str) -> Run:
    """Runs the interpreter as a plain child process."""
    interpreter = str(engine._opened().interpreters[job.language].executable)
    file_name = LANGUAGES[job.language].file_name

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, file_name), "w") as file:
                file.write(job.code)
            done = subprocess.run(
                [interpreter, file_name], stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=folder,
                env=environment(job.language, home=folder, scratch=folder), check=False,
            )  # fmt: skip
        assert done.stdout == expected, done

    return run
