"""The first process inside a jail: lays out the job's files, starts the program, reaps, and reports its end.

Runs as the interpreter's `-I -S` script with two descriptors named on its command line: a file with the job
(marshalled: argv, environment, files) and a socket to the server. A socket, because /proc gives no second handle to
one; and this process makes itself undumpable, because the program has the same user id and must not reach into it.
Standard library only, nothing of ours, and of it only what starts fast: `json` costs 7 ms, `ctypes` 3 ms, these none.
"""

import _ctypes
import _signal  # type: ignore[import-not-found]  # `signal` itself takes long to import
import marshal
import os
import sys
import time

PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
TOUCHED_SIGNALS = (_signal.SIGINT, _signal.SIGPIPE, _signal.SIGXFSZ)
"""Those that python itself catches or ignores; a program gets them as any program does."""


def main() -> None:
    job_fd, report_fd = int(sys.argv[1]), int(sys.argv[2])
    prctl = _ctypes.dlsym(_ctypes.dlopen(None, os.RTLD_NOW), "prctl")  # type: ignore[arg-type]
    _ctypes.call_function(prctl, (PR_SET_DUMPABLE, 0, 0, 0, 0))
    _ctypes.call_function(prctl, (PR_SET_PDEATHSIG, _signal.SIGKILL, 0, 0, 0))  # when nsjail is gone, so is the jail
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # of all signals, process 1 hears only those that it handles
    with open(job_fd, "rb") as file:
        job = marshal.load(file)  # noqa: S302 -- the server wrote it
    for name, content in job["files"].items():
        if "/" in name:
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            file.write(content)
    os.write(report_fd, b"started %d\n" % time.monotonic_ns())
    program = os.fork()
    if not program:
        os.close(report_fd)
        for number in TOUCHED_SIGNALS:
            _signal.signal(number, _signal.SIG_DFL)
        try:
            os.execve(job["argv"][0], job["argv"], job["environment"])  # noqa: S606
        finally:
            os._exit(127)
    for fd in (0, 1, 2):
        os.close(fd)
    while True:
        pid, status = os.wait()
        if pid == program:
            ended = b"ended %d %d\n" % (time.monotonic_ns(), status)
            if job["return_bytes"]:
                return_files(report_fd, job["return_bytes"])
            os.write(report_fd, ended)
            os._exit(0)


def return_files(report_fd: int, most_bytes: int) -> None:
    """Reports the files that are left."""
    # Not imported: for a module in /, python looks for compiled code in ./__pycache__, where the program may write.
    collect: dict = {"__name__": "collect"}  # type: ignore[type-arg]  # typing takes long to import
    with open("/collect.py") as file:
        exec(file.read(), collect)  # noqa: S102 -- the jail's own, read-only
    collect["end_others_and_report"](report_fd, most_bytes)


main()
