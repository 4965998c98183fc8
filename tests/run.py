"""Run the tests in as many processes as there are cores, up to four.

    python tests/run.py [what pytest takes]

Processes take file after file, each with a core of its own: a busy neighbour makes two
threads slower than one. The first shows what it does as it goes; what the others had to
say follows.
"""
import os
import subprocess
import sys
import tempfile


def main(argv: list[str]) -> int:
    """Return the exit status: 0 where all processes succeed."""
    command = [sys.executable, "-m", "pytest", *argv]
    count = min(len(os.sched_getaffinity(0)), 4)
    outputs = [tempfile.TemporaryFile("w+") for _ in range(count - 1)]
    others = []
    with tempfile.TemporaryDirectory() as claims:
        env = os.environ | {"PEGASUS_CLAIMS": claims}
        try:
            for out in outputs:
                streams = {"stdout": out, "stderr": subprocess.STDOUT}
                others.append(subprocess.Popen(command, env=env, **streams))
            statuses = [subprocess.call(command, env=env)]
            statuses += [process.wait() for process in others]
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
