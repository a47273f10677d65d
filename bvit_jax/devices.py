"""How many experts fit into small devices: the exported file against storage, the activations of one image against RAM.

Counted from shapes alone. A figure here says that the numbers fit, not that a program has been run: the room for the
program itself, its stack, an operating system and decoding buffers is not taken off, so every count is an upper bound.

Bytes of chips and memory modules are binary, as their datasheets mean them: 1 KB is 1024 bytes.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Literal

from bvit_jax import memory, scaling
from bvit_jax.config import Config
from bvit_jax.model_config import ModelConfig, require

_FLOAT_BYTES = 4
_KB, _MB, _GB = 2**10, 2**20, 2**30
_ARDUINO = "https://github.com/arduino/docs-content/blob"
"""The text of docs.arduino.cc."""


@dataclasses.dataclass(frozen=True)
class Device:
    """A small computer.

    Attributes:
        name: for people.
        ram_bytes: RAM that is counted.
        flash_bytes: storage of its own for the model's file; None where the user puts in a card of any size.
        in_place: whether weights are read where they lie in flash; otherwise they are loaded into RAM first.
        source: where the manufacturer states the sizes, and in which words.
        note: what is counted and what is not.
    """

    name: str
    ram_bytes: int
    flash_bytes: int | None
    in_place: bool
    source: str
    note: str


DEVICES: tuple[Device, ...] = (
    Device(
        "Arduino Nano 33 BLE",
        ram_bytes=256 * _KB,
        flash_bytes=1 * _MB,
        in_place=True,
        source=f"{_ARDUINO}/503d24f75932ed60ba051264c5e5de5cb3243a52/content/hardware/03.nano/boards/nano-33-ble"
        "/tech-specs.yml: 'nRF52840: 256 KB SRAM, 1MB flash'",
        note="Both on the chip; the program shares them.",
    ),
    Device(
        "Raspberry Pi Pico",
        ram_bytes=264 * _KB,
        flash_bytes=2 * _MB,
        in_place=True,
        source="https://datasheets.raspberrypi.com/pico/pico-product-brief.pdf: 264 KB on-chip SRAM, 2 MB of flash",
        note="RP2040. The flash is a chip beside it, read in place through a cache; the program shares it.",
    ),
    Device(
        "ESP32-S3-WROOM-1-N16R8",
        ram_bytes=512 * _KB,
        flash_bytes=16 * _MB,
        in_place=True,
        source="https://www.espressif.com/sites/default/files/documentation"
        "/esp32-s3-wroom-1_wroom-1u_datasheet_cn.pdf: 512 KB SRAM, up to 16 MB Quad SPI flash; "
        "https://docs.waveshare.com/ESP32-S3-DEV-KIT-N8R8 (a board's maker): N16R8 has 16 MB and 8 MB PSRAM",
        note="RAM is the SRAM of the chip; the 8 MB of PSRAM, slower and outside the chip, are not counted.",
    ),
    Device(
        "Arduino Portenta H7",
        ram_bytes=1 * _MB,
        flash_bytes=16 * _MB,
        in_place=True,
        source=f"{_ARDUINO}/00f347b2c4ec52a9a39687b5e0029a8f6bf1306a/content/hardware/04.pro/boards/portenta-h7"
        "/tech-specs.yml: 'Internal: 2 MB Flash, 1 MB RAM; External: 16 MB NOR Flash, 8 MB SDRAM'",
        note="STM32H747. RAM of the chip, in several banks, and the external flash for the file; the program has the "
        "2 MB on the chip. The 8 MB of SDRAM are not counted.",
    ),
    Device(
        "Jetson Nano",
        ram_bytes=4 * _GB,
        flash_bytes=16 * 10**9,
        in_place=False,
        source="NVIDIA, Jetson Nano System-on-Module Data Sheet, at https://developer.nvidia.com/embedded/downloads: "
        "4 GB 64-bit LPDDR4, 16 GB eMMC 5.1",
        note="The module for products. eMMC is a disk, its gigabytes taken as decimal: weights are loaded into RAM, "
        "which GPU and system share.",
    ),
    Device(
        "Raspberry Pi 5, 8 GB",
        ram_bytes=8 * _GB,
        flash_bytes=None,
        in_place=False,
        source="https://github.com/raspberrypi/documentation/blob/0aefd28ca13702b902ec8e30f6fe4ec60debafa6"
        "/documentation/asciidoc/computers/raspberry-pi-5/introduction.adoc: '4GB or 8GB LPDDR4X-4267 SDRAM'",
        note="The model of 8 GB. Storage is a microSD card of the user's choice, so RAM alone limits; the system "
        "shares it.",
    ),
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """One row of a table of what fits.

    Attributes:
        device, variant: names.
        num_experts: the most experts that fit; 0 if not even one does.
        bytes_full: of the file with that many experts; 0 for none.
        bound: what keeps one more expert out: `ram` or `flash`; `limit` where the search ended.
    """

    device: str
    variant: str
    num_experts: int
    bytes_full: int
    bound: Literal["ram", "flash", "limit"]


def activation_bytes(model: ModelConfig) -> int:
    """Bytes of float32 activations alive at once while one image is classified, by a plain schedule.

    Layers run one after the other, each in the larger of its two halves. T tokens, D = d_model, F = d_ff, E experts,
    K of them a token:

    - attention, 5 T D + T T: the residual stream, queries, keys and values of all heads, the scores of one head at a
      time, and the output, which takes the place of the normed input;
    - feed-forward, T D + D + max(E, K (D + F)): the residual stream, and of one token at a time the normed input, then
      the router's logits, then for each of its K choices a rotated (or output) row and a hidden row. Rotations turn
      rows in place. Dense layers have no logits and K = 1.

    The image, which a camera may deliver in pieces, the angles' sines and cosines and any decoded weights are left
    out: it is a lower bound for this schedule. One that treats attention head by head would need less.
    """
    rows, columns = model.grid
    tokens, width = rows * columns + 1, model.d_model
    row = width + model.d_ff
    attention = 5 * tokens * width + tokens * tokens
    one_token = max(model.num_experts, model.top_k * row) if any(model.is_moe_by_layer) else row
    return _FLOAT_BYTES * max(attention, tokens * width + width + one_token)


def most_experts(config: Config, variant: scaling.Variant, device: Device, limit: int = 65536) -> int:
    """Returns the largest number of experts with which a model runs on a device; 0 if not even one fits.

    Bytes grow with the number of experts, so it is found by bisection. (Only the header may shrink, by the digits of
    one number in its text, which outweighs an expert in no model of practical size.)

    Args:
        config: the run whose model it is; its family, form and number of experts are replaced.
        variant: the kind of model and how it is stored.
        device: where it shall run.
        limit: where the search ends. A dense model has one expert at most.

    Raises:
        ConfigError: for a limit below 1.
    """
    require(limit >= 1, "limit", limit, "at least 1")
    numbers = range(1, (1 if variant.family == "dense" else limit) + 1)
    return bisect.bisect_left(numbers, True, key=lambda number: _exceeded(config, variant, device, number) is not None)


def _exceeded(
    config: Config, variant: scaling.Variant, device: Device, num_experts: int
) -> Literal["ram", "flash"] | None:
    """Returns what the model is too large for; of both, RAM."""
    own = scaling.with_experts(config, variant, num_experts)
    in_ram = activation_bytes(own.model)
    if in_ram > device.ram_bytes:  # the quick answer first: counting the file takes a while
        return "ram"
    file_bytes = memory.ledger(own, variant.storage).bytes_full
    if not device.in_place and in_ram + file_bytes > device.ram_bytes:
        return "ram"
    return "flash" if device.flash_bytes is not None and file_bytes > device.flash_bytes else None


def fits(
    config: Config, variants: Sequence[scaling.Variant], devices: Sequence[Device] = DEVICES, limit: int = 65536
) -> list[Fit]:
    """Returns a row for each device and variant, devices first; arguments as in `most_experts`."""
    return [_fit(config, variant, device, limit) for device in devices for variant in variants]


def _fit(config: Config, variant: scaling.Variant, device: Device, limit: int) -> Fit:
    number = most_experts(config, variant, device, limit)
    own = scaling.with_experts(config, variant, max(number, 1))
    file_bytes = memory.ledger(own, variant.storage).bytes_full if number else 0
    last = 1 if variant.family == "dense" else limit
    bound = _exceeded(config, variant, device, number + 1) if number < last else None
    return Fit(device.name, variant.name, number, file_bytes, bound or "limit")
