import dataclasses
import itertools

import pytest

from bvit_jax import devices, memory, scaling
from bvit_jax.config import Config, resolve
from bvit_jax.devices import Device
from bvit_jax.model_config import ConfigError
from bvit_jax.scaling import Variant
from bvit_jax.storage import Storage
from configs import paper
from tests.conftest import KINDS, make_config

# d_model 8, d_ff 16, 2 layers, 2 heads, 4 experts, 2 a token, 2 stages; images of 8 x 8 x 1 in 4 patches.
SMALL = {"d_model": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "patch_size": 4, "num_experts": 4, "num_stages": 2}
SMALL |= {"top_k": 2}
STORAGES = (Storage(), Storage(angle_bits=8, experts="ternary", router="int8", backbone="int8"))
VARIANTS = [Variant(*kind, storage) for kind in KINDS for storage in STORAGES]
LARGE = 10**12
KB, MB, GB = 1024, 1024**2, 1024**3


def small(family: str = "butterfly", form: str = "separate", **changes: object) -> Config:
    fields = {"family": family, "form": form} | SMALL | changes
    return make_config(**{f"model__{name}": value for name, value in fields.items()})


def device(ram_bytes: int = LARGE, flash_bytes: int | None = LARGE, in_place: bool = True) -> Device:
    return Device("board", ram_bytes, flash_bytes, in_place, "", "")


def file_bytes(config: Config, variant: Variant, num_experts: int) -> int:
    return memory.ledger(scaling.with_experts(config, variant, num_experts), variant.storage).bytes_full


def activations(config: Config, variant: Variant, num_experts: int) -> int:
    return devices.activation_bytes(scaling.with_experts(config, variant, num_experts).model)


def test_sizes_are_those_of_the_datasheets():
    assert {each.name: (each.ram_bytes, each.flash_bytes, each.in_place) for each in devices.DEVICES} == {
        "Arduino Nano 33 BLE": (256 * KB, 1 * MB, True),
        "Raspberry Pi Pico": (264 * KB, 2 * MB, True),
        "ESP32-S3-WROOM-1-N16R8": (512 * KB, 16 * MB, True),
        "Arduino Portenta H7": (1 * MB, 16 * MB, True),
        "Jetson Nano": (4 * GB, 16 * 10**9, False),
        "Raspberry Pi 5, 8 GB": (8 * GB, None, False),
    }
    assert all("https://" in each.source and each.note for each in devices.DEVICES)


def test_attention_is_the_larger_half_of_a_layer_of_many_tokens():
    # 5 tokens of 8: residual, queries, keys, values, output 5 x 40 = 200; scores 25; 225 floats.
    # Feed-forward: residual 40, one input 8, 2 rows of 8 + 16: 96 floats.
    assert devices.activation_bytes(small().model) == 4 * 225


@pytest.mark.parametrize(
    ("changes", "floats"),
    [
        # Images of one patch: 2 tokens. Attention 5 x 16 + 4 = 84.
        ({"top_k": 4}, 16 + 8 + 4 * (8 + 16)),  # 120
        ({"top_k": 2}, 84),  # feed-forward 16 + 8 + 48 = 72
        ({"top_k": 1, "num_experts": 128}, 16 + 8 + 128),  # logits are more than a row of 24
        ({"top_k": 2, "num_experts": 128, "moe_layers": "second"}, 16 + 8 + 128),
        ({"family": "dense", "d_ff": 128}, 16 + 8 + (8 + 128)),  # no logits, one row
        ({"family": "dense", "d_ff": 128, "top_k": 3, "num_experts": 256}, 16 + 8 + (8 + 128)),
        ({"family": "standard", "top_k": 4}, 120),
    ],
)
def test_feed_forward_is_the_larger_half_of_a_layer_of_few_tokens(changes, floats):
    assert devices.activation_bytes(small(**{"patch_size": 8} | changes).model) == 4 * floats


def test_activations_of_the_papers_model():
    # 65 tokens of 256: 5 x 16,640 + 4,225 = 87,425 floats; feed-forward 16,640 + 256 + 2 x 1,280 = 19,456.
    assert devices.activation_bytes(resolve(paper.get_config().to_dict()).model) == 4 * 87_425


@pytest.mark.parametrize("variant", VARIANTS)
def test_bisection_finds_what_a_linear_scan_finds(variant):
    config, limit = small(), 1 if variant.family == "dense" else 12
    sizes = [file_bytes(config, variant, number) for number in range(1, limit + 1)]
    assert all(fewer < more for fewer, more in itertools.pairwise(sizes))
    for flash in {0, *sizes, *(size - 1 for size in sizes), *(size + 1 for size in sizes)}:
        expected = sum(size <= flash for size in sizes)
        assert devices.most_experts(config, variant, device(flash_bytes=flash), 12) == expected


def test_the_file_may_fill_the_flash_to_the_last_byte():
    config, variant = small(), Variant("butterfly", "tied", Storage(angle_bits=8))
    size = file_bytes(config, variant, 9)
    found = [devices.most_experts(config, variant, device(flash_bytes=size + more)) for more in (-1, 0, 1)]
    assert found == [8, 9, 9]


def test_activations_must_fit_the_ram():
    config, variant = small(), Variant("butterfly", "tied", Storage())
    assert devices.most_experts(config, variant, device(ram_bytes=900), 20) == 20
    assert devices.most_experts(config, variant, device(ram_bytes=899), 20) == 0


def test_logits_of_many_experts_fill_the_ram():
    # 2 tokens: attention is 84 floats, feed-forward 16 + 8 + E: 100 floats of RAM hold the logits of 76 experts.
    config = small(patch_size=8)
    for variant in (Variant("butterfly", "tied", Storage()), Variant("standard", "separate", Storage())):
        assert devices.most_experts(config, variant, device(ram_bytes=400), 100) == 76


def test_weights_that_are_not_read_in_place_share_the_ram_with_the_activations():
    config, variant = small(), Variant("butterfly", "separate", Storage())
    both = file_bytes(config, variant, 7) + activations(config, variant, 7)
    for flash in (None, LARGE):
        found = [
            devices.most_experts(config, variant, device(both + more, flash, in_place=False)) for more in (-1, 0, 1)
        ]
        assert found == [6, 7, 7]
    # They need room in the flash all the same.
    assert devices.most_experts(config, variant, device(LARGE, file_bytes(config, variant, 3), in_place=False)) == 3


def test_a_device_without_flash_is_limited_by_ram_alone():
    config, variant = small(), Variant("standard", "separate", Storage())
    assert devices.most_experts(config, variant, device(LARGE, None, in_place=False), 33) == 33


def test_a_dense_model_has_one_expert_or_none():
    config, variant = small(), Variant("dense", "separate", Storage())
    size = file_bytes(config, variant, 1)
    assert devices.most_experts(config, variant, device(flash_bytes=size)) == 1
    assert devices.most_experts(config, variant, device(flash_bytes=size - 1)) == 0


def test_one_expert_is_searched_when_the_limit_is_one():
    config, variant = small(), Variant("butterfly", "tied", Storage())
    size = file_bytes(config, variant, 1)
    assert devices.most_experts(config, variant, device(flash_bytes=size), 1) == 1
    assert devices.most_experts(config, variant, device(flash_bytes=size - 1), 1) == 0
    with pytest.raises(ConfigError, match=r"limit = 0: it must be at least 1"):
        devices.most_experts(config, variant, device(), 0)


def test_the_search_ends_at_the_limit():
    config, variant = small(), Variant("butterfly", "tied", Storage())
    assert devices.most_experts(config, variant, device()) == 65536


@pytest.mark.parametrize("variant", VARIANTS)
def test_more_room_never_holds_fewer_experts(variant):
    config = small()
    found = [devices.most_experts(config, variant, device(flash_bytes=2**power), 32) for power in range(10, 21)]
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == (1 if variant.family == "dense" else 32)


def test_rows_say_what_keeps_one_more_expert_out():
    config, variant = small(), Variant("butterfly", "tied", Storage())
    dense = Variant("dense", "separate", Storage())
    size = file_bytes(config, variant, 5)
    boards = [
        dataclasses.replace(device(flash_bytes=size), name="flash"),
        dataclasses.replace(device(size + 900, None, in_place=False), name="shared"),
        dataclasses.replace(device(ram_bytes=10), name="ram"),
        dataclasses.replace(device(), name="large"),
    ]
    rows = devices.fits(config, [variant, dense], boards, limit=50)
    assert [dataclasses.astuple(row) for row in rows if row.variant == variant.name] == [
        ("flash", variant.name, 5, size, "flash"),
        ("shared", variant.name, 5, size, "ram"),
        ("ram", variant.name, 0, 0, "ram"),
        ("large", variant.name, 50, file_bytes(config, variant, 50), "limit"),
    ]
    assert [row.num_experts for row in rows if row.variant == dense.name][2:] == [0, 1]
    assert rows[-1].bound == "limit"
    assert [row.device for row in rows[::2]] == [row.device for row in rows[1::2]] == [each.name for each in boards]


def test_the_papers_model_on_every_device():
    config = resolve(paper.get_config().to_dict())
    small_backbone = Storage(angle_bits=8, backbone="int8")
    variants = [
        Variant("standard", "separate", small_backbone),
        Variant("butterfly", "separate", small_backbone),
        Variant("butterfly", "tied", small_backbone),
    ]
    rows = {(row.device, row.variant): row for row in devices.fits(config, variants, limit=2048)}
    assert len(rows) == len(devices.DEVICES) * len(variants)
    standard, separate, tied = (
        {board: row for (board, variant), row in rows.items() if variant == kind.name} for kind in variants
    )
    for board in ("Arduino Nano 33 BLE", "Raspberry Pi Pico"):
        assert {kind[board].num_experts for kind in (standard, separate, tied)} == {0}
        assert {kind[board].bound for kind in (standard, separate, tied)} == {"ram"}
    for board in ("ESP32-S3-WROOM-1-N16R8", "Arduino Portenta H7"):
        assert standard[board].num_experts <= 2
        assert 300 < separate[board].num_experts < tied[board].num_experts < 2000
        assert 16_000_000 < tied[board].bytes_full <= 16 * MB
    for board in ("Jetson Nano", "Raspberry Pi 5, 8 GB"):
        assert 200 < standard[board].num_experts < 700
        assert tied[board].bound == separate[board].bound == "limit"
