"""A data worker as a process: prints its address, serves until its standard input ends."""

import sys

from data_service.server import DataWorker


def main() -> None:
    dataset, control, token = sys.argv[1:]
    worker = DataWorker(dataset, control, token)
    sys.stdout.write(worker.start() + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    worker.stop()


if __name__ == "__main__":
    main()
