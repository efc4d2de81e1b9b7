"""Shared by the rank tests: one warm fork server, and runs that several tests look at."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from data_service.access import DataAccess
from tests.helpers.rank_programs import be_rank
from tests.helpers.ranks import Outcome, Program, RankServer, specs_of
from tests.helpers.row_service import row_service
from trainer import manifest
from trainer.config import ModelConfig, TrainConfig
from trainer.manifest import Manifest
from trainer.protocol import WorkerSpec

SEQ_LEN = 32
GLOBAL_BATCH = 8
SEED = 7
STEPS = 20
HALF = 10


@dataclass(frozen=True)
class Case:
    """A mesh and what ZeRO partitions on it."""

    dp: int
    pp: int
    zero: int = 1
    precision: str = "fp32"
    tied: bool = True

    def __str__(self) -> str:
        return f"dp{self.dp}pp{self.pp}zero{self.zero}{self.precision}{'' if self.tied else 'untied'}"


@dataclass
class Lab:
    """Runs meshes and keeps what they did."""

    server: RankServer
    folder: Path
    data: DataAccess
    vocab_size: int
    program: Program = be_rank
    _references: dict[Case, Outcome] = field(default_factory=dict)

    def spec(self, case: Case, checkpoints: Path, resume_step: int | None = None, steps: int = STEPS) -> WorkerSpec:
        """Rank 0's specification."""
        return WorkerSpec(
            attempt=1,
            rank=0,
            world_size=case.dp * case.pp,
            dp=case.dp,
            pp=case.pp,
            local_rank=0,
            device="cpu",
            master_addr="127.0.0.1",
            master_port=0,
            seed=SEED,
            seq_len=SEQ_LEN,
            vocab_size=self.vocab_size,
            model=ModelConfig(d_model=32, num_layers=4, num_heads=4, num_kv_heads=2, tie_embeddings=case.tied),
            train=TrainConfig.model_validate(
                {
                    "parallel": {"dp": case.dp, "pp": case.pp},
                    "zero": {"stage": case.zero},
                    "precision": case.precision,
                    "global_batch": GLOBAL_BATCH,
                    "steps": steps,
                    "optimizer": {"lr": 5e-3, "grad_clip": 0.5},
                    "schedule": {"name": "wsd", "warmup_steps": 4},
                    "checkpoint": {"every": HALF},
                    "collective_timeout_s": 30,
                }
            ),
            data=self.data,
            checkpoints_uri=str(checkpoints),
            resume_step=resume_step,
            interface="lo",
        )

    def changed(self, case: Case, checkpoints: Path, resume_step: int | None = None, **keys: object) -> WorkerSpec:
        """Rank 0's specification with some keys of `train` changed: a section's keys, or a value."""
        spec = self.spec(case, checkpoints, resume_step)
        values = spec.train.model_dump()
        for name, value in keys.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) else value
        return replace(spec, train=TrainConfig.model_validate(values))

    def checkpoints(self, case: Case) -> Path:
        """Where the reference run of a case writes."""
        return self.folder / f"reference-{case}"

    def reference(self, case: Case) -> Outcome:
        """A run of STEPS steps with checkpoints at HALF and STEPS, made once."""
        if case not in self._references:
            self._references[case] = self.run(self.spec(case, self.checkpoints(case)))
        return self._references[case]

    def resume(self, case: Case, source: Case, name: str) -> tuple[Outcome, Path]:
        """Go on from HALF of the reference of `source` on another mesh, writing elsewhere."""
        self.reference(source)
        folder = self.folder / name
        copy_step(self.checkpoints(source), folder, HALF)
        return self.run(self.spec(case, folder, resume_step=HALF)), folder

    def run(
        self, spec: WorkerSpec, stop_after: dict[int, int] | None = None, program: Program | None = None
    ) -> Outcome:
        """Run all ranks and commit what they wrote, as the controller does."""
        outcome = self.server.run(program or self.program, specs_of(spec), stop_after)
        commit_all(spec, outcome)
        return outcome


def commit_all(spec: WorkerSpec, outcome: Outcome) -> list[Manifest]:
    """Commit every checkpoint that all ranks wrote."""
    committed = []
    for step, parts in sorted(outcome.parts.items()):
        assert len(parts) == spec.world_size
        (state,) = [part.state for part in parts if part.state is not None]
        receipts = [part.receipt for part in parts]
        committed.append(manifest.commit(spec.checkpoints_uri, step, spec.attempt, receipts, state))
    return committed


def copy_step(source: Path, target: Path, step: int) -> None:
    """Copy one checkpoint by hard links."""
    name = manifest.step_folder(step)
    for path in (source / name).rglob("*"):
        if path.is_file():
            there = target / name / path.relative_to(source / name)
            there.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, there)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("ranks")
    os.environ["OMP_NUM_THREADS"] = "1"
    with row_service(folder, SEQ_LEN, GLOBAL_BATCH, SEED) as service:
        yield Lab(RankServer(folder), folder, service.access, service.manifest.vocab_size)
