from bvit_jax import markdown


def test_a_table_by_hand() -> None:
    assert markdown.table(["case", "", "kB"], [["a", "1", "2.0"], ["b", "", "3"]]) == [
        "| case | - | kB |",
        "|---|---|---|",
        "| a | 1 | 2.0 |",
        "| b | - | 3 |",
    ]
    assert markdown.table(["case"], []) == ["| case |", "|---|"]
