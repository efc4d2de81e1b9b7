"""A run that reads from a data service which runs already: its own processes, kept up when the run is over."""

from pathlib import Path

import pytest

from cluster.config import load_config
from data_service.prepare import prepare
from tests.helpers.data_runs import TOKEN, control_process, worker_process
from tests.helpers.runs import RunProcess, running, step_records, write_run

TRAIN = "  parallel: {dp: 1, pp: 1}\n  steps: 6\n  eval: {every: 1000, max_batches: 2}\n  checkpoint: {every: 3}\n"
TOKEN_VARIABLE = "STORMJIB_DATA_TOKEN"


@pytest.mark.timeout(240)
def test_a_run_reads_from_a_service_that_runs_already(tmp_path: Path) -> None:
    file = write_run(tmp_path, slots=1, train=TRAIN)
    config = load_config(file)
    prepare(config.data, config.dataset_uri)
    with (
        control_process(config.dataset_uri) as (control, address),
        worker_process(config.dataset_uri, address) as (worker, _),
    ):
        override = f"data.service.address=['{address}']"
        assert refusal(file, override, "") == 2, "no token"
        assert refusal(file, override, "x" * 20) == 2, "another token"
        with running("train", file, override, env={TOKEN_VARIABLE: TOKEN}) as run:
            assert run.wait() == 0, run.output[-4000:]
            assert len(step_records(run.folder)) == 6
            (ready,) = run.events("data_service_ready")
            assert (ready["workers"], ready["control"]) == ([], [address])
        assert (control.poll(), worker.poll()) == (None, None), "the run ended a service that is not its own"


def refusal(file: Path, override: str, token: str) -> int:
    """The exit code of a run with this token, whose message names the variable and shows no token."""
    run = RunProcess("train", file, [override], env={TOKEN_VARIABLE: token})
    try:
        code = run.wait(120)
        assert TOKEN_VARIABLE in run.output, run.output
        assert "data.service.address" in run.output
        assert "Traceback" not in run.output
        assert TOKEN not in run.output
        assert not run.events("attempt_started")
        return code
    finally:
        run.end()
