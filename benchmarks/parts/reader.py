"""A rank that does nothing but read. The access is taken from standard input, since it holds a token.

python -m benchmarks.parts.reader STEPS SLOTS TIMES       prints its readings
"""

import sys
from collections.abc import Iterator

from benchmarks.parts.usage import measure, report
from data_service.access import DataAccess
from data_service.client import DataClient


def main() -> None:
    """Read so many steps, and so many behind them, and so on."""
    access, steps, slots = DataAccess.from_json(sys.stdin.readline()), int(sys.argv[1]), int(sys.argv[2])
    client = DataClient(access)

    def sizes(first: int) -> Iterator[int]:
        for one in client.stream("train", first, first + steps, (0, slots)):
            yield one.tokens.size

    report([measure(f"run {number}", sizes(number * steps)) for number in range(int(sys.argv[3]))])
    client.close()


if __name__ == "__main__":
    main()
