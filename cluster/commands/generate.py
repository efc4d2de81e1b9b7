"""`stormjib generate`: complete a prompt with a Hugging Face folder or the promoted export of a run."""

import argparse
import json
import sys

from cluster.commands.arguments import config_of
from data_service.errors import ConfigError

__all__ = ["add_arguments", "execute"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--model DIR or FILE, and the sampling."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="a run's YAML file: its newest export is used")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="dotted overrides")
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face folder, instead of FILE")
    parser.add_argument("--prompt", required=True, help="the text to go on from")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="most tokens to generate (64)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability (1)")
    parser.add_argument("--seed", type=int, default=None, help="repeatable sampling")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end instead of a stream")


def execute(arguments: argparse.Namespace) -> int:
    """Stream the completion to standard output."""
    from cluster.promotion import newest_export
    from serve.generate import stream_text

    if (arguments.model is None) == (arguments.file is None):
        raise ConfigError("name either a model folder (--model DIR) or a run's FILE.")
    model = arguments.model or newest_export(config_of(arguments)).uri
    pieces = []
    for piece in stream_text(
        model,
        arguments.prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    ):
        pieces.append(piece)
        if not arguments.json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    text = "".join(pieces)
    print(
        json.dumps({"model": model, "prompt": arguments.prompt, "text": text}, ensure_ascii=False)
        if arguments.json
        else ""
    )
    return 0
