"""Arguments that several commands share."""

import argparse

from cluster.config import RunConfig, load_config
from data_service import storage

__all__ = ["add_run_file", "config_of", "use_s3"]


def add_run_file(parser: argparse.ArgumentParser) -> None:
    """FILE and the dotted overrides after it."""
    parser.add_argument("file", metavar="FILE", help="the run's YAML file")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        default=[],
        help="dotted overrides, for example train.parallel.pp=2",
    )


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """The checked configuration that FILE and the overrides describe; from here on `s3://` is what it says."""
    config = load_config(arguments.file, arguments.overrides)
    use_s3(config)
    return config


def use_s3(config: RunConfig) -> None:
    """Reach `s3://` from this process, and from all that it starts, as the run does."""
    s3 = config.run.s3
    storage.configure_s3(s3.endpoint_url, s3.region, s3.profile)
