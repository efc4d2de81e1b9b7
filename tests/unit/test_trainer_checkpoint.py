"""The checkpoint layer: any partition into any other, and only whole steps exist."""

import dataclasses
import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_service import storage
from tests.helpers.written_parts import commit_whole, cut, expected, fragments_of, make_state, write_parts
from trainer.checkpoint import load_ranges, write_part
from trainer.errors import (
    CheckpointCorruptError,
    CheckpointIncompleteError,
    CommitLostError,
    ManifestInvalidError,
)
from trainer.fragments import KINDS, Kind, Range, coverage_problems, intersect, merge
from trainer.manifest import (
    EvalRecord,
    commit,
    list_complete,
    newest_complete,
    read_manifest,
    verify,
)
from trainer.parts import CHUNK_BYTES, group_slices, plan_slices
from trainer.retention import kept_steps, prune

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"embedding.weight": (13, 8), "blocks.0.norm.weight": (8,), "blocks.0.up.weight": (24, 8), "head.weight": (7,)}


@pytest.fixture(params=["local", "object store"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "checkpoints")
    else:
        where = f"memory://{tmp_path.name}/checkpoints"
        yield where
        storage.remove_tree(where)


def _flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


def _part(uri: str, step: int, attempt: int, rank: int) -> Path:
    return Path(uri) / f"step_{step:08d}" / f"attempt_{attempt}" / f"rank_{rank:05d}.safetensors"


@pytest.mark.parametrize("writers", [1, 2, 3, 5, 8])
def test_any_partition_loads_into_any_other(uri: str, writers: int) -> None:
    receipts = write_parts(uri, 40, 1, SHAPES, writers, seed=writers)
    manifest = commit(uri, 40, 1, receipts, make_state(SHAPES, 40, dp=writers))
    for readers in (1, 2, 3, 5, 8):
        parts = cut(SHAPES, readers, seed=readers + 100)
        for own in parts:
            held = {wanted: torch.full((wanted.numel,), torch.nan) for wanted in own}
            for fragment in load_ranges(uri, manifest, own):
                target = next(one for one in own if intersect(one, fragment.range) == fragment.range)
                begin = fragment.start - target.start
                assert held[target][begin : begin + fragment.numel].isnan().all()
                held[target][begin : begin + fragment.numel] = fragment.data
            for wanted, values in held.items():
                whole = expected(wanted.name, wanted.kind, math.prod(SHAPES[wanted.name]), 40)
                assert torch.equal(values, whole[wanted.start : wanted.stop])


def test_a_to_b_to_a_writes_identical_bytes(tmp_path: Path) -> None:
    first = str(tmp_path / "a")
    manifest = commit_whole(first, 10, 1, SHAPES, num_ranks=3)
    second = str(tmp_path / "b")
    fragments = [list(load_ranges(first, manifest, own)) for own in cut(SHAPES, 2, seed=4)]
    receipts = [write_part(second, 10, 1, rank, own) for rank, own in enumerate(fragments)]
    middle = commit(second, 10, 1, receipts, make_state(SHAPES, 10, dp=2))
    third = str(tmp_path / "c")
    for rank, own in enumerate(cut(SHAPES, 3, seed=None)):
        loaded = {fragment.range: fragment for fragment in load_ranges(second, middle, own)}
        joined = [
            dataclasses.replace(
                whole,
                data=torch.cat([loaded[key].data for key in sorted(loaded) if intersect(key, whole.range) == key]),
            )
            for whole in fragments_of(own, SHAPES, 10)
        ]
        write_part(third, 10, 1, rank, joined)
        assert _part(third, 10, 1, rank).read_bytes() == _part(first, 10, 1, rank).read_bytes()


def test_parameters_longer_than_a_chunk(tmp_path: Path) -> None:
    uri = str(tmp_path)
    per_chunk = CHUNK_BYTES // 4
    shapes = {"big.weight": (6 * per_chunk + 5,)}
    manifest = commit_whole(uri, 1, 1, shapes, num_ranks=1)
    whole = expected("big.weight", "exp_avg", shapes["big.weight"][0], 1)
    for start, numel in ((0, 6 * per_chunk + 5), (per_chunk - 1, 2), (3, 5 * per_chunk), (6 * per_chunk, 5)):
        wanted = Range("big.weight", "exp_avg", start, numel)
        pieces = sorted(load_ranges(uri, manifest, [wanted]), key=lambda fragment: fragment.start)
        assert torch.equal(torch.cat([piece.data for piece in pieces]), whole[start : start + numel])
    stored = manifest.parts[0].ranges[1]
    _flip(_part(uri, 1, 1, 0), stored.offset + 2 * CHUNK_BYTES + 7)
    untouched = Range("big.weight", "exp_avg", 0, 2 * per_chunk)
    assert sum(fragment.numel for fragment in load_ranges(uri, manifest, [untouched])) == untouched.numel
    with pytest.raises(CheckpointCorruptError, match=r"rank_00000.*exp_avg of big\.weight"):
        list(load_ranges(uri, manifest, [Range("big.weight", "exp_avg", 2 * per_chunk + 100, 1)]))


def test_parts_are_plain_safetensors(tmp_path: Path) -> None:
    write_parts(str(tmp_path), 3, 1, SHAPES, num_ranks=1)
    found = load_file(_part(str(tmp_path), 3, 1, 0))
    for name, shape in SHAPES.items():
        for kind in KINDS:
            assert torch.equal(found[f"{name}:{kind}:0"], expected(name, kind, math.prod(shape), 3))


def test_overlapping_wishes_are_answered_once(uri: str) -> None:
    manifest = commit_whole(uri, 2, 1, SHAPES)
    wanted = [Range("embedding.weight", "master", 0, 60), Range("embedding.weight", "master", 50, 54)]
    fragments = sorted(load_ranges(uri, manifest, wanted), key=lambda fragment: fragment.start)
    found = torch.cat([fragment.data for fragment in fragments])
    assert torch.equal(found, expected("embedding.weight", "master", 104, 2))


def test_elements_that_are_not_there_are_refused_before_reading(uri: str) -> None:
    manifest = commit_whole(uri, 2, 1, SHAPES)
    for wanted in (Range("other.weight", "master", 0, 1), Range("head.weight", "master", 3, 5)):
        with pytest.raises(CheckpointIncompleteError, match="another model"):
            load_ranges(uri, manifest, [wanted])


def test_manifest_round_trip(uri: str) -> None:
    record = EvalRecord(loss=1000.0, perplexity=math.inf, tokens=3)
    state = make_state(SHAPES, 5, dp=2, evaluation=record, model={"d_model": 8, "tie": True, "eps": 1e-5})
    written = commit(uri, 5, 1, write_parts(uri, 5, 1, SHAPES), state)
    assert read_manifest(uri, 5) == written
    assert read_manifest(uri, 5).state == state


@pytest.mark.parametrize(
    "fault", ["rank missing", "range missing", "twice", "other step", "other attempt", "file", "kind"]
)
def test_incomplete_receipts_are_not_committed(uri: str, fault: str) -> None:
    receipts = write_parts(uri, 7, 2, SHAPES)
    state = make_state(SHAPES, 7, dp=2)
    one, two = receipts
    if fault == "rank missing":
        receipts = [one]
    elif fault == "range missing":
        receipts = [one, dataclasses.replace(two, ranges=two.ranges[:-1])]
    elif fault == "twice":
        receipts = [one, dataclasses.replace(two, ranges=(*two.ranges, two.ranges[0]))]
    elif fault == "other step":
        receipts = [one, dataclasses.replace(two, step=6)]
    elif fault == "other attempt":
        receipts = [one, dataclasses.replace(two, attempt=1)]
    elif fault == "file":
        receipts = [one, dataclasses.replace(two, file="../../elsewhere")]
    else:
        state = dataclasses.replace(state, parameters={**SHAPES, "new.weight": (3,)})
    with pytest.raises(CheckpointIncompleteError, match="Step 7, attempt 2"):
        commit(uri, 7, 2, receipts, state)
    assert list_complete(uri) == []


def test_a_part_that_is_not_where_its_receipt_says_is_not_committed(tmp_path: Path) -> None:
    uri = str(tmp_path)
    receipts = write_parts(uri, 7, 2, SHAPES)
    part = _part(uri, 7, 2, 1)
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(CheckpointIncompleteError, match=r"rank_00001.*bytes"):
        commit(uri, 7, 2, receipts, make_state(SHAPES, 7, dp=2))
    part.unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"rank_00001\.safetensors is not there"):
        commit(uri, 7, 2, receipts, make_state(SHAPES, 7, dp=2))


def test_the_first_commit_stands(uri: str) -> None:
    first = commit_whole(uri, 9, 1, SHAPES)
    receipts = write_parts(uri, 9, 2, SHAPES, num_ranks=3)
    with pytest.raises(CommitLostError, match="attempt 1 has committed"):
        commit(uri, 9, 2, receipts, make_state(SHAPES, 9, dp=3))
    assert read_manifest(uri, 9) == first
    assert commit(uri, 9, 1, first.parts, first.state) == first  # asking again is no error


def test_of_racing_commits_exactly_one_wins(tmp_path: Path) -> None:
    for step in range(1, 9):
        receipts = {attempt: write_parts(str(tmp_path), step, attempt, SHAPES) for attempt in range(1, 5)}
        start = threading.Barrier(len(receipts))
        outcomes: dict[int, str] = {}

        def race(
            attempt: int,
            step: int = step,
            start: threading.Barrier = start,
            receipts: dict[int, list] = receipts,  # type: ignore[type-arg]
            outcomes: dict[int, str] = outcomes,
        ) -> None:
            start.wait(30)
            try:
                commit(str(tmp_path), step, attempt, receipts[attempt], make_state(SHAPES, step, dp=2))
                outcomes[attempt] = "won"
            except CommitLostError:
                outcomes[attempt] = "lost"

        threads = [threading.Thread(target=race, args=(attempt,)) for attempt in receipts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(outcomes.values()) == ["lost", "lost", "lost", "won"]
        assert outcomes[read_manifest(str(tmp_path), step).attempt] == "won"


def test_newest_complete_passes_over_what_cannot_be_loaded_and_names_it(tmp_path: Path) -> None:
    uri = str(tmp_path)
    assert newest_complete(uri) == (None, [])
    for step in (10, 20, 30, 40, 50, 60):
        commit_whole(uri, step, 1, SHAPES)
    (tmp_path / "step_00000060" / "manifest.json").unlink()  # half-written
    _flip(_part(uri, 50, 1, 1), _part(uri, 50, 1, 1).stat().st_size - 1)  # one bit
    part = _part(uri, 40, 1, 0)
    part.write_bytes(part.read_bytes()[:-3])  # cut short
    (tmp_path / "step_00000030" / "manifest.json").write_text('{"step": 30, "att')
    found, skipped = newest_complete(uri)
    assert found is not None
    assert found.step == 20
    assert [one.step for one in skipped] == [60, 50, 40, 30]
    assert "no manifest.json" in skipped[0].reason
    assert "checksum" in skipped[1].reason
    assert "rank_00001" in skipped[1].reason
    assert "bytes" in skipped[2].reason
    assert "no checkpoint manifest" in skipped[3].reason
    assert list_complete(uri) == [10, 20, 30, 40, 50]


def test_a_shallow_look_sees_missing_parts_but_not_flipped_bits(tmp_path: Path) -> None:
    uri = str(tmp_path)
    commit_whole(uri, 10, 1, SHAPES)
    _flip(_part(uri, 10, 1, 1), _part(uri, 10, 1, 1).stat().st_size - 1)
    assert verify(uri, 10, deep=False).step == 10
    with pytest.raises(CheckpointCorruptError):
        verify(uri, 10)
    _part(uri, 10, 1, 1).unlink()
    with pytest.raises(CheckpointCorruptError, match="not there"):
        verify(uri, 10, deep=False)


@pytest.mark.parametrize("damage", ["manifest", "part"])
def test_a_damaged_step_can_be_committed_again(tmp_path: Path, damage: str) -> None:
    uri = str(tmp_path)
    commit_whole(uri, 20, 1, SHAPES)
    if damage == "manifest":
        (tmp_path / "step_00000020" / "manifest.json").write_text("{")
    else:
        _part(uri, 20, 1, 0).unlink()
    again = commit_whole(uri, 20, 2, SHAPES, num_ranks=3)
    assert newest_complete(uri) == (again, [])
    assert (tmp_path / "step_00000020" / "manifest.rejected.json").exists()


def test_manifests_that_contradict_themselves_are_invalid(tmp_path: Path) -> None:
    uri = str(tmp_path)
    good = json.loads(commit_whole(uri, 20, 1, SHAPES).to_json())
    file = tmp_path / "step_00000020" / "manifest.json"

    def damaged(change: object) -> dict:  # type: ignore[type-arg]
        copy = json.loads(json.dumps(good))
        change(copy)  # type: ignore[operator]
        return copy  # type: ignore[no-any-return]

    for changed in (
        damaged(lambda one: one.update(version=99)),
        damaged(lambda one: one.update(step=21)),
        damaged(lambda one: one["parts"].pop()),
        damaged(lambda one: one["parts"][0].update(file="/etc/passwd")),
        damaged(lambda one: one["parts"][0]["ranges"][0].update(offset=10**9)),
        damaged(lambda one: one["parts"][0]["ranges"][0].update(crcs=[])),
        damaged(lambda one: one["parts"][0]["ranges"][0].update(kind="grad")),
        damaged(lambda one: one["state"].pop("plan_digest")),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ManifestInvalidError):
            read_manifest(uri, 20)


def test_prune_keeps_what_it_is_told_the_newest_and_a_save_under_way(uri: str) -> None:
    assert prune(uri, set(), newest=0) == []
    write_parts(uri, 5, 1, SHAPES)  # half-written long ago
    for step in (10, 20, 30, 40):
        commit_whole(uri, step, 1, SHAPES)
    write_parts(uri, 50, 1, SHAPES)  # under way
    assert prune(uri, {20}, newest=40) == [5, 10, 30]
    assert list_complete(uri) == [20, 40]
    verify(uri, 20)
    receipts = write_parts(uri, 50, 1, SHAPES)
    commit(uri, 50, 1, receipts, make_state(SHAPES, 50, dp=2))
    assert prune(uri, set(), newest=50) == [20, 40]
    assert list_complete(uri) == [50]


def test_prune_spares_the_step_a_run_went_on_with_below_a_damaged_one(uri: str) -> None:
    """Step 20 has a manifest and cannot be used: by its number alone it would be the only one to keep."""
    for step in (10, 20):
        commit_whole(uri, step, 1, SHAPES)
    storage.write_bytes(f"{uri}/step_00000020/manifest.json", b"{")
    found, skipped = newest_complete(uri)
    assert found is not None
    assert (found.step, [one.step for one in skipped]) == (10, [20])
    commit_whole(uri, 15, 2, SHAPES)
    keep = kept_steps([step for step in list_complete(uri) if step <= 15], {}, keep_last=1, keep_best=0)
    assert prune(uri, keep, newest=15) == [10]
    assert list_complete(uri) == [15, 20]
    found, _ = newest_complete(uri)
    assert found is not None
    assert found.step == 15
    assert prune(uri, set(), newest=15) == []
    again = commit_whole(uri, 20, 2, SHAPES)
    assert prune(uri, {20}, newest=20) == [15]
    assert newest_complete(uri) == (again, [])


def test_prune_leaves_parts_of_a_save_under_way_above_the_newest(uri: str) -> None:
    """A slower attempt's manifest above: its other attempts' parts may be ours, being written."""
    commit_whole(uri, 10, 2, SHAPES)
    commit_whole(uri, 20, 1, SHAPES)
    receipts = write_parts(uri, 20, 2, SHAPES)
    assert prune(uri, {10}, newest=10) == []
    assert all(storage.exists(f"{uri}/step_00000020/{receipt.file}") for receipt in receipts)


def test_prune_clears_what_other_attempts_left_in_a_committed_step(tmp_path: Path) -> None:
    uri = str(tmp_path)
    write_parts(uri, 10, 1, SHAPES)  # killed before its commit
    commit_whole(uri, 10, 2, SHAPES)
    write_parts(uri, 20, 2, SHAPES)
    commit_whole(uri, 20, 3, SHAPES)
    prune(uri, {10, 20}, newest=20)
    verify(uri, 10)
    verify(uri, 20)
    assert storage.list_names(f"{uri}/step_00000010") == ["attempt_2", "manifest.json"]
    assert storage.list_names(f"{uri}/step_00000020") == ["attempt_3", "manifest.json"]


def test_neighbours_in_a_file_are_read_together_and_far_ones_are_not(tmp_path: Path) -> None:
    per_chunk = CHUNK_BYTES // 4
    shapes = {"a.weight": (9,), "b.weight": (5 * per_chunk,), "c.weight": (9,)}
    manifest = commit_whole(str(tmp_path), 1, 1, shapes, num_ranks=1)
    file = manifest.parts[0].file

    def groups(kinds: tuple[Kind, ...]) -> list[list[str]]:
        slices = [
            one
            for stored in manifest.parts[0].ranges
            if stored.kind in kinds
            for one in plan_slices(file, stored, stored.range)
        ]
        return [[part.stored.name[0] for part in group] for group in group_slices(reversed(slices))]

    # two chunks, two, and a fifth; nine elements each beside
    assert groups(("master",)) == [["a"], ["b"], ["b"], ["b"], ["c"]]
    assert groups(("exp_avg_sq",)) == [["a"], ["b"], ["b"], ["b", "c"]]
    assert [len(group) for group in groups(KINDS)][0] == 3


def test_retention_rule() -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 50: 1.5, 60: 0.1}
    assert kept_steps([10, 20, 30, 40, 50, 60], losses, keep_last=2, keep_best=1) == {50, 60, 20}
    assert kept_steps([10, 20, 30, 40, 50, 60], losses, keep_last=1, keep_best=2) == {60, 20, 50}
    assert kept_steps([10, 20], {}, keep_last=1, keep_best=1) == {20}
    assert kept_steps([10, 20, 30], {10: 1.0, 20: 1.0}, keep_last=1, keep_best=1) == {30, 20}
    assert kept_steps([], {}, keep_last=3, keep_best=1) == set()


def test_merge_and_intersect() -> None:
    ranges = [Range("a", "master", 5, 5), Range("a", "master", 0, 5), Range("a", "master", 20, 1)]
    ranges += [Range("a", "exp_avg", 7, 2), Range("a", "master", 8, 4), Range("b", "master", 0, 1)]
    assert list(merge(ranges)) == [
        Range("a", "exp_avg", 7, 2),
        Range("a", "master", 0, 12),
        Range("a", "master", 20, 1),
        Range("b", "master", 0, 1),
    ]
    assert intersect(Range("a", "master", 0, 5), Range("a", "master", 5, 5)) is None
    assert intersect(Range("a", "master", 0, 5), Range("a", "exp_avg", 0, 5)) is None
    assert intersect(Range("a", "master", 2, 9), Range("a", "master", 0, 5)) == Range("a", "master", 2, 3)


def test_coverage_names_gaps_overlaps_and_strangers() -> None:
    kinds = ("master",)
    numels = {"a": 10, "b": 4}
    whole = [Range("a", "master", 0, 6), Range("a", "master", 6, 4), Range("b", "master", 0, 4)]
    assert coverage_problems(whole, numels, kinds) == []
    for changed, named in (
        (whole[:1] + whole[2:], "elements 6 to 10 are missing"),
        (whole[1:], "elements 0 to 6 are missing"),
        ([*whole, Range("a", "master", 3, 1)], "are there twice"),
        ([*whole, Range("b", "master", 4, 1)], "beyond its end"),
        ([*whole, Range("c", "master", 0, 1)], "belongs to no parameter"),
        ([*whole, Range("b", "exp_avg", 0, 4)], "belongs to no parameter"),
        (whole[:2], "elements 0 to 4 are missing"),
    ):
        assert any(named in problem for problem in coverage_problems(changed, numels, kinds)), named


@pytest.mark.parametrize("held", [(0, 8), (2, 6)], ids=["all", "half"])
def test_a_load_takes_hardly_more_memory_than_what_it_loads(large: str, held: tuple[int, int]) -> None:
    command = [sys.executable, "-m", "tests.helpers.load_memory", large, "1", *map(str, held)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["state_bytes"] == 12 * (held[1] - held[0]) * 1400 * 1024
    assert found["taken_bytes"] < 1.3 * found["state_bytes"]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three parts of 138 MB in all, cut inside of parameters."""
    uri = str(tmp_path_factory.mktemp("large"))
    commit_whole(uri, 1, 1, {f"blocks.{index}.up.weight": (1400, 1024) for index in range(8)}, num_ranks=3)
    return uri
