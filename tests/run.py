"""Runs the tests in as many processes as there are cores, up to four, which take file after file.

    python tests/run.py [what pytest takes]

A core each, since a busy neighbour makes two threads slower than one. The first shows what it does as it goes; what the
others had to say follows.
"""
import os
import subprocess
import sys
import tempfile


def main(argv: list[str]) -> int:
    """The exit status: 0 where all of them succeed."""
    command = [sys.executable, "-m", "pytest", *argv]
    outputs = [tempfile.TemporaryFile("w+") for _ in range(min(len(os.sched_getaffinity(0)), 4) - 1)]
    with tempfile.TemporaryDirectory() as claims:
        env = os.environ | {"PEGASUS_CLAIMS": claims}
        others = [subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT) for out in outputs]
        try:
            statuses = [subprocess.call(command, env=env), *(process.wait() for process in others)]
        finally:
            for process in others:  # which are still there when somebody interrupts
                process.terminate()
                process.wait()
    for out in outputs:
        out.seek(0)
        print(out.read(), end="")
    return int(any(statuses))  # one killed by a signal has a negative one


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
