"""The sources of `--data`: files in several formats, hub data sets, and mixtures by weight.

python -m pytest tests/dataset/test_sources.py
"""

import json
from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mlx_retrieval.dataset import sources
from mlx_retrieval.dataset.row_files import hub_validation
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.rows import Rows, find_files
from mlx_retrieval.utils import errors


def written(path, name, count, extra=None):
    rows = [{"query": f"{name} q{i}", "document": f"{name} d{i}", **(extra or {})} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [written(tmp_path / f"{name}.jsonl", name, count) for name, count in (("a", 30), ("b", 7), ("c", 11))]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("a.jsonl", ("a.jsonl", None)),
        ("a.jsonl:2", ("a.jsonl", Fraction(2))),
        ("a.jsonl:0.25", ("a.jsonl", Fraction(1, 4))),
        ("es://docs", ("es://docs", None)),
        ("es://docs:3", ("es://docs", Fraction(3))),
        ("https://host:9200", ("https://host:9200", None)),
        ("https://host:9200/docs", ("https://host:9200/docs", None)),
        ("https://host:9200/docs:2", ("https://host:9200/docs", Fraction(2))),
        ("hf://owner/name:train", ("hf://owner/name:train", None)),
        ("hf://owner/name:train:2", ("hf://owner/name:train", Fraction(2))),
    ],
)
def test_weights(source, expected):
    assert sources.weight_of(source) == expected


def test_a_weight_of_nothing_is_refused():
    with pytest.raises(errors.UserError, match="a weight of 0"):
        sources.weight_of("a.jsonl:0")


def test_every_source_gives_its_share(files):
    mixed = sources.open_source([f"{files[0]}:2", f"{files[1]}:1", f"{files[2]}:0.5"])
    drawn = [mixed.where(n).split("/")[-1][0] for n in islice(mixed.numbers(0, 0), 700)]
    assert Counter(drawn) == {"a": 400, "b": 200, "c": 100}
    # Evenly: no stretch of 7 has more than its share of any.
    assert all(Counter(drawn[i : i + 7]) == {"a": 4, "b": 2, "c": 1} for i in range(0, 700, 7))


def test_each_source_goes_through_its_own_epochs(files):
    mixed = sources.open_source([f"{files[0]}:3", f"{files[1]}:1"])
    drawn = [mixed.where(n) for n in islice(mixed.numbers(5, 0), 400)]
    for name, rows in (("a.jsonl", 30), ("b.jsonl", 7)):
        mine = [place for place in drawn if name in place]
        epochs = [mine[i : i + rows] for i in range(0, len(mine) - rows, rows)]
        assert all(len(set(epoch)) == rows for epoch in epochs) and len(epochs) > 5
        assert len(set(map(tuple, epochs))) == len(epochs)


def test_a_block_comes_from_one_source(files):
    """Each source has its share of the blocks, and goes on in its own order."""
    data = [f"{files[0]}:2", f"{files[1]}:1"]
    mixed = sources.open_source(data, sources.ReadOptions(block=8))
    places = [mixed.where(n) for n in islice(mixed.numbers(0, 0), 8 * 300)]
    blocks = [places[i : i + 8] for i in range(0, len(places), 8)]
    kinds = [{place.split("/")[-1][0] for place in block} for block in blocks]
    assert all(len(kind) == 1 for kind in kinds) and Counter(kind.pop() for kind in kinds) == {"a": 200, "b": 100}
    single = sources.open_source(data)
    for letter, source in zip("ab", single.sources, strict=True):
        mine = [place for place in places if f"{letter}.jsonl" in place]
        assert mine == [source.where(n) for n in islice(source.numbers(0, 0), len(mine))]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 1e9])
def test_sources_are_mixed_by_their_sizes(files, temperature):
    mixed = sources.open_source(files, sources.ReadOptions(temperature=temperature))
    shares = np.array([30, 7, 11]) ** (1 / temperature)
    assert mixed.counts / mixed.counts.sum() == pytest.approx(shares / shares.sum(), abs=2e-3)


@pytest.mark.parametrize("weights", [(5000, 1), (9000, 9000, 4), (99_999.5, 0.5, 1)])
def test_a_small_share_stays_small(files, weights):
    """Regression: a share below 1/2000 became as large as the others."""
    mixed = sources.open_source([f"{file}:{weight}" for file, weight in zip(files, weights, strict=False)])
    shares = np.array(weights) / sum(weights)
    assert mixed.counts / mixed.counts.sum() == pytest.approx(shares, rel=0.05, abs=1e-5)


def test_weights_of_many_digits_make_no_long_pattern(files):
    """Regression: three such weights made a pattern of a thousand million turns, and took all memory."""
    mixed = sources.open_source([f"{files[0]}:0.377", f"{files[1]}:0.911", f"{files[2]}:0.533"])
    assert len(mixed.pattern) < 1.1 * sources.LARGEST
    assert mixed.counts / mixed.counts.sum() == pytest.approx(np.array([0.377, 0.911, 0.533]) / 1.821, abs=2e-3)


def test_a_temperature_needs_sources_without_weights(files):
    with pytest.raises(errors.UserError, match="--source-temperature 2: the weights in --data"):
        sources.open_source([f"{files[0]}:2", files[1]], sources.ReadOptions(temperature=2.0))
    with pytest.raises(errors.UserError, match="--source-temperature 2: there is one source"):
        sources.open_source(files[:1], sources.ReadOptions(temperature=2.0))


@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("position", [0, 1, 6, 7, 100, 333])
def test_a_mixture_continues_anywhere(files, position, block):
    data = [f"{files[0]}:2", f"{files[1]}:1", f"{files[2]}:0.5"]
    straight = list(islice(sources.open_source(data, sources.ReadOptions(block=block)).numbers(1, 0), 400))
    again = sources.open_source(data, sources.ReadOptions(block=block))
    assert list(islice(again.numbers(1, position), 400 - position)) == straight[position:]
    assert sum(again.taken(position)) == position


def test_rows_keep_their_texts_and_places(files):
    mixed = sources.open_source([f"{files[0]}:1", f"{files[1]}:1"])
    for n in islice(mixed.numbers(0, 0), 20):
        number = int(mixed[n].query.rpartition("q")[2])
        assert mixed.where(n).endswith(f"{mixed[n].query[0]}.jsonl:{number + 1}")
    assert len(mixed) == 37 and mixed.format == "pair" and not mixed.has_negatives


def test_without_weights_files_are_one_set(files):
    assert isinstance(sources.open_source(files), Rows)
    assert len(sources.open_source(files)) == 48


def test_files_and_mixtures_are_sources(files):
    """tests/dataset/test_elastic_calls.py checks the same of an index."""
    for data in (files, [f"{files[0]}:1", f"{files[1]}:1"]):
        assert isinstance(sources.open_source(data), sources.Source)


def test_labels_do_not_mix_with_other_rows(files, tmp_path):
    labelled = written(tmp_path / "labels.jsonl", "l", 5, {"label": 1})
    with pytest.raises(errors.UserError, match="rows with a label do not mix with others; `sources:` in a file"):
        sources.open_source([f"{files[0]}:1", f"{labelled}:1"])
    with pytest.raises(errors.UserError, match="labels.jsonl:1: has the format .* need a source each: `sources:` in"):
        sources.open_source([files[0], labelled])
    parts = [([files[0]], None), ([labelled], None)]
    with pytest.raises(errors.UserError, match="rows with a label do not mix with others; --batches homogeneous"):
        sources.open_mixture(parts)
    for mixture in (parts, parts[::-1]):
        assert sources.open_mixture(mixture, sources.ReadOptions(block=4)).format == "pair"


def test_parquet(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": [f"n{i}", "m"], "id": i} for i in range(2500)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    read = Rows(find_files([str(tmp_path / "rows.parquet")]))
    assert len(read) == 2500 and read.format == "pair" and read.has_negatives
    assert read[2400] == Example("q2400", "p2400", ("n2400", "m"), 1)
    assert read.where(2400).endswith("rows.parquet:2401")


def test_invalid_parquet(tmp_path):
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(errors.UserError, match=r"rows\.parquet: "):
        Rows(find_files([str(tmp_path / "rows.parquet")]))


def test_a_hub_data_set(tmp_path, monkeypatch):
    """A local folder stands for a hub data set; their names have the same form."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    table = pa.Table.from_pylist([{"query": f"q{i}", "document": f"d{i}"} for i in range(12)])
    parquet.write_table(table, tmp_path / "owner" / "name" / "test-00000.parquet")
    read = sources.open_source(["hf://owner/name:test"])
    assert [read[i].query for i in range(12)] == [f"q{i}" for i in range(12)]
    assert read.where(3) == "hf://owner/name:test:4"
    with pytest.raises(errors.UserError, match="hf://owner/name: .*train"):
        sources.open_source(["hf://owner/name"])
    assert hub_validation("hf://owner/name") is None
    (tmp_path / "owner" / "name" / "test-00000.parquet").rename(tmp_path / "owner" / "name" / "validation-0.parquet")
    assert hub_validation("hf://owner/name") == "hf://owner/name:validation"
    assert hub_validation("hf://owner/name:train") is None


@pytest.mark.parametrize("name", ["hf://", "hf://a//b", "hf://a/b/c/d"])
def test_invalid_hub_names(name):
    with pytest.raises(errors.UserError, match="a data set's name is needed"):
        Rows(find_files([name]))


def test_invalid_es_queries():
    for query in ("{", "[1]"):
        with pytest.raises(errors.UserError, match="--es-query"):
            sources.open_source(["es://docs"], sources.ReadOptions(es_query=query))


def test_a_query_of_elasticsearch_needs_an_index(write_rows):
    """Regression: files were read whole, without a word."""
    file = str(write_rows([{"query": "a", "document": "b"}] * 3))
    options = sources.ReadOptions(es_query="{}")
    for opened in (sources.open_source, lambda data, how: sources.open_mixture([(data, None)] * 2, how)):
        with pytest.raises(errors.UserError, match="--es-query: none of the sources is an index"):
            opened([file], options)
