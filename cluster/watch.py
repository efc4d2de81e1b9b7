"""What the controller shows of a run while it trains: figures to TensorBoard and services, samples as text, traces.

Owns the recorder of a run, the tokenizer that prompts and samples go through, and the look for requests of traces. What
counts is written elsewhere (`RunWriter`); nothing here may end a run.
"""

import logging
import time

from cluster.config import RunConfig
from cluster.console import RunConsole
from cluster.run_store import RunWriter
from data_service.errors import StormjibError
from data_service.manifest import DatasetManifest, tokenizer_uri
from data_service.tokenizer import load_encoder
from trainer.metrics import RunFacts
from trainer.observe.peaks import peak_flops
from trainer.observe.recorder import open_recorder
from trainer.protocol import EvalReport, ProfileSteps, ReadyReport, SampleWishes, StepReport, WorkerSpec

__all__ = ["RunWatch"]

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 2.0
_SHOWN = 200
"""Characters of a sample that the console shows."""


class RunWatch:
    """Follows one run through all its attempts."""

    def __init__(self, config: RunConfig, dataset: DatasetManifest, writer: RunWriter, console: RunConsole) -> None:
        """Open what `observe` asks for."""
        # the data section names paths of its owner's disk; services get the rest
        described = {key: value for key, value in config.resolved().items() if key != "data"}
        self._config = config
        self._writer = writer
        self._console = console
        self._recorder = open_recorder(config.observe, config.root, config.run.name, described, console.say)
        self._encoder = load_encoder(tokenizer_uri(config.dataset_uri), dataset.tokenizer_digest)
        self._eos_id = dataset.eos_id
        self._facts = RunFacts(1, 0)
        self._looked = time.monotonic()
        self._told_failure = False
        self._seen = (writer.folder.profile_request() or (0, 0))[0]

    def sample_wishes(self) -> SampleWishes | None:
        """What ranks generate at each evaluation."""
        asked = self._config.observe.samples
        if not asked.prompts and asked.count == 0:
            return None
        prompts = tuple(tuple(self._encoder.encode(text, add_special_tokens=False).ids) for text in asked.prompts)
        prompts = tuple(prompt for prompt in prompts if prompt)
        return SampleWishes(prompts, asked.count, asked.prompt_tokens, asked.max_tokens)

    def attempt(self, spec: WorkerSpec) -> None:
        """An attempt begins; steps behind its checkpoint are computed again."""
        self._recorder.forget_after(spec.resume_step or 0)
        self._facts = RunFacts(spec.world_size, spec.train.global_batch * spec.seq_len)

    def ready(self, report: ReadyReport) -> None:
        """A rank is ready, and tells what it runs on."""
        self._facts = RunFacts(
            self._facts.num_ranks,
            self._facts.row_tokens,
            report.flops_per_token or None,
            peak_flops(report.device_name, report.precision, self._config.observe.peak_tflops),
        )

    def step(self, report: StepReport) -> None:
        """One optimizer step was done."""
        self._recorder.step(report, self._facts)

    def evaluation(self, report: EvalReport) -> None:
        """One evaluation was done."""
        samples = [(self._text(one.prompt), self._text(self._until_end(one.continuation))) for one in report.samples]
        self._recorder.evaluation(report, samples)
        if samples:
            self._writer.append_metrics(
                {
                    "step": report.step,
                    "samples": [{"prompt": prompt, "text": text} for prompt, text in samples],
                }
            )
            prompt, text = samples[0]
            self._console.say(f"step {report.step}: {prompt[-_SHOWN:]!r} goes on {text[:_SHOWN]!r}")

    def wanted_trace(self) -> ProfileSteps | None:
        """A request for a trace that is new since the last look; looks every 2 s. A store that fails has none."""
        if time.monotonic() - self._looked < _LOOK_EVERY_S:
            return None
        self._looked = time.monotonic()
        try:
            found = self._writer.folder.profile_request()
        except (OSError, StormjibError) as error:
            if not self._told_failure:
                self._told_failure = True
                _log.warning("requests for traces cannot be read from %s: %s", self._writer.folder.profile_uri, error)
            return None
        if found is None or found[0] <= self._seen:
            return None
        self._seen, steps = found
        self._console.say(f"asked for a trace of {steps} steps: {self._writer.folder.traces_uri(self._seen)}")
        return ProfileSteps(self._seen, steps, self._writer.folder.traces_uri(self._seen))

    def close(self) -> None:
        """Bring every figure out."""
        self._recorder.close()

    def _until_end(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        return tokens[: tokens.index(self._eos_id)] if self._eos_id in tokens else tokens

    def _text(self, tokens: tuple[int, ...]) -> str:
        return str(self._encoder.decode(list(tokens), skip_special_tokens=False))
