"""`python -m data_service control|worker`: the data service on any host, outside a run.

    export STORMJIB_DATA_TOKEN=$(openssl rand -hex 32)      # or --token-file
    python -m data_service control --dataset s3://bucket/dataset --host 10.0.0.5 --port 7000
    python -m data_service worker --dataset s3://bucket/dataset --control 10.0.0.5:7000 --host 10.0.0.6

Prints one line of JSON when it serves, and ends well on SIGTERM or SIGINT. Exit codes: 0 after a stop, 1 when it
failed, 2 for a mistake in what was asked.

Owns the command line. Refuses secrets in arguments, which every user of the machine can read.
"""

import argparse
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

from data_service import storage
from data_service.bearer import TOKEN_VARIABLE, read_token
from data_service.errors import ConfigError, StormjibError

__all__ = ["main"]

_DEFAULT_CACHE_BYTES = 8 << 30


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_service", description="The data service outside a run.")
    commands = parser.add_subparsers(dest="role", required=True, metavar="control|worker")
    for role, text in (("control", "knows the workers and makes plans"), ("worker", "serves rows from shards")):
        command = commands.add_parser(role, help=text, description=f"The {role} of the data service: {text}.")
        command.add_argument("--dataset", required=True, help="folder or URI of the prepared dataset")
        command.add_argument("--digest", help="which of the dataset's generations; the newest by default")
        command.add_argument(
            "--host", default="127.0.0.1", help="address to listen on, at which others reach it (default %(default)s)"
        )
        command.add_argument("--port", type=_port, default=0, help="0, the default, takes a free one")
        command.add_argument(
            "--token-file", help=f"file with the token; by default the environment variable {TOKEN_VARIABLE} holds it"
        )
        command.add_argument(
            "--metrics-port", type=_port, help="serve Prometheus metrics there, behind the token; 0 takes a free one"
        )
        for name in ("endpoint-url", "region", "profile"):
            command.add_argument(f"--s3-{name}", help=f"as run.s3.{name.replace('-', '_')}, for s3:// datasets")
        if role == "worker":
            command.add_argument(
                "--control",
                type=_addresses,
                required=True,
                help="host:port of the control plane, or of several with commas between",
            )
            command.add_argument("--cache-dir", help="folder for shards of a remote dataset")
            command.add_argument(
                "--cache-bytes", type=_positive, default=_DEFAULT_CACHE_BYTES, help="most bytes there (default 8 GiB)"
            )
    return parser


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65_535:
        raise ValueError(text)
    return port


def _addresses(text: str) -> str:
    for one in text.split(","):
        host, _, port = one.rpartition(":")
        if not host or not port.isdecimal():
            raise argparse.ArgumentTypeError(f"{one!r} is no host:port")
    return text


def _positive(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise ValueError(text)
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes; returns the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        if arguments.host in ("0.0.0.0", "::", "[::]", ""):
            raise ConfigError(
                f"--host {arguments.host or '(nothing)'} was asked for; others are told to come to this address, and "
                "this one is none. Name the address of one network interface."
            )
        s3 = (arguments.s3_endpoint_url, arguments.s3_region, arguments.s3_profile)
        if any(s3):
            storage.configure_s3(*s3)
        token = read_token(arguments.token_file)
        return (
            _serve_control(arguments, token, stop)
            if arguments.role == "control"
            else _serve_worker(arguments, token, stop)
        )
    except StormjibError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _serve_control(arguments: argparse.Namespace, token: str, stop: threading.Event) -> int:
    from data_service.control import ControlServer

    server = ControlServer(
        arguments.dataset,
        token,
        dataset_digest=arguments.digest,
        host=arguments.host,
        port=arguments.port,
        metrics_port=arguments.metrics_port,
    )
    _say("control", server.start(), server.metrics_address)
    _wait(stop)
    server.stop()
    return 0


def _serve_worker(arguments: argparse.Namespace, token: str, stop: threading.Event) -> int:
    from data_service.server import DataWorker

    worker = DataWorker(
        arguments.dataset,
        arguments.control,
        token,
        dataset_digest=arguments.digest,
        host=arguments.host,
        port=arguments.port,
        cache_dir=arguments.cache_dir,
        cache_bytes=arguments.cache_bytes,
        metrics_port=arguments.metrics_port,
    )
    _say("worker", worker.start(), worker.metrics_address)
    _wait(stop)
    worker.stop()
    return 0


def _say(role: str, address: str, metrics_address: str | None) -> None:
    line = {"role": role, "address": address, "metrics_address": metrics_address, "pid": os.getpid()}
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _wait(stop: threading.Event) -> None:
    while not stop.wait(1.0):  # a wait without an end would keep signals out on some platforms
        pass


if __name__ == "__main__":
    sys.exit(main())
