"""Configuration of `observe`: where the figures of a run go, and what is generated at each evaluation.

Nothing of it changes what is trained, so that a run that goes on may set it anew.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from data_service.settings import Section

__all__ = ["MlflowConfig", "ObserveConfig", "SamplesConfig", "WandbConfig"]


class WandbConfig(Section):
    """Weights & Biases; needs `pip install 'stormjib[wandb]'`. The key comes from WANDB_API_KEY."""

    project: str = Field("stormjib", min_length=1)
    """Project that the run belongs to."""
    entity: str | None = None
    """User or team; by default that of the key."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes a folder that `wandb sync` sends later."""


class MlflowConfig(Section):
    """MLflow; needs `pip install 'stormjib[mlflow]'`. Credentials come from MLflow's environment variables."""

    tracking_uri: str = Field(..., min_length=1)
    """Tracking server (`https://...`), or a local store such as `sqlite:///mlflow.db`."""
    experiment: str = Field("stormjib", min_length=1)
    """Experiment that the run belongs to."""


class SamplesConfig(Section):
    """Text that the model continues, greedily, at each evaluation; for language models."""

    prompts: tuple[str, ...] = ()
    """Texts to continue; by default the beginnings of held-out rows."""
    count: int = Field(2, ge=0, le=64)
    """Held-out rows to continue where no prompts are given; 0 generates nothing."""
    prompt_tokens: int = Field(16, ge=1)
    """Tokens of a held-out row that are given; prompts are cut to what a row holds."""
    max_tokens: int = Field(32, ge=1)
    """Tokens to generate."""


class ObserveConfig(Section):
    """How a run is watched."""

    tensorboard: bool = True
    """Write TensorBoard event files to `STORAGE/NAME/tensorboard`."""
    wandb: WandbConfig | None = None
    """Send figures to Weights & Biases as well."""
    mlflow: MlflowConfig | None = None
    """Send figures to MLflow as well."""
    samples: SamplesConfig = SamplesConfig()
    """Text generated at each evaluation."""
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of one rank's device in TFLOP/s, for MFU; by default that of known GPUs, and none for CPUs."""

    @model_validator(mode="after")
    def _prompts_hold_text(self) -> Self:
        if any(not prompt.strip() for prompt in self.samples.prompts):
            raise ValueError("samples.prompts holds an empty text: there is nothing to continue. Remove it.")
        return self
