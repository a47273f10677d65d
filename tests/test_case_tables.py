import dataclasses

from bvit_jax import case_tables, comparison, expert_use, sweep
from tests.test_comparison import make, scored

USE = expert_use.Means(output_cosine=0.5, experts_used=3.0, lost_shuffled=0.25, lost_one=0.125)


def tables(accuracies: dict[tuple[str, str], tuple[float, ...]], baselines: list[str], **chosen: object) -> list[str]:
    trials = [make(*case, seed, **chosen) for case, line in accuracies.items() for seed in range(len(line))]
    rows = [scored(trial, value) for trial, value in zip(trials, sum(accuracies.values(), ()), strict=True)]
    rows = [dataclasses.replace(row, **dataclasses.asdict(USE)) if row.form != "-" else row for row in rows]
    found = comparison.compare(trials, rows, "kind", baselines)
    text = case_tables.to_markdown(sweep.summarise(trials, rows), found, "kind")
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_accuracies_and_differences_by_place_by_hand() -> None:
    accuracies = {("few", "dense"): (0.5, 0.6), ("few", "mixture"): (0.6, 0.8), ("pairs", "mixture"): (0.25,)}
    size = sweep.result_row(make("few", "mixture", 0)).bytes_full_ffn / 1e3
    dense = sweep.result_row(make("few", "dense", 0)).bytes_full_ffn / 1e3
    # Two values lie half their distance from their mean, and t of one degree of freedom is 12.706.
    assert tables(accuracies, ["dense"]) == [
        "| kind | few | pairs | cosine | lost, one expert | kB |",
        f"| dense | 55.00 ± 63.53 | - | - | - | {dense:.1f} |",
        f"| mixture | 70.00 ± 127.06 | 25.00 (1) | 0.50 / 0.50 | 12.5 / 12.5 | {size:.1f} |",
        "| kind | few | pairs |",
        "| mixture | +15.00 ± 63.53 | - |",
    ]


def test_several_places_have_a_column_of_all() -> None:
    accuracies = {(bed, kind): (0.5,) for bed in ("few", "pairs") for kind in ("dense", "mixture")}
    accuracies["pairs", "mixture"] = (0.75,)
    assert tables(accuracies, ["dense"])[-2:] == [
        "| kind | few | pairs | all places |",
        "| mixture | +0.00 | +25.00 | +12.50 |",
    ]


def test_every_baseline_has_a_table_and_a_single_seed_no_interval() -> None:
    accuracies = {("few", "dense"): (0.5,), ("few", "mixture"): (0.25,)}
    assert [line for line in tables(accuracies, ["dense", "mixture"]) if line.endswith("00 |")] == [
        "| mixture | -25.00 |",
        "| dense | +25.00 |",
    ]


def test_values_of_the_grid_are_places_too() -> None:
    header = tables({("few", "dense"): (0.5,)}, [], **{"loss.router_z": 0.5})[0]
    assert header == "| kind | few loss.router_z=0.5 | cosine | lost, one expert | kB |"


def test_every_place_has_an_entry_where_they_differ() -> None:
    accuracies = {("few", "dense"): (0.5,), ("pairs", "dense"): (0.5,), ("pairs", "mixture"): (0.5,)}
    line = tables(accuracies, [])[-1]
    assert line.startswith("| mixture | - | 50.00 | - / 0.50 | - / 12.5 | ")


def test_a_run_of_several_places_stands_in_all_their_columns() -> None:
    sizes = [{"model.num_experts": number} for number in (4, 8)]
    dense = dataclasses.replace(make("few", "dense", 0, **sizes[0]), also=(sizes[1],))
    text = case_tables.to_markdown(sweep.summarise([dense], [scored(dense, 0.5)]), [], "kind")
    assert "| few model.num_experts=4 | few model.num_experts=8 |" in text
    assert "| dense | 50.00 | 50.00 |" in text


def test_nothing_finished_is_no_table() -> None:
    assert case_tables.to_markdown([], [], "kind") == ""
