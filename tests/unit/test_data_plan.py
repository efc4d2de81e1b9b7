"""Plans, cursors and tickets: what they hold, what they refuse, and what may change behind a cursor."""

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_service.config import DataConfig, DataServiceConfig
from data_service.cursor import Cursor
from data_service.errors import ConfigError, CursorMismatchError, EmptySplitError
from data_service.manifest import DATASET_VERSION, DatasetManifest, PartInfo, SourceFileInfo
from data_service.order import rows_of_batch
from data_service.plan import MAX_PARTS, MAX_PLAN_BYTES, OrderSpec, Plan
from data_service.planning import check_plan, make_plan
from data_service.ticket import MAX_MEMBERS
from tests.helpers.plans import hand_made
from trainer.config import TrainConfig


def manifest_of(parts, *, eval_parts=(), rows="stream", shard_tokens=1000, shard_rows=0, seq_len=0, **changes):
    """A manifest of parts (source, generation, tokens, rows)."""
    splits = {}
    for split, wanted in (("train", parts), ("eval", eval_parts)):
        found, number = [], 0
        for source, generation, tokens, num_rows in wanted:
            count = -(-tokens // shard_tokens) if rows == "stream" else -(-num_rows // shard_rows)
            found.append(PartInfo(source, generation, 1, tokens, num_rows, number, count))
            number += count
        splits[split] = tuple(found)
    values = dict(
        version=DATASET_VERSION, digest="d", generation=0, rows=rows, row_tokens=seq_len and seq_len + 1,
        shard_tokens=shard_tokens, shard_rows=shard_rows, vocab_size=100, token_dtype="uint16", eos_id=0, labels=(),
        loss_masks=False, splits=splits, num_shards=0, index_digests=(), tokenizer_digest="t", eval_below=0,
        prepare_key="k", inputs={}, files=(), num_records=0, num_rejects=0, num_duplicates=0, num_truncated=0,
    )  # fmt: skip
    return DatasetManifest(**{**values, **changes})


def spec(**changes) -> OrderSpec:
    return OrderSpec(**{"seed": 1, "seq_len": 100, "global_batch": 8, "window_shards": 4, **changes})


def shares(plan: Plan, segment: int = 0) -> list[float]:
    weights = plan.segments[segment].weights
    return [weight / sum(weights) for weight in weights]


class TestRowsOfAPart:
    """Rows of stream shards: each token but the part's first is a label once, and no row leaves its shard."""

    @given(st.integers(1, 400), st.integers(1, 50), st.integers(1, 60))
    def test_every_token_but_the_first_is_a_label_once(self, tokens, shard_tokens, seq_len):
        manifest = manifest_of([("a", 0, tokens, 0), ("b", 0, 400, 0)], shard_tokens=shard_tokens)
        plan = make_plan(manifest, "train", spec(seq_len=seq_len))
        part = plan.parts[0]
        if tokens == 1:
            assert part.source == "b"
            return
        labels = []
        for row in range(part.num_rows):
            shard, number = divmod(row, part.rows_per_shard)
            stored = min(shard_tokens + 1, tokens - shard * shard_tokens)
            length = min(seq_len + 1, stored - number * seq_len)
            assert length >= 2
            begin = shard * shard_tokens + number * seq_len
            labels += range(begin + 1, begin + length)
        assert labels == list(range(1, tokens))

    def test_rows_fixed_at_prepare_are_counted_by_the_manifest(self):
        manifest = manifest_of([("a", 0, 900, 33)], rows="packed", shard_rows=10, seq_len=100)
        plan = make_plan(manifest, "train", spec())
        assert (plan.parts[0].num_rows, plan.parts[0].rows_per_shard, plan.parts[0].num_shards) == (33, 10, 4)
        with pytest.raises(ConfigError, match=re.escape("data.seq_len=99 was asked for, the dataset's packed rows")):
            make_plan(manifest, "train", spec(seq_len=99))

    def test_parts_without_rows_are_left_out_and_an_empty_split_is_refused(self):
        manifest = manifest_of([("a", 0, 1, 0), ("b", 0, 500, 0), ("c", 0, 0, 0)])
        assert [part.source for part in make_plan(manifest, "train", spec()).parts] == ["b"]
        with pytest.raises(EmptySplitError, match="holds no documents. Set data.split.eval above 0"):
            make_plan(manifest, "eval", spec())


class TestWeights:
    """From weights, temperature and changes to segments."""

    MANIFEST = manifest_of([("a", 0, 30_001, 0), ("b", 0, 10_001, 0), ("a", 1, 20_001, 0)])

    def test_without_weights_shares_are_the_rows_exactly(self):
        plan = make_plan(self.MANIFEST, "train", spec())
        assert plan.segments[0].weights == (500, 100)
        assert plan.sources == (("a", (0, 2)), ("b", (1,)))

    def test_temperature_raises_the_share_of_small_sources(self):
        flat = shares(make_plan(self.MANIFEST, "train", spec(temperature=1e6)))
        half = shares(make_plan(self.MANIFEST, "train", spec(temperature=2.0)))
        assert flat == pytest.approx([0.5, 0.5], abs=1e-5)
        assert half == pytest.approx([5**0.5 / (5**0.5 + 1), 1 / (5**0.5 + 1)], abs=1e-8)
        given = spec(temperature=2.0, weights=((0, (("a", 4.0), ("b", 1.0))),))
        assert shares(make_plan(self.MANIFEST, "train", given)) == pytest.approx([2 / 3, 1 / 3], abs=1e-8)

    def test_changes_append_segments(self):
        changes = ((10, (("b", 1.0), ("a", 3.0))), (20, (("a", 0.0), ("b", 2.0))))
        plan = make_plan(self.MANIFEST, "train", spec(weights=changes))
        assert [segment.first_batch for segment in plan.segments] == [0, 10, 20]
        assert [shares(plan, number) for number in range(3)] == [[5 / 6, 1 / 6], [0.75, 0.25], [0.0, 1.0]]

    @given(st.lists(st.floats(0, 1e8), min_size=2, max_size=2).filter(any), st.floats(0.01, 100))
    def test_a_weight_above_zero_never_becomes_zero(self, weights, temperature):
        given = spec(temperature=temperature, weights=((0, tuple(zip("ab", weights, strict=True))),))
        found = make_plan(self.MANIFEST, "train", given).segments[0].weights
        assert [bool(weight) for weight in found] == [bool(weight) for weight in weights]
        assert abs(sum(found) - 10**9) <= 2

    def test_weights_that_do_not_fit_the_sources_are_refused(self):
        with pytest.raises(ConfigError, match="the dataset also holds b"):
            make_plan(self.MANIFEST, "train", spec(weights=((0, (("a", 1.0),)),)))
        with pytest.raises(ConfigError, match="are 0 for every source with rows"):
            make_plan(self.MANIFEST, "train", spec(weights=((5, (("a", 0.0), ("b", 0.0))),)))

    def test_a_weight_for_a_source_without_rows_is_refused_and_says_why(self):
        weights = ((0, (("a", 1.0), ("b", 1.0), ("c", 0.0))), (9, (("a", 1.0), ("b", 1.0), ("c", 2.0))))
        files = (SourceFileInfo("c", "c.csv", "d", 0, 12, 12), SourceFileInfo("a", "a.csv", "e", 0, 9, 1))
        parts = [("a", 0, 30_001, 0), ("b", 0, 10_001, 0)]
        with pytest.raises(ConfigError, match="from global batch 9 on.*c: no row of the train .* 12 records: all"):
            make_plan(manifest_of(parts, files=files), "train", spec(weights=weights))
        files = (SourceFileInfo("c", "c.csv", "d", 0, 12, 2),)
        with pytest.raises(ConfigError, match="c: no row .* 12 records: 2 were rejected, the others repeat texts"):
            make_plan(manifest_of(parts, files=files), "train", spec(weights=weights))
        with pytest.raises(ConfigError, match="c: the dataset holds no row of it"):
            make_plan(manifest_of(parts), "train", spec(weights=weights))
        assert make_plan(manifest_of(parts, files=files), "train", spec(weights=weights[:1])).segments
        # The evaluation takes all rows there are, whatever the weights.
        held_out = manifest_of(parts, eval_parts=parts[:1], files=files)
        assert make_plan(held_out, "eval", spec(weights=weights)).segments

    def test_an_eval_plan_has_no_weights_and_no_skips(self):
        manifest = manifest_of([("a", 0, 5000, 0)], eval_parts=[("a", 0, 501, 0), ("b", 0, 301, 0)])
        given = spec(weights=((0, (("a", 1.0), ("b", 5.0))),), skip=((1, 2),), temperature=3.0)
        plan = make_plan(manifest, "eval", given)
        assert plan.segments[0].weights == (5, 3)
        assert plan.skip == ()
        assert not plan.shuffle

    def test_a_plan_too_long_to_travel_is_refused(self):
        many = manifest_of([(f"source-{number}", 0, 500, 0) for number in range(1200)])
        plan = make_plan(many, "train", spec())
        assert len(plan.to_json()) < MAX_PLAN_BYTES
        weights = tuple((f"source-{number}", 1.0) for number in range(1200))
        with pytest.raises(ConfigError, match="with 21 sets of weights"):
            make_plan(many, "train", spec(weights=tuple((10 * number, weights) for number in range(21))))


def test_from_the_data_section_to_a_plan():
    section = {
        "sources": [{"path": "x/zh-*.jsonl.gz", "weight": 2}, {"path": "b.csv", "name": "en", "weight": 1}],
        "mixture": {"temperature": 1, "changes": [{"first_batch": 5, "weights": {"en": 1, "zh": 0}}]},
        "skip": [{"first": 7, "end": 9}, {"first": 9, "end": 11}],
        "seq_len": 100,
        "isolate_documents": True,
    }
    made = OrderSpec.from_config(DataConfig(**section), seed=3, global_batch=16)
    assert OrderSpec.from_json(made.to_json()) == made
    plan = make_plan(manifest_of([("zh", 0, 5000, 0), ("en", 0, 5000, 0)]), "train", made)
    assert [shares(plan, 0), shares(plan, 1)] == [pytest.approx([2 / 3, 1 / 3]), [0.0, 1.0]]
    assert plan.skip == ((7, 11),)
    assert plan.isolate_documents
    assert plan.seed == 3


class TestCursor:
    """A cursor accepts what changes behind it and refuses what changes before."""

    PARTS = (("a", 0, 101, 10), ("b", 0, 64, 10))

    def plan(self, changes=(), skip=(), **others):
        return hand_made(self.PARTS, segments=[(0, [2, 1]), *changes], skip=skip, **others)

    def test_later_changes_and_skips_are_accepted_and_earlier_ones_refused(self):
        old = self.plan(changes=[(10, [1, 1])], skip=[(4, 6)])
        for consumed in (0, 1, 4, 5, 20, 38):
            cursor = Cursor.of(old, consumed)
            end = old.batch_at(consumed - 1) + 1 if consumed else 0
            for at in range(1, 50):
                if at == 10:
                    continue
                changed = self.plan(changes=sorted([(10, [1, 1]), (at, [1, 5])]), skip=[(4, 6)])
                self.expect(cursor, changed, accepted=at >= end)
            for at in range(6, 50):
                changed = self.plan(changes=[(10, [1, 1])], skip=[(4, 6), (at, at + 3)])
                self.expect(cursor, changed, accepted=at >= end)
            self.expect(cursor, self.plan(changes=[(10, [1, 1])]), accepted=end <= 4)

    @staticmethod
    def expect(cursor, plan, accepted):
        if accepted:
            cursor.check(plan)
        else:
            with pytest.raises(CursorMismatchError, match="or later"):
                cursor.check(plan)

    def test_an_accepted_plan_gave_the_same_rows_so_far(self):
        old = self.plan(skip=[(3, 5)])
        new = self.plan(changes=[(30, [0, 1])], skip=[(3, 5), (22, 40)])
        cursor = Cursor.of(old, 20)
        cursor.check(new)
        for step in range(20):
            np.testing.assert_array_equal(rows_of_batch(old, step), rows_of_batch(new, step))
        assert rows_of_batch(old, 20).tolist() != rows_of_batch(new, 20).tolist()

    @pytest.mark.parametrize(
        "other", [{"seed": 8}, {"global_batch": 4}, {"seq_len": 11}, {"dataset": "d2"}, {"window": 2}]
    )
    def test_anything_else_that_decides_the_rows_is_refused(self, other):
        cursor = Cursor.of(self.plan(), 5)
        with pytest.raises(CursorMismatchError, match="has consumed 5 global batches of plan"):
            cursor.check(self.plan(**other))

    def test_it_travels_in_less_than_a_kilobyte(self):
        cursor = Cursor.of(self.plan(), 10**12)
        assert Cursor.from_json(cursor.to_json()) == cursor
        assert len(cursor.to_json()) < 1000
        half = '{"plan_digest":"x"'
        texts = ["[]", "1", "null", '"x"', "{", half + "}", half + ',"consumed_batches":-1}']
        for broken in (
            *texts,
            half + ',"consumed_batches":1e999}',
            half + ',"consumed_batches":true}',
            half + ',"consumed_batches":"many"}',
            half + ',"consumed_batches":[]}',
        ):
            with pytest.raises(ValueError):  # noqa: PT011
                Cursor.from_json(broken)


PLAN = hand_made([("a", 0, 101, 10), ("b", 0, 64, 10)], segments=[(0, [2, 1]), (9, [1, 1])], skip=[(3, 5)])


def broken(**changes) -> str:
    return json.dumps(json.loads(PLAN.to_json()) | changes)


def part(source="a", generation=0, num_rows=5, rows_per_shard=2) -> dict:
    return {"source": source, "generation": generation, "num_rows": num_rows, "rows_per_shard": rows_per_shard}


def of_parts(*parts: dict) -> str:
    weights = [1] * len({one["source"] for one in parts})
    return broken(parts=list(parts), segments=[{"first_batch": 0, "weights": weights}])


def of_segments(*segments: tuple[int, list]) -> str:
    return broken(segments=[{"first_batch": first, "weights": weights} for first, weights in segments])


class TestPlanFromTheNetwork:
    """What a plan refuses."""

    def test_it_travels_as_json(self):
        again = Plan.from_json(PLAN.to_json())
        assert again == PLAN
        assert again.digest == PLAN.digest
        assert hash(again) == hash(PLAN)
        assert again.to_json() == PLAN.to_json()

    @pytest.mark.parametrize(
        ("text", "problem"),
        [
            ("[]", "this is no plan"),
            ("{", "this is no plan"),
            ("", "this is no plan"),
            ("[" * 100_000, "this is no plan"),
            ("{}", "version: Field required"),
            (broken(more=1), "more: Unexpected keyword argument"),
            (broken(seq_len="10"), "seq_len: Input should be a valid integer"),
            (broken(seq_len=10.5), "seq_len: Input should be a valid integer"),
            (broken(seq_len=True), "seq_len: Input should be a valid integer"),
            (broken(seq_len=0), "seq_len=0 is not in"),
            (broken(global_batch=0), "global_batch=0 is not in"),
            (broken(global_batch=2**31), "global_batch=2147483648 is not in"),
            (broken(window_shards=0), "window_shards=0 is not in"),
            (broken(split="test"), "split: Input should be 'train' or 'eval'"),
            (broken(rows="file"), "rows: Input should be 'stream'"),
            (broken(seed=-1), "seed=-1 is not in"),
            (broken(seed=2**63), "seed=9223372036854775808 is not in"),
            (broken(num_labels=-1), "num_labels=-1 is not in"),
            (broken(dataset_digest=None), "dataset_digest: Input should be a valid string"),
            (broken(parts=[]), "parts=0 is not in"),
            (broken(parts=[["a", 0, 5, 5]]), "parts.0: Input should be an object"),
            (of_parts(part(num_rows=0)), "parts.0.num_rows=0 is not in"),
            (of_parts(part(), part("b", rows_per_shard=0)), "parts.1.rows_per_shard=0 is not in"),
            (of_parts(part(num_rows=2**44, rows_per_shard=2**30)), "parts.0.num_rows=17592186044416 is not in"),
            (of_parts(part(num_rows=2**40, rows_per_shard=1)), "parts.0.num_shards=1099511627776 is not in"),
            (of_parts(*(part("a", n, 2**43, 2**20) for n in range(9))), "the sum of parts.num_rows="),
            (of_parts(*(part("a", n) for n in range(MAX_PARTS + 1))), "parts=4097 is not in"),
            (of_parts(part(), part()), "a source comes twice in one generation"),
            (of_segments(), "segments=0 is not in"),
            (of_segments((1, [1, 1])), "the first segment does not begin at batch 0"),
            (of_segments((0, [1])), "segments.0.weights=1 is not in"),
            (of_segments((0, [0, 0])), "the sum of segments.0.weights=0 is not in"),
            (of_segments((0, [2, -1])), "the least of segments.0.weights=-1 is not in"),
            (of_segments((0, [2**46, 1])), "the sum of segments.0.weights="),
            (of_segments((0, [1, 1]), (0, [1, 1])), "segments.1.first_batch=0 is not in"),
            (of_segments((0, [1.5, 1])), "weights.0: Input should be a valid integer"),
            (broken(shuffle=False), "neither changes of weights nor skipped batches"),
            (broken(skip=[[3, 3]]), "the end of skip.0=3 is not in"),
            (broken(skip=[[3, 6], [5, 8]]), "skip.1=5 is not in"),
            (broken(skip=[[-1, 3]]), "skip.0=-1 is not in"),
            (broken(skip=[[3]]), "skip.0.1: Field required"),
            (broken(skip=[[3, 2**41]]), "the end of skip.0=2199023255552 is not in"),
            (broken(skip=[[n, n + 1] for n in range(0, 600, 2)]), "skip=300 is not in"),
        ],
    )
    def test_what_is_no_plan_is_refused(self, text, problem):
        with pytest.raises(ValueError, match=re.escape(problem)) as caught:
            Plan.from_json(text)
        assert len(str(caught.value)) <= 500

    def test_another_version_of_the_order_is_named(self):
        with pytest.raises(CursorMismatchError, match="a plan of version 1 was asked for, this is version 2"):
            Plan.from_json(broken(version=1))

    @given(
        st.text(max_size=40)
        | st.dictionaries(st.sampled_from(sorted(asdict(PLAN))), st.integers() | st.text()).map(
            lambda changes: broken(**changes)
        )
    )
    def test_only_plans_come_out_of_any_text(self, text):
        try:
            plan = Plan.from_json(text)
        except (ValueError, CursorMismatchError):
            return
        assert Plan.from_json(plan.to_json()) == plan

    def test_a_plan_must_fit_the_dataset_that_answers(self):
        manifest = manifest_of([("a", 0, 3001, 0), ("b", 0, 501, 0)])
        plan = make_plan(manifest, "train", spec())
        check_plan(plan, manifest)
        bigger = replace(plan.parts[0], num_rows=plan.parts[0].num_rows + 1)
        for other in (
            replace(plan, dataset_digest="e"),
            replace(plan, parts=(bigger, *plan.parts[1:])),
            replace(plan, seq_len=50),
            replace(plan, rows="packed"),
            replace(plan, loss_masks=True),
            replace(plan, num_labels=2),
        ):
            with pytest.raises(CursorMismatchError, match="this is dataset d, or the plan does not fit it"):
                check_plan(other, manifest)


@pytest.mark.parametrize(
    "changes",
    [{"temperature": 0.0}, {"temperature": float("nan")}, {"temperature": 1e-9},
     {"weights": [[0, [["a", -1.0]]]]}, {"weights": [[0, [["a", 1e300]]]]}, {"weights": [[0, [["a", float("inf")]]]]},
     {"weights": [[0, [["a", 1.0], ["a", 2.0]]]]}, {"weights": [[0, ["a"]]]}, {"seed": "1"}, {"more": 1},
     {"skip": [1, 2]}, {"global_batch": 0}, {"seq_len": 0}, {"window_shards": 0}],
)  # fmt: skip
def test_an_order_that_cannot_be_computed_with_is_refused(changes):
    with pytest.raises(ValueError, match="this is no order"):
        OrderSpec.from_json(json.dumps(asdict(spec()) | changes))


def test_an_order_out_of_a_plans_bounds_is_refused():
    """By name; and the configuration lets nothing through that a plan refuses."""
    for name, least, most in (
        ("global_batch", 1, 2**31 - 1),
        ("seq_len", 1, 2**24 - 1),
        ("window_shards", 1, 2**20 - 1),
        ("seed", 0, 2**63 - 1),
    ):
        for value in (least - 1, most + 1):
            with pytest.raises(ValueError, match=f"order: {name}={value} is not in"):
                spec(**{name: value})
        plan = make_plan(manifest_of([("a", 0, 5000, 0)]), "train", spec(**{name: most}))
        assert getattr(plan, name) == most
    data = {"sources": [{"path": "a.txt"}]}
    assert DataConfig(**data, shuffle_window_shards=2**20 - 1).shuffle_window_shards == 2**20 - 1
    assert TrainConfig(global_batch=2**31 - 1).global_batch == 2**31 - 1
    with pytest.raises(ValidationError, match="shuffle_window_shards"):
        DataConfig(**data, shuffle_window_shards=2**20)
    with pytest.raises(ValidationError, match="global_batch"):
        TrainConfig(global_batch=2**31)


def test_a_dataset_out_of_a_plans_bounds_is_a_mistake_in_what_was_asked():
    many = manifest_of([(f"s{number}", 0, 1001, 0) for number in range(MAX_PARTS + 1)])
    with pytest.raises(ConfigError, match=r"parts=4097 is not in \[1, 4097\)"):
        make_plan(many, "train", spec())
    with pytest.raises(ConfigError, match=r"skip\.1=3 is not in"):
        make_plan(manifest_of([("a", 0, 5000, 0)]), "train", spec(skip=((5, 7), (3, 4))))


def test_a_service_has_no_more_workers_than_a_ticket_names():
    assert DataServiceConfig(workers=MAX_MEMBERS).workers == MAX_MEMBERS
    with pytest.raises(ValidationError, match="workers"):
        DataServiceConfig(workers=MAX_MEMBERS + 1)
