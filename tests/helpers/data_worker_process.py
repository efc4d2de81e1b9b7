"""A data worker or a control plane as a process: prints its address, serves until its standard input ends."""

import sys

from data_service.control import ControlServer
from data_service.server import DataWorker


def main() -> None:
    role, dataset, where, token = sys.argv[1:]
    server = ControlServer(dataset, token, port=int(where)) if role == "control" else DataWorker(dataset, where, token)
    sys.stdout.write(server.start() + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    server.stop()


if __name__ == "__main__":
    main()
