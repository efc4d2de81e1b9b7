"""`stormjib k8s render FILE`: the run as KubeRay objects."""

import argparse

from cluster.commands.arguments import add_run_file, config_of

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The action, FILE and overrides."""
    parser.add_argument("action", choices=["render"], help="render: print the objects as YAML")
    add_run_file(parser)


def execute(arguments: argparse.Namespace) -> int:
    """Print the objects."""
    config = config_of(arguments)
    from k8s.render import render, to_yaml

    print(to_yaml(render(config)), end="")
    return 0
