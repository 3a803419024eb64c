"""The process in which an isolated tool runs: a pickled call on stdin, a pickled result on stdout.

It protects the run from a tool that hangs, crashes or eats a core. It is no sandbox: the tool has
the rights of the user, the network and the disk.
"""

import os
import sys


def main() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the tool prints must not mix with the result
    import cloudpickle

    from agent_r1.tools import CallError

    payload = sys.stdin.buffer.read()
    path, pickled = cloudpickle.loads(payload)
    sys.path[:] = path
    try:
        result = (True, cloudpickle.loads(pickled)())
    except Exception as error:
        result = (False, (type(error).__name__, str(error), isinstance(error, CallError)))
    out.write(cloudpickle.dumps(result))
    out.close()


if __name__ == "__main__":
    main()
