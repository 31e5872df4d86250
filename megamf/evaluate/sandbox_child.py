"""The inside of the sandbox: cuts this process off, then runs a program from standard input. Standard library only.

Started by `megamf.evaluate.sandbox` as a script: sandbox_child.py SECONDS MEMORY_BYTES FILE_BYTES REPORT. Standard
input: one line with a word, then the program. When the program ran to its end, the word goes to the descriptor REPORT.
"""

import ctypes
import os
import resource
import sys

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE, PR_SET_NO_NEW_PRIVS = 0x1000, 0x4000, 0x40000, 38
NOBODY = 65534
BLOCKED = 97


def cut_off(seconds: int, memory: int, file_size: int) -> None:
    """No network, no privileges, no children, little memory and time. Raises OSError where that cannot be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    root = os.getuid() == 0
    if libc.unshare(CLONE_NEWNET | (CLONE_NEWNS if root else CLONE_NEWUSER)):
        raise OSError(ctypes.get_errno(), "the network cannot be cut off (unshare)")
    if root:
        show_library(libc)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "privileges cannot be given up (prctl)")
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    # The soft limit ends a program with a signal of its own, the hard one with the signal that could be anything.
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    if root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def show_library(libc: ctypes.CDLL) -> None:
    """Mount the standard library below the working directory, for this process alone.

    The interpreter may stand in a home that only root may enter, and the program will not be root.
    """
    place = os.path.join(os.getcwd(), "python")
    os.mkdir(place)
    kept = libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    if kept or libc.mount(sys.base_prefix.encode(), place.encode(), None, MS_BIND | MS_REC, None):
        raise OSError(ctypes.get_errno(), "the standard library cannot be shown (mount)")
    # Packages that are loaded already (encodings) look for their parts along a path of their own.
    for paths in [sys.path, *(module.__path__ for module in sys.modules.values() if hasattr(module, "__path__"))]:
        paths[:] = [path.replace(sys.base_prefix, place, 1) for path in paths if path.startswith(sys.base_prefix)]


def main() -> None:
    """Cut off, run, report."""
    try:
        cut_off(*(int(word) for word in sys.argv[1:4]))
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(BLOCKED)
    report, word = int(sys.argv[4]), sys.stdin.readline()
    program = sys.stdin.read()
    sys.argv = ["program"]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    os.write(report, word.encode())


if __name__ == "__main__":
    main()
