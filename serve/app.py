"""The Serve application from plain arguments, for a Ray Serve configuration file (`import_path: serve.app:build`).

Owns the choice of the export that is served. It starts nothing: whoever reads the configuration (the KubeRay operator,
`serve deploy`) runs the application. `serve.deployment.deploy` is the way for a driver of our own.
"""

from pydantic import Field
from ray.serve import Application

from data_service.errors import ConfigError
from data_service.settings import Section
from serve.config import ServeConfig
from serve.deployment import application
from serve.exports import finished_exports
from serve.spec import ServeSpec

__all__ = ["AppArgs", "build", "spec_from_args"]


class AppArgs(Section):
    """Arguments of the application, as they stand in the Serve configuration."""

    export_uri: str
    """Folder of a run's exports, `STORAGE/NAME/export`."""
    step: int | None = Field(None, ge=0)
    """Training step to serve; by default the highest that was exported."""
    model_name: str
    """The `model` clients ask for."""
    serve: ServeConfig
    """The `serve` section."""


def build(args: AppArgs) -> Application:
    """The application of the export that `args` chooses.

    Raises:
        ConfigError: there is no such export, or the bearer key's variable is not set.
    """
    found: Application = application(spec_from_args(args))
    return found


def spec_from_args(args: AppArgs) -> ServeSpec:
    """What is to be served: the wanted export, or the highest step of which the export was finished.

    Raises:
        ConfigError: there is no such export.
    """
    finished = finished_exports(args.export_uri)
    step = args.step if args.step is not None else max(finished, default=None)
    if step is None or step not in finished:
        wanted = "an export" if step is None else f"the export of step {step}"
        steps = ", ".join(map(str, sorted(finished))) or "none"
        raise ConfigError(
            f"{args.export_uri} does not hold {wanted}; finished steps there: {steps}. Train or export first, or name "
            "another step."
        )
    export = finished[step]
    return ServeSpec(
        model_uri=export.uri,
        model_name=args.model_name,
        step=export.step,
        digest=export.digest,
        config=args.serve,
        device="cuda" if args.serve.gpus_per_replica else "cpu",
    )
