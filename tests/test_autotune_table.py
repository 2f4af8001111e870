"""Tables of tuned choices: what is written is read back, and of two rows the better one stays."""

import json
from pathlib import Path

import pytest
from test_autotune_lookup import CODE, HERE, SMALLER, row

from longspan.autotune import table


@pytest.mark.parametrize("text", ['{"rows": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_python_refuses_is_no_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(table.BadTable, match="it is not JSON"):
        table.read(tmp_path / "t.json")


def test_tables_are_one_line_a_row_sorted_and_read_back(tmp_path: Path) -> None:
    rows = [row(1, width=width) for width in (256, 64, 128)]
    table.write(tmp_path / "t.json", table.make(HERE, rows))
    lines = (tmp_path / "t.json").read_text().splitlines()
    assert [json.loads(line.rstrip(","))["key"]["width"] for line in lines[1:-1]] == [128, 256, 64]
    read = table.read(tmp_path / "t.json")
    assert table.device_of(read) == HERE
    assert sorted(read["rows"], key=str) == sorted(rows, key=str)


def test_merging_keeps_the_row_with_more_behind_it() -> None:
    first = table.make(HERE, [row(1, width=64), {**row(2, width=128), "raced": 30}])
    second = table.make(HERE, [row(3, width=128), row(4, width=256), row(5, width=64, triton="3.7.0")])
    merged = {one["key"]["width"]: one["choice"]["tile"] for one in table.merge(first, second, {})["rows"]}
    assert merged == {64: 5, 128: 2, 256: 4}
    old = table.make(HERE, [{**row(1, code="0" * 16), "raced": 30}])
    for pair in ((old, second), (second, old)):  # what raced more is of code that is no more
        merged = {one["key"]["width"]: one["choice"]["tile"] for one in table.merge(*pair, {"made.up": CODE})["rows"]}
        assert merged[64] == 5
    with pytest.raises(table.BadTable, match="one device, got sm_90-132sm-50mb-227kb and sm_90-114sm"):
        table.merge(first, table.make(SMALLER, []), {})
